"""The command line, what it computes and how it is shown."""

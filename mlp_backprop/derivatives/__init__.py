"""The public functions on derivatives: a docstring, checks, the choice of a way, and the call."""

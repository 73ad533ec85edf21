"""Every derivative held to differences, and gradients to torch."""

"""Every derivative held to differences, and gradients to torch.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []

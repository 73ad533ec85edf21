"""Nets as data: the triple Net, initial values, parameters as one vector.

What is public can be imported from mlp_backprop itself.
"""

from mlp_backprop.types import Net

__all__ = ["Net"]

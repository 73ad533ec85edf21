"""Whole passes made faster; choice.py is the one door to them.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []

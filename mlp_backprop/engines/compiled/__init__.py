"""The engine that Numba compiles, for NumPy's arrays.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []

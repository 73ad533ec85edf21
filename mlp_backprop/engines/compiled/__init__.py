"""The engine that Numba compiles, for NumPy's arrays."""

"""The engine of CUDA kernels, for CuPy's arrays: each tier's Python beside its source.

Internal: what is public can be imported from mlp_backprop itself.
"""

__all__: list[str] = []

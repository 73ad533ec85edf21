"""The engine of CUDA kernels, for CuPy's arrays: each tier's Python beside its source."""

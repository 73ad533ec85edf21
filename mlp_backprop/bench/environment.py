"""What this package runs on here: versions, BLAS, CPUs, backends; for `info` and bug reports."""

import platform
from importlib import metadata
from typing import NamedTuple

import numpy as np

import mlp_backprop
from mlp_backprop.edge.backends import BackendStatus, backends
from mlp_backprop.engines.threads import thread_count, usable_cpus


class Blas(NamedTuple):
    """The library behind NumPy's matrix products; threads are None where they are unknown."""

    name: str
    version: str
    threads: int | None


class Compiled(NamedTuple):
    """The numba engine: seconds of compiling, 0 if it came from the cache; where that is."""

    seconds: float
    cache_directory: str | None


class Environment(NamedTuple):
    """Everything `info` prints; `compiled` is None without Numba."""

    versions: dict[str, str]
    blas: Blas
    cpus: int
    threads: int
    compiled: Compiled | None
    backends: list[BackendStatus]


def environment() -> Environment:
    """Look around; imports every backend that is installed."""
    return Environment(
        versions={
            "mlp-backprop": mlp_backprop.__version__,
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            "array-api-compat": metadata.version("array-api-compat"),
        },
        blas=_blas(),  # before backends(): their libraries bring a BLAS of their own
        cpus=usable_cpus(),
        threads=thread_count(),
        compiled=_compiled(),
        backends=backends(),
    )


def _compiled() -> Compiled | None:
    """Compile the numba engine's pass for both float types, unless the cache has it already."""
    try:
        from mlp_backprop.engines.compiled import engine
    except ImportError:
        return None
    for dtype in (np.float32, np.float64):
        engine.compiled_pass(np.dtype(dtype))
    return Compiled(*engine.compile_info())


def _blas() -> Blas:
    build = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    return Blas(build["name"], build["version"], _blas_threads())


def _blas_threads() -> int | None:
    try:
        import threadpoolctl
    except ImportError:
        return None
    threads = [
        pool["num_threads"]
        for pool in threadpoolctl.threadpool_info()
        if pool["user_api"] == "blas"
    ]
    return max(threads, default=None)

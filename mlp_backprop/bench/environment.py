"""What this package runs on here: versions, BLAS, CPUs, backends; for `info` and bug reports."""

import platform
import time
from importlib import metadata
from typing import NamedTuple

import numpy as np

import mlp_backprop
from mlp_backprop.edge.backends import BACKENDS, Backend, BackendStatus, status
from mlp_backprop.engines.threads import thread_count, usable_cpus


class Blas(NamedTuple):
    """The library behind NumPy's matrix products; threads are None where they are unknown."""

    name: str
    version: str
    threads: int | None


class Environment(NamedTuple):
    """Everything `info` prints; `import_seconds` is by backend."""

    versions: dict[str, str]
    blas: Blas
    cpus: int
    threads: int
    backends: list[BackendStatus]
    import_seconds: dict[str, float]


def environment() -> Environment:
    """Look around; imports every backend that is installed, and compiles nothing."""
    blas = _blas()  # before the backends: their libraries bring a BLAS of their own
    found = {row.name: _timed_status(row) for row in BACKENDS.values()}
    return Environment(
        versions={
            "mlp-backprop": mlp_backprop.__version__,
            "Python": platform.python_version(),
            "NumPy": np.__version__,
            "array-api-compat": metadata.version("array-api-compat"),
        },
        blas=blas,
        cpus=usable_cpus(),
        threads=thread_count(),
        backends=[backend for backend, _ in found.values()],
        import_seconds={name: seconds for name, (_, seconds) in found.items()},
    )


def _timed_status(row: Backend) -> tuple[BackendStatus, float]:
    began = time.perf_counter()
    return status(row), time.perf_counter() - began


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

"""The list of array libraries on which the tests run, and the way to put no engine on any.

A test that takes `backend` runs once per library, so it is written once, in NumPy: it makes its
arrays with `backend.array` and reads results with `backend.numpy`.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from cuda_card import cupy_on_a_card
from locks import held

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends, kinds
from mlp_backprop.engines import choice, memory

BUILD = Path(__file__).parents[1] / "build"  # kept from run to run

# JAX reads these when it is imported. Without the first, it has no float64; with the others, an
# operation that one process has compiled is read by the next: to compile them is most of its time.
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(BUILD / "jax")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# What it compiles runs once or twice: not optimised, it is there in half the time. A flag that XLA
# does not know ends the process: this one is given to the releases it was tried on.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
if find_spec("jaxlib") and version("jaxlib").startswith("0.10."):
    os.environ["XLA_FLAGS"] = "--xla_cpu_use_fusion_emitters=false"

# torch reads this, and OpenBLAS does not: threads of torch that wait for each other in small
# operations spin on the cores of the other workers.
os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def numba_compiles_once() -> Iterator[None]:
    """What one worker compiles, for seconds, comes to the others from Numba's cache."""
    parts = sys.modules.get("mlp_backprop.engines.compiled.parts")
    if parts is None:
        yield
        return

    def from_cache(compile_: Any, make: Any) -> Any:
        # One at a time of those that share a file of the cache; others may be compiled meanwhile.
        maker, *_ = make(0).__qualname__.split(".")
        with held(BUILD / "numba" / f"{maker}.lock"):
            return right(compile_, make)

    right = parts.from_cache
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "from_cache", from_cache)
        yield


@pytest.fixture(scope="module", autouse=True)
def jax_forgets() -> Iterator[None]:
    """JAX keeps a megabyte for each of thousands of operations: at the end of a file it lets go."""
    yield
    jax = sys.modules.get("jax")
    if jax is not None:
        jax.clear_caches()


class Backend(NamedTuple):
    """One array library: NumPy array to its own, and back to a NumPy copy."""

    name: str
    array: Callable[[np.ndarray], Any]
    numpy: Callable[[Any], np.ndarray]


BACKENDS = {
    "numpy": ("array", np.array),
    "torch": ("tensor", lambda tensor: tensor.numpy(force=True).copy()),
    "jax": ("numpy.array", np.array),
    "array_api_strict": ("asarray", np.array),
    "cupy": ("array", lambda array: array.get()),
}


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.gpu] * (name == "cupy")) for name in BACKENDS]
)
def backend(request: pytest.FixtureRequest) -> Backend:
    """Every array library in turn; one that is missing is skipped, with the reason."""
    name = request.param
    array, numpy = BACKENDS[name]
    if name == "cupy":
        cupy_on_a_card()
    try:
        if name in backends.BACKENDS:
            backends.namespace(name)
        library = importlib.import_module(name)
    except ImportError as error:
        pytest.skip(str(error))
    for attribute in array.split("."):
        library = getattr(library, attribute)
    return Backend(name, library, numpy)


@pytest.fixture(scope="session")
def cupy() -> Any:
    """CuPy, where there is a card."""
    return cupy_on_a_card()


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """No test knows the calls of another; and what forgets those of the test itself.

    A mutant is not found by a call that was right before.
    """

    def forget() -> None:
        monkeypatch.setattr(kinds, "seen", kinds.Seen())
        monkeypatch.setattr(choice, "_kept", memory.Kept())

    forget()
    return forget


@pytest.fixture
def derivation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """For mutants of the derivation and its tables: no faster engine may stand in for them."""

    def only(spec: Spec, *_: object) -> choice.Pass:
        return choice.Pass(partial(choice.derivation, spec))

    monkeypatch.setattr(choice, "plan", only)

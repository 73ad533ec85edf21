"""What is compiled: by itself, once per dtype, when it is first used, and then from Numba's cache.

A part is a compiled function that others call by its address. So each is compiled once, whatever
calls it, and of the tables only the rows that are asked for; what calls them compiles in no time.

A part is made by a function of a checksum of the sources: mentioned in the code, it becomes a
piece of the key in the cache, which by itself looks at one file alone.
"""

import sys
import zlib
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from numba import cfunc, from_dtype, njit, types

from mlp_backprop.engines.compiled import curvatures, optimizers, products, rows
from mlp_backprop.engines.compiled.formulas import OPTIONS
from mlp_backprop.types import DType

NUMBER = types.intp


@cache
def address(dtype: DType, name: str, k: int | None = None) -> int:
    """Where a part begins: "product", "dots", or row k of a table such as "activation"."""
    make, arguments = PARTS[name]
    real = types.CPointer(from_dtype(np.dtype(dtype)))
    signature = types.void(*(real if argument == "A" else NUMBER for argument in arguments))
    which = {} if k is None else {"k": k}
    part = from_cache(partial(cfunc, signature), partial(make, **which))
    _kept.append(part)
    return int(part.address)


_kept: list[Any] = []  # an address is good as long as its part


@cache
def entry(make: Callable[..., Any], signature: Any, *which: Any) -> Any:
    """What Python calls: the compiled function of this signature that make(sources, *which) gives.

    The interpreter lock is released meanwhile.
    """
    return from_cache(partial(njit, signature, nogil=True), lambda sources: make(sources, *which))


@cache
def work(make: Callable[..., Any], signature: Any, *which: Any) -> int:
    """The address of the same, for threads that never see Python."""
    # Numba's key is the same for a function that Python calls and for one that it cannot, of which
    # each would be taken for the other: another number tells them apart.
    part = from_cache(partial(cfunc, signature), lambda sources: make(sources + 1, *which))
    _kept.append(part)
    return int(part.address)


def from_cache(compile_: Callable[..., Any], make: Callable[[int], Any]) -> Any:
    """A function from Numba's cache, or compiled now."""
    function = make(version_of_sources())
    _patience.say_once()
    start = perf_counter()
    try:
        return compile_(cache=True, **OPTIONS)(function)
    except RuntimeError:  # Numba finds no directory that it may write to
        return compile_(**OPTIONS)(function)
    finally:
        _patience.seconds += perf_counter() - start


class _Patience:
    """For how long this process has compiled: who waits at a terminal should know why."""

    LIMIT = 2.0

    def __init__(self) -> None:
        self.seconds, self.has_said = 0.0, False

    def say_once(self) -> None:
        if self.seconds > self.LIMIT and not self.has_said:
            self.has_said = True
            if sys.stderr is not None and sys.stderr.isatty():
                sys.stderr.write("mlp_backprop compiles for this processor, once ...\n")


_patience = _Patience()


@cache
def version_of_sources() -> int:
    """A checksum of all files that are compiled."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(file.read_bytes() for file in files))


def _product(sources: int) -> Callable[..., None]:
    def product(start, b, C, C_row, A, A_row, A_k, B, B_k, n_rows, n_k, m):  # type: ignore[no-untyped-def]
        _ = sources
        products.product(start, b, C, C_row, A, A_row, A_k, B, B_k, n_rows, n_k, m)

    return product


def _dots(sources: int) -> Callable[..., None]:
    def dots(C, C_row, A, A_row, B, B_row, n_rows, n_columns, m):  # type: ignore[no-untyped-def]
        _ = sources
        products.dots(C, C_row, A, A_row, B, B_row, n_rows, n_columns, m)

    return dots


# By name: the maker, and which arguments are arrays (A) and which numbers (n).
PARTS: dict[str, tuple[Callable[..., Callable[..., None]], str]] = {
    "product": (_product, "nAAnAnnAnnnn"),
    "dots": (_dots, "AnAnAnnnn"),
    "activation": (rows.activation, "AAnnn"),
    "activation2": (rows.activation2, "AAAnnn"),
    "activation3": (rows.activation3, "AAAAnnn"),
    "loss": (rows.loss, "AAAnnn"),
    "output_product": (curvatures.output_product, "AAAAnnn"),
    "jet": (rows.jet, "nnAAAnnnnn"),
    "jet_up": (rows.jet_up, "nAAAAnnnnn"),
    "jet_down": (rows.jet_down, "nAAAAAnnnnn"),
    "update": (optimizers.update, "AAAAAnnnn"),
}

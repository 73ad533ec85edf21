"""What kernels of small nets are handed: arrays as they can read them, and places for results."""

import math
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any

import numpy as np

from mlp_backprop.types import Array, Layer

LossAndGrads = tuple[Array, list[Layer]]

# Types of y, as they are called in C; labels of other types are cast to int64.
TARGETS = {
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "long long",
}

# CuPy 13 has passed None as another address.
NULL = np.uint64(0)


def n_params(sizes: tuple[int, ...]) -> int:
    return sum(n_out * (n_in + 1) for n_in, n_out in pairwise(sizes))


def vector_bytes(n_columns: int) -> int:
    """The widest vectors of floats that divide a row: 16, 8 or 4 bytes."""
    return math.gcd(4 * n_columns, 16)


def readable(A: Array, alignment: int = 4) -> Array:
    """A, or a copy: C-contiguous, at a multiple of so many bytes."""
    is_readable = A.flags.c_contiguous and A.data.ptr % alignment == 0
    return A if is_readable else A.copy(order="C")


def pointers_to(arrays: list[Array]) -> Any:
    """A struct of pointers, as an argument of a kernel."""
    return _struct(*[A.data.ptr for A in arrays])


# CuPy's pool gives the same addresses again and again.
@lru_cache(maxsize=256)
def _struct(*addresses: int) -> Any:
    return np.array(addresses, np.uint64).view(f"V{8 * len(addresses)}")


class Results:
    """Where a pass writes, in float32: a new array at every call, or the caller's."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        layers = ([(n_out, n_in), (n_out,)] for n_in, n_out in pairwise(sizes))
        self.shapes = [*chain.from_iterable(layers), ()]  # the last one is the loss
        self.places = [4 * k for k in accumulate(map(math.prod, self.shapes), initial=0)]
        self.size = self.places.pop() // 4

    def __call__(self, out: list[Layer] | None) -> LossAndGrads:
        """A loss and gradients, of no particular values; these are `out` if there is one."""
        import cupy

        if out is not None:
            return cupy.empty((), np.float32), out
        memory = cupy.empty(self.size, np.float32).data
        *views, loss = [
            cupy.ndarray(shape, np.float32, memory + place)
            for shape, place in zip(self.shapes, self.places, strict=True)
        ]
        return loss, [Layer(*pair) for pair in zip(views[::2], views[1::2], strict=True)]

"""What kernels of small nets are handed: arrays as they can read them, and places for results."""

import math
from functools import lru_cache
from itertools import accumulate, chain, pairwise
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.types import Array, DType, Layer, Layers, LossAndGrads, flat


class Arguments(NamedTuple):
    """What every tier's run is given, for loss and gradients in new arrays or in those of `out`.

    They are summed over the rows of X, and for a mean divided by the sum of the weights. `out`
    holds C-contiguous arrays.
    """

    params: Layers
    X: Array
    y: Array
    weight: Array | None
    mean: bool
    out: Layers | None
    constant_X: bool = False  # for a bound call: what is made of X alone may be kept


# Types of y, as they are called in C; labels of other types are cast to int64.
TARGETS = {
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "long long",
}


def constants_of(spec: Spec, target: DType) -> dict[str, Any]:
    """What the kernels of narrow nets are compiled for: the net, its loss, this type of y."""
    return {
        "SIZES": ",".join(map(str, spec.sizes)),
        "ACTIVATIONS": ",".join(row.name.upper() for row in spec.activations),
        "LOSS": spec.loss.name.upper(),
        "TARGET": TARGETS[np.dtype(target)],
    }


# CuPy 13 has passed None as another address.
NULL = np.uint64(0)


def vector_bytes(n_columns: int) -> int:
    """The widest vectors of floats that divide a row: 16, 8 or 4 bytes."""
    return math.gcd(4 * n_columns, 16)


def readable(A: Array, alignment: int = 4) -> Array:
    """A, or a copy: C-contiguous, at a multiple of so many bytes."""
    is_readable = A.flags.c_contiguous and A.data.ptr % alignment == 0
    return A if is_readable else A.copy(order="C")


def readable_inputs(
    arguments: Arguments, X_vectors: int, y_vectors: int = 4
) -> tuple[list[Array], Array, Array, Any]:
    """Parameters, X, y and weights as the kernels of narrow nets read them, copied if need be."""
    params, X, y, weight = arguments[:4]
    if y.dtype not in TARGETS:
        y = y.astype(np.int64)
    own = [readable(A) for A in flat(params)]
    data = readable(X, X_vectors), readable(y, y_vectors if y.ndim == 2 else 4)
    return own, *data, NULL if weight is None else readable(weight)


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

    def __call__(self, out: Layers | None) -> LossAndGrads:
        """A loss and gradients, of no particular values; these are `out` if there is one."""
        import cupy

        if out is not None:
            return LossAndGrads(cupy.empty((), np.float32), out)
        memory = cupy.empty(self.size, np.float32).data
        *views, loss = [
            cupy.ndarray(shape, np.float32, memory + place)
            for shape, place in zip(self.shapes, self.places, strict=True)
        ]
        grads = [Layer(*pair) for pair in zip(views[::2], views[1::2], strict=True)]
        return LossAndGrads(loss, grads)

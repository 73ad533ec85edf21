"""The quick look at arrays that mostly are what they should be: their types, shapes and dtypes.

Everything else, right or wrong, is for validation.py. This look is on the way of every small
prepared call, so it is written to be fast.
"""

from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends
from mlp_backprop.types import flat

_kind = attrgetter("shape", "dtype")


class Kinds:
    """What the arrays of a net are expected to be: NumPy's or CuPy's own, of one dtype."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.on_gpu = backends.library_name(spec.xp) == "cupy"
        self.types = {spec.xp.ndarray} if spec.xp is np or self.on_gpu else set()
        shapes = flat(((n_out, n_in), (n_out,)) for n_in, n_out in pairwise(spec.sizes))
        self.of_params = [(shape, spec.dtype) for shape in shapes]

    def fit(self, params: Any, X: Any, y: Any, weight: Any) -> bool:
        """Whether all are of these kinds, for as many rows as X has."""
        arrays = _arrays_of(params)
        if arrays is None or type(X) not in self.types:
            return False
        rows, sizes, dtype = X.shape[:1], self.spec.sizes, self.spec.dtype
        expected = [*self.of_params, ((*rows, sizes[0]), dtype)]
        arrays.append(X)
        if not self._are_labels(y, rows):
            arrays.append(y)
            expected.append(((*rows, sizes[-1]), dtype))
        if weight is not None:
            arrays.append(weight)
            expected.append((rows, dtype))
        return {*map(type, arrays)} == self.types and [*map(_kind, arrays)] == expected

    def fit_grads(self, out: Any) -> bool:
        """Whether gradients can be written to it as it is."""
        arrays = _arrays_of(out)
        return (
            arrays is not None
            and {*map(type, arrays)} == self.types
            and [*map(_kind, arrays)] == self.of_params
            and (self.on_gpu or all(array.flags.writeable for array in arrays))
        )

    def _are_labels(self, y: Any, rows: tuple[int, ...]) -> bool:
        return (
            self.spec.loss.targets == "class"
            and type(y) in self.types
            and y.shape == rows
            and y.dtype.kind in "iu"
            and y.dtype.isnative
        )


def _arrays_of(layers: Any) -> list[Any] | None:
    """The arrays of a list of tuples, as gradients come; None for everything else."""
    if type(layers) is not list:
        return None
    arrays: list[Any] = []
    for layer in layers:
        if not isinstance(layer, tuple):
            return None
        arrays += layer
    return arrays

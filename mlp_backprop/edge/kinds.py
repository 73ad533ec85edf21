"""The quick look at arrays that mostly are what they should be: their types, shapes and dtypes.

Everything else, right or wrong, is for validation.py. This look is on the way of every small
call, so it is written to be fast. What validation.py has passed before in this thread is known
again by it, values apart: of such a call only the spec is kept, never an array.
"""

import threading
from itertools import pairwise
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends
from mlp_backprop.types import Layer, Net

_PAIRS = frozenset({Layer, tuple})

Key = tuple[Any, ...]


def of_layers(layers: Any) -> Key | None:
    """Of every W and b, in a list of tuples, as gradients come; None for everything else."""
    if type(layers) is not list or not _PAIRS.issuperset(map(type, layers)):
        return None
    try:
        return tuple([(type(W), W.shape, W.dtype, type(b), b.shape, b.dtype) for W, b in layers])
    except (AttributeError, ValueError):  # no arrays, or no pairs
        return None


class Kinds:
    """What the arrays of a net are expected to be: NumPy's or CuPy's own, of one dtype."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.on_gpu = backends.library_name(spec.xp) == "cupy"
        own = spec.xp.ndarray if spec.xp is np or self.on_gpu else None
        self.type, dtype = own, spec.dtype
        self.of_layers = tuple(
            (own, (n_out, n_in), dtype, own, (n_out,), dtype)
            for n_in, n_out in pairwise(spec.sizes)
        )

    def fit(self, params: Any, X: Any, y: Any, weight: Any) -> bool:
        """Whether all are of these kinds, for as many rows as X has."""
        if type(X) is not self.type or of_layers(params) != self.of_layers:
            return False
        rows, sizes = X.shape[:1], self.spec.sizes
        return (
            self._is(X, (*rows, sizes[0]))
            and (self._is(y, (*rows, sizes[-1])) or self._are_labels(y, rows))
            and (weight is None or self._is(weight, rows))
        )

    def fit_grads(self, out: Any) -> bool:
        """Whether gradients can be written to it as it is."""
        return of_layers(out) == self.of_layers and (
            self.on_gpu or all(W.flags.writeable and b.flags.writeable for W, b in out)
        )

    def _is(self, array: Any, shape: tuple[int, ...]) -> bool:
        return bool(
            type(array) is self.type and array.shape == shape and array.dtype == self.spec.dtype
        )

    def _are_labels(self, y: Any, rows: tuple[int, ...]) -> bool:
        return bool(
            self.spec.loss.targets == "class"
            and type(y) is self.type
            and y.shape == rows
            and y.dtype.kind in "iu"
            and y.dtype.isnative
        )


# Calls like one before ---------------------------------------------------------------------------

MOST_CALLS = 64


class Known:
    """What all calls have in common that nothing but values tells from one that was right."""

    __slots__ = ("looks_at_y", "spec")

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.looks_at_y = spec.loss is not None and spec.loss.targets != "real"


class Seen(threading.local):
    """The last calls of a thread that were right, by what decides it; when full, begun anew."""

    def __init__(self) -> None:
        self.calls: dict[Key, Known] = {}

    def find(self, key: Key | None) -> Known | None:
        """One of the same kinds."""
        try:
            return None if key is None else self.calls.get(key)
        except TypeError:  # a name that is none, and not hashable
            return None

    def add(self, key: Key, spec: Spec) -> None:
        """A call whose arrays are computed with as they are."""
        if len(self.calls) >= MOST_CALLS:
            self.calls.clear()
        self.calls[key] = Known(spec)


seen = Seen()


def of_call(
    params: Any, X: Any, y: Any, weight: Any, activation: Any, loss: Any, *others: Any
) -> Key | None:
    """All that the checks of a call look at but values; None if its arrays are not NumPy's own.

    None in the place of y or weight stands for none.
    """
    own = None
    if type(params) is Net:
        own = _frozen(params.activation), params.loss
        params = params.params
    layers = of_layers(params)
    if layers is None or type(X) is not np.ndarray:
        return None
    data = [layers, X.shape, X.dtype]
    for array in (y, weight):
        if type(array) is np.ndarray:
            data += (array.shape, array.dtype)
        elif array is None:
            data.append(None)
        else:
            return None
    return (_frozen(activation), loss, own, *others, *data)


def _frozen(names: Any) -> Any:
    """The names as they are now: a list may change."""
    return tuple(names) if type(names) is list else names

"""The prepared call: everything that shapes decide is done once, and then only the arithmetic."""

from collections.abc import Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from mlp_backprop import namespaces, validation
from mlp_backprop.arguments import Argument, dtype_name, read_params
from mlp_backprop.backprop import Spec
from mlp_backprop.gradients import LossAndGrads, quietly, reduced
from mlp_backprop.types import Array, Layer, Params, flat

_kind = attrgetter("shape", "dtype")


def prepare_grads(
    params: Params,
    *,
    n: int,
    activation: str | Sequence[str] = "sigmoid",
    loss: str = "squared_error",
    reduction: str = "mean",
    backend: str | None = None,
    precision: str = "float32",
) -> "PreparedGrads":
    """Prepare `compute_grads` for many calls with nets and batches of the same shapes.

    Parameters
    ----------
    params : sequence of (W, b)
        Any parameters of the shapes, dtype and library to come; the values do not matter.
    n : int
        The most rows that a batch will have.
    activation, loss, reduction, backend, precision
        As for `compute_grads`.

    Returns
    -------
    PreparedGrads
        A function `grad_fn(params, X, y, sample_weight=None, *, out=None)` -> (loss, grads), with
        the answers of `compute_grads`, for 0 to n rows and any parameters of these shapes. It
        keeps its workspace, so one thread at a time may call it; prepare one for each thread.

        The results are fresh arrays, the caller's to keep. With `out`, a list of (W, b) to write
        to, the gradients are written there and `out` is returned in their place.

    Raises
    ------
    ValueError, TypeError, ImportError
        As `compute_grads`, now and in every call: wrong shapes and values are still refused.
        On CuPy values are not looked at, for that would wait for the device: there a label out
        of range makes the loss nan.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import init_params, prepare_grads
    >>> params = init_params([2, 10, 5, 1], rng=0)
    >>> grad_fn = prepare_grads(params, n=32)
    >>> X, y = np.ones((32, 2)), np.zeros((32, 1))
    >>> loss, grads = grad_fn(params, X, y)
    >>> loss, grads = grad_fn(params, X[:20], y[:20])
    """
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
        raise ValueError(f"n must be an integer, 0 or more: the most rows of a batch; got {n!r}")
    options: dict[str, Any] = {
        "activation": activation,
        "loss": loss,
        "reduction": reduction,
        "backend": backend,
        "precision": precision,
    }
    return PreparedGrads(validation.specification(params, **options), int(n), options)


class PreparedGrads:
    """What `prepare_grads` returns: a plan, and the checks that a call still needs."""

    def __init__(self, spec: Spec, n: int, options: dict[str, Any]) -> None:
        self._spec, self._n, self._options = spec, n, options
        self._values_matter = spec.loss.targets != "real"
        self._on_gpu = namespaces.library_name(spec.xp) == "cupy"
        self._array_types = {spec.xp.ndarray} if spec.xp is np or self._on_gpu else set()
        self._run = namespaces.plan(spec, n, options["backend"], options["precision"])
        self._shapes = flat(((n_out, n_in), (n_out,)) for n_in, n_out in pairwise(spec.sizes))
        self._kinds = [(shape, spec.dtype) for shape in self._shapes]

    @quietly
    def __call__(
        self,
        params: Params,
        X: Array,
        y: Array,
        sample_weight: Array | None = None,
        *,
        out: Params | None = None,
    ) -> LossAndGrads:
        """Loss and gradients, as `compute_grads` gives them."""
        if self._fits(params, X, y, sample_weight):
            if self._values_matter or sample_weight is not None or len(X) == 0:
                self._check_values(X, y, sample_weight)
            return self._call((params, X, y, sample_weight), out)
        with namespaces.callers_stream([X], self._options["backend"]):
            return self._call(self._checked(params, X, y, sample_weight), out)

    def _call(self, arrays: tuple[Any, Array, Array, Array | None], out: Any) -> LossAndGrads:
        n = arrays[1].shape[0]
        if n > self._n:
            raise ValueError(f"prepared for up to {self._n} rows, X has {n}")
        if out is not None:
            self._check_out(out)
        loss, grads = reduced(self._spec, self._run(*arrays), self._options["reduction"])
        return LossAndGrads(loss, grads if out is None else _written(grads, out))

    def _fits(self, params: Any, X: Any, y: Any, weight: Any) -> bool:
        """Whether all are NumPy or CuPy arrays of the right shapes and dtype, as they mostly are.

        Everything else, right or wrong, is for the full checks. This one is on the way of every
        small call, so it is written to be fast.
        """
        if type(X) not in self._array_types or type(params) is not list:
            return False
        rows, sizes, dtype = X.shape[:1], self._spec.sizes, self._spec.dtype
        arrays: list[Any] = []
        for layer in params:
            if not isinstance(layer, tuple):
                return False
            arrays += layer
        expected = [*self._kinds, ((*rows, sizes[0]), dtype)]
        arrays.append(X)
        if not self._are_labels(y, rows):
            arrays.append(y)
            expected.append(((*rows, sizes[-1]), dtype))
        if weight is not None:
            arrays.append(weight)
            expected.append((rows, dtype))
        return {*map(type, arrays)} == self._array_types and [*map(_kind, arrays)] == expected

    def _are_labels(self, y: Any, rows: tuple[int, ...]) -> bool:
        return (
            self._spec.loss.targets == "class"
            and type(y) in self._array_types
            and y.shape == rows
            and y.dtype.kind in "iu"
            and y.dtype.isnative
        )

    def _check_values(self, X: Array, y: Array, weight: Array | None) -> None:
        xp, reduction = self._spec.xp, self._options["reduction"]
        weights = None if weight is None else Argument("sample_weight", weight, xp)
        validation.check_weight_shape(weights, len(X), reduction)
        if self._on_gpu:
            return
        validation.check_target_values(Argument("y", y, xp), self._spec.loss, self._spec.sizes[-1])
        validation.check_weight_values(weights, reduction)

    def _checked(self, *arrays: Any) -> tuple[list[Layer], Array, Array, Array | None]:
        """The arguments after all the checks and conversions of `compute_grads`."""
        params, X, y, weight = arrays
        spec, *placed = validation.problem(
            params, X, y, sample_weight=weight, look_at_values=not self._on_gpu, **self._options
        )
        if spec != self._spec:
            raise ValueError(
                f"prepared for {_described(self._spec)}; the arguments are {_described(spec)}"
            )
        return tuple(placed)

    def _check_out(self, out: Params) -> None:
        """Nothing is computed for an `out` that cannot take it."""
        targets = flat(read_params(out, "out"))
        if [tuple(a.array.shape) for a in targets] != self._shapes or any(
            a.weak or a.xp is not self._spec.xp or a.array.dtype != self._spec.dtype
            for a in targets
        ):
            raise ValueError(f"out must be a list of (W, b), {_described(self._spec)}")
        if not all(namespaces.is_writeable(a.xp, a.array) for a in targets):
            raise ValueError("out holds arrays that cannot be written to")


def _written(grads: list[Layer], out: Params) -> list[Layer]:
    for layer, targets in zip(grads, out, strict=True):
        for grad, target in zip(layer, targets, strict=True):
            namespaces.as_plain(target)[...] = grad
    return [Layer(W, b) for W, b in out]


def _described(spec: Spec) -> str:
    library, dtype = namespaces.library_name(spec.xp), dtype_name(spec.dtype)
    return f"{library} arrays of {dtype} for widths {'-'.join(map(str, spec.sizes))}"

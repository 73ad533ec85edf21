"""The prepared call: everything that shapes decide is done once, and then only the arithmetic."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from mlp_backprop import namespaces, validation
from mlp_backprop.arguments import Argument, dtype_name, read_params
from mlp_backprop.backprop import Spec
from mlp_backprop.gradients import LossAndGrads, quietly
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

        Its `bind(params, X, y)` spares the checks where the arrays are the same every time.

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

    def bind(
        self, params: Params, X: Array, y: Array, sample_weight: Array | None = None
    ) -> Callable[[], LossAndGrads]:
        """Prepare for the same arrays again and again, to be changed in place.

        Parameters
        ----------
        params, X, y, sample_weight
            As for the prepared call, and refused as there.

        Returns
        -------
        callable
            A function without arguments, which gives (loss, grads) for what the arrays hold by
            then: change them in place. The arrays of `grads`, and on a GPU that of `loss`, may be
            the same ones every time: copy what shall outlast the next call. What had to be
            converted, a list for example, is read now. One thread at a time may call this or the
            prepared call.

        Examples
        --------
        >>> import numpy as np
        >>> from mlp_backprop import init_params, prepare_grads
        >>> params = init_params([2, 10, 5, 1], rng=0)
        >>> X, y = np.ones((32, 2)), np.zeros((32, 1))
        >>> step = prepare_grads(params, n=32).bind(params, X, y)
        >>> for _ in range(3):
        ...     loss, grads = step()
        ...     for (W, b), (dW, db) in zip(params, grads):
        ...         W -= 0.1 * dW
        ...         b -= 0.1 * db
        """
        given, backend = (params, X, y, sample_weight), self._options["backend"]
        fits = self._fits(*given)
        with namespaces.callers_stream([X], backend):
            layers, *data = given if fits else self._checked(*given)
            self._check_n(data[0])
            self._check_values(*data)
            layers = [Layer(W, b) for W, b in layers]  # a list of our own
            run = quietly(self._run.bound)(layers, *data, self._options["reduction"])

        def call() -> LossAndGrads:
            self._check_values(*data)
            return LossAndGrads(*run())

        def call_on_stream() -> LossAndGrads:
            with namespaces.callers_stream([X], backend):
                return call()

        return quietly(call if fits else call_on_stream)

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
        if self._fits(params, X, y, sample_weight) and (out is None or self._takes_grads(out)):
            self._check_values(X, y, sample_weight)
            return self._call(params, X, y, sample_weight, out)
        with namespaces.callers_stream([X], self._options["backend"]):
            checked = self._checked(params, X, y, sample_weight)
            if out is not None:
                self._check_out(out)
            return self._call(*checked, out)

    def _call(self, params: Any, X: Array, y: Array, weight: Any, out: Any) -> LossAndGrads:
        self._check_n(X)
        return LossAndGrads(*self._run(params, X, y, weight, self._options["reduction"], out))

    def _check_n(self, X: Array) -> None:
        if X.shape[0] > self._n:
            raise ValueError(f"prepared for up to {self._n} rows, X has {X.shape[0]}")

    def _fits(self, params: Any, X: Any, y: Any, weight: Any) -> bool:
        """Whether all are NumPy or CuPy arrays of the right shapes and dtype, as they mostly are.

        Everything else, right or wrong, is for the full checks. This one is on the way of every
        small call, so it is written to be fast.
        """
        arrays = _arrays_of(params)
        if arrays is None or type(X) not in self._array_types:
            return False
        rows, sizes, dtype = X.shape[:1], self._spec.sizes, self._spec.dtype
        expected = [*self._kinds, ((*rows, sizes[0]), dtype)]
        arrays.append(X)
        if not self._are_labels(y, rows):
            arrays.append(y)
            expected.append(((*rows, sizes[-1]), dtype))
        if weight is not None:
            arrays.append(weight)
            expected.append((rows, dtype))
        return {*map(type, arrays)} == self._array_types and [*map(_kind, arrays)] == expected

    def _takes_grads(self, out: Any) -> bool:
        """Whether `out` can be written to as it is."""
        arrays = _arrays_of(out)
        return (
            arrays is not None
            and {*map(type, arrays)} == self._array_types
            and [*map(_kind, arrays)] == self._kinds
            and (self._on_gpu or all(array.flags.writeable for array in arrays))
        )

    def _are_labels(self, y: Any, rows: tuple[int, ...]) -> bool:
        return (
            self._spec.loss.targets == "class"
            and type(y) in self._array_types
            and y.shape == rows
            and y.dtype.kind in "iu"
            and y.dtype.isnative
        )

    def _check_values(self, X: Array, y: Array, weight: Array | None) -> None:
        if weight is None and X.shape[0] > 0 and not self._values_matter:
            return
        xp, reduction = self._spec.xp, self._options["reduction"]
        weights = None if weight is None else Argument("sample_weight", weight, xp)
        validation.check_weight_shape(weights, X.shape[0], reduction)
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


def _described(spec: Spec) -> str:
    library, dtype = namespaces.library_name(spec.xp), dtype_name(spec.dtype)
    return f"{library} arrays of {dtype} for widths {'-'.join(map(str, spec.sizes))}"

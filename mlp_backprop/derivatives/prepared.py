"""The prepared call: everything that shapes decide is done once, and then only the arithmetic."""

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends, rules, validation
from mlp_backprop.edge.arguments import Argument, dtype_name
from mlp_backprop.edge.calls import quietly
from mlp_backprop.edge.kinds import Kinds
from mlp_backprop.engines import choice
from mlp_backprop.types import (
    ActivationNames,
    Array,
    ArrayLike,
    BackendName,
    Layer,
    LossAndGrads,
    LossName,
    Net,
    Params,
    Precision,
    Reduction,
    flat,
)

_shape = attrgetter("shape")


def prepare_grads(
    params: Params,
    *,
    n: int,
    activation: ActivationNames | None = None,
    loss: LossName | None = None,
    reduction: Reduction = "mean",
    backend: BackendName | None = None,
    precision: Precision = "float32",
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
        to, the gradients are written there and `out` is returned in their place; no two of its
        numbers may share memory.

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
    spec = validation.specification(
        params, activation, loss, reduction, backend, precision=precision
    )
    net = params if isinstance(params, Net) else Net(())
    names = net.activation if activation is None else activation
    return PreparedGrads(spec, int(n), names, backend, precision)


class PreparedGrads:
    """What `prepare_grads` returns: a plan, and the checks that a call still needs."""

    def __init__(
        self,
        spec: Spec,
        n: int,
        activation: ActivationNames,
        backend: BackendName | None,
        precision: Precision,
    ) -> None:
        self._made_of = spec, n, activation, backend, precision
        self._spec, self._n, self._backend = spec, n, backend
        self._names = activation, spec.loss.name
        self._kinds = Kinds(spec)
        self._run = choice.plan(spec, n, backend, precision)
        self._last_out: tuple[list[int], list[Layer]] = ([], [])
        self._looks_at_y = spec.loss.targets != "real"
        self._options: dict[str, Any] = {
            "activation": activation,
            "loss": spec.loss.name,
            "reduction": spec.reduction,
            "backend": backend,
            "precision": precision,
            "look_at_values": not self._kinds.on_gpu,  # which would wait for the device
        }

    def __copy__(self) -> "PreparedGrads":
        """With a workspace of its own."""
        return PreparedGrads(*self._made_of)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PreparedGrads":
        """As __copy__."""
        return PreparedGrads(*self._made_of)

    def __reduce__(self) -> Any:
        """In a pickle, what was prepared for, by names; the plan is made anew."""
        spec, *others = self._made_of
        names = dtype_name(spec.dtype), spec.loss.name, spec.reduction
        return _prepared_anew, (spec.xp.__name__, spec.sizes, *names, *others)

    def bind(
        self,
        params: Params,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        constant_X: bool = False,
    ) -> Callable[[], LossAndGrads]:
        """Prepare for the same arrays again and again, to be changed in place.

        Parameters
        ----------
        params, X, y, sample_weight
            As for the prepared call, and refused as there.
        constant_X : bool
            A promise that X will not be changed. What a pass makes of X alone may then be made
            now, and kept: its copy in bfloat16, where `precision` asks for one of wide nets on
            CuPy, which is half as large as X. Parameters are converted in every call.

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
        given: Any = self._unwrapped(params), X, y, sample_weight
        fits = self._kinds.fit(*given)
        on_stream = partial(self._on_stream, X)  # as it was passed: torch's, perhaps
        with on_stream():
            own, X, y, weight = given if fits else self._checked(*given)
            self._check_n(X)
            if fits:
                self._check_values(X, y, weight)
            own = [Layer(W, b) for W, b in own]  # the list may change
            run = quietly(self._run.bound)(own, X, y, weight, constant_X=constant_X)
        arrays = [A for A in (X, y, weight, *flat(own)) if A is not None]
        shapes = [*map(_shape, arrays)]

        def call() -> LossAndGrads:
            if [*map(_shape, arrays)] != shapes:
                raise ValueError("an array was resized or reshaped after bind: bind anew")
            self._check_values(X, y, weight)
            return run()

        def call_on_stream() -> LossAndGrads:
            with on_stream():
                return call()

        bound: Callable[[], LossAndGrads] = quietly(call if fits else call_on_stream)
        return bound

    @quietly
    def __call__(
        self,
        params: Params,
        X: ArrayLike,
        y: ArrayLike,
        sample_weight: ArrayLike | None = None,
        *,
        out: Params | None = None,
    ) -> LossAndGrads:
        """Loss and gradients, as `compute_grads` gives them."""
        given = self._unwrapped(params) if type(params) is Net else params
        if out is not None:
            return self._into(out, given, X, y, sample_weight)
        if self._kinds.fit(given, X, y, sample_weight):
            self._check_n(X)
            self._check_values(X, y, sample_weight)
            return self._run(given, X, y, sample_weight)
        with self._on_stream(X):
            checked = self._checked(given, X, y, sample_weight)
            self._check_n(checked[1])
            return self._run(*checked)

    def _into(self, out: Any, *given: Any) -> LossAndGrads:
        """The same, with the gradients in arrays of the caller's."""
        targets = self._unwrapped(out)
        if self._kinds.fit(*given) and self._kinds.fit_grads(targets):
            arrays, seen = given, self._seen(targets)
            self._check_values(*given[1:])
        else:
            with self._on_stream(given[1]):
                arrays, seen = self._checked(*given), validation.check_out(targets, self._spec)
        self._check_n(arrays[1])
        with self._on_stream(given[1]):
            loss, _ = self._run(*arrays, seen)
        return LossAndGrads(loss, [Layer(W, b) for W, b in targets])

    def _seen(self, out: Any) -> list[Layer]:
        """`out`, looked at unless its arrays are those of the last call, which are kept."""
        ids, layers = self._last_out
        if [*map(id, flat(out))] != ids:
            layers = validation.check_out(out, self._spec)
            self._last_out = [*map(id, flat(out))], layers
        return layers

    def _unwrapped(self, params: Any) -> Any:
        """The parameters of a Net of the same names; another one is for the full checks."""
        is_ours = type(params) is Net and params[1:] == self._names
        return params.params if is_ours else params

    def _on_stream(self, X: Any) -> Any:
        return backends.callers_stream([X], self._backend)

    def _check_n(self, X: Any) -> None:
        if X.shape[0] > self._n:
            raise ValueError(f"prepared for up to {self._n} rows, X has {X.shape[0]}")

    def _check_values(self, X: Any, y: Any, weight: Any) -> None:
        looks_at_y = self._looks_at_y and not (y.ndim == 1 and self._run.checks_labels)
        if weight is None and X.shape[0] > 0 and not looks_at_y:
            return
        weights = None if weight is None else Argument("sample_weight", weight, self._spec.xp)
        rules.check_weight_shape(weights, X.shape[0], self._spec.reduction)
        if not self._kinds.on_gpu:
            rules.check_values(self._spec, y if looks_at_y else None, weight)

    def _checked(self, *arrays: Any) -> tuple[list[Layer], Array, Array, Array | None]:
        """The arguments after all the checks and conversions of `compute_grads`."""
        params, X, y, weight = arrays
        spec, *placed = validation.problem(params, X, y, sample_weight=weight, **self._options)
        if spec != self._spec:
            mine, theirs = (validation.described(each) for each in (self._spec, spec))
            raise ValueError(f"prepared for {mine}; the arguments are {theirs}")
        return tuple(placed)


def _prepared_anew(
    module: str, sizes: tuple[int, ...], dtype: str, loss: str, reduction: str, *others: Any
) -> PreparedGrads:
    xp, (_, activation, *_) = backends.namespace_called(module), others
    rows, loss_row = rules.table_rows((), len(sizes) - 1, activation, loss, reduction)
    own = getattr(xp, dtype)
    own = np.dtype(own) if isinstance(own, type) else own  # NumPy's, and CuPy's
    return PreparedGrads(Spec(xp, sizes, own, rows, loss_row, reduction), *others)

"""The one door to the engines: for each question the fastest way that covers it.

An engine replaces a whole pass. It has `prepare(spec, n)`, which gives a run over up to n rows, or
None for what it does not cover, and all runs keep one contract:

    run(params, X, y, weight, out=None) -> LossAndGrads

where `out` has the arrays for the gradients, if it is not None. The results are the caller's to
keep. What no engine covers runs the derivation. A run may have

    bound(params, X, y, weight, constant_X)   a call for the same arrays again and again
    checks_labels                             whether it refuses by itself what is no class
    sums(params, X, y, weight)                in float64, to be added up over blocks of rows
"""

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial, reduce
from itertools import pairwise
from types import ModuleType
from typing import Any, TypeVar

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec, Sums
from mlp_backprop.edge.backends import library_name
from mlp_backprop.edge.kinds import Known
from mlp_backprop.edge.rules import check_values
from mlp_backprop.engines import numpy_products, numpy_tiles, threads
from mlp_backprop.engines.memory import Kept
from mlp_backprop.engines.schedule import SMALLEST_DIVIDED_PRODUCT, most_chunks
from mlp_backprop.maths import samples, tangents
from mlp_backprop.maths.row_blocks import (
    added_blocks,
    added_layers,
    concatenated,
    row_blocks,
    rows_of,
)
from mlp_backprop.maths.runs import State, Task
from mlp_backprop.maths.samples import Factors
from mlp_backprop.maths.tangents import Kind
from mlp_backprop.types import Array, Layer, Layers, LossAndGrads, n_params

Run = Callable[..., LossAndGrads]  # as above
Part = TypeVar("Part")  # of a result: that of one block of rows


class Pass:
    """A planned pass, which has a workspace: for one caller at a time."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self.checks_labels = bool(getattr(run, "checks_labels", False))
        self._in_use = threading.Lock()

    def __call__(self, *arguments: Any) -> LossAndGrads:
        """The run, as above."""
        if self._in_use.locked():
            raise _in_use()
        with self._in_use:  # which Ctrl-C cannot leave locked
            return self._run(*arguments)

    def bound(self, *arguments: Any, constant_X: bool = False) -> Callable[[], LossAndGrads]:
        """The pass over these arrays, whatever they hold when it is called; X may be promised."""
        own = getattr(self._run, "bound", None)
        if own is None:
            return partial(self, *arguments)
        run, in_use = own(*arguments, constant_X), self._in_use

        def call() -> LossAndGrads:
            if in_use.locked():
                raise _in_use()
            with in_use:
                result: LossAndGrads = run()
                return result

        return call


def _in_use() -> RuntimeError:
    return RuntimeError(
        "a prepared call is for one thread at a time, since it keeps its workspace: "
        "prepare one for each thread, or call compute_grads"
    )


def plan(spec: Spec, n: int, backend: str | None, precision: str = "float32") -> Pass:
    """A pass over up to n rows, by the first engine that covers it, or by the derivation."""
    run: Run | None = None
    if spec.xp is not np and library_name(spec.xp) == "cupy":
        from mlp_backprop.engines.cuda import engine as cuda

        run = cuda.prepare(spec, n, precision)
    elif backend == "numba":
        from mlp_backprop.engines.compiled import engine as compiled

        run = compiled.prepare(spec, n)
    elif is_for_numpy(spec):
        run = numpy_tiles.prepare(spec, n)
    return Pass(run or partial(derivation, spec))


def first_order(spec: Spec, backend: str | None) -> Any:
    """The compiled passes for first derivatives, where they are asked for and cover this net."""
    if not is_for_numba(spec, backend):
        return None
    from mlp_backprop.engines.compiled import first_order

    return first_order


def per_output(spec: Spec, backend: str | None) -> Any:
    """The same for the gradients of every output by the parameters."""
    if not is_for_numba(spec, backend):
        return None
    from mlp_backprop.engines.compiled import per_output

    return per_output


def is_for_numba(spec: Spec, backend: str | None) -> bool:
    """Whether a compiled pass is asked for, and covers this net."""
    if backend != "numba":
        return False
    from mlp_backprop.engines.compiled import engine

    return engine.covers(spec)


def training(task: Task, state: State, backend: str | None) -> Any:
    """The compiled Runner, whose `advance` takes steps in `state`; None for the reference."""
    if backend != "numba":
        return None
    from mlp_backprop.engines.compiled import training as compiled

    return compiled.Runner(task, state) if compiled.covers(task) else None


_kept = Kept()
MOST_NUMBERS = 1 << 15  # weights, and outputs of all layers: with more, a plan is the least


def repeated(
    known: Known, params: Any, X: Array, y: Array, weight: Array | None, backend: str | None
) -> LossAndGrads:
    """Loss and gradients for NumPy's arrays in a call like one before: of it the pass is kept."""
    run = kept = _kept.take(known)
    if run is None:
        run = plan(known.spec, len(X), backend)
    checks = weight is None and y.ndim == 1 and run.checks_labels
    if not checks and (known.looks_at_y or weight is not None):
        check_values(known.spec, y, weight)
    result: LossAndGrads = run(params, X, y, weight)
    if kept or _is_small(known.spec, len(X)):
        _kept.put(known, run)
    return result


def _is_small(spec: Spec, n: int) -> bool:
    numbers = sum((n_in + 1 + n) * n_out for n_in, n_out in pairwise(spec.sizes))
    return numbers <= MOST_NUMBERS


def derivation(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, out: Layers | None = None
) -> LossAndGrads:
    """The derivation as a run: of every library that has no faster one."""
    params = [Layer(W, b) for W, b in params]
    with undisturbed(spec, X.shape[-2]):
        sums = backprop.loss_and_grad_sums(spec, params, X, y, weight)
    return backprop.reduced(spec, sums, out)


def undisturbed(spec: Spec, rows: float = math.inf) -> AbstractContextManager[None]:
    """For the derivation on NumPy's arrays: BLAS is held at one thread while it forms products of
    so many rows, unless all are too small to be divided among threads anyway."""
    largest = rows * max((a + 1) * b for a, b in pairwise(spec.sizes))
    if spec.xp is not np or largest <= SMALLEST_DIVIDED_PRODUCT:
        return nullcontext()
    return threads.blas_on_one_thread()


def each_block(
    spec: Spec,
    X: Array,
    row_numbers: int,
    derivative: Callable[[slice], Part],
    rows: float = math.inf,
) -> list[Part]:
    """derivative(rows) for all blocks of rows, in their order; NumPy's are shared among threads.

    A pass keeps so many numbers of each row, and its products have so many rows at most.
    """
    blocks = row_blocks(spec.xp, X, row_numbers)
    return _all_of(spec, [partial(derivative, block) for block in blocks], rows)


def block_sums(
    spec: Spec,
    X: Array,
    row_numbers: int,
    sums: Callable[[slice], Part],
    add: Callable[[Part, Part], Part],
    rows: float = math.inf,
) -> Part:
    """The same, added up: in an order that the shapes decide, and with bounded memory for sums."""
    blocks = list(row_blocks(spec.xp, X, row_numbers))
    n_shares = 1 if spec.xp is not np else most_chunks(spec, np.dtype(spec.dtype).itemsize)
    shares = [blocks[i::n_shares] for i in range(min(n_shares, len(blocks)))]

    def share_sums(share: list[slice]) -> Part:
        return reduce(add, map(sums, share))

    return reduce(add, _all_of(spec, [partial(share_sums, share) for share in shares], rows))


def _all_of(spec: Spec, parts: list[Callable[[], Part]], rows: float) -> list[Part]:
    if spec.xp is not np or len(parts) == 1:
        with undisturbed(spec, rows):
            return [part() for part in parts]
    results: dict[int, Part] = {}

    @np.errstate(all="ignore")  # which the pool's threads do not inherit
    def compute(i: int, worker: int) -> None:
        results[i] = parts[i]()

    with threads.blas_on_one_thread():
        n_workers = threads.thread_count() if threads.can_limit_blas() else 1
        threads.run_chunks(compute, len(parts), n_workers)
    return [results[i] for i in range(len(parts))]


def outputs(spec: Spec, params: list[Layer], X: Array, backend: str | None) -> Array:
    """H_L of all rows."""
    compiled = first_order(spec, backend)
    if compiled:
        return compiled.outputs(spec, params, X)

    def of_block(rows: slice) -> Array:
        return backprop.forward(spec, params, X[rows, ...])[1][-1]

    if spec.xp is not np:
        return of_block(slice(None))
    blocks = each_block(spec, X, 2 * sum(spec.sizes), of_block, rows=X.shape[0])
    return concatenated(np, blocks)


def is_for_numpy(spec: Spec) -> bool:
    """What the NumPy engine covers: all but half precision."""
    return spec.xp is np and bool(np.dtype(spec.dtype).itemsize >= 4)


def for_each_sweep(
    spec: Spec,
    params: Layers,
    X: Array,
    y: Array,
    weight: Array | None,
    use: Callable[[Array | float, Iterator[Factors]], None],
) -> None:
    """Call use(loss, factors) for one block of rows after the other.

    The factors, D_l and H_{l-1} from the last layer to the first, lie in memory that the next
    block may use again. Of many nets, which are not NumPy's, they have one more axis in front.
    """
    if is_for_numpy(spec):
        n = X.shape[0]
        kept = _kept.take((spec, n))
        run = kept or numpy_tiles.TiledRun(spec, n)
        run.for_each_sweep(params, X, y, weight, use)
        if kept or _is_small(spec, n):
            _kept.put((spec, n), run)
        return
    row_numbers = spec.sizes[0] + 3 * sum(spec.sizes[1:])  # Z_l, H_l and D_l
    members = tuple(params[0].b.shape[:-1])
    all_members = (slice(None),) * len(members)
    with undisturbed(spec, X.shape[-2]):
        for rows in row_blocks(spec.xp, X, row_numbers * math.prod(members)):
            block = X[..., rows, :], y[(*all_members, rows, ...)], rows_of(weight, rows)
            use(*samples.sweep(spec, params, *block))


def clipped_grads(
    spec: Spec,
    backend: str | None,
    max_norm: float,
    params: Layers,
    X: Array,
    y: Array,
    weight: Array | None,
) -> LossAndGrads:
    """The loss, and the sum or mean of the samples' gradients, each clipped to a norm."""
    compiled = first_order(spec, backend)
    if compiled:
        result: LossAndGrads = compiled.clipped_grads(spec, params, X, y, weight, max_norm)
        return result
    total: list[tuple[Array | float, Layers]] = []

    def add(loss: Array | float, factors: Iterator[Factors]) -> None:
        block = loss, samples.clipped_sums(spec, factors, max_norm)
        total[:] = [added_blocks([*total, block])]

    for_each_sweep(spec, params, X, y, weight, add)
    [(loss_sum, grads)] = total
    sums = backprop.Sums(loss_sum, backprop.weight_sum(spec, X, weight), grads)
    return backprop.reduced(spec, sums)


def jacobian_product(spec: Spec, params: Layers, v: Layers, X: Array, backend: str | None) -> Array:
    """J v, a row for each of X."""
    if is_for_numba(spec, backend):
        from mlp_backprop.engines.compiled import second_order

        return second_order.jacobian_product(spec, params, v, X)

    def change(rows: slice) -> Array:
        *_, last = tangents.tangents(spec, params, v, X[rows, :])
        return last.dH

    numbers = tangents.row_numbers(spec)
    return concatenated(spec.xp, each_block(spec, X, numbers, change, rows=X.shape[0]))


def vector_product(
    spec: Spec,
    kind: Kind,
    params: Layers,
    v: Layers,
    X: Array,
    y: Array,
    weight: Array | None,
    backend: str | None,
) -> Layers:
    """The matrix of this kind, summed over samples or divided, times v."""
    if is_for_numba(spec, backend):
        from mlp_backprop.engines.compiled import second_order

        return second_order.product(spec, kind, params, v, X, y, weight)
    total = _vector_product_sums(spec, kind, params, v, X, y, weight)
    return backprop.reduced(spec, Sums(0.0, backprop.weight_sum(spec, X, weight), total)).grads


def _vector_product_sums(
    spec: Spec, kind: Kind, params: Layers, v: Layers, X: Array, y: Array, weight: Array | None
) -> Layers:
    if is_for_numpy(spec):
        return numpy_products.tiled_product_sums(spec, kind, params, v, X, y, weight)

    def sums(rows: slice) -> Layers:
        block = X[rows, :], y[rows, ...], rows_of(weight, rows)
        return tangents.product_sums(spec, kind, params, v, *block)

    with undisturbed(spec):
        return reduce(added_layers, map(sums, row_blocks(spec.xp, X, tangents.row_numbers(spec))))


def compiled_matrix(spec: Spec, backend: str | None) -> Any:
    """What has the Hessian and its like compiled, where that is asked for and covers this net."""
    if not is_for_numba(spec, backend):
        return None
    from mlp_backprop.engines.compiled import hessians

    return hessians.matrix if n_params(spec.sizes) <= hessians.MOST_PARAMETERS else None


def compiled_jets(spec: Spec, backend: str | None) -> ModuleType | None:
    """What has the derivatives by inputs compiled, where that is asked for and covers this net."""
    if not is_for_numba(spec, backend):
        return None
    from mlp_backprop.engines.compiled import jets

    return jets


def compiled_jet_grads(spec: Spec, backend: str | None, n_directions: int) -> ModuleType | None:
    """The same for the gradients of losses of such derivatives, along so many directions."""
    if not is_for_numba(spec, backend):
        return None
    from mlp_backprop.engines.compiled import jet_grads

    return jet_grads if jet_grads.has_room(spec, n_directions) else None

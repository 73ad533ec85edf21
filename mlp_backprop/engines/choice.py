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
from typing import Any

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.edge.backends import library_name
from mlp_backprop.engines import numpy_products, numpy_tiles, threads
from mlp_backprop.engines.schedule import SMALLEST_DIVIDED_PRODUCT
from mlp_backprop.maths import samples, tangents
from mlp_backprop.maths.row_blocks import added_layers, row_blocks, rows_of
from mlp_backprop.maths.samples import Factors
from mlp_backprop.maths.tangents import Kind
from mlp_backprop.types import Array, Layers, LossAndGrads

Run = Callable[..., LossAndGrads]  # as above


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


def is_for_numba(spec: Spec, backend: str | None) -> bool:
    """Whether a compiled pass is asked for, and covers this net."""
    if backend != "numba":
        return False
    from mlp_backprop.engines.compiled import engine

    return engine.covers(spec)


def derivation(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, out: Layers | None = None
) -> LossAndGrads:
    """The derivation as a run: of every library that has no faster one."""
    with undisturbed(spec, X.shape[0]):
        sums = backprop.loss_and_grad_sums(spec, params, X, y, weight)
    return backprop.reduced(spec, sums, out)


def undisturbed(spec: Spec, rows: float = math.inf) -> AbstractContextManager[None]:
    """For the derivation on NumPy's arrays: nobody holds BLAS while it forms products of so many
    rows; those too small to be divided among threads need not wait for it."""
    largest = rows * max((a + 1) * b for a, b in pairwise(spec.sizes))
    if spec.xp is not np or largest <= SMALLEST_DIVIDED_PRODUCT:
        return nullcontext()
    return threads.blas_on_its_threads()


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
    block may use again.
    """
    if is_for_numpy(spec):
        numpy_tiles.TiledRun(spec, X.shape[0]).for_each_sweep(params, X, y, weight, use)
        return
    row_numbers = spec.sizes[0] + 3 * sum(spec.sizes[1:])  # Z_l, H_l and D_l
    with undisturbed(spec, X.shape[0]):
        for rows in row_blocks(spec.xp, X, row_numbers):
            use(*samples.sweep(spec, params, X[rows, ...], y[rows, ...], rows_of(weight, rows)))


def vector_product_sums(
    spec: Spec, kind: Kind, params: Layers, v: Layers, X: Array, y: Array, weight: Array | None
) -> Layers:
    """The matrix of this kind, summed over samples, times v."""
    if is_for_numpy(spec):
        return numpy_products.tiled_product_sums(spec, kind, params, v, X, y, weight)

    def sums(rows: slice) -> Layers:
        block = X[rows, :], y[rows, ...], rows_of(weight, rows)
        return tangents.product_sums(spec, kind, params, v, *block)

    with undisturbed(spec):
        return reduce(added_layers, map(sums, row_blocks(spec.xp, X, tangents.row_numbers(spec))))


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

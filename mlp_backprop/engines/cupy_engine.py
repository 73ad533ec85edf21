"""The CuPy engine: for each problem the first tier of CUDA kernels that covers it.

    cuda_tiny         a thread per sample, everything in registers
    cuda_warp_tiles   a warp per tile of samples, on tensor cores
    cuda_layers       layer by layer, products by cuBLASLt

What none of them covers runs the derivation on CuPy arrays. All work is enqueued on CuPy's current
stream, on the device where X lies, and nothing here waits for it.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

from mlp_backprop import backprop
from mlp_backprop.backprop import Run, Spec, Sums
from mlp_backprop.engines import cuda_layers, cuda_tiny, cuda_warp_tiles
from mlp_backprop.types import Array, Layer, flat

TIERS: tuple[Any, ...] = (cuda_tiny, cuda_warp_tiles, cuda_layers)

MOST_PLANS = 8  # that are kept: streams may come and go


def plan(spec: Spec, n: int, precision: str) -> Run:
    """A pass over up to n rows, on any device and stream."""
    return Pass(spec, n, precision)


def plan_here(spec: Spec, n: int, precision: str) -> Run:
    """The first tier's plan, on the current device and stream."""
    runs = (tier.plan(spec, n, precision) for tier in TIERS)
    return next((run for run in runs if run is not None), None) or derivation(spec)


def derivation(spec: Spec) -> Run:
    """The derivation; as from the kernels, the loss is nan where a label is out of range."""
    run, xp = backprop.plan(spec), spec.xp

    def checked(params: list[Layer], X: Array, y: Array, weight: Array | None) -> Sums:
        # A prepared call hands on plain pairs, which is all that the kernels need.
        sums: Sums = run([Layer(W, b) for W, b in params], X, y, weight)
        if y.ndim == 2:
            return sums
        # A narrow integer type may not be able to hold the width it is compared with.
        limit = min(spec.sizes[-1] - 1, xp.iinfo(y.dtype).max)
        are_labels = xp.all((y >= 0) & (y <= limit))
        return sums._replace(loss=xp.where(are_labels, sums.loss, xp.nan * sums.loss))

    return checked


class Pass:
    """A plan for each device and stream that a call comes on, made there at the first call.

    On one stream kernels run in order, so that a plan may use its workspace again at once; on two
    it may not.
    """

    def __init__(self, spec: Spec, n: int, precision: str) -> None:
        self.spec, self.precision = spec, precision
        self.rows = n  # at a time
        self.runs: dict[tuple[int, int], Run] = {}

    def __call__(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Any:
        """Sums over the rows of X; short of memory, over half as many rows at a time."""
        import cupy

        _check_one_device([X, y, *flat(params)] + ([] if weight is None else [weight]))
        with X.device:
            try:
                return self._sums(params, X, y, weight)
            except cupy.cuda.memory.OutOfMemoryError:
                pass  # only when the error is gone are the arrays of its frames
            self.runs.clear()
            cupy.get_default_memory_pool().free_all_blocks()
            self.rows = -(-self.rows // 2)
            try:
                return self._sums(params, X, y, weight)
            except cupy.cuda.memory.OutOfMemoryError as error:
                raise self._too_large(X) from error

    def _sums(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Any:
        run, n = self._run_here(X), X.shape[0]
        if n <= self.rows:
            return in_one_array(self.spec, run(params, X, y, weight))
        blocks = (slice(start, start + self.rows) for start in range(0, n, self.rows))
        return added(
            run(params, X[rows], y[rows], None if weight is None else weight[rows])
            for rows in blocks
        )

    def _run_here(self, X: Array) -> Run:
        import cupy

        here = (X.data.device_id, cupy.cuda.get_current_stream().ptr)
        if here not in self.runs:
            if len(self.runs) == MOST_PLANS:
                self.runs.clear()
            self.runs[here] = plan_here(self.spec, self.rows, self.precision)
        return self.runs[here]

    def _too_large(self, X: Array) -> MemoryError:
        free, total = (size / 1e9 for size in X.device.mem_info)
        return MemoryError(
            f"{free:.1f} of {total:.1f} GB are free on {X.device}, too little even for "
            f"{self.rows} rows at a time of widths {'-'.join(map(str, self.spec.sizes))}: pass "
            "fewer rows, with reduction='sum', and add up"
        )


def added(parts: Iterable[Any]) -> Sums:
    """The sums of several runs of one plan, which writes them to the same place every time."""
    total = None
    for loss, weight, grads in ((part.loss, part.weight, part.grads) for part in parts):
        if total is None:
            total = Sums(loss + 0, weight + 0, [Layer(W.copy(), b.copy()) for W, b in grads])
            continue
        for mine, theirs in zip(flat(total.grads), flat(grads), strict=True):
            mine += theirs
        total = total._replace(loss=total.loss + loss, weight=total.weight + weight)
    assert total is not None
    return total


class OneArray(NamedTuple):
    """As backprop.Sums; loss and gradients are views of one array, and divided in one launch."""

    sums: Sums
    array: Array

    @property
    def weight(self) -> Array | float:
        """The sum of the weights."""
        return self.sums.weight

    def divided(self, spec: Spec, divisor: Array | float) -> tuple[Array, list[Layer]]:
        """Loss and gradients over a divisor, as views of one new array."""
        quotient = self.array / divisor

        def same_view(A: Array) -> Array:
            place = quotient.data + (A.data.ptr - self.array.data.ptr)
            return spec.xp.ndarray(A.shape, A.dtype, place)

        loss, grads = self.sums.loss, self.sums.grads
        return same_view(loss), [Layer(same_view(W), same_view(b)) for W, b in grads]


def in_one_array(spec: Spec, sums: Sums) -> Any:
    """The sums as OneArray, where they are laid out so and in the dtype of the results."""
    views = [sums.loss, *flat(sums.grads)]
    array = sums.loss.base
    if array is None or array.dtype != spec.dtype or any(A.base is not array for A in views):
        return sums
    return OneArray(sums, array)


def _check_one_device(arrays: list[Array]) -> None:
    devices = {array.data.device_id for array in arrays}
    if len(devices) > 1:
        raise ValueError(
            f"the arrays lie on CUDA devices {' and '.join(map(str, sorted(devices)))}: "
            "move all to one device first"
        )

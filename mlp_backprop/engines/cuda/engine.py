"""The CuPy engine: for each problem the first tier of CUDA kernels that covers it.

    tiny         a thread per sample, everything in registers
    warp_tiles   a warp per tile of samples, on tensor cores
    layers       layer by layer, products by cuBLASLt

What none of them covers runs the derivation on CuPy arrays. All work is enqueued on CuPy's current
stream, on the device where X lies, and nothing here waits for it.

Sums become a mean in the kernels that write them last: a division of its own would be one more
launch for a small net, and for a large one reads and writes of all gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec, Sums
from mlp_backprop.engines.cuda import layers as cuda_layers
from mlp_backprop.engines.cuda import tiny, warp_tiles
from mlp_backprop.engines.cuda.arrays import TARGETS, Arguments
from mlp_backprop.maths.row_blocks import added_losses, part
from mlp_backprop.types import Array, Layer, LossAndGrads, flat

TIERS: tuple[Any, ...] = (tiny, warp_tiles, cuda_layers)

MOST_PLANS = 8  # that are kept: streams may come and go

# Some have a method `bound` as well: for the same arguments, the launches alone.
TierRun = Callable[[Arguments], tuple[Array, list[Layer]]]


def prepare(spec: Spec, n: int, precision: str) -> "Runs":
    """A pass over up to n rows, on any device and stream."""
    return Runs(spec, n, precision)


def prepare_here(spec: Spec, n: int, precision: str) -> TierRun:
    """The first tier's run, on the current device and stream."""
    runs = (tier.prepare(spec, n, precision) for tier in TIERS)
    return next((run for run in runs if run is not None), None) or derivation(spec, n)


def derivation(spec: Spec, n: int) -> TierRun:
    """The derivation, over n rows at a time.

    As from the kernels, the loss is nan where a label is out of range.
    """
    sums_of, xp = partial(backprop.loss_and_grad_sums, spec), spec.xp

    def run(arguments: Arguments) -> LossAndGrads:
        params, X, y, weight, mean, out = arguments
        # A prepared call hands on plain pairs, which is all that the kernels need.
        layers = [Layer(W, b) for W, b in params]
        step = max(1, n)
        blocks = (slice(k, k + step) for k in range(0, max(1, X.shape[0]), step))
        parts = (sums_of(layers, X[rows], y[rows], part(weight, rows)) for rows in blocks)
        loss, grads = added_losses((sums.loss, sums.grads) for sums in parts)
        sums = Sums(loss, backprop.weight_sum(spec, X, weight), grads)
        loss, grads = backprop.reduced(spec, sums, "mean" if mean else "sum")
        if y.ndim == 1:
            # A narrow integer type may not be able to hold the width it is compared with.
            limit = min(spec.sizes[-1] - 1, xp.iinfo(y.dtype).max)
            are_labels = xp.all((y >= 0) & (y <= limit))
            loss = xp.where(are_labels, loss, xp.nan * loss)
        return LossAndGrads(loss, grads if out is None else backprop.written(grads, out))

    return run


class Runs:
    """A run for each device and stream that a call comes on, made there at the first call.

    On one stream kernels run in order, so that a plan may use its workspace again at once; on two
    it may not.
    """

    def __init__(self, spec: Spec, n: int, precision: str) -> None:
        self.spec, self.precision = spec, precision
        self.rows = n  # that a plan has memory for; a pass over more takes them in parts
        self.runs: dict[tuple[int, int], TierRun] = {}

    def __call__(
        self,
        params: list[Layer],
        X: Array,
        y: Array,
        weight: Array | None,
        reduction: str,
        out: list[Layer] | None = None,
    ) -> LossAndGrads:
        """Loss and gradients; short of memory, over half as many rows at a time."""
        arguments = Arguments(params, X, y, weight, reduction == "mean", out)
        targets = [] if out is None else flat(out)
        _check_one_device([*_flat(params, X, y, weight), *targets])
        with X.device:
            if out is None or all(A.flags.c_contiguous for A in targets):
                return self._run(arguments)
            loss, grads = self._run(arguments._replace(out=None))
            return LossAndGrads(loss, backprop.written(grads, out))

    def bound(
        self, params: list[Layer], X: Array, y: Array, weight: Array | None, reduction: str
    ) -> Callable[[], LossAndGrads]:
        """The pass over these arrays, whatever they hold when it is called.

        Where kernels read all of them as they lie, their launches are made up now.
        """
        arrays = params, X, y, weight, reduction
        _, out = self(*arrays)  # which looks at devices, and plans
        with X.device:
            here = _here()
        bound, launch = getattr(self.runs[here], "bound", None), None
        takes_y = y.ndim == 2 or y.dtype in TARGETS
        if bound is not None and takes_y and all(map(_is_plain, _flat(params, X, y, weight))):
            launch = bound(Arguments(params, X, y, weight, reduction == "mean", out))
        if launch is None:
            return partial(self, *arrays, out)

        def call() -> LossAndGrads:
            # A plan's workspace is for one stream.
            return LossAndGrads(*launch()) if _here() == here else self(*arrays, out)

        return call

    def _run(self, arguments: Arguments) -> LossAndGrads:
        import cupy

        try:
            return LossAndGrads(*self._planned()(arguments))
        except cupy.cuda.memory.OutOfMemoryError:
            pass  # only when the error is gone are the arrays of its frames
        self.runs.clear()
        cupy.get_default_memory_pool().free_all_blocks()
        self.rows = -(-self.rows // 2)
        try:
            return LossAndGrads(*self._planned()(arguments))
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise self._too_large(arguments.X) from error

    def _planned(self) -> TierRun:
        here = _here()
        if here not in self.runs:
            if len(self.runs) == MOST_PLANS:
                self.runs.clear()
            self.runs[here] = prepare_here(self.spec, self.rows, self.precision)
        return self.runs[here]

    def _too_large(self, X: Array) -> MemoryError:
        free, total = (size / 1e9 for size in X.device.mem_info)
        return MemoryError(
            f"{free:.1f} of {total:.1f} GB are free on {X.device}, too little even for "
            f"{self.rows} rows at a time of widths {'-'.join(map(str, self.spec.sizes))}: pass "
            "fewer rows, with reduction='sum', and add up"
        )


def _here() -> tuple[int, int]:
    """The current device and stream."""
    import cupy

    return cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr


def _flat(params: list[Layer], X: Array, y: Array, weight: Array | None) -> list[Array]:
    return [X, y, *flat(params)] if weight is None else [X, y, weight, *flat(params)]


def _is_plain(array: Array) -> bool:
    """Whether every kernel reads it as it lies."""
    return array.data.ptr % 16 == 0 and bool(array.flags.c_contiguous)


def _check_one_device(arrays: list[Array]) -> None:
    devices = {array.data.device_id for array in arrays}
    if len(devices) > 1:
        raise ValueError(
            f"the arrays lie on CUDA devices {' and '.join(map(str, sorted(devices)))}: "
            "move all to one device first"
        )

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
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec, Sums
from mlp_backprop.engines.cuda import layers as cuda_layers
from mlp_backprop.engines.cuda import tiny, warp_tiles
from mlp_backprop.engines.cuda.arrays import TARGETS, Arguments
from mlp_backprop.maths.row_blocks import added_blocks, rows_of
from mlp_backprop.types import Array, Layer, Layers, LossAndGrads, flat

TIERS: tuple[Any, ...] = (tiny, warp_tiles, cuda_layers)

# Compute capability 8.0: from there on tensor cores have what tier 2, TF32 and bfloat16 ask for.
# Older cards compute all of float32 in float32: tiny nets in tier 1, others layer by layer.
TENSOR_CORES = 80

MOST_PLANS = 8  # that are kept: streams may come and go

# Some have a method `bound` as well: for the same arguments, the launches alone.
TierRun = Callable[[Arguments], LossAndGrads]


def prepare(spec: Spec, n: int, precision: str) -> "Runs":
    """A pass over up to n rows, on any device and stream."""
    return Runs(spec, n, precision)


def prepare_here(spec: Spec, n: int, precision: str) -> TierRun:
    """The first tier's run, on the current device and stream."""
    import cupy

    # A string, "75" or "120".
    if int(cupy.cuda.Device().compute_capability) < TENSOR_CORES:
        precision = "float32_exact"
    runs = (tier.prepare(spec, n, precision) for tier in TIERS)
    return next((run for run in runs if run is not None), None) or derivation(spec, n)


def derivation(spec: Spec, n: int) -> TierRun:
    """The derivation, over n rows at a time.

    As from the kernels, the loss is nan where a label is out of range.
    """
    sums_of, xp = partial(backprop.loss_and_grad_sums, spec), spec.xp

    def run(arguments: Arguments) -> LossAndGrads:
        params, X, y, weight, mean, out = arguments[:6]
        # A prepared call hands on plain pairs, which is all that the kernels need.
        layers = [Layer(W, b) for W, b in params]
        step = max(1, n)
        blocks = (slice(k, k + step) for k in range(0, max(1, X.shape[0]), step))
        parts = (sums_of(layers, X[rows], y[rows], rows_of(weight, rows)) for rows in blocks)
        loss, grads = added_blocks((sums.loss, sums.grads) for sums in parts)
        sums = Sums(loss, backprop.weight_sum(spec, X, weight), grads)
        asked = spec._replace(reduction="mean" if mean else "sum")
        loss, grads = backprop.reduced(asked, sums)
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
        self.mean = spec.reduction == "mean"
        self.rows = n  # that a plan has memory for; a pass over more takes them in parts
        self.runs: dict[tuple[int, int], TierRun] = {}

    def __call__(
        self, params: Layers, X: Array, y: Array, weight: Array | None, out: Layers | None = None
    ) -> LossAndGrads:
        """Loss and gradients; short of memory, over half as many rows at a time."""
        arguments = Arguments(params, X, y, weight, self.mean, out)
        targets = [] if out is None else flat(out)
        _check_one_device([*_flat(params, X, y, weight), *targets])
        with X.device:
            if out is None or all(A.flags.c_contiguous for A in targets):
                return self._run(arguments)
            loss, grads = self._run(arguments._replace(out=None))
            return LossAndGrads(loss, backprop.written(grads, out))

    def bound(
        self, params: Layers, X: Array, y: Array, weight: Array | None, constant_X: bool = False
    ) -> Callable[[], LossAndGrads]:
        """The pass over these arrays, whatever they hold when it is called.

        Where kernels read all of them as they lie, their launches are made up now.
        """
        arrays = params, X, y, weight
        _, out = self(*arrays)  # which looks at devices, and plans
        arguments = Arguments(params, X, y, weight, self.mean, out, constant_X)
        with X.device:
            here, launch = _here(), self._launches(arguments)
        if launch is None:
            return partial(self, *arrays, out)

        def call() -> LossAndGrads:
            if _here() != here:  # a plan's workspace is for one stream
                return self(*arrays, out)
            try:
                return launch()
            except Exception as error:
                raise self._failure(error) from error

        return call

    def _launches(self, arguments: Arguments) -> Callable[[], LossAndGrads] | None:
        """Those of the plan for this place; None where it has to be called."""
        params, X, y, weight = arguments[:4]
        bound = getattr(self.runs[_here()], "bound", None)
        takes_y = y.ndim == 2 or y.dtype in TARGETS
        if bound is None or not takes_y or not all(map(_is_plain, _flat(params, X, y, weight))):
            return None
        with suppress(MemoryError):  # a call may do with less, and over fewer rows at a time
            launches: Callable[[], LossAndGrads] | None = bound(arguments)
            return launches
        return None

    def _run(self, arguments: Arguments) -> LossAndGrads:
        try:
            return self._run_in_memory(arguments)
        except (ImportError, MemoryError):  # which say what to do
            raise
        except Exception as error:
            raise self._failure(error) from error

    def _run_in_memory(self, arguments: Arguments) -> LossAndGrads:
        import cupy

        try:
            return self._planned()(arguments)
        except cupy.cuda.memory.OutOfMemoryError:
            pass  # only when the error is gone are the arrays of its frames
        self.runs.clear()
        cupy.get_default_memory_pool().free_all_blocks()
        self.rows = -(-self.rows // 2)
        try:
            return self._planned()(arguments)
        except cupy.cuda.memory.OutOfMemoryError as error:
            raise self._too_large(arguments.X) from error

    def _planned(self) -> TierRun:
        here = _here()
        if here not in self.runs:
            if len(self.runs) == MOST_PLANS:
                self.runs.clear()
            self.runs[here] = prepare_here(self.spec, self.rows, self.precision)
        return self.runs[here]

    def _failure(self, error: Exception) -> RuntimeError:
        """What to report, and a way on; the cause has the whole text, such as a compiler's."""
        first_line = str(error).partition("\n")[0]
        widths, dtype = "-".join(map(str, self.spec.sizes)), np.dtype(self.spec.dtype).name
        names = ", ".join(dict.fromkeys(row.name for row in self.spec.activations))
        may_be_exact = dtype == "float32" and self.precision != "float32_exact"
        exact = "precision='float32_exact', which asks less of the card, or " * may_be_exact
        return RuntimeError(
            f"backend 'cupy' failed with {type(error).__name__}: {first_line}. The arguments were "
            f"in order: please report this, with the lines above and these: widths {widths}, "
            f"{names}, {self.spec.loss.name}, {dtype}, precision={self.precision!r}, {_card()}. "
            f"Until it is mended, try {exact}backend='numpy' with cupy.asnumpy of the arrays"
        )

    def _too_large(self, X: Array) -> MemoryError:
        free, total = (size / 1e9 for size in X.device.mem_info)
        return MemoryError(
            f"{free:.1f} of {total:.1f} GB are free on {X.device}, too little even for "
            f"{self.rows} rows at a time of widths {'-'.join(map(str, self.spec.sizes))}: pass "
            "fewer rows, with reduction='sum', and add up"
        )


def _card() -> str:
    """What it is and what runs on it."""
    import cupy

    runtime = cupy.cuda.runtime
    try:
        name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        capability = cupy.cuda.Device().compute_capability
        versions = f"CUDA {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"
    except Exception as error:  # after a fault in a kernel nothing on the device answers
        return f"CuPy {cupy.__version__}, a card that does not answer ({error})"
    return f"{name} of compute capability {capability}, CuPy {cupy.__version__}, {versions}"


def _here() -> tuple[int, int]:
    """The current device and stream."""
    import cupy

    return cupy.cuda.runtime.getDevice(), cupy.cuda.get_current_stream().ptr


def _flat(params: Layers, X: Array, y: Array, weight: Array | None) -> list[Array]:
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

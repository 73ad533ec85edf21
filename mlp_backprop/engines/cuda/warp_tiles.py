"""Tier 2 of the CuPy engine: nets up to 128 wide on tensor cores, by cuda/warp_tiles.cu.

X is read once, and what a layer makes of a tile of rows stays on the multiprocessor. Operands of
products are 16-bit numbers, summed in float32:

    "float32"    two float16 parts, 22 bits together, in three products
    "tf32"       one float16 part: the 11 bits of tf32, at twice its speed
    "bfloat16"   bfloat16

Before it is rounded to float16, every matrix (the 16 or 32 rows of a warp, a layer's weights) is
brought into range by a power of two: numbers keep their bits down to 2^-29 (one part) or 2^-18
(two) of its largest, and below that are off by 2^-40 of it. What is inf or nan gives the infs and
nans of float32. "float32_exact" is left to the next tier.

Sums of products are cut off or rounded to float32: over 16 or 32 rows in a tensor core, then one
after the other, at most WARPS MOST_TILES of them; blocks are added in float64. The tests hold
"float32" to a smaller error of the gradient than the derivation has in float32, under tensor cores
that cut off every sum; how real ones do is not yet measured.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.cuda import build
from mlp_backprop.engines.cuda.arrays import (
    Arguments,
    Results,
    constants_of,
    pointers_to,
    readable_inputs,
    vector_bytes,
)
from mlp_backprop.engines.cuda.build import Specialisation
from mlp_backprop.engines.cuda.launches import Launches
from mlp_backprop.types import DType, LossAndGrads, flat, n_params

WIDEST = 128
MOST_TILES = 1024  # of a block
KERNELS = ("warp_tiles", "exact_rows", "add_rows")


class Operands(NamedTuple):
    """How numbers are rounded for products: the constants of operands.cuh."""

    FLOAT16: int
    PARTS: int


OPERANDS = {
    "float32": Operands(FLOAT16=1, PARTS=2),
    "tf32": Operands(FLOAT16=1, PARTS=1),
    "bfloat16": Operands(FLOAT16=0, PARTS=1),
}


class Geometry(NamedTuple):
    """How a block takes its rows: the constants of warp_tiles.cu."""

    WARPS: int
    ROW_TILES: int  # of 16 rows, per warp
    BLOCKS: int  # at a time on a multiprocessor

    @property
    def tile_rows(self) -> int:
        return 16 * self.ROW_TILES * self.WARPS

    @property
    def max_registers(self) -> int:
        """65536 are shared by the threads of a multiprocessor; one of them has at most 255."""
        return min(255, 65536 // (32 * self.WARPS * self.BLOCKS) // 8 * 8)


# In order of preference, by the number of parts; chosen by counts of instructions and accesses, not
# yet by time on a card. Two row tiles halve what a warp reads of the weights, but with two parts
# there are no registers for them; four warps take less shared memory.
GEOMETRIES = {
    1: tuple(Geometry(*g) for g in ((4, 2, 4), (4, 2, 3), (4, 2, 2), (8, 1, 1), (4, 1, 1))),
    2: tuple(Geometry(*g) for g in ((8, 1, 2), (8, 1, 1), (4, 1, 1))),
}


class Limits(NamedTuple):
    """Bytes of shared memory that a device gives to a block, and has per multiprocessor."""

    block: int
    multiprocessor: int


CARVEOUT = 100  # per cent of what could also be cache, which has little to do
RESERVED = 1024  # bytes that every block costs besides

# Compute capability 9.0 and 10.0; 8.0; 8.6, 8.9 and 12.0.
LIMITS = tuple(Limits(1024 * (kb - 1), 1024 * kb) for kb in (228, 164, 100))


def width(d: int) -> int:
    """As the kernel pads it."""
    return math.ceil(d / 16) * 16


def shared_bytes(spec: Spec, parts: int, geometry: Geometry) -> int:
    """sizeof(Shared) in warp_tiles.cu, which asserts that it is this."""
    rows, layers = geometry.tile_rows, len(spec.sizes) - 1
    widths = [width(d) for d in spec.sizes]
    halves = rows * sum(w + 8 for w in widths)
    halves += sum(n_out * (n_in + 8) for n_in, n_out in pairwise(widths))
    hidden = zip(widths[1:-1], spec.activations[:-1], strict=True)
    halves += rows * sum(w for w, row in hidden if keeps_slopes(row.name, parts))
    floats = geometry.WARPS * (layers + 3) + layers + 1
    return 2 * parts * halves + 4 * sum(widths[1:]) + math.ceil(floats / 4) * 16


def exact_bytes(spec: Spec) -> int:
    """What exact_rows.cuh has in shared memory: two numbers per unit, of 8 rows."""
    return 4 * 2 * 8 * sum(spec.sizes) + 4


def keeps_slopes(activation: str, parts: int) -> bool:
    """Whether f' cannot be had from the rounded H."""
    if parts == 1:
        return activation in ("softplus", "silu", "gelu_tanh")
    return activation not in ("identity", "relu", "leaky_relu")


def share(n_out: int, n_in: int, warps: int) -> tuple[int, int]:
    """Rows and columns of 16 x 16 blocks of dE/dW that a warp has, as the kernel deals them."""
    down = [2**k for k in range(warps.bit_length())]
    shares = [(math.ceil(n_out / 16 / d), math.ceil(n_in / 16 / (warps // d))) for d in down]
    return min(shares, key=lambda of: (of[0] * of[1], sum(of)))


def registers(spec: Spec, parts: int, geometry: Geometry) -> int:
    """What a thread needs: its part of all gradients, of a layer's outputs, and the rest.

    The numbers are such that nothing spills.
    """
    widths = [width(d) for d in spec.sizes]
    shares = [share(n_out, n_in, geometry.WARPS) for n_in, n_out in pairwise(widths)]
    grads = sum(rows * (8 * columns + 2) for rows, columns in shares)
    per_column = {1: 0.5, 2: 0.8}[parts]
    outputs = math.ceil(geometry.ROW_TILES * max(widths) * per_column)
    outputs = max(outputs, (geometry.ROW_TILES + 1) * widths[-1] // 2)  # what the loss needs
    return grads + outputs + 66


def choose(spec: Spec, parts: int, limits: Limits) -> Geometry | None:
    """The first geometry that fits, if any."""
    for geometry in GEOMETRIES[parts]:
        size = shared_bytes(spec, parts, geometry)
        together = geometry.BLOCKS * (size + RESERVED)
        fits = size <= limits.block and together <= limits.multiprocessor
        if fits and registers(spec, parts, geometry) <= geometry.max_registers:
            return geometry
    return None


def covers(spec: Spec, precision: str) -> bool:
    """Whether a device may have room for the net: `choose` tells."""
    is_float32 = np.dtype(spec.dtype) == np.float32
    return is_float32 and precision in OPERANDS and max(spec.sizes) <= WIDEST


def specialise(spec: Spec, precision: str) -> tuple[Specialisation, ...]:
    """The kernels for a net on each kind of device; none where the net is not covered."""
    chosen = (specialisation(spec, precision, limits) for limits in LIMITS)
    return tuple(dict.fromkeys(row for row in chosen if row is not None))


def specialisation(
    spec: Spec, precision: str, limits: Limits, target: DType = np.float32
) -> Specialisation | None:
    """The kernels for a net on a device with these limits, and this type of y."""
    if not covers(spec, precision):
        return None
    operands = OPERANDS[precision]
    geometry = choose(spec, operands.PARTS, limits)
    if geometry is None:
        return None
    constants = constants_of(spec, target) | {
        "SHARED_BYTES": shared_bytes(spec, operands.PARTS, geometry),
        **operands._asdict(),
        **geometry._asdict(),
    }
    defines = tuple((name, str(value)) for name, value in constants.items())
    return Specialisation("warp_tiles.cu", KERNELS, defines, geometry.max_registers)


def n_blocks(n: int, tile_rows: int, n_resident: int) -> int:
    """Blocks for n rows: no more than run at a time, unless one had too many tiles to add."""
    tiles = math.ceil(n / tile_rows)
    return max(1, min(tiles, n_resident), math.ceil(tiles / MOST_TILES))


def prepare(spec: Spec, n: int, precision: str) -> "WarpTilesRun | None":
    """A pass, planned for up to n rows, on the current device and stream."""
    if not covers(spec, precision):
        return None
    import cupy

    attributes = cupy.cuda.Device().attributes
    limits = Limits(
        attributes["MaxSharedMemoryPerBlockOptin"],
        attributes["MaxSharedMemoryPerMultiprocessor"],
    )
    geometry = choose(spec, OPERANDS[precision].PARTS, limits)
    return None if geometry is None else WarpTilesRun(spec, n, precision, limits, geometry)


class WarpTilesRun:
    """The run of a plan, with its workspace: for one stream."""

    def __init__(
        self, spec: Spec, n: int, precision: str, limits: Limits, geometry: Geometry
    ) -> None:
        import cupy

        self.spec, self.precision, self.limits, self.geometry = spec, precision, limits, geometry
        self.n_resident = geometry.BLOCKS * cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.shared_bytes = shared_bytes(spec, OPERANDS[precision].PARTS, geometry)
        self.kernels: dict[DType, list[Any]] = {}
        self.results = Results(spec.sizes)
        self.n_sums = n_params(spec.sizes) + 2
        self.rows = cupy.empty((self.n_blocks(n), self.n_sums), np.float32)
        self.not_finite = cupy.zeros(1, np.uint32)

    def __call__(self, arguments: Arguments) -> LossAndGrads:
        """The seam of the CuPy engine's tiers."""
        return self.bound(arguments).once()

    def bound(self, arguments: Arguments) -> Launches:
        """The launches of a pass, to be done again and again, as in cuda/tiny.py."""
        own, X, y, weight = readable_inputs(arguments, vector_bytes(self.spec.sizes[0]))
        loss, grads = self.results(arguments.out)
        warp_tiles, exact_rows, add_rows = self.compiled(y.dtype)
        n, block = X.shape[0], 32 * self.geometry.WARPS
        grid = min(self.n_blocks(n), len(self.rows))
        data = X, y, weight, n, pointers_to(own), self.rows, self.not_finite
        results = pointers_to([*flat(grads), loss])
        sums = self.rows, grid, int(arguments.mean), results, self.not_finite
        n_columns, exact_shared = math.ceil(self.n_sums / 32), exact_bytes(self.spec)

        def enqueue() -> None:
            warp_tiles((grid,), (block,), data, shared_mem=self.shared_bytes)
            exact_rows((grid,), (256,), data, shared_mem=exact_shared)
            add_rows((n_columns,), (256,), sums)

        return Launches(enqueue, [*own, X, y, weight], LossAndGrads(loss, grads))

    def n_blocks(self, n: int) -> int:
        return n_blocks(n, self.geometry.tile_rows, self.n_resident)

    def compiled(self, target: DType) -> list[Any]:
        """The kernels, compiled at the first call."""
        if target not in self.kernels:
            chosen = specialisation(self.spec, self.precision, self.limits, target)
            assert chosen is not None
            module = build.module(chosen)
            self.kernels[target] = [module.get_function(name) for name in KERNELS]
            warp_tiles, exact_rows, _ = self.kernels[target]
            warp_tiles.max_dynamic_shared_size_bytes = self.shared_bytes
            exact_rows.max_dynamic_shared_size_bytes = exact_bytes(self.spec)
            # One for all: a multiprocessor must be idle to be divided anew between two kernels.
            for kernel in self.kernels[target]:
                kernel.preferred_shared_memory_carveout = CARVEOUT
        return self.kernels[target]

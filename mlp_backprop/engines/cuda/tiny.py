"""Tier 1 of the CuPy engine: tiny nets, a thread per sample, in one launch of cuda/tiny.cu.

Every sum over samples has a register in every thread, so that the number of parameters decides.
All arithmetic is in float32, whatever precision is asked for.

Rounding: a thread adds up at most MOST_ROWS samples one after the other, lanes and warps add 7
levels of a tree, blocks are added in float64. So the error of a sum of terms x is below
(MOST_ROWS + 8) 2^-24 sum |x| however many they are.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.cuda import build
from mlp_backprop.engines.cuda.arrays import (
    NULL,
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

WARP = 32
BLOCK = 128
MOST_ROWS = 512

# Registers that a thread may have where so many blocks share the 65536 of a multiprocessor. One
# block would hide too little of the time that loads and exponentials take; four hide enough.
CEILINGS = {4: 128, 3: 168, 2: 255}

# Where f' needs Z, it is formed on the way forward and kept.
SLOPES_FROM_Z = {"softplus", "silu", "gelu_tanh"}


def registers(spec: Spec, params_in_registers: bool) -> int:
    """What a thread needs: sums, all Z and H, rows of data, and what compiling showed.

    The last term is such that nothing spills; from shared memory, parameters come by fours.
    """
    sizes, names = spec.sizes, [row.name for row in spec.activations]
    slopes = sum(d for d, name in zip(sizes[1:], names, strict=True) if name in SLOPES_FROM_Z)
    row = sizes[0] + sizes[-1]
    rows = (3 if row < 8 else 2) * row  # short ones are loaded two ahead
    n = n_params(sizes) + 2 * sum(sizes[1:]) + slopes + rows
    return n + n_params(sizes) + 16 if params_in_registers else n + 72


class Placement(NamedTuple):
    """Whether parameters go to registers or stay in shared memory; blocks per multiprocessor."""

    in_registers: bool
    blocks: int


def placement(spec: Spec) -> Placement | None:
    """What a net is run with; None if it is not covered."""
    if np.dtype(spec.dtype) != np.float32:
        return None
    in_registers = registers(spec, True) <= CEILINGS[2]
    needed = registers(spec, in_registers)
    fitting = (blocks for blocks, ceiling in CEILINGS.items() if needed <= ceiling)
    blocks = next(fitting, None)
    return None if blocks is None else Placement(in_registers, blocks)


def variants(spec: Spec) -> list[Placement]:
    """What there is to choose between by time on a card: first what `placement` takes.

    Where registers leave room for two blocks, a third hides more of the time that exponentials
    take, and costs loads of parameters and, in the largest nets, a few spilled registers.
    """
    placed = placement(spec)
    if placed is None:
        return []
    return [placed, Placement(False, 3)] if placed.blocks == 2 else [placed]


def specialise(
    spec: Spec,
    precision: str,
    *,
    target: DType = np.float32,
    weighted: bool = False,
    placed: Placement | None = None,
) -> Specialisation | None:
    """The kernel for a net and the kind of data; None for nets that are not covered."""
    placed = placed or placement(spec)
    if placed is None:
        return None
    constants = constants_of(spec, target) | {
        "WEIGHTED": int(weighted),
        "PARAMS_IN_REGISTERS": int(placed.in_registers),
        "BLOCK": BLOCK,
        "BLOCKS": placed.blocks,
    }
    defines = tuple((name, str(value)) for name, value in constants.items())
    return Specialisation("tiny.cu", ("tiny",), defines, max_registers=CEILINGS[placed.blocks])


def n_blocks(n: int, n_resident: int) -> int:
    """Blocks for n rows: no more than run at a time, unless a thread had too many rows to add."""
    return max(1, min(math.ceil(n / BLOCK), n_resident), math.ceil(n / (BLOCK * MOST_ROWS)))


def prepare(
    spec: Spec, n: int, precision: str, placed: Placement | None = None
) -> "TinyRun | None":
    """A pass over up to n rows, on the current device and stream.

    `placed` is one of the net's variants; None: the first.
    """
    placed = placed or placement(spec)
    return None if placed is None else TinyRun(spec, n, precision, placed)


class TinyRun:
    """The run of a plan, with its workspace: for one stream."""

    def __init__(self, spec: Spec, n: int, precision: str, placed: Placement) -> None:
        import cupy

        self.spec, self.precision, self.placed = spec, precision, placed
        self.kernels: dict[tuple[DType, bool], Any] = {}
        self.n_resident = placed.blocks * cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.results = Results(spec.sizes)
        self.X_vectors, *_, self.y_vectors = map(vector_bytes, spec.sizes)
        n_sums = n_params(spec.sizes) + 2
        row = math.ceil(n_sums / WARP) * WARP  # every lane of a warp has equally many
        self.partials = cupy.empty((n_blocks(n, self.n_resident), row), np.float32)
        self.ticket = cupy.zeros(1, np.uint32)

    def __call__(self, arguments: Arguments) -> LossAndGrads:
        """The seam of the CuPy engine's tiers."""
        return self.bound(arguments).once()

    def bound(self, arguments: Arguments) -> Launches:
        """The launch of a pass, to be done again and again; what is not readable is copied now."""
        own, X, y, weight = readable_inputs(arguments, self.X_vectors, self.y_vectors)
        loss, grads = self.results(arguments.out)
        kernel, n = self.kernel(y.dtype, weight is not NULL), X.shape[0]
        results = pointers_to([*flat(grads), loss])
        data = X, y, weight, n, int(arguments.mean)
        inputs_and_outputs = (pointers_to(own), *data, self.partials, self.ticket, results)
        grid = min(n_blocks(n, self.n_resident), len(self.partials))

        launch = partial(kernel, (grid,), (BLOCK,), inputs_and_outputs)
        return Launches(launch, [*own, X, y, weight], LossAndGrads(loss, grads))

    def kernel(self, target: DType, weighted: bool) -> Any:
        """Compiled at the first call."""
        kind = target, weighted
        if kind not in self.kernels:
            kind_of_data: dict[str, Any] = {"target": target, "weighted": weighted}
            chosen = specialise(self.spec, self.precision, **kind_of_data, placed=self.placed)
            assert chosen is not None
            self.kernels[kind] = build.module(chosen).get_function("tiny")
        return self.kernels[kind]

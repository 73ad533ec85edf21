"""Tier 1 of the CuPy engine: tiny nets, a thread per sample, in one launch of cuda/tiny.cu.

Every sum over samples has a register in every thread, so that the number of parameters decides.
All arithmetic is in float32, whatever precision is asked for.

Rounding: a thread adds up at most MOST_ROWS samples one after the other, lanes and warps add 7
levels of a tree, blocks are added in float64. So the error of a sum of terms x is below
(MOST_ROWS + 8) 2^-24 sum |x| however many they are.
"""

import math
from itertools import pairwise
from typing import Any

import numpy as np

from mlp_backprop.backprop import Run, Spec, Sums
from mlp_backprop.engines import cuda_build
from mlp_backprop.engines.cuda_build import Specialisation
from mlp_backprop.types import Array, DType, Layer, flat

WARP = 32
BLOCK = 128
MOST_ROWS = 512

# Registers that a thread may have where so many blocks share the 65536 of a multiprocessor. One
# block would hide too little of the time that loads and exponentials take; four hide enough.
CEILINGS = {4: 128, 3: 168, 2: 255}

# Where f' needs Z, it is formed on the way forward and kept.
SLOPES_FROM_Z = {"softplus", "silu", "gelu_tanh"}

# Types of y, as they are called in C; labels of other types are cast to int64.
TARGETS = {
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "long long",
}


def registers(spec: Spec, params_in_registers: bool) -> int:
    """What a thread needs: sums, all Z and H, two rows of data, and what compiling showed.

    The last term is such that nothing spills; from shared memory, parameters come by fours.
    """
    sizes, names = spec.sizes, [row.name for row in spec.activations]
    slopes = sum(d for d, name in zip(sizes[1:], names, strict=True) if name in SLOPES_FROM_Z)
    rows = 2 * (sizes[0] + sizes[-1])
    n = n_params(sizes) + 2 * sum(sizes[1:]) + slopes + rows
    return n + n_params(sizes) + 16 if params_in_registers else n + 72


def placement(spec: Spec) -> tuple[bool, int] | None:
    """Whether parameters go to registers, and blocks per multiprocessor; None if not covered."""
    if np.dtype(spec.dtype) != np.float32:
        return None
    in_registers = registers(spec, True) <= CEILINGS[2]
    needed = registers(spec, in_registers)
    fitting = (blocks for blocks, ceiling in CEILINGS.items() if needed <= ceiling)
    blocks = next(fitting, None)
    return None if blocks is None else (in_registers, blocks)


def specialise(
    spec: Spec, precision: str, *, target: DType = np.float32, weighted: bool = False
) -> Specialisation | None:
    """The kernel for a net and the kind of data; None for nets that are not covered."""
    placed = placement(spec)
    if placed is None:
        return None
    in_registers, blocks = placed
    constants = {
        "SIZES": ",".join(map(str, spec.sizes)),
        "ACTIVATIONS": ",".join(row.name.upper() for row in spec.activations),
        "LOSS": spec.loss.name.upper(),
        "TARGET": TARGETS[np.dtype(target)],
        "WEIGHTED": int(weighted),
        "PARAMS_IN_REGISTERS": int(in_registers),
        "BLOCK": BLOCK,
        "BLOCKS": blocks,
    }
    defines = tuple((name, str(value)) for name, value in constants.items())
    return Specialisation("tiny.cu", ("tiny",), defines, max_registers=CEILINGS[blocks])


def n_params(sizes: tuple[int, ...]) -> int:
    return sum(n_out * (n_in + 1) for n_in, n_out in pairwise(sizes))


def n_blocks(n: int, n_resident: int) -> int:
    """Blocks for n rows: no more than run at a time, unless a thread had too many rows to add."""
    return max(1, min(math.ceil(n / BLOCK), n_resident), math.ceil(n / (BLOCK * MOST_ROWS)))


def plan(spec: Spec, n: int, precision: str) -> Run | None:
    """A pass over up to n rows, on the current device and stream."""
    placed = placement(spec)
    return None if placed is None else Pass(spec, n, precision, n_resident=placed[1])


class Pass:
    """The run of a plan, with its workspace and the place of its results: for one stream."""

    def __init__(self, spec: Spec, n: int, precision: str, n_resident: int) -> None:
        import cupy

        self.spec, self.precision = spec, precision
        self.kernels: dict[tuple[DType, bool], Any] = {}
        self.n_resident = n_resident * cupy.cuda.Device().attributes["MultiProcessorCount"]
        self.results = cupy.empty(n_params(spec.sizes) + 2, np.float32)
        self.sums = sums_in(self.results, spec.sizes)
        row = math.ceil(self.results.size / WARP) * WARP  # every lane of a warp has equally many
        self.partials = cupy.empty((n_blocks(n, self.n_resident), row), np.float32)
        self.ticket = cupy.zeros(1, np.uint32)

    def __call__(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Sums:
        """The seam of engines; the next call writes over the sums."""
        if y.dtype not in TARGETS:
            y = y.astype(np.int64)
        X, y = (readable(A, math.prod(A.shape[1:])) for A in (X, y))
        own = [readable(A) for A in flat(params)]
        weight = NULL if weight is None else readable(weight)
        kernel, n = self.kernel(y.dtype, weight is not NULL), X.shape[0]
        workspace = self.partials, self.ticket, self.results
        arguments = (pointers_to(own), X, y, weight, n, *workspace)
        kernel((n_blocks(n, self.n_resident),), (BLOCK,), arguments)
        return self.sums._replace(weight=float(n)) if weight is NULL else self.sums

    def kernel(self, target: DType, weighted: bool) -> Any:
        """Compiled at the first call."""
        kind = target, weighted
        if kind not in self.kernels:
            chosen = specialise(self.spec, self.precision, target=target, weighted=weighted)
            assert chosen is not None
            self.kernels[kind] = cuda_build.module(chosen).get_function("tiny")
        return self.kernels[kind]


# CuPy 13 has passed None as another address.
NULL = np.uint64(0)


def sums_in(array: Array, sizes: tuple[int, ...]) -> Sums:
    """Views of an array that holds W_1, b_1, W_2, ..., the loss, the weights."""
    grads, end = [], 0
    for n_in, n_out in pairwise(sizes):
        start, middle, end = end, end + n_out * n_in, end + n_out * (n_in + 1)
        grads.append(Layer(array[start:middle].reshape(n_out, n_in), array[middle:end]))
    return Sums(array[end : end + 1].reshape(()), array[end + 1 :].reshape(()), grads)


def readable(A: Array, n_columns: int = 1) -> Array:
    """A, or a copy: C-contiguous, and aligned to the widest vectors of floats that divide a row."""
    aligned = A.data.ptr % math.gcd(4 * n_columns, 16) == 0
    return A if aligned and A.flags.c_contiguous else A.copy(order="C")


def pointers_to(arrays: list[Array]) -> Any:
    """A struct of pointers, as an argument of a kernel."""
    addresses = np.array([A.data.ptr for A in arrays], np.uint64)
    return addresses.view(f"V{addresses.nbytes}")

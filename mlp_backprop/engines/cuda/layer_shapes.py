"""What shapes decide of a pass over a wide net: dtypes, where things lie, rows at a time.

cuda/layers.py runs the pass. Nothing here needs CuPy or a device.
"""

from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.cuda import cublaslt
from mlp_backprop.engines.cuda.tiny import SLOPES_FROM_Z

SLAB = 64  # rows whose sums a block of elements.cu forms
LANES = 32  # columns of a block, where it does not have them all

# Rows of a chunk: few enough for what one kernel writes and the next one reads to stay in the L2
# cache, but a product of fewer than LEAST_ROWS leaves multiprocessors idle. That is by counting its
# tiles, not yet by time on a card.
LEAST_ROWS = 1 << 14
MOST_ROWS = 1 << 20
CHUNK_BYTES = 1 << 31  # for LEAST_ROWS of nets up to four layers of 4096

ITEM_BYTES = {"bfloat16": 2, "float32": 4, "float64": 8, "int64": 8}


class Arithmetic(NamedTuple):
    """The dtype of parameters and sums, that of matrices that products read, and how they compute.

    `compute` is a key of cublaslt.COMPUTE_TYPES. If the first two differ, X and W are converted.
    """

    real: str
    stored: str
    compute: str

    @property
    def converts(self) -> bool:
        return self.stored != self.real


def arithmetic(spec: Spec, precision: str) -> Arithmetic | None:
    """float64 has one precision; half precision is left to the derivation."""
    dtype = np.dtype(spec.dtype).name
    if dtype == "float64":
        return Arithmetic(dtype, dtype, dtype)
    if dtype == "float32":
        return Arithmetic(dtype, "bfloat16" if precision == "bfloat16" else dtype, precision)
    return None


class Shapes(NamedTuple):
    """Where things lie, in elements; strides are from row to row.

    Matrices of our own have rows that begin at multiples of cublaslt.ALIGNMENT. X and W are taken
    as they come, unless they are converted.
    """

    sizes: tuple[int, ...]
    strides: list[int]  # of H_l and D_l, from l = 0
    weight_strides: list[int]  # of W_l, from l = 1
    keeps_Z: list[bool]  # from l = 0
    row_bytes: int  # of a row in all buffers
    near_bytes: int  # of a row in two of the widest
    bias_offsets: list[int]  # of dE/db_l in the results, from l = 1
    loss_offset: int  # there, behind them
    grad_offsets: list[int]  # of dE/dW_l there, from l = 1
    n_results: int
    loss_blocks: int  # of one slab: the parts in which its loss is summed
    n_partials: int  # sums of one slab: dE/db_l as in the results, then these parts


def shapes(spec: Spec, types: Arithmetic) -> Shapes:
    """Decide all that does not depend on the number of rows."""
    sizes, stored = spec.sizes, ITEM_BYTES[types.stored]
    aligned = [_aligned(size, stored) for size in sizes]
    as_given = aligned if types.converts else list(sizes)
    # The kernel of the output layer has Z_L and H_L in registers.
    keeps_Z = [False, *(row.name in SLOPES_FROM_Z for row in spec.activations[:-1]), False]
    widest = max(aligned[1:])
    rows = [aligned[0] * types.converts, *aligned[1:-1], widest, widest]
    rows += [size for size, keeps in zip(aligned, keeps_Z, strict=True) if keeps]
    *bias_offsets, loss_offset = accumulate(sizes[1:], initial=0)
    real = ITEM_BYTES[types.real]
    weights = (_aligned(a * b, real) for a, b in pairwise(sizes))
    *grad_offsets, n_results = accumulate(weights, initial=_aligned(loss_offset + 1, real))
    softmax = spec.loss.name == "softmax_cross_entropy"  # a block has whole rows
    loss_blocks = 1 if softmax else ceil_div(sizes[-1], LANES)
    return Shapes(
        sizes=sizes,
        strides=[as_given[0], *aligned[1:]],
        weight_strides=as_given[:-1],
        keeps_Z=keeps_Z,
        row_bytes=sum(rows) * stored,
        near_bytes=2 * widest * stored,
        bias_offsets=bias_offsets,
        loss_offset=loss_offset,
        grad_offsets=grad_offsets,
        n_results=n_results,
        loss_blocks=loss_blocks,
        n_partials=loss_offset + loss_blocks,
    )


def chunk_rows(shapes: Shapes, n: int, cache_bytes: int, free_bytes: int) -> int:
    """How many of n rows run at once: whole slabs, and chunks of about one size."""
    near = cache_bytes // 2 // shapes.near_bytes
    room = min(CHUNK_BYTES, free_bytes // 4) // shapes.row_bytes
    most = max(SLAB, min(room, MOST_ROWS))
    n_chunks = max(1, n // max(LEAST_ROWS, near), ceil_div(n, most))
    return max(1, ceil_div(n, n_chunks * SLAB)) * SLAB


def _aligned(size: int, item_bytes: int) -> int:
    unit = cublaslt.ALIGNMENT // item_bytes
    return ceil_div(size, unit) * unit


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)

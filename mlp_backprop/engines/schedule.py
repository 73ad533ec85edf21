"""How the NumPy engine cuts a problem: rows per tile, tiles per chunk, threads over tiles or BLAS.

One small cost model, decided once per shape. It never looks at how many threads there are: the
cut decides the bits of the result, threads only the time.
"""

from itertools import pairwise
from typing import NamedTuple

from mlp_backprop.backprop import Spec

# A copy of a narrow X into the tile costs less than what folding its bias into the products
# saves; from this many columns on, products take views of X. (Measured at 2, 8, 16, 64, 784.)
VIEW_WIDTH = 16

# Above this many parameters, float64 sums per chunk would cost more than threads over tiles win:
# one chunk then, and BLAS uses its own threads inside each product.
WIDE_PARAMETERS = 1 << 18

# Narrow tiles stay in the second-level cache; wide ones are long enough for BLAS to be busy.
TILE_BYTES = 384 * 1024
TILE_ROWS = (256, 2048)
WIDE_TILE_ROWS = 1024

# Chunks are what threads share out: enough to balance, few enough for their sums to be small.
MAX_CHUNKS = 32
CHUNK_BYTES = 16 * 1024 * 1024

# A thread takes 50 to 300 us to wake up: below this estimate of the time, none is woken.
WORTH_THREADS = 2e-3
SECONDS_PER_FLOP = 2e-11
SECONDS_PER_ELEMENT = 4e-9


# No BLAS divides a product of so few multiply-adds among threads. (OpenBLAS divides a matrix times
# a vector from 9 216, a dot product from 10 000.)
SMALLEST_DIVIDED_PRODUCT = 1 << 13


class Schedule(NamedTuple):
    """The cut of n rows into tiles, and of tiles into chunks; who uses threads."""

    tile_rows: int
    chunk_rows: int  # whole tiles
    copies_X: bool
    holds_blas: bool
    tile_threads: bool


def make_schedule(spec: Spec, n: int, itemsize: int) -> Schedule:
    """Choose the cut for up to n rows of a net."""
    sizes = spec.sizes
    products = [(a + 1) * b for a, b in pairwise(sizes)]
    wide = sum(products) > WIDE_PARAMETERS
    tile_rows = WIDE_TILE_ROWS if wide else _narrow_tile_rows(sizes, itemsize)
    tile_rows = max(1, min(tile_rows, n))
    n_tiles = max(1, -(-n // tile_rows))
    seconds = n * (6 * sum(products) * SECONDS_PER_FLOP + sum(sizes[1:]) * SECONDS_PER_ELEMENT)
    tile_threads = not wide and seconds * itemsize / 4 > WORTH_THREADS
    most = min(MAX_CHUNKS, CHUNK_BYTES // (8 * sum(products))) if tile_threads else 1
    return Schedule(
        tile_rows=tile_rows,
        chunk_rows=-(-n_tiles // max(1, most)) * tile_rows,
        copies_X=sizes[0] < VIEW_WIDTH,
        holds_blas=not wide and tile_rows * max(products) > SMALLEST_DIVIDED_PRODUCT,
        tile_threads=tile_threads,
    )


def _narrow_tile_rows(sizes: tuple[int, ...], itemsize: int) -> int:
    row_bytes = itemsize * (2 * sum(sizes[1:]) + max(sizes[1:]))
    rows = TILE_BYTES // row_bytes
    return min(max(TILE_ROWS[0], 1 << (rows.bit_length() - 1)), TILE_ROWS[1])

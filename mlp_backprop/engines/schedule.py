"""How the NumPy engine cuts a problem: rows per tile, tiles per chunk, and what threads share.

One small cost model, decided once per shape. It never looks at how many threads there are: the
cut decides the bits of the result, threads only the time. The constants were measured on two
cores with OpenBLAS; none of them is critical, neighbouring values cost a few per cent.
"""

from itertools import pairwise
from typing import NamedTuple

from mlp_backprop.backprop import Spec

# A copy of a narrow X into the tile costs less than folding its bias into the products saves; from
# this many columns on, products take views of X. (Measured at 2, 8, 16, 64, 784.)
VIEW_WIDTH = 16

# From this many weights on, it is better to share out products among threads than tiles, of which
# each would bring its own sums of all these weights (64-64-64-1 lies below, 128-128-128-10 above).
WIDE_WEIGHTS = 1 << 14

# Python spends some microseconds around each of the thirty calls for a tile, and holds other
# threads up meanwhile; so tiles are long, as long as their buffers still fit the caches.
TILE_BYTES = 3 << 20
TILE_ROWS = (512, 8192)
WIDE_TILE_BYTES = 16 << 20
WIDE_TILE_ROWS = (1024, 4096)

# Threads share out chunks: many enough to balance, few enough for their sums to be small.
TILES_TO_SHARE = 16
MAX_CHUNKS = 32
CHUNK_BYTES = 16 << 20

# A thread takes 50 to 300 us to wake up: below this estimate of the time, none is woken. Nor is one
# for a product of fewer multiply-adds, which takes some hundred microseconds.
WORTH_THREADS = 2e-3
SHARED_PRODUCT = 1 << 24
SECONDS_PER_FLOP = 2e-11
SECONDS_PER_ELEMENT = 4e-9

# No BLAS divides a product of so few multiply-adds among threads. (OpenBLAS divides a matrix times
# a vector from 9 216, a dot product from 10 000.)
SMALLEST_DIVIDED_PRODUCT = 1 << 13


class Schedule(NamedTuple):
    """The cut of n rows into tiles, and of tiles into chunks; what is shared out among threads."""

    tile_rows: int
    chunk_rows: int  # whole tiles
    copies_X: bool
    holds_blas: bool
    shares_products: bool
    tile_threads: bool


def make_schedule(spec: Spec, n: int, itemsize: int) -> Schedule:
    """Choose the cut for up to n rows of a net."""
    sizes = spec.sizes
    products = [(a + 1) * b for a, b in pairwise(sizes)]
    wide = sum(products) > WIDE_WEIGHTS
    seconds = n * (6 * sum(products) * SECONDS_PER_FLOP + sum(sizes[1:]) * SECONDS_PER_ELEMENT)
    seconds *= itemsize / 4

    row_bytes = itemsize * (2 * sum(sizes[1:]) + max(sizes[1:]))
    if wide:
        tile_rows = _within(WIDE_TILE_ROWS, WIDE_TILE_BYTES // row_bytes)
    else:
        tile_rows = _within(TILE_ROWS, TILE_BYTES // row_bytes)
    tile_threads = not wide and seconds > WORTH_THREADS
    if tile_threads:
        tile_rows = min(tile_rows, max(TILE_ROWS[0], -(-n // TILES_TO_SHARE)))
    tile_rows = max(1, min(tile_rows, n))

    n_tiles = max(1, -(-n // tile_rows))
    n_chunks = most_chunks(spec, 8) if tile_threads else 1
    largest = tile_rows * max(products)
    return Schedule(
        tile_rows=tile_rows,
        chunk_rows=-(-n_tiles // n_chunks) * tile_rows,
        copies_X=sizes[0] < VIEW_WIDTH,
        holds_blas=largest > SMALLEST_DIVIDED_PRODUCT,
        shares_products=wide and largest > SHARED_PRODUCT,
        tile_threads=tile_threads,
    )


def most_chunks(spec: Spec, itemsize: int) -> int:
    """How many sums of gradients may be held at a time."""
    weights = sum((a + 1) * b for a, b in pairwise(spec.sizes))
    return max(1, min(MAX_CHUNKS, CHUNK_BYTES // (itemsize * weights)))


def _within(limits: tuple[int, int], rows: int) -> int:
    least, most = limits
    return max(least, min(rows, most))

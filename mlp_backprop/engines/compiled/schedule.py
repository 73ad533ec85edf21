"""How the compiled passes cut rows into chunks for threads: a small cost model.

It knows shapes alone, never how many threads there are: the cut decides the bits of the result.
"""

import math

from mlp_backprop.types import n_params

# In operations: one product, or a tenth of an activation. A core does 20 to 50 of them in a
# nanosecond. Another thread pays from 50 to 100 us of work on, so one chunk up to 80 to 200 us,
# then chunks of at least 20 to 50 us.
ACTIVATION_OPERATIONS = 10
THREAD_OPERATIONS = 4_000_000
CHUNK_OPERATIONS = 1_000_000
MOST_CHUNKS = 64
CHUNK_BYTES = 16 << 20  # of the sums of all chunks


def operations(sizes: tuple[int, ...], products: float) -> float:
    """Of one row of X in a pass that multiplies by every weight so many times."""
    return products * n_params(sizes) + ACTIVATION_OPERATIONS * sum(sizes[1:])


def chunks(n: int, tile_rows: int, operations_of_row: float, n_sums: int = 0) -> tuple[int, int]:
    """How many chunks n rows make, each with so many sums, and of how many rows: whole tiles."""
    work = n * operations_of_row
    if work < THREAD_OPERATIONS:
        return 1, n
    most = min(MOST_CHUNKS, max(4, CHUNK_BYTES // (8 * n_sums + 1)))
    n_chunks = min(most, int(work // CHUNK_OPERATIONS))
    rows = math.ceil(n / (n_chunks * tile_rows)) * tile_rows
    return math.ceil(n / rows), rows


# In training threads stay together from step to step, and a chunk need not pay for waking them: it
# is worth 10 us or more. But sums that every chunk keeps cost as much as some rows do, so a chunk
# has at least so many, or half of the batch; and it has whole tiles once these make eight.
BATCH_CHUNK_OPERATIONS = 400_000
CHUNK_ROWS = 64
MANY_TILES = 8
LANES = 8  # numbers in the longest vector: of rows beside them a chunk has nothing


def batch_chunk_rows(n: int, tile_rows: int, operations_of_row: float, n_sums: int = 0) -> int:
    """Of how many rows the chunks of a batch are, each with so many sums: nearly the same."""
    most = min(MOST_CHUNKS, max(4, CHUNK_BYTES // (8 * n_sums + 1)))
    n_chunks = min(most, int(n * operations_of_row // BATCH_CHUNK_OPERATIONS))
    if n_chunks < 2:
        return n
    least = max(CHUNK_ROWS, min(tile_rows, n // MANY_TILES))
    n_chunks = max(2, min(n_chunks, math.ceil(n / least)))
    rows = math.ceil(n / n_chunks)
    step = tile_rows if rows > tile_rows else LANES
    return math.ceil(rows / step) * step

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


# In training, threads stay together from step to step, and a chunk need not pay for waking them. Of
# fewer rows, sums that are kept per chunk begin to cost: a batch of fewer than twice as many is
# halved at most.
BATCH_CHUNK_OPERATIONS = 400_000
CHUNK_ROWS = 32
LEAST_ROWS = 16  # whole vectors, two of them in float32


def batch_chunk_rows(n: int, tile_rows: int, operations_of_row: float, n_sums: int = 0) -> int:
    """Of how many rows the chunks of a batch are, each with so many sums."""
    most = min(MOST_CHUNKS, max(4, CHUNK_BYTES // (8 * n_sums + 1)))
    n_chunks = min(most, int(n * operations_of_row // BATCH_CHUNK_OPERATIONS))
    if n_chunks < 2:
        return n
    rows = min(max(CHUNK_ROWS, math.ceil(n / n_chunks)), math.ceil(n / 2))
    step = tile_rows if rows > tile_rows else LEAST_ROWS
    return math.ceil(rows / step) * step

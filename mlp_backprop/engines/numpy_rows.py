"""Gradients of single samples for NumPy: threads share out the rows of the result.

Nothing is computed but products, as many as numbers are written; so the time is that of the memory,
and of the pages that it is fresh from.
"""

import numpy as np

from mlp_backprop.engines import threads
from mlp_backprop.types import Array

CHUNK_BYTES = 2 << 20  # a thread writes this in about 200 us


def outer_products(D: Array, H: Array) -> Array:
    """D[i]ᵀ H[i] for every row i, (n, d_out, d_in)."""
    n = len(D)
    products = np.empty((n, D.shape[1], H.shape[1]), D.dtype)
    n_chunks = products.nbytes // CHUNK_BYTES + 1
    n_rows = -(-n // n_chunks)

    @np.errstate(all="ignore")
    def task(chunk: int, worker: int) -> None:
        rows = slice(chunk * n_rows, (chunk + 1) * n_rows)
        np.einsum("ij,ik->ijk", D[rows], H[rows], out=products[rows])

    threads.run_chunks(task, n_chunks, threads.thread_count())
    return products

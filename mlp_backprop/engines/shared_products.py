"""Large products shared out among threads, each of which computes whole slices of the result.

The slices are cut by the shape alone and each is a product of its own, on one thread of BLAS: no
number of threads changes a bit. Who takes the next slice waits for nobody.
"""

from collections.abc import Callable

import numpy as np

from mlp_backprop.engines import threads
from mlp_backprop.engines.schedule import SHARED_PRODUCT
from mlp_backprop.types import Array

# Every slice reads all of the other factor anew, for some per cent of its time if it is this long.
LEAST_SLICE = 256


Dot = Callable[..., Array]  # as np.dot: two matrices and, maybe, where the product goes


def shared_dot(A: Array, B: Array, out: Array | None = None) -> Array:
    """A B, as np.dot forms it. BLAS must be held at one thread."""
    m, n = len(A), B.shape[1]
    n_slices = slice_count(m, len(B), n)
    if n_slices == 1:
        return np.dot(A, B, out)
    result = np.empty((m, n), A.dtype) if out is None else out

    @np.errstate(all="ignore")  # which the pool's threads do not inherit
    def product(i: int, worker: int) -> None:
        if m >= n:
            cut = slice(m * i // n_slices, m * (i + 1) // n_slices)
            np.dot(A[cut], B, result[cut])
        else:  # np.dot demands a contiguous result
            cut = slice(n * i // n_slices, n * (i + 1) // n_slices)
            np.matmul(A, B[:, cut], result[:, cut])

    n_workers = threads.thread_count() if threads.can_limit_blas() else 1
    threads.run_chunks(product, n_slices, n_workers)
    return result


def slice_count(m: int, k: int, n: int) -> int:
    """Into how many slices a product (m, k) (k, n) is cut."""
    if m * k * n <= SHARED_PRODUCT:
        return 1
    return max(1, min(2 * m * k * n // SHARED_PRODUCT, max(m, n) // LEAST_SLICE))

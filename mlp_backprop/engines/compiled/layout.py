"""Where everything about some rows of X lies in a workspace: a tile, and room to work behind it.

The tile is transposed, for a CPU's vector units: each of its rows holds one number of all samples
side by side. One after the other:

    H_0, H_1, ..., H_L       a row per unit
    D_1, ..., D_L            before that f'_1(Z_1), ..., f'_L(Z_L)
    Y                        d_L rows of targets, classes as a 1 among zeros; later the losses
    weights
    G                        G_l of the layer at work: as many rows as the widest has
    more                     what a pass needs for itself

Behind the last sample lie columns up to a whole number of vectors. There D is 0, so that no sum
over samples sees them. T and P follow: H_{l-1} transposed, and dE/dW_l, of the layer at work.
"""

from itertools import pairwise
from typing import NamedTuple

from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.vectors import VECTOR_BYTES
from mlp_backprop.types import DType

# A tile fits the second-level cache, with as many rows of X as keep the loops long.
TILE_BYTES = 1 << 18
LEAST_ROWS, MOST_ROWS = 64, 256

# Its rows lie without gaps while they are short: loops then run on from one to the next. Long ones
# lie an odd number of cache lines apart: a power of two would crowd a column into few sets.
SHORT_LINES = 2


class Layout(NamedTuple):
    """Rows of X in a tile; rows where Y, weights, G and more begin; numbers where T and P do."""

    tile_rows: int
    Y: int
    weights: int
    G: int
    more: int
    T: int
    P: int
    size: int  # of all, in numbers


def layout(
    sizes: tuple[int, ...], n: int, dtype: DType, more_rows: int = 0, products: int = 0
) -> Layout:
    """For n rows of X, so many more rows of the tile, at its end, and room for `products` in P."""
    lanes = VECTOR_BYTES // dtype.itemsize
    Y = sizes[0] + 2 * sum(sizes[1:])
    weights, G = Y + sizes[-1], Y + sizes[-1] + 1
    more = G + max(*sizes, sizes[-1] + 3)  # three: softmax works there
    n_rows = more + more_rows
    fitting = TILE_BYTES // (n_rows * dtype.itemsize) // LEAST_ROWS * LEAST_ROWS
    tile_rows = max(1, min(n, max(LEAST_ROWS, min(fitting, MOST_ROWS))))
    m = whole(tile_rows, lanes)
    T = (n_rows + lanes) * stride(m, lanes)  # transposed by squares, which reach behind a row
    P = T + m * whole(max(sizes[:-1]) + 1, lanes)  # a pass may have a 1 beside H_{l-1}
    most_weights = max(n_out * whole(n_in, lanes) for n_in, n_out in pairwise(sizes))
    size = P + max(most_weights, products)
    return Layout(tile_rows, Y, weights, G, more, T, P, whole(size, 2 * lanes))


@compiled
def whole_vectors(n, lanes):
    """N numbers, rounded up to vectors."""
    return (n + lanes - 1) // lanes * lanes


@compiled
def stride_for(m, lanes):
    """From row to row of a tile with m columns, which are whole vectors."""
    line = 2 * lanes
    return m if m <= SHORT_LINES * line else ((m + line - 1) // line | 1) * line


whole, stride = whole_vectors.py_func, stride_for.py_func

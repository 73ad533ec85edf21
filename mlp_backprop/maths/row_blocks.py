"""Rows in blocks: what a pass keeps is bounded, however many rows there are.

Everything is a sum over samples or has one entry per sample, so a long batch is done block by
block, and the parts are added or joined.
"""

from collections.abc import Iterable, Iterator
from functools import reduce
from itertools import starmap

from mlp_backprop.types import Array, Layer, Layers, Namespace

# All that a pass keeps for a block. Measured: larger blocks leave the caches, and in smaller ones
# the calls cost more than the arithmetic.
BLOCK_BYTES = 4 << 20


def row_blocks(xp: Namespace, X: Array, row_numbers: int) -> Iterator[slice]:
    """Slices of the rows of X, one even for none, for a pass that keeps so many numbers of each."""
    n, row_bytes = X.shape[-2], row_numbers * xp.finfo(X.dtype).bits // 8
    step = max(1, int(BLOCK_BYTES // row_bytes))
    for start in range(0, max(1, n), step):
        yield slice(start, min(n, start + step))


def rows_of(array: Array | None, rows: slice) -> Array | None:
    """A block of an array, which may be absent."""
    return None if array is None else array[rows, ...]


def concatenated(xp: Namespace, blocks: list[Array], axis: int = 0) -> Array:
    """The entries of all blocks, in their order."""
    return blocks[0] if len(blocks) == 1 else xp.concat(blocks, axis=axis)


def added_layers(layers: Layers, more: Layers) -> Layers:
    """Sums over two blocks as sums over both."""
    pairs = zip(layers, more, strict=True)
    return list(starmap(lambda a, b: Layer(a.W + b.W, a.b + b.b), pairs))


def added_blocks(blocks: Iterable[tuple[Array, Layers]]) -> tuple[Array, Layers]:
    """The losses and gradients of all blocks, added."""
    return reduce(added_pairs, blocks)


def added_pairs(
    pair: tuple[Array, list[Layer]], more: tuple[Array, list[Layer]]
) -> tuple[Array, list[Layer]]:
    """Losses and gradients of two blocks as those of both."""
    return pair[0] + more[0], added_layers(pair[1], more[1])

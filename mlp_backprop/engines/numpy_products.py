"""The NumPy engine of vector products: tangents.py in tiles of rows, in place.

As in numpy_tiles.py samples lie along the last axis, and a row of ones folds the bias into the
products. What (V1) and (V4) add is stacked here, so that one product of matrices adds it:

    dZ_l     = [V_l c_l W_l] [H_{l-1}; 1; dH_{l-1}]
    dG_{l-1} = [W_l; V_l]ᵀ [dD_l; D_l]

Nor is f'' formed where f'' ∘ dZ follows from dH = f' ∘ dZ. The cut into tiles, and the order in
which they are added, are those of the shapes: threads over tiles, or over the products of wide
nets, change no bit of the result.
"""

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines import threads
from mlp_backprop.engines.numpy_tiles import IN_PLACE, InPlace
from mlp_backprop.engines.schedule import (
    SECONDS_PER_ELEMENT,
    SECONDS_PER_FLOP,
    SHARED_PRODUCT,
    SMALLEST_DIVIDED_PRODUCT,
    VIEW_WIDTH,
    WIDE_TILE_BYTES,
    WIDE_WEIGHTS,
)
from mlp_backprop.engines.shared_products import Dot, shared_dot
from mlp_backprop.maths.row_blocks import added_layers
from mlp_backprop.maths.tangents import Kind
from mlp_backprop.types import Array, Layer

# Tiles are as long as their buffers fit the caches, but long enough for BLAS.
TILE_BYTES = 2 << 20
LEAST_ROWS = 512
MAX_SHARES = 32  # of the tiles, each added up by one thread
SHORT_PASS = 1e-2  # seconds of one thread: below, threads gain no more than the shares cost
EFFORT = 3  # a product takes about this many times as long as schedule.py reckons for a gradient


def _sigmoid_change(H: Array, dH: Array, dF: Array) -> None:
    # f'' dZ = (1 - 2h) dH
    np.multiply(H, -2, dF)
    np.add(dF, 1, dF)
    np.multiply(dF, dH, dF)


def _tanh_change(H: Array, dH: Array, dF: Array) -> None:
    # f'' dZ = -2h dH
    np.multiply(H, -2, dF)
    np.multiply(dF, dH, dF)


# f'' ∘ dZ of the activations that IN_PLACE has, where it is not 0.
CHANGES: dict[str, Callable[[Array, Array, Array], None]] = {
    "sigmoid": _sigmoid_change,
    "tanh": _tanh_change,
}


class Stacked(NamedTuple):
    """The factors of one layer: [W b], negated where the activation wants -Z, and as above."""

    Wb: Array
    VcW: Array
    WV: Array


def _stacked(layer: Layer, change: Layer, row: InPlace | None) -> Stacked:
    (W, b), (V, c) = layer, change
    Wb = np.concatenate([W, b[:, None]], axis=1)
    if row is not None and row.sign < 0:
        np.negative(Wb, Wb)
    return Stacked(Wb, np.concatenate([V, c[:, None], W], axis=1), np.concatenate([W, V]))


class ProductTile:
    """Buffers for a number of rows; lists are by layer, from 0."""

    def __init__(self, spec: Spec, in_place: tuple[bool, ...], rows: int) -> None:
        d_0, *widths = spec.sizes
        d_0 = d_0 if d_0 < VIEW_WIDTH else 0  # a wide X is not copied

        def buffers(heights: list[int]) -> list[Array]:
            return [np.empty((height, rows), spec.dtype) for height in heights]

        self.below = buffers([d_0 + 1, *(2 * d + 1 for d in widths[:-1])])  # [H; 1; dH], [X; 1]
        for B, d in zip(self.below, [d_0, *widths[:-1]], strict=True):
            B[d] = 1
        self.X, self.ones = self.below[0][:-1], self.below[0][-1]
        tops = [*self.below[1:], *buffers([2 * widths[-1] + 1])]
        self.H = [B[:d] for B, d in zip(tops, widths, strict=True)]
        self.dH = [B[d + 1 :] for B, d in zip(tops, widths, strict=True)]
        # Formed in place, H_l lies where Z_l was; the table's f' needs both.
        self.Z = [H if i else np.empty_like(H) for H, i in zip(self.H, in_place, strict=True)]
        self.F, self.dF = buffers(widths), buffers(widths)  # f' and f'' ∘ dZ
        self.deltas = buffers([2 * d for d in widths])  # [dD; D], before that [dG; G]
        self.spare = buffers([max(widths)])[0]


class _Kept(threading.local):
    """The last two tiles of a thread, if small: fresh memory costs as much as the arithmetic."""

    def __init__(self) -> None:
        self.tiles: dict[tuple[object, ...], ProductTile] = {}

    def tile(self, spec: Spec, in_place: tuple[bool, ...], rows: int) -> ProductTile:
        if rows * sum(spec.sizes) * spec.dtype.itemsize > TILE_BYTES:
            return ProductTile(spec, in_place, rows)
        key = (rows, spec.sizes, spec.dtype.char, in_place)
        if key not in self.tiles:
            while len(self.tiles) > 1:
                self.tiles.pop(next(iter(self.tiles)))
            self.tiles[key] = ProductTile(spec, in_place, rows)
        return self.tiles[key]


_kept = _Kept()


def tiled_product_sums(
    spec: Spec,
    kind: Kind,
    params: list[Layer],
    v: list[Layer],
    X: Array,
    y: Array,
    weight: Array | None,
) -> list[Layer]:
    """As that of tangents.py, for any number of rows."""
    rows, with_threads = cut(spec, len(X))
    shares_products = not with_threads and largest_product(spec, rows) > SHARED_PRODUCT
    run = ProductRun(spec, kind, params, v, shared_dot if shares_products else np.dot)
    if rows >= len(X):
        with blas(spec, rows):
            return run(X, y, weight)
    starts = range(0, len(X), rows)
    shares = [starts[i::MAX_SHARES] for i in range(min(MAX_SHARES, len(starts)))]
    totals: list[list[Layer]] = [[] for _ in shares]

    @np.errstate(all="ignore")
    def run_share(share: int, worker: int) -> None:
        for start in shares[share]:
            part = slice(start, start + rows)
            sums = run(X[part], y[part], None if weight is None else weight[part])
            totals[share] = added_layers(totals[share], sums) if totals[share] else sums

    with blas(spec, rows):
        n_workers = threads.thread_count() if with_threads else 1
        threads.run_chunks(run_share, len(shares), n_workers)
    return reduce(added_layers, totals)


def cut(spec: Spec, n: int) -> tuple[int, bool]:
    """Rows per tile, which the shape alone decides; and whether threads share out the tiles."""
    itemsize = np.dtype(spec.dtype).itemsize
    weights = sum((n_in + 1) * n_out for n_in, n_out in pairwise(spec.sizes))
    units = sum(spec.sizes[1:])
    seconds = EFFORT * n * (6 * weights * SECONDS_PER_FLOP + units * SECONDS_PER_ELEMENT)
    # Of wide nets it is better to share out products.
    worth = weights <= WIDE_WEIGHTS and seconds * itemsize / 4 > SHORT_PASS
    n_tiles = -(-7 * units * itemsize * n // (TILE_BYTES if worth else WIDE_TILE_BYTES))
    if worth:
        n_tiles = max(n_tiles, MAX_SHARES)
    n_tiles = max(1, min(n_tiles, n // LEAST_ROWS))
    return -(-n // n_tiles), worth and threads.can_limit_blas()


def largest_product(spec: Spec, rows: int) -> int:
    """Multiply-adds: the rows of [V c W] times the columns of [H; 1; dH]."""
    return rows * max(2 * (a + 1) * b for a, b in pairwise(spec.sizes))


def blas(spec: Spec, rows: int) -> AbstractContextManager[None]:
    """BLAS held at one thread, unless no product is large enough for it to divide."""
    divides = largest_product(spec, rows) > SMALLEST_DIVIDED_PRODUCT
    return threads.blas_on_one_thread() if divides else nullcontext()


class ProductRun:
    """The product for a tile of rows, with the factors of every layer stacked."""

    def __init__(
        self, spec: Spec, kind: Kind, params: list[Layer], v: list[Layer], dot: Dot
    ) -> None:
        self.spec, self.kind, self.dot = spec, kind, dot
        self.in_place = [IN_PLACE.get(row.name) for row in spec.activations]
        self.factors = [_stacked(*layers) for layers in zip(params, v, self.in_place, strict=True)]
        self.formed_in_place = tuple(row is not None for row in self.in_place)
        self.one = np.ones((), spec.dtype)
        self.bends = [  # where f'' counts
            kind.is_hessian and (row.name in CHANGES or row.name not in IN_PLACE)
            for row in spec.activations
        ]

    def __call__(self, X: Array, y: Array, weight: Array | None) -> list[Layer]:
        """The sums over these rows."""
        tile = _kept.tile(self.spec, self.formed_in_place, len(X))
        self._up(tile, X)
        self._at_outputs(tile, y, weight)
        return self._down(tile, X)

    def _up(self, tile: ProductTile, X: Array) -> None:
        """(V1) and (V2), and f'' ∘ dZ."""
        tile.X[...] = X.T[: len(tile.X)]
        for l, (Wb, VcW, _) in enumerate(self.factors):
            Z, H, dH, F, dF = tile.Z[l], tile.H[l], tile.dH[l], tile.F[l], tile.dF[l]
            B, d = tile.below[l], Wb.shape[1] - 1
            if len(B) == 1:  # X is not copied: only the ones are here
                for factor, product in ((Wb, Z), (VcW, dH)):
                    self.dot(factor[:, :d], X.T, product)
                    np.add(product, factor[:, d : d + 1], product)
            else:
                self.dot(Wb, B[: d + 1], Z)
                self.dot(VcW[:, : len(B)], B, dH)
            row, activation = self.in_place[l], self.spec.activations[l]
            if row is None:
                H[...] = activation.f(np, Z)
                F[...] = activation.df(np, Z, H)
                if self.bends[l]:
                    np.multiply(activation.d2f(np, Z, H), dH, dF)
                np.multiply(F, dH, dH)
            else:
                row.f(Z, F, self.one)
                row.times_df(dH, H, F, self.one)  # and f' is left in F
                if self.bends[l]:
                    CHANGES[activation.name](H, dH, dF)

    def _at_outputs(self, tile: ProductTile, y: Array, weight: Array | None) -> None:
        """dG_L and G_L, left in [dD_L; D_L]."""
        loss, H, both = self.spec.loss, tile.H[-1].T, tile.deltas[-1]
        d = len(both) // 2
        both[:d] = self.kind.at_outputs(loss)(np, H, y, tile.dH[-1].T).T
        if self.kind.is_hessian:
            both[d:] = loss.value_and_grad(np, H, y)[1].T
        if weight is not None:
            np.multiply(both, weight, both)

    def _down(self, tile: ProductTile, X: Array) -> list[Layer]:
        """(V3) to (V6)."""
        sums = []
        for l in range(len(self.factors) - 1, -1, -1):
            self._times_df(tile, l)
            both, WV, B = tile.deltas[l], self.factors[l].WV, tile.below[l]
            d_out, d_in = len(both) // 2, WV.shape[1]
            dD, D, W = both[:d_out], both[d_out:], WV[:d_out]
            if len(B) == 1:
                sums.append(Layer(self.dot(dD, X), np.dot(dD, tile.ones)))
                break
            Wb = self.dot(dD, B[: d_in + 1].T)
            if l > 0:
                below = tile.deltas[l - 1]
                # With one output this product is an outer one, at which BLAS is slow.
                multiply = np.multiply if d_out == 1 else self.dot
                if self.kind.is_hessian:
                    Wb[:, :-1] += self.dot(D, B[d_in + 1 :].T)
                    self.dot(WV.T, both, below[:d_in])
                    multiply(W.T, D, below[d_in:])
                else:
                    multiply(W.T, dD, below[:d_in])
            sums.append(Layer(Wb[:, :-1], Wb[:, -1]))
        return sums[::-1]

    def _times_df(self, tile: ProductTile, l: int) -> None:
        """(V3): from [dG; G] to [dD; D]."""
        both, F, spare = tile.deltas[l], tile.F[l], tile.spare[: len(tile.F[l])]
        dD, D = both[: len(F)], both[len(F) :]
        if self.spec.activations[l].name == "identity":
            return
        if self.bends[l]:
            np.multiply(D, tile.dF[l], spare)
        np.multiply(dD, F, dD)
        if self.bends[l]:
            np.add(dD, spare, dD)
        if self.kind.is_hessian and l > 0:
            np.multiply(D, F, D)

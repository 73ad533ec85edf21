"""The NumPy engine: the derivation in tiles of rows, in place, on workspace that is kept.

Inside a tile samples lie along the last axis, so that Z_l and H_l are (d_l, rows): the loops over
activations run along memory, and thin matrix products are fast. Under a narrow H_l stands a row
of ones, which folds the bias into both products:

    Z_l = [W_l b_l] [H_{l-1}; 1]               [dE/dW_l dE/db_l] = D_l [H_{l-1}; 1]ᵀ

A wide X is not copied into the tile: its products take views of it. schedule.py says how a
problem is cut. Tiles are added up in float64, also for float32 data, and rounded once at the end.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec, Sums
from mlp_backprop.engines import threads
from mlp_backprop.engines.schedule import make_schedule
from mlp_backprop.engines.shared_products import shared_dot
from mlp_backprop.types import Array, DType, Layer, Layers, LossAndGrads


class InPlace(NamedTuple):
    """An activation without temporaries: H over Z, and later D times f'(Z) over D.

    `spare` has the shape of Z and is the layer's own: what f leaves there, times_df finds.
    """

    sign: int  # -1: f wants the weights, and so Z, negated
    f: Callable[[Array, Array, Array], None]  # Z, spare, 1
    times_df: Callable[[Array, Array, Array, Array], None]  # D, H, spare, 1


def _sigmoid(Z: Array, spare: Array, one: Array) -> None:
    # Of -Z: 1 / (1 + exp(-z)). The exponential may overflow: 1 / inf is the right zero.
    np.exp(Z, Z)
    np.add(Z, one, Z)
    np.reciprocal(Z, Z)


def _times_sigmoid_df(D: Array, H: Array, spare: Array, one: Array) -> None:
    np.subtract(one, H, spare)
    np.multiply(spare, H, spare)
    np.multiply(D, spare, D)


def _tanh(Z: Array, spare: Array, one: Array) -> None:
    np.tanh(Z, Z)


def _times_tanh_df(D: Array, H: Array, spare: Array, one: Array) -> None:
    np.multiply(H, H, spare)
    np.subtract(one, spare, spare)
    np.multiply(D, spare, D)


def _relu(Z: Array, spare: Array, one: Array) -> None:
    np.maximum(Z, 0, out=Z)


def _times_relu_df(D: Array, H: Array, spare: Array, one: Array) -> None:
    np.greater(H, 0, spare)
    np.multiply(D, spare, D)


def _identity(Z: Array, spare: Array, one: Array) -> None:
    pass


def _times_identity_df(D: Array, H: Array, spare: Array, one: Array) -> None:
    pass


IN_PLACE = {
    "identity": InPlace(1, _identity, _times_identity_df),
    "sigmoid": InPlace(-1, _sigmoid, _times_sigmoid_df),
    "tanh": InPlace(1, _tanh, _times_tanh_df),
    "relu": InPlace(1, _relu, _times_relu_df),
}


class Tile:
    """Buffers for a number of rows, and the sums over them; lists are by layer, from 0.

    Every buffer is contiguous, as the fastest matrix product (A.dot with `out`) demands.
    (np.dot, and np.vdot, take half a microsecond more, to look for other types of arrays.)
    """

    def __init__(self, spec: Spec, in_place: list[bool], rows: int, copies_X: bool) -> None:
        sizes, dtype = spec.sizes, spec.dtype
        n_below = (sizes[0] if copies_X else 0, *sizes[1:-1])
        self.below = [np.empty((size + 1, rows), dtype) for size in n_below]  # [H_{l-1}; 1]
        for below in self.below:
            below[-1] = 1
        self.X = self.below[0][:-1] if copies_X else None
        self.ones = self.below[0][-1]
        self.H = [H[:-1] for H in self.below[1:]] + [np.empty((sizes[-1], rows), dtype)]
        # Formed in place, H_l lies where Z_l was; the table's f' needs both.
        self.Z = [H if i else np.empty_like(H) for H, i in zip(self.H, in_place, strict=True)]
        self.D = [np.empty((size, rows), dtype) for size in sizes[1:]]
        self.spare = [np.empty((size, rows), dtype) for size in sizes[1:]]
        self.sums = Stacks(spec, copies_X, dtype)


class Stacks:
    """Room for [W_l b_l] of every layer, or for their gradients: as products take and give them.

    Where X is not copied, and so has no row of ones, b_1 lies apart.
    """

    def __init__(self, spec: Spec, copies_X: bool, dtype: DType) -> None:
        self.arrays = [np.empty((b, a + 1), dtype) for a, b in pairwise(spec.sizes)]
        self.layers = [Layer(A[:, :-1], A[:, -1]) for A in self.arrays]
        if not copies_X:
            n_in, n_out = spec.sizes[:2]
            self.arrays[0] = np.empty((n_out, n_in), dtype)
            self.layers[0] = Layer(self.arrays[0], np.empty(n_out, dtype))

    def add(self, other: "Stacks") -> None:
        for (W, b), (_, db), A, dA in zip(
            self.layers, other.layers, self.arrays, other.arrays, strict=True
        ):
            np.add(A, dA, A)
            if W is A:
                np.add(b, db, b)

    def clear(self) -> None:
        for W, b in self.layers:
            W.fill(0)
            b.fill(0)


class Factors(NamedTuple):
    """What products take of the parameters of one run; lists are by layer, from 0."""

    packed: list[Array]  # [W_l b_l], negated where the activation wants -Z
    b_1: Array  # where X is not copied, and so W_1 stands alone
    weights: list[Array]


class TiledRun:
    """A plan for up to n rows: the schedule, the packed parameters, a workspace per worker.

    It belongs to one thread at a time. The arrays of its sums are its own, until the next run; of
    the caller's it keeps none.
    """

    def __init__(self, spec: Spec, n: int, in_place: Mapping[str, InPlace] = IN_PLACE) -> None:
        self.spec = spec
        self.schedule = make_schedule(spec, n, np.dtype(spec.dtype).itemsize)
        self.dot = shared_dot if self.schedule.shares_products else np.ndarray.dot
        self.rows = [in_place.get(row.name) for row in spec.activations]
        self.packed = Stacks(spec, self.schedule.copies_X, spec.dtype)
        self.one = np.ones((), spec.dtype)
        self.is_plain_square = spec.loss.name == "squared_error"
        self.tiles: list[dict[int, Tile]] = []
        self.chunk_sums: list[Stacks] = []
        self.chunk_losses: list[float] = []

    def __call__(
        self, params: Layers, X: Array, y: Array, weight: Array | None, out: Layers | None = None
    ) -> LossAndGrads:
        """The contract of choice.py."""
        return backprop.reduced(self.spec, self.sums(params, X, y, weight), out)

    def sums(self, params: Layers, X: Array, y: Array, weight: Array | None) -> Sums:
        """Loss, weights and gradients, summed over the rows of X."""
        n = len(X)
        weight_sum = float(n) if weight is None else float(weight.sum(dtype=np.float64))
        if n == 0:
            zeros = [Layer(np.zeros_like(W), np.zeros_like(b)) for W, b in params]
            return Sums(0.0, weight_sum, zeros)
        factors = self._factors(params)
        run = self._one_tile if n <= self.schedule.tile_rows else self._chunks
        with self._blas():
            loss, sums = run(factors, X, y, weight)
        return Sums(loss, weight_sum, sums.layers)

    def _blas(self) -> AbstractContextManager[None]:
        return threads.blas_on_one_thread() if self.schedule.holds_blas else nullcontext()

    def _factors(self, params: Layers) -> Factors:
        """[W_l b_l] in one array, but for a wide first layer: that is the largest."""
        arrays, layers = [*self.packed.arrays], self.packed.layers
        b_1 = layers[0].b
        for l, ((W, b), own, row) in enumerate(zip(params, layers, self.rows, strict=True)):
            is_negated = row is not None and row.sign < 0
            if own.W is not arrays[l]:
                own.W[...], own.b[...] = W, b
                if is_negated:  # the whole array: by parts of rows that takes three times as long
                    np.negative(arrays[l], arrays[l])
            elif is_negated:
                np.negative(W, own.W)
                np.negative(b, own.b)
            else:
                arrays[0], b_1 = W, b
        return Factors(arrays, b_1, [W for W, _ in params])

    def _one_tile(
        self, factors: Factors, X: Array, y: Array, weight: Array | None
    ) -> tuple[float, Stacks]:
        tile = self._tile_of(0, len(X))
        return self._run_tile(tile, factors, X, y, weight), tile.sums

    def _chunks(
        self, factors: Factors, X: Array, y: Array, weight: Array | None
    ) -> tuple[float, Stacks]:
        """Chunks in any order on any thread, each over its tiles; then added in their order."""
        n, rows, chunk_rows = len(X), self.schedule.tile_rows, self.schedule.chunk_rows
        n_chunks = -(-n // chunk_rows)
        self._make_room(n_chunks)

        @np.errstate(all="ignore")
        def run_chunk(chunk: int, worker: int) -> None:
            sums, loss = self.chunk_sums[chunk], 0.0
            sums.clear()
            first = chunk * chunk_rows
            for start in range(first, min(first + chunk_rows, n), rows):
                cut = slice(start, min(start + rows, n))
                tile = self._tile_of(worker, cut.stop - cut.start)
                tile_weight = None if weight is None else weight[cut]
                loss += self._run_tile(tile, factors, X[cut], y[cut], tile_weight)
                sums.add(tile.sums)
            self.chunk_losses[chunk] = loss

        threads.run_chunks(run_chunk, n_chunks, self._worker_count())
        for sums in self.chunk_sums[1:n_chunks]:
            self.chunk_sums[0].add(sums)
        return sum(self.chunk_losses[:n_chunks]), self.chunk_sums[0]

    def _make_room(self, n_chunks: int) -> None:
        while len(self.chunk_sums) < n_chunks:
            self.chunk_sums.append(Stacks(self.spec, self.schedule.copies_X, np.float64))
            self.chunk_losses.append(0.0)

    def _worker_count(self) -> int:
        if not (self.schedule.tile_threads and threads.can_limit_blas()):
            return 1
        return threads.thread_count()

    def _tile_of(self, worker: int, rows: int) -> Tile:
        """A worker's tile: one of full length is kept, and the last shorter one."""
        while len(self.tiles) <= worker:
            self.tiles.append({})
        tiles = self.tiles[worker]
        if rows not in tiles:
            if len(tiles) > 1:
                tiles.popitem()
            in_place = [row is not None for row in self.rows]
            tiles[rows] = Tile(self.spec, in_place, rows, self.schedule.copies_X)
        return tiles[rows]

    def _run_tile(
        self, tile: Tile, factors: Factors, X: Array, y: Array, weight: Array | None
    ) -> float:
        """The loss of one tile; its gradients are left in tile.sums."""
        self._forward(tile, factors, X)
        loss = self._loss(tile, y, weight)
        sums = tile.sums.arrays
        for l, D in self._backward(tile, factors.weights):
            if l > 0 or tile.X is not None:
                self.dot(D, tile.below[l].T, sums[l])
            else:
                self.dot(D, X, sums[0])
                np.dot(D, tile.ones, tile.sums.layers[0].b)
        return loss

    def _forward(self, tile: Tile, factors: Factors, X: Array) -> None:
        if tile.X is not None:
            tile.X[...] = X.T
        for l, packed in enumerate(factors.packed):
            Z = tile.Z[l]
            if l == 0 and tile.X is None:
                self.dot(packed, X.T, Z)
                np.add(Z, factors.b_1[:, None], Z)
            else:
                self.dot(packed, tile.below[l], Z)
            row = self.rows[l]
            if row is None:
                tile.H[l][...] = self.spec.activations[l].f(np, Z)
            else:
                row.f(Z, tile.spare[l], self.one)

    def _loss(self, tile: Tile, y: Array, weight: Array | None) -> float:
        """The loss, with dE/dH_L left in D_L."""
        H, D = tile.H[-1], tile.D[-1]
        if self.is_plain_square and weight is None:
            np.subtract(H, y.T, D)
            residuals = D.ravel()  # no copy
            loss = float(residuals.dot(residuals))
            np.add(D, D, D)
            return loss
        values, G = self.spec.loss.value_and_grad(np, H.T, y)
        if weight is None:
            D[...] = G.T
        else:
            np.multiply(G.T, weight, D)
            values = values * weight
        return float(values.sum(dtype=np.float64))

    def _backward(self, tile: Tile, weights: list[Array]) -> Iterator[tuple[int, Array]]:
        """Equation (3): l and D_l from the last layer to the first, l counted from 0."""
        for l in range(len(weights) - 1, -1, -1):
            D, row = tile.D[l], self.rows[l]
            if row is None:
                np.multiply(D, self.spec.activations[l].df(np, tile.Z[l], tile.H[l]), D)
            else:
                row.times_df(D, tile.H[l], tile.spare[l], self.one)
            yield l, D
            if l > 0:
                # With one output this product is an outer one, at which BLAS is slow.
                multiply = np.multiply if len(D) == 1 else self.dot
                multiply(weights[l].T, D, tile.D[l - 1])

    def for_each_sweep(
        self,
        params: Layers,
        X: Array,
        y: Array,
        weight: Array | None,
        use: Callable[[float, Iterator[tuple[Array, Array]]], None],
    ) -> None:
        """Tile by tile use(loss, factors): D_l, H_{l-1} from the last layer to the first.

        They are (rows, width), views of a workspace that the next tile writes to.
        """
        factors = self._factors(params)
        n, rows = len(X), self.schedule.tile_rows
        with self._blas():
            for start in range(0, max(1, n), rows):
                cut = slice(start, min(start + rows, n))
                tile = self._tile_of(0, cut.stop - cut.start)
                self._forward(tile, factors, X[cut])
                loss = self._loss(tile, y[cut], None if weight is None else weight[cut])
                below = [X[cut] if tile.X is None else tile.X.T, *(H.T for H in tile.H)]
                use(loss, ((D.T, below[l]) for l, D in self._backward(tile, factors.weights)))


def prepare(spec: Spec, n: int) -> TiledRun:
    """A tiled pass for up to n rows."""
    return TiledRun(spec, n)

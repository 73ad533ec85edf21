"""The compiled engine for NumPy arrays: compiled/kernels.py, cut into work for threads.

A narrow net is one compiled pass. The rows are cut into chunks by their number and the net alone,
every chunk has its own sums, and these are added up in the order of the chunks: the number of
threads changes no bit of the result.

A wide net is numpy_tiles.py with its activations compiled: products are BLAS's, and every layer
has one loop from Z to H and f'(Z) in place of several.
"""

import math
import zlib
from collections.abc import Callable
from functools import cache, lru_cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numba import from_dtype, njit, types

from mlp_backprop.backprop import Spec, Sums, divisor, written
from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_target_values
from mlp_backprop.engines import numpy_tiles, threads
from mlp_backprop.engines.compiled import formulas, kernels
from mlp_backprop.types import Array, Layer, LossAndGrads, flat

# Beyond this width the products are better left to BLAS: the net is wide.
WIDEST = 64

# The cost model, in operations: one product, or a tenth of an activation. A core does 10 to 20 of
# them in a nanosecond, and waking a thread takes up to 300 us: so one thread and a single chunk up
# to about two milliseconds of work, then chunks of at least 100 us, which take 5 us to hand out.
ACTIVATION_OPERATIONS = 10
THREAD_OPERATIONS = 40_000_000
CHUNK_OPERATIONS = 2_000_000
MOST_CHUNKS = 64

NO_CLASSES = np.empty(0, np.int64)


def prepare(spec: Spec, n: int) -> "NarrowRun | numpy_tiles.TiledRun | None":
    """Keep what is compiled, parameters and tiles at hand; None for half precision."""
    dtype = np.dtype(spec.dtype)
    if dtype not in (np.float32, np.float64):
        return None
    if max(spec.sizes) > WIDEST:
        return numpy_tiles.TiledRun(spec, n, compiled_in_place(dtype))
    return NarrowRun(spec, dtype)


class UnknownClassError(Exception):
    """A label that is no class."""


class NarrowRun:
    """The compiled pass, with its workspace: for one thread at a time."""

    checks_labels = True

    def __init__(self, spec: Spec, dtype: np.dtype[Any]) -> None:
        self.kernel = compiled_pass(dtype)
        names = [row.name for row in spec.activations]
        self.layers, n_rows = kernels.layout(spec.sizes, names)
        self.loss = kernels.LOSSES.index(spec.loss.name)
        self.spec = spec
        self.tiles = [np.empty(n_rows * kernels.STRIDE, dtype)]  # one per thread
        self.no_targets, self.no_weight = np.empty((0, 0), dtype), np.empty(0, dtype)
        self.sizes = spec.sizes
        self.params = np.empty(record(spec.sizes, dtype).itemsize // dtype.itemsize, dtype)
        self.params_by_layer = by_layer(self.params, spec.sizes)
        self.operations = 3 * len(self.params) + ACTIVATION_OPERATIONS * sum(spec.sizes[1:])

    def __call__(
        self,
        params: list[Layer],
        X: Array,
        y: Array,
        weight: Array | None,
        out: list[Layer] | None = None,
    ) -> LossAndGrads:
        """The contract of choice.py; gradients are views of one array, which one step divides."""
        self.pack(params)
        results = self.divided(self.flat_sums(X, y, weight))
        grads = by_layer(results, self.sizes)
        return LossAndGrads(results[-2], grads if out is None else written(grads, out))

    def bound(
        self,
        params: list[Layer],
        X: Array,
        y: Array,
        weight: Array | None,
        constant_X: bool,
    ) -> Callable[[], LossAndGrads]:
        """The pass over these arrays, into the same ones every time; X is read as it lies."""
        copies = list(zip(flat(self.params_by_layer), flat(params), strict=True))
        results = np.empty(len(self.params) + 2, self.params.dtype)
        grads = by_layer(results, self.sizes)

        def call() -> LossAndGrads:
            for own, given in copies:
                own[...] = given
            self.divided(self.flat_sums(X, y, weight), results)
            return LossAndGrads(results[-2], grads)

        return call

    def sums(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Sums:
        """Loss, weights and gradients in float64, summed over the rows of X."""
        self.pack(params)
        flat_sums = self.flat_sums(X, y, weight)
        return Sums(flat_sums[-2], flat_sums[-1], by_layer(flat_sums, self.sizes))

    def pack(self, params: list[Layer]) -> None:
        for (W, b), own in zip(params, self.params_by_layer, strict=True):
            own.W[...], own.b[...] = W, b

    def divided(self, sums: Array, out: Array | None = None) -> Array:
        """What flat_sums gives, as results in the net's dtype."""
        if out is None:
            out = np.empty(len(sums), self.params.dtype)
        return np.divide(sums, divisor(self.spec, sums[-1]), out, casting="same_kind")

    def flat_sums(self, X: Array, y: Array, weight: Array | None) -> Array:
        """With the parameters that are at hand: gradients as `record` has them, loss, weight."""
        if weight is None:
            weight = self.no_weight
        n_chunks, n_rows = self.chunks(len(X))
        try:
            if n_chunks > 1:
                return self.sum_chunks(X, y, weight, n_chunks, n_rows)
            sums = np.empty(len(self.params) + 2)
            self.sum_rows(X, y, weight, self.tiles[0], sums)
            return sums
        except UnknownClassError:
            check_target_values(Argument("y", y, np), self.spec.loss, self.sizes[-1])
            raise

    def chunks(self, n: int) -> tuple[int, int]:
        """How many chunks n rows make, and of how many rows: whole tiles."""
        operations = n * self.operations
        if operations < THREAD_OPERATIONS:
            return 1, n
        n_chunks = min(MOST_CHUNKS, operations // CHUNK_OPERATIONS)
        n_rows = math.ceil(n / (n_chunks * kernels.TILE)) * kernels.TILE
        return math.ceil(n / n_rows), n_rows

    def sum_chunks(self, X: Array, y: Array, weight: Array, n_chunks: int, n_rows: int) -> Array:
        """Share the chunks out to threads, and add up their sums in order."""
        sums = np.empty((n_chunks, len(self.params) + 2))
        n_workers = min(threads.thread_count(), n_chunks)
        while len(self.tiles) < n_workers:
            self.tiles.append(np.empty_like(self.tiles[0]))

        def task(chunk: int, worker: int) -> None:
            rows = slice(chunk * n_rows, (chunk + 1) * n_rows)
            self.sum_rows(X[rows], y[rows], weight[rows], self.tiles[worker], sums[chunk])

        threads.run_chunks(task, n_chunks, n_workers)
        return sums.sum(axis=0)

    def sum_rows(self, X: Array, y: Array, weight: Array, tile: Array, sums: Array) -> None:
        """One chunk on one thread, into `sums`; the interpreter lock is released meanwhile."""
        if y.ndim == 1:
            Y, classes = self.no_targets, y.astype(np.int64, copy=False)
        else:
            Y, classes = y, NO_CLASSES
        known = self.kernel(X, Y, classes, weight, self.layers, self.loss, self.params, tile, sums)
        if not known:
            raise UnknownClassError


def by_layer(flat: Array, sizes: tuple[int, ...]) -> list[Layer]:
    """Views of an array that begins with a record: fields are the quickest views to make."""
    fields = record(sizes, flat.dtype)
    views, names = np.ndarray((), fields, flat), iter(fields.names or ())
    return [Layer(views[W], views[b]) for W, b in zip(names, names, strict=True)]


@lru_cache(maxsize=128)  # a search over widths would fill a cache without a bound
def record(sizes: tuple[int, ...], dtype: np.dtype[Any]) -> np.dtype[Any]:
    """W_1, b_1, W_2, ... one after the other, as the fields of a structured dtype."""
    fields: list[Any] = []
    for l, (n_in, n_out) in enumerate(pairwise(sizes), 1):
        fields += [(f"W{l}", dtype, (n_out, n_in)), (f"b{l}", dtype, (n_out,))]
    return np.dtype(fields)


# Wide nets ---------------------------------------------------------------------------------------


@cache
def compiled_in_place(dtype: np.dtype[Any]) -> dict[str, numpy_tiles.InPlace]:
    """The table of activations, compiled: f leaves the slopes f'(Z) in `spare`."""
    activate = compiled_activations(dtype)

    def row(k: int) -> numpy_tiles.InPlace:
        def f(Z: Array, spare: Array, one: Array) -> None:
            activate(k, Z, spare)

        return numpy_tiles.InPlace(1, f, times_slope)

    table = {name: row(k) for k, name in enumerate(kernels.ACTIVATIONS)}
    return table | {"identity": numpy_tiles.IN_PLACE["identity"]}  # which does nothing, sooner


def times_slope(D: Array, H: Array, spare: Array, one: Array) -> None:
    np.multiply(D, spare, D)  # one loop already


# Compilation -------------------------------------------------------------------------------------


@cache
def compiled_pass(dtype: np.dtype[Any]) -> Any:
    """The pass over narrow nets, for one dtype and any strides."""
    sources = version_of_sources()

    def loss_and_grad_sums(  # type: ignore[no-untyped-def]  # Numba has its types from `signature`
        X, Y, classes, weight, layers, loss, params, tile, sums
    ):
        _ = sources  # now a part of the key in the cache, which by itself looks at this file alone
        return kernels.loss_and_grad_sums(X, Y, classes, weight, layers, loss, params, tile, sums)

    return compiled(loss_and_grad_sums, signature(dtype))


@cache
def compiled_activations(dtype: np.dtype[Any]) -> Any:
    """H over Z, and the slopes f'(Z), for row k of the table of activations and one dtype."""
    sources = version_of_sources()

    def activate(k, Z, slope):  # type: ignore[no-untyped-def]
        _ = sources  # as above
        kernels.activate(k, Z.ravel(), 0, slope.ravel(), 0, 1, Z.size)

    matrix = types.Array(from_dtype(dtype), 2, "C")
    return compiled(activate, types.void(types.int64, matrix, matrix))


def compiled(function: Callable[..., Any], signature: Any) -> Any:
    """A function from Numba's cache, or compiled now: seconds."""
    compile_ = partial(njit, signature, nogil=True, **formulas.OPTIONS)
    try:
        return compile_(cache=True)(function)
    except RuntimeError:  # Numba finds no directory that it may write to
        return compile_()(function)


def version_of_sources() -> int:
    """A checksum of the files that are compiled."""
    files = (formulas.__file__, kernels.__file__)
    return zlib.crc32(b"".join(Path(file).read_bytes() for file in files))


def signature(dtype: np.dtype[Any]) -> Any:
    """That of kernels.loss_and_grad_sums."""
    real = from_dtype(dtype)

    def data(element: Any, ndim: int) -> Any:
        return types.Array(element, ndim, "A", readonly=True)

    own = types.Array(real, 1, "C")
    return types.boolean(
        data(real, 2),
        data(real, 2),
        data(types.int64, 1),
        data(real, 1),
        types.Array(types.int64, 2, "C"),
        types.int64,
        own,
        own,
        types.Array(types.float64, 1, "C"),
    )

"""The compiled engine for NumPy arrays: kernels.py, cut into work for threads.

A net up to 256 wide is one compiled pass. The rows are cut into chunks by their number and the net
alone, every chunk has its own sums, and these are added up in the order of the chunks: the number
of threads changes no bit of the result.

A wider net is numpy_tiles.py with its activations compiled: products are BLAS's, and every layer
has one loop from Z to H and f'(Z) in place of several.
"""

from collections.abc import Callable
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec, Sums, written
from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_target_values
from mlp_backprop.engines import numpy_tiles, threads
from mlp_backprop.engines.compiled import kernels, parts, team
from mlp_backprop.engines.compiled.jobs import Job, as_compiled, job_of, labels_of
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.engines.compiled.rows import ACTIVATIONS
from mlp_backprop.engines.compiled.schedule import chunks, operations
from mlp_backprop.types import Array, Layer, LossAndGrads, flat, n_params

# Beyond these widths, of inputs and of layers, products are better left to BLAS: the net is wide.
WIDEST_INPUT, WIDEST = 1024, 256


def prepare(spec: Spec, n: int) -> "NarrowRun | numpy_tiles.TiledRun | None":
    """Keep what is compiled, parameters and tiles at hand; None for half precision."""
    dtype = np.dtype(spec.dtype)
    if dtype not in (np.float32, np.float64):
        return None
    if not covers(spec):
        return numpy_tiles.TiledRun(spec, n, compiled_in_place(dtype))
    return NarrowRun(spec, n)


def covers(spec: Spec) -> bool:
    """Whether a compiled pass is for this net: of NumPy's arrays, in single or double precision."""
    narrow = spec.sizes[0] <= WIDEST_INPUT and max(spec.sizes[1:]) <= WIDEST
    return narrow and spec.xp is np and np.dtype(spec.dtype) in (np.float32, np.float64)


class NarrowRun:
    """The compiled pass, with its workspace: for one thread at a time."""

    checks_labels = True

    def __init__(self, spec: Spec, n: int) -> None:
        self.spec, self.sizes, self.dtype = spec, spec.sizes, np.dtype(spec.dtype)
        self.add_rows = parts.entry(kernels.over_tiles, kernels.CHUNK, self.dtype)
        self.add_chunks = parts.entry(kernels.results_pass, kernels.WHOLE, self.dtype)
        self.find_arrays = parts.entry(kernels.find_arrays, kernels.WHOLE)
        self.place = parts.entry(kernels.place, kernels.placing(self.dtype))
        self.params = np.empty(n_params(spec.sizes), self.dtype)
        self.params_by_layer = by_layer(self.params, spec.sizes)
        self.operations = operations(spec.sizes, products=3)
        self.layout = layout(spec.sizes, n, self.dtype)
        self.no_targets, self.no_weight = np.empty((0, 0), self.dtype), np.empty(0, self.dtype)
        n_chunks, _ = self.chunks(n)
        n_workers = min(threads.thread_count(), n_chunks)
        self.workspaces = np.empty((n_workers, self.layout.size), self.dtype)
        self.sums_of_chunks = np.empty((n_chunks, len(self.params) + 2))
        self.job = self.job_for(self.params_by_layer)

    def __call__(
        self,
        params: list[Layer],
        X: Array,
        y: Array,
        weight: Array | None,
        out: list[Layer] | None = None,
    ) -> LossAndGrads:
        """The contract of choice.py; gradients are views of one array."""
        for (W, b), own in zip(params, self.params_by_layer, strict=True):
            own.W[...], own.b[...] = W, b
        labels, results = labels_of(y), np.empty(len(self.params) + 2, self.dtype)
        n_chunks = self.tell(self.job, X, y, labels, weight, results)
        self.run(self.job, n_chunks, y)
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
        """The pass over these arrays, read as they lie, into the same ones every time."""
        own = [Layer(as_compiled(W), as_compiled(b)) for W, b in params]
        labels = labels_of(y)
        copies = [*zip(flat(own), flat(params), strict=True), (labels, y)]
        copies = [(A, given) for A, given in copies if A is not given and len(A)]
        job, results = self.job_for(own), np.empty(len(self.params) + 2, self.dtype)
        n_chunks = self.tell(job, X, y, labels, weight, results)
        data = {"X": X, "labels" if y.ndim == 1 else "y": labels if y.ndim == 1 else y}
        job.follow(own, **data, **({} if weight is None else {"weight": weight}))
        grads = by_layer(results, self.sizes)

        def call() -> LossAndGrads:
            for A, given in copies:
                A[...] = given
            self.find_arrays(job.address)
            self.run(job, n_chunks, y)
            return LossAndGrads(results[-2], grads)

        return call

    def sums(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Sums:
        """Loss, weights and gradients in float64, summed over the rows of X."""
        self(params, X, y, weight)
        sums = self.sums_of_chunks[0].copy()
        return Sums(sums[-2], sums[-1], by_layer(sums, self.sizes))

    def job_for(self, params: list[Layer]) -> Job:
        """What a pass with these parameters is told before data comes."""
        return job_of(
            self.spec,
            params,
            self.layout,
            tile=kernels.tile_address(self.dtype, kernels.add_tile),
            workspaces=self.workspaces,
            sums=self.sums_of_chunks,
        )

    def tell(
        self, job: Job, X: Array, y: Array, labels: Array, weight: Array | None, results: Array
    ) -> int:
        """Where the data is, and where the results go; how many chunks there are."""
        targets = self.no_targets if y.ndim == 1 else y
        weights = self.no_weight if weight is None else weight
        n_chunks, chunk_rows = self.chunks(len(X))
        self.place(job.address, n_chunks, chunk_rows, X, targets, labels, weights, results)
        return n_chunks

    def chunks(self, n: int) -> tuple[int, int]:
        """How many chunks n rows make, and of how many rows."""
        return chunks(n, self.layout.tile_rows, self.operations, len(self.params))

    def run(self, job: Job, n_chunks: int, y: Array) -> None:
        """The pass into the results; the interpreter lock is released meanwhile."""
        if n_chunks == 1:
            known = self.add_rows(job.address, 0, 0)
        else:
            n_workers = min(threads.thread_count(), len(self.workspaces))
            team.run(self.work(), job.address, n_chunks, n_workers)
            self.add_chunks(job.address)
            known = not job.record["unknown"][0]
        if not known:
            job.set(unknown=0)
            check_target_values(Argument("y", y, np), self.spec.loss, self.sizes[-1])

    def work(self) -> int:
        """The pass over a chunk, by its address."""
        return parts.work(kernels.over_tiles, kernels.CHUNK, self.dtype)


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
    activate = parts.entry(kernels.activate, kernels.activating(dtype))

    def row(name: str) -> numpy_tiles.InPlace:
        part = parts.address(dtype, "activation", ACTIVATIONS.index(name))

        def f(Z: Array, spare: Array, one: Array) -> None:
            activate(part, Z, spare)

        return numpy_tiles.InPlace(1, f, times_slope)

    table = {name: row(name) for name in ACTIVATIONS}
    return table | {"identity": numpy_tiles.IN_PLACE["identity"]}  # which does nothing, sooner


def times_slope(D: Array, H: Array, spare: Array, one: Array) -> None:
    np.multiply(D, spare, D)  # one loop already

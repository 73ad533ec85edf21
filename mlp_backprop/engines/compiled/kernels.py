"""The frame of all compiled passes, over the tiles of a chunk of rows, and the gradient's in it.

And what else Python calls.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import from_dtype, types
from numba.extending import overload

from mlp_backprop.engines.compiled import parts
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import job_at, layers_of
from mlp_backprop.engines.compiled.rows import at, fill, row_sum
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    ZERO,
    deltas,
    extent,
    forward,
    grads_below,
    load,
    load_labels,
    output_grads,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.types import DType

CHUNK = types.boolean(types.intp, types.intp, types.intp)  # address of a job, chunk, worker
WHOLE = types.void(types.intp)  # address of a job
TILE = types.void(*[types.intp] * 5)  # address of a job, workspace, start, n, sums


# The frame of every pass -------------------------------------------------------------------------

TILES: dict[str, Any] = {}  # by name: tile(job, layers, A, start, n, sums)


def of_tiles(tile: Callable[..., None]) -> Any:
    """Compile what a pass does with n rows from `start` on, to be called by `over_tiles`."""
    TILES[tile.__name__] = function = compiled(tile)
    return function


def over_tiles(sources: int, real: DType) -> Callable[[int, int, int], int]:
    """Fill the sums of a chunk, tile by tile, and the results if it is the only one.

    Returns whether all labels are classes.
    """

    def over_tiles(address, chunk, worker):
        _ = sources
        job = job_at(address)
        workspace = job.workspaces + worker * job.workspace_bytes
        first = job.sums + 8 * chunk * job.n_sums
        sums = pointer(np.float64, first)
        fill(sums, 0.0, ONE, job.n_sums, job.n_sums)
        begin = chunk * job.chunk_rows
        end = min(begin + job.chunk_rows, job.n)
        for start in range(begin, end, job.tile_rows):
            n = min(job.tile_rows, end - start)
            call(job.tile, (address, workspace, start, n, first))
        if job.results and job.n_chunks == 1:
            write_results(job, sums, pointer(real, job.results))
        return job.unknown == 0

    return over_tiles


def tile_address(dtype: DType, tile: Any) -> int:
    """What of a pass is its own, as a part: compiled once, whatever calls it."""
    return parts.work(_tile, TILE, np.dtype(dtype), tile.__name__)


def _tile(sources: int, real: DType, name: str) -> Callable[..., None]:
    def tile(address, workspace, start, n, sums):
        _ = sources
        job, A = job_at(address), pointer(real, workspace)
        tile_of(name, job, layers_of(job), A, start, n, pointer(np.float64, sums))

    return tile


def tile_of(name, job, layers, A, start, n, sums):
    """That of TILES, for a name known when compiled."""


@overload(tile_of, prefer_literal=True)
def _tile_of(name, job, layers, A, start, n, sums):
    tile = TILES[name.literal_value]
    return lambda name, job, layers, A, start, n, sums: tile(job, layers, A, start, n, sums)


# The gradient ------------------------------------------------------------------------------------


@of_tiles
def add_tile(job, layers, A, start, n, sums):
    """Add the sums over n rows from `start` on."""
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    add_losses(job, layers, A, stride, m, sums)
    for l in range(len(layers) - 1, -1, -1):
        deltas(job, layers[l], A, stride, n, m)
        weight_grads(job, layers[l], A, stride, n, m, sums)
        if l > 0:
            grads_below(job, layers[l], A, stride, m)


@compiled
def add_losses(job, layers, A, stride, m, sums):
    """G_L; losses and weights, added to the last two sums."""
    sums[job.n_sums - 2] += output_grads(job, layers, A, stride, m)
    sums[job.n_sums - 1] += row_sum(shifted(A, job.weights * stride), m)


@compiled
def load_inputs(job, layers, A, stride, start, n, m):
    """H_0."""
    address = job.X + start * job.X_row
    load(A, stride, m, address, job.X_row, job.X_column, n, layers[0, 1])


@compiled
def load_rows(job, layers, A, stride, start, n, m):
    """Inputs, targets if there are, and weights of a tile; False where a label is no class."""
    n_out, known = layers[-1, 2], True
    load_inputs(job, layers, A, stride, start, n, m)
    Y, weights = shifted(A, job.Y * stride), shifted(A, job.weights * stride)
    if job.labels:
        labels = pointer(np.int64, job.labels + start * job.label_step)
        known = load_labels(Y, stride, m, labels, job.label_step // 8, n, n_out)
        if not known:
            job.unknown = 1
    elif job.y:
        load(Y, stride, m, job.y + start * job.y_row, job.y_row, job.y_column, n, n_out)
    if job.weight:
        address = job.weight + start * job.weight_step
        load(weights, stride, m, address, job.weight_step, ZERO, n, ONE)
    else:
        fill(weights, type(A[0])(1), ONE, n, n)
        fill(shifted(weights, n), type(A[0])(0), ONE, m - n, m - n)
    return known


@compiled
def write_results(job, sums, results):
    """What the caller asked for: the sums, or means."""
    scale = 1 / sums[job.n_sums - 1] if job.is_mean else 1.0
    for p in range(at(job.n_sums)):
        results[p] = sums[p] * scale


def results_pass(sources: int, real: DType) -> Callable[[int], None]:
    """The sums of all chunks, added up in their order, and the results."""

    def results_pass(address):
        _ = sources
        job = job_at(address)
        sums = pointer(np.float64, job.sums)
        for chunk in range(1, job.n_chunks):
            more = shifted(sums, chunk * job.n_sums)
            for p in range(at(job.n_sums)):
                sums[p] += more[p]
        write_results(job, sums, pointer(real, job.results))

    return results_pass


@cache
def placing(dtype: DType) -> Any:
    """The signature of `place`, for arrays of any strides."""
    real, n = from_dtype(dtype), types.intp

    def data(element: Any, ndim: int) -> Any:
        return types.Array(element, ndim, "A", readonly=True)

    arrays = data(real, 2), data(real, 2), data(types.int64, 1), data(real, 1)
    return types.void(n, n, n, *arrays, types.Array(real, 1, "C"))


def place(sources: int) -> Callable[..., None]:
    """Tell a job where the data is, and how it is cut."""

    def place(address, n_chunks, chunk_rows, X, Y, labels, weight, results):
        _ = sources
        job = job_at(address)
        job.n, job.n_chunks, job.chunk_rows, job.unknown = len(X), n_chunks, chunk_rows, 0
        job.X, job.X_row, job.X_column = X.ctypes.data, X.strides[0], X.strides[1]
        job.y = Y.ctypes.data if Y.size else 0
        job.y_row, job.y_column = Y.strides[0], Y.strides[1]
        job.labels = labels.ctypes.data if len(labels) else 0
        job.weight = weight.ctypes.data if len(weight) else 0
        job.label_step, job.weight_step = labels.strides[0], weight.strides[0]
        job.results = results.ctypes.data if results.size else 0
        find(job)

    return place


def find_arrays(sources: int) -> Callable[..., None]:
    """Write down anew where the arrays of `places` lie."""

    def find_arrays(address):
        _ = sources
        find(job_at(address))

    return find_arrays


@compiled
def find(job):
    places = pointer(np.int64, job.places)
    for k in range(job.n_places):
        data = pointer(np.int64, places[2 * k])[0]
        pointer(np.int64, places[2 * k + 1])[0] = data


def activating(dtype: DType) -> Any:
    """The signature of `activate`."""
    matrix = types.Array(from_dtype(dtype), 2, "C")
    return types.void(types.intp, matrix, matrix)


def activate(sources: int) -> Callable[..., None]:
    """Call a part that is a row of the table of activations: H over Z, and f'(Z)."""

    def activate(part, Z, F):
        _ = sources
        H, slopes = pointer(Z, Z.ctypes.data), pointer(Z, F.ctypes.data)
        call(part, (H, slopes, 1, Z.size, Z.size))

    return activate

"""The parts of a step of training: sums over rows, the gradient of them, the update."""

from collections.abc import Callable
from math import inf

import numpy as np
from numba import njit, types

from mlp_backprop.engines.compiled.first_order import add_layers, clip_factors, squared_norms
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import job_at
from mlp_backprop.engines.compiled.layout import stride_for, whole_vectors
from mlp_backprop.engines.compiled.records import (
    CHUNK,
    DATA_BYTES,
    EMA,
    REDUCE,
    UPDATE,
    data_at,
    floats,
    frame_at,
    integers,
    layers_at,
    run_at,
    squares_of,
)
from mlp_backprop.engines.compiled.rows import at, fill, multiply_by_row, row_sum
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    ZERO,
    backward,
    forward,
    gather,
    gather_labels,
    output_grads,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import call, lanes, pointer, shifted
from mlp_backprop.maths.runs import EMA_DECAY
from mlp_backprop.types import DType

PART = types.void(*[types.int64] * 4)  # addresses of a RUN and a FRAME, part, worker

# As rows.summing, and into float64 from anything.
summing = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


# Rows into a tile --------------------------------------------------------------------------------


@compiled
def load_rows(job, data, layers, A, stride, rows, n, m):
    """Inputs, targets and weights of the n rows of these numbers."""
    n_in, n_out = layers[0, 1], layers[-1, 2]
    gather(A, stride, m, data.X, data.X_row, data.X_column, rows, n, n_in)
    Y, weights = shifted(A, job.Y * stride), shifted(A, job.weights * stride)
    if data.labels:
        gather_labels(Y, stride, m, integers(data.labels), data.label_step // 8, rows, n, n_out)
    else:
        gather(Y, stride, m, data.y, data.y_row, data.y_column, rows, n, n_out)
    if data.weight:
        gather(weights, stride, m, data.weight, data.weight_step, ZERO, rows, n, ONE)
    else:
        fill(weights, type(A[0])(1), ONE, n, n)
        fill(shifted(weights, n), type(A[0])(0), ONE, m - n, m - n)


# Parts -------------------------------------------------------------------------------------------


def part_pass(sources: int, real: DType) -> Callable[[int, int, int, int], None]:
    """A part of the work that a frame tells of."""

    def part_pass(run_address, frame_address, part, worker):
        _ = sources
        run, frame = run_at(run_address), frame_at(frame_address)
        job = job_at(run.job)
        A = pointer(real, job.workspaces + worker * job.workspace_bytes)
        if frame.kind == REDUCE:
            reduce(run, frame, A, part)
        elif frame.kind == UPDATE:
            update(run, frame, A, part)
        else:
            add_rows(run, frame, A, part)

    return part_pass


@compiled
def add_rows(run, frame, A, part):
    """The sums of a chunk: of the gradients, as the parameters lie, then of losses and weights.

    Of validation rows of the last two alone.
    """
    job, is_batch = job_at(run.job), frame.kind == CHUNK
    tables, n_sums = (run.data, job.n_sums) if is_batch else (run.validation, 2)
    data, layers = data_at(tables + frame.member * DATA_BYTES), layers_at(run, frame.layers)
    sums = shifted(floats(frame.sums), part * n_sums)
    sums[n_sums - 2] = sums[n_sums - 1] = 0.0
    begin = part * frame.chunk_rows
    end = min(begin + frame.chunk_rows, frame.n)
    for start in range(begin, end, job.tile_rows):
        n = min(job.tile_rows, end - start)
        m = whole_vectors(n, lanes(A))
        stride = stride_for(m, lanes(A))
        load_rows(job, data, layers, A, stride, shifted(integers(frame.rows), start), n, m)
        forward(job, layers, A, stride, m)
        sums[n_sums - 2] += output_grads(job, layers, A, stride, m)
        sums[n_sums - 1] += row_sum(shifted(A, job.weights * stride), m)
        if is_batch:
            backward(job, layers, A, stride, n, m)
            if run.max_sample_norm < inf:
                clip_samples(run, job, layers, A, stride, m)
            for l in range(len(layers)):
                weight_grads(job, layers[l], A, stride, n, m, sums, start == begin)


@compiled
def clip_samples(run, job, layers, A, stride, m):
    """Equations (P2) to (P4) of maths/samples.py: every D_l times the factor of its row."""
    c = squared_norms(job, layers, A, stride, m)
    add_layers(c, len(layers), stride, m)
    clip_factors(c, type(A[0])(run.max_sample_norm), m)
    for l in range(len(layers)):
        multiply_by_row(shifted(A, layers[l, 4] * stride), c, layers[l, 2], stride, m)


@compiled
def range_of(run, part):
    begin = part * run.range_size
    return begin, min(begin + run.range_size, run.n_params)


@compiled
def reduce(run, frame, A, part):
    """The sums of all chunks, in their order; g; and the squares of g, behind g."""
    begin, end = range_of(run, part)
    n_sums = run.n_params + 2
    sums = shifted(floats(frame.sums), begin)
    for chunk in range(1, frame.n_chunks):
        more = shifted(sums, chunk * n_sums)
        for p in range(at(end - begin)):
            sums[p] += more[p]
    g = shifted(pointer(A, frame.g), begin)
    squares = divided(g, sums, frame.factor, end - begin)
    floats(squares_of(run, frame, A))[part] = squares


@summing
def divided(g, sums, factor, n):
    total = 0.0
    for p in range(at(n)):
        g[p] = type(g[0])(sums[p] * factor)
        total += np.float64(g[p]) * np.float64(g[p])
    return total


@compiled
def update(run, frame, A, part):
    """The step of the optimizer, and of the average of all steps."""
    begin, end = range_of(run, part)
    n, first = end - begin, frame.member * run.n_params + begin
    p, g = shifted(pointer(A, run.vector), first), shifted(pointer(A, frame.g), begin)
    if frame.clip < 1:
        clip = type(A[0])(frame.clip)
        for i in range(at(n)):
            g[i] *= clip
    s = shifted(pointer(A, run.slots), first)
    u = shifted(s, run.n_members * run.n_params)
    scale = shifted(pointer(A, run.scale), begin)
    call(run.update, (p, g, s, u, scale, run.options, frame.rate, frame.t, n))
    if run.kind_of_average == EMA:
        keep = min(EMA_DECAY, (1 + frame.t) / (10 + frame.t))
        share = type(A[0])(1 - keep)
        towards(shifted(pointer(A, run.average), first), p, share, n)


@compiled
def towards(average, p, share, n):
    for i in range(at(n)):
        average[i] += share * (p[i] - average[i])

"""Gradients of each output by the parameters, compiled: Jacobian and tangent kernel, (V9).

For one output after the other the deltas D_l, begun with G_L = e_a, lie from `job.more` on, a row
for each unit: the slopes in the rows of D_l serve the next output too.
"""

from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.first_order import grads_of_rows, outer_products
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.kernels import load_inputs, of_tiles
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import ITSELF, NOTHING
from mlp_backprop.engines.compiled.rows import add, copy, fill, multiply
from mlp_backprop.engines.compiled.tiles import ONE, down, extent, forward, more_of, n_units, store
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.types import Array, Layer, Layers, n_params

STRIP = np.int64(24)  # rows of X1 whose inner products with a tile stay in cache


def jacobian(spec: Spec, params: Layers, X: Array) -> list[Layer]:
    """W (n, d_L, d_l, d_{l-1}) and b (n, d_L, d_l) of each layer."""
    n_out = spec.sizes[-1]
    slopes, places = grads_of_rows((len(X), n_out), spec)
    more: dict[str, Any] = {"products": 1 + 2 * n_out, "more_rows": sum(spec.sizes[1:])}
    run(params_jacobian_tile, spec, params, X, **more, out=places)
    return slopes


@of_tiles
def params_jacobian_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    out, n_outputs = pointer(np.int64, job.out), layers[-1, 2]
    for a in range(n_outputs):
        deltas_of_output(job, layers, a, A, stride, m)
        i = start * n_outputs + a
        for l in range(len(layers)):
            n_in, n_out = layers[l, 1], layers[l, 2]
            W = shifted(pointer(A, out[2 * l]), i * n_out * n_in)
            b = shifted(pointer(A, out[2 * l + 1]), i * n_out)
            D = shifted(A, more_of(job, layers, l) * stride)
            outer_products(job, layers[l], D, A, stride, n, m, W, b, n_outputs)


@compiled
def deltas_of_output(job, layers, a, A, stride, m):
    """Every D_l[a], begun with G_L = e_a."""
    G = shifted(A, job.G * stride)
    for l in range(len(layers) - 1, -1, -1):
        _, n_in, n_out, _, d, _, W, _ = layers[l]
        D = shifted(A, more_of(job, layers, l) * stride)
        if l == len(layers) - 1:
            fill(G, type(A[0])(0), n_out, stride, m)
            fill(shifted(G, a * stride), type(A[0])(1), ONE, stride, m)
        copy(D, shifted(A, d * stride), n_out, stride, m)
        multiply(D, G, n_out, stride, m)
        if l > 0:
            down(job, NOTHING, G, pointer(A, W), D, n_out, n_in, stride, m)


# The tangent kernel ------------------------------------------------------------------------------


def kernel(spec: Spec, params: Layers, X1: Array, X2: Array) -> Array:
    """(n1, d_L, n2, d_L): tiles of X2 with a record of every row of X1."""
    n_out, units, below = spec.sizes[-1], sum(spec.sizes[1:]), sum(spec.sizes[:-1])
    records = np.empty((len(X1), below + n_out * units), spec.dtype)
    both: dict[str, Any] = {"out_columns": records.shape[1]}
    more: dict[str, Any] = {"products": 1 + 2 * n_out, "more_rows": units}
    run(records_tile, spec, params, X1, **both, **more, out=records)
    # By columns of X2 in the last place, as it is computed.
    K = np.empty((len(X1), n_out, n_out, len(X2)), spec.dtype)
    run(
        kernel_tile,
        spec,
        params,
        X2,
        products=1 + n_out * (2 + len(X1) * (below + n_out * units) / n_params(spec.sizes)),
        more_rows=units + int(STRIP) * (len(params) + 2),
        records=records,
        n_records=len(records),
        out=K,
        **both,
    )
    return K.transpose(0, 1, 3, 2)


@of_tiles
def records_tile(job, layers, A, start, n, sums):
    """Of each row H_0, ..., H_{L-1}, and for one output after the other D_1, ..., D_L."""
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    row, units, below = job.out_columns, n_units(layers), layers[-1, 3]
    record, D = shifted(pointer(A, job.out), start * row), shifted(A, job.more * stride)
    store(record, row, A, stride, n, below)
    for a in range(layers[-1, 2]):
        deltas_of_output(job, layers, a, A, stride, m)
        store(shifted(record, below + a * units), row, D, stride, n, units)


@of_tiles
def kernel_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    n_out = layers[-1, 2]
    for b in range(n_out):
        deltas_of_output(job, layers, b, A, stride, m)
        for i in range(0, job.n_records, STRIP):
            n_rows = min(STRIP, job.n_records - i)
            inner_products(job, layers, i, n_rows, A, stride, m)
            for a in range(n_out):
                K = kernel_rows(job, layers, a, i, n_rows, A, stride, m)
                for r in range(n_rows):
                    place = (((i + r) * n_out + a) * n_out + b) * job.n + start
                    to = shifted(pointer(A, job.out), place)
                    copy(to, shifted(K, r * stride), ONE, n, n)


@compiled
def strip(job, layers, k):
    """The first row of a strip behind the deltas: of K, of a term of it; then P_1, ..., P_L."""
    return job.more + n_units(layers) + k * STRIP


@compiled
def inner_products(job, layers, i, n_rows, A, stride, m):
    """P_l = <H_{l-1}[i], H_{l-1}[j]> + 1 for rows i of X1 and j of the tile."""
    row = job.out_columns
    records = shifted(pointer(A, job.records), i * row)
    for l in range(len(layers)):
        n_in, below = layers[l, 1], layers[l, 3] - layers[l, 1]
        P, H = shifted(A, strip(job, layers, 2 + l) * stride), shifted(A, below * stride)
        H_i = shifted(records, below)
        fill(P, type(A[0])(1), n_rows, stride, m)
        call(job.product, (ITSELF, P, P, stride, H_i, row, 1, H, stride, n_rows, n_in, m))


@compiled
def kernel_rows(job, layers, a, i, n_rows, A, stride, m):
    """(V9) for output a of rows i of X1, and the output of the tile whose deltas are there."""
    row, K = job.out_columns, shifted(A, strip(job, layers, 0) * stride)
    term = shifted(A, strip(job, layers, 1) * stride)
    first = i * row + layers[-1, 3] + a * n_units(layers)
    for l in range(len(layers)):
        n_out, unit = layers[l, 2], layers[l, 4] - layers[0, 4]
        D_i = shifted(pointer(A, job.records), first + unit)
        D = shifted(A, more_of(job, layers, l) * stride)
        P = shifted(A, strip(job, layers, 2 + l) * stride)
        to = term if l > 0 else K
        call(job.product, (NOTHING, to, to, stride, D_i, row, 1, D, stride, n_rows, n_out, m))
        multiply(to, P, n_rows, stride, m)
        if l > 0:
            add(K, term, n_rows, stride, m)
    return K

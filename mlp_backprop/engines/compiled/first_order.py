"""Compiled passes of first order: outputs, gradients of single samples, by inputs, and of Jᵀ u.

Each is forward and backward over tiles, as in kernels.py. After them every H_l and D_l of a tile is
in place, of which the results are other contractions: (P1) to (P5) of samples.py, (4) of
backprop.py.
"""

from itertools import pairwise
from math import sqrt

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.engine import by_layer
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.kernels import add_losses, load_inputs, load_rows, of_tiles
from mlp_backprop.engines.compiled.layout import whole_vectors
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import transpose
from mlp_backprop.engines.compiled.rows import (
    add_squares,
    at,
    copy,
    fill,
    multiply,
    multiply_by_row,
)
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    backward,
    extent,
    forward,
    grads_below,
    output_grads,
    store,
    store_outputs,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import lanes, pointer, shifted
from mlp_backprop.types import Array, Layer, Layers, LossAndGrads, n_params

# The outputs -------------------------------------------------------------------------------------


def outputs(spec: Spec, params: Layers, X: Array) -> Array:
    """H_L, (n, d_L)."""
    out = np.empty((len(X), spec.sizes[-1]), spec.dtype)
    run(outputs_tile, spec, params, X, products=1, outputs=out)
    return out


@of_tiles
def outputs_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    store_outputs(job, layers, A, stride, start, n)


# Gradients by the inputs, and of Jᵀ u ------------------------------------------------------------


def input_grads(spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None) -> Array:
    """dE/dX, or that divided: equation (4)."""
    out = np.empty(X.shape, spec.dtype)
    divisor = backprop.divisor(spec, backprop.weight_sum(spec, X, weight))
    factor = np.array([1 / divisor], np.float64)
    run(input_grads_tile, spec, params, X, y, weight, products=2, out=out, factor=factor)
    return out


@of_tiles
def input_grads_tile(job, layers, A, start, n, sums):
    """D_1 W_1."""
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    weights, factor = shifted(A, job.weights * stride), type(A[0])(factor_of(job))
    for t in range(at(m)):
        weights[t] *= factor
    forward(job, layers, A, stride, m)
    output_grads(job, layers, A, stride, m)
    backward(job, layers, A, stride, n, m)
    grads_below(job, layers[0], A, stride, m)  # (4)
    G, n_in = shifted(A, job.G * stride), layers[0, 1]
    store(shifted(pointer(A, job.out), start * n_in), n_in, G, stride, n, n_in)


@compiled
def factor_of(job):
    return pointer(np.float64, job.factor)[0]


def vjp(spec: Spec, params: Layers, X: Array, U: Array) -> list[Layer]:
    """Jᵀ u, summed over samples."""
    n_sums = n_params(spec.sizes)
    return by_layer(run(vjp_tile, spec, params, X, U, products=3, n_sums=n_sums), spec.sizes)


@of_tiles
def vjp_tile(job, layers, A, start, n, sums):
    """The gradient, begun with G_L = u, which lies where targets do."""
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    copy(shifted(A, job.G * stride), shifted(A, job.Y * stride), layers[-1, 2], stride, m)
    backward(job, layers, A, stride, n, m)
    for layer in layers:
        weight_grads(job, layer, A, stride, n, m, sums)


# Gradients of single samples ---------------------------------------------------------------------


def norms(
    spec: Spec,
    params: Layers,
    X: Array,
    y: Array,
    weight: Array | None,
    per_layer: bool,
) -> Array:
    """Of every sample's gradient: (n,), or (n, L) layer by layer."""
    n_layers = len(params)
    out = np.empty((len(X), n_layers) if per_layer else len(X), spec.dtype)
    run(
        norms_tile,
        spec,
        params,
        X,
        y,
        weight,
        products=2,
        more_rows=n_layers + 1,
        out=out,
        out_columns=n_layers if per_layer else 1,
    )
    return out


@of_tiles
def norms_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    output_grads(job, layers, A, stride, m)
    backward(job, layers, A, stride, n, m)
    S, n_columns = squared_norms(job, layers, A, stride, m), job.out_columns
    if n_columns == 1:
        add_layers(S, len(layers), stride, m)
    for row in range(n_columns):
        for t in range(at(row * stride), at(row * stride + m)):
            S[t] = sqrt(S[t])
    store(shifted(pointer(A, job.out), start * n_columns), n_columns, S, stride, n, n_columns)


@compiled
def squared_norms(job, layers, A, stride, m):
    """Equation (P2), a row for each layer; behind them is one to work with."""
    S = shifted(A, job.more * stride)
    work = shifted(S, len(layers) * stride)
    for l in range(len(layers)):
        _, n_in, n_out, h, d, _, _, _ = layers[l]
        squares, below = shifted(S, l * stride), shifted(A, (h - n_in) * stride)
        fill(squares, type(A[0])(0), ONE, m, m)
        add_squares(squares, shifted(A, d * stride), n_out, stride, m)
        fill(work, type(A[0])(1), ONE, m, m)
        add_squares(work, below, n_in, stride, m)
        multiply(squares, work, ONE, m, m)
    return S


@compiled
def add_layers(S, n_layers, stride, m):
    """Equation (P3), in the first row."""
    for l in range(1, n_layers):
        for t in range(at(m)):
            S[t] += S[at(l * stride) + t]


def clipped_grads(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, max_norm: float
) -> LossAndGrads:
    """The loss and the sum of the clipped gradients, or these divided."""
    results = run(
        clipped_tile,
        spec,
        params,
        X,
        y,
        weight,
        products=3,
        n_sums=n_params(spec.sizes) + 2,
        more_rows=len(params) + 1,
        factor=np.array([max_norm], np.float64),
    )
    return LossAndGrads(results[-2], by_layer(results, spec.sizes))


@of_tiles
def clipped_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    add_losses(job, layers, A, stride, m, sums)
    backward(job, layers, A, stride, n, m)
    c = squared_norms(job, layers, A, stride, m)
    add_layers(c, len(layers), stride, m)
    clip_factors(c, type(A[0])(factor_of(job)), m)
    for layer in layers:  # (P5)
        multiply_by_row(shifted(A, layer[4] * stride), c, layer[2], stride, m)
        weight_grads(job, layer, A, stride, n, m, sums)


@compiled
def clip_factors(S, max_norm, m):
    """Equation (P4) in place of |g|²; a norm of 0 keeps the factor 1, and so does one of nan."""
    for t in range(at(m)):
        norm = sqrt(S[t])
        S[t] = max_norm / norm if norm > max_norm else type(max_norm)(1)


def sample_grads(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None
) -> list[Layer]:
    """Of every sample: W (n, d_l, d_{l-1}) and b (n, d_l) of each layer."""
    grads, places = grads_of_rows((len(X),), spec)
    run(sample_grads_tile, spec, params, X, y, weight, products=3, out=places)
    return grads


def grads_of_rows(shape: tuple[int, ...], spec: Spec) -> tuple[list[Layer], Array]:
    """Arrays for as many gradients as this shape has entries; and where they are."""
    grads = [
        Layer(np.empty((*shape, n_out, n_in), spec.dtype), np.empty((*shape, n_out), spec.dtype))
        for n_in, n_out in pairwise(spec.sizes)
    ]
    return grads, np.array([(W.ctypes.data, b.ctypes.data) for W, b in grads])


@of_tiles
def sample_grads_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    output_grads(job, layers, A, stride, m)
    backward(job, layers, A, stride, n, m)
    out = pointer(np.int64, job.out)
    for l in range(len(layers)):
        n_in, n_out = layers[l, 1], layers[l, 2]
        W = shifted(pointer(A, out[2 * l]), start * n_out * n_in)
        b = shifted(pointer(A, out[2 * l + 1]), start * n_out)
        D = shifted(A, layers[l, 4] * stride)
        outer_products(job, layers[l], D, A, stride, n, m, W, b, ONE)


@compiled
def outer_products(job, layer, D, A, stride, n, m, W, b, each):
    """Equation (P1) with the rows of D, to the first of `each` gradients that a sample has."""
    _, n_in, n_out, h, _, _, _, _ = layer
    T, row = shifted(A, job.T), whole_vectors(n_in, lanes(A))
    store(b, each * n_out, D, stride, n, n_out)
    transpose(T, row, shifted(A, (h - n_in) * stride), stride, n_in, m)
    for t in range(n):
        first, below = t * each * n_out, at(t * row)
        for o in range(first, first + n_out):
            place, delta = at(o * n_in), b[o]
            for i in range(at(n_in)):
                W[place + i] = delta * T[below + i]

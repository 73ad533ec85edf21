"""The steps of the derivation on a tile, whose rows layout.py names; products are those of `job`.

Widths, activations and loss are run-time integers and addresses, chosen outside the inner loops:
one compilation per dtype serves every net.
"""

import numpy as np

from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.layout import stride_for, whole_vectors
from mlp_backprop.engines.compiled.products import (
    COLUMN,
    NOTHING,
    gather_square,
    transpose,
)
from mlp_backprop.engines.compiled.rows import at, dot, fill, multiply, multiply_by_row, row_sum
from mlp_backprop.engines.compiled.vectors import VECTOR_BYTES, call, lanes, pointer, shifted

# The gradient of a layer narrower than this, on either side, is one of dots; else a product with
# H_{l-1} transposed.
NARROW = 8

# A literal number is a type to Numba, with compilations of its own.
ZERO, ONE = np.int64(0), np.int64(1)


@compiled
def extent(A, n):
    """The columns of a tile of n rows of X, and the stride from row to row."""
    m = whole_vectors(n, lanes(A))
    return m, stride_for(m, lanes(A))


# From the caller's arrays ------------------------------------------------------------------------


@compiled
def load(A, stride, m, address, row_bytes, column_bytes, n, n_columns):
    """N samples, transposed, and zeros behind them."""
    number = VECTOR_BYTES // lanes(A)
    squares, columns = 0, 0
    if column_bytes == number and row_bytes % number == 0:
        squares, columns = n - n % lanes(A), n_columns - n_columns % lanes(A)
        transpose(A, stride, pointer(A, address), row_bytes // number, squares, columns)
    for j in range(n_columns):
        for t in range(squares if j < columns else 0, n):
            A[j * stride + t] = pointer(A, address + t * row_bytes + j * column_bytes)[0]
        for t in range(n, m):
            A[j * stride + t] = 0


@compiled
def load_labels(A, stride, m, labels, step, n, n_classes):
    """A 1 in the row of a sample's class; False where there is no such row."""
    fill(A, type(A[0])(0), n_classes, stride, m)
    known = True
    for t in range(n):
        k = labels[t * step]
        if 0 <= k < n_classes:
            A[k * stride + t] = 1
        else:
            known = False
    return known


@compiled
def gather(A, stride, m, address, row_bytes, column_bytes, rows, n, n_columns):
    """As `load`, of the rows of these numbers."""
    number = VECTOR_BYTES // lanes(A)
    squares, columns = 0, 0
    if column_bytes == number and row_bytes % number == 0:
        squares, columns = n - n % lanes(A), n_columns - n_columns % lanes(A)
        X, row = pointer(A, address), row_bytes // number
        for t in range(0, squares, lanes(A)):
            for j in range(0, columns, lanes(A)):
                C = shifted(A, j * stride + t)
                gather_square(C, stride, shifted(X, j), row, shifted(rows, t))
    for j in range(n_columns):
        for t in range(squares if j < columns else 0, n):
            A[j * stride + t] = pointer(A, address + rows[t] * row_bytes + j * column_bytes)[0]
        for t in range(n, m):
            A[j * stride + t] = 0


@compiled
def gather_labels(A, stride, m, labels, step, rows, n, n_classes):
    """A 1 in the row of a sample's class, if there is such a row."""
    fill(A, type(A[0])(0), n_classes, stride, m)
    for t in range(n):
        k = labels[rows[t] * step]
        if 0 <= k < n_classes:
            A[k * stride + t] = 1


# To arrays for the caller ------------------------------------------------------------------------


@compiled
def store(out, row, A, stride, n, n_columns):
    """Rows of a tile as the columns of n rows, so many numbers from each to the next."""
    squares, columns = n - n % lanes(A), n_columns - n_columns % lanes(A)
    transpose(out, row, A, stride, columns, squares)
    for t in range(n):
        for j in range(columns if t < squares else 0, n_columns):
            out[t * row + j] = A[j * stride + t]


@compiled
def store_outputs(job, layers, A, stride, start, n):
    """H_L."""
    n_out, H = layers[-1, 2], shifted(A, layers[-1, 3] * stride)
    store(shifted(pointer(A, job.outputs), start * n_out), n_out, H, stride, n, n_out)


# The derivation ----------------------------------------------------------------------------------


@compiled
def up(job, start, b, Z, W, H, n_out, n_in, stride, m):
    """Z = start + W H, of rows of a tile."""
    call(job.product, (start, b, Z, stride, W, n_in, 1, H, stride, n_out, n_in, m))


@compiled
def down(job, start, G, W, D, n_out, n_in, stride, m):
    """G = start + Wᵀ D."""
    call(job.product, (start, G, G, stride, W, 1, n_in, D, stride, n_in, n_out, m))


@compiled
def forward(job, layers, A, stride, m):
    """Every H_l, and f'_l(Z_l) in the rows of D_l."""
    for layer in layers:
        Z, F = linear(job, layer, A, stride, m)
        call(layer[0], (Z, F, layer[2], stride, m))


@compiled
def linear(job, layer, A, stride, m):
    """Z_l = W_l H_{l-1} + b_l in the rows of H_l: where these and those of D_l begin."""
    _, n_in, n_out, h, d, _, W, b = layer
    Z, below = shifted(A, h * stride), shifted(A, (h - n_in) * stride)
    up(job, COLUMN, pointer(A, b), Z, pointer(A, W), below, n_out, n_in, stride, m)
    return Z, shifted(A, d * stride)


@compiled
def forward_higher(job, layers, A, stride, m):
    """As `forward`, with f''_l(Z_l) in the rows of `more_of`, and f\'\'\'_l behind all if S."""
    parts, N = pointer(np.int64, job.higher), n_units(layers)
    for l in range(len(layers)):
        n_out = layers[l, 2]
        Z, F = linear(job, layers[l], A, stride, m)
        F2 = shifted(A, more_of(job, layers, l) * stride)
        if job.S:
            call(parts[l], (Z, F, F2, shifted(F2, N * stride), n_out, stride, m))
        else:
            call(parts[l], (Z, F, F2, n_out, stride, m))


@compiled
def n_units(layers):
    """Of layers 1 to L."""
    return layers[-1, 4] + layers[-1, 2] - layers[0, 4]


@compiled
def more_of(job, layers, l):
    """The first row of layer l where a row per unit lies from `more` on, as of f''_l."""
    return job.more + layers[l, 4] - layers[0, 4]


@compiled
def output_grads(job, layers, A, stride, m):
    """G_L = dE/dH_L, weighted; the losses in place of Y. Returns their weighted sum."""
    n_out, h = layers[-1, 2], layers[-1, 3]
    H, G = shifted(A, h * stride), shifted(A, job.G * stride)
    Y, weight = shifted(A, job.Y * stride), shifted(A, job.weights * stride)
    call(job.loss, (H, Y, G, n_out, stride, m))
    multiply_by_row(G, weight, n_out, stride, m)
    total = 0.0
    for o in range(n_out):
        total += dot(shifted(Y, o * stride), weight, m)
    return total


@compiled
def deltas(job, layer, A, stride, n, m):
    """D_l = G_l ∘ f'_l(Z_l), which D holds before; 0 behind the last sample."""
    n_out, d = layer[2], layer[4]
    D = shifted(A, d * stride)
    multiply(D, shifted(A, job.G * stride), n_out, stride, m)
    fill(shifted(D, n), type(A[0])(0), n_out, stride, m - n)


@compiled
def grads_below(job, layer, A, stride, m):
    """G_{l-1} = W_lᵀ D_l, of equation (3)."""
    _, n_in, n_out, _, d, _, W, _ = layer
    D, G = shifted(A, d * stride), shifted(A, job.G * stride)
    down(job, NOTHING, G, pointer(A, W), D, n_out, n_in, stride, m)


@compiled
def backward(job, layers, A, stride, n, m):
    """Every D_l, from G_L."""
    for l in range(len(layers) - 1, -1, -1):
        deltas(job, layers[l], A, stride, n, m)
        if l > 0:
            grads_below(job, layers[l], A, stride, m)


@compiled
def weight_grads(job, layer, A, stride, n, m, sums, are_new=False):
    """Equations (1) and (2), D_l H_{l-1}ᵀ and D_l 1, added to sums, or in their place."""
    _, n_in, n_out, h, d, place, _, _ = layer
    D, H = shifted(A, d * stride), shifted(A, (h - n_in) * stride)
    dW = shifted(sums, place)
    add_products(job, A, D, n_out, H, n_in, stride, n, m, dW, are_new)
    add_row_sums(D, n_out, stride, m, shifted(dW, n_out * n_in), are_new)


@compiled
def add_row_sums(D, n_out, stride, m, db, are_new=False):
    """D 1, added to db, or in its place."""
    for o in range(n_out):
        total = row_sum(shifted(D, o * stride), m)
        db[o] = total if are_new else db[o] + total


@compiled
def add_products(job, A, D, n_out, H, n_in, stride, n, m, dW, are_new=False):
    """D Hᵀ, of rows of a tile, added to dW, or in its place."""
    add_products_apart(job, A, D, n_out, H, n_in, stride, n, m, dW, n_in, are_new)


@compiled
def add_products_apart(job, A, D, n_out, H, n_in, stride, n, m, dW, step, are_new=False):
    """The same, to rows of dW so many numbers apart."""
    T, P, row = shifted(A, job.T), shifted(A, job.P), n_in
    if n_in < NARROW or n_out < NARROW:
        call(job.dots, (P, row, D, stride, H, stride, n_out, n_in, m))
    else:
        row = whole_vectors(n_in, lanes(A))
        transpose(T, row, H, stride, n_in, m)
        call(job.product, (NOTHING, P, P, row, D, stride, 1, T, row, n_out, n, row))
    for o in range(n_out):
        sums, products = shifted(dW, o * step), shifted(P, o * row)
        if are_new:
            for i in range(at(n_in)):
                sums[i] = products[i]
        else:
            for i in range(at(n_in)):
                sums[i] += products[i]

"""The compiled pass: forward, loss, backward and gradient sums over tiles of samples.

The derivation of backprop.py for narrow nets, its equations (1) to (3), arranged for a CPU's
vector units: a tile is a block of rows of X, kept transposed, so that every row of the tile holds
one number of TILE samples side by side. The rows of a tile, one after the other:

    H_0, H_1, ..., H_L       one row per unit
    f'_1(Z_1), ..., f'_L(Z_L)
    Y                        d_L rows of targets: classes as a 1 among zeros
    weights
    three rows, and d_L more, for softmax

D_l takes the place of H_l as soon as dE/dW_{l+1} is formed. The sums of a tile are formed in the
net's dtype and added up in float64.

Widths, activations and loss are run-time integers, chosen outside the inner loops: one
compilation per dtype serves every net.
"""

import numpy as np
from numba import njit

from mlp_backprop.engines.compiled import formulas
from mlp_backprop.types import Array

TILE = 256
# Between rows lie a few numbers, or all rows would begin in the same set of the cache.
STRIDE = TILE + 16

# Offsets in a tile are unsigned: a signed index may be negative, and the test for it would keep
# the loops from being vectorised. Rows a constant apart spare LLVM most tests for overlap.
at = np.uintp
ROW_1, ROW_2, ROW_3 = at(STRIDE), at(2 * STRIDE), at(3 * STRIDE)

compiled = njit(**formulas.OPTIONS)
inlined = njit(**formulas.OPTIONS, inline="always")
# A sum over samples in any order, as long as it is always the same one.
summing = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})

# The step to the neighbouring weight: a literal 1 is a type to Numba, with its own compilation.
NEXT = np.int64(1)


def layout(sizes: tuple[int, ...], names: list[str]) -> tuple[Array, int]:
    """Per layer (activation, d_{l-1}, d_l, row of H_l, row of f'_l(Z_l), place of W_l in params).

    The second result is how many rows a tile has.
    """
    layers = []
    h, slope, p = sizes[0], sum(sizes), 0
    for name, n_in, n_out in zip(names, sizes, sizes[1:], strict=False):
        layers.append((ACTIVATIONS.index(name), n_in, n_out, h, slope, p))
        h, slope, p = h + n_out, slope + n_out, p + n_out * n_in + n_out
    return np.array(layers), slope + 2 * sizes[-1] + 4


# Products ------------------------------------------------------------------------------------


@compiled
def add_product(A, out, n_out, x, n_in, W, w, w_out, w_in, m):
    """Add to n_out rows from row `out`: weights times the n_in rows from row x.

    Output o has weight W[w + o w_out + i w_in] for input i. Blocks of 4 outputs and 4 inputs use
    every number loaded four times.
    """
    m = at(m)
    o = 0
    while o < n_out:
        four_out = o + 4 <= n_out
        a = at((out + o) * STRIDE)
        i = 0
        while i < n_in:
            four_in = i + 4 <= n_in
            b = at((x + i) * STRIDE)
            v = w + o * w_out + i * w_in
            if four_out and four_in:
                _add_4_by_4(A, a, b, W, v, w_out, w_in, m)
            elif four_out:
                _add_4_by_1(A, a, b, W, v, w_out, m)
            elif four_in:
                _add_1_by_4(A, a, b, W, v, w_in, m)
            else:
                _add_1_by_1(A, a, b, W[v], m)
            i += 4 if four_in else 1
        o += 4 if four_out else 1


@compiled
def _add_4_by_4(A, a, b, W, v, w_out, w_in, m):
    w00, w01, w02, w03 = W[v], W[v + w_in], W[v + 2 * w_in], W[v + 3 * w_in]
    v += w_out
    w10, w11, w12, w13 = W[v], W[v + w_in], W[v + 2 * w_in], W[v + 3 * w_in]
    v += w_out
    w20, w21, w22, w23 = W[v], W[v + w_in], W[v + 2 * w_in], W[v + 3 * w_in]
    v += w_out
    w30, w31, w32, w33 = W[v], W[v + w_in], W[v + 2 * w_in], W[v + 3 * w_in]
    for t in range(m):
        x0, x1, x2, x3 = A[b + t], A[b + ROW_1 + t], A[b + ROW_2 + t], A[b + ROW_3 + t]
        A[a + t] += (w00 * x0 + w01 * x1) + (w02 * x2 + w03 * x3)
        A[a + ROW_1 + t] += (w10 * x0 + w11 * x1) + (w12 * x2 + w13 * x3)
        A[a + ROW_2 + t] += (w20 * x0 + w21 * x1) + (w22 * x2 + w23 * x3)
        A[a + ROW_3 + t] += (w30 * x0 + w31 * x1) + (w32 * x2 + w33 * x3)


@compiled
def _add_4_by_1(A, a, b, W, v, w_out, m):
    w0, w1, w2, w3 = W[v], W[v + w_out], W[v + 2 * w_out], W[v + 3 * w_out]
    for t in range(m):
        x = A[b + t]
        A[a + t] += w0 * x
        A[a + ROW_1 + t] += w1 * x
        A[a + ROW_2 + t] += w2 * x
        A[a + ROW_3 + t] += w3 * x


@compiled
def _add_1_by_4(A, a, b, W, v, w_in, m):
    w0, w1, w2, w3 = W[v], W[v + w_in], W[v + 2 * w_in], W[v + 3 * w_in]
    for t in range(m):
        x0, x1, x2, x3 = A[b + t], A[b + ROW_1 + t], A[b + ROW_2 + t], A[b + ROW_3 + t]
        A[a + t] += (w0 * x0 + w1 * x1) + (w2 * x2 + w3 * x3)


@compiled
def _add_1_by_1(A, a, b, w, m):
    for t in range(m):
        A[a + t] += w * A[b + t]


@compiled
def add_weight_grads(A, d, n_out, x, n_in, sums, g, m):
    """Equation (1): add D Hᵀ of n_out rows from row d and n_in from row x to sums from g on."""
    m = at(m)
    o = 0
    while o < n_out:
        four_out = o + 4 <= n_out
        a = at((d + o) * STRIDE)
        i = 0
        while i < n_in:
            four_in = i + 4 <= n_in
            b = at((x + i) * STRIDE)
            s = g + o * n_in + i
            if four_out and four_in:
                _dot_4_by_4(A, a, b, sums, s, n_in, m)
            elif four_out:
                _dot_4(A, b, a, sums, s, n_in, m)
            elif four_in:
                _dot_4(A, a, b, sums, s, NEXT, m)
            else:
                sums[s] += _dot(A, a, b, m)
            i += 4 if four_in else 1
        o += 4 if four_out else 1


@summing
def _dot_4_by_4(A, a, b, sums, s, n_in, m):
    s00 = s01 = s02 = s03 = s10 = s11 = s12 = s13 = A.dtype.type(0)
    s20 = s21 = s22 = s23 = s30 = s31 = s32 = s33 = A.dtype.type(0)
    for t in range(m):
        x0, x1, x2, x3 = A[b + t], A[b + ROW_1 + t], A[b + ROW_2 + t], A[b + ROW_3 + t]
        d0, d1, d2, d3 = A[a + t], A[a + ROW_1 + t], A[a + ROW_2 + t], A[a + ROW_3 + t]
        s00 += d0 * x0
        s01 += d0 * x1
        s02 += d0 * x2
        s03 += d0 * x3
        s10 += d1 * x0
        s11 += d1 * x1
        s12 += d1 * x2
        s13 += d1 * x3
        s20 += d2 * x0
        s21 += d2 * x1
        s22 += d2 * x2
        s23 += d2 * x3
        s30 += d3 * x0
        s31 += d3 * x1
        s32 += d3 * x2
        s33 += d3 * x3
    _add_4(sums, s, NEXT, s00, s01, s02, s03)
    _add_4(sums, s + n_in, NEXT, s10, s11, s12, s13)
    _add_4(sums, s + 2 * n_in, NEXT, s20, s21, s22, s23)
    _add_4(sums, s + 3 * n_in, NEXT, s30, s31, s32, s33)


@summing
def _dot_4(A, a, b, sums, s, step, m):
    """One row, from a, with each of four, from b."""
    s0 = s1 = s2 = s3 = A.dtype.type(0)
    for t in range(m):
        d = A[a + t]
        s0 += d * A[b + t]
        s1 += d * A[b + ROW_1 + t]
        s2 += d * A[b + ROW_2 + t]
        s3 += d * A[b + ROW_3 + t]
    _add_4(sums, s, step, s0, s1, s2, s3)


@compiled
def _add_4(sums, s, step, s0, s1, s2, s3):
    sums[s] += s0
    sums[s + step] += s1
    sums[s + 2 * step] += s2
    sums[s + 3 * step] += s3


@summing
def _dot(A, a, b, m):
    total = A.dtype.type(0)
    for t in range(m):
        total += A[a + t] * A[b + t]
    return total


@summing
def _row_sum(A, row, m):
    a, total = at(row * STRIDE), A.dtype.type(0)
    for t in range(at(m)):
        total += A[a + t]
    return total


# Rows of the tables ------------------------------------------------------------------------------


def _activation(f):
    """For n_rows rows: h = f(z) in place of z, and the slopes f'(z) in B, which may be A."""

    @inlined
    def rows(A, z, B, slope, n_rows, m):
        for row in range(n_rows):
            a, b = at((z + row) * STRIDE), at((slope + row) * STRIDE)
            for t in range(at(m)):
                A[a + t], B[b + t] = f(A[a + t])

    return rows


def _loss(f):
    """For n_rows outputs: the losses take the place of y, their gradients that of h."""

    @inlined
    def rows(A, h, y, n_rows, m):
        for row in range(n_rows):
            a, b = at((h + row) * STRIDE), at((y + row) * STRIDE)
            for t in range(at(m)):
                A[b + t], A[a + t] = f(A[a + t], A[b + t])

    return rows


@inlined
def softmax_cross_entropy(A, h, y, n_rows, m):
    """As `_loss`, over all outputs of a sample together, with the rows that follow Y and w."""
    m, zero, one = at(m), A.dtype.type(0), A.dtype.type(1)
    largest = at((y + n_rows + 1) * STRIDE)
    total, weight, scratch = largest + ROW_1, largest + ROW_2, y + n_rows + 4
    for t in range(m):
        A[largest + t], A[total + t], A[weight + t] = A[at(h * STRIDE) + t], zero, zero
    for row in range(1, n_rows):
        a = at((h + row) * STRIDE)
        for t in range(m):
            A[largest + t] = max(A[a + t], A[largest + t])
    for row in range(n_rows):
        a, b = at((h + row) * STRIDE), at((y + row) * STRIDE)
        e = at((scratch + row) * STRIDE)
        for t in range(m):
            A[a + t] -= A[largest + t]
            A[e + t] = formulas.exp(A[a + t])
            A[total + t] += A[e + t]
            A[weight + t] += A[b + t]
    for row in range(n_rows):
        a, b = at((h + row) * STRIDE), at((y + row) * STRIDE)
        e = at((scratch + row) * STRIDE)
        for t in range(m):
            k = A[b + t]
            surprise = formulas.log1p(A[total + t] - one) - A[a + t]
            A[a + t] = A[weight + t] * (A[e + t] / A[total + t]) - k
            A[b + t] = zero if k == zero else k * surprise


ACTIVATIONS = tuple(formulas.ACTIVATIONS)
LOSSES = (*formulas.LOSSES, "softmax_cross_entropy")
_activations = [_activation(f) for f in formulas.ACTIVATIONS.values()]
_identity, _sigmoid, _tanh, _relu, _leaky_relu, _elu, _softplus, _silu, _gelu_tanh = _activations
_losses = [_loss(f) for f in formulas.LOSSES.values()]
_squared_error, _absolute_error, _huber, _poisson, _binary_cross_entropy = _losses


@compiled
def activate(k, A, z, B, slope, n_rows, m):
    """Row k of the table of activations."""
    if k == 0:
        _identity(A, z, B, slope, n_rows, m)
    elif k == 1:
        _sigmoid(A, z, B, slope, n_rows, m)
    elif k == 2:
        _tanh(A, z, B, slope, n_rows, m)
    elif k == 3:
        _relu(A, z, B, slope, n_rows, m)
    elif k == 4:
        _leaky_relu(A, z, B, slope, n_rows, m)
    elif k == 5:
        _elu(A, z, B, slope, n_rows, m)
    elif k == 6:
        _softplus(A, z, B, slope, n_rows, m)
    elif k == 7:
        _silu(A, z, B, slope, n_rows, m)
    elif k == 8:
        _gelu_tanh(A, z, B, slope, n_rows, m)


@compiled
def losses_and_output_grads(k, A, h, y, n_rows, m):
    """Row k of the table of losses."""
    if k == 0:
        _squared_error(A, h, y, n_rows, m)
    elif k == 1:
        _absolute_error(A, h, y, n_rows, m)
    elif k == 2:
        _huber(A, h, y, n_rows, m)
    elif k == 3:
        _poisson(A, h, y, n_rows, m)
    elif k == 4:
        _binary_cross_entropy(A, h, y, n_rows, m)
    else:
        softmax_cross_entropy(A, h, y, n_rows, m)


# The pass ----------------------------------------------------------------------------------------


@inlined
def fill(A, row, n_rows, value, m):
    for r in range(row, row + n_rows):
        a = at(r * STRIDE)
        for t in range(at(m)):
            A[a + t] = value


@inlined
def multiply(A, row, factors, m):
    a, b = at(row * STRIDE), at(factors * STRIDE)
    for t in range(at(m)):
        A[a + t] *= A[b + t]


@inlined
def load(A, row, values, start, m):
    """Samples from `start` on, transposed."""
    for j in range(values.shape[1]):
        a = (row + j) * STRIDE
        for t in range(m):
            A[a + t] = values[start + t, j]


@inlined
def load_classes(A, row, n_rows, classes, start, m):
    """A 1 in the row of a sample's class; False where there is no such row."""
    fill(A, row, n_rows, A.dtype.type(0), m)
    known = True
    for t in range(m):
        k = classes[start + t]
        if 0 <= k < n_rows:
            A[(row + k) * STRIDE + t] = A.dtype.type(1)
        else:
            known = False
    return known


@inlined
def loss_and_grad_sums(X, Y, classes, weight, layers, loss, params, A, sums):
    """Fill `sums` with those of the gradients, as params has them, the loss and the weights.

    Either Y (n, d_L) or classes (n,) holds the targets; weight (n,) may be absent, that is of
    length 0. Returns whether all classes exist.
    """
    _, _, outputs, output, slope, _ = layers[-1]
    y = slope + outputs
    w = y + outputs
    known = True
    sums[:] = 0
    for start in range(0, len(X), TILE):
        m = min(TILE, len(X) - start)
        load(A, 0, X, start, m)
        if len(classes):
            known &= load_classes(A, y, outputs, classes, start, m)
        else:
            load(A, y, Y, start, m)
        if len(weight):
            for t in range(m):
                A[w * STRIDE + t] = weight[start + t]
        else:
            fill(A, w, 1, A.dtype.type(1), m)

        for activation, n_in, n_out, h, slope, p in layers:
            for o in range(n_out):
                fill(A, h + o, 1, params[p + n_out * n_in + o], m)
            add_product(A, h, n_out, h - n_in, n_in, params, p, n_in, NEXT, m)
            activate(activation, A, h, A, slope, n_out, m)

        losses_and_output_grads(loss, A, output, y, outputs, m)
        for o in range(outputs):
            sums[-2] += _dot(A, at(w * STRIDE), at((y + o) * STRIDE), at(m))
            multiply(A, output + o, w, m)
        sums[-1] += _row_sum(A, w, m)

        for l in range(len(layers) - 1, -1, -1):
            _, n_in, n_out, d, slope, p = layers[l]
            for o in range(n_out):
                multiply(A, d + o, slope + o, m)
                sums[p + n_out * n_in + o] += _row_sum(A, d + o, m)
            add_weight_grads(A, d, n_out, d - n_in, n_in, sums, p, m)
            if l > 0:
                fill(A, d - n_in, n_in, A.dtype.type(0), m)
                add_product(A, d - n_in, n_in, d, n_out, params, p, NEXT, n_in, m)
    return known

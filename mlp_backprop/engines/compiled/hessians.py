"""The Hessian and the Gauss-Newton matrix, compiled: (V7) and (V8) of maths/hessians.py over tiles.

Behind `more` lie, with a row per unit of layers 1 to L each: G_l ∘ f''_l, D_l, and of the unit p at
work d_p Z_l, d_p H_l and d_p D_l; the slopes stay in the rows of D_l. Then [H_{l-1} 1], a factor of
(V8), and Y, whose place the losses take. For the Gauss-Newton matrix the first two do not count.
"""

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled import curvatures
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import higher
from mlp_backprop.engines.compiled.kernels import load_rows, of_tiles
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import NOTHING
from mlp_backprop.engines.compiled.rows import at, copy, fill, multiply, multiply_by_row
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    add_products_apart,
    down,
    extent,
    forward,
    forward_higher,
    more_of,
    n_units,
    output_grads,
    up,
)
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.types import Array, Layers, n_params

MOST_PARAMETERS = 2000  # 32 MB for each chunk of rows

# Which of the arrays above.
BENDS, DELTAS, DZ, DH, DD, REST = map(np.int64, range(6))


def matrix(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, gauss_newton: bool
) -> Array:
    """Sums over samples (P, P), symmetric, entries of [W_l b_l] row by row."""
    P, widest = n_params(spec.sizes), max(spec.sizes[:-1]) + 1
    sums = run(
        matrix_tile,
        spec._replace(reduction="sum"),
        params,
        X,
        y,
        weight,
        products=P / 2,
        n_sums=P * P,
        more_rows=5 * sum(spec.sizes[1:]) + 2 * widest + spec.sizes[-1],
        room=widest * (widest + 8),
        out_columns=P,
        block_rows=widest,
        higher=0 if gauss_newton else higher(spec, "activation2"),
        output_product=address(
            spec.dtype, "output_product", curvatures.number(spec.loss.name, is_fisher=False)
        ),
    )
    upper = np.triu(sums.reshape(P, P))
    return upper + np.triu(upper, 1).T


@of_tiles
def matrix_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_rows(job, layers, A, stride, start, n, m)
    if job.higher:
        forward_higher(job, layers, A, stride, m)
        record_deltas(job, layers, A, stride, n, m)
    else:
        forward(job, layers, A, stride, m)
    for l in range(len(layers)):
        n_in, h = layers[l, 1], layers[l, 3]
        H = shifted(A, place(job, layers, REST, 0) * stride)
        copy(H, shifted(A, (h - n_in) * stride), n_in, stride, m)
        fill(shifted(H, n_in * stride), type(A[0])(1), ONE, stride, m)
        for p in range(layers[l, 2]):
            changes_up(job, layers, l, p, A, stride, m)
            changes_down(job, layers, l, A, stride, n, m)
            for k in range(l, len(layers)):
                add_block(job, layers, l, p, k, A, stride, n, m, sums)


@compiled
def place(job, layers, which, l):
    """The first row of layer l in one of the arrays."""
    return more_of(job, layers, l) + which * n_units(layers)


@compiled
def record_deltas(job, layers, A, stride, n, m):
    """D_l, and G_l ∘ f''_l in place of f''_l; Y as it was."""
    n_out, Y, G = layers[-1, 2], shifted(A, job.Y * stride), shifted(A, job.G * stride)
    kept = shifted(A, (place(job, layers, REST, 0) + 2 * job.block_rows) * stride)
    copy(kept, Y, n_out, stride, m)
    output_grads(job, layers, A, stride, m)
    copy(Y, kept, n_out, stride, m)
    for l in range(len(layers) - 1, -1, -1):
        _, n_in, n_out, _, d, _, W, _ = layers[l]
        D = shifted(A, place(job, layers, DELTAS, l) * stride)
        copy(D, shifted(A, d * stride), n_out, stride, m)
        multiply(D, G, n_out, stride, m)
        fill(shifted(D, n), type(A[0])(0), n_out, stride, m - n)
        multiply(shifted(A, place(job, layers, BENDS, l) * stride), G, n_out, stride, m)
        if l > 0:
            down(job, NOTHING, G, pointer(A, W), D, n_out, n_in, stride, m)


@compiled
def changes_up(job, layers, l, p, A, stride, m):
    """(V7): d_p Z_k and d_p H_k from layer l on."""
    zero, one, n_out = type(A[0])(0), type(A[0])(1), layers[l, 2]
    dZ = shifted(A, place(job, layers, DZ, l) * stride)
    dH = shifted(A, place(job, layers, DH, l) * stride)
    fill(dZ, zero, n_out, stride, m)
    fill(dH, zero, n_out, stride, m)
    fill(shifted(dZ, p * stride), one, ONE, stride, m)
    copy(shifted(dH, p * stride), shifted(A, (layers[l, 4] + p) * stride), ONE, stride, m)
    for k in range(l + 1, len(layers)):
        _, n_in, n_out, _, d, _, W, _ = layers[k]
        below, dZ = dH, shifted(A, place(job, layers, DZ, k) * stride)
        up(job, NOTHING, dZ, dZ, pointer(A, W), below, n_out, n_in, stride, m)
        dH = shifted(A, place(job, layers, DH, k) * stride)
        copy(dH, dZ, n_out, stride, m)
        multiply(dH, shifted(A, d * stride), n_out, stride, m)


@compiled
def changes_down(job, layers, l, A, stride, n, m):
    """(V7): d_p D_k from the last layer to layer l; 0 behind the last sample."""
    n_out, H = layers[-1, 2], shifted(A, layers[-1, 3] * stride)
    dG, Y = shifted(A, job.G * stride), shifted(A, job.Y * stride)
    dH = shifted(A, place(job, layers, DH, len(layers) - 1) * stride)
    call(job.output_product, (H, Y, dH, dG, n_out, stride, m))
    multiply_by_row(dG, shifted(A, job.weights * stride), n_out, stride, m)
    for k in range(len(layers) - 1, l - 1, -1):
        _, n_in, n_out, _, d, _, W, _ = layers[k]
        dD = shifted(A, place(job, layers, DD, k) * stride)
        copy(dD, dG, n_out, stride, m)
        multiply(dD, shifted(A, d * stride), n_out, stride, m)
        if job.higher:
            S = shifted(A, place(job, layers, BENDS, k) * stride)
            dZ = shifted(A, place(job, layers, DZ, k) * stride)
            add_product(dD, S, dZ, n_out, stride, m)
        fill(shifted(dD, n), type(A[0])(0), n_out, stride, m - n)
        if k > l:
            down(job, NOTHING, dG, pointer(A, W), dD, n_out, n_in, stride, m)


@compiled
def add_product(C, A, B, n_rows, stride, m):
    """C = C + A ∘ B."""
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            C[t] += A[t] * B[t]


@compiled
def add_block(job, layers, l, p, k, A, stride, n, m, sums):
    """(V8): the rows of unit p of layer l, in the columns of layer k; what is symmetric once."""
    n_q, n_s, P = layers[l, 1] + 1, layers[k, 1] + 1, job.out_columns
    H_l = shifted(A, place(job, layers, REST, 0) * stride)
    factor = shifted(H_l, job.block_rows * stride)
    first = (layers[l, 5] + p * n_q) * P + layers[k, 5]
    for r in range(p if k == l else 0, layers[k, 2]):
        form_factor(job, layers, l, k, r, factor, A, stride, m)
        to = shifted(sums, first + r * n_s)
        add_products_apart(job, A, H_l, n_q, factor, n_s, stride, n, m, to, P)


@compiled
def form_factor(job, layers, l, k, r, factor, A, stride, m):
    """d_p D_k[r] ∘ [H_{k-1} 1] + D_k[r] ∘ [d_p H_{k-1} 0]."""
    _, n_in, _, h, _, _, _, _ = layers[k]
    dD = shifted(A, (place(job, layers, DD, k) + r) * stride)
    copy(factor, shifted(A, (h - n_in) * stride), n_in, stride, m)
    multiply_by_row(factor, dD, n_in, stride, m)
    copy(shifted(factor, n_in * stride), dD, ONE, stride, m)
    if job.higher and k > l:
        D = shifted(A, (place(job, layers, DELTAS, k) + r) * stride)
        dH = shifted(A, place(job, layers, DH, k - 1) * stride)
        for row in range(n_in):
            add_product(shifted(factor, row * stride), D, shifted(dH, row * stride), 1, stride, m)

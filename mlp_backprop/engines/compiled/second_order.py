"""Products of vectors with a net's matrices, compiled: the equations of tangents.py over tiles.

Behind what every tile has lie, from `job.more` on, with a row per unit of layers 1 to L each,

    dD_1, ..., dD_L                before that f''_l(Z_l) ∘ dZ_l; for the Hessian alone
    dH_1, ..., dH_L                before that dZ_l
    dG                             of the layer at work; for the Hessian alone

The Gauss-Newton and the Fisher product go down as a gradient does, begun with G_L = A dH_L.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled import curvatures
from mlp_backprop.engines.compiled.engine import by_layer
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import higher
from mlp_backprop.engines.compiled.kernels import load_inputs, load_rows, of_tiles
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import COLUMN, ITSELF, NOTHING
from mlp_backprop.engines.compiled.rows import at, fill, multiply, multiply_by_row, row_sum, shape
from mlp_backprop.engines.compiled.tiles import (
    add_products,
    add_row_sums,
    deltas,
    down,
    extent,
    forward,
    forward_higher,
    grads_below,
    more_of,
    n_units,
    output_grads,
    store,
    up,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.maths.tangents import Kind
from mlp_backprop.types import Array, Layer, Layers, n_params

# How often a row of X meets every weight: three times for each product of two matrices below.
HESSIAN_PRODUCTS, GAUSS_NEWTON_PRODUCTS, JACOBIAN_PRODUCTS = 8, 5, 3


def product(
    spec: Spec, kind: Kind, params: Layers, v: Layers, X: Array, y: Array, weight: Array | None
) -> list[Layer]:
    """The matrix of this kind, summed over samples or divided, times v."""
    units = sum(spec.sizes[1:])
    widest = max(*spec.sizes, spec.sizes[-1] + 3)  # three: softmax works there
    results = run(
        product_tile,
        spec,
        params,
        X,
        y,
        weight,
        products=HESSIAN_PRODUCTS if kind.is_hessian else GAUSS_NEWTON_PRODUCTS,
        n_sums=n_params(spec.sizes) + 2,
        more_rows=2 * units + widest if kind.is_hessian else units,
        vector=v,
        **_parts(spec, kind),
    )
    return by_layer(results, spec.sizes)


@lru_cache(maxsize=128)
def _parts(spec: Spec, kind: Kind) -> dict[str, Any]:
    which = curvatures.number(spec.loss.name, is_fisher=kind.name == "fisher")
    own = {"output_product": address(spec.dtype, "output_product", which)}
    return own | ({"higher": higher(spec, "activation2")} if kind.is_hessian else {})


def jacobian_product(spec: Spec, params: Layers, v: Layers, X: Array) -> Array:
    """J v = dH_L (n, d_L)."""
    out = np.empty((len(X), spec.sizes[-1]), spec.dtype)
    more: dict[str, Any] = {"products": JACOBIAN_PRODUCTS, "more_rows": sum(spec.sizes[1:])}
    run(jacobian_product_tile, spec, params, X, **more, vector=v, out=out)
    return out


@of_tiles
def product_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    vector = vector_of(job)
    load_rows(job, layers, A, stride, start, n, m)
    forward_along(job, layers, vector, A, stride, m)
    if job.higher:
        output_changes(job, layers, A, dG_of(job, layers), stride, m)
        output_grads(job, layers, A, stride, m)
    else:
        output_changes(job, layers, A, job.G, stride, m)
    sums[job.n_sums - 1] += row_sum(shifted(A, job.weights * stride), m)
    for l in range(len(layers) - 1, -1, -1):
        if job.higher:
            changes_of_deltas(job, layers, l, A, stride, n, m)
            changes_of_weight_grads(job, layers, l, A, stride, n, m, sums)
            if l > 0:
                changes_below(job, layers, l, vector[l, 0], A, stride, m)
        else:
            deltas(job, layers[l], A, stride, n, m)
            weight_grads(job, layers[l], A, stride, n, m, sums)
        if l > 0:
            grads_below(job, layers[l], A, stride, m)


@of_tiles
def jacobian_product_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    forward_along(job, layers, vector_of(job), A, stride, m)
    n_out, dH = layers[-1, 2], shifted(A, dH_of(job, layers, len(layers) - 1) * stride)
    store(shifted(pointer(A, job.out), start * n_out), n_out, dH, stride, n, n_out)


# Where things are --------------------------------------------------------------------------------


@compiled
def vector_of(job):
    return carray(pointer(np.int64, job.vector), (job.n_layers, 2))


@compiled
def dH_of(job, layers, l):
    """The first row of dH_l; that of dD_l is more_of's."""
    return more_of(job, layers, l) + (n_units(layers) if job.higher else 0)


@compiled
def dG_of(job, layers):
    return job.more + 2 * n_units(layers)


# Up ----------------------------------------------------------------------------------------------


@compiled
def forward_along(job, layers, vector, A, stride, m):
    """(V1) and (V2): every H_l and dH_l, with f'_l(Z_l), and f''_l(Z_l) ∘ dZ_l if it counts."""
    if job.higher:
        forward_higher(job, layers, A, stride, m)
    else:
        forward(job, layers, A, stride, m)
    for l in range(len(layers)):
        _, n_in, n_out, h, d, _, W, _ = layers[l]
        V_l, c_l = pointer(A, vector[l, 0]), pointer(A, vector[l, 1])
        dZ = shifted(A, dH_of(job, layers, l) * stride)
        up(job, COLUMN, c_l, dZ, V_l, shifted(A, (h - n_in) * stride), n_out, n_in, stride, m)
        if l > 0:
            below = shifted(A, dH_of(job, layers, l - 1) * stride)
            up(job, ITSELF, c_l, dZ, pointer(A, W), below, n_out, n_in, stride, m)
        if job.higher:
            multiply(shifted(A, more_of(job, layers, l) * stride), dZ, n_out, stride, m)
        multiply(dZ, shifted(A, d * stride), n_out, stride, m)  # dH_l


@compiled
def output_changes(job, layers, A, row, stride, m):
    """A dH_L, weighted, from this row on; before the losses take the place of Y."""
    n_out, h = layers[-1, 2], layers[-1, 3]
    H, Y, G = shifted(A, h * stride), shifted(A, job.Y * stride), shifted(A, row * stride)
    dH = shifted(A, dH_of(job, layers, len(layers) - 1) * stride)
    call(job.output_product, (H, Y, dH, G, n_out, stride, m))
    multiply_by_row(G, shifted(A, job.weights * stride), n_out, stride, m)


# Down, for the Hessian ---------------------------------------------------------------------------


@compiled
def changes_of_deltas(job, layers, l, A, stride, n, m):
    """D_l, and dD_l of equation (V3); 0 behind the last sample."""
    n_out, d = layers[l, 2], layers[l, 4]
    D, dD = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
    G, dG = shifted(A, job.G * stride), shifted(A, dG_of(job, layers) * stride)
    products_with_change(D, dD, G, dG, n_out, stride, m)
    fill(shifted(D, n), type(A[0])(0), n_out, stride, m - n)
    fill(shifted(dD, n), type(A[0])(0), n_out, stride, m - n)


@compiled
def products_with_change(F, dF, G, dG, n_rows, stride, m):
    """G F in place of F, and its change in place of dF."""
    n_rows, m = shape(n_rows, stride, m)
    for row in range(n_rows):
        for t in range(at(row * stride), at(row * stride + m)):
            dF[t] = dG[t] * F[t] + G[t] * dF[t]
            F[t] *= G[t]


@compiled
def changes_of_weight_grads(job, layers, l, A, stride, n, m, sums):
    """Equations (V5) and (V6), added to sums."""
    _, n_in, n_out, h, d, place, _, _ = layers[l]
    D, dD = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
    dW, H = shifted(sums, place), shifted(A, (h - n_in) * stride)
    add_products(job, A, dD, n_out, H, n_in, stride, n, m, dW)
    if l > 0:
        dH = shifted(A, dH_of(job, layers, l - 1) * stride)
        add_products(job, A, D, n_out, dH, n_in, stride, n, m, dW)
    add_row_sums(dD, n_out, stride, m, shifted(dW, n_out * n_in))


@compiled
def changes_below(job, layers, l, V, A, stride, m):
    """DG_{l-1} = W_lᵀ dD_l + V_lᵀ D_l, equation (V4)."""
    _, n_in, n_out, _, d, _, W, _ = layers[l]
    D, dD = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
    dG = shifted(A, dG_of(job, layers) * stride)
    down(job, NOTHING, dG, pointer(A, W), dD, n_out, n_in, stride, m)
    down(job, ITSELF, dG, pointer(A, V), D, n_out, n_in, stride, m)

"""Products of vectors with a net's matrices, compiled: the equations of tangents.py over tiles.

Behind what every tile has lie, from `job.more` on, with a row per unit of layers 1 to L each,

    dH_1, ..., dH_L                before that dZ_l
    dD_1, ..., dD_L                before that f''_l(Z_l) ∘ dZ_l; for the Hessian alone
    dG                             likewise, of the layer at work

The Gauss-Newton and the Fisher product go down as a gradient does, begun with G_L = A dH_L.
"""

from collections.abc import Callable

import numpy as np
from numba import carray

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled import curvatures
from mlp_backprop.engines.compiled.engine import by_layer
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import as_compiled, job_at, layers_of
from mlp_backprop.engines.compiled.kernels import load_rows
from mlp_backprop.engines.compiled.layout import stride_for, whole_vectors
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import COLUMN, ITSELF, NOTHING
from mlp_backprop.engines.compiled.rows import (
    ACTIVATIONS,
    at,
    fill,
    multiply,
    multiply_by_row,
    row_sum,
    shape,
)
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    add_products,
    deltas,
    grads_below,
    load,
    output_grads,
    store,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import VECTOR_BYTES, call, lanes, pointer, shifted
from mlp_backprop.maths.tangents import Kind
from mlp_backprop.types import Array, DType, Layer, n_params

# How often a row of X meets every weight: three times for each product of two matrices below.
HESSIAN_PRODUCTS, GAUSS_NEWTON_PRODUCTS, JACOBIAN_PRODUCTS = 8, 5, 3


def product_sums(
    spec: Spec,
    kind: Kind,
    params: list[Layer],
    v: list[Layer],
    X: Array,
    y: Array,
    weight: Array | None,
) -> list[Layer]:
    """The matrix of this kind, summed over samples, times v; in float64."""
    units = sum(spec.sizes[1:])
    widest = max(*spec.sizes, spec.sizes[-1] + 3)  # three: softmax works there
    which = curvatures.number(spec.loss.name, is_fisher=kind.name == "fisher")
    sums = run_along(
        product_pass,
        spec,
        params,
        v,
        X,
        y,
        weight,
        products=HESSIAN_PRODUCTS if kind.is_hessian else GAUSS_NEWTON_PRODUCTS,
        n_sums=n_params(spec.sizes),
        more_rows=2 * units + widest if kind.is_hessian else units,
        bends=bends(spec) if kind.is_hessian else 0,
        output_product=address(spec.dtype, "output_product", which),
    )
    return by_layer(sums, spec.sizes)


def jacobian_product(spec: Spec, params: list[Layer], v: list[Layer], X: Array) -> Array:
    """J v = dH_L (n, d_L)."""
    out = np.empty((len(X), spec.sizes[-1]), spec.dtype)
    more = {"products": JACOBIAN_PRODUCTS, "more_rows": sum(spec.sizes[1:])}
    run_along(jacobian_product_pass, spec, params, v, X, **more, changes=out)
    return out


def run_along(
    make: Callable[..., object],
    spec: Spec,
    params: list[Layer],
    v: list[Layer],
    X: Array,
    y: Array | None = None,
    weight: Array | None = None,
    **more: int | Array,
) -> Array:
    """As `run`, with a vector."""
    own = [Layer(as_compiled(V), as_compiled(c)) for V, c in v]  # which have to live until the end
    vector = np.array([(V.ctypes.data, c.ctypes.data) for V, c in own], np.int64)
    return run(make, spec, params, X, y, weight, vector=vector, **more)


def bends(spec: Spec) -> Array:
    """Where the parts are that give every layer f, f' and f''."""
    numbers = [ACTIVATIONS.index(row.name) for row in spec.activations]
    return np.array([address(spec.dtype, "activation2", k) for k in numbers], np.int64)


def product_pass(sources: int, real: DType) -> Callable[[int, int, int], int]:
    """Fill the sums of a chunk. Returns whether all labels are classes."""

    def product_pass(address, chunk, worker):
        _ = sources
        job = job_at(address)
        layers, vector = layers_of(job), vector_of(job)
        A = pointer(real, job.workspaces + worker * job.workspace_bytes)
        sums = pointer(np.float64, job.sums + 8 * chunk * job.n_sums)
        fill(sums, 0.0, ONE, job.n_sums, job.n_sums)
        known = True
        begin = chunk * job.chunk_rows
        end = min(begin + job.chunk_rows, job.n)
        for start in range(begin, end, job.tile_rows):
            known &= add_tile(job, layers, vector, A, start, min(job.tile_rows, end - start), sums)
        return known

    return product_pass


@compiled
def add_tile(job, layers, vector, A, start, n, sums):
    """Add the sums over n rows from `start` on."""
    m = whole_vectors(n, lanes(A))
    stride = stride_for(m, lanes(A))
    known = load_rows(job, layers, A, stride, start, n, m)
    forward_along(job, layers, vector, A, stride, m)
    if job.bends:
        output_changes(job, layers, A, dG_of(job, layers), stride, m)
        output_grads(job, layers, A, stride, m)
    else:
        output_changes(job, layers, A, job.G, stride, m)
    for l in range(len(layers) - 1, -1, -1):
        if job.bends:
            changes_of_deltas(job, layers, l, A, stride, n, m)
            changes_of_weight_grads(job, layers, l, A, stride, n, m, sums)
            if l > 0:
                changes_below(job, layers, l, vector[l, 0], A, stride, m)
        else:
            deltas(job, layers[l], A, stride, n, m)
            weight_grads(job, layers[l], A, stride, n, m, sums)
        if l > 0:
            grads_below(job, layers[l], A, stride, m)
    return known


def jacobian_product_pass(sources: int, real: DType) -> Callable[[int, int, int], int]:
    """Fill the rows of a chunk."""

    def jacobian_product_pass(address, chunk, worker):
        _ = sources
        job = job_at(address)
        layers, vector = layers_of(job), vector_of(job)
        A = pointer(real, job.workspaces + worker * job.workspace_bytes)
        n_out, number = layers[-1, 2], VECTOR_BYTES // lanes(A)
        begin = chunk * job.chunk_rows
        end = min(begin + job.chunk_rows, job.n)
        for start in range(begin, end, job.tile_rows):
            n = min(job.tile_rows, end - start)
            m = whole_vectors(n, lanes(A))
            stride = stride_for(m, lanes(A))
            X = job.X + start * job.X_row
            load(A, stride, m, X, job.X_row, job.X_column, n, layers[0, 1])
            forward_along(job, layers, vector, A, stride, m)
            dH = shifted(A, dH_of(job, layers, len(layers) - 1) * stride)
            store(pointer(A, job.changes + start * n_out * number), n_out, dH, stride, n, n_out)
        return True

    return jacobian_product_pass


# Where things are --------------------------------------------------------------------------------


@compiled
def vector_of(job):
    return carray(pointer(np.int64, job.vector), (job.n_layers, 2))


@compiled
def dH_of(job, layers, l):
    """The first row of dH_l; that of dD_l is by `units` further on, and then comes dG."""
    return job.more + layers[l, 4] - layers[0, 4]


@compiled
def units(layers):
    return layers[-1, 4] + layers[-1, 2] - layers[0, 4]


@compiled
def dG_of(job, layers):
    return job.more + 2 * units(layers)


# Up ----------------------------------------------------------------------------------------------


@compiled
def forward_along(job, layers, vector, A, stride, m):
    """(V1) and (V2): every H_l and dH_l, with f'_l(Z_l) and f''_l(Z_l) ∘ dZ_l."""
    bends = pointer(np.int64, job.bends)
    for l in range(len(layers)):
        activation, n_in, n_out, h, d, _, W, b = layers[l]
        H, below, F = (
            shifted(A, h * stride),
            shifted(A, (h - n_in) * stride),
            shifted(A, d * stride),
        )
        dH = shifted(A, dH_of(job, layers, l) * stride)
        W_l, b_l = pointer(A, W), pointer(A, b)
        V_l, c_l = pointer(A, vector[l, 0]), pointer(A, vector[l, 1])
        call(job.product, (COLUMN, b_l, H, stride, W_l, n_in, 1, below, stride, n_out, n_in, m))
        call(job.product, (COLUMN, c_l, dH, stride, V_l, n_in, 1, below, stride, n_out, n_in, m))
        if l > 0:
            dH_below = shifted(A, dH_of(job, layers, l - 1) * stride)
            call(
                job.product,
                (ITSELF, b_l, dH, stride, W_l, n_in, 1, dH_below, stride, n_out, n_in, m),
            )
        if job.bends:
            S = shifted(dH, units(layers) * stride)
            call(bends[l], (H, F, S, n_out, stride, m))
            multiply(S, dH, n_out, stride, m)
        else:
            call(activation, (H, F, n_out, stride, m))
        multiply(dH, F, n_out, stride, m)


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
    D, dD = shifted(A, d * stride), shifted(A, (dH_of(job, layers, l) + units(layers)) * stride)
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
    D, dD = shifted(A, d * stride), shifted(A, (dH_of(job, layers, l) + units(layers)) * stride)
    dW, H = shifted(sums, place), shifted(A, (h - n_in) * stride)
    add_products(job, A, dD, n_out, H, n_in, stride, n, m, dW)
    if l > 0:
        dH = shifted(A, dH_of(job, layers, l - 1) * stride)
        add_products(job, A, D, n_out, dH, n_in, stride, n, m, dW)
    for o in range(n_out):
        sums[place + n_out * n_in + o] += row_sum(shifted(dD, o * stride), m)


@compiled
def changes_below(job, layers, l, V, A, stride, m):
    """DG_{l-1} = W_lᵀ dD_l + V_lᵀ D_l, equation (V4)."""
    _, n_in, n_out, _, d, _, W, _ = layers[l]
    D, dD = shifted(A, d * stride), shifted(A, (dH_of(job, layers, l) + units(layers)) * stride)
    dG, W_l, V_l = shifted(A, dG_of(job, layers) * stride), pointer(A, W), pointer(A, V)
    call(job.product, (NOTHING, dG, dG, stride, W_l, 1, n_in, dD, stride, n_in, n_out, m))
    call(job.product, (ITSELF, dG, dG, stride, V_l, 1, n_in, D, stride, n_in, n_out, m))

"""Derivatives with respect to inputs, compiled: the passes of maths/jets.py over tiles of rows."""

from collections.abc import Callable

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import job_at, layers_of
from mlp_backprop.engines.compiled.layout import stride_for, whole_vectors
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import NOTHING
from mlp_backprop.engines.compiled.rows import multiply
from mlp_backprop.engines.compiled.tiles import forward, load, store
from mlp_backprop.engines.compiled.vectors import VECTOR_BYTES, call, lanes, pointer, shifted
from mlp_backprop.types import Array, DType, Layer


def jacobian(spec: Spec, params: list[Layer], X: Array) -> Array:
    """dH_L/dX (n, d_L, d_0)."""
    n_in, n_out = spec.sizes[0], spec.sizes[-1]
    out = np.empty((len(X), n_out, n_in), spec.dtype)
    run(jacobian_pass, spec, params, X, products=1 + n_out, more_rows=max(spec.sizes), out=out)
    return out


# A backward sweep for each output ----------------------------------------------------------------


def jacobian_pass(sources: int, real: DType) -> Callable[[int, int, int], int]:
    """Fill the rows of a chunk."""

    def jacobian_pass(address, chunk, worker):
        _ = sources
        job = job_at(address)
        layers = layers_of(job)
        A = pointer(real, job.workspaces + worker * job.workspace_bytes)
        begin = chunk * job.chunk_rows
        end = min(begin + job.chunk_rows, job.n)
        for start in range(begin, end, job.tile_rows):
            jacobian_tile(job, layers, A, start, min(job.tile_rows, end - start))
        return True

    return jacobian_pass


@compiled
def jacobian_tile(job, layers, A, start, n):
    """The Jacobians of n rows from `start` on."""
    m = whole_vectors(n, lanes(A))
    stride = stride_for(m, lanes(A))
    n_in, n_out = layers[0, 1], layers[-1, 2]
    load(A, stride, m, job.X + start * job.X_row, job.X_row, job.X_column, n, n_in)
    forward(job, layers, A, stride, m)
    number = VECTOR_BYTES // lanes(A)
    for o in range(n_out):
        G = slopes_of_output(job, layers, A, o, stride, m)
        store(job.out + (start * n_out + o) * n_in * number, n_out * n_in, G, stride, n, n_in)


@compiled
def slopes_of_output(job, layers, A, o, stride, m):
    """G_0 = dH_L[o]/dX: equation (3) from a unit vector on. The slopes in the rows of D_l stay."""
    G, below = shifted(A, job.G * stride), shifted(A, job.more * stride)
    _, n_in, n_out, _, d, _, W, _ = layers[-1]
    # D_L is one row, f'_L(Z_L) of this output.
    D, W_o = shifted(A, (d + o) * stride), shifted(pointer(A, W), o * n_in)
    call(job.product, (NOTHING, G, G, stride, W_o, 1, n_in, D, stride, n_in, 1, m))
    for l in range(len(layers) - 2, -1, -1):
        _, n_in, n_out, _, d, _, W, _ = layers[l]
        multiply(G, shifted(A, d * stride), n_out, stride, m)
        W_l = pointer(A, W)
        call(job.product, (NOTHING, below, below, stride, W_l, 1, n_in, G, stride, n_in, n_out, m))
        G, below = below, G
    return G

"""Gradients of losses of outputs, slopes and Laplacians, compiled: (I1) to (I9) of maths/jets.py.

A tile has everything of the way up in place when the way down begins. In the rows of a tile behind
`more`, with N = d_1 + ... + d_L:

    f''_l, and with a Laplacian f\'\'\'_l    N rows each
    V_k                                  K d_0
    of each layer Zt_k, Zs, Ht_k, Hs     2 (K + S) d_l, where S is 1 with a Laplacian, else 0
    G, Gt_k, Gs of the layer at work     (1 + K + S) times as many as the widest has
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.engine import by_layer
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jets import jets, outputs_and_slopes
from mlp_backprop.engines.compiled.jobs import higher
from mlp_backprop.engines.compiled.kernels import load_inputs, of_tiles
from mlp_backprop.engines.compiled.layout import LEAST_ROWS
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import NOTHING
from mlp_backprop.engines.compiled.rows import fill
from mlp_backprop.engines.compiled.tiles import (
    add_products,
    add_row_sums,
    down,
    extent,
    forward_higher,
    load,
    more_of,
    n_units,
    up,
)
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.types import Array, Layer, Layers, n_params

__all__ = ["has_room", "jet_grad_sums", "jets", "outputs_and_slopes", "slope_grad_sums"]

TILE_BYTES = 1 << 26  # of the smallest tile: with more directions, blocks of fewer rows are better


def has_room(spec: Spec, K: int) -> bool:
    """Whether a tile with so many directions is of a reasonable size."""
    return _more_rows(spec, K, 1) * LEAST_ROWS * np.dtype(spec.dtype).itemsize <= TILE_BYTES


def _more_rows(spec: Spec, K: int, S: int) -> int:
    hidden, widest = sum(spec.sizes[1:]), max(spec.sizes)
    return (1 + S + 2 * (K + S)) * hidden + K * spec.sizes[0] + (1 + K + S) * widest


def slope_grad_sums(spec: Spec, params: Layers, X: Array, G: Array, GJ: Array) -> list[Layer]:
    """Summed gradients, given dE/dH_L (n, d_L) and the derivative by dH_L/dX (n, d_L, d_0)."""
    n_in, n_out = spec.sizes[0], spec.sizes[-1]
    if n_out >= n_in:
        return jet_grad_sums(spec, params, X, G, GJ)
    # Tangents along GJ[o], as _sobolev_sums of derivatives/residuals.py has it.
    V, Gt = GJ.transpose(1, 0, 2), _units(n_out, spec, len(X))
    return _sums(spec, params, X, G, V, Gt)


def jet_grad_sums(
    spec: Spec,
    params: Layers,
    X: Array,
    G: Array,
    GJ: Array,
    Gs: Array | None = None,
    columns: Sequence[int] = (),
) -> list[Layer]:
    """The same with the derivative by a Laplacian over these columns of X too, if it is given."""
    V = _units(spec.sizes[0], spec, len(X))
    return _sums(spec, params, X, G, V, GJ.transpose(2, 0, 1), Gs, columns)


def _units(size: int, spec: Spec, n: int) -> Array:
    """Unit vectors (K, n, K), the same for all rows."""
    return np.broadcast_to(np.eye(size, dtype=spec.dtype)[:, None, :], (size, n, size))


def _sums(
    spec: Spec,
    params: Layers,
    X: Array,
    G: Array,
    V: Array,
    Gt: Array,
    Gs: Array | None = None,
    columns: Sequence[int] = (),
) -> list[Layer]:
    K, S = len(V), 0 if Gs is None else 1
    arrays = {"GY": G, "V": V, "Gt": Gt} | ({} if Gs is None else {"Gs": Gs})
    sums = run(
        jet_grads_tile,
        spec._replace(reduction="sum"),
        params,
        X,
        products=3 * (1 + K + S),
        n_sums=n_params(spec.sizes),
        more_rows=_more_rows(spec, K, S),
        K=K,
        S=S,
        c=np.array([k in columns for k in range(K)], np.int64),
        higher=higher(spec, "activation3" if S else "activation2"),
        jet_up=address(spec.dtype, "jet_up"),
        jet_down=address(spec.dtype, "jet_down"),
        **arrays,
        **_strides(arrays),
    )
    return by_layer(sums, spec.sizes)


def _strides(arrays: dict[str, Array]) -> dict[str, Any]:
    """In bytes, by name."""
    names = ("k", "row", "column")
    return {
        f"{array}_{name}": stride
        for array, A in arrays.items()
        for name, stride in zip(names[-A.ndim :], A.strides, strict=True)
    }


# The pass ----------------------------------------------------------------------------------------


@of_tiles
def jet_grads_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    load_directions(job, layers, A, stride, start, n, m)
    forward_higher(job, layers, A, stride, m)
    for l in range(len(layers)):
        level_up(job, layers, l, A, stride, m)
    load_grads(job, layers, A, stride, start, n, m)
    for l in range(len(layers) - 1, -1, -1):
        level_down(job, layers, l, A, stride, n, m)
        add_level(job, layers, l, A, stride, n, m, sums)
        if l > 0:
            level_grads_below(job, layers, l, A, stride, m)


@compiled
def directions(job, layers):
    """The first row of V_1."""
    return job.more + (1 + job.S) * n_units(layers)


@compiled
def level(job, layers, l):
    """The first row of Zt_1 of a layer; of level -1, V_1 stands where Ht_1 would."""
    n_before = layers[l, 4] - layers[0, 4]
    return directions(job, layers) + job.K * layers[0, 1] + 2 * (job.K + job.S) * n_before


@compiled
def level_below(job, layers, l):
    """The first row of Ht_1 of the layer under this one."""
    if l == 0:
        return directions(job, layers)
    return level(job, layers, l - 1) + (job.K + job.S) * layers[l, 1]


@compiled
def grads(job, layers):
    """The first row of G."""
    n_levels = 2 * (job.K + job.S) * n_units(layers)
    return directions(job, layers) + job.K * layers[0, 1] + n_levels


@compiled
def load_directions(job, layers, A, stride, start, n, m):
    """V_k."""
    n_in, V = layers[0, 1], shifted(A, directions(job, layers) * stride)
    for k in range(job.K):
        address = job.V + k * job.V_k + start * job.V_row
        load(shifted(V, k * n_in * stride), stride, m, address, job.V_row, job.V_column, n, n_in)


@compiled
def load_grads(job, layers, A, stride, start, n, m):
    """G, Gt_k and Gs of the outputs; 0 behind the last sample."""
    n_out, G = layers[-1, 2], shifted(A, grads(job, layers) * stride)
    load(G, stride, m, job.GY + start * job.GY_row, job.GY_row, job.GY_column, n, n_out)
    for k in range(job.K):
        address = job.Gt + k * job.Gt_k + start * job.Gt_row
        to = shifted(G, (1 + k) * n_out * stride)
        load(to, stride, m, address, job.Gt_row, job.Gt_column, n, n_out)
    if job.S:
        to = shifted(G, (1 + job.K) * n_out * stride)
        load(to, stride, m, job.Gs + start * job.Gs_row, job.Gs_row, job.Gs_column, n, n_out)


@compiled
def level_up(job, layers, l, A, stride, m):
    """(I1) to (I4) for one layer."""
    _, n_in, n_out, _, d, _, W, _ = layers[l]
    K, S, W_l = job.K, job.S, pointer(A, W)
    Zt = shifted(A, level(job, layers, l) * stride)
    below = shifted(A, level_below(job, layers, l) * stride)
    Ht = shifted(Zt, (K + S) * n_out * stride)
    for k in range(K + S if l > 0 else K):
        Z, H = shifted(Zt, k * n_out * stride), shifted(below, k * n_in * stride)
        up(job, NOTHING, Z, Z, W_l, H, n_out, n_in, stride, m)
    if l == 0:
        fill(shifted(Zt, K * n_out * stride), type(A[0])(0), S * n_out, stride, m)
    F, F2 = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
    call(job.jet_up, (job.c, F, F2, Zt, Ht, K, S, n_out, stride, m))


@compiled
def level_down(job, layers, l, A, stride, n, m):
    """(I5) to (I7) for one layer; 0 behind the last sample."""
    n_out, d = layers[l, 2], layers[l, 4]
    F, F2 = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
    F3 = shifted(F2, n_units(layers) * stride)
    Zt, G = shifted(A, level(job, layers, l) * stride), shifted(A, grads(job, layers) * stride)
    call(job.jet_down, (job.c, F, F2, F3, Zt, G, job.K, job.S, n_out, stride, m))
    zero = type(A[0])(0)
    fill(shifted(F, n), zero, n_out, stride, m - n)
    fill(shifted(Zt, n), zero, (job.K + job.S) * n_out, stride, m - n)


@compiled
def add_level(job, layers, l, A, stride, n, m, sums):
    """(I8) for one layer."""
    _, n_in, n_out, h, d, place, _, _ = layers[l]
    D, H = shifted(A, d * stride), shifted(A, (h - n_in) * stride)
    Dt = shifted(A, level(job, layers, l) * stride)
    Ht = shifted(A, level_below(job, layers, l) * stride)
    dW = shifted(sums, place)
    add_products(job, A, D, n_out, H, n_in, stride, n, m, dW)
    for k in range(job.K + job.S if l > 0 else job.K):
        Dt_k, Ht_k = shifted(Dt, k * n_out * stride), shifted(Ht, k * n_in * stride)
        add_products(job, A, Dt_k, n_out, Ht_k, n_in, stride, n, m, dW)
    add_row_sums(D, n_out, stride, m, shifted(dW, n_out * n_in))


@compiled
def level_grads_below(job, layers, l, A, stride, m):
    """(I9): G, Gt_k and Gs of the layer under this one."""
    _, n_in, n_out, _, d, _, W, _ = layers[l]
    W_l, G = pointer(A, W), shifted(A, grads(job, layers) * stride)
    D, Dt = shifted(A, d * stride), shifted(A, level(job, layers, l) * stride)
    down(job, NOTHING, G, W_l, D, n_out, n_in, stride, m)
    for k in range(job.K + job.S):
        G_k, D_k = shifted(G, (1 + k) * n_in * stride), shifted(Dt, k * n_out * stride)
        down(job, NOTHING, G_k, W_l, D_k, n_out, n_in, stride, m)

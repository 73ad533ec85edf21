"""Derivatives with respect to inputs, compiled: the passes of maths/jets.py over tiles of rows.

Directions are unit vectors, and go up through the net in groups: as many as stay in cache beside
the tile. A group has K tangents and the S second derivatives that are formed of them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import carray

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import higher
from mlp_backprop.engines.compiled.kernels import load_inputs, of_tiles
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.passes import run
from mlp_backprop.engines.compiled.products import NOTHING
from mlp_backprop.engines.compiled.rows import fill, multiply
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    down,
    extent,
    forward,
    forward_higher,
    more_of,
    n_units,
    store,
    store_outputs,
    up,
)
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.types import Array, Layers

# Tangents, or pairs of columns, in a group.
MOST_TANGENTS, MOST_PAIRS = 8, 4
TRIPLE, GROUP = 3, 6  # numbers in a row of the tables of pairs and of groups


class Group(NamedTuple):
    """Columns that tangents are along, and triples (j, k, s): s is the sum of its d²/dx_j dx_k."""

    columns: Sequence[int]
    terms: Sequence[tuple[int, int, int]] = ()
    n_second: int = 0


def jacobian(spec: Spec, params: Layers, X: Array, **outputs: Array) -> Array:
    """dH_L/dX (n, d_L, d_0), and H_L into `outputs` if it is given."""
    n_in, n_out = spec.sizes[0], spec.sizes[-1]
    slopes = np.empty((len(X), n_out, n_in), spec.dtype)
    if n_in < n_out:
        run_jets(spec, params, X, groups_of(range(n_in)), slopes=slopes, **outputs)
    else:
        own: dict[str, Any] = {"products": 1 + n_out, "more_rows": max(spec.sizes)}
        run(jacobian_tile, spec, params, X, **own, slopes=slopes, **outputs)
    return slopes


def laplacian(spec: Spec, params: Layers, X: Array, columns: Sequence[int]) -> Array:
    """The sum of the second derivatives by these columns (n, d_L)."""
    groups = [Group(c, [(k, k, 0) for k in c], 1) for c in _batches(columns, MOST_TANGENTS)]
    second = _second(spec, params, X, groups)
    return np.sum(second, axis=2) if len(groups) != 1 else second[:, :, 0]


def hessian_diag(spec: Spec, params: Layers, X: Array) -> Array:
    """The second derivatives by every column (n, d_L, d_0)."""
    return hessian_entries(spec, params, X, [(k, k) for k in range(spec.sizes[0])])


def hessian_entries(
    spec: Spec, params: Layers, X: Array, pairs: Sequence[tuple[int, int]]
) -> Array:
    """The second derivatives by these pairs of columns (n, d_L, P)."""
    groups = [
        Group(sorted({*sum(some, ())}), [(*pair, s) for s, pair in enumerate(some)], len(some))
        for some in _batches(pairs, MOST_PAIRS)
    ]
    return _second(spec, params, X, groups)


def _second(spec: Spec, params: Layers, X: Array, groups: list[Group]) -> Array:
    second = np.empty((len(X), spec.sizes[-1], sum(g.n_second for g in groups)), spec.dtype)
    run_jets(spec, params, X, groups, second=second)
    return second


def outputs_and_slopes(spec: Spec, params: Layers, X: Array) -> tuple[Array, Array]:
    """H_L (n, d_L) and dH_L/dX (n, d_L, d_0)."""
    outputs = np.empty((len(X), spec.sizes[-1]), spec.dtype)
    return outputs, jacobian(spec, params, X, outputs=outputs)


def jets(
    spec: Spec, params: Layers, X: Array, columns: Sequence[int]
) -> tuple[Array, Array, Array]:
    """H_L (n, d_L), dH_L/dX (n, d_L, d_0) and the sum of second derivatives by these columns."""
    n, n_in, n_out = len(X), spec.sizes[0], spec.sizes[-1]
    groups = [
        Group(some, [(k, k, 0) for k in some if k in columns], 1)
        for some in _batches(range(n_in), MOST_TANGENTS)
    ]
    shapes = {"outputs": (), "slopes": (n_in,), "second": (len(groups),)}
    arrays = {name: np.empty((n, n_out, *more), spec.dtype) for name, more in shapes.items()}
    run_jets(spec, params, X, groups, **arrays)
    Y, J, second = arrays.values()
    return Y, J, np.sum(second, axis=2)


def groups_of(columns: Sequence[int]) -> list[Group]:
    """Tangents alone."""
    return [Group(some) for some in _batches(columns, MOST_TANGENTS)]


def _batches(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[k : k + size] for k in range(0, len(items), size)]


def run_jets(spec: Spec, params: Layers, X: Array, groups: list[Group], **outputs: Array) -> None:
    """Fill outputs, slopes and second, those that are given, in the order of the groups."""
    columns: list[int] = []
    pairs: list[tuple[int, int, int]] = []
    table, n_second = [], 0
    for group in groups:
        place = {column: k for k, column in enumerate(group.columns)}
        row = len(pairs), len(group.terms), len(columns), len(place), n_second, group.n_second
        table.append(row)
        pairs += [(place[j], place[k], s) for j, k, s in group.terms]
        columns += group.columns
        n_second += group.n_second
    arrays = [len(group.columns) + group.n_second for group in groups]
    block_rows, hidden = max(arrays, default=0) * max(spec.sizes[1:]), sum(spec.sizes[1:])
    run(
        jets_tile,
        spec,
        params,
        X,
        products=1 + sum(arrays),
        more_rows=hidden + 2 * block_rows,
        block_rows=block_rows,
        higher=higher(spec, "activation2") if n_second else 0,
        jet=address(spec.dtype, "jet"),
        columns=np.array(columns, np.int64),
        pairs=np.array(pairs, np.int64),
        groups=np.array(table, np.int64),
        n_groups=len(table),
        n_second=n_second,
        **outputs,
    )


# A backward sweep for each output ----------------------------------------------------------------


@of_tiles
def jacobian_tile(job, layers, A, start, n, sums):
    m, stride = extent(A, n)
    n_in, n_out = layers[0, 1], layers[-1, 2]
    load_inputs(job, layers, A, stride, start, n, m)
    forward(job, layers, A, stride, m)
    if job.outputs:
        store_outputs(job, layers, A, stride, start, n)
    slopes = shifted(pointer(A, job.slopes), start * n_out * n_in)
    for o in range(n_out):
        G = slopes_of_output(job, layers, A, o, stride, m)
        store(shifted(slopes, o * n_in), n_out * n_in, G, stride, n, n_in)


@compiled
def slopes_of_output(job, layers, A, o, stride, m):
    """G_0 = dH_L[o]/dX: equation (3) from a unit vector on. The slopes in the rows of D_l stay."""
    G, below = shifted(A, job.G * stride), shifted(A, job.more * stride)
    _, n_in, n_out, _, d, _, W, _ = layers[-1]
    # D_L is one row, f'_L(Z_L) of this output.
    D, W_o = shifted(A, (d + o) * stride), shifted(pointer(A, W), o * n_in)
    down(job, NOTHING, G, W_o, D, ONE, n_in, stride, m)
    for l in range(len(layers) - 2, -1, -1):
        _, n_in, n_out, _, d, _, W, _ = layers[l]
        multiply(G, shifted(A, d * stride), n_out, stride, m)
        down(job, NOTHING, below, pointer(A, W), G, n_out, n_in, stride, m)
        G, below = below, G
    return G


# Directions from the inputs up -------------------------------------------------------------------


@of_tiles
def jets_tile(job, layers, A, start, n, sums):
    """Group by group."""
    m, stride = extent(A, n)
    load_inputs(job, layers, A, stride, start, n, m)
    fill(shifted(A, job.weights * stride), type(A[0])(1), ONE, m, m)
    if job.higher:
        forward_higher(job, layers, A, stride, m)
    else:
        forward(job, layers, A, stride, m)
    if job.outputs:
        store_outputs(job, layers, A, stride, start, n)
    groups = carray(pointer(np.int64, job.groups), (job.n_groups, GROUP))
    for g in range(job.n_groups):
        Ht = jets_of_group(job, layers, A, groups[g], stride, m)
        store_group(job, layers, A, groups[g], Ht, start, stride, n)


@compiled
def store_group(job, layers, A, group, Ht, start, stride, n):
    """The K arrays Ht_L and the S arrays Hs_L behind them, to slopes and second."""
    _, _, column, K, s, S = group
    n_in, n_out, n_second = layers[0, 1], layers[-1, 2], job.n_second
    Hs, step = shifted(Ht, K * n_out * stride), n_out * stride
    for o in range(n_out):
        i = start * n_out + o
        if job.slopes:
            to = shifted(pointer(A, job.slopes), i * n_in + column)
            store(to, n_out * n_in, shifted(Ht, o * stride), step, n, K)
        if job.second:
            to = shifted(pointer(A, job.second), i * n_second + s)
            store(to, n_out * n_second, shifted(Hs, o * stride), step, n, S)


@compiled
def jets_of_group(job, layers, A, group, stride, m):
    """(I1) to (I4): where the K arrays Ht_L and the S arrays Hs_L of this group begin."""
    pair, n_pairs, column, K, _, S = group
    pairs, columns = job.pairs + 8 * TRIPLE * pair, pointer(np.int64, job.columns + 8 * column)
    n_out, T = layers[0, 2], shifted(A, (job.more + n_units(layers)) * stride)  # behind f''
    below = shifted(T, job.block_rows * stride)
    first_tangents(job, layers[0], A, columns, T, K, stride, m)
    fill(shifted(T, K * n_out * stride), type(A[0])(0), S * n_out, stride, m)
    for l in range(len(layers)):
        _, n_in, n_out, _, d, _, W, _ = layers[l]
        W_l = pointer(A, W)
        if l > 0:
            T, below = below, T
            for k in range(K + S):
                Z, H = shifted(T, k * n_out * stride), shifted(below, k * n_in * stride)
                up(job, NOTHING, Z, Z, W_l, H, n_out, n_in, stride, m)
        F, F2 = shifted(A, d * stride), shifted(A, more_of(job, layers, l) * stride)
        call(job.jet, (pairs, n_pairs, F, F2, T, K, S, n_out, stride, m))
    return T


@compiled
def first_tangents(job, layer, A, columns, T, K, stride, m):
    """Zt_1 along unit vectors: columns of W_1, the same for all rows of X."""
    _, n_in, n_out, _, _, _, W, _ = layer
    ones = shifted(A, job.weights * stride)
    for k in range(K):
        Z, W_k = shifted(T, k * n_out * stride), shifted(pointer(A, W), columns[k])
        call(job.product, (NOTHING, Z, Z, stride, W_k, n_in, 1, ones, stride, n_out, 1, m))

"""Derivatives with respect to inputs, propagated forward beside the outputs, and their adjoint.

When the inputs move along directions V_k, k = 1, ..., K, every array of the net has a tangent
along each, t, and second derivatives, s. On the Z_l and H_l of backprop.forward:

    Ht_0 = V,  Hs_0 = 0                                 (K, n, d_0)
    Zt_l = Ht_{l-1} W_lᵀ                                (K, n, d_l)  (I1)
    Ht_l = f'_l(Z_l) ∘ Zt_l                             (K, n, d_l)  (I2)
    Zs_l = Hs_{l-1} W_lᵀ                                (..., d_l)   (I3)
    Hs_l = f'_l(Z_l) ∘ Zs_l + f''_l(Z_l) ∘ q(Zt_l)      (..., d_l)   (I4)

The square q says which second derivatives: Zt_i ∘ Zt_j for entries (i, j) of a Hessian, one per
pair, or their sum Σ_k Zt_k ∘ Zt_k for a Laplacian, which is thus carried as one array.

A loss E of outputs, tangents and Laplacian sends back G = dE/dH_L, Gt = dE/dHt_L and
Gs = dE/dHs_L. With D, Dt, Ds for the same with respect to Z_l, Zt_l, Zs_l, and q = Σ_k c_k Zt_k²:

    D    = G ∘ f' + (Σ_k Gt_k ∘ Zt_k + Gs ∘ Zs) ∘ f'' + Gs ∘ q ∘ f'''              (I5)
    Dt_k = Gt_k ∘ f' + 2 c_k Gs ∘ f'' ∘ Zt_k                                       (I6)
    Ds   = Gs ∘ f'                                                                 (I7)
    dE/dW_l = Dᵀ H_{l-1} + Σ_k Dt_kᵀ Ht_{k,l-1} + Dsᵀ Hs_{l-1},   dE/db_l = Dᵀ 1   (I8)
    G, Gt, Gs of layer l-1 = D W_l, Dt W_l, Ds W_l                                 (I9)

docs/inputs.md derives them. (I4) for a Laplacian is that of R. Li et al., "Forward
Laplacian: a new computational framework for neural network-based variational Monte Carlo",
arXiv 2307.08214 (2023). A direction that all rows share is kept once, with a row axis of length 1.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from mlp_backprop import backprop
from mlp_backprop.activations import Activation
from mlp_backprop.backprop import Spec
from mlp_backprop.types import Array, Layer, Layers, Namespace

Square = Callable[[Array], Array]


class Level(NamedTuple):
    """The derivatives of one layer; of the inputs themselves, for level 0."""

    Zt: Array
    Ht: Array
    Zs: Array = None  # None: zero, or not asked for
    Hs: Array = None


def basis(xp: Namespace, size: int, X: Array, which: Sequence[int] | None = None) -> Array:
    """Unit vectors as directions that all rows share, (K, 1, size); `which` of them, or all."""
    rows = xp.eye(size, dtype=X.dtype, device=X.device)
    if which is not None:
        rows = xp.take(rows, indices(xp, which, X), axis=0)
    return rows[:, None, :]


def indices(xp: Namespace, which: Sequence[int], X: Array) -> Array:
    return xp.asarray(list(which), dtype=xp.int64, device=X.device)


def levels(
    spec: Spec, params: Layers, Z: list[Array], H: list[Array], V: Array, q: Square | None = None
) -> Iterator[Level]:
    """Yield the derivatives of layers 0, ..., L; tangents alone without q. (I1) to (I4)."""
    xp, level = spec.xp, Level(V, V)
    yield level
    for l, ((W, _), row) in enumerate(zip(params, spec.activations, strict=True), 1):
        dF = row.df(xp, Z[l], H[l])
        Zt, Zs, Hs = level.Ht @ W.T, None, None
        if q is not None:
            Hs = row.d2f(xp, Z[l], H[l]) * q(Zt)
            if level.Hs is not None:
                Zs = level.Hs @ W.T
                Hs = Hs + dF * Zs
        level = Level(Zt, dF * Zt, Zs, Hs)
        yield level


def laplacian_square(xp: Namespace, Zt: Array, c: Array | None = None) -> Array:
    """Σ_k c_k Zt_k², with c of shape (K, 1, 1) or all 1."""
    return xp.sum(scaled(Zt, c) * Zt, axis=0)


def scaled(Zt: Array, c: Array | None) -> Array:
    return Zt if c is None else c * Zt


def input_jacobian(spec: Spec, params: Layers, Z: list[Array], H: list[Array]) -> Array:
    """dH_L/dX (d_L, n, d_0), by one backward sweep for all outputs."""
    above, G = params, basis(spec.xp, H[-1].shape[1], X=H[-1])
    if len(params) > 1 and spec.activations[-1].name == "identity":
        above, G = params[:-1], params[-1].W[:, None, :]  # the first step of the sweep, for free
    *_, (_, D) = backprop.backward(spec, above, Z, H, G)
    return D @ params[0].W


def grad_sums(
    spec: Spec,
    params: Layers,
    Z: list[Array],
    H: list[Array],
    tape: list[Level],
    G: Array,
    Gt: Array,
    Gs: Array = None,
    c: Array | None = None,
) -> Layers:
    """The gradient of every layer from the levels of the forward pass, (I5) to (I9).

    Without Gs the loss has no Laplacian in it, and the tape needs none.
    """
    grads = []
    for l in range(len(params), 0, -1):
        under = tape[l - 1]
        row = spec.activations[l - 1]
        D, Dt, Ds = deltas(spec.xp, row, Z[l], H[l], tape[l], G, Gt, Gs, c)
        W, b = backprop.layer_grad_sums(spec, D, H[l - 1])
        W = W + summed_product(spec, Dt, under.Ht)
        if Gs is not None and under.Hs is not None:
            W = W + summed_product(spec, Ds, under.Hs)
        grads.append(Layer(W, b))
        if l > 1:
            G, Gt, Gs = (A if A is None else downward(A, params[l - 1].W) for A in (D, Dt, Ds))
    return grads[::-1]


def deltas(
    xp: Namespace,
    row: Activation,
    Z: Array,
    H: Array,
    level: Level,
    G: Array,
    Gt: Array,
    Gs: Array,
    c: Array | None,
) -> tuple[Array, Array, Array]:
    """D, Dt and Ds of one layer, (I5) to (I7)."""
    dF, d2F = row.df(xp, Z, H), row.d2f(xp, Z, H)
    D, Dt, by_dF = G * dF, Gt * dF, xp.sum(Gt * level.Zt, axis=0)
    if Gs is None:
        return D + by_dF * d2F, Dt, None
    assert row.d3f is not None  # residual_grads refuses the others
    if level.Zs is not None:
        by_dF = by_dF + Gs * level.Zs
    by_d2F = Gs * laplacian_square(xp, level.Zt, c)
    D = D + by_dF * d2F + by_d2F * row.d3f(xp, Z, H)
    return D, Dt + 2 * (Gs * d2F) * scaled(level.Zt, c), Gs * dF


def downward(D: Array, W: Array) -> Array:
    """D W; of one output it is an outer product, at which BLAS is slow."""
    return D * W if W.shape[0] == 1 else D @ W


def summed_product(spec: Spec, A: Array, B: Array) -> Array:
    """Σ Aᵀ B over rows and directions, in the accumulator's dtype."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)
    if B.ndim == 3 and B.shape[1] == 1:  # the same for all rows
        A = xp.sum(A, axis=1, keepdims=True, dtype=wide)
    A, B = (xp.astype(C, wide, copy=False) for C in (A, B))
    return xp.reshape(A, (-1, A.shape[-1])).T @ xp.reshape(B, (-1, B.shape[-1]))

"""The Hessian block by block, from changes of single units; and the tangent kernel.

Row i of Z_l moves H_L[i] and nothing else, and a weight moves E only by way of its Z_l. So the
Hessian over all parameters follows from changes of single units. Let d_p be the derivative with
respect to entry p of every row of Z_l, that row's own; then as in tangents.py, without v,

    d_p Z_l = e_p                d_p Z_m = d_p H_{m-1} W_mᵀ  for m > l
    d_p H_m = f'_m ∘ d_p Z_m                                                         (V7)
    d_p D_m = d_p G_m ∘ f'_m + G_m ∘ f''_m ∘ d_p Z_m,    d_p G_{m-1} = d_p D_m W_m

begun with d_p G_L = A d_p H_L: as many as there are units, not weights. With 1 as the last entry
of every row of H, and d_p H_{l-1} = 0, the block of the Hessian for layers l <= m is

    d²E / dW_l[p, q] dW_m[r, s] =
        Σ_i H_{l-1}[i, q] (d_p D_m[i, r] H_{m-1}[i, s] + D_m[i, r] d_p H_{m-1}[i, s])  (V8)

a matrix product over the samples. The Gauss-Newton matrix is what is left where G and D are 0. The
other blocks are the transposes of these.

The tangent kernel is J Jᵀ. Row i of J has for output a the gradient of H_L[i, a], in layer l the
outer product of D_l[a, i], which begins with G_L = e_a, and H_{l-1}[i] with its 1. So

    K[i, a, j, b] = Σ_l <D_l[a, i], D_l[b, j]> (<H_{l-1}[i], H_{l-1}[j]> + 1)          (V9)

without a Jacobian. docs/products.md names the sources.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.maths.tangents import at_outputs
from mlp_backprop.types import Array, Layers, Namespace


class Tape(NamedTuple):
    """By layer, from 0 for layer 1: [H_{l-1} 1], f'_l, D_l and G_l ∘ f''_l; and H_L."""

    H_below: list[Array]
    F: list[Array]
    D: list[Array]
    S: list[Array]
    H_L: Array


def record(spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None) -> Tape:
    """What the blocks need of a forward and a backward pass."""
    xp = spec.xp
    Z, H = backprop.forward(spec, params, X)
    _, G = backprop.loss_and_output_grad(spec, H[-1], y, weight)
    F, D, S = [], [], []
    for l in range(len(params), 0, -1):
        F.append(spec.activations[l - 1].df(xp, Z[l], H[l]))
        S.append(G * spec.activations[l - 1].d2f(xp, Z[l], H[l]))
        D.append(G * F[-1])
        G = D[-1] @ params[l - 1].W
    H_below = [extended(spec, A, 1) for A in H[:-1]]
    return Tape(H_below, F[::-1], D[::-1], S[::-1], H[-1])


def extended(spec: Spec, A: Array, last: int) -> Array:
    """A with a number as the last entry of every row, in the accumulator's dtype."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)
    column = xp.full((*A.shape[:-1], 1), last, dtype=wide, device=A.device)
    return xp.concat([xp.astype(A, wide, copy=False), column], axis=-1)


def unit_changes(
    spec: Spec, params: Layers, tape: Tape, y: Array, weight: Array | None, l: int
) -> tuple[list[Array], list[Array]]:
    """(V7): d_p D_m (d_l, n, d_m) and [d_p H_{m-1} 0] for the layers m from l on, from 0."""
    xp, F = spec.xp, tape.F
    unit = xp.eye(F[l].shape[1], dtype=spec.dtype, device=F[l].device)
    dZ, dH = [unit[:, None, :]], [F[l] * unit[:, None, :]]
    for m in range(l + 1, len(params)):
        dZ.append(dH[-1] @ params[m].W.T)
        dH.append(F[m] * dZ[-1])
    dG = at_outputs(spec, spec.loss.hessian_product, tape.H_L, y, weight, dH[-1])
    dD = []
    for m in range(len(params) - 1, l - 1, -1):
        dD.append(dG * F[m] + tape.S[m] * dZ[m - l])
        dG = dD[-1] @ params[m].W
    return dD[::-1], [extended(spec, A, 0) for A in dH[:-1]]


def block(xp: Namespace, H_left: Array, dD: Array, H: Array, D: Array, dH: Array | None) -> Array:
    """(V8) for layers l <= m, as a matrix; dH is None where the second term is 0."""
    rows = []
    for p in range(dD.shape[0]):
        products = dD[p, :, :, None] * H[:, None, :]
        if dH is not None:
            products = products + D[:, :, None] * dH[p, :, None, :]
        size = products.shape[1] * products.shape[2]
        rows.append(H_left.T @ xp.reshape(products, (-1, size)))
    return xp.concat(rows, axis=0)


def blocks(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, gauss_newton: bool
) -> list[Array]:
    """The blocks (1, 1), (1, 2), ..., (2, 2), ...: entries of [W_l b_l] row by row."""
    tape = record(spec, params, X, y, weight)
    if gauss_newton:
        tape = tape._replace(S=[spec.xp.zeros_like(S) for S in tape.S])
    found = []
    for l in range(len(params)):
        dD, dH = unit_changes(spec, params, tape, y, weight, l)
        for m in range(l, len(params)):
            second = None if gauss_newton or m == l else dH[m - l - 1]
            H_l, H_m = tape.H_below[l], tape.H_below[m]
            found.append(block(spec.xp, H_l, dD[m - l], H_m, tape.D[m], second))
    return found


def output_deltas(spec: Spec, params: Layers, X: Array) -> Iterator[tuple[Array, Array]]:
    """For every layer D_l[a], begun with G_L = e_a, (d_L, n, d_l), and H_{l-1}."""
    Z, H = backprop.forward(spec, params, X)
    unit = spec.xp.eye(H[-1].shape[1], dtype=H[-1].dtype, device=H[-1].device)
    for l, D in backprop.backward(spec, params, Z, H, unit[:, None, :]):
        yield D, H[l - 1]


def kernel(spec: Spec, params: Layers, X1: Array, X2: Array) -> Array:
    """(V9): (n1, d_L, n2, d_L)."""
    xp, K = spec.xp, None
    deltas = output_deltas(spec, params, X1), output_deltas(spec, params, X2)
    for (D1, H1), (D2, H2) in zip(*deltas, strict=True):
        term = xp.tensordot(D1, D2, axes=([2], [2])) * (H1 @ H2.T + 1)[None, :, None, :]
        K = term if K is None else K + term
    return xp.permute_dims(K, (1, 0, 3, 2))

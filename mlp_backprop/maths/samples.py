"""Gradients of single samples: their factors, their norms, and sums of clipped ones.

Row i of every H_l and D_l depends on sample i alone. So the sums over samples in (1) and (2) of
backprop.py can be left out, measured or weighted, all after the same two sweeps. With W_l and b_l
side by side in one matrix, the gradient of sample i in layer l is an outer product:

    g_l[i]    = D_l[i]ᵀ [H_{l-1}[i] 1]           (d_l, d_{l-1} + 1)  (P1)
    |g_l|²    = |D_l|² ∘ (|H_{l-1}|² + 1)        (n,)                (P2)
    |g|²      = Σ_l |g_l|²                       (n,)                (P3)
    c         = min(1, max_norm / |g|)           (n,)                (P4)
    Σ_i c_i g_l[i] = (c ∘ D_l)ᵀ [H_{l-1} 1]      (d_l, d_{l-1} + 1)  (P5)

|A|² is the sum of squares of each row, and c multiplies rows. docs/per_sample.md derives (P1) to
(P5) and names their sources.
"""

from collections.abc import Iterable, Iterator

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.types import Array, Layer, Layers, Namespace

Factors = tuple[Array, Array]  # D_l and H_{l-1}


def sweep(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None
) -> tuple[Array, Iterator[Factors]]:
    """The weighted loss, and the factors of (P1) from the last layer to the first."""
    Z, H = backprop.forward(spec, params, X)
    values, G = backprop.loss_and_output_grad(spec, H[-1], y, weight)
    deltas = backprop.backward(spec, params, Z, H, G)
    return spec.xp.sum(values, axis=-1), ((D, H[l - 1]) for l, D in deltas)


def outer_product(xp: Namespace, D: Array, H_below: Array) -> Layer:
    """Equation (P1)."""
    if xp.__name__ == "numpy":  # einsum takes half the time of broadcasting over short rows
        return Layer(W=xp.einsum("ij,ik->ijk", D, H_below, order="C"), b=D)
    return Layer(W=D[:, :, None] * H_below[:, None, :], b=D)


def row_squares(xp: Namespace, A: Array) -> Array:
    """|A|²."""
    if xp.__name__ == "numpy":  # einsum takes a third of the time, and no memory for the squares
        return xp.einsum("...ij,...ij->...i", A, A)
    return xp.sum(A * A, axis=-1)


def squared_norms(spec: Spec, factors: Iterable[Factors]) -> list[Array]:
    """Equation (P2) for each pair of factors, in the accumulator's dtype."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)

    def squares(A: Array) -> Array:
        return row_squares(xp, xp.astype(A, wide, copy=False))

    return [squares(D) * (squares(H_below) + 1) for D, H_below in factors]


def clipped_sums(spec: Spec, factors: Iterable[Factors], max_norm: float) -> Layers:
    """Equations (P3) to (P5): the clipped gradients of every layer, summed over samples."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)
    factors = list(factors)[::-1]  # kept until the norms are known
    norms = xp.sqrt(sum(squared_norms(spec, factors)))
    # A norm of 0 keeps the factor 1; so does one of nan, for the sum to show it.
    c = xp.where(norms > max_norm, max_norm / norms, xp.ones_like(norms))[:, None]
    return [
        backprop.layer_grad_sums(spec, c * xp.astype(D, wide, copy=False), H_below)
        for D, H_below in factors
    ]

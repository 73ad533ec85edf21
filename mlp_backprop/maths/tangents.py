"""The changes of a net along a vector, and with them its matrices times that vector.

A vector v has the structure of the parameters, a pair (V_l, c_l) for each (W_l, b_l). Written dA is
the change of A as the parameters move along v, the derivative of A(params + t v) at t = 0 (the
R-operator of Pearlmutter). Differentiating the forward pass of backprop.py gives, with dH_0 = 0,

    dZ_l = H_{l-1} V_lᵀ + c_l + dH_{l-1} W_lᵀ                (n, d_l)        (V1)
    dH_l = f'_l(Z_l) ∘ dZ_l                                  (n, d_l)        (V2)

and J v = dH_L. Jᵀ u is the gradient of <u, H_L>: equations (1) to (3), begun with G_L = u.

G_l is dE/dH_l, so that D_l = G_l ∘ f'_l(Z_l) and G_{l-1} = D_l W_l, and A the Hessian of the loss
with respect to H_L, a matrix for each sample. Differentiating the backward pass gives, with
dG_L = A dH_L,

    dD_l     = dG_l ∘ f'_l(Z_l) + G_l ∘ f''_l(Z_l) ∘ dZ_l    (n, d_l)        (V3)
    dG_{l-1} = dD_l W_l + D_l V_l                            (n, d_{l-1})    (V4)
    d(dE/dW_l) = dD_lᵀ H_{l-1} + D_lᵀ dH_{l-1}               (d_l, d_{l-1})  (V5)
    d(dE/db_l) = dD_lᵀ 1                                     (d_l,)          (V6)

which is the Hessian times v. The Gauss-Newton product Jᵀ A J v is what is left where G_l and D_l
are 0: equations (1) to (3), begun with G_L = A J v. The Fisher product has the Fisher matrix of the
loss in place of A; losses.py derives it. docs/products.md names the sources.
"""

from collections.abc import Callable, Iterator
from operator import attrgetter
from typing import NamedTuple

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.losses import Loss
from mlp_backprop.types import Array, Layer, Layers, Namespace

OutputProduct = Callable[[Namespace, Array, Array, Array], Array]  # a column of LOSSES


class Kind(NamedTuple):
    """One row: a matrix over the parameters, by the loss's own at the outputs."""

    name: str
    at_outputs: Callable[[Loss], OutputProduct]
    is_hessian: bool  # G and D count


KINDS = {
    row.name: row
    for row in (
        Kind("hessian", attrgetter("hessian_product"), is_hessian=True),
        Kind("ggn", attrgetter("hessian_product"), is_hessian=False),
        Kind("fisher", attrgetter("fisher_product"), is_hessian=False),
    )
}


class Step(NamedTuple):
    """One layer on the way up: H_{l-1}, Z_l, H_l, f'_l(Z_l) and the changes along v."""

    H_below: Array
    dH_below: Array | None  # None for 0, below the first layer
    Z: Array
    H: Array
    F: Array
    dZ: Array
    dH: Array


def tangents(spec: Spec, params: Layers, v: Layers, X: Array) -> Iterator[Step]:
    """The layers from the first to the last: (V1) and (V2)."""
    xp, H, dH = spec.xp, X, None
    for (W, b), (V, c), row in zip(params, v, spec.activations, strict=True):
        H_below, dH_below = H, dH
        Z = H @ W.T + b
        dZ = H @ V.T + c
        if dH is not None:
            dZ = dZ + dH @ W.T
        H = row.f(xp, Z)
        F = row.df(xp, Z, H)
        dH = F * dZ
        yield Step(H_below, dH_below, Z, H, F, dZ, dH)


def product_sums(
    spec: Spec, kind: Kind, params: Layers, v: Layers, X: Array, y: Array, weight: Array | None
) -> Layers:
    """The matrix of this kind, summed over samples, times v: (V1) to (V6)."""
    xp = spec.xp
    steps = list(tangents(spec, params, v, X))
    H, dH = steps[-1].H, steps[-1].dH
    G = backprop.loss_and_output_grad(spec, H, y, weight)[1] if kind.is_hessian else None
    dG = at_outputs(spec, kind.at_outputs(spec.loss), H, y, weight, dH)
    sums = []
    for l in range(len(steps), 0, -1):
        H_below, dH_below, Z, H, F, dZ, _ = steps[l - 1]
        W, V = params[l - 1].W, v[l - 1].W
        dD = dG * F
        if G is not None:
            D = G * F
            dD = dD + G * spec.activations[l - 1].d2f(xp, Z, H) * dZ
        layer = backprop.layer_grad_sums(spec, dD, H_below)
        if l > 1:
            dG = dD @ W
            if G is not None:
                layer = Layer(layer.W + backprop.layer_grad_sums(spec, D, dH_below).W, layer.b)
                G, dG = D @ W, dG + D @ V
        sums.append(layer)
    return sums[::-1]


def at_outputs(
    spec: Spec, product: OutputProduct, H_L: Array, y: Array, weight: Array | None, V: Array
) -> Array:
    """A V, each sample times its weight; formed in the accumulator's dtype, as G is."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)
    Y = xp.astype(y, wide, copy=False) if y.ndim == 2 else y
    AV = product(xp, xp.astype(H_L, wide, copy=False), Y, xp.astype(V, wide, copy=False))
    if weight is not None:
        AV = xp.astype(weight, wide, copy=False)[:, None] * AV
    return xp.astype(AV, spec.dtype, copy=False)


def row_numbers(spec: Spec) -> int:
    """What is kept of a row: the five arrays of each step up, and about as many going down."""
    return 10 * sum(spec.sizes[1:])

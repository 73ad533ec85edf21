"""The derivation: forward and backward through a multilayer perceptron, in matrices.

Rows are samples: n of them. Layer l = 1, ..., L has width d_l; layer 0 is the input.

    H_0 = X                                  (n, d_0)
    Z_l = H_{l-1} W_lᵀ + b_l                 (n, d_l)
    H_l = f_l(Z_l)                           (n, d_l)
    E   = sum over samples of the loss       ()
    D_l = dE/dZ_l                            (n, d_l)        D_L = dE/dH_L ∘ f'_L(Z_L)

    dE/dW_l = D_lᵀ H_{l-1}                   (d_l, d_{l-1})  (1)
    dE/db_l = D_lᵀ 1                         (d_l,)          (2)
    D_{l-1} = (D_l W_l) ∘ f'_{l-1}(Z_{l-1})  (n, d_{l-1})    (3)
    dE/dX   = D_1 W_1                        (n, d_0)        (4)

docs/derivation.md derives (1)-(4). Everything here is a sum over samples, so that it adds up over
blocks of rows; whoever wants a mean divides once, outside.

Many nets at once have one more axis in front, of E members: W_l (E, d_l, d_{l-1}), b_l (E, d_l),
X (E, n, d_0), or (n, d_0) for all. y then has that axis too, of length 1 if it is for all: targets
have as many axes as H_L, class labels one fewer.

This file is written in the Array API, for any array library; every faster engine is tested
against it. Lists are indexed by the layer: Z[l], H[l], with Z[0] = H[0] = X.
"""

from collections.abc import Iterator
from typing import NamedTuple

from mlp_backprop.activations import Activation
from mlp_backprop.losses import Loss
from mlp_backprop.types import Array, DType, Layer, Layers, LossAndGrads, Namespace, flat

Activations = tuple[Activation, ...]


class Spec(NamedTuple):
    """What is known before data comes: namespace, widths d_0 ... d_L, dtype, rows of the tables.

    And what is asked for, "sum" or "mean".
    """

    xp: Namespace
    sizes: tuple[int, ...]
    dtype: DType
    activations: Activations
    loss: Loss = None  # type: ignore[assignment]  # absent where only the net is asked about
    reduction: str = "sum"


class Sums(NamedTuple):
    """Sums over samples: of the weighted loss, of the weights, of the gradients."""

    loss: Array
    weight: Array | float
    grads: Layers


def forward(spec: Spec, params: Layers, X: Array) -> tuple[list[Array], list[Array]]:
    """Z_l and H_l of every layer."""
    Z, H = [X], [X]
    for (W, b), activation in zip(params, spec.activations, strict=True):
        Z.append(H[-1] @ W.mT + b[..., None, :])  # Z_l = H_{l-1} W_lᵀ + b_l
        H.append(activation.f(spec.xp, Z[-1]))  # H_l = f_l(Z_l)
    return Z, H


def backward(
    spec: Spec, params: Layers, Z: list[Array], H: list[Array], G: Array
) -> Iterator[tuple[int, Array]]:
    """Yield (l, D_l) from the last layer to the first, given G = dE/dH_L; equation (3)."""
    for l in range(len(params), 0, -1):
        D = G * spec.activations[l - 1].df(spec.xp, Z[l], H[l])  # D_l = dE/dH_l ∘ f'_l(Z_l)
        yield l, D
        if l > 1:
            G = D @ params[l - 1].W  # (3)


def loss_and_output_grad(
    spec: Spec, H_L: Array, y: Array, weight: Array | None
) -> tuple[Array, Array]:
    """Weighted loss of every sample (n,), in the accumulator's dtype, and G = dE/dH_L."""
    xp, wide = spec.xp, accumulator_dtype(spec)
    Y = xp.astype(y, wide, copy=False) if y.ndim == H_L.ndim else y
    values, G = spec.loss.value_and_grad(xp, xp.astype(H_L, wide, copy=False), Y)
    if weight is not None:
        weight = xp.astype(weight, wide, copy=False)
        values, G = weight * values, weight[..., None] * G
    return values, xp.astype(G, spec.dtype, copy=False)


def layer_grad_sums(spec: Spec, D: Array, H_below: Array) -> Layer:
    """Equations (1) and (2) for one layer, from D_l and H_{l-1}."""
    xp, wide = spec.xp, accumulator_dtype(spec)
    D, H_below = xp.astype(D, wide, copy=False), xp.astype(H_below, wide, copy=False)
    return Layer(W=D.mT @ H_below, b=xp.sum(D, axis=-2))  # (1), (2)


def loss_and_grad_sums(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None
) -> Sums:
    """The loss and the gradient of every layer, summed over samples."""
    Z, H = forward(spec, params, X)
    values, G = loss_and_output_grad(spec, H[-1], y, weight)
    grads = [layer_grad_sums(spec, D, H[l - 1]) for l, D in backward(spec, params, Z, H, G)]
    return Sums(spec.xp.sum(values, axis=-1), weight_sum(spec, X, weight), grads[::-1])


def weight_sum(spec: Spec, X: Array, weight: Array | None) -> Array | float:
    """What a mean is divided by: n, or the sum of the sample weights."""
    if weight is None:
        return float(X.shape[-2])
    return spec.xp.sum(weight, dtype=accumulator_dtype(spec))


def accumulator_dtype(spec: Spec) -> DType:
    """The dtype of sums over samples: float32 for half precision, else the net's own."""
    return spec.xp.float32 if spec.xp.finfo(spec.dtype).bits < 32 else spec.dtype


def divisor(spec: Spec, weight_sum: Array | float) -> Array | float:
    """The one place where a sum becomes a mean: what it is divided by."""
    return weight_sum if spec.reduction == "mean" else 1.0


def reduced(spec: Spec, sums: Sums, out: Layers | None = None) -> LossAndGrads:
    """Sums as a caller gets them: in new arrays, or in those of `out` for the gradients."""
    xp, over = spec.xp, divisor(spec, sums.weight)
    # A sum may leave the range of half precision, so its loss stays in the accumulator's dtype.
    loss = xp.asarray(sums.loss / over, dtype=accumulator_dtype(spec))
    loss = loss if loss.ndim else loss[()]  # a scalar in NumPy
    grads = [Layer(W / over, b / over) for W, b in sums.grads]
    if grads[0].W.dtype != spec.dtype:
        grads = [Layer(xp.astype(W, spec.dtype), xp.astype(b, spec.dtype)) for W, b in grads]
    return LossAndGrads(loss, grads if out is None else written(grads, out))


def written(grads: Layers, out: Layers) -> Layers:
    """`out`, which holds these gradients now."""
    for grad, target in zip(flat(grads), flat(out), strict=True):
        target[...] = grad
    return out

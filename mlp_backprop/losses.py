"""The table of losses: each row turns outputs and targets into values and their derivatives.

H is H_L, the outputs of the net (n, d_L); Y the targets. Losses are summed over outputs and kept
apart by sample:

    values, G = row.value_and_grad(xp, H, Y)      (n,) and dE/dH_L (n, d_L)
    row.hessian_product(xp, H, Y, V)              (d2E/dH_L2) V, (n, d_L)
    row.fisher_product(xp, H, Y, V)               (E G Gᵀ) V, (n, d_L)
    row.link(xp, H)                               the means that logits H stand for, (n, d_L)

V may have axes before these, for several vectors at once; so may H and Y, for several nets.

The Fisher product reads a loss as -log p(y | h) and takes the mean of G Gᵀ over the y that p itself
draws. Wherever the loss is twice differentiable in h this mean is that of the Hessian, which for
four of the losses does not depend on y, and so is the Hessian itself: the Gaussian of variance 1/2,
Poisson, Bernoulli and categorical (class weights of sum t count as t draws). The other two have
kinks in their second derivative, or the first:

    absolute_error   Laplace, p = exp(-|r|) / 2: the mean of sign(r)² is 1
    huber            p = exp(-huber(r)) / c: the mean of huber'' is the probability of |r| < 1

The cross entropies and Poisson take logits: log(softmax(z)) and log(sigmoid(z)) are never formed
from rounded probabilities, so that extreme logits keep a finite loss and a right gradient. At a
kink (absolute_error at 0) the derivative is 0, as in torch.

Each row equals, per sample and summed over outputs, torch's loss with reduction="none":

    squared_error          MSELoss (no factor 1/2)
    absolute_error         L1Loss
    huber                  HuberLoss(delta=1)
    poisson                PoissonNLLLoss(log_input=True, full=False)
    binary_cross_entropy   BCEWithLogitsLoss
    softmax_cross_entropy  CrossEntropyLoss, with class indices or class weights per row

Scale: torch's reduction="mean" also divides the first five by d_L; here "mean" is over samples.

Adding a loss is adding a row; the tests loop over the table.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

from mlp_backprop.activations import logistic
from mlp_backprop.types import Array, Namespace


class Loss(NamedTuple):
    """One row: a name, value and gradient, two products, what Y may be, and the link."""

    name: str
    value_and_grad: Callable[[Namespace, Array, Array], tuple[Array, Array]]
    hessian_product: Callable[[Namespace, Array, Array, Array], Array]
    fisher_product: Callable[[Namespace, Array, Array, Array], Array]
    targets: Literal["real", "probability", "class"]
    link: Callable[[Namespace, Array], Array] | None  # from logits to means; None: takes no logits

    @property
    def takes_logits(self) -> bool:
        return self.link is not None


def _squared_error(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    R = H - Y
    return xp.sum(R * R, axis=-1), 2 * R


def _squared_error_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return 2 * V


def _absolute_error(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    R = H - Y
    return xp.sum(xp.abs(R), axis=-1), xp.sign(R)


def _absolute_error_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return xp.zeros_like(V)


def _absolute_error_fisher_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return V


def _huber(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    # With C = clip(R, -1, 1), C (R - C/2) is R²/2 where |R| <= 1 and |R| - 1/2 beyond.
    R = H - Y
    C = xp.clip(R, -1.0, 1.0)
    return xp.sum(C * (R - C / 2), axis=-1), C


def _huber_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return xp.where(xp.abs(H - Y) < 1, V, xp.zeros_like(V))


# P(|r| < 1) = a / (a + b), from the integrals of exp(-huber): a inside, where it is exp(-r²/2), and
# b over both tails, where it is exp(1/2 - |r|).
_INSIDE = math.sqrt(2 * math.pi) * math.erf(math.sqrt(0.5))
_TAILS = 2 * math.exp(-0.5)
HUBER_FISHER = _INSIDE / (_INSIDE + _TAILS)


def _huber_fisher_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return HUBER_FISHER * V


def _exp(xp: Namespace, H: Array) -> Array:
    return xp.exp(H)


def _poisson(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    rate = xp.exp(H)
    return xp.sum(rate - Y * H, axis=-1), rate - Y


def _poisson_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    return xp.exp(H) * V


def _binary_cross_entropy(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    # -y log s(h) - (1 - y) log(1 - s(h)) = log(1 + exp(h)) - y h, with log(1 + exp(h)) split
    # as in softplus; max(h, 0) - y h goes first, so that nothing is lost where the two cancel.
    values = (xp.clip(H, 0.0, None) - Y * H) + xp.log1p(xp.exp(-xp.abs(H)))
    return xp.sum(values, axis=-1), logistic(xp, H) - Y


def _binary_cross_entropy_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    P = logistic(xp, H)
    return P * (1 - P) * V


def _class_weights(xp: Namespace, H: Array, Y: Array) -> Array:
    """Targets as rows of weights (n, d_L): class indices (n,) become rows with a single 1."""
    if Y.ndim == H.ndim:
        return Y
    classes = xp.arange(H.shape[-1], device=H.device)
    return xp.astype(xp.astype(Y, classes.dtype)[..., None] == classes, H.dtype)


def _softmax(xp: Namespace, H: Array) -> Array:
    E = xp.exp(H - xp.max(H, axis=-1, keepdims=True))
    return E / xp.sum(E, axis=-1, keepdims=True)


def _softmax_cross_entropy(xp: Namespace, H: Array, Y: Array) -> tuple[Array, Array]:
    # With S = H - max(H): -sum_k y_k log p_k = sum_k y_k (log sum_j exp(S_j) - S_k). A class
    # of weight 0 adds nothing, whatever its logit: 0 * inf would be nan.
    Y = _class_weights(xp, H, Y)
    S = H - xp.max(H, axis=-1, keepdims=True)
    E = xp.exp(S)
    total = xp.sum(E, axis=-1, keepdims=True)
    surprise = xp.where(Y == 0, xp.zeros_like(S), Y * (xp.log(total) - S))
    return xp.sum(surprise, axis=-1), xp.sum(Y, axis=-1, keepdims=True) * (E / total) - Y


def _softmax_cross_entropy_hessian_product(xp: Namespace, H: Array, Y: Array, V: Array) -> Array:
    Y = _class_weights(xp, H, Y)
    P = _softmax(xp, H)
    return xp.sum(Y, axis=-1, keepdims=True) * P * (V - xp.sum(P * V, axis=-1, keepdims=True))


LOSSES = {
    row.name: row
    for row in (
        Loss(
            "squared_error",
            _squared_error,
            _squared_error_hessian_product,
            _squared_error_hessian_product,
            "real",
            link=None,
        ),
        Loss(
            "absolute_error",
            _absolute_error,
            _absolute_error_hessian_product,
            _absolute_error_fisher_product,
            "real",
            link=None,
        ),
        Loss(
            "huber",
            _huber,
            _huber_hessian_product,
            _huber_fisher_product,
            "real",
            link=None,
        ),
        Loss(
            "poisson",
            _poisson,
            _poisson_hessian_product,
            _poisson_hessian_product,
            "real",
            link=_exp,
        ),
        Loss(
            "binary_cross_entropy",
            _binary_cross_entropy,
            _binary_cross_entropy_hessian_product,
            _binary_cross_entropy_hessian_product,
            "probability",
            link=logistic,
        ),
        Loss(
            "softmax_cross_entropy",
            _softmax_cross_entropy,
            _softmax_cross_entropy_hessian_product,
            _softmax_cross_entropy_hessian_product,
            "class",
            link=_softmax,
        ),
    )
}

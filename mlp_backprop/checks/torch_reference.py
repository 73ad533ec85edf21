"""The same loss by torch's own layers and autograd: the reference to compare with.

Arrays in and out are NumPy's; the functions are torch's own, none of ours. check_grads and verify
compare with it, and the benchmarks time its forward pass with torch's autograd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from mlp_backprop.types import Array, Layer

Tensor = Any

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "softplus": F.softplus,
    "silu": F.silu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
}

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "squared_error": lambda h, y: F.mse_loss(h, y, reduction="none"),
    "absolute_error": lambda h, y: F.l1_loss(h, y, reduction="none"),
    "huber": lambda h, y: F.huber_loss(h, y, reduction="none"),
    "poisson": lambda h, y: F.poisson_nll_loss(h, y, reduction="none"),
    "binary_cross_entropy": lambda h, y: F.binary_cross_entropy_with_logits(h, y, reduction="none"),
    "softmax_cross_entropy": lambda h, y: F.cross_entropy(h, y, reduction="none"),
}


def forward(params: Sequence[tuple[Tensor, Tensor]], X: Tensor, names: Sequence[str]) -> Tensor:
    """The outputs of the net, one activation name per layer."""
    H = X
    for (W, b), name in zip(params, names, strict=True):
        H = ACTIVATIONS[name](F.linear(H, W, b))
    return H


def sample_losses(
    params: Sequence[tuple[Tensor, Tensor]], X: Tensor, y: Tensor, names: Sequence[str], loss: str
) -> Tensor:
    """The loss of every sample (n,), summed over outputs."""
    values = LOSSES[loss](forward(params, X, names), y)
    return values if values.ndim == 1 else values.sum(dim=1)


def loss_and_grads(
    params: Sequence[tuple[Array, Array]],
    X: Array,
    y: Array,
    weight: Array | None,
    *,
    names: Sequence[str],
    loss: str,
    reduction: str,
) -> tuple[Array, list[Layer]]:
    """Value and gradient by autograd, in the dtype of the arrays.

    params, X, y and weight are NumPy arrays as `compute_grads` takes them; `names` has one
    activation per layer. Returns NumPy arrays, shaped as the parameters.
    """
    leaves = [tuple(torch.tensor(A, requires_grad=True) for A in layer) for layer in params]
    targets = torch.tensor(y if y.ndim == 2 else y.astype("int64"))  # the only labels torch takes
    values = sample_losses(leaves, torch.tensor(X), targets, names, loss)
    weights = torch.ones_like(values) if weight is None else torch.tensor(weight)
    total = (weights * values).sum()
    total = total / weights.sum() if reduction == "mean" else total
    total.backward()
    return total.detach().numpy(), [Layer(W.grad.numpy(), b.grad.numpy()) for W, b in leaves]

"""The words used in type hints, and the types of parameters, gradients and results."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# An array of any library, and that library's Array API namespace: there is no common base class.
Array = Any
Namespace = Any
DType = Any


class Layer(NamedTuple):
    """Weights and biases of one layer, or their gradients: a plain pair with names.

    W has shape (d_l, d_{l-1}), one row per output, as in torch's nn.Linear; b has shape (d_l,).
    Wherever parameters are taken, a plain tuple (W, b) does as well.

    >>> import numpy as np
    >>> layer = Layer(W=np.ones((3, 2)), b=np.zeros(3))
    >>> W, b = layer
    >>> W.shape, b.shape
    ((3, 2), (3,))
    """

    W: Array
    b: Array


Params = Sequence[tuple[Array, Array]]


class LossAndGrads(NamedTuple):
    """The value of a loss, and its gradient with respect to every W and b."""

    loss: Array
    grads: list[Layer]


def flat(layers: Iterable[tuple[Any, Any]]) -> list[Any]:
    """W_1, b_1, W_2, b_2, ... in one list."""
    return [part for layer in layers for part in layer]

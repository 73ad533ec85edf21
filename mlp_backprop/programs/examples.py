"""The nets and data that `mlp-backprop verify` computes: by hand small enough to read, or real.

The only file of the programs that imports scikit-learn.
"""

import json
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.nets.initial import init_params
from mlp_backprop.types import Array, Layer, LossName


class Example(NamedTuple):
    """A net with sigmoid hidden layers, and its data."""

    name: str
    dtype: str
    params: list[Layer]
    X: Array
    y: Array
    loss: LossName

    def astype(self, dtype: str) -> "Example":
        """The same numbers, rounded where they have to be."""
        return self._replace(
            dtype=dtype,
            params=[Layer(W.astype(dtype), b.astype(dtype)) for W, b in self.params],
            X=self.X.astype(dtype),
            y=self.y if self.y.ndim == 1 else self.y.astype(dtype),
        )


def assignment(seed: int, dtype: str) -> Example:
    """The 2-10-5-1 net with x from U[0, 1]² and y = (x1² + x2²)/2."""
    rng = np.random.default_rng(seed)
    params = init_params([2, 10, 5, 1], rng, dtype=dtype)
    X = rng.random((1, 2)).astype(dtype)
    y = (X**2).sum(axis=1, keepdims=True) / 2
    return Example("assignment", dtype, params, X, y, "squared_error")


def digits(seed: int, dtype: str) -> Example:
    """A 64-32-16-10 net on 1797 images of 8 x 8 pixels, scaled from 0...16 to [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    params = init_params([64, 32, 16, 10], seed, dtype=dtype)
    X = (images / 16).astype(dtype)
    return Example("digits", dtype, params, X, labels, "softmax_cross_entropy")


def published() -> tuple[Example, dict[str, list[Layer]]]:
    """A net that has the published gradients, and the tables as printed."""
    file = resources.files("mlp_backprop.programs") / "data" / "bs6207.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    printed = {name: _read_tables(content[name]) for name in ("pytorch", "by_hand")}
    return reconstruct(printed["pytorch"]), printed


def _read_tables(tables: dict[str, list[Any]]) -> list[Layer]:
    return [Layer(np.array(tables[f"dLdw{l}"]), np.array(tables[f"dLdb{l}"])) for l in (1, 2, 3)]


def reconstruct(grads: list[Layer]) -> Example:
    """A three-layer net and a sample that have these gradients of (h3 - y)².

    For one sample the gradients are D_l = db_l and dW_l = db_lᵀ H_{l-1}, an outer product, so
    H_{l-1} = db_l dW_l / |db_l|². Then D_3 = 2 (h3 - y) gives h3, and D_{l-1} = (D_l W_l) ∘
    H_{l-1} (1 - H_{l-1}) is solved by the least W_l, again an outer product. Biases make up for
    what W_l H_{l-1} lacks to Z_l; in the first layer they make up for all of it, W_1 = 0.
    """
    D1, D2, D3 = (db for _, db in grads)
    x, h1, h2 = (D @ dW / (D @ D) for dW, D in grads)
    y = (x**2).sum(keepdims=True) / 2
    h3 = y + D3 / 2
    W3 = np.outer(D3, D2 / (h2 * (1 - h2))) / (D3 @ D3)
    W2 = np.outer(D2, D1 / (h1 * (1 - h1))) / (D2 @ D2)
    params = [
        Layer(np.zeros_like(grads[0].W), _logit(h1)),
        Layer(W2, _logit(h2) - W2 @ h1),
        Layer(W3, h3 - W3 @ h2),
    ]
    return Example("published", "float64", params, x[None, :], y[None, :], "squared_error")


def _logit(h: Array) -> Array:
    return np.log(h / (1 - h))

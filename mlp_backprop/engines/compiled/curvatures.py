"""The products A v of losses, compiled: what the matrices over the parameters begin with.

    PRODUCTS[name](h, y, v)        one output's entry of A v, of hessian_product in losses.py

and of fisher_product under name_fisher, where that is another. Softmax cross entropy needs all
outputs of a sample together.
"""

from collections.abc import Callable

from numba.extending import overload

from mlp_backprop.engines.compiled.formulas import exp, inlined, logistic
from mlp_backprop.engines.compiled.rows import at, exponentials, shape
from mlp_backprop.losses import HUBER_FISHER


@inlined
def squared_error(h, y, v):
    return v + v


@inlined
def absolute_error(h, y, v):
    return type(v)(0)


@inlined
def absolute_error_fisher(h, y, v):
    return v


@inlined
def huber(h, y, v):
    return v if abs(h - y) < type(v)(1) else type(v)(0)


@inlined
def huber_fisher(h, y, v):
    return type(v)(HUBER_FISHER) * v


@inlined
def poisson(h, y, v):
    return exp(h) * v


@inlined
def binary_cross_entropy(h, y, v):
    p = logistic(h, exp(-abs(h)))
    return p * (type(v)(1) - p) * v


PRODUCTS = {
    "squared_error": squared_error,
    "absolute_error": absolute_error,
    "absolute_error_fisher": absolute_error_fisher,
    "huber": huber,
    "huber_fisher": huber_fisher,
    "poisson": poisson,
    "binary_cross_entropy": binary_cross_entropy,
}
NAMES = (*PRODUCTS, "softmax_cross_entropy")


def number(loss: str, *, is_fisher: bool) -> int:
    """Which row of the table is for this loss."""
    own = f"{loss}_fisher"
    return NAMES.index(own if is_fisher and own in PRODUCTS else loss)


def product_of(k, h, y, v):
    """Row k of PRODUCTS, for a k known when compiled."""


@overload(product_of, prefer_literal=True)
def _product_of(k, h, y, v):
    f = PRODUCTS[NAMES[k.literal_value]]
    return lambda k, h, y, v: f(h, y, v)


def output_product(sources: int, k: int) -> Callable[..., None]:
    """A V in G; behind its rows are three to work with."""
    if NAMES[k] == "softmax_cross_entropy":
        return softmax_cross_entropy(sources)

    def output_product(H, Y, V, G, n_rows, stride, m):
        _ = sources
        n_rows, m = shape(n_rows, stride, m)
        for row in range(n_rows):
            for t in range(at(row * stride), at(row * stride + m)):
                G[t] = product_of(k, H[t], Y[t], V[t])

    return output_product


def softmax_cross_entropy(sources: int) -> Callable[..., None]:
    """As `output_product`, over all outputs of a sample together."""

    def softmax_cross_entropy(H, Y, V, G, n_rows, stride, m):
        _ = sources
        m = at(m)
        mean, total, weight = exponentials(H, Y, G, n_rows, stride, m)
        # The mean of V under the probabilities, where nobody needs the largest any more.
        for t in range(m):
            G[mean + t] = 0
        for row in range(n_rows):
            h = at(row * stride)
            for t in range(m):
                G[h + t] /= G[total + t]
                G[mean + t] += G[h + t] * V[h + t]
        for row in range(n_rows):
            h = at(row * stride)
            for t in range(m):
                G[h + t] *= G[weight + t] * (V[h + t] - G[mean + t])

    return softmax_cross_entropy

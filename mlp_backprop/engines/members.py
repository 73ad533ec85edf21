"""Many nets in one call: each with the bits of its own call where the arrays are NumPy's.

These are computed one net after the other, by one pass, into arrays that all share. Those of other
libraries go through the derivation at once, with one more axis in front.
"""

from collections.abc import Callable

import numpy as np

from mlp_backprop.backprop import Spec, accumulator_dtype
from mlp_backprop.engines import choice
from mlp_backprop.types import Array, Layer, Layers, LossAndGrads


def loss_and_grads(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, backend: str | None
) -> LossAndGrads:
    """Losses (E,), and gradients of the shapes of params."""
    if spec.xp is not np:
        return choice.derivation(spec, params, X, y, weight)
    run = choice.plan(spec, X.shape[-2], backend)
    losses = np.empty(len(params[0].W), accumulator_dtype(spec))
    grads = [Layer(np.empty(W.shape, W.dtype), np.empty(b.shape, b.dtype)) for W, b in params]
    for e in range(len(losses)):
        losses[e], _ = run(*member(e, params, X, y), weight, member_params(e, grads))
    return LossAndGrads(losses, grads)


def outputs(spec: Spec, params: Layers, X: Array, backend: str | None) -> Array:
    """H_L of one net (n, d_L), or of many (E, n, d_L)."""
    return each(spec, params, X, None, lambda net, X, _: choice.outputs(spec, net, X, backend))


def each(
    spec: Spec,
    params: Layers,
    X: Array,
    y: Array | None,
    one: Callable[[Layers, Array, Array | None], Array],
) -> Array:
    """one(params, X, y) of one net, or of many with the members' axis in front."""
    if spec.xp is not np or params[0].W.ndim == 2:
        return one(params, X, y)
    E = len(params[0].W)
    result = one(*member(0, params, X, y))
    results = np.empty((E, *result.shape), result.dtype)
    results[0] = result
    for e in range(1, E):
        results[e] = one(*member(e, params, X, y))
    return results


def member(e: int, params: Layers, X: Array, y: Array | None) -> tuple[Layers, Array, Array | None]:
    """One net, and its data."""
    own = y if y is None else y[e if len(y) > 1 else 0]
    return member_params(e, params), X[e] if X.ndim == 3 else X, own


def member_params(e: int, params: Layers) -> Layers:
    return [Layer(W[e], b[e]) for W, b in params]

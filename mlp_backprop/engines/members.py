"""Many nets in one call: each with the bits of its own call where the arrays are NumPy's.

These are computed one net after the other, by one pass, into arrays that all share. Those of other
libraries go through the derivation at once, with one more axis in front.
"""

from collections.abc import Callable, Iterator
from itertools import repeat

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
    for e, (own, out) in enumerate(zip(members(params, X, y), nets(grads), strict=True)):
        losses[e], _ = run(*own, weight, out)
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
    results: Array = None
    for e, own in enumerate(members(params, X, y)):
        result = one(*own)
        if results is None:
            results = np.empty((len(params[0].W), *result.shape), result.dtype)
        results[e] = result
    return results


def members(
    params: Layers, X: Array, y: Array | None
) -> Iterator[tuple[Layers, Array, Array | None]]:
    """Each net with its data, or that of all."""
    own_X = X if X.ndim == 3 else repeat(X)
    own_y = repeat(None) if y is None else y if len(y) > 1 else repeat(y[0])
    return zip(nets(params), own_X, own_y, strict=False)


def nets(params: Layers) -> Iterator[Layers]:
    """Views, as an iteration over arrays makes them: sooner than an index does."""
    return map(list, zip(*(map(Layer, W, b) for W, b in params), strict=True))

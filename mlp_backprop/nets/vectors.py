"""Parameters as one vector, and back: what optimisers and linear algebra want.

The order is W_1 row by row, b_1, W_2, b_2, ..., as in torch's parameters_to_vector for a stack of
nn.Linear. Axes in front are kept: those of per-sample gradients, Jacobians, stacks of vectors.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mlp_backprop.edge.arguments import common_dtype, common_home, read, read_params
from mlp_backprop.types import Array, ArrayLike, Layer, Namespace, Params, flat


def ravel_params(params: Params) -> Array:
    """Put all weights and biases, or their gradients, into one vector.

    Parameters
    ----------
    params : sequence of (W, b)
        Parameters, gradients, or anything of their structure: W is (..., d_l, d_{l-1}), b is
        (..., d_l), with the same axes in front of all.

    Returns
    -------
    array (..., P)
        W_1 row by row, b_1, W_2, b_2 and so on: a copy, of the arrays' library and dtype.

    Raises
    ------
    TypeError, ValueError
        Arrays of different libraries or dtypes; shapes of W and b that do not fit.

    Examples
    --------
    SciPy's optimisers want a function of one vector, and its gradient as another:

    >>> import numpy as np
    >>> from mlp_backprop import compute_grads, init_params, ravel_params, unravel_params
    >>> from scipy.optimize import minimize
    >>> params = init_params([1, 3, 1], rng=0)
    >>> X = np.linspace(-1, 1, 20)[:, None]
    >>> def fun(x):
    ...     loss, grads = compute_grads(unravel_params(x, params), X, np.sin(X))
    ...     return loss, ravel_params(grads)
    >>> bool(minimize(fun, ravel_params(params), jac=True).fun < 1e-3)
    True
    """
    layers = read_params(params)
    home = common_home(flat(layers), None)
    placed = home.place_params(layers, common_dtype(layers, home))
    in_front = tuple(placed[0].b.shape[:-1])
    for l, (W, b) in enumerate(placed, 1):
        if b.ndim == 0 or W.shape[:-1] != b.shape or b.shape[:-1] != in_front:
            axes = "".join(f"{size}, " for size in in_front)
            raise ValueError(
                f"layer {l} needs W of shape ({axes}d_{l}, d_{l - 1}) and b of shape "
                f"({axes}d_{l},), got {tuple(W.shape)} and {tuple(b.shape)}"
            )
    return ravel(home.xp, placed)


def unravel_params(x: ArrayLike, params: Params) -> list[Layer]:
    """Cut a vector into weights and biases: the inverse of `ravel_params`.

    Parameters
    ----------
    x : array (..., P)
        W_1 row by row, b_1, W_2, b_2 and so on: as many numbers as `params` holds.
    params : sequence of (W, b)
        Anything of the shapes wanted; the values do not matter.

    Returns
    -------
    list of Layer
        W (..., d_l, d_{l-1}) and b (..., d_l), of the library and dtype of x: float64 for the
        vectors of SciPy, which then wants float64 data. Views of x, in libraries that have views.

    Raises
    ------
    TypeError, ValueError
        x that is not of a floating dtype, or of another length.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import init_params, unravel_params
    >>> unravel_params(np.arange(7.0), init_params([1, 2, 1]))[1]
    Layer(W=array([[4., 5.]]), b=array([6.]))
    """
    vector = read("x", x)
    if not vector.is_floating:
        raise TypeError(f"x must have a floating dtype, got {vector.array.dtype}")
    like = [Layer(W.array, b.array) for W, b in read_params(params)]
    P = n_numbers(like)
    if tuple(vector.array.shape[-1:]) != (P,):
        raise ValueError(
            f"x must have shape (..., {P}), as many numbers as params holds; "
            f"got {tuple(vector.array.shape)}"
        )
    return unravel(vector.xp, vector.array, like)


def n_numbers(params: list[Layer]) -> int:
    """P, how many numbers the parameters are."""
    return sum(math.prod(A.shape) for A in flat(params))


def ravel(xp: Namespace, params: list[Layer]) -> Array:
    """The vectors (..., P) of layers with as many axes in front as b_1 has."""
    in_front = tuple(params[0].b.shape[:-1])
    sizes = [math.prod(A.shape[len(in_front) :]) for A in flat(params)]
    parts = zip(flat(params), sizes, strict=True)
    return xp.concat([xp.reshape(A, (*in_front, size)) for A, size in parts], axis=-1)


def unravel(xp: Namespace, x: Array, params: list[Layer]) -> list[Layer]:
    """Vectors (..., P) as layers of these shapes."""
    in_front, end = tuple(x.shape[:-1]), 0
    parts = []
    for A in flat(params):
        begin, end = end, end + math.prod(A.shape)
        parts.append(xp.reshape(x[..., begin:end], (*in_front, *A.shape)))
    return [Layer(W, b) for W, b in zip(parts[::2], parts[1::2], strict=True)]


def layers_like(sizes: Sequence[int]) -> list[Layer]:
    """Layers of these widths, for their shapes alone: they take no memory."""
    nothing = np.empty(())
    return [
        Layer(np.broadcast_to(nothing, (n_out, n_in)), np.broadcast_to(nothing, (n_out,)))
        for n_in, n_out in pairwise(sizes)
    ]

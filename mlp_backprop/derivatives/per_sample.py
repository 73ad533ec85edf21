"""Gradients of single samples: formed, measured without being formed, and clipped.

The mathematics stands in samples.py: equations (P1) to (P5).
"""

from collections.abc import Iterable
from numbers import Real
from typing import Unpack

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import validation
from mlp_backprop.edge.arguments import type_name
from mlp_backprop.edge.calls import public
from mlp_backprop.engines import choice, members
from mlp_backprop.maths import samples
from mlp_backprop.maths.row_blocks import concatenated
from mlp_backprop.maths.samples import Factors
from mlp_backprop.types import (
    Array,
    ArrayLike,
    Layer,
    Layers,
    LossAndGrads,
    LossOptions,
    Params,
    SumOptions,
)


@public
def per_sample_grads(
    params: Params, X: ArrayLike, y: ArrayLike, **options: Unpack[LossOptions]
) -> list[Layer]:
    """Compute the gradient of the loss of every single sample.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`, and refused as there, but n = 0 is allowed.

    Returns
    -------
    list of Layer
        (W, b) per layer, of shapes (n, d_l, d_{l-1}) and (n, d_l), in the dtype and library of the
        parameters.

    Notes
    -----
    Scale: nothing is summed over samples and nothing divided. Row i belongs to the loss of sample
    i, summed over outputs, times its weight; the rows sum to `compute_grads(reduction="sum")`. In
    torch it is torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0)). nan in a row of X or
    y stays in that row. At kinks of the activation or the loss, as for `compute_grads`, the
    derivative from the left, or 0 for "absolute_error".

    The result takes n times the memory of the parameters. For norms alone, or clipped sums, there
    are `per_sample_grad_norms` and `clipped_grads`, which never form it.

    Equation (P1) of docs/per_sample.md.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import compute_grads, init_params, per_sample_grads
    >>> params = init_params([2, 10, 1], rng=0)
    >>> X, y = np.ones((4, 2)), np.arange(4.0)[:, None]
    >>> grads = per_sample_grads(params, X, y)
    >>> grads[0].W.shape, grads[0].b.shape
    ((4, 10, 2), (4, 10))
    >>> total = compute_grads(params, X, y, reduction="sum").grads
    >>> np.allclose(grads[0].W.sum(axis=0), total[0].W)
    True
    """
    spec, *arrays = validation.problem(params, X, y, reduction="sum", **options)
    compiled = choice.first_order(spec, options.get("backend"))
    if compiled:
        grads: list[Layer] = compiled.sample_grads(spec, *arrays)
        return grads
    with choice.undisturbed(spec, arrays[1].shape[0]):
        factors = samples.sweep(spec, *arrays)[1]
        return [samples.outer_product(spec.xp, D, H_below) for D, H_below in factors][::-1]


@public
def per_sample_grad_norms(
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    *,
    per_layer: bool = False,
    **options: Unpack[LossOptions],
) -> Array:
    """Compute the Euclidean norm of every sample's gradient, without forming the gradients.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`, and refused as there, but n = 0 is allowed.
    per_layer : bool
        Whether to return the norm of each layer's part, W and b together.

    Returns
    -------
    array (n,), or (n, L) with per_layer; with E in front of many nets
        In the parameters' dtype; float32 for half precision, whose range a norm may leave.

    Notes
    -----
    Scale: the norms of the rows of `per_sample_grads`, over all W and b. nan in a row of X or y
    stays in that row. Squares are summed in the dtype of the result: in float32 a norm beyond
    1.8e19 is inf, and one below 1e-19 inexact.

    Memory is that of one block of rows, however many rows there are. Equations (P2) and (P3) of
    docs/per_sample.md; I. Goodfellow, "Efficient per-example gradient computations",
    arXiv 1510.01799 (2015).

    Examples
    --------
    A single neuron with one input: residuals 7 - 5 and 3 - 4, gradients 4 (3, 1) and -2 (1, 1).

    >>> from mlp_backprop import per_sample_grad_norms
    >>> per_sample_grad_norms([([[2.0]], [1.0])], X=[[3.0], [1.0]], y=[[5.0], [4.0]]) ** 2
    array([160.,   8.])
    """
    spec, layers, X, y, weight = validation.problem(
        params, X, y, reduction="sum", **options, many=True
    )
    compiled = choice.first_order(spec, options.get("backend"))
    norms = compiled.norms if compiled else _norms

    def norms_of(params: Layers, X: Array, y: Array) -> Array:
        return norms(spec, params, X, y, weight, per_layer)

    return members.each(spec, layers, X, y, norms_of)


def _norms(
    spec: Spec, params: Layers, X: Array, y: Array, weight: Array | None, per_layer: bool
) -> Array:
    xp, norms = spec.xp, []

    def measure(loss: Array | float, factors: Iterable[Factors]) -> None:
        squares = samples.squared_norms(spec, factors)[::-1]
        norms.append(xp.sqrt(xp.stack(squares, axis=-1) if per_layer else sum(squares)))

    choice.for_each_sweep(spec, params, X, y, weight, measure)
    return concatenated(xp, norms, axis=len(params[0].b.shape) - 1)


@public
def clipped_grads(
    params: Params, X: ArrayLike, y: ArrayLike, *, max_norm: float, **options: Unpack[SumOptions]
) -> LossAndGrads:
    """Compute a loss, and the sum of its samples' gradients, each clipped to a norm.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`.
    max_norm : float
        The largest norm, over all W and b, that the gradient of a sample's loss times its weight
        keeps; a longer one is scaled down to it. Positive; inf clips nothing.
    reduction : {"mean", "sum"}
        "sum" over the samples, or that sum divided by the sum of the weights: the divisor does not
        depend on what was clipped.

    Returns
    -------
    loss : scalar of the array library
        As from `compute_grads`: nothing is clipped in it.
    grads : list of Layer
        (W, b) per layer, with the shapes, dtype and library of the parameters.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; a max_norm that is not a positive number.

    Notes
    -----
    Scale: the rows of `per_sample_grads`, each times min(1, max_norm / norm), summed; for a sum,
    changing one sample moves the result by at most 2 max_norm, adding one by max_norm, up to
    rounding. nan in a row of X or y makes the sum nan. A row whose norm overflows (see
    `per_sample_grad_norms`) while its gradient is finite counts as zero, unless max_norm is inf.

    One forward and one backward sweep, and the memory of one block of rows. Equations (P3) to (P5)
    of docs/per_sample.md, which names the sources. Noise and privacy accounting are left to
    others.

    Examples
    --------
    A single neuron with one input: the gradients 4 (3, 1) and -2 (1, 1), the first scaled to 5.

    >>> from mlp_backprop import clipped_grads
    >>> params, X, y = [([[2.0]], [1.0])], [[3.0], [1.0]], [[5.0], [4.0]]
    >>> loss, grads = clipped_grads(params, X, y, max_norm=5.0, reduction="sum")
    >>> float(loss), grads[0].b
    (5.0, array([-0.41886117]))
    """
    max_norm = _checked_norm(max_norm)
    spec, layers, X, y, weight = validation.problem(params, X, y, **options)
    return choice.clipped_grads(spec, options.get("backend"), max_norm, layers, X, y, weight)


def _checked_norm(max_norm: object) -> float:
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real):
        raise TypeError(f"max_norm must be a number, got {type_name(max_norm)}")
    if not float(max_norm) > 0:  # nor is nan
        raise ValueError(f"max_norm must be positive, or inf to clip nothing; got {max_norm:g}")
    return float(max_norm)

"""Gradients of single samples: formed, measured without being formed, and clipped.

Row i of every H_l and D_l depends on sample i alone. So the sums over samples in (1) and (2) of
backprop.py can be left out, measured or weighted, all after the same two sweeps. With W_l and b_l
side by side in one matrix, the gradient of sample i in layer l is an outer product:

    g_l[i]    = D_l[i]ᵀ [H_{l-1}[i] 1]           (d_l, d_{l-1} + 1)  (P1)
    |g_l|²    = |D_l|² ∘ (|H_{l-1}|² + 1)        (n,)                (P2)
    |g|²      = Σ_l |g_l|²                       (n,)                (P3)
    c         = min(1, max_norm / |g|)           (n,)                (P4)
    Σ_i c_i g_l[i] = (c ∘ D_l)ᵀ [H_{l-1} 1]      (d_l, d_{l-1} + 1)  (P5)

|A|² is the sum of squares of each row, and c multiplies rows. docs/per_sample.md derives (P1) to
(P5) and names their sources.
"""

from collections.abc import Iterable, Iterator, Sequence
from numbers import Real

import numpy as np

from mlp_backprop import backprop, namespaces, validation
from mlp_backprop.arguments import type_name
from mlp_backprop.backprop import Spec, Sums
from mlp_backprop.blocks import added_losses, joined, part, row_blocks
from mlp_backprop.gradients import LossAndGrads, public
from mlp_backprop.types import Array, Layer, Namespace, Params

Factors = tuple[Array, Array]  # D_l and H_{l-1}

# The mathematics ---------------------------------------------------------------------------------


def sweep(
    spec: Spec, params: list[Layer], X: Array, y: Array, weight: Array | None
) -> tuple[Array, Iterator[Factors]]:
    """The weighted loss, and the factors of (P1) from the last layer to the first."""
    Z, H = backprop.forward(spec.xp, spec.activations, params, X)
    values, G = backprop.loss_and_output_grad(spec, H[-1], y, weight)
    deltas = backprop.backward(spec.xp, spec.activations, params, Z, H, G)
    return spec.xp.sum(values), ((D, H[l - 1]) for l, D in deltas)


def block_sweeps(
    spec: Spec, params: list[Layer], X: Array, y: Array, weight: Array | None
) -> Iterator[tuple[Array | float, Iterator[Factors]]]:
    """The same over one block of rows after the other, in memory that the next may use again."""
    tiled = namespaces.plan_sweeps(spec, X.shape[0])
    if tiled is not None:
        yield from tiled(params, X, y, weight)
        return
    row_numbers = spec.sizes[0] + 3 * sum(spec.sizes[1:])  # Z_l, H_l and D_l
    for rows in row_blocks(spec.xp, X, row_numbers):
        yield sweep(spec, params, X[rows, ...], y[rows, ...], part(weight, rows))


def outer_product(xp: Namespace, D: Array, H_below: Array) -> Layer:
    """Equation (P1)."""
    if xp is np:  # einsum takes half the time of broadcasting over short rows
        return Layer(W=np.einsum("ij,ik->ijk", D, H_below, order="C"), b=D)
    return Layer(W=D[:, :, None] * H_below[:, None, :], b=D)


def row_squares(xp: Namespace, A: Array) -> Array:
    """|A|²."""
    if xp is np:  # einsum takes a third of the time, and no memory for the squares
        return np.einsum("ij,ij->i", A, A)
    return xp.sum(A * A, axis=1)


def squared_norms(spec: Spec, factors: Iterable[Factors]) -> list[Array]:
    """Equation (P2) for each pair of factors, in the accumulator's dtype."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)

    def squares(A: Array) -> Array:
        return row_squares(xp, xp.astype(A, wide, copy=False))

    return [squares(D) * (squares(H_below) + 1) for D, H_below in factors]


def clipped_sums(spec: Spec, factors: Iterable[Factors], max_norm: float) -> list[Layer]:
    """Equations (P3) to (P5): the clipped gradients of every layer, summed over samples."""
    xp, wide = spec.xp, backprop.accumulator_dtype(spec)
    factors = list(factors)[::-1]  # kept until the norms are known
    norms = xp.sqrt(sum(squared_norms(spec, factors)))
    # A norm of 0 keeps the factor 1; so does one of nan, for the sum to show it.
    c = xp.where(norms > max_norm, max_norm / norms, xp.ones_like(norms))[:, None]
    return [
        backprop.layer_grad_sums(spec, c * xp.astype(D, wide, copy=False), H_below)
        for D, H_below in factors
    ]


# The public functions ----------------------------------------------------------------------------


@public
def per_sample_grads(
    params: Params,
    X: Array,
    y: Array,
    *,
    activation: str | Sequence[str] = "sigmoid",
    loss: str = "squared_error",
    sample_weight: Array | None = None,
    backend: str | None = None,
) -> list[Layer]:
    """Compute the gradient of the loss of every single sample.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`. n = 0 is allowed.

    Returns
    -------
    list of Layer
        (W, b) per layer, of shapes (n, d_l, d_{l-1}) and (n, d_l), in the dtype and library of the
        parameters.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`.

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
    spec, *arrays = validation.problem(
        params,
        X,
        y,
        activation=activation,
        loss=loss,
        reduction="sum",
        sample_weight=sample_weight,
        backend=backend,
    )
    factors = sweep(spec, *arrays)[1]
    return [outer_product(spec.xp, D, H_below) for D, H_below in factors][::-1]


@public
def per_sample_grad_norms(
    params: Params,
    X: Array,
    y: Array,
    *,
    activation: str | Sequence[str] = "sigmoid",
    loss: str = "squared_error",
    sample_weight: Array | None = None,
    backend: str | None = None,
    per_layer: bool = False,
) -> Array:
    """Compute the Euclidean norm of every sample's gradient, without forming the gradients.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`. n = 0 is allowed.
    per_layer : bool
        Whether to return the norm of each layer's part, W and b together.

    Returns
    -------
    array (n,), or (n, L) with per_layer
        In the parameters' dtype; float32 for half precision, whose range a norm may leave.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`.

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
    spec, *arrays = validation.problem(
        params,
        X,
        y,
        activation=activation,
        loss=loss,
        reduction="sum",
        sample_weight=sample_weight,
        backend=backend,
    )
    xp, norms = spec.xp, []
    for _, factors in block_sweeps(spec, *arrays):
        squares = squared_norms(spec, factors)[::-1]
        norms.append(xp.sqrt(xp.stack(squares, axis=1) if per_layer else sum(squares)))
    return joined(xp, norms)


@public
def clipped_grads(
    params: Params,
    X: Array,
    y: Array,
    *,
    max_norm: float,
    activation: str | Sequence[str] = "sigmoid",
    loss: str = "squared_error",
    reduction: str = "mean",
    sample_weight: Array | None = None,
    backend: str | None = None,
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
    spec, layers, X, y, weight = validation.problem(
        params,
        X,
        y,
        activation=activation,
        loss=loss,
        reduction=reduction,
        sample_weight=sample_weight,
        backend=backend,
    )
    blocks = (
        (loss, clipped_sums(spec, factors, max_norm))
        for loss, factors in block_sweeps(spec, layers, X, y, weight)
    )
    total, grads = added_losses(blocks)
    weights = backprop.weight_sum(spec, X, weight)
    return LossAndGrads(*backprop.reduced(spec, Sums(total, weights, grads), reduction))


def _checked_norm(max_norm: object) -> float:
    if isinstance(max_norm, bool) or not isinstance(max_norm, Real):
        raise TypeError(f"max_norm must be a number, got {type_name(max_norm)}")
    if not float(max_norm) > 0:  # nor is nan
        raise ValueError(f"max_norm must be positive, or inf to clip nothing; got {max_norm:g}")
    return float(max_norm)

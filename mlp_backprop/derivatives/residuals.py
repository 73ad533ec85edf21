"""Losses of slopes and Laplacians, and their gradients: Sobolev and physics-informed fits.

The maths is in jets.py: tangents and a Laplacian go forward beside the outputs, and the
derivatives of the loss with respect to all of them come back.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from typing import Any, Unpack

from mlp_backprop import backprop
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Activations, Spec, Sums
from mlp_backprop.derivatives.inputs import read_inputs
from mlp_backprop.edge import validation
from mlp_backprop.edge.arguments import read, type_name
from mlp_backprop.edge.calls import on_stream_of_arguments, public, quietly
from mlp_backprop.edge.validation import Problem
from mlp_backprop.engines import choice
from mlp_backprop.losses import LOSSES
from mlp_backprop.maths import jets
from mlp_backprop.maths.row_blocks import (
    added_blocks,
    added_pairs,
    concatenated,
    row_blocks,
    rows_of,
)
from mlp_backprop.types import (
    Array,
    ArrayLike,
    Layer,
    LossAndGrads,
    NetOptions,
    Params,
    Reduction,
    SumOptions,
)

Residual = Callable[[Array, Array, Array, Array], tuple[Array, Sequence[Array | None]]]


@public
def sobolev_grads(
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    dy: ArrayLike,
    *,
    slope_weight: float = 1.0,
    **options: Unpack[SumOptions],
) -> LossAndGrads:
    """Compute a loss of outputs and slopes, and its gradient by every weight and bias.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`.
    dy : array (n, d_L, d_0)
        Targets for dY/dX, as `jacobian` returns it. Same dtype as the parameters.
    slope_weight : float
        What the squared error of the slopes is multiplied by; not negative.

    Returns
    -------
    loss : scalar of the array library
        Per sample the loss of outputs and y, plus `slope_weight` times Σ (dY/dX - dy)² over all
        d_L d_0 slopes; summed over samples, each times its sample weight, and with
        reduction="mean" divided by the sum of the sample weights.
    grads : list of Layer
        (W, b) per layer, with the shapes, dtype and library of the parameters.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; dy of another shape, a negative slope_weight.

    Notes
    -----
    (I1), (I2) and (I5) to (I9) of docs/inputs.md. W. M. Czarnecki et al., "Sobolev training for
    neural networks", arXiv 1706.04859. The slopes of a relu net do not depend on where its kinks
    are, but by jumps; that dependence is in no derivative.

    Examples
    --------
    y = 2 x + 1 has slope 2: loss (7 - 5)² + (2 - 1)² = 5, and dE/dW = 2 (7 - 5) 3 + 2 (2 - 1).

    >>> from mlp_backprop import sobolev_grads
    >>> result = sobolev_grads([([[2.0]], [1.0])], [[3.0]], [[5.0]], dy=[[[1.0]]])
    >>> float(result.loss), result.grads[0].W
    (5.0, array([[14.]]))
    """
    problem = validation.problem(params, X, y, **options)
    shape = problem.X.shape[0], problem.spec.sizes[-1], problem.spec.sizes[0]
    slopes = validation.of_shape(dy, "dy", shape, problem, options.get("backend"))
    return _sobolev_grads(problem, slopes, _checked_weight(slope_weight), options.get("backend"))


def _sobolev_grads(
    problem: Problem, dy: Array, slope_weight: float, backend: str | None
) -> LossAndGrads:
    spec, layers, X, y, weight = problem
    compiled = choice.compiled_jet_grads(spec, backend, min(spec.sizes[0], spec.sizes[-1]))
    if compiled is not None:
        Y, J = compiled.outputs_and_slopes(spec, layers, X)
        values, G = backprop.loss_and_output_grad(spec, Y, y, weight)
        slope_values, GJ = _slope_loss(spec, J, dy, slope_weight, weight)
        grads = compiled.slope_grad_sums(spec, layers, X, G, GJ)
        return _reduced(spec, (spec.xp.sum(values + slope_values), grads), X, weight)

    def sums(rows: slice) -> tuple[Array, list[Layer]]:
        block = X[rows, ...], y[rows, ...], dy[rows, ...]
        return _sobolev_sums(spec, layers, *block, slope_weight, rows_of(weight, rows))

    row_numbers = _row_numbers(spec, 2 * min(spec.sizes[0], spec.sizes[-1]))
    total = choice.block_sums(spec, X, row_numbers, sums, added_pairs)
    return _reduced(spec, total, X, weight)


def _sobolev_sums(
    spec: Spec,
    params: list[Layer],
    X: Array,
    y: Array,
    dy: Array,
    slope_weight: float,
    weight: Array | None,
) -> tuple[Array, list[Layer]]:
    """Loss and gradients summed over the rows of one block."""
    xp = spec.xp
    _, n_out, n_in = dy.shape
    Z, H = backprop.forward(spec, params, X)
    values, G = backprop.loss_and_output_grad(spec, H[-1], y, weight)

    if n_out < n_in:
        # With GJ held fixed, Σ_k GJ[o, k] dY_o/dx_k is the tangent of output o along the direction
        # GJ[o]: d_L tangents then have the gradient that d_0 would have.
        J = jets.input_jacobian(spec, params, Z, H)
        slope_values, GJ = _slope_loss(
            spec, xp.permute_dims(J, (1, 0, 2)), dy, slope_weight, weight
        )
        V, Gt = xp.permute_dims(GJ, (1, 0, 2)), jets.basis(xp, n_out, X)
        tape = list(jets.levels(spec, params, Z, H, V))
    else:
        tape = list(jets.levels(spec, params, Z, H, jets.basis(xp, n_in, X)))
        slope_values, GJ = _slope_loss(
            spec, xp.permute_dims(tape[-1].Ht, (1, 2, 0)), dy, slope_weight, weight
        )
        Gt = xp.permute_dims(GJ, (2, 0, 1))
    return xp.sum(values + slope_values), jets.grad_sums(spec, params, Z, H, tape, G, Gt)


def _slope_loss(
    spec: Spec, J: Array, dy: Array, slope_weight: float, weight: Array | None
) -> tuple[Array, Array]:
    """Values (n,), and their derivatives by dY/dX (n, d_L, d_0)."""
    xp, (n, n_out, n_in) = spec.xp, dy.shape
    squares = spec._replace(loss=LOSSES["squared_error"])
    J, targets = (xp.reshape(A, (n, n_out * n_in)) for A in (J, dy))
    values, GJ = backprop.loss_and_output_grad(squares, J, targets, weight)
    return slope_weight * values, xp.reshape(slope_weight * GJ, dy.shape)


@on_stream_of_arguments
def residual_grads(
    params: Params,
    X: ArrayLike,
    residual: Residual,
    *,
    inputs: Sequence[int] | None = None,
    reduction: Reduction = "mean",
    sample_weight: ArrayLike | None = None,
    **options: Unpack[NetOptions],
) -> LossAndGrads:
    """Compute the sum of squares of a residual, and its gradient by every weight and bias.

    The residual is a function of the inputs, the outputs, their slopes and their Laplacian: of a
    differential equation that the net should satisfy, for instance.

    Parameters
    ----------
    params, X, reduction, sample_weight, backend
        As for `compute_grads`. X holds the points where the equation should hold.
    residual : callable
        residual(X, Y, dY, lap) -> (r, (r_Y, r_dY, r_lap)). Given are X (n, d_0), the outputs
        Y (n, d_L), their slopes dY (n, d_L, d_0) and their Laplacian lap (n, d_L), all rows at
        once. Returned are the residuals r (n, m) and their partial derivatives with respect to
        Y (n, m, d_L), dY (n, m, d_L, d_0) and lap (n, m, d_L); None stands for zeros. Row i
        depends on row i alone.
    activation : str or sequence of str
        As for `compute_grads`, but for relu, leaky_relu and elu, which are refused: their
        second derivatives leave out what happens at the kink, and a fit would never see it.
    inputs : sequence of int, optional
        The columns of X that the Laplacian is over, for instance all but time. None: all.

    Returns
    -------
    loss : scalar of the array library
        Σ r² over the m residuals of a sample; summed over samples, each times its weight, and
        with reduction="mean" divided by the sum of the weights.
    grads : list of Layer
        (W, b) per layer, with the shapes, dtype and library of the parameters.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; what the residual returns has the wrong shape; an activation
        without a third derivative.

    Notes
    -----
    (I1) to (I9) of docs/inputs.md. M. Raissi, P. Perdikaris and G. E. Karniadakis,
    "Physics-informed neural networks", Journal of Computational Physics 378 (2019). The residual
    is called once. Of more rows than a block has, the forward pass is done a second time.

    Examples
    --------
    The equation y'' + y = 0, at three points:

    >>> import numpy as np
    >>> from mlp_backprop import init_params, residual_grads
    >>> def oscillator(X, Y, dY, lap):
    ...     one = np.ones((len(X), 1, 1))
    ...     return lap + Y, (one, None, one)
    >>> params = init_params([1, 8, 1], rng=0)
    >>> loss, grads = residual_grads(params, np.array([[0.0], [0.5], [1.0]]), oscillator)
    >>> [grad.W.shape for grad in grads]
    [(8, 1), (1, 8)]
    """
    if not callable(residual):
        raise TypeError(f"residual must be a function, got {type_name(residual)}")
    net = validation.network(params, X, reduction=reduction, sample_weight=sample_weight, **options)
    _check_smooth(net.spec.activations)
    squares = net.spec._replace(loss=LOSSES["squared_error"])  # of the residual and 0
    problem = net._replace(spec=squares)
    return _residual_grads(problem, residual, inputs, options.get("backend"))


def _residual_grads(
    problem: Problem, residual: Residual, inputs: Any, backend: str | None
) -> LossAndGrads:
    spec, layers, X, _, weight = problem
    xp, n_in = spec.xp, spec.sizes[0]
    compiled = choice.compiled_jet_grads(spec, backend, n_in)
    if compiled is not None:
        columns = read_inputs(inputs, n_in)
        Y, dY, lap = compiled.jets(spec, layers, X, columns)
        r, partials = _read_residual(residual(X, Y, dY, lap), problem, dY, backend)
        values, G, GJ, Gs = _residual_loss(spec, r, partials, dY, weight)
        grads = compiled.jet_grad_sums(spec, layers, X, G, GJ, Gs, columns)
        return _reduced(spec, (xp.sum(values), grads), X, weight)
    V, c = jets.basis(xp, n_in, X), _coefficients(spec, X, inputs)
    q = partial(jets.laplacian_square, xp, c=c)

    @quietly  # but not around the residual: its warnings are the caller's, and so is its BLAS
    def jet(rows: slice) -> tuple[list[Array], list[Array], list[jets.Level]]:
        with choice.undisturbed(spec):
            Z, H = backprop.forward(spec, layers, X[rows, ...])
            return Z, H, list(jets.levels(spec, layers, Z, H, V, q))

    blocks, outputs = list(row_blocks(xp, X, _row_numbers(spec, 2 * n_in + 2))), []
    for rows in blocks:
        last = jet(rows)
        _, H, tape = last
        outputs.append((H[-1], xp.permute_dims(tape[-1].Ht, (1, 2, 0)), tape[-1].Hs))
    Y, dY, lap = (concatenated(xp, list(parts)) for parts in zip(*outputs, strict=True))
    r, partials = _read_residual(residual(X, Y, dY, lap), problem, dY, backend)
    values, G, GJ, Gs = _residual_loss(spec, r, partials, dY, weight)

    @quietly
    def block_sums(rows: slice) -> tuple[Array, list[Layer]]:
        Z, H, tape = last if rows is blocks[-1] else jet(rows)
        Gt = xp.permute_dims(GJ[rows, ...], (2, 0, 1))
        with choice.undisturbed(spec):
            grads = jets.grad_sums(spec, layers, Z, H, tape, G[rows, ...], Gt, rows_of(Gs, rows), c)
        return xp.sum(values[rows]), grads

    return _reduced(spec, added_blocks(map(block_sums, blocks)), X, weight)


def _check_smooth(activations: Activations) -> None:
    smooth = [row.name for row in ACTIVATIONS.values() if row.d3f is not None]
    for row in activations:
        if row.d3f is None:
            raise ValueError(
                f"activation {row.name!r} has a kink, and a Laplacian leaves out what happens "
                f"there, so that no fit would see it: choose one of {', '.join(smooth)}"
            )


def _coefficients(spec: Spec, X: Array, inputs: Any) -> Array | None:
    """1 for the columns that the Laplacian is over, else 0, as (d_0, 1, 1); None for all 1."""
    if inputs is None:
        return None
    E = jets.basis(spec.xp, spec.sizes[0], X, read_inputs(inputs, spec.sizes[0]))
    return spec.xp.sum(E, axis=0)[0, :, None, None]


def _read_residual(
    result: Any, net: Problem, dY: Array, backend: str | None
) -> tuple[Array, list[Array | None]]:
    """What a residual returned, once it is seen to fit."""
    try:
        r, (r_Y, r_dY, r_lap) = result
    except (TypeError, ValueError):
        raise TypeError(
            f"residual must return (r, (r_Y, r_dY, r_lap)), got {type_name(result)}"
        ) from None
    n, n_out, n_in = dY.shape
    shape = tuple(read("r", r).array.shape)
    if len(shape) != 2 or shape[0] != n:
        raise ValueError(f"r of the residual must have shape ({n}, m), got {shape}")
    outputs = (*shape, n_out)
    expected = {"r_Y": outputs, "r_dY": (*outputs, n_in), "r_lap": outputs}
    partials = [
        None if value is None else validation.of_shape(value, name, expected[name], net, backend)
        for name, value in zip(expected, (r_Y, r_dY, r_lap), strict=True)
    ]
    return validation.of_shape(r, "r", shape, net, backend), partials


@quietly
def _residual_loss(
    spec: Spec, r: Array, partials: list[Array | None], dY: Array, weight: Array | None
) -> tuple[Array, Array, Array, Array | None]:
    """Values (n,), and their derivatives by Y, dY/dX and the Laplacian."""
    xp = spec.xp
    values, R = backprop.loss_and_output_grad(spec, r, xp.zeros_like(r), weight)
    r_Y, r_dY, r_lap = partials
    zeros = xp.zeros_like(dY)
    G = zeros[:, :, 0] if r_Y is None else xp.sum(R[:, :, None] * r_Y, axis=1)
    GJ = zeros if r_dY is None else xp.sum(R[:, :, None, None] * r_dY, axis=1)
    Gs = None if r_lap is None else xp.sum(R[:, :, None] * r_lap, axis=1)
    return values, G, GJ, Gs


# Both -------------------------------------------------------------------------------------------


def _checked_weight(slope_weight: object) -> float:
    if isinstance(slope_weight, bool) or not isinstance(slope_weight, Real):
        raise TypeError(f"slope_weight must be a number, got {type_name(slope_weight)}")
    if not 0 <= float(slope_weight) < math.inf:  # nor is nan
        raise ValueError(f"slope_weight must be finite and not negative, got {slope_weight:g}")
    return float(slope_weight)


def _row_numbers(spec: Spec, n_arrays: int) -> int:
    """What a tape keeps of a row: Z_l, H_l and so many more arrays of each layer."""
    return (2 + n_arrays) * sum(spec.sizes)


def _reduced(
    spec: Spec, total: tuple[Array, list[Layer]], X: Array, weight: Array | None
) -> LossAndGrads:
    """Loss and gradients of all blocks, divided once."""
    loss, grads = total
    sums = Sums(loss, backprop.weight_sum(spec, X, weight), grads)
    return backprop.reduced(spec, sums)

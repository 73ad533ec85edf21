"""Vectors times the derivatives of a net: Jacobian, Hessian, Gauss-Newton, Fisher.

The mathematics stands in tangents.py: equations (V1) to (V6).
"""

from typing import Unpack

from mlp_backprop import backprop
from mlp_backprop.backprop import Sums
from mlp_backprop.edge import validation
from mlp_backprop.edge.calls import public
from mlp_backprop.edge.validation import Problem
from mlp_backprop.engines import choice
from mlp_backprop.losses import Loss
from mlp_backprop.maths.row_blocks import added_layers
from mlp_backprop.maths.tangents import KINDS, Kind, row_numbers
from mlp_backprop.types import (
    Array,
    ArrayLike,
    Layer,
    Namespace,
    NetOptions,
    Params,
    SumOptions,
)


def _inner_product(xp: Namespace, H: Array, U: Array) -> tuple[Array, Array]:
    return xp.sum(H * U, axis=1), U


def _no_curvature(xp: Namespace, H: Array, U: Array, V: Array) -> Array:
    return xp.zeros_like(V)


# <u, H_L> as a loss: its gradient is Jᵀ u.
INNER_PRODUCT = Loss(
    "inner_product", _inner_product, _no_curvature, _no_curvature, "real", link=None
)


@public
def jvp(params: Params, X: ArrayLike, v: Params, **options: Unpack[NetOptions]) -> Array:
    """Compute J v, the change of the outputs as the parameters move along v.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.
    v : sequence of (W, b)
        A vector with the structure, shapes and dtype of the parameters.

    Returns
    -------
    array (n, d_L)
        The derivative of forward(params + t v, X) at t = 0: torch.func.jvp with respect to the
        parameters. relu and its like have the slope at a kink that `compute_grads` takes, 0 for
        relu.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; v of another structure than the parameters.

    Notes
    -----
    Equations (V1) and (V2); Pearlmutter, "Fast exact multiplication by the Hessian", Neural
    Computation 6 (1994).

    Examples
    --------
    >>> from mlp_backprop import jvp
    >>> jvp([([[2.0]], [1.0])], [[3.0]], [([[10.0]], [1.0])])
    array([[31.]])
    """
    net = validation.network(params, X, **options)
    v = validation.like_params(v, "v", net, options.get("backend"))
    return choice.jacobian_product(net.spec, net.params, v, net.X, options.get("backend"))


@public
def vjp(params: Params, X: ArrayLike, u: ArrayLike, **options: Unpack[NetOptions]) -> list[Layer]:
    """Compute Jᵀ u, the gradient of the sum of u ∘ H_L with respect to the parameters.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.
    u : array (n, d_L)
        A number for each output, in the dtype of the parameters. With u = dE/dH_L of a loss of
        your own, the result is the gradient of that loss.

    Returns
    -------
    list of Layer
        (W, b) per layer, summed over the samples: torch.func.vjp with respect to the parameters.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; u of another shape than the outputs.

    Notes
    -----
    Equations (1) to (3) of docs/derivation.md, begun with G_L = u.

    Examples
    --------
    >>> from mlp_backprop import vjp
    >>> vjp([([[2.0]], [1.0])], [[3.0], [4.0]], [[1.0], [10.0]])
    [Layer(W=array([[43.]]), b=array([11.]))]
    """
    net = validation.network(params, X, **options)
    U = validation.like_outputs(u, "u", net, options.get("backend"))
    compiled = choice.first_order(net.spec, options.get("backend"))
    if compiled:
        grads: list[Layer] = compiled.vjp(net.spec, net.params, net.X, U)
        return grads
    spec = net.spec._replace(loss=INNER_PRODUCT)

    def sums(rows: slice) -> list[Layer]:
        block = net.X[rows, :], U[rows, :], None
        return backprop.loss_and_grad_sums(spec, net.params, *block).grads

    n = net.X.shape[0]
    total = choice.block_sums(spec, net.X, row_numbers(spec), sums, added_layers, rows=n)
    return backprop.reduced(spec, Sums(0.0, 1.0, total)).grads


@public
def hvp(
    params: Params, X: ArrayLike, y: ArrayLike, v: Params, **options: Unpack[SumOptions]
) -> list[Layer]:
    """Compute H v, the Hessian of the loss with respect to all parameters, times a vector.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`.
    v : sequence of (W, b)
        A vector with the structure, shapes and dtype of the parameters.

    Returns
    -------
    list of Layer
        The derivative of the gradient of `compute_grads` along v, on its scale: for "sum" the sum
        over the samples, each times its weight, for "mean" divided by the sum of the weights.
        torch.autograd.grad of grad, "double backward", gives the same.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; v of another structure than the parameters.

    Notes
    -----
    Equations (V1) to (V6), twice to three times the work of a gradient; Pearlmutter, "Fast exact
    multiplication by the Hessian", Neural Computation 6 (1994).

    At a kink both derivatives are those of the tables: relu'(0) = 0 and elu''(0) = 1, from the left
    (torch takes 0 for the second), and huber''(±1) = 0. relu, leaky_relu and absolute_error have
    second derivatives of 0 everywhere: what their kinks would add is left out, as in torch.

    Examples
    --------
    >>> from mlp_backprop import hvp
    >>> hvp([([[2.0]], [1.0])], [[3.0]], [[5.0]], [([[1.0]], [0.0])])
    [Layer(W=array([[18.]]), b=array([6.]))]
    """
    return _product("hessian", params, X, y, v, **options)


@public
def ggnvp(
    params: Params, X: ArrayLike, y: ArrayLike, v: Params, **options: Unpack[SumOptions]
) -> list[Layer]:
    """Compute Jᵀ A J v, the generalised Gauss-Newton matrix times a vector.

    Parameters
    ----------
    params, X, y, v, activation, loss, reduction, sample_weight, backend
        As for `hvp`, and refused as there.

    Returns
    -------
    list of Layer
        J is the Jacobian of the outputs with respect to the parameters, A the Hessian of the loss
        with respect to the outputs. Scaled as `hvp`. The matrix is positive semi-definite, and is
        the Hessian where the outputs are linear in the parameters. For "squared_error" A = 2.

    Notes
    -----
    J v forward, A J v, and back as a gradient; Schraudolph, "Fast curvature matrix-vector products
    for second-order gradient descent", Neural Computation 14 (2002). A is 0 for "absolute_error",
    and for "huber" where |r| >= 1: `fisher_vp` has what is of use there.

    Examples
    --------
    >>> from mlp_backprop import ggnvp
    >>> ggnvp([([[2.0]], [1.0])], [[3.0]], [[5.0]], [([[1.0]], [0.0])])
    [Layer(W=array([[18.]]), b=array([6.]))]
    """
    return _product("ggn", params, X, y, v, **options)


@public
def fisher_vp(
    params: Params, X: ArrayLike, y: ArrayLike, v: Params, **options: Unpack[SumOptions]
) -> list[Layer]:
    """Compute F v, the Fisher information matrix of the net times a vector.

    Parameters
    ----------
    params, X, y, v, activation, loss, reduction, sample_weight, backend
        As for `hvp`, and refused as there. y matters only for its class weights, whose sum in a
        row multiplies F.

    Returns
    -------
    list of Layer
        F is the mean of g gᵀ, with g the gradient of -log p(y | x) for y drawn from the net's own
        predictions, p proportional to exp(-loss): not the "empirical" one of the data's y. Scaled
        as `hvp`; a sample of weight w counts as w samples.

    Notes
    -----
    F = Jᵀ A J with the Fisher matrix A of the loss with respect to the outputs, derived in
    losses.py: the Hessian of the loss, so that this is `ggnvp`, but for "absolute_error", A = 1,
    and "huber", A = 0.585, the probability of |r| < 1. Martens, "New insights and perspectives on
    the natural gradient method", Journal of Machine Learning Research 21 (2020).

    Examples
    --------
    >>> from mlp_backprop import fisher_vp
    >>> v = [([[1.0]], [0.0])]
    >>> fisher_vp([([[2.0]], [1.0])], [[3.0]], [[5.0]], v, loss="absolute_error")
    [Layer(W=array([[9.]]), b=array([3.]))]
    """
    return _product("fisher", params, X, y, v, **options)


def _product(
    kind: str, params: Params, X: ArrayLike, y: ArrayLike, v: Params, **options: Unpack[SumOptions]
) -> list[Layer]:
    problem = validation.problem(params, X, y, **options)
    vector = validation.like_params(v, "v", problem, options.get("backend"))
    return product(KINDS[kind], problem, vector, options.get("backend"))


def product(kind: Kind, problem: Problem, v: list[Layer], backend: str | None) -> list[Layer]:
    """The product with a vector, for arguments that are checked."""
    spec, params, X, y, weight = problem
    return choice.vector_product(spec, kind, params, v, X, y, weight, backend)

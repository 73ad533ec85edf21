"""Derivatives with respect to the inputs: of the loss, and first and second ones of the outputs.

The maths is in jets.py. Whatever the number of rows, a pass keeps the arrays of one block of them.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, Unpack

from mlp_backprop import backprop
from mlp_backprop.edge import validation
from mlp_backprop.edge.arguments import table_row, type_name
from mlp_backprop.edge.calls import public
from mlp_backprop.edge.validation import Problem
from mlp_backprop.engines import choice
from mlp_backprop.maths import jets
from mlp_backprop.maths.row_blocks import concatenated, rows_of
from mlp_backprop.types import Array, ArrayLike, Layer, NetOptions, Params, SumOptions


@public
def input_grads(params: Params, X: ArrayLike, y: ArrayLike, **options: Unpack[SumOptions]) -> Array:
    """Compute the gradient of the loss with respect to the inputs.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`, and refused as there.

    Returns
    -------
    array (n, d_0)
        dE/dX, in the parameters' dtype: row i is the gradient of the loss of row i, times its
        weight and, with reduction="mean", divided by the sum of the weights. It is what torch
        leaves in X.grad for the same loss.

    Notes
    -----
    Equation (4) of docs/derivation.md. At a kink of relu, leaky_relu or elu the derivative is the
    one from the left.

    Examples
    --------
    A single neuron: z = 2 * 3 + 1 = 7, loss (7 - 5)², so dE/dx = 2 (7 - 5) 2.

    >>> from mlp_backprop import input_grads
    >>> input_grads([([[2.0]], [1.0])], X=[[3.0]], y=[[5.0]])
    array([[8.]])
    """
    problem = validation.problem(params, X, y, **options)
    compiled = choice.first_order(problem.spec, options.get("backend"))
    return compiled.input_grads(*problem) if compiled else _input_grads(problem)


def _input_grads(problem: Problem) -> Array:
    spec, layers, X, y, weight = problem
    xp = spec.xp

    def grads(rows: slice) -> Array:
        Z, H = backprop.forward(spec, layers, X[rows, ...])
        _, G = backprop.loss_and_output_grad(spec, H[-1], y[rows, ...], rows_of(weight, rows))
        *_, (_, D) = backprop.backward(spec, layers, Z, H, G)
        return D @ layers[0].W

    parts = choice.each_block(spec, X, 2 * sum(spec.sizes), grads, rows=X.shape[0])
    divisor = backprop.divisor(spec, backprop.weight_sum(spec, X, weight))
    return xp.astype(concatenated(xp, parts) / divisor, spec.dtype, copy=False)


@public
def jacobian(
    params: Params,
    X: ArrayLike,
    *,
    wrt: Literal["inputs", "params"] = "inputs",
    **options: Unpack[NetOptions],
) -> Array | list[Layer]:
    """Compute the derivative of every output of every row.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.
    wrt : {"inputs", "params"}
        What the outputs are differentiated by.

    Returns
    -------
    array (n, d_L, d_0) or list of Layer
        For the inputs dY/dX: entry [i, o, k] is the derivative of output o of row i by input k.
        For the parameters W (n, d_L, d_l, d_{l-1}) and b (n, d_L, d_l) of every layer. As
        torch.func.jacrev under vmap over rows.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; an unknown `wrt`.

    Notes
    -----
    With respect to inputs there are two ways: a backward sweep per output, equation (3), or a
    forward sweep per input, (I1) and (I2) of docs/inputs.md. The one with fewer sweeps is taken.
    At a kink of relu, leaky_relu or elu the derivative is the one from the left.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import init_params, jacobian
    >>> params = init_params([3, 5, 2], rng=0)
    >>> jacobian(params, np.ones((4, 3))).shape
    (4, 2, 3)
    >>> [grad.W.shape for grad in jacobian(params, np.ones((4, 3)), wrt="params")]
    [(4, 2, 5, 3), (4, 2, 2, 5)]
    """
    compute = table_row("wrt", wrt, JACOBIANS)
    return compute(validation.network(params, X, **options), options.get("backend"))


def _input_jacobian(net: Problem, backend: str | None) -> Array:
    spec, layers, X, *_ = net
    compiled = choice.compiled_jets(spec, backend)
    if compiled is not None:
        return compiled.jacobian(spec, layers, X)
    xp, n_in, n_out = spec.xp, spec.sizes[0], spec.sizes[-1]

    def backward(Z: list[Array], H: list[Array]) -> Array:
        J = jets.input_jacobian(spec, layers, Z, H)
        return xp.permute_dims(J, (1, 0, 2))

    def forward(Z: list[Array], H: list[Array]) -> Array:
        *_, last = jets.levels(spec, layers, Z, H, jets.basis(xp, n_in, X))
        return xp.permute_dims(last.Ht, (1, 2, 0))

    return _by_blocks(net, min(n_in, n_out), backward if n_out <= n_in else forward)


def _params_jacobian(net: Problem, backend: str | None) -> list[Layer]:
    """Not in blocks: the result is larger than all that the pass keeps."""
    spec, layers, X, *_ = net
    compiled = choice.per_output(spec, backend)
    if compiled is not None:
        found: list[Layer] = compiled.jacobian(spec, layers, X)
        return found
    xp = spec.xp
    E = jets.basis(xp, spec.sizes[-1], X)
    grads = []
    with choice.undisturbed(spec):
        Z, H = backprop.forward(spec, layers, X)
        for l, D in backprop.backward(spec, layers, Z, H, E):
            D = xp.permute_dims(D, (1, 0, 2))
            grads.append(Layer(W=D[..., None] * H[l - 1][:, None, None, :], b=D))
    return grads[::-1]


JACOBIANS = {"inputs": _input_jacobian, "params": _params_jacobian}


@public
def input_hessian_diag(params: Params, X: ArrayLike, **options: Unpack[NetOptions]) -> Array:
    """Compute the diagonal of the Hessian of every output by the inputs.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`, and refused as there.

    Returns
    -------
    array (n, d_L, d_0)
        Entry [i, o, k] is d²Y[i, o] / dX[i, k]²: the diagonals of torch.func.hessian under vmap.

    Notes
    -----
    (I1) to (I4) of docs/inputs.md, K = d_0 tangents and second derivatives beside the outputs;
    no Hessian is formed. The second derivatives of relu and leaky_relu are 0 everywhere: what
    happens at the kink, a jump of the slope, is not in them. That of elu at 0 is the one from the
    left, 1.

    Examples
    --------
    y = tanh(2 x) has y'' = -8 tanh(2 x) (1 - tanh(2 x)²).

    >>> from mlp_backprop import input_hessian_diag
    >>> input_hessian_diag([([[2.0]], [0.0])], [[0.5]], activation=["tanh"]).round(4)
    array([[[-2.5588]]])
    """
    net = validation.network(params, X, **options)
    compiled = choice.compiled_jets(net.spec, options.get("backend"))
    if compiled is not None:
        return compiled.hessian_diag(net.spec, net.params, net.X)
    n_in = net.X.shape[1]
    return _second_derivatives(net, range(n_in), lambda Zt: Zt * Zt, n_in)


@public
def laplacian(
    params: Params,
    X: ArrayLike,
    *,
    inputs: Sequence[int] | None = None,
    **options: Unpack[NetOptions],
) -> Array:
    """Compute the sum of the second derivatives of every output by the inputs.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.
    inputs : sequence of int, optional
        The columns of X that are summed over, for instance all but time. None: all.

    Returns
    -------
    array (n, d_L)
        Entry [i, o] is Σ_k d²Y[i, o] / dX[i, k]²: the traces of torch.func.hessian under vmap.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; inputs that X does not have, or one twice.

    Notes
    -----
    The forward Laplacian, (I1) to (I4) of docs/inputs.md; R. Li et al., arXiv 2307.08214. Kinks
    are as for `input_hessian_diag`: the Laplacian of a relu net is 0.

    Examples
    --------
    y = tanh(2 a + b) has d²y/da² = -8 y (1 - y²) and d²y/db² = -2 y (1 - y²).

    >>> from mlp_backprop import laplacian
    >>> params = [([[2.0, 1.0]], [0.0])]
    >>> laplacian(params, [[0.5, 0.0]], activation=["tanh"]).round(4)
    array([[-3.1985]])
    >>> laplacian(params, [[0.5, 0.0]], activation=["tanh"], inputs=[0]).round(4)
    array([[-2.5588]])
    """
    net = validation.network(params, X, **options)
    which = read_inputs(inputs, net.X.shape[1])
    compiled = choice.compiled_jets(net.spec, options.get("backend"))
    if compiled is not None:
        return compiled.laplacian(net.spec, net.params, net.X, which)
    return _second_derivatives(net, which, partial(jets.laplacian_square, net.spec.xp), 1)


@public
def input_hessian_entries(
    params: Params, X: ArrayLike, pairs: Iterable[tuple[int, int]], **options: Unpack[NetOptions]
) -> Array:
    """Compute chosen second derivatives of every output by the inputs.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.
    pairs : iterable of (int, int)
        Columns (j, k) of X, from 0 to d_0 - 1.

    Returns
    -------
    array (n, d_L, len(pairs))
        Entry [i, o, p] is d²Y[i, o] / dX[i, j] dX[i, k], with (j, k) = pairs[p].

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; pairs that are not pairs of columns of X.

    Notes
    -----
    (I1) to (I4) of docs/inputs.md, with a tangent for each column that occurs. Kinks are as for
    `input_hessian_diag`.

    Examples
    --------
    y = tanh(2 a + b) has the mixed derivative -4 y (1 - y²).

    >>> from mlp_backprop import input_hessian_entries
    >>> params, pairs = [([[2.0, 1.0]], [0.0])], [(0, 1), (1, 1)]
    >>> input_hessian_entries(params, [[0.5, 0.0]], pairs, activation=["tanh"]).round(4)
    array([[[-1.2794, -0.6397]]])
    """
    net = validation.network(params, X, **options)
    xp, pairs = net.spec.xp, _read_pairs(pairs, net.X.shape[1])
    compiled = choice.compiled_jets(net.spec, options.get("backend"))
    if compiled is not None:
        return compiled.hessian_entries(net.spec, net.params, net.X, pairs)
    columns = sorted({k for pair in pairs for k in pair})
    first, second = (
        jets.indices(xp, [columns.index(pair[side]) for pair in pairs], net.X) for side in (0, 1)
    )

    def products(Zt: Array) -> Array:
        return xp.take(Zt, first, axis=0) * xp.take(Zt, second, axis=0)

    return _second_derivatives(net, columns, products, len(pairs))


def _second_derivatives(
    net: Problem, columns: Sequence[int], q: jets.Square, n_second: int
) -> Array:
    """Hs_L of the last layer as (n, d_L), or (n, d_L, P) where q gives P of them."""
    spec, layers, X, *_ = net
    xp, V = spec.xp, jets.basis(spec.xp, spec.sizes[0], X, columns)

    def second(Z: list[Array], H: list[Array]) -> Array:
        *_, last = jets.levels(spec, layers, Z, H, V, q)
        return last.Hs if last.Hs.ndim == 2 else xp.permute_dims(last.Hs, (1, 2, 0))

    return _by_blocks(net, 3 * len(columns) + 2 * n_second, second)


def _by_blocks(
    net: Problem, n_arrays: int, derivative: Callable[[list[Array], list[Array]], Array]
) -> Array:
    """A function of Z and H, row block by row block; so many arrays are beside them in a layer."""
    spec, layers, X, *_ = net
    row_numbers = 2 * sum(spec.sizes) + n_arrays * max(spec.sizes)

    def of_block(rows: slice) -> Array:
        return derivative(*backprop.forward(spec, layers, X[rows, ...]))

    return concatenated(spec.xp, choice.each_block(spec, X, row_numbers, of_block))


def read_inputs(inputs: Any, width: int) -> list[int]:
    """Columns of X, each once; None stands for all."""
    if inputs is None:
        return list(range(width))
    if not isinstance(inputs, Iterable):
        raise TypeError(f"inputs must be a sequence of columns of X, got {type_name(inputs)}")
    columns = [_column(k, width) for k in inputs]
    if len(set(columns)) < len(columns):
        raise ValueError(f"inputs names a column twice: {columns}")
    return columns


def _read_pairs(pairs: Any, width: int) -> list[tuple[int, int]]:
    if not isinstance(pairs, Iterable):
        raise TypeError(f"pairs must hold pairs (j, k) of columns of X, got {type_name(pairs)}")
    read = []
    for pair in pairs:
        if not hasattr(pair, "__len__") or len(pair) != 2:
            raise TypeError(f"pairs must hold pairs (j, k) of columns of X, got {pair!r}")
        read.append((_column(pair[0], width), _column(pair[1], width)))
    return read


def _column(k: Any, width: int) -> int:
    # What is true or false would count as column 1 or 0.
    if isinstance(k, bool) or str(getattr(k, "dtype", "")).endswith("bool"):
        raise TypeError(
            f"columns of X are named by integers, got {k!r}; of a mask, its flatnonzero"
        )
    try:
        column = operator.index(k)
    except TypeError:
        raise TypeError(f"columns of X are named by integers, got {k!r}") from None
    if not 0 <= column < width:
        raise ValueError(f"X has no column {column}: they are 0 to {width - 1}")
    return column

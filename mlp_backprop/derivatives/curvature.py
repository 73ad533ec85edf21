"""Second derivatives as matrices, the tangent kernel, and products as SciPy's linear operators.

The mathematics stands in hessians.py: equations (V7) to (V9).
"""

from itertools import pairwise
from typing import Any, Literal, Unpack

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.backprop import Spec
from mlp_backprop.derivatives import products
from mlp_backprop.edge import backends, validation
from mlp_backprop.edge.arguments import Argument, dtype_name, table_row
from mlp_backprop.edge.calls import public, quietly
from mlp_backprop.engines import choice
from mlp_backprop.maths import hessians, tangents
from mlp_backprop.maths.row_blocks import concatenated, row_blocks, rows_of
from mlp_backprop.maths.tangents import KINDS
from mlp_backprop.nets.vectors import n_numbers, ravel, unravel
from mlp_backprop.types import Array, ArrayLike, Layer, NetOptions, Params, SumOptions

# P² numbers are 3.2 GB of float64 then, and the matrix is made from its blocks by way of copies.
MOST_PARAMETERS = 20_000


@public
def hessian(params: Params, X: ArrayLike, y: ArrayLike, **options: Unpack[SumOptions]) -> Array:
    """Compute the Hessian of the loss with respect to all weights and biases, as a matrix.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`.

    Returns
    -------
    array (P, P)
        Rows and columns in the order of `ravel_params`; symmetric to the last bit. The derivative
        of the gradient of `compute_grads`, on its scale: torch.func.hessian with respect to the
        parameters. At kinks as `hvp`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; more than 20 000 parameters, whose matrix would be above 3 GB
        (float64). `hvp` and `linear_operator` need no matrix.

    Notes
    -----
    Equations (V7) and (V8): about n P² multiplications, as many as the product of an (n, P) matrix
    with its transpose. A few times the matrix is held meanwhile. Bishop, "Exact calculation of the
    Hessian matrix for the multilayer perceptron", Neural Computation 4 (1992).

    Examples
    --------
    >>> from mlp_backprop import hessian
    >>> hessian([([[2.0]], [1.0])], [[3.0]], [[5.0]])
    array([[18.,  6.],
           [ 6.,  2.]])
    """
    return _matrix(params, X, y, gauss_newton=False, **options)


@public
def ggn(params: Params, X: ArrayLike, y: ArrayLike, **options: Unpack[SumOptions]) -> Array:
    """Compute the generalised Gauss-Newton matrix Jᵀ A J.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `hessian`, and refused as there.

    Returns
    -------
    array (P, P)
        J is the Jacobian of the outputs with respect to the parameters, in the order of
        `ravel_params`, A the Hessian of the loss with respect to the outputs. Scaled as
        `hessian`, symmetric to the last bit, positive semi-definite but for rounding.

    Notes
    -----
    `ggnvp` has more on the matrix, and `hessian` on cost.

    Examples
    --------
    The gradient of w x + b is (x, 1), and A = 2:

    >>> from mlp_backprop import ggn
    >>> ggn([([[2.0]], [1.0])], [[3.0]], [[5.0]])
    array([[18.,  6.],
           [ 6.,  2.]])
    """
    return _matrix(params, X, y, gauss_newton=True, **options)


def _matrix(
    params: Params, X: Array, y: Array, *, gauss_newton: bool, **options: Unpack[SumOptions]
) -> Array:
    problem = validation.problem(params, X, y, **options)
    spec, layers, X, y, weight = problem
    P = n_numbers(layers)
    if P > MOST_PARAMETERS:
        raise ValueError(
            f"params holds {P} numbers, and the matrix {P}² of them; above {MOST_PARAMETERS} use "
            "hvp, ggnvp or linear_operator, which form no matrix"
        )
    sums = choice.compiled_matrix(spec, options.get("backend")) or _matrix_sums
    matrix = ordered(spec, sums(spec, layers, X, y, weight, gauss_newton))
    divisor = backprop.divisor(spec, backprop.weight_sum(spec, X, weight))
    return spec.xp.astype(matrix / divisor, spec.dtype, copy=False)


def _matrix_sums(
    spec: Spec, layers: list[Layer], X: Array, y: Array, weight: Array | None, gauss_newton: bool
) -> Array:
    """Over samples, entries of [W_l b_l] row by row."""
    total: list[Array] = []
    with choice.undisturbed(spec):
        for cut in row_blocks(spec.xp, X, matrix_row_numbers(spec)):
            block = X[cut, :], y[cut, ...], rows_of(weight, cut)
            found = hessians.blocks(spec, layers, *block, gauss_newton)
            total = [a + b for a, b in zip(total, found, strict=True)] if total else found
    return assembled(spec, total)


def assembled(spec: Spec, found: list[Array]) -> Array:
    """The matrix (P, P) from its blocks on and above the diagonal."""
    xp, L = spec.xp, len(spec.sizes) - 1
    upper = iter(found)
    grid: list[list[Array]] = [[None] * L for _ in range(L)]
    for l in range(L):
        for m in range(l, L):
            B = next(upper)
            grid[l][m] = (B + B.T) / 2 if l == m else B
            grid[m][l] = grid[l][m].T
    return xp.concat([xp.concat(row, axis=1) for row in grid], axis=0)


def ordered(spec: Spec, matrix: Array) -> Array:
    """Its rows and columns in the order of ravel_params."""
    xp, order, end = spec.xp, [], 0
    for n_in, n_out in pairwise(spec.sizes):
        begin, end = end, end + n_out * (n_in + 1)
        places = xp.arange(begin, end, device=matrix.device)
        places = xp.reshape(places, (n_out, n_in + 1))
        order.append(Layer(places[:, :-1], places[:, -1]))
    order = ravel(xp, order)
    return xp.take(xp.take(matrix, order, axis=0), order, axis=1)


def matrix_row_numbers(spec: Spec) -> int:
    """What is kept of a row: some arrays of (V7) for the widest layer, and products of (V8)."""
    changes = 4 * max(spec.sizes[1:]) * sum(spec.sizes)
    products = 3 * max(n_out * (n_in + 1) for n_in, n_out in pairwise(spec.sizes))
    return changes + products


@public
def ntk(params: Params, X1: ArrayLike, X2: ArrayLike, **options: Unpack[NetOptions]) -> Array:
    """Compute the neural tangent kernel of the net at these parameters.

    Parameters
    ----------
    params, activation, backend
        As for `compute_grads`, and refused as there.
    X1 : array (n1, d_0)
        Inputs, as X of `compute_grads`.
    X2 : array (n2, d_0)
        More of them; or X1 again.

    Returns
    -------
    array (n1, d_L, n2, d_L)
        Entry [i, a, j, b] is the inner product of the gradients with respect to all parameters
        of output a at X1[i] and output b at X2[j]. Reshaped to (n1 d_L, n2 d_L) it is J1 J2ᵀ.

    Notes
    -----
    Equation (V9), without a Jacobian; Jacot, Gabriel and Hongler, "Neural tangent kernel", NeurIPS
    2018, there in the limit of wide nets.

    Examples
    --------
    The gradient of w x + b is (x, 1):

    >>> from mlp_backprop import ntk
    >>> ntk([([[2.0]], [1.0])], [[3.0]], [[4.0], [0.0]])[0, 0, :, 0]
    array([13.,  1.])
    """
    net = validation.network(params, X1, name="X1", **options)
    others = validation.like_inputs(X2, "X2", net, options.get("backend"))
    compiled = choice.per_output(net.spec, options.get("backend"))
    kernel = _kernel if compiled is None else compiled.kernel
    return kernel(net.spec, net.params, net.X, others)


def _kernel(spec: Spec, params: list[Layer], X1: Array, X2: Array) -> Array:
    xp, deltas = spec.xp, spec.sizes[-1] * tangents.row_numbers(spec)
    others = list(row_blocks(xp, X2, deltas))

    def strip(rows: slice) -> Array:
        pairs = [(X1[rows, :], X2[other, :]) for other in others]
        return xp.concat([hessians.kernel(spec, params, *pair) for pair in pairs], axis=2)

    return concatenated(xp, choice.each_block(spec, X1, deltas, strip))


@public
def linear_operator(
    kind: Literal["hessian", "ggn", "fisher"],
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    **options: Unpack[SumOptions],
) -> Any:
    """Make a SciPy LinearOperator of the Hessian, the Gauss-Newton or the Fisher matrix.

    Parameters
    ----------
    kind : {"hessian", "ggn", "fisher"}
        The matrix of `hvp`, `ggnvp` or `fisher_vp`, on vectors in the order of `ravel_params`.
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`. Checked once, here; arrays changed later change the operator.

    Returns
    -------
    scipy.sparse.linalg.LinearOperator (P, P)
        Symmetric. SciPy's vectors are NumPy arrays: they are copied to the parameters' device,
        and the products back.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `compute_grads`; SciPy not installed.

    Examples
    --------
    The largest eigenvalue of the Hessian:

    >>> import numpy as np
    >>> from mlp_backprop import hessian, init_params, linear_operator
    >>> from scipy.sparse.linalg import eigsh
    >>> params = init_params([2, 3, 1], rng=0)
    >>> data = np.ones((4, 2)), np.zeros((4, 1))
    >>> operator = linear_operator("hessian", params, *data)
    >>> largest = eigsh(operator, k=1, which="LA", return_eigenvectors=False)
    >>> np.allclose(largest, np.linalg.eigvalsh(hessian(params, *data))[-1])
    True
    """
    row = table_row("kind", kind, KINDS)
    problem = validation.problem(params, X, y, **options)
    try:
        from scipy.sparse.linalg import LinearOperator
    except ImportError as error:
        raise ImportError(
            f"linear_operator needs scipy ({error}): pip install 'mlp-backprop[scipy]'"
        ) from error
    xp, layers, home = problem.spec.xp, problem.params, problem.home
    dtype, backend = dtype_name(problem.spec.dtype), options.get("backend")

    @quietly
    def times(x: Array) -> Array:
        with backends.callers_stream([X], backend):
            vector = home.place(Argument("x", np.reshape(x, -1), np), dtype)
            result = products.product(row, problem, unravel(xp, vector, layers), backend)
            return backends.to_numpy(xp, ravel(xp, result))

    P = n_numbers(layers)
    host_dtype = backends.to_numpy(xp, layers[0].b).dtype
    return LinearOperator((P, P), matvec=times, rmatvec=times, dtype=host_dtype)

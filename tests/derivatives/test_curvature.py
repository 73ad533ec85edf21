"""The Hessian, the Gauss-Newton matrix, the tangent kernel and SciPy's operators."""

import sys
from contextlib import contextmanager

import numpy as np
import pytest
from derivatives.test_products import SHAPES, torch_matrices, vector_like
from numpy.testing import assert_array_equal
from oracles import ACTIVATIONS, LOSSES, assert_close, make_problem, problems

from mlp_backprop.derivatives import curvature
from mlp_backprop.derivatives.curvature import ggn, hessian, linear_operator, ntk
from mlp_backprop.derivatives.products import fisher_vp, ggnvp, hvp, vjp
from mlp_backprop.edge import backends
from mlp_backprop.maths import hessians, row_blocks
from mlp_backprop.nets.vectors import ravel_params, unravel_params
from mlp_backprop.types import flat


def run(function, problem, **options):
    return function(problem.params, problem.X, problem.y, **problem.options | options)


def by_columns(product, problem, **options):
    """The matrix of a vector product, a column for each unit vector."""
    P = len(ravel_params(problem.params))
    args = problem.params, problem.X, problem.y
    options = problem.options | options
    columns = [product(*args, unravel_params(e, problem.params), **options) for e in np.eye(P)]
    return np.stack([ravel_params(column) for column in columns], axis=1)


# Hessian and Gauss-Newton matrix -----------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch(activation, loss):
    for seed, problem in problems(SHAPES, activation, loss):
        reduction = ("mean", "sum")[seed % 2]
        _, H, G = torch_matrices(problem, reduction)
        assert_close(run(hessian, problem, reduction=reduction), H, 1e-11)
        assert_close(run(ggn, problem, reduction=reduction), G, 1e-11)


@pytest.mark.parametrize(("matrix", "product"), [(hessian, hvp), (ggn, ggnvp)])
def test_columns_are_the_vector_products(matrix, product):
    names = ["sigmoid", "elu", "softplus", "tanh"]
    problem = make_problem((2, 4, 3, 5, 3), activation=names, loss="huber", weighted=True)
    assert_close(run(matrix, problem), by_columns(product, problem), 1e-13)


@pytest.mark.parametrize("matrix", [hessian, ggn])
def test_symmetric_to_the_bit_and_in_blocks(matrix, monkeypatch):
    problem = make_problem(n=11, activation="silu", loss="softmax_cross_entropy", weighted=True)
    whole = run(matrix, problem)
    assert_array_equal(whole, whole.T)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 4 * 8 * (4 * 5 * 14 + 3 * 20))
    cut = run(matrix, problem)
    assert_array_equal(cut, cut.T)
    assert_close(cut, whole, 1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_gauss_newton_matrix_is_positive_semi_definite(loss):
    problem = make_problem(loss=loss, activation="tanh", weighted=True)
    eigenvalues = np.linalg.eigvalsh(run(ggn, problem))
    assert eigenvalues[0] >= -1e-13 * max(eigenvalues[-1], 1e-300)


def test_gauss_newton_matrix_is_the_hessian_of_a_linear_net():
    problem = make_problem((3, 4), loss="poisson", weighted=True)
    assert_close(run(ggn, problem), run(hessian, problem), 1e-13)


@pytest.mark.parametrize("matrix", [hessian, ggn])
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_every_library_agrees_with_numpy(loss, matrix, backend):
    problem = make_problem(loss=loss, activation="gelu_tanh", weighted=True)
    got = run(matrix, problem.map(backend.array))
    assert_close(backend.numpy(got), run(matrix, problem), 1e-13)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_matrices_are_like_the_parameters(dtype, backend):
    problem = make_problem((3, 4, 2), dtype=dtype).map(backend.array)
    for A in (run(hessian, problem), run(ggn, problem), ntk(problem.params, problem.X, problem.X)):
        assert type(A) is type(problem.X)
        assert A.dtype == problem.X.dtype


def test_no_rows_give_a_matrix_of_zeros():
    problem = make_problem(n=0)
    for matrix in (hessian, ggn):
        assert_array_equal(run(matrix, problem, reduction="sum"), np.zeros((44, 44)))


def test_half_precision_is_summed_in_float32():
    torch = pytest.importorskip("torch")
    problem = make_problem((2, 3, 1), n=5000, dtype=np.float32)
    half = problem.map(lambda A: torch.tensor(A).half())
    got = run(hessian, half)
    assert got.dtype == torch.float16
    assert_close(got.numpy(), run(hessian, problem), 2e-2)


def test_a_matrix_too_large_is_refused():
    problem = make_problem((200, 100, 1), n=2)
    for matrix in (hessian, ggn):
        with pytest.raises(ValueError, match=r"20201 numbers, .* use hvp, ggnvp or linear_op"):
            run(matrix, problem)


def test_bad_input_is_refused_as_everywhere():
    problem = make_problem((3, 2))
    for function in (hessian, ggn):
        with pytest.raises(ValueError, match="X has 2 columns"):
            run(function, problem._replace(X=problem.X[:, :2]))
        with pytest.raises(ValueError, match="unknown loss"):
            run(function, problem, loss="square")


# The tangent kernel ------------------------------------------------------------------------------


def jacobian_rows(problem, X):
    """(n d_L, P), a row at a time."""
    units = np.eye(problem.params[-1][1].size)
    options = {"activation": problem.options["activation"]}
    rows = [vjp(problem.params, x[None], e[None], **options) for x in X for e in units]
    return np.stack([ravel_params(row) for row in rows])


@pytest.mark.parametrize("block_bytes", [1 << 20, 1])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_kernel_is_the_product_of_jacobians(activation, block_bytes, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block_bytes)
    for sizes in SHAPES:
        problem = make_problem(sizes, activation=activation)
        other = np.random.default_rng(3).normal(size=(4, sizes[0]))
        expected = jacobian_rows(problem, problem.X) @ jacobian_rows(problem, other).T
        K = ntk(problem.params, problem.X, other, activation=activation)
        assert K.shape == (7, sizes[-1], 4, sizes[-1])
        assert_close(K.reshape(expected.shape), expected, 1e-13)


@pytest.mark.parametrize("block_bytes", [1 << 20, 1])
def test_the_kernel_on_every_library(block_bytes, backend, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", block_bytes)
    problem, other = make_problem(), np.random.default_rng(3).normal(size=(4, 3))
    expected = ntk(problem.params, problem.X, other, activation="tanh")
    placed = problem.map(backend.array)
    K = ntk(placed.params, placed.X, backend.array(other), activation="tanh")
    assert_close(backend.numpy(K), expected, 1e-13)


def test_a_kernel_of_no_inputs():
    problem = make_problem()
    none = np.zeros((0, 3))
    assert ntk(problem.params, problem.X, none).shape == (7, 4, 0, 4)
    assert ntk(problem.params, none, problem.X).shape == (0, 4, 7, 4)


def test_the_kernel_refuses_inputs_by_name():
    problem = make_problem()
    with pytest.raises(ValueError, match="X2 has 2 columns"):
        ntk(problem.params, problem.X, problem.X[:, :2])
    with pytest.raises(ValueError, match=r"X1 must have two dimensions.*X1\[None, :\]"):
        ntk(problem.params, problem.X[0], problem.X)
    with pytest.raises(TypeError, match="X2 has dtype float32"):
        ntk(problem.params, problem.X, problem.X.astype(np.float32))


# SciPy's operators -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "product"), [("hessian", hvp), ("ggn", ggnvp), ("fisher", fisher_vp)]
)
def test_operators_are_the_vector_products(kind, product, backend):
    pytest.importorskip("scipy")
    problem = make_problem(loss="huber", weighted=True)
    placed = problem.map(backend.array)
    operator = linear_operator(kind, placed.params, placed.X, placed.y, **placed.options)
    matrix = by_columns(product, problem)
    assert operator.shape == matrix.shape
    assert operator.dtype == np.float64
    assert_close(operator @ np.eye(len(matrix)), matrix, 1e-12)
    assert_close(operator.T @ np.ones(len(matrix)), matrix.sum(axis=0), 1e-12)


def test_each_product_runs_on_the_stream_of_the_arrays(monkeypatch):
    """Not only what is done when the operator is made: the caller may be on another one by then."""
    problem, seen = make_problem(), []

    @contextmanager
    def callers_stream(arguments, backend):
        seen.append((*arguments, backend))
        yield

    options = problem.options | {"backend": "numpy"}
    operator = linear_operator("ggn", problem.params, problem.X, problem.y, **options)
    monkeypatch.setattr(backends, "callers_stream", callers_stream)
    operator @ np.ones(operator.shape[1])
    [(first, backend)] = seen
    assert first is problem.X
    assert backend == "numpy"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    ("kind", "product"), [("hessian", hvp), ("ggn", ggnvp), ("fisher", fisher_vp)]
)
def test_operator_of_a_sum_or_a_mean(kind, product, reduction):
    pytest.importorskip("scipy")
    problem = make_problem(weighted=True)
    options = problem.options | {"reduction": reduction}
    operator = linear_operator(kind, *problem[:3], **options)
    v = vector_like(problem)
    expected = ravel_params(product(*problem[:3], v, **options))
    assert_close(operator @ ravel_params(v), expected, 1e-13)
    other = {"mean": "sum", "sum": "mean"}[reduction]
    weight = problem.options["sample_weight"].sum()
    scale = weight if reduction == "sum" else 1 / weight
    assert_close(
        expected,
        scale * ravel_params(product(*problem[:3], v, **options | {"reduction": other})),
        1e-13,
    )


def test_operator_of_float32():
    pytest.importorskip("scipy")
    problem = make_problem(dtype=np.float32)
    operator = linear_operator("ggn", *problem[:3], **problem.options)
    v = vector_like(problem)
    assert operator.dtype == np.float32
    expected = run(ggn, problem) @ ravel_params(v)
    assert_close(operator @ ravel_params(v), expected, 1e-5)


def test_conjugate_gradients():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    problem = make_problem((2, 4, 1), n=40)
    operator = linear_operator("ggn", *problem[:3], **problem.options)
    P = operator.shape[0]
    b = np.ones(P)
    damped = operator + linalg.aslinearoperator(0.1 * np.eye(P))
    x, info = linalg.cg(damped, b, rtol=1e-10)
    assert info == 0
    assert_close((run(ggn, problem) + 0.1 * np.eye(P)) @ x, b, 1e-8)


def test_an_unknown_kind_is_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match=r"unknown kind 'hessain'.*did you mean 'hessian'"):
        linear_operator("hessain", *problem[:3])


def test_without_scipy_the_extra_is_named(monkeypatch):
    problem = make_problem()
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"needs scipy .*mlp-backprop\[scipy\]"):
        linear_operator("ggn", *problem[:3], **problem.options)


# Mutants -----------------------------------------------------------------------------------------


def without_second_terms(monkeypatch):
    right = hessians.block
    monkeypatch.setattr(
        hessians, "block", lambda xp, H_left, dD, H, D, dH: right(xp, H_left, dD, H, D, None)
    )


def transposed_block(monkeypatch):
    right = hessians.block
    monkeypatch.setattr(
        hessians, "block", lambda xp, H_left, dD, *rest: right(xp, H_left, dD[::-1], *rest)
    )


def ones_dropped(monkeypatch):
    right = hessians.extended
    monkeypatch.setattr(hessians, "extended", lambda spec, A, last: right(spec, A, 0))


def layers_unordered(monkeypatch):
    monkeypatch.setattr(
        curvature, "ravel", lambda xp, order: xp.arange(sum(A.size for A in flat(order)))
    )


MUTANTS = {
    "D dH dropped from (V8)": without_second_terms,
    "units in reverse": transposed_block,
    "the ones dropped": ones_dropped,
    "[W b] row by row": layers_unordered,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_hessian_is_caught(mutant, monkeypatch, nothing_seen):
    problem = make_problem()
    expected = by_columns(hvp, problem)
    assert_close(run(hessian, problem), expected)
    MUTANTS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match="off, of"):
        assert_close(run(hessian, problem), expected, 1e-4)

"""Derivatives with respect to inputs on every library, in every dtype, at edges, and refused."""

from functools import partial

import numpy as np
import oracles
import pytest
from derivatives.test_inputs import PAIRS, each_of_outputs, run, run_grads
from numpy.testing import assert_array_equal
from oracles import ACTIVATIONS, LOSSES, assert_close, make_problem, peak_bytes

from mlp_backprop.derivatives.inputs import (
    input_hessian_diag,
    input_hessian_entries,
    jacobian,
    laplacian,
)
from mlp_backprop.edge import backends
from mlp_backprop.engines import threads
from mlp_backprop.maths import row_blocks

# Libraries and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_tanh", "elu"])
@each_of_outputs
def test_every_library_agrees_with_numpy(of_outputs, activation, backend):
    problem = make_problem(activation=activation)
    got = run(of_outputs, problem.map(backend.array))
    assert_close(backend.numpy(got), run(of_outputs, problem))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_on_every_library(loss, weighted, backend):
    problem = make_problem(loss=loss, weighted=weighted)
    assert_close(backend.numpy(run_grads(problem.map(backend.array))), run_grads(problem))


def test_jacobian_by_the_parameters_on_every_library(backend):
    problem = make_problem()
    got = run(jacobian, problem.map(backend.array), wrt="params")
    host = [map(backend.numpy, layer) for layer in got]
    oracles.assert_grads_close(host, run(jacobian, problem, wrt="params"))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@each_of_outputs
def test_results_are_like_the_parameters(dtype, of_outputs, backend):
    problem = make_problem(dtype=dtype, weighted=True).map(backend.array)
    W = problem.params[0][0]
    for result in (run(of_outputs, problem), run_grads(problem)):
        assert type(result) is type(W)
        assert result.dtype == W.dtype
        xp = backends.namespace_of(W)
        assert backends.device_of(xp, result) == backends.device_of(xp, W)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@each_of_outputs
def test_float32_is_near_float64(activation, of_outputs):
    problem = make_problem(activation=activation, dtype=np.float32)
    expected = run(of_outputs, problem.astype(np.float64))
    assert_close(run(of_outputs, problem), expected, 1e-5)
    exact = run_grads(problem.astype(np.float64))
    assert_close(run_grads(problem), exact, 1e-5)


@each_of_outputs
def test_half_precision(of_outputs):
    problem = make_problem(dtype=np.float16, weighted=True)
    for f in (partial(run, of_outputs), run_grads):
        got = f(problem)
        assert got.dtype == np.float16
        assert_close(got, f(problem.astype(np.float64)), 2e-2)


@each_of_outputs
def test_tensors_that_require_grad_give_results_that_do_not(of_outputs):
    torch = pytest.importorskip("torch")
    leaves = make_problem().map(lambda A: torch.tensor(A, requires_grad=True))
    assert not run(of_outputs, leaves).requires_grad
    assert not run_grads(leaves).requires_grad


# Edges -------------------------------------------------------------------------------------------


def test_no_rows(backend):
    problem = make_problem(n=0).map(backend.array)
    assert tuple(run(jacobian, problem).shape) == (0, 4, 3)
    assert tuple(run(input_hessian_diag, problem).shape) == (0, 4, 3)
    assert tuple(run(laplacian, problem).shape) == (0, 4)
    assert tuple(run(input_hessian_entries, problem, pairs=PAIRS).shape) == (0, 4, 4)
    assert tuple(run_grads(problem, reduction="sum").shape) == (0, 3)
    assert tuple(run(jacobian, problem, wrt="params")[0].W.shape) == (0, 4, 5, 3)


def test_no_pairs(backend):
    problem = make_problem().map(backend.array)
    assert tuple(run(input_hessian_entries, problem, pairs=[]).shape) == (7, 4, 0)


def test_no_columns_have_a_laplacian_of_zero(backend):
    problem = make_problem().map(backend.array)
    assert_array_equal(backend.numpy(run(laplacian, problem, inputs=[])), np.zeros((7, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
@each_of_outputs
def test_nan_stays_in_its_row(of_outputs, value):
    problem = make_problem(activation="tanh")
    X = problem.X.copy()
    X[2, 1] = value
    spoilt = problem._replace(X=X)
    others = [0, 1, 3, 4, 5, 6]
    assert_close(run(of_outputs, spoilt)[others], run(of_outputs, problem)[others], 1e-14)
    assert_close(run_grads(spoilt)[others], run_grads(problem)[others], 1e-14)
    if np.isnan(value):
        assert np.isnan(run(of_outputs, spoilt)[2]).all()
        assert np.isnan(run_grads(spoilt)[2]).all()


@each_of_outputs
def test_read_only_and_strided_arrays(of_outputs):
    problem = make_problem()

    def awkward(A):
        A = np.repeat(np.asfortranarray(A[::-1]), 2, axis=0)[::-2]
        A.flags.writeable = False
        return A

    assert_close(run(of_outputs, problem.map(awkward)), run(of_outputs, problem), 1e-14)
    assert_close(run_grads(problem.map(awkward)), run_grads(problem), 1e-14)


@each_of_outputs
def test_results_can_be_written_to(of_outputs):
    for sizes in ((3, 4), (3, 2), (3, 2, 4)):
        problem = make_problem(sizes)
        X = problem.X.copy()
        run(of_outputs, problem)[...] = 0
        run_grads(problem)[...] = 0
        assert_array_equal(problem.X, X)


@each_of_outputs
def test_memory_is_that_of_a_block(of_outputs, monkeypatch):
    n = 8_000
    monkeypatch.setenv(threads.VARIABLE, "1")  # each has one
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", row_blocks.BLOCK_BYTES // 5)
    problem = make_problem((3, 64, 64, 1), n)
    sizes = [run(of_outputs, problem).nbytes, run_grads(problem).nbytes]
    for f, size in zip((partial(run, of_outputs), run_grads), sizes, strict=True):
        peak = peak_bytes(lambda f=f: f(problem))
        assert peak < 2 * size + 3 * row_blocks.BLOCK_BYTES < n * 64 * 8


def test_nan_stays_in_its_row_of_the_jacobian_by_the_parameters():
    problem = make_problem()
    X = problem.X.copy()
    X[2, 1] = np.nan
    got = run(jacobian, problem._replace(X=X), wrt="params")
    others = [0, 1, 3, 4, 5, 6]
    for layer, expected in zip(got, run(jacobian, problem, wrt="params"), strict=True):
        for A, B in zip(layer, expected, strict=True):
            assert_close(A[others], B[others], 1e-14)
    assert np.isnan(got[0].W[2]).all()


# What is refused ---------------------------------------------------------------------------------

MASK = r"named by integers, got .*(True|False).*; of a mask, its flatnonzero"


@pytest.mark.parametrize(
    ("f", "options", "error", "message"),
    [
        (jacobian, {"wrt": "input"}, ValueError, "unknown wrt 'input'; .* did you mean 'inputs'"),
        (jacobian, {"wrt": None}, TypeError, "wrt must be a name"),
        (laplacian, {"inputs": [3]}, ValueError, "X has no column 3: they are 0 to 2"),
        (laplacian, {"inputs": [-1]}, ValueError, "X has no column -1"),
        (laplacian, {"inputs": [1, 1]}, ValueError, "inputs names a column twice"),
        (laplacian, {"inputs": [0.5]}, TypeError, "named by integers, got 0.5"),
        (laplacian, {"inputs": 1}, TypeError, "inputs must be a sequence of columns of X, got int"),
        (input_hessian_entries, {"pairs": [(0, 3)]}, ValueError, "X has no column 3"),
        (input_hessian_entries, {"pairs": [(0, 1.0)]}, TypeError, "named by integers, got 1.0"),
        (input_hessian_entries, {"pairs": [(0, 1, 2)]}, TypeError, r"got \(0, 1, 2\)"),
        (input_hessian_entries, {"pairs": (0, 1)}, TypeError, r"pairs \(j, k\) .* got 0"),
        (input_hessian_entries, {"pairs": 0}, TypeError, "pairs must hold pairs"),
        (input_hessian_entries, {"pairs": [(True, False)]}, TypeError, MASK),
        (input_hessian_entries, {"pairs": np.eye(2, dtype=bool)}, TypeError, MASK),
        (laplacian, {"inputs": [True, False]}, TypeError, MASK),
        (laplacian, {"inputs": np.array([False, True, True])}, TypeError, MASK),
    ],
)
def test_bad_options_are_refused(f, options, error, message):
    with pytest.raises(error, match=message):
        run(f, make_problem(), **options)


def test_a_mask_of_any_library_is_no_list_of_columns(backend):
    problem = make_problem().map(backend.array)
    with pytest.raises(TypeError, match="named by integers"):
        run(laplacian, problem, inputs=backend.array(np.array([True, False, True])))


@each_of_outputs
def test_bad_arrays_are_refused(of_outputs):
    problem = make_problem()
    with pytest.raises(ValueError, match="X has 2 columns, W of layer 1 takes 3 inputs"):
        run(of_outputs, problem._replace(X=problem.X[:, :2]))
    with pytest.raises(ValueError, match="unknown activation"):
        of_outputs(problem.params, problem.X, activation="swish")
    with pytest.raises(TypeError, match="X has dtype float32"):
        run(of_outputs, problem._replace(X=problem.X.astype(np.float32)))


def test_bad_arrays_of_the_gradient_are_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match="y must have shape"):
        run_grads(problem._replace(y=problem.y[:, :1]))
    with pytest.raises(ValueError, match="a mean over none"):
        run_grads(make_problem(n=0))
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        run_grads(problem, sample_weight=np.ones(3))

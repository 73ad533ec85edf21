"""Compiled gradients of every output, and tangent kernels: the derivation's answers."""

from functools import partial

import numpy as np
import oracles
import pytest
from oracles import assert_bits

pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import backprop, jacobian, ntk
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import per_output, schedule
from mlp_backprop.types import flat

TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}
QUESTIONS = "jacobian", "kernel", "kernel of two"
WIDTHS = [
    (3, 2),
    (1, 1),
    (1, 1, 1),
    (2, 10, 5, 1),
    (7, 8, 9, 15),
    (16, 17, 31, 3),
    (64, 64, 64, 1),
    (7, 1, 13, 1, 6),
    (4, 5, 6, 7, 3, 2, 9),
    (100, 30, 10),
]


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


def others(problem):
    """More inputs, not as many."""
    n, width = problem.X.shape
    return np.random.default_rng(9).normal(size=(n // 2 + 3, width)).astype(problem.X.dtype)


def ask(question, problem, X2=None, **options):
    """Arrays with a row for each of X."""
    params, X, _, own = problem
    options = {"activation": own["activation"], **options}
    if question == "jacobian":
        return flat(jacobian(params, X, wrt="params", **options))
    X2 = (X if question == "kernel" else others(problem)) if X2 is None else X2
    return [ntk(params, X, X2, **options)]


@pytest.fixture
def compiled(monkeypatch):
    """Ask where the derivation is out of reach."""

    def refuse(*_):
        raise AssertionError("the derivation ran")

    def call(*args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(backprop, "forward", refuse)
            return ask(*args, backend="numba", **options)

    return call


@pytest.fixture
def assert_right(compiled, dtype):
    """Compiled in dtype against the derivation in float64."""

    def check(question, problem):
        problem = problem.astype(dtype)
        expected = ask(question, problem.astype(np.float64))
        for A, B in zip(compiled(question, problem), expected, strict=True):
            assert A.dtype == dtype
            oracles.assert_close(A, B, TOLERANCE[dtype])

    return check


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, question, assert_right):
    assert_right(question, oracles.make_problem(activation=activation))
    assert_right(question, oracles.make_problem(activation=["tanh", "silu", activation]))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 23, 24, 25, 64, 65, 257])
def test_any_number_of_rows(n, question, assert_right):
    assert_right(question, oracles.make_problem((5, 9, 6, 3), n))


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("sizes", WIDTHS)
def test_any_depth_and_widths(sizes, question, assert_right):
    assert_right(question, oracles.make_problem(sizes, 70))


def test_the_kernel_is_that_of_the_jacobian(compiled, dtype):
    problem = oracles.make_problem((3, 8, 4), 40, dtype=dtype)
    [K] = compiled("kernel", problem)
    J = [A.reshape(160, -1) for A in compiled("jacobian", problem)]
    oracles.assert_close(K.reshape(160, 160), sum(A @ A.T for A in J), TOLERANCE[dtype])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_row_that_is_not_finite_touches_no_other(activation, value, compiled, dtype):
    problem = oracles.make_problem((3, 5, 4), 70, activation=activation, dtype=dtype)
    finite, right = np.arange(70) != 7, problem.X.copy()
    jacobians, [K] = compiled("jacobian", problem), compiled("kernel", problem)
    problem.X[7, 1] = value
    with np.errstate(all="ignore"):
        expected = ask("jacobian", problem)
    for A, B, C in zip(compiled("jacobian", problem), jacobians, expected, strict=True):
        assert_bits(A[finite], B[finite])
        assert_bits(np.isnan(A[7]), np.isnan(C[7]))
    assert_bits(compiled("kernel", problem, X2=right)[0][finite], K[finite])
    [columns] = compiled("kernel", problem._replace(X=right), X2=problem.X)
    assert_bits(columns[:, :, finite], K[:, :, finite])


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, question, compiled, dtype):
    problem = oracles.make_problem((9, 8, 3), 70, dtype=dtype)
    own = {} if question == "jacobian" else {"X2": others(problem)}
    expected = compiled(question, problem, **own)
    changed = {name: change(A) for name, A in own.items()}
    assert_bits(compiled(question, problem.map(change), **changed), expected)


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_number_of_threads_changes_no_bit(question, dtype, monkeypatch):
    monkeypatch.setattr(schedule, "THREAD_OPERATIONS", 100_000)
    monkeypatch.setattr(schedule, "CHUNK_OPERATIONS", 10_000)
    problem, results = oracles.make_problem((3, 20, 8, 2), 700, dtype=dtype), []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv(threads.VARIABLE, n_threads)
        results.append(ask(question, problem, backend="numba"))
    for result in results[1:]:
        assert_bits(result, results[0])
    for A, B in zip(results[0], ask(question, problem), strict=True):
        oracles.assert_close(A, B, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(2, 260, 1), (1030, 3)])
def test_wider_nets_and_no_backend_take_the_derivation(sizes, monkeypatch):
    monkeypatch.setattr(per_output, "run", None)
    for question in QUESTIONS:
        wide = oracles.make_problem(sizes)
        assert_bits(ask(question, wide, backend="numba"), ask(question, wide))
        ask(question, oracles.make_problem())


def test_results_are_the_callers_own(compiled):
    first, second = (oracles.make_problem(n=30, seed=seed) for seed in (0, 1))
    for f in map(partial(partial, compiled), QUESTIONS):
        kept = f(first)
        copies = [np.copy(A) for A in kept]
        f(second)
        assert_bits(kept, copies)

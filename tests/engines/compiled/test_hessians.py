"""Compiled Hessians and Gauss-Newton matrices: the derivation's answers."""

import numpy as np
import oracles
import pytest
from oracles import assert_bits

pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import ggn, ggnvp, hessian, hvp
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import hessians, schedule
from mlp_backprop.losses import LOSSES
from mlp_backprop.nets.vectors import ravel_params, unravel_params

TOLERANCE = {np.float64: 1e-12, np.float32: 4e-5}
MATRICES = {"hessian": hessian, "ggn": ggn}
PRODUCTS = {"hessian": hvp, "ggn": ggnvp}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


@pytest.fixture(params=MATRICES)
def name(request):
    return request.param


def matrix(name, problem, **options):
    params, X, y, own = problem
    return MATRICES[name](params, X, y, **{"reduction": "sum", **own, **options})


@pytest.fixture
def compiled(monkeypatch):
    """The matrix, where the derivation is out of reach."""

    def refuse(*_):
        raise AssertionError("the derivation ran")

    def call(name, problem, **options):
        with monkeypatch.context() as patch:
            patch.setattr("mlp_backprop.maths.hessians.blocks", refuse)
            return matrix(name, problem, backend="numba", **options)

    return call


@pytest.fixture
def assert_right(compiled, name, dtype):
    """In dtype, against the derivation in float64."""

    def check(problem):
        got = compiled(name, problem.astype(dtype))
        assert got.dtype == dtype
        assert_bits(got, got.T)
        expected = matrix(name, problem.astype(dtype).astype(np.float64))
        oracles.assert_close(got, expected, TOLERANCE[dtype])

    return check


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_loss(activation, loss, assert_right):
    for weighted in (False, True):
        problem = oracles.make_problem(activation=activation, loss=loss, weighted=weighted, n=9)
        assert_right(problem)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_output_and_mixed(activation, assert_right):
    names = ["tanh", "silu", activation]
    assert_right(oracles.make_problem(activation=names, loss="huber"))


def test_rows_of_class_weights(assert_right):
    loss = "softmax_cross_entropy"
    assert_right(oracles.make_problem(loss=loss, class_rows=True, n=130))


@pytest.mark.parametrize("n", [0, 1, 2, 7, 63, 64, 65, 257])
def test_any_number_of_rows(n, assert_right):
    assert_right(oracles.make_problem((5, 9, 6, 3), n, loss="softmax_cross_entropy"))


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 2),
        (8, 1),
        (1, 1),
        (1, 1, 1),
        (2, 10, 5, 1),
        (7, 8, 9, 8),
        (15, 16, 17),
        (7, 1, 13, 1, 6),
        (4, 5, 6, 7, 3, 2, 9),
        (100, 3, 20),
    ],
)
def test_any_depth_and_widths(sizes, assert_right):
    assert_right(oracles.make_problem(sizes, 70, weighted=True))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_product_with_a_vector(reduction, name, compiled, dtype):
    problem = oracles.make_problem((4, 9, 2), 30, weighted=True, dtype=dtype)
    params, X, y, options = problem
    v = np.random.default_rng(3).normal(size=ravel_params(params).size).astype(dtype)
    options = {**options, "reduction": reduction, "backend": "numba"}
    expected = PRODUCTS[name](params, X, y, unravel_params(v, params), **options)
    got = compiled(name, problem, reduction=reduction) @ v
    oracles.assert_close(got, ravel_params(expected), TOLERANCE[dtype])


def test_columns_behind_the_last_row_count_for_nothing(name, compiled, dtype):
    # Where inputs are 0 the rate is infinite, and infinity times a weight of 0 is not 0.
    params = [(np.array([[-1000]], dtype), np.array([1000], dtype))]
    problem = oracles.make_problem((1, 1), 5, loss="poisson", dtype=dtype)
    problem = problem._replace(params=params, X=np.ones((5, 1), dtype))
    assert np.isfinite(compiled(name, problem)).all()


@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, name, compiled, dtype):
    for loss in ("squared_error", "softmax_cross_entropy"):
        problem = oracles.make_problem(n=70, loss=loss, weighted=True, dtype=dtype)
        changed = problem.map(change)
        y = changed.y.copy()
        assert_bits(compiled(name, changed), compiled(name, problem))
        assert_bits(changed.y, y)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.uint64])
def test_classes_of_any_integer_type(integer, name, compiled):
    problem = oracles.make_problem(n=40, loss="softmax_cross_entropy")
    other = problem._replace(y=problem.y.astype(integer))
    assert_bits(compiled(name, other), compiled(name, problem))


def test_the_number_of_threads_changes_no_bit(name, dtype, compiled, monkeypatch):
    monkeypatch.setattr(schedule, "THREAD_OPERATIONS", 100_000)
    monkeypatch.setattr(schedule, "CHUNK_OPERATIONS", 10_000)
    problem, results = oracles.make_problem((3, 8, 2), 700, weighted=True, dtype=dtype), []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv(threads.VARIABLE, n_threads)
        results.append(compiled(name, problem))
    for result in results[1:]:
        assert_bits(result, results[0])
    oracles.assert_close(results[0], matrix(name, problem), TOLERANCE[dtype])


def test_larger_nets_and_no_backend_take_the_derivation(name, monkeypatch):
    monkeypatch.setattr(hessians, "run", None)
    monkeypatch.setattr(hessians, "MOST_PARAMETERS", 30)
    problem = oracles.make_problem((3, 8, 2))
    assert_bits(matrix(name, problem, backend="numba"), matrix(name, problem))
    matrix(name, oracles.make_problem((3, 2)))

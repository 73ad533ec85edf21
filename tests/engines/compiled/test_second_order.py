"""Compiled products with vectors: the derivation's answers, whatever the arrays and the threads."""

import numpy as np
import oracles
import pytest
from derivation import checked
from oracles import assert_bits

numba = pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import fisher_vp, ggnvp, hvp, jvp, linear_operator  # noqa: E402
from mlp_backprop.activations import ACTIVATIONS  # noqa: E402
from mlp_backprop.engines.compiled import curvatures, second_order  # noqa: E402
from mlp_backprop.losses import LOSSES  # noqa: E402
from mlp_backprop.maths import tangents  # noqa: E402
from mlp_backprop.maths.tangents import KINDS  # noqa: E402
from mlp_backprop.nets.vectors import ravel_params  # noqa: E402
from mlp_backprop.types import Layer  # noqa: E402

TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}
SUMS = {"hessian": hvp, "ggn": ggnvp, "fisher": fisher_vp}


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def vector(problem, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    return [Layer(*(rng.normal(size=A.shape).astype(dtype) for A in q)) for q in problem.params]


def compiled(kind, problem, v):
    spec, *arrays = checked(problem)
    return second_order.product(spec, KINDS[kind], arrays[0], v, *arrays[1:])


def wide(layers):
    return [Layer(*(A.astype(np.float64) for A in layer)) for layer in layers]


def assert_equals_derivation(kind, problem, dtype):
    """In dtype, against the derivation in float64, array by array."""
    problem, v = problem.astype(dtype), vector(problem, dtype)
    spec, params, *data = checked(problem.astype(np.float64))
    expected = tangents.product_sums(spec, KINDS[kind], params, wide(v), *data)
    oracles.assert_grads_close(compiled(kind, problem, v), expected, TOLERANCE[dtype])


def derived_tangent(problem, v):
    spec, params, X, *_ = checked(problem.astype(np.float64))
    *_, last = tangents.tangents(spec, params, wide(v), X)
    return last.dH


# The same answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_loss(activation, loss, kind, dtype):
    for weighted in (False, True):
        problem = oracles.make_problem(activation=activation, loss=loss, weighted=weighted, n=9)
        assert_equals_derivation(kind, problem, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_the_output_and_mixed(activation, kind, dtype):
    problem = oracles.make_problem(activation=["tanh", "silu", activation], loss="huber")
    assert_equals_derivation(kind, problem, dtype)


def test_rows_of_class_weights(kind, dtype):
    problem = oracles.make_problem(loss="softmax_cross_entropy", class_rows=True, n=300)
    assert_equals_derivation(kind, problem, dtype)


@pytest.mark.parametrize("n", [1, 2, 7, 63, 64, 65, 257, 1000])
def test_any_number_of_rows(n, kind, dtype):
    problem = oracles.make_problem((5, 9, 6, 3), n, loss="softmax_cross_entropy", weighted=n > 2)
    assert_equals_derivation(kind, problem, dtype)


WIDTHS = [
    (3, 2),
    (1, 1),
    (1, 1, 1),
    (2, 10, 5, 1),
    (7, 8, 9, 8),
    (15, 16, 17),
    (64, 64, 64, 1),
    (784, 128, 64, 10),
    (7, 1, 13, 1, 6),
    (4, 5, 6, 7, 3, 2, 9),
]


@pytest.mark.parametrize("sizes", WIDTHS)
def test_any_depth_and_widths(sizes, kind, dtype):
    assert_equals_derivation(kind, oracles.make_problem(sizes, 300, weighted=True), dtype)


@pytest.mark.parametrize("size", [-1e9, -710, -89, -1e-9, 0, 1e-9, 88, 709, 1e9])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(loss, size, kind, dtype):
    problem = oracles.make_problem((3, 4), 1, loss=loss)._replace(X=np.array([[size, -size, 1.0]]))
    problem, v = problem.astype(dtype), vector(problem, dtype)
    spec, params, *data = checked(problem)
    with np.errstate(all="ignore"):
        expected = ravel_params(tangents.product_sums(spec, KINDS[kind], params, v, *data))
    got = ravel_params(compiled(kind, problem, v))
    # The rounding of a logit near 710 counts as often in its exponential.
    rtol = 2000 * np.finfo(dtype).eps
    np.testing.assert_allclose(got, expected, rtol, rtol * abs(size) + rtol)


def test_columns_behind_the_last_row_count_for_nothing(kind, dtype):
    # Where inputs are 0 the rate is infinite, and infinity times a weight of 0 is not 0.
    problem = oracles.make_problem((1, 1), 5, loss="poisson").astype(dtype)
    problem = problem._replace(
        params=[(np.array([[-1000]], dtype), np.array([1000], dtype))], X=np.ones((5, 1), dtype)
    )
    assert np.isfinite(ravel_params(compiled(kind, problem, vector(problem, dtype)))).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [0, 1, 2, 7, 257, 1000])
def test_change_of_the_outputs(n, activation, dtype):
    problem = oracles.make_problem((5, 9, 6, 3), n, activation=activation).astype(dtype)
    v = vector(problem, dtype)
    got = jvp(problem.params, problem.X, v, activation=activation, backend="numba")
    assert got.dtype == dtype
    oracles.assert_close(got, derived_tangent(problem, v), TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", WIDTHS)
def test_change_of_any_outputs(sizes, dtype):
    problem = oracles.make_problem(sizes, 300).astype(dtype)
    v = vector(problem, dtype)
    got = jvp(problem.params, problem.X, v, activation="tanh", backend="numba")
    oracles.assert_close(got, derived_tangent(problem, v), TOLERANCE[dtype])


def test_nan_stays_in_its_row(dtype):
    problem = oracles.make_problem((3, 5, 2), 300).astype(dtype)
    v = vector(problem, dtype)
    expected = jvp(problem.params, problem.X, v, activation="tanh", backend="numba")
    problem.X[[5, 299], 1] = np.nan
    got = jvp(problem.params, problem.X, v, activation="tanh", backend="numba")
    expected[[5, 299]] = np.nan
    assert_bits(got, expected)


# Any arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, loss, kind, dtype):
    problem = oracles.make_problem(n=300, loss=loss, weighted=True).astype(dtype)
    v = vector(problem, dtype)
    changed = [Layer(*map(change, layer)) for layer in v]
    expected = compiled(kind, problem, v)
    assert_bits(compiled(kind, problem.map(change), changed), expected)
    expected = jvp(problem.params, problem.X, v, backend="numba")
    problem = problem.map(change)
    got = jvp(problem.params, problem.X, changed, backend="numba")
    assert_bits(got, expected)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.uint64])
def test_classes_of_any_integer_type(integer, kind):
    problem = oracles.make_problem(n=300, loss="softmax_cross_entropy")
    v = vector(problem)
    other = problem._replace(y=problem.y.astype(integer))
    assert_bits(compiled(kind, other, v), compiled(kind, problem, v))


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss, kind, dtype):
    problem = oracles.make_problem(n=0, loss=loss, dtype=dtype)
    assert not ravel_params(compiled(kind, problem, vector(problem, dtype))).any()


@pytest.mark.parametrize("n", [1, 1000, 60_000])
def test_the_number_of_threads_changes_no_bit(n, kind, dtype, monkeypatch):
    problem = oracles.make_problem((3, 40, 8, 2), n, activation="silu", dtype=dtype, weighted=True)
    v, results, outputs = vector(problem, dtype), [], []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", n_threads)
        results.append(compiled(kind, problem, v))
        outputs.append(jvp(problem.params, problem.X, v, activation="silu", backend="numba"))
    for result, output in zip(results, outputs, strict=True):
        assert_bits(result, results[0])
        assert_bits(output, outputs[0])


# The way there -----------------------------------------------------------------------------------


def test_the_public_functions_take_the_compiled_pass(kind, dtype, monkeypatch):
    problem = oracles.make_problem(weighted=True).astype(dtype)
    v, calls = vector(problem, dtype), []
    for name in ("product", "jacobian_product"):
        own = getattr(second_order, name)
        monkeypatch.setattr(second_order, name, lambda *a, own=own: calls.append(1) or own(*a))
    for backend, n_calls in ((None, 0), ("numpy", 0), ("numba", 3)):
        calls.clear()
        options = problem.options | {"backend": backend}
        data = problem.params, problem.X, problem.y
        got = SUMS[kind](*data, v, **options)
        assert {A.dtype for layer in got for A in layer} == {np.dtype(dtype)}
        jvp(problem.params, problem.X, v, backend=backend)
        operator = linear_operator(kind, *data, **options)
        oracles.assert_close(operator @ ravel_params(v), ravel_params(got), TOLERANCE[dtype])
        assert len(calls) == n_calls


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_scaled_as_without_a_backend(reduction, kind, dtype):
    problem = oracles.make_problem(weighted=True, n=30).astype(dtype)
    arguments = problem.params, problem.X, problem.y, vector(problem, dtype)
    options = problem.options | {"reduction": reduction}
    expected = SUMS[kind](*arguments, **options)
    got = SUMS[kind](*arguments, **options, backend="numba")
    oracles.assert_grads_close(got, expected, TOLERANCE[dtype])


@pytest.mark.parametrize("sizes", [(2, 300, 1), (1100, 3)])
def test_wider_nets_are_left_to_the_numpy_engine(sizes, kind):
    problem = oracles.make_problem(sizes)
    arguments = problem.params, problem.X, problem.y, vector(problem)
    got = SUMS[kind](*arguments, **problem.options, backend="numba")
    assert_bits(got, SUMS[kind](*arguments, **problem.options))


def test_every_loss_has_its_products():
    assert {name.removesuffix("_fisher") for name in curvatures.NAMES} == LOSSES.keys()
    for name, row in LOSSES.items():
        own = row.fisher_product is not row.hessian_product
        assert (f"{name}_fisher" in curvatures.NAMES) == own

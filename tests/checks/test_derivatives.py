"""check_grads on the other derivatives: it passes what is right, and fails what is off by 0.1 %."""

import numpy as np
import pytest
from oracles import make_problem

from mlp_backprop import check_grads
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.checks import derivatives
from mlp_backprop.checks.derivatives import CHECKS
from mlp_backprop.derivatives import curvature, inputs, per_sample, products, residuals
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

MODULES = (curvature, inputs, per_sample, products, residuals)


def check(problem, **options):
    return check_grads(problem.params, problem.X, problem.y, **problem.options, **options)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_are_right(activation, loss):
    check(make_problem(activation=activation, loss=loss, weighted=True), also="all")


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 1), (2, 3, 1, 5)])
def test_any_shape(sizes, n):
    check(make_problem(sizes, n), also="all")


def test_no_rows():
    check(make_problem(n=0), also="all", reduction="sum")


@pytest.mark.parametrize(("dtype", "size"), [(np.float32, 1e11), (np.float64, 1e152)])
def test_norms_that_overflow_are_no_error(dtype, size):
    """One row of seven has a gradient whose norm, but not whose entries, leave the range."""
    problem = make_problem((3, 4), dtype=dtype)
    problem.X[2] = size
    problem.y[2] = -size
    check(problem, also=["per_sample_grad_norms", "clipped_grads"])


@pytest.mark.parametrize("where", [0, 2])
def test_a_norm_of_inf_fails_elsewhere(where, monkeypatch):
    module, function = function_of("per_sample_grad_norms")

    def with_inf(*args, **options):
        norms = function(*args, **options)
        norms[where] = np.inf if where == 0 else 1.0
        return norms

    monkeypatch.setattr(module, "per_sample_grad_norms", with_inf)
    problem = make_problem((3, 4), dtype=np.float32)
    problem.X[2] = 1e11
    problem.y[2] = -1e11
    with pytest.raises(AssertionError, match="per_sample_grad_norms"):
        check(problem, also="per_sample_grad_norms")


def test_float32_and_class_rows():
    problem = make_problem(loss="softmax_cross_entropy", class_rows=True, dtype=np.float32)
    check(problem, also="all")


def test_on_every_library(backend):
    """What all of them need: results to NumPy, directions to the library."""
    problem = make_problem(weighted=True).map(backend.array)
    check(problem, also=["per_sample_grads", "vjp", "hvp"])


def function_of(name):
    """The module that has a public function, and the function."""
    return next((module, getattr(module, name)) for module in MODULES if hasattr(module, name))


def off(result):
    """The same result, but for 0.1 % of one entry in each array."""
    if isinstance(result, np.ndarray):
        result = result.copy()
        result.flat[np.argmax(np.abs(result))] *= 1.001
        return result
    if isinstance(result, list):
        return [Layer(off(W), off(b)) for W, b in result]
    return result._replace(grads=off(result.grads))


@pytest.mark.parametrize("name", CHECKS)
def test_a_mutant_fails(name, monkeypatch):
    module, function = function_of(name)
    monkeypatch.setattr(module, name, lambda *args, **options: off(function(*args, **options)))
    problem = make_problem(activation="tanh", loss="poisson", weighted=True)
    with pytest.raises(AssertionError, match=rf"^{name}: relative error .* above 1e-06"):
        check(problem, also=name)


@pytest.mark.parametrize("wrong", ["inputs", "params"])
def test_a_jacobian_wrong_in_one_of_its_kinds_fails(wrong, monkeypatch):
    def jacobian(*args, wrt="inputs", **options):
        result = right(*args, wrt=wrt, **options)
        return off(result) if wrt == wrong else result

    right = inputs.jacobian
    monkeypatch.setattr(inputs, "jacobian", jacobian)
    with pytest.raises(AssertionError, match=r"^jacobian: relative error"):
        check(make_problem(), also=["jacobian"])


@pytest.mark.parametrize("name", CHECKS)
def test_nan_fails(name, monkeypatch):
    module, function = function_of(name)

    def with_nan(*args, **options):
        result = function(*args, **options)
        layers = getattr(result, "grads", result)
        array = layers if isinstance(layers, np.ndarray) else flat(layers)[-1]
        array.flat[-1] = np.nan
        return result

    monkeypatch.setattr(module, name, with_nan)
    with pytest.raises(AssertionError, match=name):
        check(make_problem(), also=[name])


def test_residuals_are_left_out_for_activations_with_a_kink():
    problem = make_problem(activation="relu")
    check(problem, also="all")
    with pytest.raises(ValueError, match="'relu' has a kink"):
        check(problem, also="residual_grads")


def test_an_unknown_name_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match=r"unknown function 'hpv'.*did you mean 'hvp'"):
        check(make_problem(), also=["hpv"])


def test_slope_takes_the_nearest_and_no_more_than_it_resolves():
    t = np.array([1.0, -1.0])
    np.testing.assert_allclose(
        derivatives.slope(2 * t, lambda x: np.exp(2 * t * x)), 2 * t, rtol=1e-9
    )
    assert derivatives.slope(np.array(0.0), lambda x: np.abs(np.array(x)))[()] == 0.0
    assert derivatives.slope(np.array(1.0), lambda x: np.abs(np.array(x)))[()] == 1.0

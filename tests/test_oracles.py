"""Tests of the tests: every mutant of the gradient must be caught, by each of the checkers."""

import numpy as np
import oracles
import pytest
from derivation import change_backward
from derivatives import test_curvature, test_inputs, test_per_sample, test_products, test_residuals
from oracles import assert_close, assert_grads_close, complex_step_grads, make_problem

from mlp_backprop import backprop, check_grads, compute_grads
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines import choice
from mlp_backprop.losses import LOSSES

# Square layers, so that a transposed W keeps its shape.
SIZES = (3, 3, 3, 3)
NAMES = ("sigmoid", "silu", "tanh")


@pytest.fixture
def problem():
    return make_problem(SIZES, activation=NAMES, weighted=True)


@pytest.fixture(params=["differences", "torch"])
def against(request):
    """What check_grads compares with."""
    if request.param == "torch":
        pytest.importorskip("torch")
    return request.param


def gradient(problem):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options).grads


# Mutants that someone deriving by hand may hand in -----------------------------------------------


def scaled(problem, l, factor):
    grads = [list(layer) for layer in gradient(problem)]
    grads[l][0] = factor * grads[l][0]
    return grads


def one_entry_off(problem):
    grads = [list(layer) for layer in gradient(problem)]
    W = grads[1][0]
    W[np.unravel_index(np.argmax(np.abs(W)), W.shape)] *= 1.001
    return grads


def without_weights(problem):
    return gradient(problem._replace(options=problem.options | {"sample_weight": None}))


def without_bias(problem):
    params = [(W, 0 * b) for W, b in problem.params]
    return gradient(problem._replace(params=params))


def summed(problem):
    args = problem.params, problem.X, problem.y
    return compute_grads(*args, **problem.options, reduction="sum").grads


HANDED_IN = {
    "first layer wrong by 0.1 %": lambda p: scaled(p, 0, 1.001),
    "last layer wrong by 0.1 %": lambda p: scaled(p, -1, 1.001),
    "one entry wrong by 0.1 %": one_entry_off,
    "sign": lambda p: [(-W, -b) for W, b in gradient(p)],
    "nan": lambda p: scaled(p, 1, np.nan),
    "transposed weight gradient": lambda p: [(W.T, b) for W, b in gradient(p)],
    "bias gradient dropped": lambda p: [(W, 0 * b) for W, b in gradient(p)],
    "biases dropped": without_bias,
    "sum for mean": summed,
    "divided by n instead of the weights": lambda p: [
        (W * (w := p.options["sample_weight"].mean()), b * w) for W, b in gradient(p)
    ],
    "weights ignored": without_weights,
    "half squared error": lambda p: [(W / 2, b / 2) for W, b in gradient(p)],
    "layers in reverse": lambda p: gradient(p)[::-1],
}


@pytest.mark.parametrize("mutant", HANDED_IN)
def test_a_wrong_gradient_is_caught(mutant, problem, against):
    wrong = HANDED_IN[mutant](problem)
    assert_every_checker_fails(problem, wrong, against)


# Mutants of the package itself -------------------------------------------------------------------


def wrong_activation(monkeypatch, name, factor):
    row = ACTIVATIONS[name]

    def df(xp, Z, H):
        return factor * row.df(xp, Z, H) if factor else xp.ones_like(Z)

    monkeypatch.setitem(ACTIVATIONS, name, row._replace(df=df))


def wrong_loss(monkeypatch):
    row = LOSSES["squared_error"]

    def value_and_grad(xp, H, Y):
        values, G = row.value_and_grad(xp, H, Y)
        return values, 1.001 * G

    monkeypatch.setitem(LOSSES, row.name, row._replace(value_and_grad=value_and_grad))


def transposed_weights(monkeypatch):
    change_backward(
        monkeypatch,
        lambda spec, params: (spec, [layer._replace(W=layer.W.T) for layer in params]),
    )


def next_layers_derivative(monkeypatch):
    def change(spec, params):
        first, *others = spec.activations
        return spec._replace(activations=(*others, first)), params

    change_backward(monkeypatch, change)


def next_layers_input(monkeypatch):
    right = backprop.layer_grad_sums
    monkeypatch.setattr(
        backprop, "layer_grad_sums", lambda spec, D, H_below: right(spec, D, H_below[::-1])
    )


def no_bias_gradient(monkeypatch):
    right = backprop.layer_grad_sums

    def layer_grad_sums(spec, D, H_below):
        layer = right(spec, D, H_below)
        return layer._replace(b=0 * layer.b)

    monkeypatch.setattr(backprop, "layer_grad_sums", layer_grad_sums)


def mean_inside(monkeypatch):
    right = backprop.layer_grad_sums
    monkeypatch.setattr(
        backprop, "layer_grad_sums", lambda spec, D, H_below: right(spec, D / len(D), H_below)
    )


BUILT_IN = {
    "first derivative wrong by 0.1 %": lambda patch: wrong_activation(patch, "sigmoid", 1.001),
    "last derivative wrong by 0.1 %": lambda patch: wrong_activation(patch, "tanh", 1.001),
    "derivative dropped": lambda patch: wrong_activation(patch, "silu", None),
    "loss gradient wrong by 0.1 %": wrong_loss,
    "weights transposed": transposed_weights,
    "derivative of the layer above": next_layers_derivative,
    "rows of the input reversed": next_layers_input,
    "bias gradient dropped": no_bias_gradient,
    "mean inside": mean_inside,
}


@pytest.mark.parametrize("mutant", BUILT_IN)
def test_a_wrong_package_is_caught(mutant, problem, against, monkeypatch, derivation_only):
    BUILT_IN[mutant](monkeypatch)
    assert_every_checker_fails(problem, gradient(problem), against)
    with pytest.raises(AssertionError, match="relative error"):
        check_grads(problem.params, problem.X, problem.y, **problem.options, against=against)


# Mutants of the other derivatives, which stand beside their tests --------------------------------

OTHERS = {
    f"{module.__name__.rpartition('test_')[2]}: {name}": mutant
    for module in (test_curvature, test_inputs, test_per_sample, test_products, test_residuals)
    for name, mutant in module.MUTANTS.items()
}


@pytest.mark.parametrize("mutant", OTHERS)
def test_a_wrong_derivative_is_caught(mutant, monkeypatch, nothing_seen):
    monkeypatch.setattr(choice, "is_for_numpy", lambda spec: False)
    problem = make_problem(SIZES, activation=NAMES, weighted=True)
    # Weights for which third derivatives count as well.
    args = [(2 * W, b) for W, b in problem.params], problem.X, problem.y
    check_grads(*args, **problem.options, also="all")
    OTHERS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match="relative error"):
        check_grads(*args, **problem.options, also="all")


# What they are measured against ------------------------------------------------------------------


def assert_every_checker_fails(problem, wrong, against):
    with pytest.raises(AssertionError, match="of layer"):
        assert_grads_close(wrong, complex_step_grads(problem, "mean"), 1e-4)
    args = problem.params, problem.X, problem.y
    with pytest.raises(AssertionError, match="relative error"):
        check_grads(*args, **problem.options, grads=wrong, against=against)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_right_gradient_passes(problem, reduction, against):
    args = problem.params, problem.X, problem.y
    result = compute_grads(*args, **problem.options, reduction=reduction)
    assert_close(result.loss, oracles.naive_loss(np, problem.params, problem, reduction))
    assert_grads_close(result.grads, complex_step_grads(problem, reduction))
    options = problem.options | {"reduction": reduction, "against": against}
    check_grads(*args, **options, grads=result.grads)
    check_grads(*args, **options)


def test_assert_close_fails_on_shape_size_and_nan():
    assert_close([1.0, 2.0], [1.0, 2.0 + 1e-13])
    assert_close(np.zeros((0, 2)), np.zeros((0, 2)))
    for got in ([[1.0, 2.0]], [1.0, 2.0 + 1e-11], [1.0, np.nan], [1.0, np.inf], 2.0):
        with pytest.raises(AssertionError):
            assert_close(got, [1.0, 2.0])
    with pytest.raises(AssertionError):
        assert_close([1e-300], [0.0])


def test_ways_to_differentiate_agree():
    A = np.array([[0.3, -1.2], [2.0, 0.1]])
    expected = np.exp(A) * np.cos(np.exp(A))
    assert_close(oracles.complex_steps(lambda z: np.sin(np.exp(z)).sum(), A), expected, 1e-15)
    assert_close(
        oracles.central_differences(lambda z: np.sin(np.exp(z)).sum(), A, 1e-6), expected, 1e-8
    )
    derivatives = oracles.exact_derivatives(oracles.MP.exp, A)
    for derivative in (*derivatives, oracles.exact_gradient(lambda z: oracles.MP.exp(z).sum(), A)):
        assert_close(derivative, np.exp(A), 1e-15)

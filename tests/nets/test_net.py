"""A Net where parameters are taken: the same answers, without saying its names again."""

import pickle
from typing import get_args

import numpy as np
import pytest
from oracles import assert_grads_close, make_problem

import mlp_backprop
from mlp_backprop import Layer, Net, types
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.edge import rules
from mlp_backprop.edge.backends import BACKENDS
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import flat

NAMES = ("tanh", "silu", "identity")
PROBLEM = make_problem(activation=NAMES, loss="poisson")
NET = Net(PROBLEM.params, NAMES, "poisson")
X, Y = PROBLEM.X, PROBLEM.y
V = [Layer(np.ones_like(W), np.ones_like(b)) for W, b in PROBLEM.params]
SLOPES = np.ones((len(X), 4, 3))


def residual(X, Y, dY, lap):
    return Y, (np.broadcast_to(np.eye(4), (len(X), 4, 4)), None, None)


# How each public function that takes parameters is called with them, and other options.
WITH_LOSS = {
    "compute_grads": lambda f, net, **o: f(net, X, Y, **o),
    "trace": lambda f, net, **o: f(net, X, Y, **o),
    "prepare_grads": lambda f, net, **o: f(net, n=7, **o)(net, X, Y),
    "check_grads": lambda f, net, **o: f(net, X, Y, **o),
    "per_sample_grads": lambda f, net, **o: f(net, X, Y, **o),
    "per_sample_grad_norms": lambda f, net, **o: f(net, X, Y, **o),
    "clipped_grads": lambda f, net, **o: f(net, X, Y, max_norm=1.0, **o),
    "input_grads": lambda f, net, **o: f(net, X, Y, **o),
    "sobolev_grads": lambda f, net, **o: f(net, X, Y, SLOPES, **o),
    "hvp": lambda f, net, **o: f(net, X, Y, V, **o),
    "ggnvp": lambda f, net, **o: f(net, X, Y, V, **o),
    "fisher_vp": lambda f, net, **o: f(net, X, Y, V, **o),
    "hessian": lambda f, net, **o: f(net, X, Y, **o),
    "ggn": lambda f, net, **o: f(net, X, Y, **o),
    "linear_operator": lambda f, net, **o: f("hessian", net, X, Y, **o) @ np.ones(44),
    "train": lambda f, net, **o: f(net, X, Y, epochs=2, **o).net.params,
}
WITHOUT_LOSS = {
    "forward": lambda f, net, **o: f(net, X, **o),
    "jacobian": lambda f, net, **o: f(net, X, **o),
    "input_hessian_diag": lambda f, net, **o: f(net, X, **o),
    "input_hessian_entries": lambda f, net, **o: f(net, X, [(0, 1)], **o),
    "laplacian": lambda f, net, **o: f(net, X, **o),
    "residual_grads": lambda f, net, **o: f(net, X, residual, **o),
    "jvp": lambda f, net, **o: f(net, X, V, **o),
    "vjp": lambda f, net, **o: f(net, X, np.ones((7, 4)), **o),
    "ntk": lambda f, net, **o: f(net, X, X[:2], **o),
}
NAMELESS = {"ravel_params", "unravel_params"}
OF_MANY = {"stack_params", "unstack_params", "ensemble_forward"}  # test_members.py
OF_NONE = {"optimizers", "schedules", "plot_history"}


def call(name, net, **options):
    return (WITH_LOSS | WITHOUT_LOSS)[name](getattr(mlp_backprop, name), net, **options)


def numbers(result):
    """All of a result in one vector."""
    if isinstance(result, list | tuple):
        return np.concatenate([numbers(part) for part in result])
    return np.ravel(np.asarray(result, dtype=float))


def test_every_function_is_here():
    functions = {name for name in mlp_backprop.__all__ if name[0].islower()}
    named = set(WITH_LOSS | WITHOUT_LOSS)
    assert functions - {"backends", "init_params"} == named | NAMELESS | OF_MANY | OF_NONE


@pytest.mark.parametrize("name", [*WITH_LOSS, *WITHOUT_LOSS])
def test_a_net_brings_its_names_along(name):
    said = {"activation": NAMES} | ({"loss": "poisson"} if name in WITH_LOSS else {})
    expected = numbers(call(name, PROBLEM.params, **said))
    np.testing.assert_array_equal(numbers(call(name, NET)), expected)
    np.testing.assert_array_equal(numbers(call(name, NET, **said)), expected)  # said again
    assert not np.array_equal(numbers(call(name, PROBLEM.params)), expected)  # the defaults


@pytest.mark.parametrize("name", [*WITH_LOSS, *WITHOUT_LOSS])
def test_saying_something_else_is_an_error(name):
    with pytest.raises(ValueError, match=r"activation='relu' .* Net whose activation is \('tanh'"):
        call(name, NET, activation="relu")
    if name in WITH_LOSS:
        with pytest.raises(ValueError, match=r"loss='huber' .* Net whose loss is 'poisson'"):
            call(name, NET, loss="huber")


@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_functions_without_a_loss_ignore_that_of_the_net(name):
    other = NET._replace(loss="no such loss", activation=[*NAMES[:2], "sigmoid"])
    call(name, other)  # not even a loss that takes logits, at a sigmoid


def test_one_name_is_the_same_as_a_name_for_each_layer():
    net = Net(PROBLEM.params, "tanh")
    named = Net(PROBLEM.params, ["tanh", "tanh", "identity"], "squared_error")
    assert_grads_close(call("compute_grads", net).grads, call("compute_grads", named).grads, 0)
    call("compute_grads", net, activation=["tanh", "tanh", "identity"])


def test_the_defaults_are_those_of_plain_parameters():
    net, plain = Net(PROBLEM.params), PROBLEM.params
    assert (net.activation, net.loss) == ("sigmoid", "squared_error")
    assert_grads_close(call("compute_grads", net).grads, call("compute_grads", plain).grads, 0)


@pytest.mark.parametrize("wrong", [{"activation": "tan"}, {"loss": "huge"}, {"params": []}])
def test_a_wrong_net_is_refused(wrong):
    with pytest.raises(ValueError, match=r"unknown activation|unknown loss|params is empty"):
        call("compute_grads", NET._replace(**wrong))


def test_a_net_stands_for_vectors_and_gradients():
    v = Net(V, "relu", "huber")  # whose names do not matter
    np.testing.assert_array_equal(
        numbers(mlp_backprop.hvp(NET, X, Y, v)), numbers(call("hvp", NET))
    )
    grads = Net(mlp_backprop.compute_grads(NET, X, Y).grads)
    mlp_backprop.check_grads(NET, X, Y, grads=grads)
    x = mlp_backprop.ravel_params(NET)
    np.testing.assert_array_equal(x, mlp_backprop.ravel_params(NET.params))
    assert type(mlp_backprop.unravel_params(x, NET)) is list


def test_check_grads_holds_the_others_to_the_net():
    mlp_backprop.check_grads(NET, X, Y, also="all")


def test_prepared_and_bound():
    grad_fn = mlp_backprop.prepare_grads(NET, n=7)
    expected = numbers(mlp_backprop.compute_grads(NET, X, Y))
    other = NET._replace(activation="relu")
    for fn in (grad_fn, pickle.loads(pickle.dumps(grad_fn))):
        for net in (NET, NET.params, NET._replace(params=list(NET.params))):
            np.testing.assert_array_equal(numbers(fn(net, X, Y)), expected)
            np.testing.assert_array_equal(numbers(fn.bind(net, X, Y)()), expected)
        with pytest.raises(ValueError, match="Net whose activation is 'relu'"):
            fn(other, X, Y)
        with pytest.raises(ValueError, match="Net whose activation is 'relu'"):
            fn.bind(other, X, Y)


def test_it_takes_arrays_of_every_library(backend):
    problem = PROBLEM.map(backend.array)
    got = mlp_backprop.compute_grads(Net(problem.params, NAMES, "poisson"), problem.X, problem.y)
    grads = [Layer(backend.numpy(W), backend.numpy(b)) for W, b in got.grads]
    assert_grads_close(grads, mlp_backprop.compute_grads(NET, X, Y).grads)


@pytest.mark.parametrize(
    ("net", "line"),
    [
        (NET, "Net 3-5-2-4: tanh silu identity, poisson, float64, 44 parameters"),
        (
            Net([([[1, 2]], [3])], "relu"),
            "Net 2-1: relu, squared_error, lists, 3 parameters",
        ),
    ],
)
def test_print_says_it_in_one_line(net, line):
    assert str(net) == line


# The names in type hints -------------------------------------------------------------------------


def test_literal_types_have_the_names_of_the_tables():
    assert get_args(types.ActivationName) == tuple(ACTIVATIONS)
    assert get_args(types.LossName) == tuple(LOSSES)
    assert get_args(types.Reduction) == tuple(rules.REDUCTIONS)
    assert get_args(types.Precision) == tuple(rules.PRECISIONS)
    assert get_args(types.BackendName) == tuple(BACKENDS)


def test_flat_is_the_order_of_layers():
    assert flat([(1, 2), (3, 4)]) == [1, 2, 3, 4]

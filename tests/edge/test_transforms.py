"""Inside other libraries' transforms of functions: refused, not zeros; jax.jit of a call works."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from oracles import make_problem

from mlp_backprop import compute_grads, forward, hvp, prepare_grads
from mlp_backprop.types import flat

# torch.func itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

PROBLEM = make_problem()
NAMES = {0: "W of layer 1", 1: "X", 2: "y"}


def loss_of(*arguments):
    return compute_grads(*arguments, activation="tanh").loss


def in_torch(transform, which):
    torch = pytest.importorskip("torch")
    problem = PROBLEM.map(torch.tensor)
    arguments = problem.params, problem.X, problem.y

    def loss(moving):
        return loss_of(*(moving if k == which else A for k, A in enumerate(arguments)))

    at = arguments[which]
    if transform == "jvp":
        return lambda: torch.func.jvp(loss, (at,), (at,))
    if transform == "vmap":
        return lambda: torch.func.vmap(loss, randomness="error")(torch.stack([at, at]))
    return lambda: getattr(torch.func, transform)(loss)(at)


def in_jax(transform, which):
    jax = pytest.importorskip("jax")
    problem = PROBLEM.map(jax.numpy.array)
    arguments = problem.params, problem.X, problem.y

    def loss(moving):
        return loss_of(*(moving if k == which else A for k, A in enumerate(arguments)))

    at = arguments[which]
    if transform == "jvp":
        return lambda: jax.jvp(loss, (at,), (at,))
    if transform == "vmap":
        return lambda: jax.vmap(loss)(jax.numpy.stack([at, at]))
    return lambda: getattr(jax, transform)(loss)(at)


@pytest.mark.parametrize("library", [in_torch, in_jax])
@pytest.mark.parametrize(
    ("transform", "which"),
    [("grad", 0), ("grad", 1), ("grad", 2), ("jvp", 1), ("vmap", 1), ("hessian", 2)],
)
def test_refused_inside_a_transform(transform, which, library):
    call = library(transform, which)
    message = rf"^{NAMES[which]} is inside (torch.func|jax).grad, jvp or vmap, .*call it outside"
    with pytest.raises(TypeError, match=message):
        call()


def test_an_argument_that_does_not_move_may_be_computed_inside_torch():
    # Then there is nothing to differentiate: zero is right.
    torch = pytest.importorskip("torch")
    problem = PROBLEM.map(torch.tensor)
    fixed = loss_of(problem.params, problem.X, problem.y)

    def product(t):
        return t * loss_of(problem.params, problem.X, problem.y)

    assert torch.func.grad(product)(torch.tensor(2.0, dtype=torch.float64)) == fixed


# jax.jit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("traced", [(0, 1, 2), (0,), (1,), (2,)])
def test_jit_of_a_call(traced):
    jax = pytest.importorskip("jax")
    problem = PROBLEM.map(jax.numpy.array)
    arguments = [problem.params, problem.X, problem.y]

    @jax.jit
    def call(moving):
        given = [moving.get(k, A) for k, A in enumerate(arguments)]
        return compute_grads(*given, activation="tanh")

    got = call({k: arguments[k] for k in traced})
    expected = compute_grads(*arguments, activation="tanh")
    for A, B in zip(flat(got.grads), flat(expected.grads), strict=True):
        assert_allclose(np.asarray(A), np.asarray(B), rtol=1e-12)


def test_jit_of_other_calls():
    jax = pytest.importorskip("jax")
    params, X, y, _ = PROBLEM.map(jax.numpy.array)
    grad_fn = prepare_grads(params, n=7)
    for function in (
        lambda X: forward(params, X),
        lambda X: hvp(params, X, y, params)[0].W,
        lambda X: grad_fn(params, X, y).loss,
    ):
        assert_allclose(jax.jit(function)(X), function(X), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "softmax_cross_entropy"}, "y must hold class indices"),
        ({"loss": "softmax_cross_entropy", "class_rows": True}, "y must hold weights per class"),
        ({"loss": "binary_cross_entropy"}, "y must hold probabilities"),
        ({"weighted": True}, "sample_weight must hold weights"),
    ],
)
def test_values_cannot_be_looked_at_inside_jit(options, message):
    jax = pytest.importorskip("jax")
    problem = make_problem(**options).map(jax.numpy.array)

    @jax.jit
    def call(params, X, y, weight):
        return compute_grads(params, X, y, **problem.options | {"sample_weight": weight})

    weight = problem.options["sample_weight"]
    with pytest.raises(TypeError, match=f"^{message}.*, and inside jax.jit there are no values"):
        call(problem.params, problem.X, problem.y, weight)

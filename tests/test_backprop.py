"""The derivation itself: forward, deltas, and sums that add up over blocks of rows."""

from itertools import pairwise

import numpy as np
import pytest
from derivation import by_derivation, checked
from oracles import (
    ACTIVATIONS,
    LOSSES,
    assert_close,
    assert_grads_close,
    complex_steps,
    make_problem,
    naive_loss,
)

from mlp_backprop import Layer, backprop, trace
from mlp_backprop.activations import ACTIVATIONS as ROWS

MIXED = ("tanh", "gelu_tanh", "identity")


def rows_of(problem, rows):
    weight = problem.options["sample_weight"]
    options = problem.options | {"sample_weight": weight if weight is None else weight[rows]}
    return problem._replace(X=problem.X[rows], y=problem.y[rows], options=options)


def assert_sums_close(got, expected, tolerance=1e-13):
    assert_close(got.loss, expected.loss, tolerance)
    assert_close(got.weight, expected.weight, tolerance)
    assert_grads_close(got.grads, expected.grads, tolerance)


def added(first, second):
    return backprop.Sums(
        first.loss + second.loss,
        first.weight + second.weight,
        [(W + V, b + c) for (W, b), (V, c) in zip(first.grads, second.grads, strict=True)],
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_keeps_every_layer(activation):
    problem = make_problem(activation=activation)
    names = problem.names
    rows = tuple(ROWS[name] for name in names)
    spec = backprop.Spec(np, (3, 5, 2, 4), np.dtype(float), rows)
    Z, H = backprop.forward(spec, problem.params, problem.X)
    assert [A.shape for A in Z] == [A.shape for A in H] == [(7, d) for d in (3, 5, 2, 4)]
    assert Z[0] is H[0] is problem.X
    for l, (W, b) in enumerate(problem.params, 1):
        assert_close(Z[l], np.einsum("oi,ni->no", W, H[l - 1]) + b[None, :], 1e-15)
        assert_close(H[l], ACTIVATIONS[names[l - 1]](np, Z[l]), 1e-14)


def loss_from_layer(problem, l, Z_l):
    """The summed loss, as a function of the pre-activations of layer l; l = 0 is the input."""
    above = problem._replace(params=problem.params[l:])
    name = problem.names[l - 1] if l else "identity"
    options = problem.options | {"activation": problem.names[l:]}
    H = ACTIVATIONS[name](np, Z_l)
    return naive_loss(np, above.params, above._replace(options=options), "sum", X=H)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_delta_is_the_derivative_of_the_loss_by_z(loss, weighted):
    problem = make_problem(activation=MIXED, loss=loss, weighted=weighted)
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    for l, (Z_l, D_l) in enumerate(zip(steps.Z, steps.D, strict=True)):
        expected = complex_steps(lambda A, l=l: loss_from_layer(problem, l, A), Z_l)
        assert_close(D_l, expected)


def test_the_first_delta_is_the_derivative_by_x():
    problem = make_problem(activation=["silu", "sigmoid", "softplus"])
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    expected = complex_steps(
        lambda X: naive_loss(np, problem.params, problem, "sum", X=X), problem.X
    )
    assert_close(steps.D[0], expected)


@pytest.mark.parametrize("weighted", [False, True])
def test_trace_and_sums_are_one_pass(weighted):
    problem = make_problem(activation=MIXED, loss="softmax_cross_entropy", weighted=weighted)
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    sums = backprop.loss_and_grad_sums(*checked(problem))
    assert steps.loss.shape == (7,)
    assert_close(steps.loss.sum(), sums.loss, 1e-15)
    assert_grads_close(steps.grads, sums.grads, 1e-15)
    for l, (W, b) in enumerate(steps.grads, 1):
        assert_close(W, np.einsum("no,ni->oi", steps.D[l], steps.H[l - 1]), 1e-14)
        assert_close(b, steps.D[l].sum(axis=0), 1e-14)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("cuts", [(), (4,), (1, 3), (0, 6), (1, 2, 3, 4, 5, 6)])
def test_blocks_of_rows_add_up(loss, cuts):
    problem = make_problem(activation=MIXED, loss=loss, weighted=True)
    total = backprop.loss_and_grad_sums(*checked(problem))
    edges = [0, *cuts, 7]
    blocks = [
        backprop.loss_and_grad_sums(*checked(rows_of(problem, slice(start, stop))))
        for start, stop in pairwise(edges)
    ]
    summed = blocks[0]
    for block in blocks[1:]:
        summed = added(summed, block)
    assert_sums_close(summed, total)


MEMBERS = [make_problem(activation=MIXED, seed=seed) for seed in (1, 2, 3)]


def stacked(arrays):
    return np.stack([np.asarray(array) for array in arrays])


@pytest.mark.parametrize("own", [False, True], ids=["shared data", "own data"])
@pytest.mark.parametrize("loss", [*LOSSES, "labels"])
def test_many_nets_have_the_sums_of_each_alone(loss, own, backend):
    """One more axis in front of everything, or of the parameters alone."""
    name = "softmax_cross_entropy" if loss == "labels" else loss
    problems = [
        make_problem(
            activation=MIXED,
            loss=name,
            weighted=True,
            class_rows=loss != "labels",
            seed=seed if own else 0,
        )._replace(params=member.params)
        for seed, member in enumerate(MEMBERS)
    ]
    if own:  # weights are for all
        problems = [p._replace(options=problems[0].options) for p in problems]
    expected = [by_derivation(problem) for problem in problems]
    layers = zip(*(problem.params for problem in problems), strict=True)
    params = [Layer(*map(stacked, zip(*pairs, strict=True))) for pairs in layers]
    X = stacked([p.X for p in problems]) if own else problems[0].X
    y = stacked([p.y for p in problems if own or p is problems[0]])
    problem = problems[0].map(backend.array)
    spec, *_, weight = checked(problem)
    arrays = [Layer(*map(backend.array, layer)) for layer in params], backend.array(X)
    sums = backprop.loss_and_grad_sums(spec, *arrays, backend.array(y), weight)
    got = backprop.reduced(spec, sums)
    assert_close(backend.numpy(got.loss), stacked([one.loss for one in expected]), 1e-13)
    for e, one in enumerate(expected):
        grads = [(backend.numpy(W)[e], backend.numpy(b)[e]) for W, b in got.grads]
        assert_grads_close(grads, one.grads, 1e-13)


def test_without_weights_the_weight_of_a_row_is_one():
    problem = make_problem()
    ones = problem._replace(options=problem.options | {"sample_weight": np.ones(7)})
    unweighted = backprop.loss_and_grad_sums(*checked(problem))
    assert unweighted.weight == 7
    assert_sums_close(backprop.loss_and_grad_sums(*checked(ones)), unweighted, 0)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [(np.float64, np.float64), (np.float32, np.float32), (np.float16, np.float32)],
)
def test_sums_have_the_accumulators_dtype(dtype, wide):
    spec, *arrays = checked(make_problem(dtype=dtype, weighted=True))
    assert backprop.accumulator_dtype(spec) == wide
    sums = backprop.loss_and_grad_sums(spec, *arrays)
    assert sums.loss.dtype == sums.weight.dtype == wide
    assert {A.dtype for layer in sums.grads for A in layer} == {np.dtype(wide)}


def test_deltas_keep_the_nets_dtype():
    problem = make_problem(dtype=np.float16)
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    assert {A.dtype for A in [*steps.Z, *steps.H, *steps.D]} == {np.dtype(np.float16)}
    assert steps.loss.dtype == np.float32

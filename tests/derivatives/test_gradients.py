"""compute_grads from end to end: against autograd, on every library, in every dtype."""

import json
from pathlib import Path

import numpy as np
import oracles
import pytest
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    TAKE_LOGITS,
    assert_close,
    assert_grads_close,
    assert_result_close,
    complex_step_grads,
    make_problem,
    problems,
)

from mlp_backprop import Layer, check_grads, compute_grads, forward
from mlp_backprop.edge import backends

SHAPES = [(3, 2), (1, 1), (2, 1, 3), (4, 1), (3, 5, 2, 4), (1, 6, 1), (5, 3, 4, 2, 3)]


def run(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def by_torch(problem, reduction):
    reference = pytest.importorskip("mlp_backprop.checks.torch_reference", exc_type=ImportError)
    return reference.loss_and_grads(
        problem.params,
        problem.X,
        problem.y,
        problem.options["sample_weight"],
        names=problem.names,
        loss=problem.options["loss"],
        reduction=reduction,
    )


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch_autograd(activation, loss):
    for seed, problem in problems(SHAPES, activation, loss):
        reduction = ("mean", "sum")[seed // 2 % 2]
        expected = by_torch(problem, reduction)
        assert_result_close(run(problem, reduction=reduction), expected)
        # The float32 data are rounded first; what is then off is the arithmetic's.
        single = problem.astype(np.float32)
        expected = by_torch(single.astype(np.float64), reduction)
        assert_result_close(run(single, reduction=reduction), expected, 2e-5)


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_activations(seed):
    rng = np.random.default_rng(seed)
    loss = rng.choice([name for name in LOSSES if name not in TAKE_LOGITS])
    names = list(rng.choice(list(ACTIVATIONS), rng.integers(1, 5)))
    sizes = tuple(rng.integers(1, 6, len(names) + 1))
    problem = make_problem(sizes, activation=names, loss=str(loss), weighted=True, seed=seed)
    result = run(problem)
    assert_result_close(result, by_torch(problem, "mean"))
    assert_grads_close(result.grads, complex_step_grads(problem, "mean"), 1e-11)
    check_grads(problem.params, problem.X, problem.y, **problem.options)


@pytest.mark.parametrize("class_rows", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_against_complex_steps(loss, class_rows):
    problem = make_problem(
        activation=["softplus", "elu", "identity"], loss=loss, class_rows=class_rows
    )
    result = run(problem)
    assert_close(result.loss, oracles.naive_loss(np, problem.params, problem, "mean"))
    assert_grads_close(result.grads, complex_step_grads(problem, "mean"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_differences(activation, loss):
    problem = make_problem((2, 3, 2), activation=activation, loss=loss, weighted=True)
    errors = check_grads(problem.params, problem.X, problem.y, **problem.options)
    assert max(max(layer) for layer in errors) < 1e-8


@pytest.mark.parametrize("loss", LOSSES)
def test_against_jax_grad(loss):
    jax = pytest.importorskip("jax")
    problem = make_problem(activation=["sigmoid", "tanh", "identity"], loss=loss, weighted=True)

    def naive(params):
        return oracles.naive_loss(jax.numpy, params, problem, "mean")

    params = [tuple(map(jax.numpy.asarray, layer)) for layer in problem.params]
    expected = jax.jit(jax.value_and_grad(naive))(params)
    assert_result_close(run(problem), expected)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_library_agrees_with_numpy(loss, weighted, backend):
    problem = make_problem(activation="silu", loss=loss, weighted=weighted)
    expected = run(problem)
    got = run(problem.map(backend.array))
    grads = [map(backend.numpy, layer) for layer in got.grads]
    assert_result_close((backend.numpy(got.loss), grads), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_every_library(activation, backend):
    problem = make_problem(activation=activation)
    placed = problem.map(backend.array)
    H = forward(placed.params, placed.X, activation=activation)
    assert_close(backend.numpy(H), forward(problem.params, problem.X, activation=activation))
    grads = [map(backend.numpy, layer) for layer in run(placed).grads]
    assert_grads_close(grads, run(problem).grads)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_are_like_the_parameters(dtype, reduction, backend):
    problem = make_problem(dtype=dtype, weighted=True).map(backend.array)
    result = run(problem, reduction=reduction)
    assert result._fields == ("loss", "grads")
    assert type(result.grads) is list
    W = problem.params[0][0]
    xp = backends.namespace_of(W)
    assert result.loss.shape == ()
    assert result.loss.dtype == W.dtype
    assert backends.namespace_of(result.loss) is xp
    for grad, layer in zip(result.grads, problem.params, strict=True):
        assert type(grad) is Layer
        for A, B in zip(grad, layer, strict=True):
            assert type(A) is type(B)
            assert (A.shape, A.dtype) == (B.shape, B.dtype)
            assert backends.device_of(xp, A) == backends.device_of(xp, B)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_rows_give_a_sum_of_zero(loss, weighted, backend):
    problem = make_problem(n=0, loss=loss, weighted=weighted)
    result = run(problem.map(backend.array), reduction="sum")
    assert backend.numpy(result.loss) == 0
    for grad, layer in zip(result.grads, problem.params, strict=True):
        for A, B in zip(grad, layer, strict=True):
            assert_array_equal(backend.numpy(A), np.zeros_like(B))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", LOSSES)
def test_weight_two_equals_the_row_twice(loss, reduction):
    problem = make_problem(loss=loss)
    counts = np.array([1, 2, 0, 3, 1, 1, 2])
    weighted = problem.options | {"sample_weight": counts.astype(float)}
    repeated = problem._replace(
        X=np.repeat(problem.X, counts, axis=0), y=np.repeat(problem.y, counts, axis=0)
    )
    assert_result_close(
        run(problem._replace(options=weighted), reduction=reduction),
        run(repeated, reduction=reduction),
        1e-14,
    )


# Half precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [
        ("numpy", "float16", 1e-2),
        ("torch", "float16", 1e-2),
        ("torch", "bfloat16", 6e-2),
        ("jax", "float16", 1e-2),
        ("jax", "bfloat16", 6e-2),
    ],
)
@pytest.mark.parametrize("loss", ["squared_error", "poisson", "softmax_cross_entropy"])
def test_half_precision_of_many_rows(name, dtype, tolerance, loss):
    # Sums of 100 000 leave the range of float16 (65 504), and their last terms that of bfloat16.
    pytest.importorskip(name)
    xp = backends.namespace(name)

    def halved(A):
        A = xp.asarray(A)
        return xp.astype(A, getattr(xp, dtype)) if xp.isdtype(A.dtype, "real floating") else A

    def doubled(A):
        A = backends.to_numpy(xp, A)
        return A if A.dtype.kind == "i" else A.astype(float)

    problem = make_problem((3, 4, 2), 100_000, loss=loss).map(halved)
    expected = run(problem.map(doubled))
    got = run(problem)
    assert got.loss.dtype == xp.float32
    assert all(A.dtype == getattr(xp, dtype) for layer in got.grads for A in layer)
    grads = [map(doubled, layer) for layer in got.grads]
    assert_result_close((float(got.loss), grads), expected, tolerance)
    assert float(run(problem, reduction="sum").loss) > 65_504


# Particular cases --------------------------------------------------------------------------------


def test_mazurs_worked_example(backend):
    case = json.loads((Path(__file__).parents[1] / "data/mazur.json").read_text())
    params, X, y = (
        [tuple(backend.array(np.array(A)) for A in layer) for layer in case["params"]],
        backend.array(np.array(case["X"])),
        backend.array(np.array(case["y"])),
    )
    options = {"activation": case["activation"]}
    assert_close(backend.numpy(forward(params, X, **options)), case["output"])
    loss, grads = compute_grads(params, X, y, **options)
    # His loss has a factor 1/2, ours has none.
    assert_close(backend.numpy(loss) / 2, case["half_squared_error"])
    halves = [[backend.numpy(A) / 2 for A in layer] for layer in grads]
    assert_grads_close(halves, [[np.array(A) for A in layer] for layer in case["grads_of_half"]])


def test_tensors_that_require_grad_give_results_that_do_not():
    torch = pytest.importorskip("torch")
    problem = make_problem()
    leaves = problem.map(lambda A: torch.tensor(A, requires_grad=True))
    loss, grads = run(leaves)
    assert not loss.requires_grad
    assert not any(A.requires_grad for layer in grads for A in layer)
    assert all(A.grad is None for layer in leaves.params for A in layer)
    assert_result_close((loss, grads), run(problem))


def test_a_net_too_deep_to_write_out():
    problem = make_problem((2, *[3] * 30, 1), activation="tanh", weighted=True)
    assert_result_close(run(problem), by_torch(problem, "mean"), 1e-11)

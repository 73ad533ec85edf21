"""Compiled passes of first order: the derivation's answers, whatever the arrays and the threads."""

from functools import partial

import numpy as np
import oracles
import pytest
from derivation import checked
from oracles import assert_bits

pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import backprop, forward, input_grads, vjp
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.checks.checking import check_grads
from mlp_backprop.derivatives.per_sample import (
    clipped_grads,
    per_sample_grad_norms,
    per_sample_grads,
)
from mlp_backprop.engines import choice
from mlp_backprop.engines.compiled import first_order, schedule
from mlp_backprop.maths import samples
from mlp_backprop.types import flat

FLOATS = (np.float64, np.float32)
TOLERANCE = {np.float64: 1e-12, np.float32: 2e-5}
SIZES = (3, 5, 2, 4)


@pytest.fixture(params=FLOATS)
def dtype(request):
    return request.param


def vector_of_outputs(problem):
    """Numbers for vjp."""
    n, n_out = len(problem.X), len(problem.params[-1][1])
    return np.random.default_rng(5).normal(size=(n, n_out)).astype(problem.X.dtype)


# By name: what the public function says, and what the derivation does in its stead.


def net_only(problem):
    return {"activation": problem.options["activation"], "backend": "numba"}


def ask(question, problem, U=None, **options):
    """The answer of a public function, as one list of arrays."""
    params, X, y, own = problem
    options = {**own, "backend": "numba", **options}
    if question == "norms":
        return [per_sample_grad_norms(params, X, y, **options)]
    if question == "norms by layer":
        return [per_sample_grad_norms(params, X, y, per_layer=True, **options)]
    if question == "sample grads":
        return flat(per_sample_grads(params, X, y, **options))
    if question == "clipped":
        loss, grads = clipped_grads(params, X, y, max_norm=1.5, reduction="sum", **options)
        return [loss, *flat(grads)]
    if question == "input grads":
        return [input_grads(params, X, y, **{"reduction": "sum", **options})]
    if question == "outputs":
        return [forward(params, X, **net_only(problem))]
    U = vector_of_outputs(problem) if U is None else U
    return flat(vjp(params, X, U, **net_only(problem)))


PER_ROW = "outputs", "norms", "norms by layer", "sample grads", "input grads"
SUMMED = "clipped", "vjp"
QUESTIONS = PER_ROW + SUMMED


def derived(problem):
    """By question, the derivation's answers in float64."""
    spec, params, X, y, weight = checked(problem.astype(np.float64))
    loss, factors = samples.sweep(spec, params, X, y, weight)
    factors = list(factors)
    squares = samples.squared_norms(spec, factors)[::-1]
    Z, H = backprop.forward(spec, params, X)
    U = vector_of_outputs(problem).astype(np.float64)
    deltas = backprop.backward(spec, params, Z, H, U)
    return {
        "norms": [np.sqrt(sum(squares))],
        "norms by layer": [np.sqrt(np.stack(squares, axis=1))],
        "sample grads": flat([samples.outer_product(np, *pair) for pair in factors][::-1]),
        "clipped": [loss, *flat(samples.clipped_sums(spec, factors, 1.5))],
        "input grads": [factors[-1][0] @ params[0].W],
        "outputs": [H[-1]],
        "vjp": flat([backprop.layer_grad_sums(spec, D, H[l - 1]) for l, D in deltas][::-1]),
    }


def assert_equals_derivation(problem, dtype):
    problem = problem.astype(dtype)
    with np.errstate(all="ignore"):
        expected = derived(problem)
    for question in QUESTIONS:
        got = ask(question, problem)
        assert len(got) == len(expected[question])
        for A, B in zip(got, expected[question], strict=True):
            assert A.dtype == dtype
            try:
                oracles.assert_close(A, B, TOLERANCE[dtype])
            except AssertionError as error:
                raise AssertionError(f"{question}: {error}") from None


@pytest.fixture
def only_compiled(monkeypatch):
    """Whatever would be computed otherwise is an error."""

    def refuse(*_):
        raise AssertionError("not compiled")

    monkeypatch.setattr(choice, "for_each_sweep", refuse)
    monkeypatch.setattr(choice, "undisturbed", refuse)


# The same answers --------------------------------------------------------------------------------


@pytest.mark.usefixtures("only_compiled")
@pytest.mark.parametrize("problem", oracles.PROBLEMS, ids=str)
def test_every_kind_of_problem(problem, dtype):
    assert_equals_derivation(oracles.make_problem(**problem), dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 2),
        (1, 1),
        (1, 1, 1),
        (2, 10, 5, 1),
        (7, 8, 9, 15),
        (16, 17, 31, 33),
        (64, 64, 64, 1),
        (7, 1, 13, 1, 6),
        (4, 5, 6, 7, 3, 2, 9),
        (784, 128, 64, 10),
        (1, 256, 1),
    ],
)
def test_any_depth_and_widths(sizes, dtype):
    n = 7 if sizes[0] == 784 else 75  # whose gradients of single samples are 100 000 numbers each
    assert_equals_derivation(oracles.make_problem(sizes, n, weighted=True), dtype)


def test_the_checker_agrees():
    params, X, y, options = oracles.make_problem(weighted=True)
    also = ["per_sample_grads", "per_sample_grad_norms", "clipped_grads", "input_grads", "vjp"]
    check_grads(params, X, y, backend="numba", also=also, **options)  # which raises if not


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
def test_means_are_sums_divided_once(weighted, reduction, dtype):
    problem = oracles.make_problem(SIZES, 40, weighted=weighted, dtype=dtype)
    weight = problem.options["sample_weight"]
    total = 40 if weight is None else weight.sum()
    over = 1 if reduction == "sum" else total
    [sums], [dX] = ask("input grads", problem), ask("input grads", problem, reduction=reduction)
    oracles.assert_close(dX, sums / over, TOLERANCE[dtype])
    params, X, y, options = problem
    options = {**options, "backend": "numba", "max_norm": 1.5}
    expected = clipped_grads(params, X, y, reduction="sum", **options)
    got = clipped_grads(params, X, y, reduction=reduction, **options)
    oracles.assert_close(got.loss, expected.loss / over, TOLERANCE[dtype])
    for A, B in zip(flat(got.grads), flat(expected.grads), strict=True):
        oracles.assert_close(A, B / over, TOLERANCE[dtype])


# Clipping ----------------------------------------------------------------------------------------


def clipped(problem, max_norm, backend="numba"):
    params, X, y, options = problem
    options = {**options, "backend": backend, "max_norm": max_norm, "reduction": "sum"}
    return flat(clipped_grads(params, X, y, **options).grads)


def test_infinity_clips_nothing_and_each_row_is_clipped_to_the_norm(dtype):
    problem = oracles.make_problem(n=40, dtype=dtype)
    rows = ask("sample grads", problem)
    for A, B in zip(clipped(problem, np.inf), rows, strict=True):
        oracles.assert_close(A, B.sum(axis=0), TOLERANCE[dtype])
    norms = ask("norms", problem)[0]
    least = float(norms.min()) / 2  # all are clipped
    for A, B in zip(clipped(problem, least), rows, strict=True):
        c = (least / norms).reshape(-1, *[1] * (B.ndim - 1))
        oracles.assert_close(A, (c * B).sum(axis=0), 10 * TOLERANCE[dtype])


def test_a_gradient_of_zero_and_one_of_nan(dtype):
    problem = oracles.make_problem(n=9, weighted=True, dtype=dtype)
    problem.options["sample_weight"][...] = 0
    assert all(np.all(A == 0) for A in clipped(problem, 1e-3))
    problem.options["sample_weight"][...] = 1
    problem.X[4, 0] = np.nan
    assert all(np.isnan(A).all() for A in clipped(problem, 1e-3))


@pytest.mark.parametrize("size", [1e25, -1e25])
def test_a_norm_that_overflows_counts_as_zero(size):
    # The residual of row 3, and so its gradient, is finite in float32, and its square is not.
    problem = oracles.make_problem((3, 2), n=7, dtype=np.float32)
    problem.y[3] = size
    others = [i for i in range(7) if i != 3]
    rest = problem._replace(X=problem.X[others], y=problem.y[others])
    for A, B in zip(clipped(problem, 1.5), clipped(rest, 1.5), strict=True):
        oracles.assert_close(A, B, 2e-5)
    assert ask("norms", problem)[0][3] == np.inf
    assert max(abs(A).max() for A in clipped(problem, np.inf)) > 1e24


# Rows keep to themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("question", PER_ROW)
def test_a_row_that_is_not_finite_touches_no_other(question, activation, value, dtype):
    problem = oracles.make_problem(n=21, activation=activation, dtype=dtype)
    expected = [A.copy() for A in ask(question, problem)]
    problem.X[5, 1] = value
    others = np.arange(21) != 5
    for A, B in zip(ask(question, problem), expected, strict=True):
        assert_bits(A[others], B[others])
    if np.isnan(value):
        assert np.isnan(ask(question, problem)[0][5]).any()


@pytest.mark.parametrize("question", PER_ROW)
def test_rows_of_a_batch_are_those_of_a_part_of_it(question, dtype):
    problem = oracles.make_problem((7, 9, 3), 300, dtype=dtype)
    for A, B in zip(
        ask(question, problem),
        ask(question, problem._replace(X=problem.X[:131], y=problem.y[:131])),
        strict=True,
    ):
        assert A.shape[0] == 300
        oracles.assert_close(A[:131], B, TOLERANCE[dtype])


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize("question", QUESTIONS)
def test_no_rows(question, loss, dtype):
    problem = oracles.make_problem(n=0, loss=loss, dtype=dtype)
    for A, B in zip(ask(question, problem), derived(problem)[question], strict=True):
        assert_bits(A, B.astype(dtype))


# Any arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, question, dtype):
    problem = oracles.make_problem(n=300, weighted=True, dtype=dtype)
    U = vector_of_outputs(problem)
    expected = ask(question, problem, U)
    for A, B in zip(ask(question, problem.map(change), change(U)), expected, strict=True):
        assert_bits(A, B)


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int32, np.uint64])
@pytest.mark.parametrize("question", ["norms", "clipped", "sample grads", "input grads"])
def test_classes_of_any_integer_type(question, integer):
    problem = oracles.make_problem(n=40, loss="softmax_cross_entropy")
    other = problem._replace(y=problem.y.astype(integer))
    for A, B in zip(ask(question, other), ask(question, problem), strict=True):
        assert_bits(A, B)


@pytest.mark.parametrize("n", [7, 100_000])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40])
def test_a_class_out_of_range_is_refused(wrong, n):
    problem = oracles.make_problem(n=n, loss="softmax_cross_entropy")
    arrays = checked(problem)
    arrays.y[n - 2] = wrong  # after the edge has looked
    for refuse in (
        partial(first_order.norms, per_layer=False),
        partial(first_order.clipped_grads, max_norm=1.0),
        first_order.sample_grads,
        first_order.input_grads,
    ):
        with pytest.raises(ValueError, match="y must hold class indices from 0 to 3"):
            refuse(*arrays)


@pytest.mark.parametrize("question", QUESTIONS)
def test_results_are_the_callers_own(question):
    first, second = (oracles.make_problem(n=30, seed=seed) for seed in (0, 1))
    kept = ask(question, first)
    copies = [np.copy(A) for A in kept]
    ask(question, second)
    for A, B in zip(kept, copies, strict=True):
        assert_bits(A, B)
    assert all(A.flags.writeable for A in kept if np.ndim(A))


# Threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_number_of_threads_changes_no_bit(question, dtype, monkeypatch):
    monkeypatch.setattr(schedule, "THREAD_OPERATIONS", 1_000_000)
    monkeypatch.setattr(schedule, "CHUNK_OPERATIONS", 100_000)
    problem = oracles.make_problem((3, 20, 8, 2), 3000, activation="silu", dtype=dtype)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", n_threads)
        results.append(ask(question, problem))
    for result in results[1:]:
        for A, B in zip(result, results[0], strict=True):
            assert_bits(A, B)
    for A, B in zip(results[0], derived(problem)[question], strict=True):
        oracles.assert_close(A, B, 5 * TOLERANCE[dtype])


# What is covered ---------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(1025, 3, 1), (3, 257, 1)])
def test_wider_nets_and_other_backends_are_left_to_others(sizes):
    wide = checked(oracles.make_problem(sizes)).spec
    narrow = checked(oracles.make_problem()).spec
    assert choice.first_order(wide, "numba") is None
    assert choice.first_order(narrow, None) is None
    assert choice.first_order(narrow, "numba") is first_order

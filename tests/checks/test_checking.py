"""The gradient checker: it passes what is right, and names the place of what is wrong."""

import sys

import numpy as np
import pytest
from oracles import make_problem

from mlp_backprop import Layer, check_grads, compute_grads, init_params
from mlp_backprop.checks.checking import TOLERANCES
from mlp_backprop.types import flat

PROBLEM = make_problem(sizes=(3, 4, 2), n=5, weighted=True)
PARAMS, X, Y, OPTIONS = PROBLEM


def grads_of(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options).grads


def check(problem, **options):
    return check_grads(problem.params, problem.X, problem.y, **problem.options | options)


@pytest.fixture
def grads():
    """The right gradients of PROBLEM, for a test to spoil."""
    return grads_of(PROBLEM)


def test_returns_the_largest_relative_error_of_each_array(grads):
    grads[0].W[2, 1] += 1e-3 * np.abs(grads[0].W).max()
    errors = check(PROBLEM, grads=grads, tolerance=0.01)
    assert isinstance(errors, list)
    assert all(isinstance(layer, Layer) for layer in errors)
    assert all(type(error) is float for layer in errors for error in layer)
    assert abs(errors[0].W - 1e-3) < 1e-5
    assert max(errors[0].b, *errors[1]) < 1e-8


@pytest.mark.parametrize("against", ["differences", "torch", ["differences", "torch"]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("loss", ["squared_error", "binary_cross_entropy", "softmax_cross_entropy"])
def test_passes_what_is_right(loss, reduction, against):
    if "torch" in against:
        pytest.importorskip("torch")
    problem = make_problem(loss=loss, weighted=True)
    errors = check(problem, reduction=reduction, against=against)
    limit = 1e-12 if against == "torch" else 1e-7
    assert max(error for layer in errors for error in layer) < limit


def test_passes_on_every_backend(backend):
    errors = check(PROBLEM.map(backend.array))
    assert max(error for layer in errors for error in layer) < 1e-7
    given = [Layer(backend.array(W), backend.array(b)) for W, b in grads_of(PROBLEM)]
    check(PROBLEM.map(backend.array), grads=given)


# One entry wrong by a thousandth of the largest, in each array; the message has its place.
@pytest.mark.parametrize("against", ["differences", "torch"])
@pytest.mark.parametrize(
    ("layer", "name", "place"), [(1, "W", (3, 0)), (1, "b", (2,)), (2, "W", (1, 3)), (2, "b", (1,))]
)
def test_names_the_worst_entry(grads, layer, name, place, against):
    if against == "torch":
        pytest.importorskip("torch")
    array = getattr(grads[layer - 1], name)
    right = array[place]
    array[place] += 1e-3 * np.abs(array).max()
    message = rf"gradient of {name} of layer {layer} at {list(place)}: got ".replace("[", r"\[")
    with pytest.raises(AssertionError, match=message) as raised:
        check(PROBLEM, grads=grads, against=against)
    assert f"got {array[place]:.10g}, expected {right:.5f}" in str(raised.value)
    assert "relative error 0.001 above 1e-06" in str(raised.value)


def each(change):
    return lambda grads: [(change(W), change(b)) for W, b in grads]


WRONG = {
    "a thousandth too large": each(lambda g: g * 1.001),
    "the sign": each(lambda g: -g),
    "a sum for the mean": each(lambda g: g * OPTIONS["sample_weight"].sum()),
    "divided by n, not the weights": each(lambda g: g * OPTIONS["sample_weight"].sum() / 5),
    "weights left out": lambda grads: grads_of(PROBLEM, sample_weight=None),
    "half the squared error": each(lambda g: g / 2),
    "no bias": lambda grads: [(W, 0 * b) for W, b in grads],
    "another activation": lambda grads: grads_of(PROBLEM, activation="sigmoid"),
    "another loss": lambda grads: grads_of(PROBLEM, loss="huber"),
    "zero": each(lambda g: 0 * g),
    "nan": each(lambda g: np.nan * g),
    "inf": each(lambda g: np.inf * np.sign(g)),
    "one nan": lambda grads: [(W, np.where(b == b[0], np.nan, b)) for W, b in grads],
}


@pytest.mark.parametrize("name", WRONG)
def test_fails_what_is_wrong(grads, name):
    with pytest.raises(AssertionError, match=r"gradient of [Wb] of layer"):
        check(PROBLEM, grads=WRONG[name](grads))


def test_a_transposed_gradient_fails():
    square = make_problem(sizes=(3, 3, 3), n=5)
    with pytest.raises(AssertionError, match="gradient of W of layer"):
        check(square, grads=[(W.T, b) for W, b in grads_of(square)])


BIG = make_problem(sizes=(30, 50, 20, 4), n=3)  # 2 654 parameters


@pytest.mark.parametrize("which", range(6))
def test_a_sample_of_the_entries_has_some_of_every_array(which):
    grads = [A for layer in grads_of(BIG) for A in layer]
    grads[which] = 1.001 * grads[which] + 1e-3 * np.abs(grads[which]).max()
    layer, name = which // 2 + 1, "Wb"[which % 2]
    with pytest.raises(AssertionError, match=f"gradient of {name} of layer {layer}"):
        check(BIG, grads=list(zip(grads[::2], grads[1::2], strict=True)), max_entries=60)


def test_a_sample_is_drawn_only_above_the_limit():
    grads = grads_of(BIG)
    grads[0].W[49, 29] += 1e-3 * np.abs(grads[0].W).max()
    check(BIG, grads=grads, max_entries=100, rng=0)  # not among those drawn
    with pytest.raises(AssertionError, match=r"W of layer 1 at \[49, 29\]"):
        check(BIG, grads=grads, max_entries=2654)


def test_the_seed_draws_the_sample():
    same = check(BIG, max_entries=100, rng=1)
    assert check(BIG, max_entries=100, rng=1) == same
    assert check(BIG, max_entries=100, rng=2) != same


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
@pytest.mark.parametrize("distance", [1e-3, 1e-5, 3e-6, 3e-7])
def test_a_kink_within_the_first_step(activation, distance):
    """z is 1 and nearly 0, on either side: a step of 6e-6 crosses the kink."""
    params = [(np.array([[1.0], [-1.0]]), np.zeros(2)), (np.array([[1.0, 2.0]]), np.zeros(1))]
    X, y = np.array([[distance], [1.0]]), np.array([[0.5], [-1.0]])
    check_grads(params, X, y, activation=activation)
    wrong = [(1.001 * W, b) for W, b in compute_grads(params, X, y, activation=activation).grads]
    with pytest.raises(AssertionError):
        check_grads(params, X, y, activation=activation, grads=wrong)


@pytest.mark.parametrize(("dtype", "wrong"), [("float32", 1.001), ("float16", 1.1)])
def test_the_tolerance_follows_the_dtype(dtype, wrong):
    problem = PROBLEM.astype(dtype)
    errors = check(problem)
    assert 1e-8 < max(error for layer in errors for error in layer) < TOLERANCES[dtype]
    grads = each(lambda g: g * np.asarray(wrong, dtype))(grads_of(problem))
    with pytest.raises(AssertionError, match=f"above {TOLERANCES[dtype]:g}"):
        check(problem, grads=grads)
    check(problem, grads=grads, tolerance=0.5)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_bfloat16(name):
    pytest.importorskip(name)
    params = init_params([2, 3, 1], rng=0, dtype="bfloat16", backend=name)
    errors = check_grads(params, [[1, 2], [3, 4]], [[1], [0]])
    assert 1e-5 < max(error for layer in errors for error in layer) < TOLERANCES["bfloat16"]


@pytest.mark.parametrize("against", ["differences", "torch"])
def test_no_samples(against):
    if against == "torch":
        pytest.importorskip("torch")
    zero = [Layer(0.0, 0.0), Layer(0.0, 0.0)]
    empty = {"reduction": "sum", "sample_weight": None, "against": against}
    assert check(PROBLEM._replace(X=X[:0], y=Y[:0]), **empty) == zero


def test_the_arrays_are_not_changed():
    read_only = PROBLEM.map(np.copy)
    for A in (read_only.X, read_only.y, *(A for layer in read_only.params for A in layer)):
        A.flags.writeable = False
    grads = grads_of(read_only)
    before = [A.copy() for layer in grads for A in layer]
    check(read_only, grads=grads)
    np.testing.assert_equal([A for layer in grads for A in layer], before)
    np.testing.assert_equal(read_only.params, PARAMS)


@pytest.mark.parametrize("dtype", "bBhHiIlLqQ")
def test_labels_of_every_integer_type_against_torch(dtype):
    pytest.importorskip("torch")
    problem = make_problem(loss="softmax_cross_entropy")
    check(problem._replace(y=problem.y.astype(dtype)), against="torch")


def test_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match=r"pip install 'mlp-backprop\[torch\]'"):
        check(PROBLEM, against="torch")


SHAPES = r"grads must have the shapes of the parameters, \[\(4, 3\), \(4,\), \(2, 4\), \(2,\)\]"
REFUSED = {
    "against misspelt": (
        {"against": "torhc"},
        ValueError,
        "unknown reference 'torhc'; known: differences, torch; did you mean 'torch'",
    ),
    "no entries": ({"max_entries": 0}, ValueError, "max_entries must be an integer, 1 .* got 0"),
    "fewer entries": ({"max_entries": -5}, ValueError, "1 or more; got -5"),
    "entries no integer": ({"max_entries": 1e3}, ValueError, "1 or more; got 1000.0"),
    "entries true": ({"max_entries": True}, ValueError, "1 or more; got True"),
    "against nothing": ({"against": []}, ValueError, "no reference; known: differences, torch"),
    "against None in a list": ({"against": [None]}, TypeError, "reference must be a name"),
    "grads too few": ({"grads": PARAMS[:1]}, ValueError, SHAPES + r", got \[\(4, 3\), \(4,\)\]"),
    "grads transposed": ({"grads": [(W.T, b) for W, b in PARAMS]}, ValueError, SHAPES),
    "grads a generator": ({"grads": (layer for layer in PARAMS)}, TypeError, "got generator"),
    "grads with the loss": (
        {"grads": compute_grads(PARAMS, X, Y, **OPTIONS)},
        TypeError,
        r"layer 1 in grads must be a pair \(W, b\)",
    ),
    "grads complex": ({"grads": [(W + 0j, b) for W, b in PARAMS]}, TypeError, "real numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    options, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        check(PROBLEM, **options)


def test_a_row_on_the_kink_is_measured_from_one_side():
    """With zero biases, a row of zeros puts every pre-activation of layer 1 on the kink of relu."""
    params = init_params([3, 4, 2], rng=1, scheme="he")
    X = np.zeros((1, 3))
    errors = check_grads(params, X, np.ones((1, 2)), activation="relu")
    assert max(flat(errors)) < 1e-6

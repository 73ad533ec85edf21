"""The program's three comparisons: that they pass, and that a wrong derivative fails them."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from oracles import assert_close

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.programs import verification
from mlp_backprop.programs.verification import verify

ARRAYS = ["dE/dW1", "dE/db1", "dE/dW2", "dE/db2", "dE/dW3", "dE/db3"]
SIZES = {"assignment": [2, 10, 5, 1], "published": [2, 10, 5, 1], "digits": [64, 32, 16, 10]}


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)


@pytest.fixture
def no_sklearn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)


@pytest.fixture(params=["df", "f"])
def wrong_sigmoid(request, monkeypatch, derivation_only):
    """f' wrong by 0.1 %, or f wrong and f' right."""
    row = ACTIVATIONS["sigmoid"]
    right = getattr(row, request.param)
    wrong = row._replace(**{request.param: lambda *args: 1.001 * right(*args)})
    monkeypatch.setitem(ACTIVATIONS, "sigmoid", wrong)


def test_every_comparison_with_torch_passes():
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    result = verify()
    assert result.passed
    assert not result.missing
    assert [(c.example, c.reference, c.dtype, c.tolerance) for c in result.comparisons] == [
        ("assignment", "PyTorch autograd", "float32", 1e-6),
        ("assignment", "PyTorch autograd", "float64", 1e-12),
        ("published", "tables by PyTorch", "float64", 1e-7),
        ("published", "tables by hand", "float64", 1.5e-7),
        ("digits", "PyTorch autograd", "float32", 1e-6),
        ("digits", "PyTorch autograd", "float64", 1e-12),
    ]


def test_differences_are_those_of_the_tables():
    pytest.importorskip("torch", reason="torch is not installed")
    for comparison in verify().comparisons:
        assert [table.name for table in comparison.tables] == ARRAYS
        sizes = SIZES[comparison.example]
        shapes = [shape for d, e in pairwise(sizes) for shape in ((e, d), (e,))]
        assert [table.computed.shape for table in comparison.tables] == shapes
        for table in comparison.tables:
            assert table.computed.dtype == comparison.dtype
            assert table.reference.shape == table.computed.shape
            assert table.difference == np.max(np.abs(table.reference - table.computed))
        assert comparison.difference == max(table.difference for table in comparison.tables)


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_passes_with_any_seed(seed):
    pytest.importorskip("torch", reason="torch is not installed")
    for dtype in ("float32", "float64"):
        assert verification.by_torch(verification.assignment(seed, dtype)).passed


def test_the_assignment_is_the_one_described():
    result = verify(seed=5)
    single, double = result.assignment
    for example, steps in (single, double):
        assert [W.shape for W, _ in example.params] == [(10, 2), (5, 10), (1, 5)]
        assert example.X.shape == (1, 2)
        assert np.all((example.X >= 0) & (example.X <= 1))
        assert example.y == (example.X[0, 0] ** 2 + example.X[0, 1] ** 2) / 2
        assert steps.loss == (steps.H[-1][0, 0] - example.y[0, 0]) ** 2
        arrays = [A for layer in example.params for A in layer] + [example.X, example.y]
        assert {array.dtype.name for array in arrays + steps.Z + steps.H} == {example.dtype}
    assert (single.example.dtype, double.example.dtype) == ("float32", "float64")
    assert_close(single.example.X, double.example.X, tolerance=1e-7)


def test_seeds_differ_and_repeat():
    first, again, other = (verification.assignment(seed, "float64") for seed in (1, 1, 2))
    assert np.array_equal(first.X, again.X)
    assert not np.array_equal(first.X, other.X)
    assert not np.array_equal(first.params[0].W, other.params[0].W)


def test_the_digits_are_scaled_to_one():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    example = verification.digits(0, "float32")
    assert example.X.shape == (1797, 64)
    assert (example.X.min(), example.X.max()) == (0, 1)
    assert sorted(set(example.y.tolist())) == list(range(10))


def test_reconstruction_from_exact_gradients():
    """From unrounded gradients the reconstruction is exact but for rounding."""
    known = verification.assignment(4, "float64")
    grads = verification.compute_grads(known.params, known.X, known.y).grads
    net = verification.reconstruct(grads)
    assert_close(net.X, known.X, tolerance=1e-12)
    assert_close(net.y, known.y, tolerance=1e-12)
    again = verification.compute_grads(net.params, net.X, net.y).grads
    for got, expected in zip(again, grads, strict=True):
        assert_close(got.W, expected.W, tolerance=1e-12)
        assert_close(got.b, expected.b, tolerance=1e-12)


def test_published_tables_have_every_printed_number():
    _, printed = verification.published()
    for grads in printed.values():
        assert sum(array.size for layer in grads for array in layer) == 91
    # Two numbers by hand differ from PyTorch's, by one in the last digit.
    pairs = zip(*([A for layer in grads for A in layer] for grads in printed.values()), strict=True)
    differences = np.concatenate([np.ravel(A - B) for A, B in pairs])
    assert_close(np.abs(differences[differences != 0]), np.full(2, 1e-7), tolerance=1e-6)


def test_without_torch_differences_take_its_place(no_torch, no_sklearn):
    result = verify()
    assert result.passed
    assert "pip install 'mlp-backprop[torch]'" in result.missing["torch"]
    assert [(c.example, c.reference, c.measure) for c in result.comparisons] == [
        ("assignment", "central differences", "relative"),
        ("assignment", "central differences", "relative"),
        ("published", "tables by PyTorch", "absolute"),
        ("published", "tables by hand", "absolute"),
    ]
    assert all(table.reference is None for table in result.comparisons[0].tables)


def test_without_scikit_learn_the_digits_are_left_out(no_sklearn):
    result = verify()
    assert result.passed
    assert "pip install 'mlp-backprop[cli]'" in result.missing["scikit-learn"]
    assert {c.example for c in result.comparisons} == {"assignment", "published"}


def test_differences_of_the_digits():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    digits = verification.digits(0, "float64")
    some = digits._replace(X=digits.X[::20], y=digits.y[::20])
    comparison = verification.by_differences(some)
    assert comparison.passed
    assert 0 < comparison.difference < 1e-7


def test_a_wrong_derivative_fails_against_torch(wrong_sigmoid):
    pytest.importorskip("torch", reason="torch is not installed")
    result = verify()
    assert not result.passed
    assert not any(c.passed for c in result.comparisons if c.reference == "PyTorch autograd")


def test_a_wrong_derivative_fails_without_torch(wrong_sigmoid, no_torch, no_sklearn):
    result = verify()
    assert not result.passed
    assert not any(c.passed for c in result.comparisons if c.reference == "central differences")


@pytest.fixture
def nan_sigmoid(monkeypatch, derivation_only):
    row = ACTIVATIONS["sigmoid"]
    wrong = row._replace(df=lambda xp, Z, H: xp.full_like(H, float("nan")))
    monkeypatch.setitem(ACTIVATIONS, "sigmoid", wrong)


def test_nan_fails(nan_sigmoid, no_sklearn):
    assert not any(c.passed for c in verify().comparisons)


def test_nan_fails_without_torch(nan_sigmoid, no_torch, no_sklearn):
    assert not any(c.passed for c in verify().comparisons)

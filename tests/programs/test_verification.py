"""The program's three comparisons: that they pass, and that a wrong derivative fails them."""

import sys
from itertools import pairwise

import numpy as np
import pytest
from oracles import assert_close

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.edge import backends
from mlp_backprop.edge.rules import PRECISIONS
from mlp_backprop.programs import examples, screens, verification
from mlp_backprop.programs.verification import BACKEND_TOLERANCES, Way, verify
from mlp_backprop.types import Layer, flat

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
        assert verification.by_torch(examples.assignment(seed, dtype), Way(None, dtype)).passed


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
    first, again, other = (examples.assignment(seed, "float64") for seed in (1, 1, 2))
    assert np.array_equal(first.X, again.X)
    assert not np.array_equal(first.X, other.X)
    assert not np.array_equal(first.params[0].W, other.params[0].W)


def test_the_digits_are_scaled_to_one():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    example = examples.digits(0, "float32")
    assert example.X.shape == (1797, 64)
    assert (example.X.min(), example.X.max()) == (0, 1)
    assert sorted(set(example.y.tolist())) == list(range(10))


def test_reconstruction_from_exact_gradients():
    """From unrounded gradients the reconstruction is exact but for rounding."""
    known = examples.assignment(4, "float64")
    grads = verification.compute_grads(known.params, known.X, known.y).grads
    net = examples.reconstruct(grads)
    assert_close(net.X, known.X, tolerance=1e-12)
    assert_close(net.y, known.y, tolerance=1e-12)
    again = verification.compute_grads(net.params, net.X, net.y).grads
    for got, expected in zip(again, grads, strict=True):
        assert_close(got.W, expected.W, tolerance=1e-12)
        assert_close(got.b, expected.b, tolerance=1e-12)


def test_published_tables_have_every_printed_number():
    _, printed = examples.published()
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
    digits = examples.digits(0, "float64")
    some = digits._replace(X=digits.X[::20], y=digits.y[::20])
    comparison = verification.by_differences(some, Way(None, "float64"))
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


@pytest.fixture(params=ARRAYS)
def nan_in_one_array(request, monkeypatch):
    """A nan in the last entry of one array; which array it is."""
    right = verification.compute_grads

    def compute_grads(*arguments, **options):
        loss, grads = right(*arguments, **options)
        grads = [Layer(W.copy(), b.copy()) for W, b in grads]
        flat(grads)[ARRAYS.index(request.param)].flat[-1] = np.nan
        return loss, grads

    monkeypatch.setattr(verification, "compute_grads", compute_grads)
    return request.param


def assert_nan_fails(name, result, capsys):
    assert not result.passed
    assert not any(c.passed for c in result.comparisons)
    assert all(np.isnan(c.difference) for c in result.comparisons)
    pytest.importorskip("rich", reason="rich is not installed")
    screens.show_verification(result)
    verdict = " ".join(capsys.readouterr().out.rpartition("Result")[2].split())
    for c in result.comparisons:
        above = f"{c.example}, {c.reference}, {c.precision}: above the tolerance of"
        assert above in verdict
    assert f"{name} nan" in verdict
    # The largest of all examples, of which the later ones have a nan too.
    assert verdict.count("nan") >= 2 * len(result.comparisons) - 2
    assert "FAILED: 0 of" in verdict
    largest = verdict.partition("Largest differences: ")[2].rstrip(".").split(", ")
    assert largest
    assert all(text.endswith(" nan") for text in largest)


def test_nan_in_any_array_fails(nan_in_one_array, no_sklearn, capsys):
    assert_nan_fails(nan_in_one_array, verify(), capsys)


def test_nan_in_any_array_fails_without_torch(nan_in_one_array, no_torch, no_sklearn, capsys):
    assert_nan_fails(nan_in_one_array, verify(), capsys)


def test_nan_in_any_array_fails_beside_float64(nan_in_one_array, no_torch, no_sklearn, capsys):
    assert_nan_fails(nan_in_one_array, verify(backend="numpy"), capsys)


def test_nan_in_a_reference_fails():
    net, printed = examples.published()
    printed["by_hand"][1].W[-1, -1] = np.nan
    way = Way(None, "float64")
    for measure in ("absolute", "relative"):
        comparison = verification._by_values(net, way, "", measure, 1e9, printed["by_hand"])
        assert not comparison.passed


def test_the_verdict_has_a_nan_of_any_comparison(no_torch, no_sklearn, capsys):
    """Though others with the same reference come before it, and after."""
    pytest.importorskip("rich", reason="rich is not installed")
    result = verify()
    first, *others = result.comparisons
    wrong = first._replace(difference=np.nan, passed=False)
    for comparisons in ([first, wrong, first], [wrong, first, first], [first, first, wrong]):
        shown = result._replace(comparisons=[*comparisons, *others], passed=False)
        screens.show_verification(shown)
        assert f"{first.reference} ({first.precision}) nan" in capsys.readouterr().out


# --- a backend -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["numpy", "numba", "torch", "jax", pytest.param("cupy", marks=pytest.mark.gpu)]
)
def test_a_backend_is_right(name):
    """Beside torch where it is installed, and beside NumPy in float64, in all its precisions."""
    try:
        backends.namespace(name)
    except ImportError as reason:
        pytest.skip(str(reason))
    result = verify(seed=1, backend=name)
    assert result.passed
    assert (result.backend.name, result.backend.usable) == (name, True)
    precisions = [*(PRECISIONS if name == "cupy" else ["float32"]), "float64"]
    for reference in ("NumPy float64", "PyTorch autograd"):
        for example in {c.example for c in result.comparisons}:
            shown = [
                (c.precision, c.tolerance, c.measure)
                for c in result.comparisons
                if (c.example, c.reference) == (example, reference)
            ]
            expected = [(p, BACKEND_TOLERANCES[p], "relative") for p in precisions]
            beside_tables = (example, reference) == ("published", "PyTorch autograd")
            absent = beside_tables or (
                reference == "PyTorch autograd" and "torch" in result.missing
            )
            assert shown == ([] if absent else expected)
    for c in result.comparisons:
        for table in c.tables:
            assert isinstance(table.computed, np.ndarray)
            assert table.computed.dtype == c.dtype


def test_a_backend_that_is_not_there_is_refused(no_torch):
    with pytest.raises(ImportError, match="backend 'torch' needs torch"):
        verify(backend="torch")


@pytest.fixture
def cupy(monkeypatch):
    """A card that is off by a share of what each precision may be off by, in one entry."""
    card = {"share": 0.8, "asked": []}
    namespace, right = backends.namespace, verification.compute_grads

    def compute_grads(params, X, y, *, loss, backend, precision="float32"):
        if backend != "cupy":
            return right(params, X, y, loss=loss, backend=backend)
        card["asked"].append((X.dtype.name, precision))
        double = [(W.astype(float), b.astype(float)) for W, b in params]
        target = y if y.ndim == 1 else y.astype(float)
        _, grads = right(double, X.astype(float), target, loss=loss)
        tolerance = BACKEND_TOLERANCES["float64" if X.dtype == np.float64 else precision]
        grads[1].W[-1, -1] += card["share"] * tolerance * np.max(np.abs(grads[1].W))
        return None, [Layer(W.astype(X.dtype), b.astype(X.dtype)) for W, b in grads]

    status = backends.BackendStatus("cupy", True, "14.0", ["NVIDIA H100", "NVIDIA T4"], None)
    monkeypatch.setattr(backends, "namespace", lambda name: name == "cupy" or namespace(name))
    monkeypatch.setattr(backends, "status", lambda row: status)
    monkeypatch.setattr(verification, "compute_grads", compute_grads)
    return card


def test_cupy_is_tried_in_every_precision(cupy, capsys, monkeypatch):
    pytest.importorskip("rich", reason="rich is not installed")
    result = verify(backend="cupy")
    assert {*cupy["asked"]} == {*(("float32", p) for p in PRECISIONS), ("float64", "float32")}
    assert result.passed
    monkeypatch.setenv("COLUMNS", "80")
    screens.show_verification(result)
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    assert "Gradients by backend cupy 14.0; its devices here: NVIDIA H100, NVIDIA T4." in shown
    for text in ("by cupy", *PRECISIONS, "5.0e-03", "5.0e-02"):
        assert text in shown


def test_cupy_fails_beyond_the_tolerance_of_any_precision(cupy):
    cupy["share"] = 1.2
    result = verify(backend="cupy")
    assert not result.passed  # though the printed tables are still met
    failed = [c for c in result.comparisons if c.measure == "relative"]
    assert {c.precision for c in failed} == {*PRECISIONS, "float64"}
    assert not any(c.passed for c in failed)

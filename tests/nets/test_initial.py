"""Initial parameters: their distributions, their seeds, and where they live."""

import numpy as np
import pytest
from oracles import assert_close

from mlp_backprop import compute_grads, init_params
from mlp_backprop.nets.initial import SCHEMES

WIDE = [200, 300, 100]  # enough entries for their spread to be known to a percent


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shapes(scheme):
    params = init_params([2, 10, 5, 1], rng=0, scheme=scheme)
    assert [(W.shape, b.shape) for W, b in params] == [
        ((10, 2), (10,)),
        ((5, 10), (5,)),
        ((1, 5), (1,)),
    ]


def assert_uniform(A, limit):
    """Within the limit, near it on both sides, with a uniform variable's mean and variance."""
    assert np.abs(A).max() <= limit
    assert min(A.max(), -A.min()) > 0.99 * limit
    assert abs(A.mean()) < 4 * limit / np.sqrt(3 * A.size)
    assert A.var() == pytest.approx(limit**2 / 3, rel=0.02)


def test_linear_is_uniform_in_weights_and_biases():
    for W, b in init_params(WIDE, rng=0):
        limit = 1 / np.sqrt(W.shape[1])
        assert_uniform(W, limit)
        assert np.abs(b).max() <= limit
        assert np.abs(b).max() > 0.9 * limit


def test_linear_has_the_bounds_of_torch():
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    ours = init_params(WIDE, rng=0)
    for layer, (n_in, n_out) in zip(ours, [(200, 300), (300, 100)], strict=True):
        theirs = torch.nn.Linear(n_in, n_out)
        for A, B in zip(layer, (theirs.weight, theirs.bias), strict=True):
            assert A.shape == B.shape
            assert np.abs(A).max() == pytest.approx(B.abs().max().item(), rel=0.05)


def test_glorot_is_uniform_by_both_widths():
    for W, b in init_params(WIDE, rng=0, scheme="glorot"):
        assert_uniform(W, np.sqrt(6 / sum(W.shape)))
        assert not b.any()


def test_he_is_normal_by_the_inputs():
    for W, b in init_params(WIDE, rng=0, scheme="he"):
        std = np.sqrt(2 / W.shape[1])
        assert W.std() == pytest.approx(std, rel=0.02)
        assert abs(W.mean()) < 4 * std / np.sqrt(W.size)
        assert np.mean(np.abs(W) < std) == pytest.approx(0.683, abs=0.02)
        assert not b.any()


def test_an_int_repeats_and_a_generator_advances():
    def first(rng):
        return init_params([2, 3, 1], rng)[0].W

    np.testing.assert_array_equal(first(7), first(7))
    np.testing.assert_array_equal(first(7), first(np.random.default_rng(7)))
    assert not np.array_equal(first(7), first(8))
    assert not np.array_equal(first(None), first(None))
    rng = np.random.default_rng(7)
    assert not np.array_equal(first(rng), first(rng))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", np.float32, np.dtype("float16")])
def test_the_same_seed_is_the_same_net_in_each_dtype(scheme, dtype):
    wide = init_params([3, 5, 2], rng=1, scheme=scheme)
    narrow = init_params([3, 5, 2], rng=1, scheme=scheme, dtype=dtype)
    for A, B in zip(wide, narrow, strict=True):
        for a, b in zip(A, B, strict=True):
            assert b.dtype == np.dtype(dtype)
            np.testing.assert_array_equal(a.astype(dtype), b)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_backend_has_the_net_of_numpy(backend, dtype):
    if backend.name == "array_api_strict":
        pytest.skip("used by its arrays, not by name")
    ours = init_params([3, 5, 2], rng=1, dtype=dtype, backend=backend.name)
    for (W, b), (V, c) in zip(ours, init_params([3, 5, 2], rng=1, dtype=dtype), strict=True):
        assert type(W) is type(backend.array(V))
        np.testing.assert_array_equal(backend.numpy(W), V, strict=True)
        np.testing.assert_array_equal(backend.numpy(b), c, strict=True)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_bfloat16_where_the_library_has_it(name):
    pytest.importorskip(name)
    W, b = init_params([3, 5], rng=1, dtype="bfloat16", backend=name)[0]
    assert "bfloat16" in str(W.dtype)
    assert "bfloat16" in str(b.dtype)
    wide = init_params([3, 5], rng=1)[0].W
    assert_close([[float(w) for w in row] for row in W], wide, tolerance=2**-8)


def test_the_results_are_parameters():
    params = init_params(np.array([2, 3, 1]), rng=0, scheme="he")
    assert all(A.flags.writeable for layer in params for A in layer)
    assert compute_grads(params, np.ones((4, 2)), np.ones((4, 1)), activation="relu").loss >= 0


REFUSED = {
    "sizes None": ({"sizes": None}, TypeError, "sizes must be a sequence of widths, got NoneType"),
    "sizes a number": ({"sizes": 3}, TypeError, "sequence of widths, got int"),
    "sizes a word": ({"sizes": "23"}, TypeError, "sequence of widths, got str"),
    "sizes too few": ({"sizes": [2]}, ValueError, r"inputs and outputs at least, got \[2\]"),
    "sizes of zero": ({"sizes": [2, 0]}, ValueError, r"sizes\[1\] must be 1 or more, got 0"),
    "sizes below zero": ({"sizes": [-2, 1]}, ValueError, r"sizes\[0\] must be 1 or more, got -2"),
    "sizes of floats": ({"sizes": [2, 3.0]}, TypeError, r"sizes\[1\] must be an integer, got 3\.0"),
    "sizes of booleans": ({"sizes": [2, True]}, TypeError, "must be an integer, got True"),
    "sizes of words": ({"sizes": ["2", 3]}, TypeError, r"sizes\[0\] must be an integer, got '2'"),
    "sizes nested": ({"sizes": np.ones((2, 2))}, TypeError, r"sizes\[0\] must be an integer"),
    "scheme misspelt": (
        {"scheme": "glorrot"},
        ValueError,
        "unknown scheme 'glorrot'; known: linear, glorot, he; did you mean 'glorot'",
    ),
    "scheme None": ({"scheme": None}, TypeError, r"scheme must be a name \(str\), got NoneType"),
    "dtype misspelt": ({"dtype": "float23"}, ValueError, "unknown dtype 'float23'; known: float64"),
    "dtype not floating": ({"dtype": "int64"}, ValueError, "unknown dtype 'int64'"),
    "dtype complex": ({"dtype": np.complex64}, ValueError, "unknown dtype 'complex64'"),
    "dtype not NumPy's": ({"dtype": "bfloat16"}, TypeError, "numpy has no bfloat16"),
    "backend misspelt": ({"backend": "nunpy"}, ValueError, "did you mean 'numpy'"),
    "backend None": ({"backend": None}, TypeError, r"backend must be a name \(str\)"),
    "rng a word": ({"rng": "seed"}, TypeError, "seed"),
    "rng below zero": ({"rng": -1}, ValueError, "non-negative"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    change, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        init_params(**{"sizes": [2, 3, 1]} | change)

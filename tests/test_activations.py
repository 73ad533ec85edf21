"""The table of activations: every f, f', f'' and f''' against 600 digits, from 0 to infinity."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mlp_backprop import compute_grads
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.edge import backends

FLOATS = (np.float64, np.float32, np.float16)
ORDINARY = np.linspace(-12, 12, 50)
EXTREME = np.array([1e-9, 36, 88, 89, 709, 710, 1e9])
EXTREME = np.concatenate([-EXTREME[::-1], EXTREME])

# f and f' at -inf and inf; f'' and f''' are 0 at both.
LIMITS = {
    "identity": ([-np.inf, np.inf], [1, 1]),
    "sigmoid": ([0, 1], [0, 0]),
    "tanh": ([-1, 1], [0, 0]),
    "relu": ([0, np.inf], [0, 1]),
    "leaky_relu": ([-np.inf, np.inf], [0.01, 1]),
    "elu": ([-1, np.inf], [0, 1]),
    "softplus": ([0, np.inf], [0, 1]),
    "silu": ([0, np.inf], [0, 1]),
    "gelu_tanh": ([0, np.inf], [0, 1]),
}


@pytest.fixture(params=ACTIVATIONS)
def name(request):
    return request.param


def values(name, Z, xp=np):
    """f, f', f'' and any f''' of a row; what NumPy complains of, underflow apart, is an error."""
    row = ACTIVATIONS[name]
    with np.errstate(all="raise", under="ignore"):
        H = row.f(xp, Z)
        derivatives = [f(xp, Z, H) for f in (row.df, row.d2f, row.d3f) if f is not None]
        return H, *derivatives


# Where s is 1 - eps, 1 - s has one digit left; gelu_tanh'' multiplies what is lost by about 500.
DERIVATIVE_ERROR = {np.float64: 2e-13, np.float32: 5e-5, np.float16: 2e-2}


def assert_right(name, Z):
    """f to a relative error, its tails included; what subtracts, f' and on, to an absolute one."""
    expected = oracles.exact_derivatives(lambda z: oracles.ACTIVATIONS[name](oracles.MP, z), Z)
    error = DERIVATIVE_ERROR[Z.dtype.type]
    # The exponent of gelu_tanh is near 100 at the ends, and its rounding counts that many times.
    ulps = 200 if name == "gelu_tanh" else 8
    relative, smallest = ulps * np.finfo(Z.dtype).eps, np.finfo(Z.dtype).tiny
    got_values = values(name, Z)
    errors = smallest, error, error, error
    for got, exact, absolute in zip(got_values, expected, errors, strict=False):
        assert got.dtype == Z.dtype
        assert_allclose(got, exact, relative, absolute)


def test_the_oracles_cover_the_table():
    assert ACTIVATIONS.keys() == oracles.ACTIVATIONS.keys() == LIMITS.keys()
    assert all(row.name == name for name, row in ACTIVATIONS.items())


@pytest.mark.parametrize("dtype", FLOATS)
def test_ordinary_points(name, dtype):
    assert_right(name, ORDINARY.astype(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
def test_extreme_points(name, dtype):
    with np.errstate(over="ignore"):
        Z = EXTREME.astype(dtype)
    # float16 has neither 1e-9 nor 1e9.
    assert_right(name, Z[np.isfinite(Z) & (Z != 0)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_limits_at_infinity(name, dtype):
    limits = *LIMITS[name], [0, 0], [0, 0]
    got = values(name, np.array([-np.inf, np.inf], dtype))
    for A, limit in zip(got, limits, strict=False):
        assert_array_equal(A, np.array(limit, dtype))


def test_zero_takes_torchs_derivative(name):
    torch = pytest.importorskip("torch")
    from mlp_backprop.checks import torch_reference

    z = torch.tensor([0.0, -0.0], dtype=torch.float64, requires_grad=True)
    h = torch_reference.ACTIVATIONS[name](z)
    h.sum().backward()
    H, dH, *_ = values(name, np.array([0.0, -0.0]))
    assert_allclose(H, h.detach().numpy(), rtol=1e-15)
    assert_allclose(dH, z.grad.numpy(), rtol=1e-15)


@pytest.mark.parametrize("dtype", FLOATS)
def test_second_derivative_at_zero(name, dtype):
    # At a kink the value from the left, elu'' = exp(z) included; elsewhere f'' itself.
    at_zero = {"elu": 1, "softplus": 0.25, "silu": 0.5, "gelu_tanh": (2 / np.pi) ** 0.5}
    expected = np.array([at_zero.get(name, 0)], dtype)
    got = values(name, np.zeros(1, dtype))[2]
    assert_allclose(got, expected, rtol=4 * np.finfo(dtype).eps)


def test_a_kink_has_no_third_derivative(name):
    assert (ACTIVATIONS[name].d3f is None) == (name in ("relu", "leaky_relu", "elu"))


@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_in_nan_out(name, dtype):
    H, *derivatives = values(name, np.array([np.nan, 1.0], dtype))
    assert np.isnan(H[0])
    assert np.isfinite([A[1] for A in (H, *derivatives)]).all()


def test_the_argument_is_left_alone(name):
    Z = np.concatenate([ORDINARY, EXTREME])
    Z.flags.writeable = False
    values(name, Z)


def test_worker_threads_are_silent(name):
    def rows_and_gradient():
        values(name, EXTREME)
        X = np.concatenate([EXTREME, [-np.inf, np.inf, np.nan]])[:, None]
        return compute_grads(
            [(np.ones((1, 1)), np.zeros(1))] * 2, X, X, activation=name, reduction="sum"
        )

    # NumPy keeps its error state per thread, and a warning is an error in these tests.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(rows_and_gradient).result()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_library_agrees_with_numpy(name, dtype, backend):
    if backend.name == "array_api_strict" and dtype == np.float16:
        pytest.skip("the standard has no float16")
    Z = np.concatenate([ORDINARY, EXTREME[1:-1], [0, -0.0, -np.inf, np.inf, np.nan]]).astype(dtype)
    xp = backends.namespace_of(backend.array(Z))
    float_ = np.finfo(dtype)
    for got, expected in zip(values(name, backend.array(Z), xp), values(name, Z), strict=True):
        assert got.dtype == backend.array(Z).dtype
        assert_allclose(backend.numpy(got), expected, 64 * float_.eps, 64 * float_.eps)

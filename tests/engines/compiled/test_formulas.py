"""The formulas that Numba compiles: each row held to its table, each function to a few ulp."""

from functools import cache

import mpmath
import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop.activations import ACTIVATIONS  # noqa: E402
from mlp_backprop.engines.compiled import formulas, rows, third_derivatives  # noqa: E402
from mlp_backprop.losses import LOSSES  # noqa: E402

ULPS = {np.float32: 4, np.float64: 8}
LARGE = np.array([1e-9, 1, 36, 88, 89, 709, 710, 1e9, np.inf])
LINE = np.concatenate([-LARGE[::-1], np.linspace(-12, 12, 49), LARGE, [0.0, -0.0, np.nan]])


@pytest.fixture(params=ULPS)
def dtype(request):
    return request.param


@cache
def mapped(f, n_results=1):
    """f over arrays, compiled as in the rows, and once for all tests."""

    @numba.njit(error_model="numpy")
    def one(A, out):
        for t in range(A.size):
            out[0, t] = f(A[t])

    @numba.njit(error_model="numpy")
    def two_of_one(A, out):
        for t in range(A.size):
            out[0, t], out[1, t] = f(A[t])

    @numba.njit(error_model="numpy")
    def three_of_one(A, out):
        for t in range(A.size):
            out[0, t], out[1, t], out[2, t] = f(A[t])

    @numba.njit(error_model="numpy")
    def four_of_one(A, out):
        for t in range(A.size):
            out[0, t], out[1, t], out[2, t], out[3, t] = f(A[t])

    @numba.njit(error_model="numpy")
    def two_of_two(A, B, out):
        for t in range(A.size):
            out[0, t], out[1, t] = f(A[t], B[t])

    def call(*arrays):
        out = np.empty((n_results, arrays[0].size), arrays[0].dtype)
        of_one = one, two_of_one, three_of_one, four_of_one
        loop = two_of_two if len(arrays) == 2 else of_one[n_results - 1]
        loop(*arrays, out)
        return out if n_results > 1 else out[0]

    return call


# The tables --------------------------------------------------------------------------------------


def test_every_row_of_the_tables_has_a_formula():
    assert formulas.ACTIVATIONS.keys() == ACTIVATIONS.keys()
    assert formulas.SECOND.keys() == ACTIVATIONS.keys()
    smooth = {name for name, row in ACTIVATIONS.items() if row.d3f is not None}
    assert third_derivatives.THIRD.keys() == smooth
    assert set(rows.ACTIVATIONS) == ACTIVATIONS.keys()
    assert set(rows.LOSSES) == LOSSES.keys()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_slope_are_those_of_the_table(name, dtype):
    row, Z = ACTIVATIONS[name], LINE.astype(dtype)
    H, slope = mapped(formulas.ACTIVATIONS[name], 2)(Z)
    with np.errstate(all="ignore"):
        expected = row.f(np, Z)
        expected_slope = row.df(np, Z, expected)
    float_ = np.finfo(dtype)
    # gelu_tanh's exponent is near 100 at the ends, and its rounding counts that many times.
    rtol = (300 if name == "gelu_tanh" else 16) * float_.eps
    np.testing.assert_allclose(H, expected, rtol, 2 * float_.tiny)
    np.testing.assert_allclose(slope, expected_slope, rtol, 8 * float_.eps)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivative_is_that_of_the_table(name, dtype):
    row, Z = ACTIVATIONS[name], LINE.astype(dtype)
    eps = np.finfo(dtype).eps
    *first, bend = mapped(formulas.SECOND[name], 3)(Z)
    expected = mapped(formulas.ACTIVATIONS[name], 2)(Z)
    np.testing.assert_allclose(first, expected, 4 * eps, 4 * eps)
    with np.errstate(all="ignore"):
        expected = row.d2f(np, Z, row.f(np, Z))
    # gelu_tanh's is made of products with the slope of its exponent, up to 100.
    np.testing.assert_allclose(bend, expected, 300 * eps, 64 * eps)


@pytest.mark.parametrize("name", third_derivatives.THIRD)
def test_third_derivative_is_that_of_the_table(name, dtype):
    row, Z = ACTIVATIONS[name], LINE.astype(dtype)
    eps = np.finfo(dtype).eps
    *first, third = mapped(third_derivatives.THIRD[name], 4)(Z)
    expected = mapped(formulas.SECOND[name], 3)(Z)
    np.testing.assert_allclose(first, expected, 4 * eps, 4 * eps)
    with np.errstate(all="ignore"):
        expected = row.d3f(np, Z, row.f(np, Z))
    np.testing.assert_allclose(third, expected, 300 * eps, 64 * eps)


@pytest.mark.parametrize("name", formulas.LOSSES)
def test_loss_and_its_gradient_are_those_of_the_table(name, dtype):
    points = LINE[np.isnan(LINE) | (np.abs(LINE) < 1e10)].astype(dtype)
    H, Y = (A.ravel() for A in np.meshgrid(points, np.array([0, 0.25, 1, 3], dtype)))
    value, grad = mapped(formulas.LOSSES[name], 2)(H, Y)
    with np.errstate(all="ignore"):
        expected, expected_grad = LOSSES[name].value_and_grad(np, H[:, None], Y[:, None])
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(value, expected, 16 * eps, 16 * eps)
    np.testing.assert_allclose(grad, expected_grad[:, 0], 16 * eps, 16 * eps)


# The functions under them ------------------------------------------------------------------------


def points(dtype, low, high, *edges):
    """Dense from low to high, dense about 0, every magnitude, and the neighbours of edges."""
    rng = np.random.default_rng(0)
    info = np.finfo(dtype)
    magnitudes = np.exp2(rng.uniform(info.minexp - info.nmant, np.log2(high - low), 400))
    A = np.concatenate(
        [rng.uniform(low, high, 1500), rng.uniform(-1, 1, 500), magnitudes, -magnitudes, edges]
    ).astype(dtype)
    A = np.concatenate([A, np.nextafter(A, dtype(-np.inf)), np.nextafter(A, dtype(np.inf))])
    return A[(low <= A) & (high >= A)]


def assert_within_ulps(got, exact, x):
    """`exact` maps a number to an mpmath number, which must be met to ULPS units."""
    dtype = x.dtype.type
    with mpmath.workdps(60):
        for a, value in zip(x.tolist(), got, strict=True):
            right = exact(mpmath.mpf(a))
            # float64's exponents hold the value; the last place is that of the rounded answer.
            nearest = dtype(float(right)) if abs(right) < np.finfo(dtype).max else dtype(np.inf)
            if np.isinf(nearest):
                assert np.isinf(value) or abs(value) >= np.finfo(dtype).max * 0.9999, a
                continue
            error = abs(mpmath.mpf(float(value)) - right) / float(np.spacing(abs(nearest)))
            assert error <= ULPS[dtype], f"at {a!r}: {float(value)!r}, {float(error):.2f} ulp"


def test_exp(dtype):
    ends = {np.float32: (-105, 89), np.float64: (-747, 710)}[dtype]
    halves = np.arange(-200, 180) * np.log(2) / 2
    x = points(dtype, *ends, *halves)
    assert_within_ulps(mapped(formulas.exp)(x), mpmath.exp, x)


def test_exp_at_the_ends_of_the_range(dtype):
    info = np.finfo(dtype)
    largest, smallest = np.log(float(info.max)), np.log(float(info.smallest_subnormal))
    x = np.array([largest - 1e-3, largest + 1e-3, smallest, smallest - 1, np.inf, -np.inf, np.nan])
    got = mapped(formulas.exp)(x.astype(dtype))
    assert 0.99 * info.max < got[0] < np.inf
    assert got[2] == info.smallest_subnormal
    np.testing.assert_array_equal(got[[1, 3, 4, 5, 6]], [np.inf, 0, np.inf, 0, np.nan])


def test_expm1_of_negative(dtype):
    x = points(dtype, -50, 0, -np.log(2) / 2, -np.log(2), -40.0)
    assert_within_ulps(mapped(formulas.expm1_of_negative)(x), mpmath.expm1, x)
    got = mapped(formulas.expm1_of_negative)(np.array([-np.inf, -1e9, np.nan], dtype))
    np.testing.assert_array_equal(got, [-1, -1, np.nan])


def test_tanh(dtype):
    x = points(dtype, -25, 25, np.log(2) / 4, 20.0)
    assert_within_ulps(mapped(formulas.tanh, 2)(x)[0], mpmath.tanh, x)


def test_log1p(dtype):
    x = points(dtype, -0.999, 1e4, np.sqrt(2) - 1, np.sqrt(0.5) - 1, 1.0)
    assert_within_ulps(mapped(formulas.log1p)(x), mpmath.log1p, x)
    got = mapped(formulas.log1p)(np.array([np.inf, np.nan, np.finfo(dtype).max], dtype))
    np.testing.assert_allclose(got, [np.inf, np.nan, np.log(float(np.finfo(dtype).max))], 1e-6)


def test_float32_densely():
    x = np.linspace(-104, 89, 2_000_001).astype(np.float32)
    for f, exact, where in (
        (mapped(formulas.exp), np.exp, x),
        (mapped(formulas.expm1_of_negative), np.expm1, x[x <= 0]),
        (mapped(formulas.log1p), np.log1p, np.abs(x)),
    ):
        right = exact(where.astype(np.float64))
        inside = right < float(np.finfo(np.float32).max)
        ulp = np.spacing(np.abs(right[inside].astype(np.float32))).astype(np.float64)
        assert np.max(np.abs(f(where)[inside] - right[inside]) / ulp) <= ULPS[np.float32]

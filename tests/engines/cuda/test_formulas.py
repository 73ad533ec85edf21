"""The formulas of the CUDA kernels, compiled for the host: each row held to its table."""

import ctypes

import emulation
import numpy as np
import pytest

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.losses import LOSSES

pytestmark = emulation.needs_compiler

LARGE = np.array([1e-9, 1, 36, 88, 89, 709, 710, 1e9, np.inf])
LINE = np.concatenate([-LARGE[::-1], np.linspace(-12, 12, 49), LARGE, [0.0, -0.0, np.nan]])
# silu and gelu_tanh are constant where they should be still closer to 0.
BEYOND_LIMIT = {np.float32: 1e-35, np.float64: 1e-300}

BY_OUTPUT = [name for name in LOSSES if name != "softmax_cross_entropy"]

# Each loop takes its ids from the tables, so that a test fails where the order of ids differs.
CODE = """
#include "formulas.cuh"

template <int id, class T>
void activate(const T* z, T* h, T* slope, int n) {
  for (int t = 0; t < n; ++t) {
    h[t] = Activation<id, T>::f(z[t]);
    const T kept = Activation<id, T>::slope_from_output ? T(NAN) : z[t];
    slope[t] = Activation<id, T>::df(kept, h[t]);
  }
}

template <int id, class T>
void lose(const T* h, const T* y, T* value, T* g, int n) {
  for (int t = 0; t < n; ++t) value[t] = Loss<id, T>::value_and_grad(h[t], y[t], g[t]);
}

template <class T>
void lose_softmax(const T* h, const T* y, T* value, T* g, int n, int d) {
  for (int t = 0; t < n; ++t, h += d, y += d, g += d) {
    T m = h[0], total = 0, y_sum = 0;
    for (int k = 0; k < d; ++k) m = maximum(m, h[k]);
    for (int k = 0; k < d; ++k) total += exp(h[k] - m);
    for (int k = 0; k < d; ++k) y_sum += y[k];
    value[t] = 0;
    for (int k = 0; k < d; ++k) {
      value[t] += SoftmaxCrossEntropy::value(h[k], y[k], m, total);
      g[k] = SoftmaxCrossEntropy::grad(h[k], y[k], m, total, y_sum);
    }
  }
}

extern "C" void softmax_f(const float* h, const float* y, float* value, float* g, int n, int d) {
  lose_softmax(h, y, value, g, n, d);
}
extern "C" void softmax_d(const double* h, const double* y, double* value, double* g, int n,
                          int d) {
  lose_softmax(h, y, value, g, n, d);
}
extern "C" void larger_f(const float* a, const float* b, float* c, int n) {
  for (int t = 0; t < n; ++t) c[t] = maximum(a[t], b[t]);
}
extern "C" void larger_d(const double* a, const double* b, double* c, int n) {
  for (int t = 0; t < n; ++t) c[t] = maximum(a[t], b[t]);
}
extern "C" void class_weights(const long long* labels, double* y, int n, int d) {
  for (int t = 0; t < n; ++t) {
    for (int k = 0; k < d; ++k) y[t * d + k] = class_weight<double>(labels[t], k, d);
  }
}
"""
CODE += "".join(
    f"""
extern "C" void {name}_f(const float* z, float* h, float* slope, int n) {{
  activate<{name.upper()}>(z, h, slope, n);
}}
extern "C" void {name}_d(const double* z, double* h, double* slope, int n) {{
  activate<{name.upper()}>(z, h, slope, n);
}}
static_assert({name.upper()} == {k});
"""
    for k, name in enumerate(ACTIVATIONS)
)
CODE += "".join(
    f"""
extern "C" void {name}_f(const float* h, const float* y, float* value, float* g, int n) {{
  lose<{name.upper()}>(h, y, value, g, n);
}}
extern "C" void {name}_d(const double* h, const double* y, double* value, double* g, int n) {{
  lose<{name.upper()}>(h, y, value, g, n);
}}
static_assert({name.upper()} == {k});
"""
    for k, name in enumerate(LOSSES)
    if name in BY_OUTPUT
)


@pytest.fixture(params=[np.float32, np.float64])
def dtype(request):
    return request.param


def run(name, *arrays):
    """Call a loop of CODE for the dtype of the arrays."""
    function = emulation.library(CODE)[f"{name}_{arrays[0].dtype.char}"]
    function.restype = None
    function(*(A.ctypes.data_as(ctypes.c_void_p) for A in arrays), *arrays[0].shape)


def tolerance(dtype, exponents):
    """Relative: a rounding of the exponent counts as many times as the exponent is large."""
    exponents = np.where(np.abs(exponents) < 200, np.abs(exponents), 0)
    return (16 + 2 * exponents) * np.finfo(dtype).eps


def assert_equal(got, expected, rtol, atol):
    """As np.testing.assert_allclose, with one `rtol` per number."""
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(got[~finite], expected[~finite])
    error = np.abs(got[finite] - expected[finite])
    bound = rtol[finite] * np.abs(expected[finite]) + atol
    assert np.all(error <= bound), (got[finite][error > bound], expected[finite][error > bound])


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_and_slope_are_those_of_the_table(name, dtype):
    Z = LINE.astype(dtype)
    H, slope = np.empty_like(Z), np.empty_like(Z)
    run(name, Z, H, slope)
    with np.errstate(all="ignore"):
        expected = ACTIVATIONS[name].f(np, Z)
        expected_slope = ACTIVATIONS[name].df(np, Z, expected)
        # The exponent of gelu_tanh is that of its gate.
        rtol = tolerance(dtype, 1.6 * Z + 0.0714 * Z**3 if name == "gelu_tanh" else Z)
    assert_equal(H, expected, rtol, BEYOND_LIMIT[dtype])
    assert_equal(slope, expected_slope, rtol, 8 * np.finfo(dtype).eps)


@pytest.mark.parametrize("name", BY_OUTPUT)
def test_loss_and_its_gradient_are_those_of_the_table(name, dtype):
    points = LINE[np.isnan(LINE) | (np.abs(LINE) < 1e10)].astype(dtype)
    H, Y = (A.ravel() for A in np.meshgrid(points, np.array([0, 0.25, 1, 3], dtype)))
    value, grad = np.empty_like(H), np.empty_like(H)
    run(name, H, Y, value, grad)
    with np.errstate(all="ignore"):
        expected, expected_grad = LOSSES[name].value_and_grad(np, H[:, None], Y[:, None])
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(value, expected, 16 * eps, 16 * eps)
    np.testing.assert_allclose(grad, expected_grad[:, 0], 16 * eps, 16 * eps)


def test_softmax_cross_entropy_is_that_of_the_table(dtype):
    rng = np.random.default_rng(0)
    H = rng.choice(LINE[np.isfinite(LINE)], (400, 5))
    H[::10, 2] = np.nan
    H = H.astype(dtype)
    Y = rng.choice([0, 0, 0.25, 1, 3], H.shape).astype(dtype)
    value, grad = np.empty(len(H), dtype), np.empty_like(H)
    run("softmax", H, Y, value, grad)
    with np.errstate(all="ignore"):
        expected, expected_grad = LOSSES["softmax_cross_entropy"].value_and_grad(np, H, Y)
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(value, expected, 16 * eps, 16 * eps)
    np.testing.assert_allclose(grad, expected_grad, 16 * eps, 16 * eps)


def test_the_larger_of_two_numbers_is_nan_where_either_is(dtype):
    """As devices below compute capability 8.0 compare; above, one instruction does it."""
    a, b = (A.ravel() for A in np.meshgrid(*[LINE.astype(dtype)] * 2))
    larger = np.empty_like(a)
    run("larger", a, b, larger)
    np.testing.assert_array_equal(larger, np.maximum(a, b))


def test_a_label_is_a_row_of_class_weights_and_nan_outside():
    labels = np.array([0, 2, 3, -1, 2**32, -(2**63)])
    Y = np.empty((len(labels), 3))
    function = emulation.library(CODE).class_weights
    function.restype = None
    function(*(A.ctypes.data_as(ctypes.c_void_p) for A in (labels, Y)), *Y.shape)
    np.testing.assert_array_equal(Y[:2], np.eye(3)[[0, 2]])
    assert np.isnan(Y[2:]).all()

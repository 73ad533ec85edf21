"""The tables of activations and losses once more, for one number at a time, as Numba compiles them.

    h, slope = ACTIVATIONS[name](z)        f(z) and f'(z)
    h, slope, bend = SECOND[name](z)       and f''(z)
    value, grad = LOSSES[name](h, y)       one output's share of the loss, and its dE/dh

Softmax cross entropy needs all outputs of a sample together and stands in rows.py. The
answers are those of activations.py and losses.py, whose reasons are not given again; a test holds
the tables together.

exp, expm1 and log1p are our own because LLVM turns them into vector instructions, which it cannot
do with a call into the C library. They are written without branches, for float32 and float64
alike: `type(x)(2)` is the number 2 in the dtype of x. The error is below 4 units in the last place
in float32 and 8 in float64, subnormal results included; nan in, nan out.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit, types
from numba.extending import overload

from mlp_backprop.activations import GELU_CUBIC, GELU_SCALE, LEAKY_SLOPE

# Fused multiply-adds are welcome. Nothing else may be rearranged: adding and subtracting `shift`
# below rounds, and inf and nan must pass.
OPTIONS: dict[str, Any] = {"error_model": "numpy", "fastmath": {"contract"}}
compiled = njit(**OPTIONS)
inlined = njit(**OPTIONS, inline="always")


class Float(NamedTuple):
    """The numbers that differ between float32 and float64."""

    mantissa_bits: int
    shift: Any  # adding it rounds, and leaves in the last bits: the integer plus the bias
    exp_range: tuple[Any, Any]  # beyond it exp is 0 or inf
    log2_e: Any
    ln2_high: Any  # few bits, so that its product with an exponent is exact
    ln2_low: Any
    sqrt_half_bits: int
    exp_series: tuple[Any, ...]  # 1/k! from the last to k = 2
    atanh_series: tuple[Any, ...]  # 1/(2k + 1) from the last to k = 1


def _float(
    real: Any, integer: Any, exp_range: tuple[float, float], ln2: tuple[float, float], terms: int
) -> Float:
    info = np.finfo(real)
    bias = 1 - info.minexp
    return Float(
        mantissa_bits=info.nmant,
        shift=real(1.5 * 2.0**info.nmant + bias),
        exp_range=(real(exp_range[0]), real(exp_range[1])),
        log2_e=real(1 / math.log(2)),
        ln2_high=real(ln2[0]),
        ln2_low=real(ln2[1]),
        sqrt_half_bits=int(real(math.sqrt(0.5)).view(integer)),
        exp_series=tuple(real(1 / math.factorial(k)) for k in range(terms, 1, -1)),
        atanh_series=tuple(real(1 / k) for k in range(2 * (terms - 3) + 1, 1, -2)),
    )


FLOAT32 = _float(np.float32, np.int32, (-104, 89), (0.693359375, -2.1219444e-4), 7)
FLOAT64 = _float(
    np.float64, np.int64, (-746, 710), (0.6931471803691238, 1.9082149292705877e-10), 13
)


def constants(x):
    """FLOAT32 or FLOAT64, as x is."""


def bits(x):
    """The bits of x as an integer of its size."""


def from_bits(b, x):
    """The number with bits b, in the dtype of x."""


@overload(constants)
def _constants(x):
    chosen = FLOAT32 if x == types.float32 else FLOAT64
    return lambda x: chosen


@overload(bits)
def _bits(x):
    if x == types.float32:
        return lambda x: np.float32(x).view(np.int32)
    return lambda x: np.float64(x).view(np.int64)


@overload(from_bits)
def _from_bits(b, x):
    if x == types.float32:
        return lambda b, x: np.int32(b).view(np.float32)
    return lambda b, x: np.int64(b).view(np.float64)


@inlined
def clip(x, low, high):
    """nan passes."""
    x = low if x < low else x
    return high if x > high else x


@inlined
def nearest_integer(x):
    """For x smaller than `shift`, which has no digits behind the point."""
    c = constants(x)
    return (x + c.shift) - c.shift


@inlined
def power_of_two(k):
    """2^k for whole numbers k that are exponents of x's dtype: `shift` holds the bias too."""
    c = constants(k)
    return from_bits(bits(k + c.shift) << c.mantissa_bits, k)


@inlined
def split(x):
    """k and exp(r) - 1, where x = k ln 2 + r and |r| <= ln(2)/2."""
    c = constants(x)
    k = nearest_integer(x * c.log2_e)
    r = (x - k * c.ln2_high) - k * c.ln2_low
    series = c.exp_series[0]
    for term in c.exp_series[1:]:
        series = series * r + term
    return k, r + r * r * series


@compiled
def exp(x):
    """Over the whole line."""
    low, high = constants(x).exp_range
    k, q = split(clip(x, low, high))
    # 2^k in two factors, since k reaches beyond the exponents of a number.
    half = nearest_integer(k * type(x)(0.5))
    first, second = power_of_two(half), power_of_two(k - half)
    return (q * first + first) * second


@compiled
def expm1_of_negative(x):
    """exp(x) - 1 for x <= 0."""
    real = type(x)
    k, q = split(clip(x, real(-40), real(0)))
    power = power_of_two(k)
    return power * q + (power - real(1))


@compiled
def log1p(x):
    """log(1 + x) for x > -1, by log(m) = 2 atanh((m - 1)/(m + 1)) with m near 1."""
    c = constants(x)
    one = type(x)(1)
    u = one + x
    lost = x - (u - one)
    b = bits(u) - c.sqrt_half_bits
    k = b >> c.mantissa_bits
    m = from_bits(b - (k << c.mantissa_bits) + c.sqrt_half_bits, x)
    s = (m - one) / (m + one)
    z = s * s
    series = c.atanh_series[0]
    for term in c.atanh_series[1:]:
        series = series * z + term
    s = s + s
    exponent = type(x)(k)
    log = exponent * c.ln2_high + (s + (s * z * series + (exponent * c.ln2_low + lost / u)))
    return x if x == type(x)(np.inf) else log


# Activations ---------------------------------------------------------------------------------


@inlined
def logistic(z, e):
    """Given e = exp(-|z|)."""
    zero, one = type(z)(0), type(z)(1)
    return (e if z < zero else one) / (one + e)


@inlined
def identity(z):
    return z, type(z)(1)


@inlined
def sigmoid(z):
    h = logistic(z, exp(-abs(z)))
    return h, h * (type(z)(1) - h)


@inlined
def tanh(z):
    zero, one, two = type(z)(0), type(z)(1), type(z)(2)
    q = expm1_of_negative(-two * abs(z))
    h = q / (two + q)
    h = h if z < zero else zero - h
    return h, one - h * h


@inlined
def relu(z):
    zero, one = type(z)(0), type(z)(1)
    return (zero if z < zero else z), (one if z > zero else zero)


@inlined
def leaky_relu(z):
    zero, one, slope = type(z)(0), type(z)(1), type(z)(LEAKY_SLOPE)
    return (z if z > zero else slope * z), (one if z > zero else slope)


@inlined
def elu(z):
    zero, one = type(z)(0), type(z)(1)
    below = expm1_of_negative(zero if z > zero else z)
    return (z if z > zero else below), (one if z > zero else below + one)


@inlined
def softplus(z):
    zero, e = type(z)(0), exp(-abs(z))
    return (zero if z < zero else z) + log1p(e), logistic(z, e)


@inlined
def silu(z):
    one, limit = type(z)(1), type(z)(1000)
    s = logistic(z, exp(-abs(z)))
    return (-limit if z < -limit else z) * s, s * (one + clip(z, -limit, limit) * (one - s))


@inlined
def gelu_tanh(z):
    real = type(z)
    one, limit, scale, cubic = real(1), real(25), real(GELU_SCALE), real(GELU_CUBIC)
    x = clip(z, -limit, limit)
    u = scale * x * (one + cubic * x * x)
    s = logistic(u, exp(-abs(u)))
    slope = s + x * s * (one - s) * (scale * (one + real(3) * cubic * x * x))
    return (-limit if z < -limit else z) * s, slope


ACTIVATIONS = {
    "identity": identity,
    "sigmoid": sigmoid,
    "tanh": tanh,
    "relu": relu,
    "leaky_relu": leaky_relu,
    "elu": elu,
    "softplus": softplus,
    "silu": silu,
    "gelu_tanh": gelu_tanh,
}


# The same with f''. What is written twice is computed once: all of it is inlined.


@inlined
def straight(z, of_activation):
    h, slope = of_activation
    return h, slope, type(z)(0)


@inlined
def identity2(z):
    return straight(z, identity(z))


@inlined
def sigmoid2(z):
    h, slope = sigmoid(z)
    return h, slope, slope * (type(z)(1) - (h + h))


@inlined
def tanh2(z):
    h, slope = tanh(z)
    return h, slope, type(z)(-2) * h * slope


@inlined
def relu2(z):
    return straight(z, relu(z))


@inlined
def leaky_relu2(z):
    return straight(z, leaky_relu(z))


@inlined
def elu2(z):
    h, slope = elu(z)
    return h, slope, (type(z)(0) if z > type(z)(0) else slope)


@inlined
def softplus2(z):
    h, s = softplus(z)
    return h, s, s * (type(z)(1) - s)


@inlined
def silu2(z):
    real = type(z)
    one, two, limit = real(1), real(2), real(1000)
    h, slope = silu(z)
    s = logistic(z, exp(-abs(z)))
    return h, slope, s * (one - s) * (two + clip(z, -limit, limit) * (one - (s + s)))


@inlined
def gelu_tanh2(z):
    real = type(z)
    one, two, limit, scale, cubic = real(1), real(2), real(25), real(GELU_SCALE), real(GELU_CUBIC)
    h, slope = gelu_tanh(z)
    x = clip(z, -limit, limit)
    u = scale * x * (one + cubic * x * x)
    s = logistic(u, exp(-abs(u)))
    du = scale * (one + real(3) * cubic * x * x)
    ds = s * (one - s)
    turn = ds * du * (two + x * (one - (s + s)) * du)
    return h, slope, turn + ds * x * (real(6) * scale * cubic * x)


SECOND = {
    "identity": identity2,
    "sigmoid": sigmoid2,
    "tanh": tanh2,
    "relu": relu2,
    "leaky_relu": leaky_relu2,
    "elu": elu2,
    "softplus": softplus2,
    "silu": silu2,
    "gelu_tanh": gelu_tanh2,
}


# Losses --------------------------------------------------------------------------------------


@inlined
def squared_error(h, y):
    r = h - y
    return r * r, r + r


@inlined
def absolute_error(h, y):
    zero, one = type(h)(0), type(h)(1)
    r = h - y
    return abs(r), (one if r > zero else (-one if r < zero else r))


@inlined
def huber(h, y):
    one, half = type(h)(1), type(h)(0.5)
    r = h - y
    c = clip(r, -one, one)
    return c * (r - half * c), c


@inlined
def poisson(h, y):
    rate = exp(h)
    return rate - y * h, rate - y


@inlined
def binary_cross_entropy(h, y):
    zero, e = type(h)(0), exp(-abs(h))
    return ((zero if h < zero else h) - y * h) + log1p(e), logistic(h, e) - y


LOSSES = {
    "squared_error": squared_error,
    "absolute_error": absolute_error,
    "huber": huber,
    "poisson": poisson,
    "binary_cross_entropy": binary_cross_entropy,
}

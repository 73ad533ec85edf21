"""The table of activations: each row is a function with its first three derivatives.

Called elementwise, with the namespace `xp` of the array Z of pre-activations:

    H = row.f(xp, Z)          f(Z)
    row.df(xp, Z, H)          f'(Z)
    row.d2f(xp, Z, H)         f''(Z)
    row.d3f(xp, Z, H)         f'''(Z)

The derivatives are given both Z and H = f(Z), because some are shortest in the one and some in the
other. At the kink of relu, leaky_relu and elu the derivatives take the value from the left, as in
torch: relu'(0) = 0. Their f'' leaves out what lies on the kink itself, a jump of f' or of f'', so
that they have no f''' to speak of: d3f is None.

Every formula is right over the whole extended line and silent on it: an exponential is only taken
of something that is not positive, and a product with a factor that vanishes at infinity is formed
from a clipped Z, since inf * 0 is nan. NaN in, NaN out.

Adding an activation is adding a row; the tests loop over the table.
"""

from collections.abc import Callable
from typing import NamedTuple

from mlp_backprop.types import Array, Namespace


class Activation(NamedTuple):
    """One row: a name, f, f', f'' and, where there is one, f'''."""

    name: str
    f: Callable[[Namespace, Array], Array]
    df: Callable[[Namespace, Array, Array], Array]
    d2f: Callable[[Namespace, Array, Array], Array]
    d3f: Callable[[Namespace, Array, Array], Array] | None


LEAKY_SLOPE = 0.01

# gelu_tanh(z) = z/2 (1 + tanh(u)) = z s(2u), with 2u = GELU_SCALE (z + GELU_CUBIC z^3) and s the
# logistic function. D. Hendrycks, K. Gimpel, "Gaussian error linear units", arXiv 1606.08415.
GELU_SCALE = 1.5957691216057308  # 2 sqrt(2/pi)
GELU_CUBIC = 0.044715


def logistic(xp: Namespace, Z: Array) -> Array:
    """1 / (1 + exp(-Z)), by the exponential of -|Z|, which cannot overflow."""
    e = xp.exp(-xp.abs(Z))
    return xp.where(Z < 0, e, xp.ones_like(e)) / (1 + e)


def softplus(xp: Namespace, Z: Array) -> Array:
    """log(1 + exp(Z)) = max(Z, 0) + log(1 + exp(-|Z|))."""
    return xp.clip(Z, 0.0, None) + xp.log1p(xp.exp(-xp.abs(Z)))


def _zeros(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.zeros_like(Z)


def _identity(xp: Namespace, Z: Array) -> Array:
    return Z


def _identity_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.ones_like(Z)


def _sigmoid_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return H * (1 - H)


def _sigmoid_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    return H * (1 - H) * (1 - 2 * H)


def _sigmoid_d3f(xp: Namespace, Z: Array, H: Array) -> Array:
    dH = H * (1 - H)
    return dH * (1 - 6 * dH)


def _tanh(xp: Namespace, Z: Array) -> Array:
    return xp.tanh(Z)


def _tanh_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return 1 - H * H


def _tanh_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    return -2 * H * (1 - H * H)


def _tanh_d3f(xp: Namespace, Z: Array, H: Array) -> Array:
    square = H * H
    return (1 - square) * (6 * square - 2)


def _relu(xp: Namespace, Z: Array) -> Array:
    return xp.clip(Z, 0.0, None)


def _relu_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.astype(Z > 0, Z.dtype)


def _leaky_relu(xp: Namespace, Z: Array) -> Array:
    return xp.where(Z > 0, Z, LEAKY_SLOPE * Z)


def _leaky_relu_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.where(Z > 0, xp.ones_like(Z), xp.full_like(Z, LEAKY_SLOPE))


def _elu(xp: Namespace, Z: Array) -> Array:
    return xp.where(Z > 0, Z, xp.expm1(xp.clip(Z, None, 0.0)))


def _elu_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.where(Z > 0, xp.ones_like(Z), H + 1)


def _elu_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    return xp.where(Z > 0, xp.zeros_like(Z), H + 1)


def _softplus_df(xp: Namespace, Z: Array, H: Array) -> Array:
    return logistic(xp, Z)


def _softplus_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    S = logistic(xp, Z)
    return S * (1 - S)


def _softplus_d3f(xp: Namespace, Z: Array, H: Array) -> Array:
    S = logistic(xp, Z)
    return S * (1 - S) * (1 - 2 * S)


# exp(-1000) is zero in every float type, so s(z) and 1 - s(z) are exact beyond |z| = 1000.
def _silu(xp: Namespace, Z: Array) -> Array:
    return xp.clip(Z, -1000.0, None) * logistic(xp, Z)


def _silu_df(xp: Namespace, Z: Array, H: Array) -> Array:
    S = logistic(xp, Z)
    return S * (1 + xp.clip(Z, -1000.0, 1000.0) * (1 - S))


def _silu_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    S = logistic(xp, Z)
    return S * (1 - S) * (2 + xp.clip(Z, -1000.0, 1000.0) * (1 - 2 * S))


def _silu_d3f(xp: Namespace, Z: Array, H: Array) -> Array:
    S = logistic(xp, Z)
    dS = S * (1 - S)
    return dS * (3 * (1 - 2 * S) + xp.clip(Z, -1000.0, 1000.0) * (1 - 6 * dS))


def _gelu_gate(xp: Namespace, Z: Array) -> tuple[Array, Array]:
    """Z clipped, and s(2u) there: beyond |z| = 25 the gate is 0 or 1 in every float type."""
    Z = xp.clip(Z, -25.0, 25.0)
    return Z, logistic(xp, GELU_SCALE * Z * (1 + GELU_CUBIC * Z * Z))


def _gelu_tanh(xp: Namespace, Z: Array) -> Array:
    return xp.clip(Z, -25.0, None) * _gelu_gate(xp, Z)[1]


def _gelu_tanh_df(xp: Namespace, Z: Array, H: Array) -> Array:
    Z, S = _gelu_gate(xp, Z)
    dU = GELU_SCALE * (1 + 3 * GELU_CUBIC * Z * Z)
    return S + Z * S * (1 - S) * dU


def _gelu_tanh_d2f(xp: Namespace, Z: Array, H: Array) -> Array:
    Z, S = _gelu_gate(xp, Z)
    dU = GELU_SCALE * (1 + 3 * GELU_CUBIC * Z * Z)
    d2U = 6 * GELU_SCALE * GELU_CUBIC * Z
    dS = S * (1 - S)  # first in each product: far out it is 0, and the rest would overflow float16
    return dS * dU * (2 + Z * (1 - 2 * S) * dU) + dS * Z * d2U


def _gelu_tanh_d3f(xp: Namespace, Z: Array, H: Array) -> Array:
    rest = _gelu_gate(xp, -Z)[1]  # 1 - S with all its digits, which are multiplied by thousands
    Z, S = _gelu_gate(xp, Z)
    dU = GELU_SCALE * (1 + 3 * GELU_CUBIC * Z * Z)
    d3U = 6 * GELU_SCALE * GELU_CUBIC
    dS, turn = S * rest, rest - S
    dSdU = dS * dU  # first in each product, as above
    square = dSdU * dU * (3 * turn + Z * (1 - 6 * dS) * dU)
    return square + dSdU * (3 * d3U) * Z * Z * turn + dS * (4 * d3U) * Z


ACTIVATIONS = {
    row.name: row
    for row in (
        Activation("identity", _identity, _identity_df, _zeros, _zeros),
        Activation("sigmoid", logistic, _sigmoid_df, _sigmoid_d2f, _sigmoid_d3f),
        Activation("tanh", _tanh, _tanh_df, _tanh_d2f, _tanh_d3f),
        Activation("relu", _relu, _relu_df, _zeros, None),
        Activation("leaky_relu", _leaky_relu, _leaky_relu_df, _zeros, None),
        Activation("elu", _elu, _elu_df, _elu_d2f, None),
        Activation("softplus", softplus, _softplus_df, _softplus_d2f, _softplus_d3f),
        Activation("silu", _silu, _silu_df, _silu_d2f, _silu_d3f),
        Activation("gelu_tanh", _gelu_tanh, _gelu_tanh_df, _gelu_tanh_d2f, _gelu_tanh_d3f),
    )
}

"""The table of smooth activations with three derivatives, for one number at a time.

    h, slope, bend, third = THIRD[name](z)      f(z), f'(z), f''(z) and f'''(z)

As in formulas.py, whose SECOND it goes on from; activations.py has the reasons.
"""

from mlp_backprop.activations import GELU_CUBIC, GELU_SCALE
from mlp_backprop.engines.compiled.formulas import (
    clip,
    exp,
    gelu_tanh2,
    identity2,
    inlined,
    logistic,
    sigmoid2,
    silu2,
    softplus2,
    tanh2,
)


@inlined
def with_third(of_activation, third):
    h, slope, bend = of_activation
    return h, slope, bend, third


@inlined
def identity3(z):
    return with_third(identity2(z), type(z)(0))


@inlined
def sigmoid3(z):
    h, slope, bend = sigmoid2(z)
    return h, slope, bend, slope * (type(z)(1) - type(z)(6) * slope)


@inlined
def tanh3(z):
    h, slope, bend = tanh2(z)
    return h, slope, bend, slope * (type(z)(6) * (h * h) - type(z)(2))


@inlined
def softplus3(z):
    h, s, bend = softplus2(z)
    return h, s, bend, bend * (type(z)(1) - (s + s))


@inlined
def silu3(z):
    real = type(z)
    one, limit = real(1), real(1000)
    s = logistic(z, exp(-abs(z)))
    ds = s * (one - s)
    x = clip(z, -limit, limit)
    return with_third(silu2(z), ds * (real(3) * (one - (s + s)) + x * (one - real(6) * ds)))


@inlined
def gelu_tanh3(z):
    real = type(z)
    one, three, limit, scale, cubic = real(1), real(3), real(25), real(GELU_SCALE), real(GELU_CUBIC)
    x = clip(z, -limit, limit)
    u = scale * x * (one + cubic * x * x)
    e = exp(-abs(u))
    s, rest = logistic(u, e), logistic(-u, e)
    du, d3u = scale * (one + three * cubic * x * x), real(6) * scale * cubic
    ds, turn = s * rest, rest - s
    dsdu = ds * du
    square = dsdu * du * (three * turn + x * (one - real(6) * ds) * du)
    third = square + dsdu * (three * d3u) * x * x * turn + ds * (real(4) * d3u) * x
    return with_third(gelu_tanh2(z), third)


THIRD = {
    "identity": identity3,
    "sigmoid": sigmoid3,
    "tanh": tanh3,
    "softplus": softplus3,
    "silu": silu3,
    "gelu_tanh": gelu_tanh3,
}

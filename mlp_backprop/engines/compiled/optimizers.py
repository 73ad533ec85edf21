"""The table of optimizers once more, as loops over a vector of parameters, in its dtype.

A row turns the gradient g, in its place, into the direction of the step; `move` takes the step
along it. Equations and slots are those of maths/optimizers.py.
`rate` and `options` are addresses of float64; `scale` has a factor of the rate for each parameter.
Few arrays in one loop: with more, LLVM does not vectorise it.
"""

from collections.abc import Callable
from math import sqrt

import numpy as np

from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.rows import at
from mlp_backprop.engines.compiled.vectors import pointer

# By name: the fields whose numbers are `options`, in this order.
OPTIONS = {
    "sgd": ("momentum", "nesterov", "weight_decay"),
    "adam": ("betas", "eps", "weight_decay"),
    "adamw": ("betas", "eps", "weight_decay"),
    "rmsprop": ("alpha", "eps", "weight_decay", "momentum"),
    "adagrad": ("eps", "weight_decay", "lr_decay"),
    "rprop": ("etas", "step_sizes"),
}
OPTIMIZERS = tuple(OPTIONS)


def update(sources: int, k: int) -> Callable[..., None]:
    """Row k: step t = 1, 2, ... of n parameters p, whose slots s and u are."""
    return ROWS[OPTIMIZERS[k]](sources)


@compiled
def numbers(options, k):
    return pointer(np.float64, options)[k]


@compiled
def move(p, g, scale, rate, n):
    rate = type(p[0])(rate)
    for i in range(at(n)):
        p[i] -= (rate * scale[i]) * g[i]


@compiled
def decay(p, g, factor, n):
    """g + λ p in place of g."""
    if factor:
        factor = type(p[0])(factor)
        for i in range(at(n)):
            g[i] += factor * p[i]


def _sgd(sources: int) -> Callable[..., None]:
    def sgd(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        momentum = type(p[0])(numbers(options, 0))
        decay(p, g, numbers(options, 2), n)
        if momentum:
            for i in range(at(n)):
                s[i] = momentum * s[i] + g[i]
            if numbers(options, 1):
                for i in range(at(n)):
                    g[i] += momentum * s[i]
            else:
                for i in range(at(n)):
                    g[i] = s[i]
        move(p, g, scale, numbers(rate, 0), n)

    return sgd


@compiled
def adam_step(p, g, s, u, scale, options, rate, t, n):
    """Without any decay."""
    real, beta1, beta2 = type(p[0]), numbers(options, 0), numbers(options, 1)
    root = sqrt(1 - beta2**t)
    eps, keep = real(numbers(options, 2) * root), real(beta2)
    share1, share2 = real(1 - beta1), real(1 - beta2)
    for i in range(at(n)):
        m = s[i] + share1 * (g[i] - s[i])
        v = keep * u[i] + share2 * (g[i] * g[i])
        s[i], u[i] = m, v
        g[i] = m / (sqrt(v) + eps)
    move(p, g, scale, rate * (root / (1 - beta1**t)), n)


def _adam(sources: int) -> Callable[..., None]:
    def adam(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        decay(p, g, numbers(options, 3), n)
        adam_step(p, g, s, u, scale, options, numbers(rate, 0), t, n)

    return adam


def _adamw(sources: int) -> Callable[..., None]:
    def adamw(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        one = type(p[0])(1)
        factor = type(p[0])(numbers(rate, 0) * numbers(options, 3))
        for i in range(at(n)):
            p[i] *= one - factor * scale[i]
        adam_step(p, g, s, u, scale, options, numbers(rate, 0), t, n)

    return adamw


def _rmsprop(sources: int) -> Callable[..., None]:
    def rmsprop(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        real, alpha = type(p[0]), numbers(options, 0)
        keep, share, eps = real(alpha), real(1 - alpha), real(numbers(options, 1))
        momentum = real(numbers(options, 3))
        decay(p, g, numbers(options, 2), n)
        for i in range(at(n)):
            v = keep * s[i] + share * (g[i] * g[i])
            s[i] = v
            g[i] = g[i] / (sqrt(v) + eps)
        if momentum:
            for i in range(at(n)):
                b = momentum * u[i] + g[i]
                u[i], g[i] = b, b
        move(p, g, scale, numbers(rate, 0), n)

    return rmsprop


def _adagrad(sources: int) -> Callable[..., None]:
    def adagrad(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        eps = type(p[0])(numbers(options, 0))
        decay(p, g, numbers(options, 1), n)
        for i in range(at(n)):
            v = s[i] + g[i] * g[i]
            s[i] = v
            g[i] = g[i] / (sqrt(v) + eps)
        move(p, g, scale, numbers(rate, 0) / (1 + (t - 1) * numbers(options, 2)), n)

    return adagrad


def _rprop(sources: int) -> Callable[..., None]:
    def rprop(p, g, s, u, scale, options, rate, t, n):
        _ = sources
        real = type(p[0])
        smaller, larger = real(numbers(options, 0)), real(numbers(options, 1))
        least, most = real(numbers(options, 2)), real(numbers(options, 3))
        zero, one = real(0), real(1)
        for i in range(at(n)):
            turn = g[i] * s[i]
            size = u[i] * (larger if turn > zero else (smaller if turn < zero else one))
            size = most if size > most else (least if size < least else size)
            u[i] = size
            s[i] = zero if turn < zero else g[i]
        for i in range(at(n)):
            p[i] -= u[i] if s[i] > zero else (-u[i] if s[i] < zero else zero)

    return rprop


ROWS: dict[str, Callable[[int], Callable[..., None]]] = {
    "sgd": _sgd,
    "adam": _adam,
    "adamw": _adamw,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "rprop": _rprop,
}

"""Learning rates, one for each step of a run: a schedule is an array.

Each function takes the learning rate and how many steps there are, and returns NumPy float64 (S,):
it can be plotted, changed, joined to another, and is the same on every engine. A step k = 0, 1, ...
is taken with entry k. With learning rates (E,), one for each member, the result is (E, S).
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from mlp_backprop.edge import numbers
from mlp_backprop.types import Array, ArrayLike

__all__ = ["SCHEDULES", "constant", "cosine", "exponential", "one_cycle", "step"]


def constant(learning_rate: float | ArrayLike, steps: int) -> Array:
    """The same rate at every step.

    Parameters
    ----------
    learning_rate : float, or array (E,)
        Not negative.
    steps : int
        How many steps there are: epochs times batches.

    Returns
    -------
    array (steps,) or (E, steps), float64

    Raises
    ------
    TypeError, ValueError
        A rate that is no number, negative or not finite; steps that are no number of steps.

    Examples
    --------
    >>> from mlp_backprop import schedules
    >>> schedules.constant(0.1, 3)
    array([0.1, 0.1, 0.1])
    """
    rate, k = _begin(learning_rate, steps)
    return rate + 0 * k


def cosine(
    learning_rate: float | ArrayLike, steps: int, *, warmup: int = 0, final: float = 0.0
) -> Array:
    """Down half a wave of the cosine, if wanted after a straight rise.

    Parameters
    ----------
    learning_rate, steps
        As for `constant`; the rate is the largest.
    warmup : int
        So many steps rise from 0 in a straight line, before the one at the full rate.
    final : float, not negative
        What the rate comes down to: the step after the last would have it.

    Returns
    -------
    array (steps,) or (E, steps), float64
        After the warm-up torch's CosineAnnealingLR with T_max = steps - warmup, eta_min = final.

    Raises
    ------
    TypeError, ValueError
        As for `constant`; a warm-up that is longer than the run.

    Notes
    -----
    I. Loshchilov, F. Hutter, "SGDR: stochastic gradient descent with warm restarts", ICLR 2017.

    Examples
    --------
    >>> from mlp_backprop import schedules
    >>> schedules.cosine(0.3, 6, warmup=2).round(3)
    array([0.1  , 0.2  , 0.3  , 0.256, 0.15 , 0.044])
    """
    rate, k = _begin(learning_rate, steps)
    n_rising = numbers.whole("warmup", warmup)
    if n_rising > len(k):
        raise ValueError(f"warmup must be steps or fewer, {len(k)}, got {n_rising}")
    end = numbers.real("final", final, numbers.NOT_NEGATIVE)
    falling = _between(rate, end, (k - n_rising) / max(1, len(k) - n_rising))
    return np.where(k < n_rising, rate * ((k + 1) / (n_rising + 1)), falling)


def one_cycle(
    learning_rate: float | ArrayLike,
    steps: int,
    *,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> Array:
    """Up to the learning rate and down to nearly nothing, both along a cosine: for fast runs.

    Parameters
    ----------
    learning_rate, steps
        As for `constant`; the rate is the largest.
    pct_start : float, in [0, 1]
        The share of the steps that go up.
    div_factor : float, positive
        The first rate is the largest divided by it,
    final_div_factor : float, positive
        and the last is the first divided by that.

    Returns
    -------
    array (steps,) or (E, steps), float64
        torch's OneCycleLR, in two phases along cosines, with max_lr = learning_rate.

    Raises
    ------
    TypeError, ValueError
        As for `constant`; factors out of their range.

    Notes
    -----
    L. Smith, N. Topin, "Super-convergence: very fast training of neural networks using large
    learning rates", 2019.

    Examples
    --------
    >>> from mlp_backprop import schedules
    >>> schedules.one_cycle(1.0, 5, pct_start=0.6).round(3)
    array([0.04, 0.52, 1.  , 0.5 , 0.  ])
    """
    rate, k = _begin(learning_rate, steps)
    top = numbers.real("pct_start", pct_start, numbers.FRACTION) * len(k) - 1
    first = rate / numbers.real("div_factor", div_factor, numbers.POSITIVE)
    last = first / numbers.real("final_div_factor", final_div_factor, numbers.POSITIVE)
    down = len(k) - 1 - top
    # A way without length is not gone: 1 in its place.
    rising = _between(first, rate, k / (top if top > 0 else 1))
    falling = _between(rate, last, (k - top) / (down if down > 0 else 1))
    return np.where(k < top, rising, falling)


def exponential(learning_rate: float | ArrayLike, steps: int, *, gamma: float) -> Array:
    """Every step with gamma times the rate of the step before.

    Parameters
    ----------
    learning_rate, steps
        As for `constant`; the rate is the first.
    gamma : float, positive
        0.5 ** (1 / 1000) halves the rate every 1 000 steps.

    Returns
    -------
    array (steps,) or (E, steps), float64
        torch's ExponentialLR, gone on with at every step.

    Raises
    ------
    TypeError, ValueError
        As for `constant`; gamma that is not positive.

    Examples
    --------
    >>> from mlp_backprop import schedules
    >>> schedules.exponential(0.8, 4, gamma=0.5)
    array([0.8, 0.4, 0.2, 0.1])
    """
    rate, k = _begin(learning_rate, steps)
    return rate * numbers.real("gamma", gamma, numbers.POSITIVE) ** k


def step(
    learning_rate: float | ArrayLike, steps: int, *, step_size: int, gamma: float = 0.1
) -> Array:
    """The same rate for some steps, then gamma times it for as many, and so on.

    Parameters
    ----------
    learning_rate, steps
        As for `constant`; the rate is the first.
    step_size : int, 1 or more
        How many steps have the same rate.
    gamma : float, positive
        What the rate is multiplied with then.

    Returns
    -------
    array (steps,) or (E, steps), float64
        torch's StepLR, gone on with at every step.

    Raises
    ------
    TypeError, ValueError
        As for `constant`; step_size or gamma out of their range.

    Examples
    --------
    >>> from mlp_backprop import schedules
    >>> schedules.step(1.0, 5, step_size=2, gamma=0.5)
    array([1.  , 1.  , 0.5 , 0.5 , 0.25])
    """
    rate, k = _begin(learning_rate, steps)
    times = k // numbers.whole("step_size", step_size, least=1)
    return rate * numbers.real("gamma", gamma, numbers.POSITIVE) ** times


# Those that a name says all about: the others have no gamma or step_size that is right for all.
SCHEDULES: dict[str, Callable[[Any, int], Array]] = {
    "constant": constant,
    "cosine": cosine,
    "one_cycle": one_cycle,
}


def _begin(learning_rate: object, steps: object) -> tuple[Array, Array]:
    """The rate, () or (E, 1), and the numbers of the steps, both float64."""
    k = np.arange(float(numbers.whole("steps", steps)))
    if numbers.is_number(learning_rate):
        rate = numbers.real("learning_rate", learning_rate, numbers.NOT_NEGATIVE)
        return np.float64(rate), k
    try:
        rates = list(learning_rate)  # type: ignore[call-overload]
    except TypeError:
        rates = [learning_rate]
    read = [numbers.real("learning_rate", rate, numbers.NOT_NEGATIVE) for rate in rates]
    return np.array(read, np.float64)[:, None], k


def _between(first: Array, last: Array | float, share: Array) -> Array:
    """From the first to the last along half a wave of the cosine, at shares from 0 to 1."""
    return last + (first - last) * (1 + np.cos(math.pi * share)) / 2

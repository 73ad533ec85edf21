"""Numbers as options are: read as Python's own, which widen no array's dtype, or refused."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from mlp_backprop.edge.arguments import type_name


class Range(NamedTuple):
    """The numbers that an option may be, in words and as a question."""

    words: str
    holds: Callable[[float], bool]


NOT_NEGATIVE = Range("finite and not negative", lambda x: 0 <= x < math.inf)
POSITIVE = Range("finite and positive", lambda x: 0 < x < math.inf)
FRACTION = Range("in [0, 1]", lambda x: 0 <= x <= 1)
BELOW_ONE = Range("in [0, 1)", lambda x: 0 <= x < 1)


def is_number(value: object) -> bool:
    """Whether it is one real number; a truth value is none."""
    return isinstance(value, Real) and not isinstance(value, bool | np.bool)


def real(name: str, value: object, within: Range) -> float:
    """The number as a float."""
    if not is_number(value):
        raise TypeError(f"{name} must be a number, got {type_name(value)}")
    number = float(value)  # type: ignore[arg-type]
    if not within.holds(number):
        raise ValueError(f"{name} must be {within.words}, got {number:g}")
    return number


def whole(name: str, value: object, least: int = 0) -> int:
    """The number as an int."""
    if not is_number(value) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be {least} or more, got {value}")
    return int(value)


def pair(name: str, value: object, within: Range) -> tuple[float, float]:
    """Two numbers."""
    if not isinstance(value, tuple | list) or len(value) != 2:
        raise TypeError(f"{name} must be two numbers, got {value!r}")
    first, second = (real(f"{name}[{k}]", number, within) for k, number in enumerate(value))
    return first, second

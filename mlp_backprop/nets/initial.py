"""Initial parameters: the three schemes most nets start from."""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from mlp_backprop.edge.arguments import (
    check_dtype_of,
    generator,
    named_home,
    read_params,
    table_row,
    type_name,
)
from mlp_backprop.nets.members import stacked
from mlp_backprop.types import Array, BackendName, Layer

Scheme = Callable[[np.random.Generator, int, int], tuple[Array, Array]]


def _linear(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[Array, Array]:
    limit = 1 / math.sqrt(n_in)
    return rng.uniform(-limit, limit, (n_out, n_in)), rng.uniform(-limit, limit, n_out)


def _glorot(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[Array, Array]:
    limit = math.sqrt(6 / (n_in + n_out))
    return rng.uniform(-limit, limit, (n_out, n_in)), np.zeros(n_out)


def _he(rng: np.random.Generator, n_out: int, n_in: int) -> tuple[Array, Array]:
    return rng.normal(0, math.sqrt(2 / n_in), (n_out, n_in)), np.zeros(n_out)


SCHEMES: dict[str, Scheme] = {"linear": _linear, "glorot": _glorot, "he": _he}


def init_params(
    sizes: Sequence[int],
    rng: Any = None,
    *,
    scheme: str = "linear",
    dtype: str = "float64",
    backend: BackendName = "numpy",
    members: int | None = None,
) -> list[Layer]:
    """Draw initial weights and biases, of one net or of many.

    Parameters
    ----------
    sizes : sequence of int
        Widths d_0, d_1, ..., d_L: inputs first, outputs last.
    rng : numpy.random.Generator, int or None
        As for numpy.random.default_rng. A generator is advanced; an int gives the same
        parameters every time.
    scheme : {"linear", "glorot", "he"}
        "linear", torch's default for nn.Linear: W and b uniform in ±1/sqrt(d_{l-1}).
        "glorot": W uniform in ±sqrt(6 / (d_{l-1} + d_l)), b zero (Glorot and Bengio, AISTATS
        2010), for sigmoid and tanh. "he": W normal with variance 2 / d_{l-1}, b zero (He et
        al., ICCV 2015), for relu and its relatives.
    dtype : str
        The floating dtype, by name. Draws are made in float64 and rounded, so the same seed
        gives the same net in every dtype.
    backend : str
        The library of the arrays.
    members : int, optional
        E, for E nets in one list. One after the other is drawn from the same generator, so the
        e-th is that of the e-th call with a generator.

    Returns
    -------
    list of Layer
        (W, b) per layer, shapes (d_l, d_{l-1}) and (d_l,); with members, E in front of both.

    Raises
    ------
    ValueError, TypeError
        Fewer than two sizes, sizes or members below 1 or not integers, unknown names.
    ImportError
        A backend that is not installed.

    Examples
    --------
    >>> from mlp_backprop import init_params
    >>> [W.shape for W, b in init_params([2, 10, 5, 1], rng=0)]
    [(10, 2), (5, 10), (1, 5)]
    >>> [W.shape for W, b in init_params([2, 10, 5, 1], rng=0, members=100)]
    [(100, 10, 2), (100, 5, 10), (100, 1, 5)]
    """
    draw = table_row("scheme", scheme, SCHEMES)
    widths = _checked_sizes(sizes)
    home = named_home(backend)
    name = check_dtype_of(home, dtype)
    n_members = 1 if members is None else _checked_count("members", members)
    drawing = generator(rng)
    nets = [
        [Layer(*draw(drawing, n_out, n_in)) for n_in, n_out in pairwise(widths)]
        for _ in range(n_members)
    ]
    drawn = nets[0] if members is None else stacked(np, nets)
    return home.place_params(read_params(drawn), name)


def _checked_sizes(sizes: Sequence[int]) -> list[int]:
    if not isinstance(sizes, Sequence | np.ndarray) or isinstance(sizes, str):
        raise TypeError(f"sizes must be a sequence of widths, got {type_name(sizes)}")
    if len(sizes) < 2:
        raise ValueError(f"sizes needs inputs and outputs at least, got {list(sizes)}")
    return [_checked_count(f"sizes[{l}]", width) for l, width in enumerate(sizes)]


def _checked_count(name: str, number: object) -> int:
    if isinstance(number, bool) or not isinstance(number, int | np.integer):
        raise TypeError(f"{name} must be an integer, got {number!r}")
    if number < 1:
        raise ValueError(f"{name} must be 1 or more, got {number}")
    return int(number)

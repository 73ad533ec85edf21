"""What a step of an optimizer is given: parameters, a gradient of their kind, a learning rate."""

from functools import lru_cache
from typing import Any

import numpy as np

from mlp_backprop.edge import kinds, numbers
from mlp_backprop.edge.arguments import (
    Location,
    check_same_dtype,
    common_dtype,
    common_home,
    dtype_name,
    read,
    read_params,
)
from mlp_backprop.types import Layer, Params, flat


def read_layers(params: Params, grads: Params) -> tuple[Location, list[Layer], list[Layer]]:
    """Where both are computed with, and their layers; `params` twice at the beginning."""
    key = kinds.of_layers(params)
    if key is not None and key == kinds.of_layers(grads) and _are_numpys(key):
        return Location(np, None), _as_layers(params), _as_layers(grads)
    layers, others = read_params(params), read_params(grads, "grads")
    home = common_home([*flat(layers), *flat(others)], None)
    shapes, came = ([tuple(a.array.shape) for a in flat(a)] for a in (layers, others))
    if shapes != came:
        raise ValueError(f"grads must have the shapes of params, {shapes}, got {came}")
    if not _fit(list(zip(shapes[::2], shapes[1::2], strict=True))):
        raise ValueError(
            "params must be W (d_l, d_{l-1}) and b (d_l,), with the same members in front of all, "
            f"got shapes {shapes}"
        )
    dtype = common_dtype(layers, home)
    check_same_dtype(flat(others), dtype, layers)
    return home, home.place_params(layers, dtype), home.place_params(others, dtype)


@lru_cache(maxsize=64)
def _are_numpys(key: kinds.Key) -> bool:
    """Whether layers of these kinds are computed with as they are."""
    dtypes = {dtype for layer in key for dtype in (layer[2], layer[5])}
    (dtype,) = dtypes if len(dtypes) == 1 else (np.dtype(object),)
    return (
        all(layer[0] is np.ndarray and layer[3] is np.ndarray for layer in key)
        and dtype.char in "efd"
        and dtype.isnative
        and _fit([(layer[1], layer[4]) for layer in key])
    )


def _fit(shapes: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether each b has a number for each row of its W, and all have the same axes in front."""
    in_front = shapes[0][1][:-1]
    return all(b != () and W[:-1] == b and b[:-1] == in_front for W, b in shapes)


def _as_layers(params: Any) -> list[Layer]:
    return [Layer(*pair) for pair in params]


def of_one_net(layers: list[Layer]) -> list[Layer]:
    """Those of the first member, for their shapes."""
    first = (0,) * (layers[0].b.ndim - 1)
    return [Layer(W[(*first, ...)], b[(*first, ...)]) for W, b in layers] if first else layers


def read_rate(rate: Any, home: Location, layers: list[Layer]) -> Any:
    """The learning rate as a float, or as an array that multiplies vectors (..., P)."""
    if numbers.is_number(rate):
        return numbers.real("learning_rate", rate, numbers.NOT_NEGATIVE)
    argument, members = read("learning_rate", rate), tuple(layers[0].b.shape[:-1])
    shape = tuple(argument.array.shape)
    if shape not in ((), members):
        one_each = f", or {members}, one for each member" if members else ""
        raise ValueError(f"learning_rate must be a number{one_each}; got shape {shape}")
    if argument.xp not in (np, home.xp):
        raise TypeError("learning_rate must be a number, or an array of NumPy or the parameters'")
    if argument.xp is np:  # looking at values on a device would wait for it
        for value in np.ravel(argument.array):
            numbers.real("learning_rate", value, numbers.NOT_NEGATIVE)
        if not shape:
            return float(argument.array)
    # NumPy's are of float64, as numbers are; none is rounded to half precision before it is used.
    is_double = home.xp is np or dtype_name(layers[0].W.dtype) == "float64"
    placed = home.place(argument, "float64" if is_double else "float32")
    return placed[..., None] if shape else placed

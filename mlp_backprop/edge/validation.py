"""From what a caller passes to a checked problem, or to an error; rules.py says what fits.

Nothing is computed, and nothing is copied to a device, before all of it is known to fit; the
maths behind this file never asks again. Nor does this file, of NumPy's arrays in a call like one
before: kinds.py knows it again, and what is left to look at are values.
"""

from itertools import combinations, pairwise
from operator import is_
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends, kinds, members
from mlp_backprop.edge.arguments import (
    Argument,
    Location,
    check_at_home,
    check_same_dtype,
    common_dtype,
    common_home,
    dtype_name,
    read,
    read_params,
)
from mlp_backprop.edge.rules import (
    ABSENT,
    check_inputs,
    check_layer_shapes,
    check_precision,
    check_target_values,
    check_values,
    check_weight_shape,
    check_weight_values,
    shape_of,
    table_rows,
)
from mlp_backprop.types import Array, Layer, Net, Params, flat


class Problem(NamedTuple):
    """All arguments of a function, checked and placed; y and weight only where it takes them.

    Of many nets, params have one more axis in front, and so has y: of length 1 if it is for all.
    """

    spec: Spec
    params: list[Layer]
    X: Array
    y: Array = None
    weight: Array | None = None

    @property
    def home(self) -> Location:
        """Where all of them are."""
        return Location(self.spec.xp, backends.device_of(self.spec.xp, self.X))

    @property
    def is_many(self) -> bool:
        """Whether params are those of many nets."""
        return bool(self.params[0].W.ndim == 3)


def network(
    params: Params,
    X: Array,
    activation: Any = None,
    backend: str | None = None,
    *,
    reduction: Any = "sum",
    sample_weight: Array | None = None,
    name: str = "X",
    many: bool = False,
) -> Problem:
    """Check the arguments of a function that has no targets, and so no loss."""
    names = activation, ABSENT, reduction, sample_weight, backend
    return problem(params, X, ABSENT, *names, name=name, many=many)


def problem(
    params: Params,
    X: Array,
    y: Array,
    activation: Any = None,
    loss: Any = None,
    reduction: Any = "mean",
    sample_weight: Array | None = None,
    backend: str | None = None,
    *,
    precision: Any = "float32",
    look_at_values: bool = True,
    name: str = "X",
    many: bool = False,
) -> Problem:
    """Check the arguments of a gradient; looking at values on a device waits for it.

    With `many`, the parameters may be those of many nets; such a call is never known again.
    """
    names = activation, loss, reduction, backend, precision
    targets = None if y is ABSENT else y
    key = kinds.of_call(params, X, targets, sample_weight, *names)
    known = kinds.seen.find(key)
    if known is not None:
        if look_at_values and (known.looks_at_y or sample_weight is not None):
            check_values(known.spec, targets, sample_weight)
        return Problem(known.spec, _as_layers(params), X, targets, sample_weight)
    checked = _checked(params, X, y, sample_weight, *names, look_at_values, name, many)
    if key is not None and not checked.is_many:
        given = [*flat(_as_layers(params)), X, targets, sample_weight]
        if all(map(is_, given, [*flat(checked.params), *checked[2:]])):  # nothing was converted
            kinds.seen.add(key, checked.spec)
    return checked


def _as_layers(params: Any) -> list[Layer]:
    """A list of its own, of parameters that are known to fit."""
    pairs = params.params if type(params) is Net else params
    return [pair if type(pair) is Layer else Layer(*pair) for pair in pairs]


def _checked(
    params: Params,
    X: Array,
    y: Array,
    sample_weight: Array | None,
    activation: Any,
    loss: Any,
    reduction: Any,
    backend: str | None,
    precision: Any,
    look_at_values: bool,
    name: str,
    many: bool,
) -> Problem:
    """The same, whatever the arguments are."""
    layers = _borrowed_layers(read_params(params), backend)
    rows, loss_row = table_rows(params, len(layers), activation, loss, reduction)
    inputs = borrowed(read(name, X), backend)
    targets = None if y is ABSENT else borrowed(read("y", y), backend)
    weight = sample_weight
    if weight is not None:
        weight = borrowed(read("sample_weight", weight), backend)
    data = [argument for argument in (inputs, targets, weight) if argument is not None]
    home = common_home([*flat(layers), *data], backend)
    E = members.count(layers, many)
    sizes = check_layer_shapes(members.first(layers, E))
    n = members.check_inputs(inputs, E, sizes[0])
    labels = targets is not None and members.check_targets(targets, loss_row, E, n, sizes[-1])
    dtype = common_dtype(layers, home)
    check_same_dtype([a for a in data if not (labels and a is targets)], dtype, layers)
    check_precision(precision, home, dtype, E)
    check_weight_shape(weight, n, reduction)
    if look_at_values:
        check_target_values(targets, loss_row, sizes[-1], labels)
        check_weight_values(weight, reduction)

    placed = home.place_params(layers, dtype)
    y = None if targets is None else home.place(targets, None if labels else dtype)
    return Problem(
        spec=Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row, reduction),
        params=placed,
        X=home.place(inputs, dtype),
        y=y if y is None or E is None else members.in_front(y, labels),
        weight=None if weight is None else home.place(weight, dtype),
    )


def specification(
    params: Params,
    activation: Any,
    loss: Any,
    reduction: Any,
    backend: str | None,
    *,
    precision: Any = "float32",
) -> Spec:
    """Check what is known before data comes: the parameters and the names."""
    layers = _borrowed_layers(read_params(params), backend)
    rows, loss_row = table_rows(params, len(layers), activation, loss, reduction)
    home = common_home(flat(layers), backend)
    sizes = check_layer_shapes(members.first(layers, members.count(layers, many=False)))
    dtype = common_dtype(layers, home)
    check_precision(precision, home, dtype)
    placed = home.place_params(layers, dtype)
    return Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row, reduction)


def check_out(out: Params, spec: Spec) -> list[Layer]:
    """The arrays that gradients shall be written to, once it is seen that they can be."""
    layers = read_params(out, "out")
    arrays = flat(layers)
    shapes = flat(((n_out, n_in), (n_out,)) for n_in, n_out in pairwise(spec.sizes))
    expected = f"out must be a list of (W, b), {described(spec)}"
    if len(arrays) != len(shapes):
        raise ValueError(f"{expected}; got {len(layers)} layers")
    for a, shape in zip(arrays, shapes, strict=True):
        kind = tuple(a.array.shape), a.xp, a.array.dtype, a.untyped
        if kind != (shape, spec.xp, spec.dtype, False):
            came = "list" if a.untyped else f"{backends.library_name(a.xp)} array"
            dtype = dtype_name(a.array.dtype)
            raise ValueError(f"{expected}; {a.name} is a {came} of {dtype}, {shape_of(a)}")
    if not all(backends.is_writeable(a.xp, a.array) for a in arrays):
        raise ValueError("out holds arrays that cannot be written to")
    for a in arrays:
        if backends.overlaps_itself(spec.xp, a.array):
            raise ValueError(
                f"{a.name} has several numbers in one place: each needs a place of its own"
            )
    for one, other in combinations(arrays, 2):
        if backends.share_memory(spec.xp, one.array, other.array):
            raise ValueError(
                f"{one.name} and {other.name} share memory: each gradient needs an array of its own"
            )
    return [Layer(W.array, b.array) for W, b in layers]


def described(spec: Spec) -> str:
    library, dtype = backends.library_name(spec.xp), dtype_name(spec.dtype)
    return f"{library} arrays of {dtype} for widths {'-'.join(map(str, spec.sizes))}"


# What comes beside a problem that is placed already ---------------------------------------------


def like_params(value: Params, name: str, problem: Problem, backend: str | None) -> list[Layer]:
    """What must have the structure of the parameters."""
    of_value = kinds.of_layers(value) if problem.spec.xp is np else None
    if of_value is not None and of_value == kinds.of_layers(problem.params):
        return _as_layers(value)
    layers = _borrowed_layers(read_params(value, name), backend)
    shapes = [tuple(a.array.shape) for a in flat(layers)]
    expected = [tuple(A.shape) for A in flat(problem.params)]
    if shapes != expected:
        raise ValueError(f"{name} must have the shapes of params, {expected}, got {shapes}")
    return problem.home.place_params(layers, _checked_dtype(flat(layers), problem, backend))


def like_outputs(value: Array, name: str, problem: Problem, backend: str | None) -> Array:
    """An array (n, d_L)."""
    expected = (problem.X.shape[0], problem.spec.sizes[-1])
    if _is_in_place(value, expected, problem):
        return value
    argument = borrowed(read(name, value), backend)
    if tuple(argument.array.shape) != expected:
        raise ValueError(
            f"{name} must have the shape of the outputs, {expected}, got {shape_of(argument)}"
        )
    return _placed(argument, problem, backend)


def like_inputs(value: Array, name: str, problem: Problem, backend: str | None) -> Array:
    """Other inputs of the same net."""
    argument = borrowed(read(name, value), backend)
    check_inputs(argument, problem.spec.sizes[0])
    return _placed(argument, problem, backend)


def of_shape(
    value: Array, name: str, shape: tuple[int, ...], problem: Problem, backend: str | None
) -> Array:
    """An array of this shape."""
    if _is_in_place(value, shape, problem):
        return value
    argument = borrowed(read(name, value), backend)
    if tuple(argument.array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, got {shape_of(argument)}")
    return _placed(argument, problem, backend)


def _is_in_place(value: Any, shape: tuple[int, ...], problem: Problem) -> bool:
    """The quick look, for NumPy's own arrays."""
    return (
        type(value) is np.ndarray
        and problem.spec.xp is np
        and value.shape == shape
        and bool(value.dtype == problem.spec.dtype)
    )


def _placed(argument: Argument, problem: Problem, backend: str | None) -> Array:
    return problem.home.place(argument, _checked_dtype([argument], problem, backend))


def _checked_dtype(arguments: list[Argument], problem: Problem, backend: str | None) -> str:
    """The name of the problem's dtype, once all are seen to be where it is, and of that dtype."""
    dtype = dtype_name(problem.spec.dtype)
    check_at_home(problem.home, arguments, backend)
    check_same_dtype(arguments, dtype)
    return dtype


def borrowed(argument: Argument, backend: str | None) -> Argument:
    """The argument, or the same memory as an array of the backend's library."""
    array = backends.borrowed(argument.array, backend)
    return argument if array is argument.array else read(argument.name, array)


def _borrowed_layers(layers: list[Layer], backend: str | None) -> list[Layer]:
    return [Layer(borrowed(W, backend), borrowed(b, backend)) for W, b in layers]

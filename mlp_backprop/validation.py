"""What a caller may pass: names, shapes and values, each refused with what to do instead.

Nothing is computed, and nothing is copied to a device, before all of it is known to fit; the
maths behind this file never asks again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlp_backprop import namespaces
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.arguments import (
    Argument,
    Home,
    check_same_dtype,
    common_dtype,
    common_home,
    dtype_name,
    read,
    read_params,
    table_row,
    type_name,
)
from mlp_backprop.backprop import Activations, Spec
from mlp_backprop.losses import LOSSES, Loss
from mlp_backprop.types import Array, Layer, Namespace, Params, flat

REDUCTIONS = {"mean": "divided by the sum of the weights", "sum": "not divided"}

# What backend "cupy" may do with the factors of a product of float32 arrays; sums are in float32.
PRECISIONS = {
    "float32": "split over tensor cores, where the result stays as accurate as float32",
    "float32_exact": "nothing: float32 arithmetic",
    "tf32": "round them to 11 bits",
    "bfloat16": "round them to 8 bits",
}


class Network(NamedTuple):
    """A net and its inputs, checked and placed."""

    xp: Namespace
    activations: Activations
    params: list[Layer]
    X: Array


class Problem(NamedTuple):
    """All arguments of a gradient, checked and placed."""

    spec: Spec
    params: list[Layer]
    X: Array
    y: Array
    weight: Array | None


def network(
    params: Params, X: Array, *, activation: Any, backend: str | None, name: str = "X"
) -> Network:
    """Check the arguments of a forward pass."""
    layers = _shared_layers(read_params(params), backend)
    inputs = shared(read(name, X), backend)
    rows = activation_rows(activation, len(layers))
    home = common_home([*flat(layers), inputs], backend)
    check_layer_shapes(layers)
    check_inputs(inputs, layers)
    dtype = common_dtype(layers, home)
    check_same_dtype([inputs], dtype)
    return Network(home.xp, rows, home.place_params(layers, dtype), home.place(inputs, dtype))


def problem(
    params: Params,
    X: Array,
    y: Array,
    *,
    activation: Any,
    loss: Any,
    reduction: Any,
    sample_weight: Array | None,
    backend: str | None,
    precision: Any = "float32",
    look_at_values: bool = True,
) -> Problem:
    """Check the arguments of a gradient; looking at values on a device waits for it."""
    layers = _shared_layers(read_params(params), backend)
    rows, loss_row = table_rows(len(layers), activation, loss, reduction)
    inputs, targets = shared(read("X", X), backend), shared(read("y", y), backend)
    weight = None
    if sample_weight is not None:
        weight = shared(read("sample_weight", sample_weight), backend)

    data = [inputs, targets] if weight is None else [inputs, targets, weight]
    home = common_home([*flat(layers), *data], backend)
    sizes = check_layer_shapes(layers)
    n = check_inputs(inputs, layers)
    labels = check_target_shape(targets, loss_row, n, sizes[-1])
    dtype = common_dtype(layers, home)
    check_same_dtype([a for a in data if not (labels and a is targets)], dtype)
    check_precision(precision, home, dtype)
    check_weight_shape(weight, n, reduction)
    if look_at_values:
        check_target_values(targets, loss_row, sizes[-1])
        check_weight_values(weight, reduction)

    placed = home.place_params(layers, dtype)
    return Problem(
        spec=Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row),
        params=placed,
        X=home.place(inputs, dtype),
        y=home.place(targets, None if labels else dtype),
        weight=None if weight is None else home.place(weight, dtype),
    )


def specification(
    params: Params,
    *,
    activation: Any,
    loss: Any,
    reduction: Any,
    backend: str | None,
    precision: Any = "float32",
) -> Spec:
    """Check what is known before data comes: the parameters and the names."""
    layers = _shared_layers(read_params(params), backend)
    rows, loss_row = table_rows(len(layers), activation, loss, reduction)
    home = common_home(flat(layers), backend)
    sizes = check_layer_shapes(layers)
    dtype = common_dtype(layers, home)
    check_precision(precision, home, dtype)
    placed = home.place_params(layers, dtype)
    return Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row)


def like_params(value: Params, name: str, params: list[Layer], backend: str | None) -> list[Layer]:
    """Check and place what must have the structure of parameters that are placed already."""
    layers = _shared_layers(read_params(value, name), backend)
    shapes = [tuple(a.array.shape) for a in flat(layers)]
    expected = [tuple(A.shape) for A in flat(params)]
    if shapes != expected:
        raise ValueError(f"{name} must have the shapes of params, {expected}, got {shapes}")
    placed = iter(placed_like(flat(layers), read("params", params[0].W), backend))
    return [Layer(W, b) for W, b in zip(placed, placed, strict=True)]


def like_outputs(value: Array, name: str, X: Array, params: list[Layer], backend: Any) -> Array:
    """Check and place an array (n, d_L), beside inputs and parameters that are placed already."""
    argument = shared(read(name, value), backend)
    expected = (X.shape[0], params[-1].b.shape[0])
    if tuple(argument.array.shape) != expected:
        raise ValueError(
            f"{name} must have the shape of the outputs, {expected}, got {_shape(argument)}"
        )
    return placed_like([argument], read("params", X), backend)[0]


def placed_like(arguments: list[Argument], like: Argument, backend: str | None) -> list[Array]:
    """In the library and dtype and on the device of an array that is placed already."""
    dtype = dtype_name(like.array.dtype)
    home = common_home([like, *arguments], backend)
    check_same_dtype(arguments, dtype)
    return [home.place(argument, dtype) for argument in arguments]


def shared(argument: Argument, backend: str | None) -> Argument:
    """The argument, or the same memory as an array of the backend's library."""
    array = namespaces.shared(argument.array, backend)
    return argument if array is argument.array else read(argument.name, array)


def _shared_layers(layers: list[Layer], backend: str | None) -> list[Layer]:
    return [Layer(shared(W, backend), shared(b, backend)) for W, b in layers]


def table_rows(
    n_layers: int, activation: Any, loss: Any, reduction: Any
) -> tuple[Activations, Loss]:
    """The rows that the names stand for."""
    rows = activation_rows(activation, n_layers)
    loss_row = table_row("loss", loss, LOSSES)
    check_output_activation(loss_row, rows)
    table_row("reduction", reduction, REDUCTIONS)
    return rows, loss_row


def activation_rows(activation: object, n_layers: int) -> Activations:
    """One row per layer: a single name is for the hidden layers, before an identity output."""
    if isinstance(activation, str):
        hidden = table_row("activation", activation, ACTIVATIONS)
        return (hidden,) * (n_layers - 1) + (ACTIVATIONS["identity"],)
    if not isinstance(activation, Sequence):
        raise TypeError(
            "activation must be a name or a sequence of names, one per layer, "
            f"got {type_name(activation)}"
        )
    if len(activation) != n_layers:
        raise ValueError(
            f"activation names {len(activation)} layers, params has {n_layers}; a sequence has "
            "one name for every layer, the output layer included"
        )
    return tuple(table_row("activation", name, ACTIVATIONS) for name in activation)


def check_output_activation(loss: Loss, activations: Activations) -> None:
    if loss.takes_logits and activations[-1].name != "identity":
        raise ValueError(
            f"loss {loss.name!r} takes logits, so the output activation must be 'identity', got "
            f"{activations[-1].name!r}: the loss applies its own link"
        )


def check_layer_shapes(layers: list[Layer]) -> tuple[int, ...]:
    """The widths d_0, ..., d_L, once every W and b is seen to fit its neighbours."""
    sizes: list[int] = []
    for l, (W, b) in enumerate(layers, 1):
        if W.array.ndim != 2 or b.array.ndim != 1:
            raise ValueError(
                f"layer {l} needs W of shape (d_{l}, d_{l - 1}) and b of shape (d_{l},), "
                f"got {_shape(W)} and {_shape(b)}"
            )
        (n_out, n_in), (n_bias,) = W.array.shape, b.array.shape
        if min(n_out, n_in) == 0:
            raise ValueError(f"layer {l} has width 0: W has shape {_shape(W)}")
        below = sizes[-1] if sizes else n_in
        if (n_out, n_in) != (n_bias, below):
            raise ValueError(_layer_mismatch(l, n_out, n_in, n_bias, below))
        if not sizes:
            sizes.append(n_in)
        sizes.append(n_out)
    return tuple(sizes)


def _layer_mismatch(l: int, n_out: int, n_in: int, n_bias: int, below: int) -> str:
    # For layer 1 the width below is W's own; then b alone tells whether W is transposed.
    if n_out != n_bias and n_in == n_bias and (l == 1 or n_out == below):
        return (
            f"W of layer {l} has shape ({n_out}, {n_in}) and its b has length {n_bias}: it would "
            "fit transposed; pass W.T, one row per output as in torch's nn.Linear"
        )
    if n_out != n_bias:
        return f"b of layer {l} has length {n_bias}, its W has {n_out} rows"
    return (
        f"W of layer {l} has shape ({n_out}, {n_in}), so layer {l - 1} should have {n_in} "
        f"outputs; it has {below}"
    )


def check_inputs(X: Argument, layers: list[Layer]) -> int:
    """The number of samples, once X is seen to fit the first layer."""
    n_in, name = layers[0].W.array.shape[1], X.name
    if X.array.ndim != 2:
        one = f"; {name}[None, :] for one sample, {name}[:, None] for one feature"
        raise ValueError(
            f"{name} must have two dimensions, (n, {n_in}): one row per sample; got {_shape(X)}"
            + (one if X.array.ndim == 1 else "")
        )
    n, width = X.array.shape
    if width != n_in:
        hint = f"; {name} would fit transposed: pass {name}.T" if n == n_in else ""
        raise ValueError(f"{name} has {width} columns, W of layer 1 takes {n_in} inputs{hint}")
    return int(n)


def check_target_shape(y: Argument, loss: Loss, n: int, width: int) -> bool:
    """Whether y holds class indices (n,), once its shape is seen to fit the outputs."""
    shape = tuple(y.array.shape)
    if loss.targets == "class" and shape == (n,):
        if y.is_floating and not (y.weak and n == 0):
            raise TypeError(
                f"y has shape ({n},) and dtype {y.array.dtype}: class indices must "
                f"be integers; weights per class have shape ({n}, {width})"
            )
        return True
    if shape == (n, width):
        return False
    expected = f"({n}, {width})" + (f" or ({n},)" if loss.targets == "class" else "")
    fix = ""
    if shape == (n,) and width == 1:
        fix = "; pass y[:, None], it is never broadcast"
    elif shape == (n, 1) and loss.targets == "class":
        fix = "; class indices: pass y[:, 0]"
    elif len(shape) and shape[0] != n:
        fix = f"; X has {n} rows, y has {shape[0]}"
    raise ValueError(f"y must have shape {expected} for loss {loss.name!r}, got {shape}{fix}")


def _shape(argument: Argument) -> str:
    return str(tuple(argument.array.shape))


def check_target_values(y: Argument, loss: Loss, width: int) -> None:
    """Class indices below the width, probabilities between 0 and 1; nan passes."""
    if loss.targets == "class" and y.array.ndim == 1 and y.array.shape[0]:
        # A narrow integer type may not be able to hold the width it is compared with.
        limit = min(width - 1, y.xp.iinfo(y.array.dtype).max)
        _refuse(y, (y.array < 0) | (y.array > limit), f"class indices from 0 to {width - 1}")
    if loss.targets == "probability":
        _refuse(y, (y.array < 0) | (y.array > 1), "probabilities from 0 to 1")


def check_weight_shape(weight: Argument | None, n: int, reduction: str) -> None:
    """Weights (n,); a mean over no rows is refused."""
    if weight is not None and tuple(weight.array.shape) != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {_shape(weight)}")
    if n == 0 and reduction == "mean":
        raise ValueError("X has no rows: a mean over none is undefined; use reduction='sum'")


def check_weight_values(weight: Argument | None, reduction: str) -> None:
    """Not negative, and not all zero if a mean is divided by their sum."""
    if weight is None:
        return
    _refuse(weight, weight.array < 0, "weights that are not negative")
    if reduction == "mean" and bool(weight.xp.all(weight.array == 0)):
        raise ValueError(
            "the sample weights are all zero: a mean is divided by their sum; use reduction='sum'"
        )


def check_precision(precision: object, home: Home, dtype: str) -> None:
    """A name of PRECISIONS; any but the default is for float32 on backend "cupy" alone."""
    table_row("precision", precision, PRECISIONS)
    library = namespaces.library_name(home.xp)
    if precision != "float32" and (library, dtype) != ("cupy", "float32"):
        raise ValueError(
            f"precision={precision!r} is for float32 arrays under backend 'cupy'; these are "
            f"{library} arrays of {dtype}, computed in {dtype}: leave precision out"
        )


def _refuse(argument: Argument, bad: Array, expected: str) -> None:
    xp = argument.xp
    if not bool(xp.any(bad)):
        return
    where = tuple(int(i[0]) for i in xp.nonzero(bad))
    value = float(argument.array[where])
    place = ", ".join(map(str, where))
    raise ValueError(f"{argument.name} must hold {expected}, got {value:g} at [{place}]")

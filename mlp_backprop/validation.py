"""What a caller may pass: names, shapes and values, each refused with what to do instead.

Nothing is computed, and nothing is copied to a device, before all of it is known to fit; the
maths behind this file never asks again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.arguments import (
    Argument,
    check_same_dtype,
    common_dtype,
    common_home,
    read,
    read_params,
    table_row,
    type_name,
)
from mlp_backprop.backprop import Activations, Spec
from mlp_backprop.losses import LOSSES, Loss
from mlp_backprop.types import Array, Layer, Namespace, Params, flat

REDUCTIONS = {"mean": "divided by the sum of the weights", "sum": "not divided"}


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


def network(params: Params, X: Array, *, activation: Any, backend: str | None) -> Network:
    """Check the arguments of a forward pass."""
    layers = read_params(params)
    inputs = read("X", X)
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
) -> Problem:
    """Check the arguments of a gradient."""
    layers = read_params(params)
    rows, loss_row = table_rows(len(layers), activation, loss, reduction)
    inputs, targets = read("X", X), read("y", y)
    weight = None if sample_weight is None else read("sample_weight", sample_weight)

    data = [inputs, targets] if weight is None else [inputs, targets, weight]
    home = common_home([*flat(layers), *data], backend)
    sizes = check_layer_shapes(layers)
    n = check_inputs(inputs, layers)
    labels = check_target_shape(targets, loss_row, n, sizes[-1])
    dtype = common_dtype(layers, home)
    check_same_dtype([a for a in data if not (labels and a is targets)], dtype)
    check_target_values(targets, loss_row, sizes[-1])
    check_weights(weight, n, reduction)

    placed = home.place_params(layers, dtype)
    return Problem(
        spec=Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row),
        params=placed,
        X=home.place(inputs, dtype),
        y=home.place(targets, None if labels else dtype),
        weight=None if weight is None else home.place(weight, dtype),
    )


def specification(
    params: Params, *, activation: Any, loss: Any, reduction: Any, backend: str | None
) -> Spec:
    """Check what is known before data comes: the parameters and the names."""
    layers = read_params(params)
    rows, loss_row = table_rows(len(layers), activation, loss, reduction)
    home = common_home(flat(layers), backend)
    sizes = check_layer_shapes(layers)
    placed = home.place_params(layers, common_dtype(layers, home))
    return Spec(home.xp, sizes, placed[0].W.dtype, rows, loss_row)


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
    n_in = layers[0].W.array.shape[1]
    if X.array.ndim != 2:
        fix = "; X[None, :] for one sample, X[:, None] for one feature" if X.array.ndim == 1 else ""
        raise ValueError(
            f"X must have two dimensions, (n, {n_in}): one row per sample; got {_shape(X)}{fix}"
        )
    n, width = X.array.shape
    if width != n_in:
        hint = "; X would fit transposed: pass X.T" if n == n_in else ""
        raise ValueError(f"X has {width} columns, W of layer 1 takes {n_in} inputs{hint}")
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


def check_weights(weight: Argument | None, n: int, reduction: str) -> None:
    """Weights (n,), not negative; a mean over nothing is refused."""
    if weight is None:
        if n == 0 and reduction == "mean":
            raise ValueError("X has no rows: a mean over none is undefined; use reduction='sum'")
        return
    if tuple(weight.array.shape) != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {_shape(weight)}")
    _refuse(weight, weight.array < 0, "weights that are not negative")
    if reduction == "mean" and bool(weight.xp.all(weight.array == 0)):
        raise ValueError(
            "the sample weights are all zero: a mean is divided by their sum; use reduction='sum'"
        )


def _refuse(argument: Argument, bad: Array, expected: str) -> None:
    xp = argument.xp
    if not bool(xp.any(bad)):
        return
    where = tuple(int(i[0]) for i in xp.nonzero(bad))
    value = float(argument.array[where])
    place = ", ".join(map(str, where))
    raise ValueError(f"{argument.name} must hold {expected}, got {value:g} at [{place}]")

"""What fits: names of the tables, shapes beside each other, values in their range.

Every refusal says what was expected, what came, and what to do.
"""

from collections.abc import Sequence
from typing import Any

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Activations, Spec
from mlp_backprop.edge import backends
from mlp_backprop.edge.arguments import FLOATING, Argument, Location, table_row, type_name
from mlp_backprop.losses import LOSSES, Loss
from mlp_backprop.types import Array, Layer, Net

REDUCTIONS = {"mean": "divided by the sum of the weights", "sum": "not divided"}

# What backend "cupy" may do with the factors of a product of float32 arrays; sums are in float32.
PRECISIONS = {
    "float32": "split over tensor cores, where the result stays as accurate as float32",
    "float32_exact": "nothing: float32 arithmetic",
    "tf32": "round them to 11 bits",
    "bfloat16": "round them to 8 bits",
}


ABSENT = object()  # in the place of targets and loss; None may be a caller's mistake


def table_rows(
    params: object, n_layers: int, activation: Any, loss: Any, reduction: Any
) -> tuple[Activations, Any]:
    """The rows that the names stand for: those of a Net, those given, or the defaults."""
    net = params if isinstance(params, Net) else Net(())
    rows = activation_rows(net.activation if activation is None else activation, n_layers)
    if net is params and rows != activation_rows(net.activation, n_layers):
        raise _said_otherwise("activation", activation, net.activation)
    table_row("reduction", reduction, REDUCTIONS)
    if loss is ABSENT:
        return rows, None
    loss_row = table_row("loss", net.loss if loss is None else loss, LOSSES)
    if net is params and loss_row.name != net.loss:
        raise _said_otherwise("loss", loss, net.loss)
    check_output_activation(loss_row, rows)
    return rows, loss_row


def _said_otherwise(what: str, given: object, own: object) -> ValueError:
    return ValueError(
        f"{what}={given!r} was passed with a Net whose {what} is {own!r}: leave it out, or pass "
        f"net._replace({what}={given!r})"
    )


def activation_rows(activation: object, n_layers: int) -> Activations:
    """One row per layer: a single name is for the hidden layers, before an identity output."""
    if isinstance(activation, str):
        hidden = table_row("activation", activation, ACTIVATIONS)
        return (hidden,) * (n_layers - 1) + (ACTIVATIONS["identity"],)
    if not isinstance(activation, Sequence) or isinstance(activation, bytes):
        ways = [way for way in ("decode", "tolist") if hasattr(activation, way)]
        raise TypeError(
            "activation must be a name or a sequence of names, one per layer, "
            f"got {type_name(activation)}" + "".join(f": pass activation.{way}()" for way in ways)
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
                f"got {shape_of(W)} and {shape_of(b)}"
            )
        (n_out, n_in), (n_bias,) = W.array.shape, b.array.shape
        if min(n_out, n_in) == 0:
            raise ValueError(f"layer {l} has width 0: W has shape {shape_of(W)}")
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


def check_inputs(X: Argument, n_in: int) -> int:
    """The number of samples, once X is seen to fit the first layer."""
    name = X.name
    if X.array.ndim != 2:
        one = f"; {name}[None, :] for one sample, {name}[:, None] for one feature"
        raise ValueError(
            f"{name} must have two dimensions, (n, {n_in}): one row per sample; got {shape_of(X)}"
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
        if y.is_floating and not (y.untyped and n == 0):
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


def shape_of(argument: Argument) -> str:
    return str(tuple(argument.array.shape))


def check_target_values(
    y: Argument | None, loss: Loss, width: int, labels: bool | None = None
) -> None:
    """Class indices below the width, class weights and probabilities in range; nan passes."""
    if y is None:
        return
    labels = y.array.ndim == 1 if labels is None else labels
    if loss.targets == "class" and labels and y.array.shape[-1]:
        # A narrow integer type may not be able to hold the width it is compared with.
        limit = min(width - 1, y.xp.iinfo(y.array.dtype).max)
        _refuse(y, (y.array < 0) | (y.array > limit), f"class indices from 0 to {width - 1}")
    if loss.targets == "class" and not labels:
        _refuse(y, y.array < 0, "weights per class that are not negative")
    if loss.targets == "probability":
        _refuse(y, (y.array < 0) | (y.array > 1), "probabilities from 0 to 1")


def check_weight_shape(weight: Argument | None, n: int, reduction: str) -> None:
    """Weights (n,); a mean over no rows is refused."""
    if weight is not None and tuple(weight.array.shape) != (n,):
        raise ValueError(f"sample_weight must have shape ({n},), got {shape_of(weight)}")
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


def check_values(spec: Spec, y: Array | None, weight: Array | None) -> None:
    """Both, of arrays with which it is computed."""
    if y is not None:
        check_target_values(Argument("y", y, spec.xp), spec.loss, spec.sizes[-1])
    if weight is not None:
        check_weight_values(Argument("sample_weight", weight, spec.xp), spec.reduction)


def check_precision(
    precision: object, home: Location, dtype: str, n_members: int | None = None
) -> None:
    """A name of PRECISIONS; any but the default is for float32 on backend "cupy" alone."""
    if precision == "float32":
        return
    if isinstance(precision, str) and precision in {*FLOATING} - {*PRECISIONS}:
        raise ValueError(
            f"precision={precision!r}: everything is computed in the dtype of the parameters, here "
            f"{dtype}; init_params(..., dtype={precision!r}) makes others. precision is for "
            f"products of float32 on a GPU: {', '.join(PRECISIONS)}"
        )
    table_row("precision", precision, PRECISIONS)
    library = backends.library_name(home.xp)
    if (library, dtype) != ("cupy", "float32"):
        raise ValueError(
            f"precision={precision!r} is for float32 arrays under backend 'cupy'; these are "
            f"{library} arrays of {dtype}, computed in {dtype}: leave precision out"
        )
    if n_members is not None and precision != "float32_exact":
        raise ValueError(
            f"precision={precision!r} is for one net; {n_members} in one call are computed in "
            "float32: leave precision out"
        )


def _refuse(argument: Argument, bad: Array, expected: str) -> None:
    xp = argument.xp
    found = xp.any(bad)
    if backends.transform_of(found) is not None:
        raise TypeError(
            f"{argument.name} must hold {expected}, and inside {backends.JIT} there are no values "
            "to look at yet: call this outside of it"
        )
    if not bool(found):
        return
    where = tuple(int(i[0]) for i in xp.nonzero(bad))
    value = float(argument.array[where])
    place = ", ".join(map(str, where))
    raise ValueError(f"{argument.name} must hold {expected}, got {value:g} at [{place}]")

"""Arguments of many nets: parameters with one more axis in front, data for all or each its own."""

from typing import Any

from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_inputs as check_own_inputs
from mlp_backprop.edge.rules import check_target_shape, shape_of
from mlp_backprop.losses import Loss
from mlp_backprop.types import Array, Layer


def count(layers: list[Layer], many: bool) -> int | None:
    """E, once all W are seen to be (E, d_l, d_{l-1}) and all b (E, d_l); None for one net."""
    n_axes = [(W.array.ndim, b.array.ndim) for W, b in layers]
    if n_axes[0] != (3, 2):
        return None
    E = int(layers[0].W.array.shape[0])
    for l, (W, b) in enumerate(layers, 1):
        if n_axes[l - 1] != (3, 2) or {W.array.shape[0], b.array.shape[0]} != {E}:
            raise ValueError(
                f"layer {l} needs W of shape ({E}, d_{l}, d_{l - 1}) and b of shape ({E}, d_{l}), "
                f"since W of layer 1 is of {E} nets; got {shape_of(W)} and {shape_of(b)}"
            )
    if not many:
        raise ValueError(
            f"this function takes one net, and {layers[0].W.name} has shape "
            f"{shape_of(layers[0].W)}, that of {E} nets: unstack_params gives them one by one"
        )
    if E == 0:
        raise ValueError("params are those of 0 nets: stack_params makes them of one or more")
    return E


def first(layers: list[Layer], E: int | None) -> list[Layer]:
    """The first member, which has the shapes of all."""
    return layers if E is None else [Layer(_first(W), _first(b)) for W, b in layers]


def _first(argument: Argument) -> Argument:
    return argument._replace(array=argument.array[0, ...])


def check_inputs(X: Argument, E: int | None, n_in: int) -> int:
    """The number of samples, once X is seen to be (n, d_0), or (E, n, d_0)."""
    if E is None or X.array.ndim != 3:
        return check_own_inputs(X, n_in)
    _check_count(X, E, f"(n, {n_in})")
    return check_own_inputs(_first(X), n_in)


def check_targets(y: Argument, loss: Loss, E: int | None, n: int, width: int) -> bool:
    """Whether y holds class indices, for all or with E in front, once its shape is seen to fit."""
    shape, classes = tuple(y.array.shape), loss.targets == "class"
    if E is None:
        return check_target_shape(y, loss, n, width)
    is_table = shape == (n, width)
    if classes and is_table and shape == (E, n) and (y.untyped or not y.is_floating):
        raise ValueError(
            f"y of shape {shape} may be {E} nets' class indices, or weights per class for all: "
            f"pass weights as floating numbers, class indices of each net as weights {(E, *shape)}"
        )
    if len(shape) == 3 or (classes and len(shape) == 2 and not is_table):
        _check_count(y, E, f"({n}, {width})" + (f" or ({n},)" if classes else ""))
        return check_target_shape(_first(y), loss, n, width)
    return check_target_shape(y, loss, n, width)


def _check_count(argument: Argument, E: int, shape: str) -> None:
    if argument.array.shape[0] != E:
        raise ValueError(
            f"{argument.name} must have shape {shape} for all nets, or {E} in front of it, since "
            f"params are those of {E} nets; got {shape_of(argument)}"
        )


def in_front(y: Array, labels: bool) -> Any:
    """Targets with an axis of members: of length 1 if they are for all."""
    return y[None, ...] if y.ndim == (1 if labels else 2) else y

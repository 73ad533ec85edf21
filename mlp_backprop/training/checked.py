"""What a caller of `train` may pass: everything is looked at before the first step."""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from numbers import Real
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge import backends, numbers, validation
from mlp_backprop.edge.arguments import read, table_row, type_name
from mlp_backprop.engines.orders import MOST_SEED, NO_EPOCH, permutation
from mlp_backprop.maths.optimizers import Optimizer
from mlp_backprop.maths.runs import Task
from mlp_backprop.nets.vectors import ravel
from mlp_backprop.training import schedules
from mlp_backprop.training.lbfgs import LBFGS
from mlp_backprop.training.optimizers import OPTIMIZERS
from mlp_backprop.types import Array, Layer, Net

FULL_BATCHES = ("rprop", "lbfgs")

AVERAGES = {
    "ema": "of all steps, of which the last thousand or so count most",
    "swa": "of the ends of the last quarter of the epochs",
}


class Data(NamedTuple):
    """What is trained on which rows: checked, placed, and asked for sums."""

    spec: Spec
    vector: Array  # (E, P), a copy
    is_one: bool  # one net, whose results have no axis of members
    X: Array
    y: Array
    weight: Array | None
    names: tuple[Any, Any]  # activation and loss, for the Net that comes back

    @property
    def n_members(self) -> int:
        return int(self.vector.shape[0])


def data_of(
    params: Any,
    X: Any,
    y: Any,
    weight: Any,
    activation: Any,
    loss: Any,
    backend: Any,
    precision: Any,
    allow_nan: bool,
) -> Data:
    """The arrays; the parameters are copied."""
    spec, layers, X, y, weight = validation.problem(
        params, X, y, activation, loss, "mean", weight, backend, precision=precision, many=True
    )
    net = params if isinstance(params, Net) else Net(())
    names = net.activation if activation is None else activation, spec.loss.name
    vector, is_one = ravel(spec.xp, layers), layers[0].W.ndim == 2
    vector = vector[None, :] if is_one else vector
    y = y if is_one or y.shape[0] > 1 else y[0, ...]
    if not allow_nan:
        check_finite(spec, "X", X)
        check_finite(spec, "y", y)
    return Data(spec._replace(reduction="sum"), vector, is_one, X, y, weight, names)


def check_finite(spec: Spec, name: str, A: Array) -> None:
    """No nan and no inf: the loss would be one, and the run over."""
    xp = spec.xp
    if not xp.isdtype(A.dtype, "real floating"):
        return
    if bool(xp.isfinite(xp.sum(A))):  # the usual case, which takes no memory
        return
    rows = xp.reshape(A, (-1, A.shape[-1]))
    bad = ~xp.all(xp.isfinite(rows), axis=1)
    if bool(xp.any(bad)):  # else the sum was too large
        row = int(xp.argmax(xp.astype(bad, xp.uint8))) % A.shape[-2]
        raise ValueError(
            f"{name} holds nan or inf, first in row {row}: leave such rows out, or fill them; "
            "allow_nan=True trains on them, and ends as the loss is no longer finite"
        )


# Numbers ------------------------------------------------------------------------------------------


def limit(name: str, value: Any) -> float | None:
    """A positive number, or None for no limit."""
    return None if value is None else numbers.real(name, value, numbers.POSITIVE)


def batch_size_of(value: Any, optimizer: Optimizer, data: Data) -> int:
    """At most all rows; those optimizers that compare one step with the next take all of them."""
    n, size = int(data.X.shape[-2]), numbers.whole("batch_size", value, 1)
    return n if optimizer.name in FULL_BATCHES else min(size, n)


def patience_of(value: Any, validation: Any) -> int | None:
    if value is None:
        return None
    if validation is None:
        raise ValueError(
            "patience waits for the validation loss to get better: pass validation=, "
            "a fraction such as 0.1 or a pair (X, y)"
        )
    return numbers.whole("patience", value, 1)


def average_of(name: Any) -> str:
    if name is None:
        return ""
    table_row("weight_average", name, AVERAGES)
    return str(name)


# Members ------------------------------------------------------------------------------------------


def seeds_of(seed: Any, data: Data) -> tuple[int, ...]:
    """One for each member."""
    if isinstance(seed, Sequence | np.ndarray) and not isinstance(seed, str):
        if data.is_one or len(seed) != data.n_members:
            have = "one net" if data.is_one else f"{data.n_members} members"
            raise ValueError(f"seed has {len(seed)} entries for {have}: pass an integer for all")
        return tuple(_seed(f"seed[{e}]", value) for e, value in enumerate(seed))
    return (_seed("seed", seed),) * data.n_members


def _seed(name: str, value: Any) -> int:
    seed = numbers.whole(name, value)
    if seed > MOST_SEED:
        raise ValueError(f"{name} must be below 2**64, got {seed}")
    return seed


def rows_of(rows: Any, data: Data) -> tuple[Array, ...] | None:
    """The numbers of each member's rows, int64."""
    if rows is None:
        return None
    n = int(data.X.shape[-2])
    if data.is_one:
        return (_row_numbers("rows", rows, n),)
    if not isinstance(rows, Sequence | np.ndarray) or len(rows) != data.n_members:
        raise ValueError(
            f"rows must have an array of row numbers for each of {data.n_members} members"
        )
    return tuple(_row_numbers(f"rows[{e}]", own, n) for e, own in enumerate(rows))


def _row_numbers(name: str, rows: Any, n: int) -> Array:
    own = np.asarray(rows)
    if own.ndim != 1 or (own.size and own.dtype.kind not in "iu"):
        raise TypeError(
            f"{name} must be numbers of rows: a one-dimensional array of integers, got "
            f"{own.dtype} of shape {own.shape}; np.flatnonzero(mask) makes them of a mask"
        )
    if not len(own):
        raise ValueError(f"{name} names no row")
    for number in (own.min(), own.max()):
        if not 0 <= number < n:
            raise ValueError(f"{name} must name rows from 0 to {n - 1}, got {number}")
    return own.astype(np.int64)


# The optimizer and its rates ----------------------------------------------------------------------


def optimizer_row(optimizer: Any) -> Optimizer:
    """A row of the table, by its name or as it is."""
    if isinstance(optimizer, str):
        row: Optimizer = table_row("optimizer", optimizer, OPTIMIZERS | {"lbfgs": LBFGS()})
        return row
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer must be a name ({', '.join(OPTIMIZERS)}, lbfgs) or a row of "
            f"mlp_backprop.optimizers such as Adam(), got {type_name(optimizer)}"
        )
    return optimizer


def check_fits(optimizer: Optimizer, **options: Any) -> None:
    """What L-BFGS has no use for, since its line search finds the steps, is not passed over."""
    for name, value in options.items():
        if value is not None and optimizer.name == "lbfgs":
            raise ValueError(f"optimizer='lbfgs' takes no {name}: its line search finds the step")


def rates_of(given: Any, task: Task, data: Data) -> Array:
    """One learning rate for each step: (S,), or (E, S) where members have their own."""
    n_steps = task.epochs * max(task.steps_per_epoch(e) for e in range(task.n_members))
    default = task.optimizer.learning_rate
    if task.optimizer.name == "lbfgs":
        return np.full(n_steps, default)
    if isinstance(given, str):
        rates: Array = table_row("schedule", given, schedules.SCHEDULES)(default, n_steps)
        return rates
    rates = np.asarray(read("learning_rate", default if given is None else given).array, np.float64)
    if not data.is_one and rates.shape == (task.n_members,):
        rates = rates[:, None]
    if rates.ndim == 0 or (rates.ndim == 2 and rates.shape[1] == 1):
        rates = np.broadcast_to(rates, (*rates.shape[:-1], n_steps))
    if rates.shape[:-1] != () and (data.is_one or rates.shape[:-1] != (task.n_members,)):
        more = "" if data.is_one else ", or the same for each member with these in front"
        raise ValueError(
            f"learning_rate must be a number, a schedule's name, or one rate for each step{more}; "
            f"got shape {rates.shape}"
        )
    if rates.shape[-1] < n_steps:
        raise ValueError(
            f"learning_rate has {rates.shape[-1]} entries, the whole run {n_steps} steps: pass one "
            "for each step since it began"
        )
    if not (np.isfinite(rates) & (rates >= 0)).all():
        raise ValueError("learning rates must be finite and not negative")
    return rates


def scale_of(layer_scale: Any, data: Data) -> Array | None:
    """Factors of the learning rate for each number of the vector (P,)."""
    if layer_scale is None:
        return None
    spec, sizes = data.spec, data.spec.sizes
    if not isinstance(layer_scale, Sequence) or len(layer_scale) != len(sizes) - 1:
        raise ValueError(
            f"layer_scale must have a factor, or a pair of them for W and b, for each of "
            f"{len(sizes) - 1} layers; got {layer_scale!r}"
        )
    parts = []
    for l, factors in enumerate(layer_scale, 1):
        pair = np.broadcast_to(np.asarray(factors, np.float64), (2,))
        if not (np.isfinite(pair) & (pair >= 0)).all():
            raise ValueError(f"layer_scale of layer {l} must not be negative, got {factors!r}")
        n_in, n_out = sizes[l - 1 : l + 1]
        parts += [np.full(n_out * n_in, pair[0]), np.full(n_out, pair[1])]
    scale = spec.xp.asarray(np.concatenate(parts), device=backends.device_of(spec.xp, data.X))
    return spec.xp.astype(scale, spec.dtype)


# Validation ---------------------------------------------------------------------------------------


class Split(NamedTuple):
    """Where each member is trained and where it is judged."""

    validation: tuple[Array, Array, Array | None] | None
    rows: tuple[Array, ...] | None
    validation_rows: tuple[Array, ...] | None


def split_of(
    given: Any, data: Data, rows: tuple[Array, ...] | None, seeds: tuple[int, ...], backend: Any
) -> Split:
    """From a pair or triple of arrays, or a fraction of the rows."""
    if given is None:
        return Split(None, rows, None)
    if isinstance(given, Real) and not isinstance(given, bool):
        return _fraction(float(given), data, rows, seeds)
    if not isinstance(given, tuple | list) or len(given) not in (2, 3):
        raise TypeError(
            "validation must be (X, y), (X, y, sample_weight), or a fraction of the rows; got "
            + type_name(given)
        )
    X, y, *weight = given
    own = _placed_like(data, X, y, weight[0] if weight else None, backend)
    return Split(own, rows, None)


def _placed_like(data: Data, X: Any, y: Any, weight: Any, backend: Any) -> Any:
    """Other rows for the same net, refused as the first ones are."""
    spec, device = data.spec, backends.device_of(data.spec.xp, data.X)
    zeros = partial(spec.xp.zeros, dtype=spec.dtype, device=device)
    nowhere = [Layer(zeros((a, b)), zeros(a)) for b, a in pairwise(spec.sizes)]
    try:
        _, _, *placed = validation.problem(nowhere, X, y, *data.names, "mean", weight, backend)
    except (TypeError, ValueError) as error:
        raise type(error)(f"validation: {error}") from error
    check_finite(spec, "X of validation", placed[0])
    check_finite(spec, "y of validation", placed[1])
    return tuple(placed)


def _fraction(
    fraction: float, data: Data, rows: tuple[Array, ...] | None, seeds: tuple[int, ...]
) -> Split:
    if not 0 < fraction < 1:
        raise ValueError(f"validation must be a fraction between 0 and 1, got {fraction:g}")
    n = int(data.X.shape[-2])
    everything = np.arange(n)
    kept, judged = [], []
    for e, seed in enumerate(seeds):
        own = everything if rows is None else rows[e]
        labels = _labels(data, e)
        mask = _chosen(fraction, len(own), None if labels is None else labels[own], seed)
        kept.append(own[~mask])
        judged.append(own[mask])
    for e, (left, right) in enumerate(zip(kept, judged, strict=True)):
        if not len(left) or not len(right):
            side = "training" if not len(left) else "validation"
            raise ValueError(
                f"validation={fraction:g} of {len(left) + len(right)} rows leaves none for {side}"
                + ("" if data.is_one else f" of member {e}")
            )
    return Split((data.X, data.y, data.weight), tuple(kept), tuple(judged))


def _labels(data: Data, member: int) -> Array | None:
    """Classes (n,), by which rows are split evenly; None where y is no class."""
    y = backends.to_numpy(data.spec.xp, data.y)
    if y.dtype.kind not in "iu":
        return None
    return y[member] if y.ndim == 2 else y


def _chosen(fraction: float, n: int, labels: Array | None, seed: int) -> Array:
    """Which of n rows are to judge: of every class the same share."""
    drawn = permutation(seed, NO_EPOCH, n)
    order = drawn if labels is None else drawn[np.argsort(labels[drawn], kind="stable")]
    mask = np.zeros(n, bool)
    # Every (1 / fraction)-th row of this order, so that each class gives its share.
    count = round(fraction * n)
    mask[order[np.floor((np.arange(count) + 0.5) * n / max(count, 1)).astype(int)]] = True
    return mask

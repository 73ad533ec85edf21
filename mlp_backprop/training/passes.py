"""What a step and the end of an epoch compute, of one net or of several together."""

from collections.abc import Callable
from functools import partial

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.edge.backends import device_of, to_numpy
from mlp_backprop.engines import choice
from mlp_backprop.maths.runs import Task
from mlp_backprop.nets.vectors import layers_like, unravel
from mlp_backprop.types import Array, LossAndGrads

Pass = Callable[..., LossAndGrads]  # of params, X, y, weight; NumPy's also of where gradients go


def pass_of(task: Task, members: list[int], backend: str | None, precision: str) -> Pass:
    """Loss and gradient of a batch, summed."""
    most = max(task.n_rows(e) for e in members)
    if task.max_sample_norm is not None:  # of a row's weight over the mean weight
        most_of_row = task.max_sample_norm * mean_weight(task, members[0])
        return partial(choice.clipped_grads, task.spec, backend, most_of_row)
    if len(members) > 1:
        return partial(choice.derivation, task.spec)
    return choice.plan(task.spec, min(task.batch_size, most), backend, precision)


def mean_weight(task: Task, member: int) -> float:
    """Of all rows that a member is trained on."""
    if task.weight is None:
        return 1.0
    weight = to_numpy(task.spec.xp, task.weight)
    own = weight if task.rows is None else weight[task.rows[member]]
    return float(np.mean(own, dtype=np.float64))


class Validation:
    """The rows by which each member is judged."""

    def __init__(self, task: Task, members: list[int], backend: str | None) -> None:
        self.spec, self.backend = task.spec, backend
        self.like = layers_like(task.spec.sizes)
        self.data = [_validation_data(task, e) for e in members]

    def loss_of(self, vector: Array, i: int) -> float:
        """The i-th member's weighted mean, without a gradient."""
        spec, (X, y, weight) = self.spec, self.data[i]
        H = choice.outputs(spec, unravel(spec.xp, vector, self.like), X, self.backend)
        values, _ = backprop.loss_and_output_grad(spec, H, y, weight)
        return float(spec.xp.sum(values) / backprop.weight_sum(spec, X, weight))


def _validation_data(task: Task, member: int) -> tuple[Array, Array, Array | None]:
    assert task.validation is not None
    X, y, weight = task.validation
    if task.validation_rows is not None:  # they are rows of what is trained on
        X = X[member, ...] if task.own_X else X
        y = y[member, ...] if task.own_y else y
    if task.validation_rows is None:
        return X, y, weight
    xp = task.spec.xp
    rows = xp.asarray(task.validation_rows[member], device=device_of(xp, X))
    weights = None if weight is None else xp.take(weight, rows, axis=0)
    return xp.take(X, rows, axis=0), xp.take(y, rows, axis=0), weights

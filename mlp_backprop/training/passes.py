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

Data = tuple[Array, Array, Array | None]  # X, y, weight
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


class MeanLoss:
    """The weighted mean loss over some rows, without a gradient."""

    def __init__(self, task: Task, data: Data, rows: Array | None, backend: str | None) -> None:
        self.spec, self.backend, self.data = task.spec, backend, data
        self.like = layers_like(task.spec.sizes)
        if rows is not None:
            xp = task.spec.xp
            rows = xp.asarray(rows, device=device_of(xp, task.X))
            X, y, weight = (None if A is None else xp.take(A, rows, axis=0) for A in data)
            self.data = X, y, weight

    def __call__(self, vector: Array) -> float:
        """Of the net that this vector is."""
        spec, (X, y, weight) = self.spec, self.data
        H = choice.outputs(spec, unravel(spec.xp, vector, self.like), X, self.backend)
        values, _ = backprop.loss_and_output_grad(spec, H, y, weight)
        return float(spec.xp.sum(values) / backprop.weight_sum(spec, X, weight))


def training_loss(task: Task, member: int, backend: str | None) -> MeanLoss:
    """Over the rows that a member is trained on."""
    rows = None if task.rows is None else task.rows[member]
    return MeanLoss(task, _own_data(task, member), rows, backend)


def validation_loss(task: Task, member: int, backend: str | None) -> MeanLoss:
    """Over those by which it is judged: others, or a part of the same data."""
    assert task.validation is not None
    if task.validation_rows is None:
        return MeanLoss(task, task.validation, None, backend)
    return MeanLoss(task, _own_data(task, member), task.validation_rows[member], backend)


def _own_data(task: Task, member: int) -> Data:
    X = task.X[member, ...] if task.own_X else task.X
    y = task.y[member, ...] if task.own_y else task.y
    return X, y, task.weight

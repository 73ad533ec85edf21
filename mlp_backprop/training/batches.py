"""The rows of an epoch, batch by batch, on the device of the data."""

from typing import Any

import numpy as np

from mlp_backprop.edge.backends import device_of
from mlp_backprop.engines.orders import order
from mlp_backprop.maths.runs import Task
from mlp_backprop.types import Array


class Batches:
    """The rows of an epoch, batch by batch, taken from X, y and weight by their numbers."""

    def __init__(self, task: Task, members: list[int], epoch: int) -> None:
        self.xp, self.weight = task.spec.xp, task.weight
        orders = np.stack([order(task, e, epoch) for e in members])
        is_one, is_own = len(members) == 1, task.own_X or task.own_y
        if is_one or not (is_own or (orders != orders[:1]).any()):
            orders = orders[0]
        self.for_all = not is_one and orders.ndim == 1  # the same rows for every member
        split = orders.shape[-1] // task.batch_size * task.batch_size
        whole = orders[..., :split].reshape(*orders.shape[:-1], -1, task.batch_size)
        device = None if self.xp is np else device_of(self.xp, task.X)
        # An index of a batch is an operand; a slice would be one more program to compile for JAX.
        self.whole = self._there(np.moveaxis(whole, -2, 0), device)
        self.last = self._there(orders[..., split:], device)
        first = np.array(members)[:, None] * task.X.shape[-2]
        offset = self._there(first[0] if is_one else first, device)
        self.data = [
            (self.xp.reshape(A, (-1, *A.shape[2:])), offset) if own else (A, 0)
            for A, own in ((task.X, task.own_X), (task.y, task.own_y))
        ]

    def __len__(self) -> int:
        return int(self.whole.shape[0]) + bool(self.last.shape[-1])

    def __getitem__(self, k: int) -> tuple[Array, Array, Array | None]:
        rows = self.whole[k, ...] if k < self.whole.shape[0] else self.last
        X, y = (self._take(A, rows + first) for A, first in self.data)
        weight = None if self.weight is None else self._take(self.weight, rows)
        return X, y[None, ...] if self.for_all else y, weight

    def _there(self, rows: Array, device: Any) -> Array:
        return rows if self.xp is np else self.xp.asarray(rows.copy(), device=device)

    def _take(self, A: Array, rows: Array) -> Array:
        if self.xp is np:
            return A[rows]
        taken = self.xp.take(A, self.xp.reshape(rows, (-1,)), axis=0)
        return self.xp.reshape(taken, (*rows.shape, *A.shape[1:]))

"""The order in which an epoch visits its rows: one generator, for every engine."""

import numpy as np

from mlp_backprop.maths.runs import Task
from mlp_backprop.types import Array


def order(task: Task, member: int, epoch: int) -> Array:
    """The numbers (n_rows,) of the rows of X, int64, as epoch 0, 1, ... of this member takes them.

    Anyone can draw them again: they depend on the seed, the epoch and how many rows there are.
    """
    n = task.n_rows(member)
    own = None if task.rows is None else task.rows[member]
    if not task.shuffle:
        return np.arange(n) if own is None else own
    drawn = np.random.default_rng([task.seeds[member], epoch]).permutation(n)
    return drawn if own is None else own[drawn]

"""The order in which an epoch visits its rows: one generator, for every engine.

Philox is keyed, by the seed and the epoch: anyone can draw an order again, and none depends on
those before it. J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel random numbers: as easy as 1, 2,
3", SC 2011.
"""

import threading

import numpy as np

from mlp_backprop.maths.runs import Task
from mlp_backprop.types import Array

MOST_SEED = 2**64 - 1
NO_EPOCH = 2**64 - 1  # for what is drawn by the seed alone


def order(task: Task, member: int, epoch: int) -> Array:
    """The numbers (n_rows,) of rows, int64, as epoch 0, 1, ... of this member takes them."""
    n = task.n_rows(member)
    own = None if task.rows is None else task.rows[member]
    if not task.shuffle:
        return np.arange(n) if own is None else own
    drawn = permutation(task.seeds[member], epoch, n)
    return drawn if own is None else own[drawn]


def permutation(seed: int, epoch: int, n: int) -> Array:
    """numpy.random.Generator(numpy.random.Philox(key=[seed, epoch])).permutation(n)."""
    return _generator.with_key(seed, epoch).permutation(n)


class _Generator(threading.local):
    """A generator of this thread, told its key anew: to make one takes four times as long."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=[0, 0])
        self.generator = np.random.Generator(self.bits)
        self.beginning = self.bits.state

    def with_key(self, seed: int, epoch: int) -> np.random.Generator:
        self.beginning["state"]["key"][:] = seed, epoch
        self.bits.state = self.beginning
        return self.generator


_generator = _Generator()

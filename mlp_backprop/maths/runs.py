"""What a training run is, and how far it has come: what the reference and every engine share.

A task does not change while it runs; a state is all that does. Arrays of a state have the members
of an ensemble first, E of them, 1 for a single net. A step takes the next rows of an epoch:

    g       = sum of w_i dE_i over the rows / (k w̄)       k rows, w̄ the mean weight of all rows
    g       = g min(1, max_grad_norm / |g|)
    θ, s    = optimizer(t, θ, g, s, rate_t)
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

from mlp_backprop.backprop import Spec
from mlp_backprop.types import Array

# What a member is doing, or how it ended.
RUNNING, FINISHED, STOPPED, INTERRUPTED, DIVERGED = range(5)

# Of the average of all steps; the first ones are forgotten sooner.
EMA_DECAY = 0.999


class Task(NamedTuple):
    """A run, checked: what it trains, on which rows, how, and for how long."""

    spec: Spec  # of one net, asked for sums
    X: Array  # (n, d_0); a member's own: (E, n, d_0)
    y: Array  # (n, d_L), or labels (n,); of each member: with E in front
    weight: Array | None  # (n,)
    n_members: int
    optimizer: Any  # a row of optimizers.py
    rates: Array  # float64 (S,) or (E, S): one for each step since the run began
    scale: Array | None  # (P,): factors of the rate
    epochs: int  # those before a resume counted
    batch_size: int
    shuffle: bool
    seeds: tuple[int, ...]  # one per member
    rows: tuple[Array, ...] | None = None  # the numbers of each member's rows; None: all
    validation: tuple[Array, Array, Array | None] | None = None  # X, y, weight
    validation_rows: tuple[Array, ...] | None = None  # as rows, of these
    patience: int | None = None
    average: str = ""  # "ema", "swa"
    max_grad_norm: float | None = None
    max_sample_norm: float | None = None

    @property
    def own_X(self) -> bool:
        """Whether each member has its own."""
        return bool(self.X.ndim == 3)

    @property
    def own_y(self) -> bool:
        """The same of y."""
        is_class = self.spec.xp.isdtype(self.y.dtype, "integral")
        return bool(self.y.ndim == (2 if is_class else 3))

    def n_rows(self, member: int) -> int:
        """How many rows this member is trained on."""
        return int(self.X.shape[-2]) if self.rows is None else len(self.rows[member])

    def steps_per_epoch(self, member: int) -> int:
        """The last of them may have fewer rows."""
        return -(-self.n_rows(member) // self.batch_size)

    @property
    def first_averaged(self) -> int:
        """The epoch from which on ends of epochs are averaged, for "swa"."""
        return 1 + 3 * self.epochs // 4


# Of a state: the columns of the history, (epochs + 1, E), in which row 0 is of the net before the
# first step.
HISTORY = ("loss", "validation_loss", "learning_rate", "grad_norms", "seconds")


@dataclass
class State:
    """Parameters and what the optimizer keeps, the best so far, counts, and the history."""

    vector: Array  # (E, P): W_1 row by row, b_1, W_2, ...
    slots: Array  # (n_slots, E, P)
    step: Array  # (E,): steps taken
    loss_sum: Array  # (E,): of the epoch under way
    weight_sum: Array  # (E,)
    grad_norm: Array  # (E,): of the last step
    best: Array  # (E, P): by validation
    best_loss: Array  # (E,)
    best_epoch: Array  # (E,)
    average: Array  # (E, P)
    n_averaged: Array  # (E,)
    status: Array  # (E,)
    loss: Array  # from here on, HISTORY
    validation_loss: Array
    learning_rate: Array
    grad_norms: Array
    seconds: Array

"""What `train` gives back, and what it tells on the way."""

from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.maths.runs import HISTORY, State
from mlp_backprop.types import Array, Net

STATUSES = ("running", "finished", "stopped early", "interrupted", "diverged")


class History(NamedTuple):
    """NumPy arrays of float64 with a row per epoch; of several members, (rows, E).

    Row 0 is of the net before the first step; nan stands where there is nothing.
    """

    loss: Array  # mean over the batches of the epoch, as they were visited
    validation_loss: Array
    learning_rate: Array  # of the last step
    grad_norm: Array  # of the last step, before clipping
    seconds: Array  # since the run began


class TrainResult(NamedTuple):
    """A trained net, how it went, and what is needed to go on."""

    net: Net
    history: History
    best_epoch: Any  # int; of several members an array (E,)
    status: Any  # str; of several members a tuple
    state: dict[str, Any]

    def __str__(self) -> str:
        statuses = [self.status] if isinstance(self.status, str) else self.status
        counts = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
        said = ", ".join(s if len(statuses) == 1 else f"{k} {s}" for s, k in counts.items())
        epochs, last = len(self.history.loss) - 1, np.nanmin(self.history.loss[-1:], initial=np.inf)
        return f"{self.net}; {said} after {epochs} epochs, loss {last:.4g}"


class EpochInfo(NamedTuple):
    """What a callback is told, after an epoch; of several members, arrays (E,)."""

    epoch: int
    loss: Any
    validation_loss: Any
    learning_rate: Any
    grad_norm: Any
    seconds: Any
    net: Net  # the one that was judged; a copy


def history_of(state: State, n_rows: int, is_one: bool) -> History:
    """The first rows, in arrays of their own."""
    columns = (getattr(state, name)[:n_rows] for name in HISTORY)
    return History(*((A[:, 0] if is_one else A).copy() for A in columns))

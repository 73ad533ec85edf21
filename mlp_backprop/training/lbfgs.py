"""Training by L-BFGS: full batches, through SciPy.

An epoch is an iteration, with as many passes over all rows as its line search takes. SciPy works in
float64 on the host; the passes are those of the task, in its dtype and where its arrays are.

D. Liu, J. Nocedal, "On the limited memory BFGS method for large scale optimization", Mathematical
Programming 45 (1989).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np

from mlp_backprop.edge.backends import device_of, to_numpy
from mlp_backprop.edge.calls import quietly
from mlp_backprop.maths.optimizers import Optimizer
from mlp_backprop.maths.runs import DIVERGED, FINISHED, RUNNING, STOPPED, State, Task
from mlp_backprop.nets.vectors import layers_like, ravel, unravel
from mlp_backprop.training.batches import Batches
from mlp_backprop.training.passes import mean_weight, pass_of, validation_loss
from mlp_backprop.types import Array


@dataclass(frozen=True)  # for its repr, by which a run is told from another
class LBFGS(Optimizer):
    """Its place in the table: no learning rate, and nothing that outlasts a call."""

    name = "lbfgs"
    learning_rate = math.nan
    n_slots = 0


class Runner:
    """A run of all members, one after the other."""

    def __init__(
        self,
        task: Task,
        state: State,
        backend: str | None,
        precision: str,
        between: Callable[[], bool],
    ) -> None:
        self.task, self.state, self.between = task, state, between
        self.options = backend, precision
        self.minimize = _minimizer()

    @quietly
    def advance(self, seconds: float, whole_epoch: bool = False) -> None:
        """The whole run, which calls by itself what is to be done between epochs."""
        for e in range(self.task.n_members):
            if self.state.status[e] == RUNNING:
                _minimize(self.minimize, self.task, self.state, e, self.options, self.between)


def _minimizer() -> Callable[..., Any]:
    try:
        from scipy.optimize import minimize
    except ImportError as error:
        raise ImportError(
            f"optimizer='lbfgs' needs scipy ({error}): pip install 'mlp-backprop[scipy]'"
        ) from error
    found: Callable[..., Any] = minimize
    return found


def _minimize(
    minimize: Callable[..., Any],
    task: Task,
    state: State,
    e: int,
    options: tuple[Any, str],
    between: Callable[[], bool],
) -> None:
    """Iterations of one member, until it has done its epochs or gets no further."""
    objective = _Objective(task, e, *options)
    validation = validation_loss(task, e, options[0]) if task.validation else None
    started, before = perf_counter(), float(np.nanmax(state.seconds[:, e]))

    def after_iteration(vector: Array) -> None:
        epoch = int(state.step[e]) + 1
        own = objective.there(vector)
        state.vector = _with_row(task, state.vector, e, own)
        state.step[e] = epoch
        state.loss[epoch, e], state.grad_norms[epoch, e] = objective.at(vector)
        state.seconds[epoch, e] = before + perf_counter() - started
        if validation is not None:
            value = state.validation_loss[epoch, e] = validation(own)
            if value < state.best_loss[e]:
                state.best = _with_row(task, state.best, e, own)
                state.best_loss[e], state.best_epoch[e] = value, epoch
        waited = epoch - state.best_epoch[e]
        if task.patience is not None and waited >= task.patience:
            state.status[e] = STOPPED
        if between():
            state.status[state.status == RUNNING] = STOPPED
        if state.status[e] != RUNNING:
            raise StopIteration

    left = task.epochs - int(state.step[e])
    start = to_numpy(task.spec.xp, state.vector[e, ...]).astype(np.float64)
    if left > 0 and np.isfinite(objective(start)[0]):
        limits = {"maxiter": left, "maxfun": math.inf, "ftol": 0.0, "gtol": 0.0}
        minimize(
            objective, start, jac=True, method="L-BFGS-B", callback=after_iteration, options=limits
        )
    elif left > 0:
        state.status[e] = DIVERGED
    if state.status[e] == RUNNING:
        state.status[e] = FINISHED


class _Objective:
    """The mean loss of a vector and its gradient, in float64, over a member's rows."""

    def __init__(self, task: Task, e: int, backend: Any, precision: str) -> None:
        self.task, self.like = task, layers_like(task.spec.sizes)
        whole = task._replace(shuffle=False)
        self.rows = Batches(whole, [e], 0)[0]
        self.sums = pass_of(whole, [e], backend, precision)
        self.over = mean_weight(task, e) * task.n_rows(e)
        self.last: tuple[bytes, float, float] = (b"", math.nan, math.nan)

    def there(self, vector: Array) -> Array:
        xp, spec = self.task.spec.xp, self.task.spec
        return xp.astype(xp.asarray(vector.copy(), device=device_of(xp, self.task.X)), spec.dtype)

    def __call__(self, vector: Array) -> tuple[float, Array]:
        xp = self.task.spec.xp
        loss, grads = self.sums(unravel(xp, self.there(vector), self.like), *self.rows)
        g = to_numpy(xp, ravel(xp, grads)).astype(np.float64) / self.over
        value = float(loss) / self.over
        self.last = vector.tobytes(), value, float(np.linalg.norm(g))
        return value, g

    def at(self, vector: Array) -> tuple[float, float]:
        """Loss and norm of the gradient, mostly those of the last call."""
        if self.last[0] != vector.tobytes():
            self(vector)
        return self.last[1:]


def _with_row(task: Task, vectors: Array, e: int, own: Array) -> Array:
    """These vectors (E, P), with another one for this member."""
    return task.spec.xp.stack([own if k == e else vectors[k, ...] for k in range(task.n_members)])

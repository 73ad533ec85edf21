"""The state of a run: how it begins, how it is kept, and how one that was kept goes on.

What is kept is plain data, a dict of arrays and numbers: it can be pickled, or written by
numpy.savez where the arrays are NumPy's.
"""

from dataclasses import fields
from typing import Any

import numpy as np

from mlp_backprop.edge.backends import device_of
from mlp_backprop.edge.calls import quietly
from mlp_backprop.maths.runs import FINISHED, HISTORY, RUNNING, State, Task
from mlp_backprop.training.passes import training_loss, validation_loss
from mlp_backprop.types import Array


@quietly
def begun(task: Task, vector: Array, backend: str | None) -> State:
    """Before the first step: row 0 of the history is of the nets as they come."""
    E, xp = task.n_members, task.spec.xp
    history = {name: np.full((task.epochs + 1, E), np.nan) for name in HISTORY}
    state = State(
        vector=vector,
        slots=_first_slots(task, vector),
        step=np.zeros(E, np.int64),
        loss_sum=np.zeros(E),
        weight_sum=np.zeros(E),
        grad_norm=np.zeros(E),
        best=xp.asarray(vector, copy=True),
        best_loss=np.full(E, np.inf),
        best_epoch=np.zeros(E, np.int64),
        average=xp.asarray(vector, copy=True),
        n_averaged=np.zeros(E, np.int64),
        status=np.full(E, RUNNING if task.epochs else FINISHED),
        **history,
    )
    state.seconds[0] = 0.0
    for e in range(E):
        state.loss[0, e] = training_loss(task, e, backend)(vector[e, ...])
        if task.validation is not None:
            judged = validation_loss(task, e, backend)(vector[e, ...])
            state.validation_loss[0, e] = judged
            state.best_loss[e] = judged if np.isfinite(judged) else np.inf
    return state


def _first_slots(task: Task, vector: Array) -> Array:
    """What the optimizer begins with (n_slots, E, P)."""
    xp, scale = task.spec.xp, 1.0 if task.scale is None else task.scale
    rates = np.broadcast_to(task.rates[..., 0] if task.rates.shape[-1] else 0.0, task.n_members)
    slots = [
        task.optimizer.first_slots(xp, vector[e, ...], float(rates[e]) * scale)
        for e in range(task.n_members)
    ]
    if not slots[0]:
        return xp.zeros((0, *vector.shape), dtype=vector.dtype)
    return xp.stack([xp.stack(list(of_slot)) for of_slot in zip(*slots, strict=True)])


# Kept, and taken up again -------------------------------------------------------------------------


def kept(task: Task, state: State) -> dict[str, Any]:
    """All of a state, and what it belongs to."""
    ends = epochs_done(task, state).max() + 1
    arrays = {field.name: getattr(state, field.name) for field in fields(State)}
    arrays |= {name: arrays[name][:ends].copy() for name in HISTORY}
    return {"run": _described(task)} | arrays


def epochs_done(task: Task, state: State) -> Array:
    """Whole ones, of each member."""
    per_epoch = np.array([task.steps_per_epoch(e) for e in range(task.n_members)])
    return state.step // per_epoch


def _described(task: Task) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    spec = task.spec
    return {
        "widths": "-".join(map(str, spec.sizes)),
        "activation": " ".join(row.name for row in spec.activations),
        "loss": spec.loss.name,
        "dtype": str(spec.dtype),
        "optimizer": repr(task.optimizer),
        "seed": " ".join(map(str, task.seeds)),
        "members": task.n_members,
        "rows of data": int(task.X.shape[-2]),
        "rows of each member": " ".join(str(task.n_rows(e)) for e in range(task.n_members)),
        "batch_size": task.batch_size,
        "shuffle": task.shuffle,
        "weight_average": task.average or "none",
    }


def check_resumable(resume: Any, task: Task) -> None:
    """Only with the same net, optimizer, seed and shapes of data does a run go on."""
    if not isinstance(resume, dict) or "run" not in resume:
        raise TypeError(
            "resume must be the state of a result of train: pass resume=result.state, got "
            + type(resume).__name__
        )
    for name, mine in _described(task).items():
        theirs = resume["run"].get(name)
        if theirs != mine:
            raise ValueError(
                f"resume is of a run whose {name} is {theirs}, this call has {mine}: pass what "
                "that run was given, or begin anew without resume"
            )


def epochs_of(resume: dict[str, Any]) -> int:
    """How many whole epochs a run that was kept has done."""
    return len(resume["loss"]) - 1


def resumed(task: Task, resume: dict[str, Any]) -> State:
    """A state of its own that goes on from there; what was passed stays as it is."""
    xp = task.spec.xp
    arrays = {name: resume[name] for name in (field.name for field in fields(State))}
    device = device_of(xp, task.X)
    for name in ("vector", "slots", "best", "average"):
        arrays[name] = xp.asarray(arrays[name], device=device, copy=True)
    for name in HISTORY:
        rows = np.full((task.epochs + 1, task.n_members), np.nan)
        rows[: len(arrays[name])] = arrays[name]
        arrays[name] = rows
    for name in arrays.keys() - {*HISTORY, "vector", "slots", "best", "average"}:
        arrays[name] = np.array(arrays[name])
    state = State(**arrays)
    state.status[:] = np.where(epochs_done(task, state) < task.epochs, RUNNING, FINISHED)
    return state

"""Training in Array API code, on any library: what every faster engine is tested against.

maths/runs.py has the equations of a step. A track is one net, or those nets of an ensemble that the
library computes together, with one more axis in front. A step makes new arrays and never changes
old ones, and is one assignment in the end: an interrupt finds the track before it or after it.

Nothing waits for a device inside an epoch. If its losses turn out not to be finite, the epoch is
done once more from where it began, now looking at every step: that finds the first to blame.
"""

import math
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.edge.backends import device_of, to_numpy
from mlp_backprop.edge.calls import quietly
from mlp_backprop.maths.runs import DIVERGED, EMA_DECAY, FINISHED, RUNNING, STOPPED, State, Task
from mlp_backprop.nets.vectors import layers_like, ravel, unravel
from mlp_backprop.training.batches import Batches
from mlp_backprop.training.passes import mean_weight, pass_of, validation_loss
from mlp_backprop.types import Array, n_params


class Runner:
    """A run of all members."""

    def __init__(self, task: Task, state: State, backend: str | None, precision: str) -> None:
        groups = _groups(task, state)
        self.state = state
        self.tracks = [Track(task, state, group, backend, precision) for group in groups]

    @quietly
    def advance(self, seconds: float, whole_epoch: bool = False) -> None:
        """Take steps for about so long, or until each member has ended one more epoch."""
        end = perf_counter() + seconds
        for track in self.tracks:
            track.started = perf_counter()
        try:
            while any(track.alive.any() for track in self.tracks):
                for track in self.tracks:
                    track.advance(math.inf if whole_epoch else end)
                if whole_epoch or perf_counter() >= end:
                    break
        finally:
            for track in self.tracks:
                track.seconds = track.seconds + (perf_counter() - track.started)
            _write_down(self.tracks, self.state)


def _groups(task: Task, state: State) -> list[list[int]]:
    """Members that go together: NumPy's do not, so that each has the bits of its single run."""
    members = range(task.n_members)
    if task.spec.xp is np or task.max_sample_norm is not None:
        return [[e] for e in members]
    groups: dict[Any, list[int]] = {}
    for e in members:
        alike = task.n_rows(e), int(state.step[e]), int(state.n_averaged[e])
        groups.setdefault(alike, []).append(e)
    return list(groups.values())


def _write_down(tracks: list["Track"], state: State) -> None:
    """What the tracks hold, in the state, member by member."""
    for track in tracks:
        now, members = track.now, track.members
        state.step[members], state.n_averaged[members] = track.steps, now.n_averaged
        sums = now.loss_sum, now.weight_sum, now.grad_norm
        for A, own in zip((state.loss_sum, state.weight_sum, state.grad_norm), sums, strict=True):
            A[members] = track.host(own)
    rows = {e: (track, i) for track in tracks for i, e in enumerate(track.members)}
    places, xp = [rows[e] for e in sorted(rows)], tracks[0].task.spec.xp

    def stacked(name: str, *k: int) -> Array:
        return xp.stack([track.vector_of(i, name, *k) for track, i in places])

    state.vector, state.average, state.best = map(stacked, ("vector", "average", "best"))
    if state.slots.shape[0]:
        state.slots = xp.stack([stacked("slots", k) for k in range(state.slots.shape[0])])


class Moving(NamedTuple):
    """What a step changes; of several members, arrays and sums have these in front."""

    step: int
    vector: Array
    slots: tuple[Array, ...]
    average: Array
    n_averaged: int
    loss_sum: Any
    weight_sum: Any
    grad_norm: Any


class Views:
    """Layers that lie in vectors of NumPy's: to copy a vector is quicker than to cut one up."""

    def __init__(self, task: Task) -> None:
        like = layers_like(task.spec.sizes)
        self.vector, self.g = (np.empty(n_params(task.spec.sizes), task.spec.dtype) for _ in "vg")
        self.params, self.grads = (unravel(np, A, like) for A in (self.vector, self.g))


class Track:
    """The way of one net through its epochs, or of several together."""

    def __init__(
        self, task: Task, state: State, members: list[int], backend: str | None, precision: str
    ) -> None:
        self.task, self.state, self.members = task, state, members
        self.is_one = len(members) == 1
        self.on_device = task.spec.xp is not np  # where looking at a number means to wait
        self.like = layers_like(task.spec.sizes)
        self.sums = pass_of(task, members, backend, precision)
        self.views = None if self.on_device or task.max_sample_norm else Views(task)
        self.mean_weight = self._factors([mean_weight(task, e) for e in members])
        self.scale = 1.0 if task.scale is None else task.scale
        self.now = self._begun()
        self.best = self._own(state.best)
        self.alive = state.status[members] == RUNNING
        self.steps = state.step[members]  # those of a member that has ended stay behind
        self.epoch = self.now.step // task.steps_per_epoch(members[0])
        self.batches = Batches(task, members, self.epoch)
        self.validation = [validation_loss(task, e, backend) for e in members if task.validation]
        self.seconds = np.nanmax(state.seconds[:, members], axis=0)
        self.started = 0.0

    def _begun(self) -> Moving:
        state, members = self.state, self.members
        numbers = state.loss_sum, state.weight_sum, state.grad_norm
        sums = (A[members[0] if self.is_one else members] for A in numbers)
        return Moving(
            int(state.step[members[0]]),
            self._own(state.vector),
            tuple(self._own(state.slots[k, ...]) for k in range(state.slots.shape[0])),
            self._own(state.average),
            int(state.n_averaged[members[0]]),
            *(self._there(A) if self.on_device else A for A in sums),
        )

    # Arrays of all members, of this track, and of NumPy -------------------------------------------

    def _own(self, A: Array) -> Array:
        if self.is_one:
            return A[self.members[0], ...]
        return self.task.spec.xp.take(A, self._there(np.array(self.members)), axis=0)

    def _there(self, A: Array) -> Array:
        xp = self.task.spec.xp
        return xp.asarray(A, device=device_of(xp, self.task.X))

    def _factors(self, numbers: list[float]) -> Any:
        """One for each member, to multiply vectors with."""
        if self.is_one:
            return numbers[0]
        spec = self.task.spec
        return spec.xp.astype(self._there(np.array(numbers)[:, None]), spec.dtype)

    def host(self, A: Any) -> Array:
        """One number for each member; waits for the device."""
        xp = self.task.spec.xp
        return np.atleast_1d(to_numpy(xp, A) if self.on_device else A)

    def vector_of(self, i: int, name: str, *k: int) -> Array:
        """That of the i-th member, by its name in Moving; "best" too."""
        A = self.best if name == "best" else getattr(self.now, name)
        A = A[k[0]] if k else A
        return A if self.is_one else A[i, ...]

    # Steps ----------------------------------------------------------------------------------------

    def advance(self, until: float) -> None:
        """Go on until then, or to the end of the epoch."""
        if not self.alive.any():
            return
        n, before = self.task.steps_per_epoch(self.members[0]), self.now
        epoch, k = divmod(self.now.step, n)
        if k == 0 and self.now.step and np.any(self.host(self.now.weight_sum) > 0):
            self._end_epoch(epoch)  # an interrupt came before
            return
        if epoch != self.epoch:
            self.epoch, self.batches = epoch, Batches(self.task, self.members, epoch)
        self._take_steps(k, until, look=not self.on_device)
        if self.on_device and not self._is_finite():
            self.now = before
            self._take_steps(k, until, look=True)
        if self.alive.any() and self.now.step == (epoch + 1) * n:
            self._end_epoch(epoch + 1)

    def _take_steps(self, k: int, until: float, look: bool) -> None:
        for j in range(k, len(self.batches)):
            self._step(*self.batches[j], look)
            if not self.alive.any() or (not self.on_device and perf_counter() >= until):
                break

    def _is_finite(self) -> bool:
        sums = self.host(self.now.loss_sum) + self.host(self.now.grad_norm)
        return bool(np.isfinite(sums[self.alive]).all())

    def _step(self, X: Array, y: Array, weight: Array | None, look: bool) -> None:
        task, now, xp = self.task, self.now, self.task.spec.xp
        k, t = X.shape[-2], now.step + 1
        loss, g = self._loss_and_grad(X, y, weight)
        g = g / (k * self.mean_weight)
        norm = _norm(xp, g)
        if look and self._none_is_left(loss, norm):
            return
        g = self._clipped(g, norm)
        rate = self._rate(now.step) * self.scale
        vector, slots = task.optimizer.step(xp, t, now.vector, g, now.slots, rate)
        average = now.average
        if task.average == "ema":
            average = average + (1 - min(EMA_DECAY, (1 + t) / (10 + t))) * (vector - average)
        loss_sum = now.loss_sum + loss
        weight_sum = now.weight_sum + (k if weight is None else xp.sum(weight, axis=-1))
        new = Moving(t, vector, slots, average, now.n_averaged, loss_sum, weight_sum, norm)
        self.now = new if self.alive.all() else self._of_those_alive(new)
        self.steps[self.alive] = t

    def _loss_and_grad(self, X: Array, y: Array, weight: Array | None) -> tuple[Array, Array]:
        """Sums over some rows, the gradient as a vector."""
        xp, vector, views = self.task.spec.xp, self.now.vector, self.views
        if views is None:
            loss, grads = self.sums(unravel(xp, vector, self.like), X, y, weight)
            return loss, ravel(xp, grads)
        views.vector[...] = vector
        loss, _ = self.sums(views.params, X, y, weight, views.grads)
        return loss, views.g

    def _none_is_left(self, loss: Array, norm: Array) -> bool:
        """Members whose loss or gradient is not finite end, without this step."""
        bad = ~np.isfinite(self.host(loss) + self.host(norm))
        self._end(self.alive & bad, DIVERGED)
        return not self.alive.any()

    def _of_those_alive(self, new: Moving) -> Moving:
        """The others keep what they had."""
        xp, alive, old = self.task.spec.xp, self._there(self.alive), self.now

        def chosen(A: Array, B: Array) -> Array:
            return xp.where(alive[:, None] if A.ndim == 2 else alive, A, B)

        return new._replace(
            vector=chosen(new.vector, old.vector),
            slots=tuple(map(chosen, new.slots, old.slots)),
            average=chosen(new.average, old.average),
            loss_sum=chosen(new.loss_sum, old.loss_sum),
            weight_sum=chosen(new.weight_sum, old.weight_sum),
            grad_norm=chosen(new.grad_norm, old.grad_norm),
        )

    def _clipped(self, g: Array, norm: Array) -> Array:
        most, xp = self.task.max_grad_norm, self.task.spec.xp
        if most is None:
            return g
        factor = xp.where(norm > most, most / norm, xp.ones_like(norm))
        return g * xp.astype(factor, g.dtype, copy=False)[..., None]

    def _rate(self, step: int) -> Any:
        rates = self.task.rates
        if rates.ndim == 1:
            return float(rates[step])
        return self._factors([float(rates[e, step]) for e in self.members])

    # Ends of epochs -------------------------------------------------------------------------------

    def _end_epoch(self, epoch: int) -> None:
        """Write the row of history, judge, and see who goes on; twice does no harm."""
        task, now = self.task, self.now
        average, n_averaged = now.average, now.n_averaged
        if task.average == "swa":
            n_averaged = n_averaged + 1 if epoch > task.first_averaged else 1
            change = (now.vector - average) / n_averaged
            average = now.vector if n_averaged == 1 else average + change
        self._write(epoch, "loss", self.host(now.loss_sum / now.weight_sum))
        self._write(epoch, "grad_norms", self.host(now.grad_norm))
        rates = np.broadcast_to(task.rates[..., now.step - 1], task.n_members)
        self._write(epoch, "learning_rate", rates[self.members])
        self._write(epoch, "seconds", self.seconds + (perf_counter() - self.started))
        if self.validation:
            self._judge(epoch, average if task.average else now.vector)
        self.now = now._replace(
            average=average,
            n_averaged=n_averaged,
            loss_sum=now.loss_sum * 0.0,
            weight_sum=now.weight_sum * 0.0,
        )
        if epoch == task.epochs:
            self._end(self.alive, FINISHED)

    def _write(self, epoch: int, name: str, values: Array) -> None:
        values = np.broadcast_to(values, len(self.members))
        getattr(self.state, name)[epoch, np.array(self.members)[self.alive]] = values[self.alive]

    def _judge(self, epoch: int, judged: Array) -> None:
        """Keep what is better than the best, and end what has waited for it too long."""
        state, members, xp = self.state, np.array(self.members), self.task.spec.xp
        nets = [judged] if self.is_one else [judged[i, ...] for i in range(len(members))]
        values = np.array([of(net) for of, net in zip(self.validation, nets, strict=True)])
        self._write(epoch, "validation_loss", values)
        better = self.alive & (values < state.best_loss[members])
        if self.is_one:
            self.best = judged if better[0] else self.best
        else:
            self.best = xp.where(self._there(better)[:, None], judged, self.best)
        state.best_loss[members[better]] = values[better]
        state.best_epoch[members[better]] = epoch
        if self.task.patience is not None:
            has_waited = epoch - state.best_epoch[members] >= self.task.patience
            self._end(self.alive & has_waited, STOPPED)

    def _end(self, which: Array, status: int) -> None:
        self.state.status[np.array(self.members)[which]] = status
        self.alive = self.alive & ~which


def _norm(xp: Any, g: Array) -> Array:
    """|g|, in float64 where the library has it."""
    wide = getattr(xp, "float64", g.dtype) if xp.__name__ != "jax.numpy" else g.dtype
    G = xp.astype(g, wide, copy=False)
    return xp.sqrt(xp.sum(G * G, axis=-1))

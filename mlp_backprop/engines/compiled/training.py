"""Training inside compiled calls, one for each slice of time: the compiled engine's Runner.

A call takes steps of all members that are open, in the arrays of the state, and comes back between
two steps. It is told everything by the records of steps.py, which are written once.
"""

import threading
from collections.abc import Iterator
from functools import partial
from math import ceil, inf
from time import monotonic_ns, perf_counter
from typing import Any

import numpy as np

from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import engine, parts, steps, team
from mlp_backprop.engines.compiled.drawing import Orders
from mlp_backprop.engines.compiled.jobs import W_PLACE, job_of
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.engines.compiled.optimizers import OPTIMIZERS, OPTIONS
from mlp_backprop.engines.compiled.schedule import MOST_CHUNKS, batch_chunk_rows, operations
from mlp_backprop.maths.runs import RUNNING, State, Task
from mlp_backprop.types import Array, n_params

AVERAGES = {"": 0, "ema": steps.EMA, "swa": steps.SWA}
SLICE = 0.1  # seconds after which Python has its turn, for Ctrl-C
RANGE = 2048  # parameters in a range, at least
TRY_AGAIN, TRIAL = 10, 0.1  # slices until another number of threads is tried; for which part of one
CLOCK_OPERATIONS = 1_000_000  # between two looks at the clock


def covers(task: Task) -> bool:
    """Whether the steps of this run are compiled: narrow nets, NumPy's arrays, a clock."""
    spec, dtype = task.spec, np.dtype(task.spec.dtype)
    if team.MONOTONIC is None or not engine.covers(spec) or spec.loss is None:
        return False
    data = [task.X, task.y, task.weight, *(task.validation or ())]
    are_plain = all(
        isinstance(A, np.ndarray) and (A.dtype == dtype or A.dtype.kind in "iu")
        for A in data
        if A is not None
    )
    return are_plain and task.optimizer.name in OPTIONS


class Runner:
    """A run of all members, of a task that `covers` says yes to."""

    def __init__(self, task: Task, state: State) -> None:
        self.task, self.state = task, state
        self.dtype = np.dtype(task.spec.dtype)
        self.kept: list[Array] = []  # what records point to
        self.run, self.members = np.zeros(1, steps.RUN), np.zeros(task.n_members, steps.MEMBER)
        self.per_epoch = np.array([task.steps_per_epoch(e) for e in range(task.n_members)])
        self.total = task.epochs * self.per_epoch
        self._tell_state()
        self._tell_task()
        self._tell_members()
        self._make_room()
        self.orders = Orders(task, self.members)
        self.work = parts.work(steps.training_pass, team.WORK, self.dtype)
        self.lead_alone = parts.entry(steps.lead_alone, steps.LEADING)
        self.next = 0  # the member that is first in the next slice
        self.pace = Pace(min(self.n_workers, self.n_parts))
        self.meeting = np.zeros(steps.MEETING_BYTES // 8, np.int64)
        ended = np.minimum(state.step // self.per_epoch, task.epochs)
        self.elapsed = float(np.nanmax([0.0, *state.seconds[ended, range(task.n_members)]]))

    # What the records say -------------------------------------------------------------------------

    def _address(self, A: Array) -> int:
        """Of an array that is kept; 0 if it has nothing."""
        self.kept.append(A)
        return int(A.ctypes.data) if A.size else 0

    def _tell_state(self) -> None:
        for name in steps.STATE.split():
            A = getattr(self.state, name)
            counts = ("step", "best_epoch", "n_averaged", "status")
            vectors = ("vector", "slots", "best", "average")
            dtype = np.int64 if name in counts else self.dtype if name in vectors else np.float64
            assert A.dtype == dtype, name  # else steps would write to other memory
            assert A.flags.carray, name
            self.run[name] = self._address(A)

    def _tell_task(self) -> None:
        task, run, n = self.task, self.run, n_params(self.task.spec.sizes)
        run["address"] = run.ctypes.data
        run["part"] = parts.work(steps.part_pass, steps.PART, self.dtype)
        run["n_members"], run["n_params"] = task.n_members, n
        run["n_layers"] = len(task.spec.activations)
        run["epochs"], run["batch_size"] = task.epochs, task.batch_size
        run["patience"] = -1 if task.patience is None else task.patience
        run["kind_of_average"] = AVERAGES[task.average]
        run["first_averaged"] = task.first_averaged
        run["max_grad_norm"] = inf if task.max_grad_norm is None else task.max_grad_norm
        run["max_sample_norm"] = inf if task.max_sample_norm is None else task.max_sample_norm
        row = task.optimizer
        run["update"] = parts.address(self.dtype, "update", OPTIMIZERS.index(row.name))
        options = [np.ravel(getattr(row, name)) for name in OPTIONS[row.name]]
        run["options"] = self._address(np.concatenate(options).astype(np.float64))
        scale = 1.0 if task.scale is None else task.scale
        run["scale"] = self._address(np.ascontiguousarray(np.broadcast_to(scale, n), self.dtype))
        run["n_ranges"] = n_ranges = max(1, min(steps.MOST_RANGES, n // RANGE))
        run["range_size"] = ceil(n / n_ranges / 16) * 16

    def _tell_members(self) -> None:
        task, members = self.task, self.members
        members["epoch"] = self.state.step // self.per_epoch
        members["steps_per_epoch"] = self.per_epoch
        rates = np.ascontiguousarray(task.rates, np.float64)
        row_of_rates = rates.strides[0] if rates.ndim == 2 else 0
        members["rates"] = self._address(rates) + row_of_rates * np.arange(task.n_members)
        weights = np.ones(1) if task.weight is None else task.weight
        mean = partial(np.mean, axis=-1, dtype=np.float64)
        if task.weight is None or task.rows is None:
            members["mean_weight"] = mean(weights)
        else:
            members["mean_weight"] = [mean(w[rows]) for w, rows in self._own_rows(weights)]
        self.run["data"] = self._tell_data(task.X, task.y, task.weight)
        if task.validation is not None:
            self.run["validation"] = self._tell_data(*task.validation, task.validation_rows, True)

    def _own_rows(self, A: Array) -> Any:
        own = A if A.ndim == 2 else [A] * self.task.n_members
        return zip(own, self.task.rows or (), strict=True)

    def _tell_data(
        self, X: Array, y: Array, weight: Array | None, rows: Any = None, numbered: bool = False
    ) -> int:
        """A table of steps.DATA; with the numbers of rows where these do not come as orders."""
        E = self.task.n_members
        table = np.zeros(E, steps.DATA)
        X, y = np.require(X, requirements="A"), np.require(y, requirements="A")
        table["X"] = self._addresses(X, 3)
        table["X_row"], table["X_column"] = X.strides[-2:]
        if y.dtype.kind in "iu":
            labels = y.astype(np.int64, copy=False)
            table["labels"], table["label_step"] = self._addresses(labels, 2), labels.strides[-1]
        else:
            table["y"] = self._addresses(y, 3)
            table["y_row"], table["y_column"] = y.strides[-2:]
        if weight is not None:
            weight = np.require(weight, requirements="A")
            table["weight"], table["weight_step"] = (
                self._addresses(weight, 2),
                weight.strides[-1],
            )
        table["n"] = X.shape[-2]
        if numbered:
            numbers = [np.arange(X.shape[-2])] * E if rows is None else rows
            numbers = [np.ascontiguousarray(own, np.int64) for own in numbers]
            table["rows"], table["n"] = [self._address(A) for A in numbers], list(map(len, numbers))
        else:
            table["n"] = [self.task.n_rows(e) for e in range(E)]
        return self._address(table)

    def _addresses(self, A: Array, ndim_of_own: int) -> Array:
        """A row for each member, where every one has its own."""
        step = A.strides[0] if A.ndim == ndim_of_own else 0
        return self._address(A) + step * np.arange(self.task.n_members)

    def _make_room(self) -> None:
        """Workspaces of the threads, and the cut of the work."""
        task, run, members = self.task, self.run, self.members
        spec, n_layers = task.spec, len(task.spec.activations)
        n_numbers = n_params(spec.sizes)
        n_rows = [task.n_rows(e) for e in range(task.n_members)]
        n_judged = self._n_judged()
        most = max(min(task.batch_size, max(n_rows)), *n_judged)
        more = n_layers + 1 if task.max_sample_norm is not None else 0
        places = layout(spec.sizes, most, spec.dtype, more)
        per_row = operations(spec.sizes, products=3)
        cut = places.tile_rows, per_row, n_numbers
        batches = [min(task.batch_size, n) for n in n_rows]
        members["chunk_rows"] = [batch_chunk_rows(n, *cut) for n in batches]
        judging = places.tile_rows, operations(spec.sizes, products=1)
        members["validation_chunk_rows"] = [batch_chunk_rows(n, *judging) for n in n_judged]
        n_chunks = max(-(-batches[e] // int(members["chunk_rows"][e])) for e in range(len(members)))
        self.n_parts = n_chunks
        n_useful = max(task.n_members, n_chunks)
        n_workers = self.n_workers = min(threads.thread_count(), team.MOST_WORKERS, n_useful)
        n_frames = min(n_workers, task.n_members)  # those of one net share one
        sums = np.empty((n_frames, max(n_chunks * (n_numbers + 2), 2 * MOST_CHUNKS)))
        n_squares = steps.MOST_RANGES * 8 // self.dtype.itemsize + 2
        grads = np.empty((n_frames, n_numbers + n_squares), self.dtype)
        run["sums"], run["sums_bytes"] = self._address(sums), sums.strides[0]
        run["grads"], run["grads_bytes"] = self._address(grads), grads.strides[0]
        run["frames"] = self._address(np.zeros(n_frames, steps.FRAME))
        run["words"] = self._address(np.zeros((n_workers, steps.WORDS // 8), np.int64))
        of_step = per_row * max(batches)
        run["clock_steps"] = max(1, min(16, int(CLOCK_OPERATIONS // of_step)))
        self._tell_job(places, np.empty((n_workers, places.size), self.dtype))

    def _n_judged(self) -> list[int]:
        task = self.task
        if task.validation is None:
            return [1] * task.n_members
        if task.validation_rows is None:
            return [task.validation[0].shape[-2]] * task.n_members
        return [len(rows) for rows in task.validation_rows]

    def _tell_job(self, places: Any, workspaces: Array) -> None:
        task, state = self.task, self.state
        first = engine.by_layer(state.vector[0], task.spec.sizes)
        job = self.job = job_of(task.spec, first, places, workspaces=workspaces)
        self.run["job"] = job.address
        vector_bytes = state.vector.strides[0] * np.arange(task.n_members)
        for name, vectors in (("layers", state.vector), ("judged", self._judged())):
            tables = np.tile(job.kept["layers"], (task.n_members, 1, 1))
            moved = vectors.ctypes.data - state.vector.ctypes.data
            tables[:, :, W_PLACE:] += (moved + vector_bytes)[:, None, None]
            self.members[name] = self._address(tables) + tables.strides[0] * np.arange(len(tables))
        self.run["members"] = self._address(self.members)

    def _judged(self) -> Array:
        return self.state.average if self.task.average else self.state.vector

    # Slices ---------------------------------------------------------------------------------------

    def advance(self, seconds: float, whole_epoch: bool = False) -> None:
        """Take steps for about so long, or until each member has ended one more epoch."""
        end, goal = perf_counter() + seconds, self.total
        if whole_epoch:
            goal = np.minimum(goal, (self.state.step // self.per_epoch + 1) * self.per_epoch)
        self.members["goal"] = goal
        while len(members := self._open(goal)):
            left = SLICE if whole_epoch else min(SLICE, end - perf_counter())
            self._slice(members, max(0.0, left))
            if not whole_epoch and perf_counter() >= end:
                break

    def _open(self, goal: Array) -> Array:
        """The members that go on, beginning with the one that has waited longest."""
        step = self.state.step
        is_open = (self.state.status == RUNNING) & ((step < goal) | (step >= self.total))
        members = np.flatnonzero(is_open)
        return np.roll(members, -int(np.searchsorted(members, self.next)))

    def _slice(self, members: Array, seconds: float) -> None:
        """Compiled steps, while orders are drawn."""
        self.orders.draw_first(members)
        over = threading.Event()
        drawing = threading.Thread(target=self.orders.draw_ahead, args=(members, over), daemon=True)
        before = self.state.step[members]
        try:
            drawing.start()
            if len(members) == 1:
                self._one_net(members, seconds)
            else:
                self._run(members, seconds, min(self.n_workers, len(members)), together=False)
        finally:
            over.set()  # who still draws then does no harm
        waiting = members[self.state.step[members] == before]
        self.next = int(waiting[0]) if len(waiting) else 0

    def _one_net(self, members: Array, seconds: float) -> None:
        """By as many threads as have been the fastest of late."""
        for n_workers, share in self.pace.turns():
            step, start = self.state.step[members[0]], perf_counter()
            self._run(members, seconds * share, n_workers, together=n_workers > 1)
            steps_taken = self.state.step[members[0]] - step
            self.pace.tell(n_workers, steps_taken / (perf_counter() - start))

    def _run(self, members: Array, seconds: float, n_workers: int, together: bool) -> None:
        """A place for each member, or for each thread of those that take steps together."""
        run, began, length = self.run, monotonic_ns(), int(seconds * 1e9)
        n_places = n_workers if together else len(members)
        run["open"], run["started"], run["until"] = members.ctypes.data, began, began + length
        run["elapsed"], run["quota"] = self.elapsed, length * n_workers // n_places
        self.meeting[...] = 0
        run["meeting"] = self.meeting.ctypes.data if together else 0
        try:
            if n_workers > 1:
                team.run(self.work, run.ctypes.data, n_places, n_workers)
            else:
                self.lead_alone(self.work, run.ctypes.data, n_places)
        finally:
            self.elapsed += (monotonic_ns() - began) * 1e-9


class Pace:
    """How many threads take the steps of one net: one or all, whichever was faster of late.

    Beside a busy process threads that must meet at every step are slower than one. So now and then
    the other way is tried, for a small part of a slice.
    """

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self.rates: dict[int, float] = {}  # steps a second
        self.n_slices = 0

    def turns(self) -> Iterator[tuple[int, float]]:
        """Numbers of threads, and the part of a slice that each may have."""
        left, ways = 1.0, [1, self.n_workers]
        if self.n_workers > 1 and self.n_slices % TRY_AGAIN == 0:
            for n_workers in [n for n in ways if n != self._best() or not self.rates]:
                left -= TRIAL
                yield n_workers, TRIAL
        self.n_slices += 1
        yield self._best(), left

    def _best(self) -> int:
        return max(self.rates, key=self.rates.__getitem__, default=1)

    def tell(self, n_workers: int, rate: float) -> None:
        """What was measured."""
        self.rates[n_workers] = rate

"""Training inside compiled calls, one for each slice of time: the compiled engine's Runner.

A call takes steps of all members that are open, in the arrays of the state, and comes back between
two steps. It is told everything by the records of records.py, which are written once.
"""

import threading
import time
from collections.abc import Iterator
from functools import partial
from math import ceil, inf
from typing import Any

import numpy as np

from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import engine, parts, records, step_parts, steps, team
from mlp_backprop.engines.compiled.drawing import Orders
from mlp_backprop.engines.compiled.jobs import W_PLACE, job_of
from mlp_backprop.engines.compiled.layout import Layout, layout
from mlp_backprop.engines.compiled.optimizers import OPTIMIZERS, OPTIONS
from mlp_backprop.engines.compiled.schedule import MOST_CHUNKS, batch_chunk_rows, operations
from mlp_backprop.maths.runs import RUNNING, State, Task
from mlp_backprop.types import Array, n_params

AVERAGES = {"": 0, "ema": records.EMA, "swa": records.SWA}
SLICE = 100_000_000  # nanoseconds after which Python has its turn, for Ctrl-C
RANGE = 2048  # parameters in a range, at least
TRY_AGAIN, TRIAL = 10, 0.1  # slices until the other number of threads has so much of one
CLOCK_OPERATIONS, MOST_CLOCK_STEPS = 1_000_000, 16  # between two looks at the clock


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
        self.run, self.members = np.zeros(1, records.RUN), np.zeros(task.n_members, records.MEMBER)
        self.per_epoch = np.array([task.steps_per_epoch(e) for e in range(task.n_members)])
        self.total = task.epochs * self.per_epoch
        self._tell_state()
        self._tell_task()
        self._tell_members()
        self._make_room(self._cut())
        self.orders = Orders(task, self.members)
        self.work = parts.work(steps.training_pass, team.WORK, self.dtype)
        self.lead_alone = parts.entry(steps.lead_alone, steps.LEADING)
        self.next = 0  # the member that is first in the next slice
        self.pace = Pace(min(self.n_workers, self.n_chunks))
        self.meeting = np.zeros(steps.MEETING_BYTES // 8, np.int64)
        ended = np.minimum(state.step // self.per_epoch, task.epochs)
        self.elapsed = float(np.nanmax([0.0, *state.seconds[ended, range(task.n_members)]]))

    # What the records say -------------------------------------------------------------------------

    def _address(self, A: Array) -> int:
        """Of an array that is kept; 0 if it has nothing."""
        self.kept.append(A)
        return int(A.ctypes.data) if A.size else 0

    def _tell_state(self) -> None:
        for name in records.STATE.split():
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
        run["part"] = parts.work(step_parts.part_pass, step_parts.PART, self.dtype)
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
        run["n_ranges"] = n_ranges = max(1, min(records.MOST_RANGES, n // RANGE))
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
        """A table of records.DATA; with the numbers of rows where these do not come as orders."""
        E = self.task.n_members
        table = np.zeros(E, records.DATA)
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
            table["weight"] = self._addresses(weight, 2)
            table["weight_step"] = weight.strides[-1]
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

    def _cut(self) -> Layout:
        """The rows of a batch, and those of the validation data, into chunks; by shapes alone."""
        task, members, sizes = self.task, self.members, self.task.spec.sizes
        batches = [min(task.batch_size, task.n_rows(e)) for e in range(task.n_members)]
        judged = self._n_judged()
        more_rows = len(sizes) if task.max_sample_norm is not None else 0  # of squared_norms
        places = layout(sizes, max(*batches, *judged), self.dtype, more_rows)
        tile_rows, n = places.tile_rows, n_params(sizes)
        per_row, to_judge = operations(sizes, products=3), operations(sizes, products=1)
        rows = [batch_chunk_rows(k, tile_rows, per_row, n) for k in batches]
        members["chunk_rows"] = rows
        self.n_chunks = max(ceil(k / own) for k, own in zip(batches, rows, strict=True))
        members["validation_chunk_rows"] = [
            batch_chunk_rows(k, tile_rows, to_judge) for k in judged
        ]
        most = CLOCK_OPERATIONS / (per_row * max(batches))
        self.run["clock_steps"] = max(1, min(MOST_CLOCK_STEPS, int(most)))
        return places

    def _make_room(self, places: Layout) -> None:
        """Workspaces of the threads."""
        E, n, run = self.task.n_members, n_params(self.task.spec.sizes), self.run
        useful = max(E, self.n_chunks)
        n_workers = self.n_workers = min(threads.thread_count(), team.MOST_WORKERS, useful)
        n_frames = min(n_workers, E)  # those who take the steps of one net together share one
        sums = np.empty((n_frames, max(self.n_chunks * (n + 2), 2 * MOST_CHUNKS)))
        n_squares = (records.MOST_RANGES + 1) * 8 // self.dtype.itemsize
        grads = np.empty((n_frames, ceil((n + n_squares) / 16) * 16), self.dtype)
        run["sums"], run["sums_bytes"] = self._address(sums), sums.strides[0]
        run["grads"], run["grads_bytes"] = self._address(grads), grads.strides[0]
        run["frames"] = self._address(np.zeros((n_frames, records.FRAME_BYTES // 8)))
        run["words"] = self._address(np.zeros((n_workers, records.WORDS // 8), np.int64))
        self._tell_job(places, np.empty((n_workers, places.size), self.dtype))

    def _n_judged(self) -> list[int]:
        task = self.task
        if task.validation is None:
            return [1] * task.n_members
        if task.validation_rows is None:
            return [task.validation[0].shape[-2]] * task.n_members
        return [len(rows) for rows in task.validation_rows]

    def _tell_job(self, places: Layout, workspaces: Array) -> None:
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
        began, goal = now(), self.total
        end = began + int(seconds * 1e9)
        if whole_epoch:
            goal = np.minimum(goal, (self.state.step // self.per_epoch + 1) * self.per_epoch)
        self.members["goal"] = goal
        self.run["began"], self.run["elapsed"] = began, self.elapsed
        try:
            while len(members := self._open(goal)):
                self._slice(members, SLICE if whole_epoch else max(0, min(SLICE, end - now())))
                if not whole_epoch and now() >= end:
                    break
        finally:
            self.elapsed += (now() - began) * 1e-9

    def _open(self, goal: Array) -> Array:
        """The members that go on, beginning with the one that has waited longest."""
        step = self.state.step
        is_open = (self.state.status == RUNNING) & ((step < goal) | (step >= self.total))
        members = np.flatnonzero(is_open)
        return np.roll(members, -int(np.searchsorted(members, self.next)))

    def _slice(self, members: Array, length: int) -> None:
        """Compiled steps for so many nanoseconds, while orders are drawn."""
        self.orders.draw_first(members)
        before = self.state.step[members]
        over = threading.Event()
        try:
            self.orders.begin_drawing(members, over)
            if len(members) == 1:
                self._one_net(members, length)
            else:
                self._run(members, length, min(self.n_workers, len(members)), together=False)
        finally:
            over.set()  # who still draws then does no harm
        waiting = members[self.state.step[members] == before]
        self.next = int(waiting[0]) if len(waiting) else 0

    def _one_net(self, members: Array, length: int) -> None:
        """By as many threads as have been the fastest of late."""
        for n_workers, share in self.pace.turns():
            step, start = self.state.step[members[0]], time.perf_counter()
            self._run(members, int(length * share), n_workers, together=n_workers > 1)
            n_steps = self.state.step[members[0]] - step
            if n_steps:
                self.pace.tell(n_workers, n_steps / (time.perf_counter() - start))

    def _run(self, members: Array, length: int, n_workers: int, together: bool) -> None:
        """A place for each member, or for each thread of those that take steps together."""
        run, n_places = self.run, n_workers if together else len(members)
        run["open"], run["until"] = members.ctypes.data, now() + length
        run["quota"] = length * n_workers // n_places
        self.meeting[...] = 0
        run["meeting"] = self.meeting.ctypes.data if together else 0
        if n_workers > 1:
            team.run(self.work, run.ctypes.data, n_places, n_workers, rested=True)
        else:
            self.lead_alone(self.work, run.ctypes.data, n_places)


def now() -> int:
    """As team.now: in nanoseconds."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


class Pace:
    """How many threads take the steps of one net: one or all, whichever was faster of late.

    Beside a busy process threads that must meet at every step are slower than one. So now and then,
    and more often in the beginning, the other way is tried for a small part of a slice.
    """

    def __init__(self, n_workers: int) -> None:
        self.n_workers = n_workers
        self.rates: dict[int, float] = {}  # steps a second
        self.n_slices = 0

    def turns(self) -> Iterator[tuple[int, float]]:
        """Numbers of threads, and the part of a slice that each may have."""
        left, ways = 1.0, [1, self.n_workers]
        is_early = self.n_slices in (1, 2, 4)
        if self.n_workers > 1 and (is_early or self.n_slices % TRY_AGAIN == 0):
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

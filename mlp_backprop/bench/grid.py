"""The benchmarks: one check of the answer, one timer, one grid.

The problems stand in bench/problems.py, the contenders in bench/contenders.py. A cell is a problem
with a number of rows and a dtype. There every contender answers first and is compared with the
derivation in float64; those that are right are timed in turns, round by round, so that whatever
else the machine does falls on all of them alike. Ratios are quoted from this timer alone.

    results = main_grid("quick")

bench/results.py says what is in the results and what they are held against.
"""

import gc
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import CONTENDERS, Answer, Contender, Ready, Task
from mlp_backprop.bench.problems import (
    PROBLEMS,
    SELECTIONS,
    Cell,
    Effort,
    cells,
    included,
    tolerance,
)
from mlp_backprop.bench.results import Results
from mlp_backprop.edge import validation
from mlp_backprop.edge.arguments import table_row
from mlp_backprop.edge.calls import quietly
from mlp_backprop.nets.initial import init_params
from mlp_backprop.types import Layer

Progress = Callable[[int, int, str], None]  # cells done, cells in all, the cell that comes now


def make_task(cell: Cell) -> Task:
    """Inputs in [0, 1], as pixels are, and torch's initial parameters; the same every time."""
    problem, n, dtype = cell
    rng = np.random.default_rng(0)
    params = init_params(problem.sizes, rng, dtype=dtype)
    X = rng.random((n, problem.sizes[0]), dtype=dtype)  # type: ignore[call-overload]
    if problem.loss == "softmax_cross_entropy":
        y = rng.integers(problem.sizes[-1], size=n)
    else:
        # With two inputs (x1² + x2²)/2, the assignment's target.
        y = np.einsum("ij,ij->i", X, X)[:, None] / problem.sizes[0]
    return Task(params, X, y, problem.activation, problem.loss)


@quietly
def reference(task: Task, block: int = 8192) -> Answer:
    """The derivation in float64, added up over blocks of rows, for n may be large."""
    params = [Layer(W.astype(float), b.astype(float)) for W, b in task.params]
    loss, grads = 0.0, [np.zeros(A.shape) for layer in params for A in layer]
    for start in range(0, len(task.X), block):
        rows = slice(start, start + block)
        spec, *arrays = validation.problem(
            params,
            task.X[rows].astype(float),
            task.y[rows] if task.y.ndim == 1 else task.y[rows].astype(float),
            activation=task.activation,
            loss=task.loss,
            reduction="sum",
            sample_weight=None,
            backend="numpy",
        )
        sums = backprop.loss_and_grad_sums(spec, *arrays)
        loss += float(sums.loss)
        for total, part in zip(grads, (A for layer in sums.grads for A in layer), strict=True):
            total += part
    return Answer(loss / len(task.X), [total / len(task.X) for total in grads])


def largest_error(answer: Answer, expected: Answer) -> float:
    """Over loss and gradients: the largest difference, over the array's largest entry."""
    pairs = zip([answer.loss, *answer.grads], [expected.loss, *expected.grads], strict=True)
    # Not Python's max, which may lose a nan.
    return float(np.max([np.max(np.abs(got - e)) / np.max(np.abs(e)) for got, e in pairs]))


def prepare(
    row: Contender, task: Task, expected: Answer, largest: float
) -> tuple[Ready, dict[str, float]]:
    """Build a contender and see that no error exceeds the largest; the error and first seconds."""
    began = time.perf_counter()
    ready = row.build(task)
    with ready.around():
        result = ready.call()
        seconds = time.perf_counter() - began
    answer = ready.read(result)
    shapes = [g.shape for g in answer.grads]
    if shapes != [g.shape for g in expected.grads]:
        raise ArithmeticError(f"wrong answer: gradients of shapes {shapes}")
    error = largest_error(answer, expected)
    if not error <= largest:  # nan is not below any tolerance
        raise ArithmeticError(f"wrong answer: off by {error:.2g} of the largest entry")
    return ready, {"error": error, "first_call": seconds}


def interleave(
    ready: Mapping[str, Ready],
    effort: Effort,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> dict[str, list[float]]:
    """Seconds per call, one number per round; everybody once in a round, each goes first in turn.

    Short calls are repeated within a sample, so that it lasts ten milliseconds.
    """
    names = list(ready)
    repeats = {name: _repeats(ready[name], clock) for name in names}
    rounds: list[dict[str, float]] = []
    began = clock()

    def goes_on() -> bool:
        if len(rounds) < effort.min_rounds:
            return True
        return len(rounds) < effort.max_rounds and clock() - began < effort.seconds * 1e9

    with _no_garbage_collection():
        while names and goes_on():
            first = len(rounds) % len(names)
            order = names[first:] + names[:first]
            rounds.append({name: _sample(ready[name], repeats[name], clock) for name in order})
    return {name: [times[name] for times in rounds] for name in names}


SAMPLE_NS = 10_000_000


def _repeats(ready: Ready, clock: Callable[[], int]) -> int:
    with ready.around():
        ready.call()
        start = clock()
        ready.call()
        return -(-SAMPLE_NS // max(1, clock() - start))


def _sample(ready: Ready, repeats: int, clock: Callable[[], int]) -> float:
    settle()
    with ready.around():
        if repeats > 1:  # an untimed call wakes the contender's threads
            ready.call()
        start = clock()
        for _ in range(repeats):
            ready.call()
        return (clock() - start) / repeats / 1e9


def settle(limit: float = 0.3) -> None:
    """Wait until all threads sleep: OpenBLAS's spin for 50 ms, on a core the next one may need."""
    deadline = time.perf_counter() + limit
    while time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.005)
        if time.process_time() - before < 0.0005:
            return


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def measure(
    cell: Cell,
    contenders: Iterable[Contender],
    effort: Effort,
    clock: Callable[[], int] = time.perf_counter_ns,
) -> Results:
    """One cell: who is in, whose answer is right, and how long each takes."""
    began = time.monotonic()
    task = make_task(cell)
    expected = reference(task)
    ready: dict[str, Ready] = {}
    timings: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    failed: dict[str, str] = {}
    for row in contenders:
        try:
            _require_memory(row, cell)
            built = prepare(row, task, expected, tolerance(cell))
            ready[row.name], timings[row.name] = built
        except ImportError as reason:
            hint = f"; pip install 'mlp-backprop[{row.extra}]'" if row.extra else ""
            skipped[row.name] = f"{reason}{hint}"
        except (ValueError, MemoryError) as reason:
            skipped[row.name] = str(reason)
        except Exception as reason:  # the trouble of one contender is not that of the others
            failed[row.name] = f"{type(reason).__name__}: {reason}"
    samples = interleave(ready, effort, clock)
    for name, times in samples.items():
        timings[name] |= _statistics(times, samples.get("torch"))
    if cell.dtype == "float32" and cell.n in cell.problem.memory:
        for name in timings:
            timings[name]["peak_bytes"] = peak_memory(cell, name)
    return {
        "problem": cell.problem.name,
        "n": cell.n,
        "dtype": cell.dtype,
        "seconds": time.monotonic() - began,
        "timings": timings,
        "skipped": skipped,
        "failed": failed,
    }


def _statistics(times: list[float], torch: list[float] | None) -> Results:
    low, middle, high = (float(q) for q in np.percentile(times, [25, 50, 75]))
    entry: Results = {"median": middle, "quartiles": [low, high], "rounds": len(times)}
    if torch is not None:
        entry["torch_ratio"] = median(torch) / middle
        entry["torch_ratio_by_round"] = median(t / own for t, own in zip(torch, times, strict=True))
    return entry


def _require_memory(row: Contender, cell: Cell) -> None:
    """Refuse what would drive the machine into swapping, or its kernel to end the benchmark."""
    numbers = row.arrays * cell.n * sum(cell.problem.sizes[1:])
    needed, free = numbers * np.dtype(cell.dtype).itemsize, bench_memory.available()
    if free is not None and needed > free:
        raise MemoryError(f"needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} are free")


def peak_memory(cell: Cell, contender: str) -> int | None:
    """Bytes above the inputs of one call, in a process of its own; None where it is not known."""
    arguments = f"{cell.problem.name!r}, {cell.n}, {cell.dtype!r}, {contender!r}"
    code = f"from mlp_backprop.bench import grid; print(grid.own_peak_memory({arguments}))"
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = child.stdout.split()[-1:]
    return int(last[0]) if child.returncode == 0 and last != ["None"] else None


def own_peak_memory(problem: str, n: int, dtype: str, contender: str) -> int | None:
    """The same in this process; what a contender keeps, or copies of the inputs, counts too."""
    build = CONTENDERS[contender].build
    cell = Cell(PROBLEMS[problem], n, dtype)

    def run(task: Task) -> None:
        ready = build(task)
        with ready.around():
            ready.call()

    task = make_task(cell)
    run(make_task(cell._replace(n=1)))  # loads the library; leaves no memory to be used again
    return bench_memory.peak_above(lambda: run(task))


def import_seconds(n_runs: int = 5) -> float:
    """What `import mlp_backprop` takes after `import numpy`: the median of fresh processes."""
    code = (
        "import time, numpy; start = time.perf_counter(); import mlp_backprop; "
        "print(time.perf_counter() - start)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(n_runs)
    ]
    return median(float(run.stdout) for run in runs)


def main_grid(
    selection: str = "default", *, path: Path | None = None, progress: Progress | None = None
) -> Results:
    """Measure the grid; the results so far are kept after every cell, also when Ctrl-C ends it.

    Parameters
    ----------
    selection : {"quick", "default", "full"}
        Under a minute; under fifteen minutes; all of it.
    path : Path, optional
        A JSON file, written after every cell.
    progress : callable, optional
        progress(done, total, label), called before every cell, and once at the end.

    Returns
    -------
    dict
        What the file holds; bench/results.py describes it.
    """
    effort = table_row("selection", selection, SELECTIONS)
    contenders = [row for row in CONTENDERS.values() if included(row.since, selection)]
    grid = cells(selection)
    began = time.monotonic()
    results: Results = {
        "selection": selection,
        "complete": False,
        "seconds": 0.0,
        **bench_results.surroundings(),
        "import_seconds": import_seconds(),
        "cells": [],
    }
    try:
        for done, cell in enumerate(grid):
            if progress is not None:
                progress(done, len(grid), str(cell))
            results["cells"].append(measure(cell, contenders, effort))
            results["complete"] = done + 1 == len(grid)
            results["seconds"] = time.monotonic() - began
            if path is not None:
                bench_results.save(results, path)
    except KeyboardInterrupt:
        pass
    if progress is not None:
        progress(len(results["cells"]), len(grid), "")
    return results

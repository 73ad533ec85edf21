"""One loss and gradient on a CUDA card: ours, torch four ways, JAX, and what the card allows.

    make bench-gpu PYTHON=python3       or       python benchmarks/bench_gpu.py [--json FILE]

The environment is taken as it is; it needs CuPy and torch. A cell is a net with a number of rows
and a precision. There each contender answers first, is compared with the derivation in float64,
and is then timed by events: one after the other, since the memory of all together would not fit.
The cells that a figure is set for come first; nothing new is begun when the time is up.
"""

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from gpu_contenders import COMPILED, OURS, QUICK, TORCH, contenders
from gpu_floors import Limits, floor, measured_limits, work

from mlp_backprop import backprop
from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Answer, Contender, Ready, Task
from mlp_backprop.edge import validation
from mlp_backprop.types import Layer, flat

SECONDS = 440.0  # of all, under eight minutes; a torch.compile begun late may take some more
EFFORT = grid.Effort(min_rounds=5, max_rounds=50, seconds=0.4)

NETS = {
    net.name: net
    for net in (
        grid.Problem((2, 10, 5, 1), "sigmoid", "squared_error"),
        grid.Problem((64, 64, 64, 1), "tanh", "squared_error"),
        grid.Problem((784, 128, 64, 10), "relu", "softmax_cross_entropy"),
        grid.Problem((784, 1024, 1024, 10), "relu", "softmax_cross_entropy"),
        grid.Problem((4096,) * 5, "relu", "squared_error"),
    )
}

PRECISIONS = ("float32", "tf32", "bfloat16")

# Of the largest entry of each array, up to a million rows; beyond, as in bench.tolerance.
TOLERANCES = {"float32": 2e-3, "tf32": 5e-2, "bfloat16": 2e-1}


Builders = Mapping[str, Callable[..., Ready]]


class Cell(NamedTuple):
    """A net with n rows, in a precision; the arrays are float32."""

    problem: grid.Problem
    n: int
    precision: str

    def __str__(self) -> str:
        return bench_results.label(self.problem.name, self.n, self.precision)


class Target(NamedTuple):
    """How many times faster than torch eager, and than torch's best variant."""

    net: str
    n: int
    precisions: tuple[str, ...]
    must: tuple[float, float]
    aim: tuple[float, float]


TARGETS = (
    Target("2-10-5-1", 1_000, ("float32",), (8, 4), (15, 10)),
    Target("2-10-5-1", 10_000_000, ("float32",), (10, 8), (16, 15)),
    Target("64-64-64-1", 10_000_000, ("bfloat16",), (6, 4), (8, 6)),
    Target("64-64-64-1", 10_000_000, ("float32",), (3, 3), (5, 5)),
    Target("784-128-64-10", 100_000, ("tf32",), (1.3, 1.2), (2.4, 2.0)),
    Target("784-1024-1024-10", 100_000, PRECISIONS, (1.1, 1.0), (1.5, 1.4)),
    Target("4096-4096-4096-4096-4096", 1_000, PRECISIONS, (1.0, 1.0), (1.1, 1.1)),
)

ROWS = {
    "2-10-5-1": (1, 1_000, 100_000, 10_000_000),
    "64-64-64-1": (1_000, 100_000, 10_000_000),
    "784-128-64-10": (1_000, 100_000),
    "784-1024-1024-10": (1_000, 100_000),
    "4096-4096-4096-4096-4096": (1, 1_000),
}


def schedule() -> list[tuple[Cell, Builders]]:
    """Which contenders in which cell: what the targets need, then the rest.

    The tiny net, which is always computed in float32, is there once.
    """
    targets = [Cell(NETS[t.net], t.n, precision) for t in TARGETS for precision in t.precisions]
    rest = [
        Cell(net, n, precision)
        for net in NETS.values()
        for n in ROWS[net.name]
        for precision in (PRECISIONS if net.name != "2-10-5-1" else PRECISIONS[:1])
    ]
    return [
        *((cell, QUICK) for cell in targets),
        *((cell, COMPILED) for cell in targets),
        *((cell, QUICK) for cell in rest if cell not in targets),
    ]


class DeviceClock:
    """Nanoseconds by events: each reading waits for the device and adds the time since the last."""

    def __init__(self, cuda: Any) -> None:
        self.cuda, self.elapsed = cuda, 0.0
        self.last = self._event()

    def __call__(self) -> int:
        now = self._event()
        self.elapsed += self.cuda.get_elapsed_time(self.last, now) * 1e6
        self.last = now
        return round(self.elapsed)

    def _event(self) -> Any:
        self.cuda.runtime.deviceSynchronize()  # other libraries may be on other streams
        event = self.cuda.Event()
        event.record()
        event.synchronize()
        return event


# Measuring ---------------------------------------------------------------------------------------


def make_task(cell: Cell, place: Callable[[np.ndarray], Any]) -> Task:
    """bench's task in float32, all outputs with the same target, put where `place` puts arrays."""
    task = grid.make_task(grid.Cell(cell.problem, cell.n, "float32"))
    y = task.y if task.y.ndim == 1 else np.repeat(task.y, cell.problem.sizes[-1], axis=1)
    params = [Layer(place(W), place(b)) for W, b in task.params]
    return task._replace(params=params, X=place(task.X), y=place(y))


def reference(task: Task, block: int = 65_536) -> Answer:
    """The derivation in float64, where the arrays are, added up over blocks of rows."""
    params = [Layer(W.astype("float64"), b.astype("float64")) for W, b in task.params]
    n, totals = len(task.X), None
    for start in range(0, n, block):
        X, y = task.X[start : start + block], task.y[start : start + block]
        spec, *arrays = validation.problem(
            params,
            X.astype("float64"),
            y if y.ndim == 1 else y.astype("float64"),
            activation=task.names,
            loss=task.loss,
            reduction="sum",
            sample_weight=None,
            backend=None,
        )
        sums = backprop.loss_and_grad_sums(spec, *arrays)
        parts = [sums.loss, *flat(sums.grads)]
        totals = parts if totals is None else [a + b for a, b in zip(totals, parts, strict=True)]
    loss, *grads = (np.array(a.get() if hasattr(a, "get") else a) / n for a in totals)
    return Answer(float(loss), grads)


def tolerance(cell: Cell) -> float:
    return TOLERANCES[cell.precision] * max(1, cell.n / 10**6)


def measure(
    cell: Cell,
    rows: Iterable[Contender],
    place: Callable[[np.ndarray], Any],
    clock: Callable[[], int],
    is_over: Callable[[], bool] = lambda: False,
    clean_up: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Who is right, and how long each takes; what is not timed says why."""
    task = make_task(cell, place)
    expected = reference(task)
    record: dict[str, Any] = {"net": cell.problem.name, "n": cell.n, "precision": cell.precision}
    record |= {"timings": {}, "skipped": {}}
    for row in rows:
        if is_over():
            record["skipped"][row.name] = "the time was up"
            continue
        try:
            ready, facts = grid.prepare(row, task, expected, tolerance(cell))
            times = grid.interleave({row.name: ready}, EFFORT, clock)[row.name]
            low, middle, high = (float(q) for q in np.percentile(times, [25, 50, 75]))
            record["timings"][row.name] = {**facts, "median": middle, "quartiles": [low, high]}
        except Exception as reason:  # the trouble of one contender is not that of the others
            record["skipped"][row.name] = f"{type(reason).__name__}: {reason}"
        ready = None
        clean_up()
    return record


def free_memory() -> None:
    """What one contender keeps in its library's pool is missing to the next."""
    import cupy
    import torch

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    torch.cuda.empty_cache()


# Results -----------------------------------------------------------------------------------------


def joined(first: dict[str, Any] | None, second: dict[str, Any]) -> dict[str, Any]:
    """Two records of one cell, of other contenders."""
    if first is None:
        return second
    return second | {key: first[key] | second[key] for key in ("timings", "skipped")}


def with_figures(record: dict[str, Any], limits: Limits) -> dict[str, Any]:
    """The record, with achieved rates and the share of the floor, and its targets."""
    net, n, precision = NETS[record["net"]], record["n"], record["precision"]
    needed = work(net.sizes, net.activation, net.loss, n, precision)
    least = floor(needed, limits, precision)
    for timing in record["timings"].values():
        seconds = timing["median"]
        timing |= {
            "GB/s": needed.bytes / seconds / 1e9,
            "TFLOP/s": needed.operations / seconds / 1e12,
            "of_floor": least / seconds,
        }
    return {**record, "floor": least, "ratios": ratios(record)}


def ratios(record: dict[str, Any]) -> dict[str, Any]:
    """Times faster than torch eager, and our best than torch's; None if not measured.

    Eager torch makes new arrays, and so does the prepared call. torch's graphs are recorded for
    some arrays, and write to the same ones every time: so is and does the bound call.
    """
    medians = {name: timing["median"] for name, timing in record["timings"].items()}
    ours, theirs = ([medians[m] for m in names if m in medians] for names in (OURS, TORCH))
    new = {"torch", "prepared"} <= medians.keys()
    return {
        "torch": medians["torch"] / medians["prepared"] if new else None,
        "best_torch": min(theirs) / min(ours) if ours and theirs else None,
    }


def verdict(target: Target, found: dict[str, Any]) -> str:
    """Whether both figures were reached."""
    values = (found["torch"], found["best_torch"])
    if None in values:
        return "not measured"
    if all(value >= aim for value, aim in zip(values, target.aim, strict=True)):
        return "aim reached"
    reached = all(value >= must for value, must in zip(values, target.must, strict=True))
    return "reached" if reached else "missed"


def table(records: list[dict[str, Any]]) -> str:
    """Microseconds in Markdown, with the ratios to torch and ours as a share of the floor."""
    names = list(dict.fromkeys(name for record in records for name in record["timings"]))
    head = ["net", "n", "precision", *names, "to torch", "to its best", "of the floor", "target"]
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for record in records:
        timings = record["timings"]
        times = [f"{1e6 * timings[m]['median']:.4g}" if m in timings else "–" for m in names]
        shares = [f"{value:.2f}x" if value else "–" for value in record["ratios"].values()]
        ours = timings.get("prepared")
        share = f"{100 * ours['of_floor']:.0f} %" if ours else "–"
        facts = [record["net"], str(record["n"]), record["precision"]]
        lines.append(" | ".join([*facts, *times, *shares, share, target_text(record)]))
    return "\n".join(f"| {line} |" for line in lines)


def target_text(record: dict[str, Any]) -> str:
    for target in TARGETS:
        if (target.net, target.n) == (record["net"], record["n"]):
            if record["precision"] in target.precisions:
                eager, best = target.must
                return f"{eager}x, {best}x: {verdict(target, record['ratios'])}"
    return ""


def surroundings(limits: Limits) -> dict[str, Any]:
    """The card, its limits as measured, and versions; nothing about whose machine it is."""
    import cupy

    runtime = cupy.cuda.runtime
    libraries = ("mlp-backprop", "numpy", "torch", "jax")
    installed = {name for name in libraries if next(iter(metadata.distributions(name=name)), None)}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode(),
        "driver": runtime.driverGetVersion(),
        "limits": limits._asdict(),
        "versions": {
            "Python": platform.python_version(),
            "cupy": cupy.__version__,
            "CUDA": runtime.runtimeGetVersion(),
            **{name: metadata.version(name) for name in sorted(installed)},
        },
    }


def main() -> None:
    """Measure every cell; the file is written anew after each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    try:
        import cupy
        import torch  # noqa: F401
    except ImportError as error:
        sys.exit(f"bench_gpu compares CuPy with torch, and one is missing: {error}")
    if not cupy.cuda.is_available():
        sys.exit("CuPy sees no CUDA device here")
    began = time.monotonic()
    clock = DeviceClock(cupy.cuda)

    def seconds_of(call: Callable[[], Any]) -> float:
        call()
        start = clock()
        for _ in range(5):
            call()
        return (clock() - start) / 5e9

    def is_over() -> bool:
        return time.monotonic() - began > SECONDS

    limits = measured_limits(seconds_of)
    about = surroundings(limits)
    records: dict[Cell, dict[str, Any]] = {}
    for cell, builders in schedule():
        if is_over():
            break
        print(f"{cell}: {', '.join(builders)} ...", flush=True)
        rows = contenders(builders, cell.precision)
        record = measure(cell, rows, cupy.asarray, clock, is_over, free_memory)
        records[cell] = with_figures(joined(records.get(cell), record), limits)
        if options.json:
            bench_results.save({**about, "cells": list(records.values())}, options.json)
    print(table(list(records.values())))
    for record in records.values():
        for name, reason in record["skipped"].items():
            print(f"{record['net']}, n = {record['n']}, {record['precision']}: {name}: {reason}")


if __name__ == "__main__":
    main()

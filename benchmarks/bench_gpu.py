"""One loss and gradient on a CUDA card: ours, torch four ways, JAX, and what the card allows.

    make bench-gpu PYTHON=python3       or       python benchmarks/bench_gpu.py [--json FILE]

The environment is taken as it is; it needs CuPy, array-api-compat and torch. A cell is a net with
a number of rows and a precision. There each contender answers first, is compared with the
derivation in float64, and is then timed by events: one after the other, since the memory of all
together would not fit. All that is quick comes first, and of it the cells that a figure is set
for; what torch compiles comes last. Nothing new is begun when the time is up.
"""

import argparse
import gc
import platform
import sys
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
from gpu_cells import NETS, TARGETS, Builders, Cell, Target, schedule
from gpu_contenders import COMPILED, INCLUDES, OURS, QUICK, TORCH, contenders
from gpu_floors import Limits, floor, measured_limits, work

from mlp_backprop import backprop
from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Answer, Contender, Task
from mlp_backprop.edge import backends, validation
from mlp_backprop.types import Layer, flat

SECONDS = 440.0  # of all, under eight minutes; a torch.compile begun late may take some more
EFFORT = grid.Effort(min_rounds=5, max_rounds=50, seconds=0.4)

# Of the largest entry of each array, up to a million rows; beyond, as in bench/problems.py.
TOLERANCES = {"float32": 2e-3, "tf32": 5e-2, "bfloat16": 2e-1}


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

    Eager torch makes new arrays, and so does the prepared call, which is handed float32: where
    the precision is another type, that is held against a torch that converts as well. torch's
    graphs are recorded for some arrays, converted beforehand, and write to the same ones every
    time: so is and does the bound call.
    """
    medians = {name: timing["median"] for name, timing in record["timings"].items()}
    ours, theirs = ([medians[m] for m in names if m in medians] for names in (OURS, TORCH))
    eager = "torch_converting" if record["precision"] == "bfloat16" else "torch"
    new = {eager, "prepared"} <= medians.keys()
    return {
        "torch": medians[eager] / medians["prepared"] if new else None,
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


def legend(records: list[dict[str, Any]]) -> str:
    """What the time of each contender that was measured includes."""
    names = dict.fromkeys(name for record in records for name in record["timings"])
    return "\n".join(f"{name}: {INCLUDES[name]}" for name in names)


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


NEEDED = {"cupy": "cupy-cuda13x", "array_api_compat": "array-api-compat", "torch": "torch"}


def require(modules: Iterable[str]) -> None:
    """End in one line that says what to install, or that there is no device."""
    missing = []
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            missing.append((NEEDED[module], error))
    if missing:
        packages, errors = zip(*missing, strict=True)
        reasons = "; ".join(map(str, errors))
        sys.exit(f"missing here: pip install {' '.join(packages)} ({reasons})")
    try:
        backends.namespace("cupy")
    except ImportError as error:
        sys.exit(str(error))


def arguments() -> tuple[list[tuple[Cell, Builders]], Path | None]:
    """What to measure, and where to write it, from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the results here, after each cell")
    parser.add_argument(
        "--cells",
        nargs="+",
        metavar="CELL",
        help="only these: NET, N or PRECISION, or several of them joined by colons, such as "
        "2-10-5-1:float32 or 64-64-64-1:10000000:bfloat16",
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        choices=[*QUICK, *COMPILED],
        help=f"only these of {', '.join([*QUICK, *COMPILED])}",
    )
    options = parser.parse_args()
    try:
        return schedule(options.cells, options.contenders), options.json
    except ValueError as error:
        parser.error(str(error))


def main() -> None:
    """Measure every cell; the file is written anew after each."""
    todo, path = arguments()
    require(NEEDED)
    import cupy

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
    for cell, builders in todo:
        if is_over():
            break
        print(f"{cell}: {', '.join(builders)} ...", flush=True)
        rows = contenders(builders, cell.precision)
        record = measure(cell, rows, cupy.asarray, clock, is_over, free_memory)
        records[cell] = with_figures(joined(records.get(cell), record), limits)
        if path:
            results = {**about, "seconds": time.monotonic() - began, "includes": INCLUDES}
            bench_results.save({**results, "cells": list(records.values())}, path)
    print(table(list(records.values())))
    print(legend(list(records.values())))
    for record in records.values():
        for name, reason in record["skipped"].items():
            print(f"{record['net']}, n = {record['n']}, {record['precision']}: {name}: {reason}")


if __name__ == "__main__":
    main()

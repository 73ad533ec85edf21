"""How much slower every call gets while other processes keep half of the cores busy.

    python benchmarks/bench_load.py [--quick] [--json FILE]

A sample of a call with the other processes stopped and one with them spinning follow each other,
and change places from round to round, so that whatever else the machine does falls on both. Under
load a call must give the bits that it gave without. torch and JAX stand beside: the gradient alone.

A results file is JSON: what bench/results.py says of the surroundings, `seconds` of the run,
`spinners` and `others`, how many cores other processes used while the spinners were stopped (those
of a machine at rest use none), and

    calls: [{net, n, dtype, call, quiet, busy: {median, mean, worst (seconds), calls},
             ratio: {median, mean}}]
    skipped: {call: reason}
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop import (
    clipped_grads,
    fisher_vp,
    forward,
    ggn,
    ggnvp,
    hessian,
    hvp,
    input_grads,
    input_hessian_diag,
    input_hessian_entries,
    jacobian,
    jvp,
    laplacian,
    linear_operator,
    ntk,
    per_sample_grad_norms,
    per_sample_grads,
    ravel_params,
    residual_grads,
    sobolev_grads,
    trace,
    vjp,
)
from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import CONTENDERS, Task
from mlp_backprop.bench.problems import PROBLEMS, Cell, tolerance
from mlp_backprop.engines.threads import usable_cpus

NETS = (("2-10-5-1", 1024), ("64-64-64-1", 64), ("64-64-64-1", 1024), ("784-128-64-10", 128))
DTYPE = "float32"
GRADIENTS = ("call", "prepared", "prepared_numba", "bound_numba", "torch", "jax")

MOST_INPUTS = 64  # for second derivatives by inputs, of which there are as many sweeps
MOST_PARAMETERS = 1000  # for matrices of parameters by parameters
MOST_NUMBERS = 10_000_000  # of a Jacobian by parameters, beyond which memory is what is timed

Call = Callable[[], Any]


class Effort(NamedTuple):
    """How often, and for how many seconds at a time, a call is timed with and without load."""

    rounds: int
    seconds: float


QUICK = Effort(1, 0.01)
FULL = Effort(8, 0.1)


# Calls -------------------------------------------------------------------------------------------


def calls(task: Task) -> dict[str, Call]:
    """Every public function that computes, on one net, as far as its result has a sensible size."""
    params, X, y, activation, loss = task
    n, n_in, n_out = len(X), X.shape[1], len(params[-1].b)
    n_params = len(ravel_params(params))
    net: dict[str, Any] = {"activation": activation}
    both: dict[str, Any] = net | {"loss": loss}
    slopes, u = np.zeros((n, n_out, n_in), X.dtype), np.ones((n, n_out), X.dtype)
    found: dict[str, Call] = {
        "forward": lambda: forward(params, X, **net),
        "trace": lambda: trace(params, X, y, **both),
        "per_sample_grads": lambda: per_sample_grads(params, X, y, **both),
        "per_sample_grad_norms": lambda: per_sample_grad_norms(params, X, y, **both),
        "clipped_grads": lambda: clipped_grads(params, X, y, max_norm=1.0, **both),
        "input_grads": lambda: input_grads(params, X, y, **both),
        "jacobian": lambda: jacobian(params, X, **net),
        "sobolev_grads": lambda: sobolev_grads(params, X, y, slopes, **both),
        "jvp": lambda: jvp(params, X, params, **net),
        "vjp": lambda: vjp(params, X, u, **net),
        "hvp": lambda: hvp(params, X, y, params, **both),
        "ggnvp": lambda: ggnvp(params, X, y, params, **both),
        "fisher_vp": lambda: fisher_vp(params, X, y, params, **both),
        "ntk": lambda: ntk(params, X, X[:64], **net),
    }
    if n * n_out * n_params <= MOST_NUMBERS:
        found["jacobian, params"] = lambda: jacobian(params, X, wrt="params", **net)
    if n_in <= MOST_INPUTS and activation != "relu":
        found |= {
            "input_hessian_diag": lambda: input_hessian_diag(params, X, **net),
            "input_hessian_entries": lambda: input_hessian_entries(params, X, [(0, 1)], **net),
            "laplacian": lambda: laplacian(params, X, **net),
            "residual_grads": lambda: residual_grads(params, X, no_laplacian, **net),
        }
    if n_params <= MOST_PARAMETERS:
        found |= {
            "hessian": lambda: hessian(params, X, y, **both),
            "ggn": lambda: ggn(params, X, y, **both),
        }
    operator = cache(lambda: linear_operator("ggn", params, X, y, **both))
    found["linear_operator"] = lambda: operator() @ ravel_params(params)
    return found


def no_laplacian(X: Any, Y: Any, dY: Any, lap: Any) -> Any:
    """The residual of lap Y = 0."""
    ones = np.ones((*lap.shape, lap.shape[1]), lap.dtype)
    return lap, (None, None, ones)


def gradients(cell: Cell, task: Task) -> tuple[dict[str, Call], dict[str, str]]:
    """Loss and gradient by everybody, answers checked; and who is not here, with the reason."""
    expected = grid.reference(task)
    found, skipped = {}, {}
    for name in GRADIENTS:
        row = CONTENDERS[name]
        try:
            ready, _ = grid.prepare(row, task, expected, tolerance(cell))
        except (ImportError, ValueError) as reason:
            skipped[row.words] = str(reason)
        else:
            found[row.words] = ready.call
    return found, skipped


def arrays_of(result: Any) -> list[np.ndarray]:
    """The arrays of a result of ours, however they are nested."""
    if isinstance(result, list | tuple):
        return [A for part in result for A in arrays_of(part)]
    return [np.array(result)]


# Load --------------------------------------------------------------------------------------------


class Spinners:
    """Processes that keep a core busy each, stopped until they are let go on."""

    def __init__(self, number: int) -> None:
        command = [sys.executable, "-c", "while True: pass"]
        self.processes = [subprocess.Popen(command) for _ in range(number)]
        self._send(signal.SIGSTOP)

    def _send(self, what: int) -> None:
        for process in self.processes:
            process.send_signal(what)
        time.sleep(0.01)  # for a core to be given or left

    @contextmanager
    def spinning(self) -> Iterator[None]:
        """Busy cores."""
        self._send(signal.SIGCONT)
        try:
            yield
        finally:
            self._send(signal.SIGSTOP)

    def end(self) -> None:
        """No process is left."""
        for process in self.processes:
            process.kill()
            process.wait()


def busy_seconds() -> float | None:
    """Of all cores since the machine started, in use by anybody; None where it is not known."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, *rest = map(int, stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


class Others:
    """How many cores other processes use, on average over what is timed with it."""

    def __init__(self) -> None:
        self.used = self.elapsed = 0.0

    @contextmanager
    def watched(self) -> Iterator[None]:
        """One more stretch of time."""
        began, own, busy = time.perf_counter(), time.process_time(), busy_seconds()
        yield
        self.elapsed += time.perf_counter() - began
        if busy is not None:
            self.used += (busy_seconds() or 0.0) - busy - (time.process_time() - own)

    def cores(self) -> float | None:
        """None where it is not known."""
        return None if busy_seconds() is None else max(0.0, self.used / self.elapsed)


# Timing ------------------------------------------------------------------------------------------


def sample(call: Call, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Seconds of every call, for so many seconds, and of three at least."""
    call()
    times: list[float] = []
    began = clock()
    while len(times) < 3 or clock() - began < seconds:
        start = clock()
        call()
        times.append(clock() - start)
    return times


def measure(
    call: Call,
    effort: Effort,
    spinners: Spinners,
    others: Others,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """One call with the spinners stopped and spinning, in turns."""
    times: dict[str, list[float]] = {"quiet": [], "busy": []}
    for number in range(effort.rounds):
        for mode in ("quiet", "busy") if number % 2 == 0 else ("busy", "quiet"):
            grid.settle()
            with others.watched() if mode == "quiet" else spinners.spinning():
                times[mode] += sample(call, effort.seconds, clock)
    found: dict[str, Any] = {mode: statistics(ts) for mode, ts in times.items()}
    quiet, busy = found["quiet"], found["busy"]
    return found | {"ratio": {name: busy[name] / quiet[name] for name in ("median", "mean")}}


def statistics(times: list[float]) -> dict[str, float]:
    """Seconds per call."""
    return {
        "median": float(np.median(times)),
        "mean": float(np.mean(times)),
        "worst": max(times),
        "calls": len(times),
    }


def check_bits(name: str, call: Call, spinners: Spinners) -> None:
    """The answer does not depend on load."""
    expected = arrays_of(call())
    with spinners.spinning():
        got = arrays_of(call())
    if not all(map(np.array_equal, got, expected)):
        raise ArithmeticError(f"{name} gave other bits under load")


# Results -----------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> None:
    """Measure all calls on all nets; the file is written anew after each net."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="see that it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    began, others = time.monotonic(), Others()
    spinners = Spinners(max(1, usable_cpus() // 2))
    results: dict[str, Any] = {
        **bench_results.surroundings(),
        "spinners": len(spinners.processes),
        "calls": [],
        "skipped": {},
    }
    try:
        for net, n in NETS[:1] if options.quick else NETS:
            cell = Cell(PROBLEMS[net], n, DTYPE)
            records, skipped = measured(cell, QUICK if options.quick else FULL, spinners, others)
            results["calls"] += records
            results["skipped"] |= skipped
            results |= {"others": others.cores(), "seconds": time.monotonic() - began}
            print(table(records), flush=True)
            if options.json:
                bench_results.save(results, options.json)
    except KeyboardInterrupt:
        print("stopped")
    finally:
        spinners.end()
    for name, reason in results["skipped"].items():
        print(f"no {name}: {reason}")
    print(summary(results))


def measured(
    cell: Cell, effort: Effort, spinners: Spinners, others: Others
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """The records of one net, and who is missing."""
    task = grid.make_task(cell)
    by_all, skipped = gradients(cell, task)
    ours = calls(task)
    for name, call in ours.items():
        check_bits(f"{name} on {cell}", call, spinners)
    where = {"net": cell.problem.name, "n": cell.n, "dtype": cell.dtype}
    records = [
        {**where, "call": name, **measure(call, effort, spinners, others)}
        for name, call in (by_all | ours).items()
    ]
    return records, skipped


def table(records: list[dict[str, Any]]) -> str:
    """One net in 80 columns: microseconds, and how many times slower under load."""
    first = records[0]
    lines = [
        f"{first['net']}, n = {first['n']}, {first['dtype']}; microseconds",
        f"{'':26}{'quiet':>9}{'busy':>9}{'mean':>9}{'worst':>10}{'median':>9}{'mean':>8}",
    ]
    for record in records:
        quiet, busy, ratio = record["quiet"], record["busy"], record["ratio"]
        figures = [quiet["median"], busy["median"], busy["mean"], busy["worst"]]
        times = "".join(
            f"{1e6 * t:>{width}.0f}" for t, width in zip(figures, (9, 9, 9, 10), strict=True)
        )
        slower = f"{ratio['median']:>8.2f}x{ratio['mean']:>7.2f}x"
        lines.append(f"{record['call']:26}{times}{slower}")
    return "\n".join(lines) + "\n"


def summary(results: dict[str, Any]) -> str:
    """The worst of our calls, and what else the machine did."""
    theirs = {CONTENDERS[name].words for name in ("torch", "jax")}
    ours = [record for record in results["calls"] if record["call"] not in theirs]
    lines = []
    for name in ("median", "mean") if ours else ():
        worst = max(ours, key=lambda record: record["ratio"][name])
        where = f"{worst['call']}, {worst['net']}, n = {worst['n']}"
        lines.append(f"slowest under load by {name}: {worst['ratio'][name]:.2f}x ({where})")
    if results.get("others") is not None:
        lines.append(f"other processes, while quiet: {results['others']:.2f} cores")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

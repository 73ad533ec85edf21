"""Whole training runs: `train` beside torch, JAX and scikit-learn, and what it is held to.

    python benchmarks/bench_training.py [--quick] [--compile] [--json FILE]

All begin with the same parameters and take the rows in the same order (scikit-learn draws its own,
and is compared on rows as they lie), by Adam. Losses and parameters after some epochs are
compared with our reference loop in float64 before anything is timed: in float64, and in float32, in
which all is timed. Samples, runs of several epochs from their beginning, take turns. The orders of
others are drawn beforehand, ours while it runs. --compile adds torch.compile of the step, for
minutes of compilation. A wrong answer, or an error, is reported at the end, with exit status 1.

A results file is JSON: what bench/results.py says of the surroundings, `quick`, `seconds` of the
run, and

    nets: [{net, sizes, n, batch_size, n_members, steps_per_epoch,
            timings: {contender: {median, quartiles, rounds (seconds a step), steps_per_second,
                                  core_median (seconds of all cores a step), epochs (of a sample),
                                  errors: {dtype: error}}},
            skipped, failed: {contender: reason}}]
    load, overhead, memory, data: the records of training_uses.py
    targets: what bench/results.py makes of training_targets.py
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bench_load
import numpy as np
import training_uses
from training_contenders import CONTENDERS, Contender, by_train, one_by_one
from training_targets import TARGETS
from training_tasks import NETS, Net, Task, flat

from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Ready
from mlp_backprop.bench.problems import Effort
from mlp_backprop.types import Array

Expected = dict[bool, tuple[Array, Array]]  # by whether it is of Task.comparable()

CHECKED_STEPS = 20  # at least, and two epochs
FLOAT32, FLOAT32_RELU = 1e-4, 5e-2  # a relu of nearly 0 may be on in one library and off in another
KEYS = ("nets", "load", "overhead", "memory", "data")
QUICK_NETS = (NETS[0], *NETS[4:])
UNDER_LOAD = OVERHEAD = ("2-10-5-1, batch 32", "64-64-64-1, batch 32")


class Plan(NamedTuple):
    """How much is measured."""

    seconds: float  # of a sample
    effort: Effort
    load: bench_load.Effort
    memory_rows: int
    epochs: tuple[int, int, int]  # for the assignment's function, digits, diabetes


FULL = Plan(0.25, Effort(5, 7, 15.0), bench_load.Effort(5, 1.0), 200_000, epochs=(1000, 50, 100))
QUICK = Plan(0.0, Effort(1, 1, 0.0), bench_load.Effort(1, 0.0), 1000, epochs=(2, 2, 2))


def small(net: Net) -> Net:
    """The same for a quick look."""
    return net._replace(n=100, n_members=min(net.n_members, 3), epochs=min(net.epochs, 2))


# Answers ------------------------------------------------------------------------------------------


def checked_epochs(task: Task) -> int:
    return max(2, -(-CHECKED_STEPS // task.steps_per_epoch))


def checked_task(net: Net, dtype: str, comparable: bool) -> Task:
    task = net.task(dtype)
    return task.comparable() if comparable else task


def expected_of(net: Net) -> Expected:
    """By the reference loop in float64, of members each by itself."""
    build = one_by_one if net.n_members else by_train
    found = {}
    for comparable in (False, True):
        task = checked_task(net, "float64", comparable)
        run, read, _ = build(task, backend=None)
        found[comparable] = read(run(checked_epochs(task)))
    return found


def error_of(answer: tuple[Array, Array], expected: tuple[Array, Array], begin: Array) -> float:
    """Of losses, over the loss; of parameters, over the way they went: the larger."""
    if any(np.shape(got) != want.shape for got, want in zip(answer, expected, strict=True)):
        raise ArithmeticError(f"wrong answer: of shapes {[np.shape(A) for A in answer]}")
    (losses, vector), (right_losses, right_vector) = answer, expected
    of_losses = np.abs(losses - right_losses) / np.abs(right_losses)
    way = np.linalg.norm(right_vector - begin, axis=-1)
    of_vector = np.linalg.norm(vector - right_vector, axis=-1) / way
    # Not Python's max, which may lose a nan.
    return float(np.maximum(np.max(of_losses), np.max(of_vector)))


def errors_of(contender: Contender, net: Net, expected: Expected) -> dict[str, float]:
    """In both dtypes; one that is too large is an ArithmeticError."""
    errors = {}
    float32 = FLOAT32_RELU if net.activation == "relu" else FLOAT32
    for dtype, tolerance in (("float64", contender.tolerance), ("float32", float32)):
        task = checked_task(net, dtype, contender.own_ways)
        run, read, around = contender.build(task)
        with around():
            answer = read(run(checked_epochs(task)))
        error = errors[dtype] = error_of(answer, expected[contender.own_ways], flat(task.layers))
        if not error <= tolerance:
            raise ArithmeticError(f"wrong answer: off by {error:.2g} in {dtype}")
    return errors


# Times --------------------------------------------------------------------------------------------


class Timed(NamedTuple):
    """A contender that is right: `call` is a sample, of which `cores` keeps the core seconds."""

    call: Callable[[], Any]
    ready: Ready
    epochs: int
    cores: list[float]


def timed(contender: Contender, net: Net, seconds: float) -> Timed:
    run, _, around = contender.build(net.task())
    with around():
        run(1)
        is_fixed = net.epochs and contender.name in ("numba", "alone")
        epochs = net.epochs if is_fixed else training_uses.epochs_for(run, seconds)
    cores: list[float] = []

    def call() -> Any:
        began = time.process_time()
        result = run(epochs)
        cores.append(time.process_time() - began)
        return result

    return Timed(call, Ready(call, lambda result: result, around), epochs, cores)


def measured(net: Net, names: tuple[str, ...], plan: Plan) -> dict[str, Any]:
    """One net: who is in, whose answer is right, and how long a step of each takes."""
    expected, task = expected_of(net), net.task()
    ready: dict[str, Timed] = {}
    timings: dict[str, dict[str, Any]] = {}
    skipped, failed = {}, {}
    for name in names:
        try:
            errors = errors_of(CONTENDERS[name], net, expected)
            ready[name] = timed(CONTENDERS[name], net, plan.seconds)
        except ImportError as reason:
            skipped[name] = str(reason)
        except Exception as reason:  # the trouble of one contender is not that of the others
            failed[name] = f"{type(reason).__name__}: {reason}"
        else:
            timings[name] = {"errors": errors, "epochs": ready[name].epochs}
    samples = grid.interleave({name: of.ready for name, of in ready.items()}, plan.effort)
    for name, times in samples.items():
        n_steps = ready[name].epochs * task.steps_per_epoch
        timings[name] |= statistics(times, ready[name].cores, n_steps)
    return {
        "net": net.name,
        "sizes": net.sizes,
        "n": net.n,
        "batch_size": task.batch_size,
        "n_members": net.n_members,
        "steps_per_epoch": task.steps_per_epoch,
        "timings": timings,
        "skipped": skipped,
        "failed": failed,
    }


def statistics(times: list[float], cores: list[float], n_steps: int) -> dict[str, Any]:
    low, middle, high = (float(q) / n_steps for q in np.percentile(times, [25, 50, 75]))
    return {
        "median": middle,
        "quartiles": [low, high],
        "rounds": len(times),
        "steps_per_second": 1 / middle,
        "core_median": median(cores) / n_steps,
    }


# Results ------------------------------------------------------------------------------------------


def records(plan: Plan, nets: list[Net], with_compile: bool) -> Iterator[tuple[str, Any]]:
    """All that is measured, one by one, by its key in the results."""
    for net in nets:
        more = ("torch_compile",) if with_compile and "torch" in net.contenders else ()
        yield "nets", measured(net, net.contenders + more, plan)
    for net in nets:
        if net.name in UNDER_LOAD:
            yield "load", training_uses.under_load(net, plan.seconds, plan.load)
    for net in nets:
        if net.name in OVERHEAD:
            yield "overhead", training_uses.overhead(net, 2 * plan.seconds, plan.effort)
    yield "memory", training_uses.memory(plan.memory_rows)
    assignment, digits, diabetes = plan.epochs
    yield "data", training_uses.assignment(assignment)
    yield "data", training_uses.digits(digits)
    yield "data", training_uses.diabetes(diabetes, plan.effort.min_rounds)


def main(arguments: list[str] | None = None) -> None:
    """Measure all; the file is written anew after each record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="see that it runs, not how fast")
    parser.add_argument("--compile", action="store_true", help="torch.compile too; minutes more")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args(arguments)
    results = {**bench_results.surroundings(), "quick": options.quick}
    results |= {key: [] for key in KEYS}
    nets = [*map(small, QUICK_NETS)] if options.quick else [*NETS]
    began = time.monotonic()
    try:
        for key, record in records(QUICK if options.quick else FULL, nets, options.compile):
            results[key].append(record)
            results["seconds"] = time.monotonic() - began
            results["targets"] = bench_results.summary(results, TARGETS)
            print(table(record) if key == "nets" else f"{key}: {line(key, record)}\n", flush=True)
            if options.json:
                bench_results.save(results, options.json)
    except KeyboardInterrupt:
        print("stopped; what was measured until here:")
    print(targets_table(bench_results.summary(results, TARGETS)))
    print(f"this run took {time.monotonic() - began:.0f} s")
    if any(record["failed"] for record in results["nets"]):
        sys.exit("a contender failed: see above")


def table(record: dict[str, Any]) -> str:
    """One net in 80 columns; ratios are to the first of ours."""
    lines = [
        f"{record['net']}: {record['n']} rows",
        f"{'':31}{'steps/s':>12}{'us a step':>12}{'core us':>12}{'ratio':>10}",
    ]
    timings = record["timings"]
    ours = timings.get("numba", {}).get("median")
    for name, entry in timings.items():
        micro = "".join(f"{1e6 * entry[key]:>12.1f}" for key in ("median", "core_median"))
        ratio = f"{entry['median'] / ours:>9.2f}x" if ours else f"{'–':>10}"
        words = CONTENDERS[name].words
        lines.append(f"{words:31}{entry['steps_per_second']:>12.0f}{micro}{ratio}")
    for kind in ("skipped", "failed"):
        for name, reason in record[kind].items():
            lines.append(f"{kind}: {CONTENDERS[name].words}: {reason}"[:80])
    return "\n".join(lines) + "\n"


def line(key: str, record: dict[str, Any]) -> str:
    """What a record of training_uses.py says."""
    if key == "load":
        return f"{record['net']}: {record['ratio']['mean']:.2f} times slower beside a busy process"
    if key == "overhead":
        with_orders, without = (100 * record["share"][name] for name in ("train", "in_order"))
        return f"{record['net']}: {with_orders:.1f} %; {without:.1f} % without shuffling"
    if key == "memory":
        size = "not known" if record["bytes"] is None else f"{record['bytes'] / 1e6:.1f} MB"
        order, data = (record[name] / 1e6 for name in ("order_bytes", "data_bytes"))
        return f"{size} beyond {data:.1f} MB of data; an order of rows has {order:.1f} MB"
    if record["data"] != "diabetes":
        name, figure = list(record.items())[2]
        return f"{record['data']}: {name} {figure:.3g} in {record['seconds']:.2f} s"
    return "diabetes: " + "; ".join(
        f"{name} loss {of['loss']:.3f} in {of['seconds']:.2f} s"
        for name, of in record["by"].items()
    )


def targets_table(rows: list[dict[str, Any]]) -> str:
    """Must, aim and what was reached, in 80 columns."""
    lines = [f"{'target':37}{'must':>8}{'aim':>8}{'reached':>11}"]
    for row in rows:
        unit = " %" if row["unit"] == "%" else row["unit"]
        must, aim, reached = (
            "–" if row[key] is None else f"{row[key]:.3g}{unit}"
            for key in ("must", "aim", "reached")
        )
        verdict = row["verdict"] or ""
        lines.append(f"{row['target']:37}{must:>8}{aim:>8}{reached:>11}  {verdict}".rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What the benchmarks of the other derivatives share: check the answers, time in turns, write.

    python benchmarks/bench_per_sample.py [--quick] [--json FILE]

A case is a derivative of a net; its contenders answer first, are compared with the expected
answer in float64, and those that are right are timed by the interleaved timer of
mlp_backprop.bench. Ratios are medians of the contenders over the median of ours.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop import bench, bench_results
from mlp_backprop.bench_contenders import Ready

QUICK = bench.Effort(min_rounds=2, max_rounds=5, seconds=0.3)
FULL = bench.Effort(min_rounds=7, max_rounds=200, seconds=10.0)

# Of the largest entry of each array. (Opacus adds 1e-6 to the norms that it clips by.)
TOLERANCES = {"float32": 1e-3, "float64": 1e-6}


class Contender(NamedTuple):
    """One way to the answer: `build()` prepares a call, `read` makes a list of NumPy arrays."""

    name: str
    build: Callable[[], Callable[[], Any]]
    read: Callable[[Any], list[np.ndarray]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Case(NamedTuple):
    """One row of the results; the first contender is ours, `expected` the answer in float64."""

    name: str
    dtype: str
    expected: list[np.ndarray]
    contenders: list[Contender]


def measure(case: Case, effort: bench.Effort) -> dict[str, Any]:
    """Who is in, how far off, how long, and how many times ours each takes."""
    ready: dict[str, Ready] = {}
    timings: dict[str, dict[str, float]] = {}
    skipped: dict[str, str] = {}
    for contender in case.contenders:
        try:
            call = contender.build()
            with contender.around():
                error = largest_error(contender.read(call()), case.expected)
        except ImportError as reason:
            skipped[contender.name] = str(reason)
            continue
        if not error <= TOLERANCES[case.dtype]:
            raise ArithmeticError(f"{case.name}: {contender.name} is off by {error:.2g}")
        ready[contender.name] = Ready(call, contender.read, contender.around)
        timings[contender.name] = {"error": error}
    samples = bench.interleave(ready, effort)
    ours = median(samples[case.contenders[0].name])
    for name, times in samples.items():
        low, middle, high = (float(q) for q in np.percentile(times, [25, 50, 75]))
        timings[name] |= {"median": middle, "low": low, "high": high, "ratio": middle / ours}
    return {"case": case.name, "dtype": case.dtype, "timings": timings, "skipped": skipped}


def largest_error(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference, over the largest entry of its array."""
    pairs = list(zip(got, expected, strict=True))
    if any(g.shape != e.shape for g, e in pairs):
        raise ArithmeticError(f"shapes {[g.shape for g in got]}")
    return float(np.max([np.max(np.abs(g - e)) / np.max(np.abs(e)) for g, e in pairs]))


def table(records: Iterable[Mapping[str, Any]]) -> str:
    """The results in Markdown: microseconds, and in brackets times ours."""
    records = list(records)
    names = list(dict.fromkeys(name for record in records for name in record["timings"]))
    lines = ["| case | dtype | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for record in records:
        cells = [_cell(record["timings"].get(name)) for name in names]
        lines.append(f"| {record['case']} | {record['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(timing: Mapping[str, float] | None) -> str:
    return f"{1e6 * timing['median']:.0f} µs ({timing['ratio']:.2f}x)" if timing else ""


def markdown(records: list[dict[str, Any]]) -> str:
    """Records of equal keys as a table."""
    rows = [list(records[0]), ["---"] * len(records[0]), *(r.values() for r in records)]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main(
    cases: Callable[[bool], Iterable[Case]],
    memory: Callable[[bool], list[dict[str, Any]]] | None = None,
) -> None:
    """Measure every case of `cases(quick)`, then memory; the file is written anew after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="see that it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    results: dict[str, Any] = {**bench_results.surroundings(), "cases": []}

    def save() -> None:
        if options.json:
            bench_results.save(results, options.json)

    try:
        for case in cases(options.quick):
            print(f"{case.name}, {case.dtype} ...", flush=True)
            results["cases"].append(measure(case, QUICK if options.quick else FULL))
            save()
        if memory is not None:
            results["memory"] = memory(options.quick)
            save()
    except KeyboardInterrupt:
        print("stopped; what was measured until here:")
    print(table(results["cases"]))
    if "memory" in results:
        print(markdown(results["memory"]))
    for record in results["cases"]:
        for name, reason in record["skipped"].items():
            print(f"{record['case']}: no {name}: {reason}")

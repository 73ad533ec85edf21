"""What the benchmarks of the other derivatives share: check the answers, time in turns, write.

    python benchmarks/bench_per_sample.py [--quick] [--json FILE]
    python benchmarks/compare.py FILE PAGE

The second writes the tables of a page in docs/, between its markers, as programs/screens.py does.

A case is a derivative of a net; its contenders answer first, are compared with the expected
answer in float64, and those that are right are timed by the interleaved timer of
mlp_backprop.bench.grid. Ratios are medians of the contenders over the median of ours.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
from report import MARKED

from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Ready

PEERS = {"opacus": "opacus", "backpack-for-pytorch": "backpack"}  # distributions, modules

QUICK = grid.Effort(min_rounds=2, max_rounds=5, seconds=0.3)
FULL = grid.Effort(min_rounds=7, max_rounds=200, seconds=10.0)

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


def measure(case: Case, effort: grid.Effort) -> dict[str, Any]:
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
    samples = grid.interleave(ready, effort)
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
    """The results in Markdown: microseconds, and in brackets how many times ours."""
    records = list(records)
    names = list(dict.fromkeys(name for record in records for name in record["timings"]))
    lines = ["| case | dtype | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for record in records:
        cells = [_cell(record["timings"].get(name)) for name in names]
        lines.append(f"| {record['case']} | {record['dtype']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(timing: Mapping[str, float] | None) -> str:
    if timing is None:
        return "–"
    ratio = "" if timing["ratio"] == 1 else f" ({timing['ratio']:.2f}x)"
    return f"{1e6 * timing['median']:.0f} µs{ratio}"


class Claim(NamedTuple):
    """Ours against the fastest of some peers, in the worst of some cases."""

    kind: str
    nets: tuple[str, ...]
    dtypes: tuple[str, ...]
    peers: tuple[str, ...]
    must: float
    aim: float


WIDER, BOTH = ("64-64-64-1", "784-128-64-10"), ("float32", "float64")
CLAIMS = (
    Claim("norms", WIDER, ("float32",), ("torch.func",), 10, 50),
    Claim("norms", WIDER, ("float32",), ("Opacus", "BackPACK"), 2.5, 5),
    Claim("norms", ("2-10-5-1",), ("float32",), ("torch.func", "Opacus", "BackPACK"), 6, 12),
    Claim("grads", WIDER, ("float32",), ("torch.func", "Opacus", "BackPACK"), 1.2, 2),
    Claim("clipped", WIDER, ("float32",), ("torch.func",), 5, 20),
    Claim("clipped", WIDER, ("float32",), ("Opacus",), 2, 4),
    Claim("hvp", ("2-10-5-1", "64-64-64-1"), BOTH, ("torch",), 2.5, 4),
    Claim("hvp", ("2-10-5-1", "64-64-64-1"), BOTH, ("JAX",), 0.9, 1.5),
    Claim("jacobian", ("3-64-64-1",), BOTH, ("torch.func",), 3, 10),
    Claim("jacobian", ("3-64-64-1",), BOTH, ("JAX",), 1, 2),
    Claim("laplacian", ("3-64-64-1",), BOTH, ("torch.func",), 3, 10),
    Claim("laplacian", ("3-64-64-1",), BOTH, ("JAX",), 1, 2),
)


def targets(records: Iterable[Mapping[str, Any]]) -> str:
    """What these derivatives are held to, and what came out, in Markdown."""
    records, rows = list(records), []
    for claim in CLAIMS:
        ratios = [
            (min(r["timings"][peer]["ratio"] for peer in claim.peers), r["case"], r["dtype"])
            for r in records
            if r["dtype"] in claim.dtypes
            and any(r["case"].startswith(f"{claim.kind}, {net},") for net in claim.nets)
        ]
        if ratios:
            ratio, case, dtype = min(ratios)
            verdict = "missed" if ratio < claim.must else "reached"
            verdict = "aim reached" if ratio >= claim.aim else verdict
            peers = " and ".join(claim.peers)
            target = f"{claim.kind} against {peers}", f"{claim.must}x", f"{claim.aim}x"
            rows.append((*target, f"{ratio:.2f}x", verdict, f"{case}, {dtype}"))
    names = "target", "must", "aim", "reached", "", "worst case"
    return markdown([dict(zip(names, row, strict=True)) for row in rows])


def markdown(records: list[dict[str, Any]]) -> str:
    """Records of equal keys as a table."""
    rows = [list(records[0]), ["---"] * len(records[0]), *(r.values() for r in records)]
    return "\n".join("| " + " | ".join(map(_number, row)) + " |" for row in rows)


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    return f"{value:_}".replace("_", " ") if isinstance(value, int) else str(value)


def main(
    cases: Callable[[bool], Iterable[Case]],
    memory: Callable[[bool], list[dict[str, Any]]] | None = None,
    summary: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> None:
    """Measure every case of `cases(quick)`, then memory; the file is written anew after each.

    The summary is of all cases.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="see that it runs, not how fast")
    parser.add_argument("--json", type=Path, help="write the results here")
    options = parser.parse_args()
    results: dict[str, Any] = {**bench_results.surroundings(), "seconds": 0.0, "cases": []}
    results["versions"] |= {name: version(name) for name in PEERS if find_spec(PEERS[name])}

    began = time.monotonic()

    def save() -> None:
        results["seconds"] = time.monotonic() - began
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
    if summary is not None and results["cases"]:
        print(markdown(summary(results["cases"])))
    for record in results["cases"]:
        for name, reason in record["skipped"].items():
            print(f"{record['case']}: no {name}: {reason}")


def fill(results: Path, page: Path) -> None:
    """Write the tables of a results file between the markers of a page."""
    found = bench_results.load(results)
    tables = {"times": table(found["cases"]), "targets": targets(found["cases"])}
    if "memory" in found:
        tables["memory"] = markdown(found["memory"])
    filled = MARKED.sub(
        lambda marker: f"{marker[1]} -->\n{tables[marker[1]]}\n", page.read_text(encoding="utf-8")
    )
    page.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    fill(*map(Path, sys.argv[1:]))

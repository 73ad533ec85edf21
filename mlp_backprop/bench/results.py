"""What the benchmarks write: the machine, a record per cell, and what follows from them.

A results file is JSON:

    selection, complete, seconds (of the run), date, machine, versions, threads, import_seconds
    cells: [{problem, n, dtype, seconds,
             timings: {contender: {median, quartiles, rounds (seconds per call),
                                   torch_ratio, torch_ratio_by_round (above 1: faster than torch),
                                   error, first_call, peak_bytes where it was measured}},
             skipped: {contender: reason},
             failed: {contender: reason}}]

`summary` holds it against the targets; bench/tables.py makes texts of it.
"""

import json
import math
import os
import platform
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.environment import environment
from mlp_backprop.bench.problems import CLAIMED_SECONDS, PROBLEMS, label
from mlp_backprop.engines import threads

Results = dict[str, Any]


def surroundings() -> Results:
    """Everything about here and now that times depend on; nothing about whose machine it is."""
    here = environment()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu_model(),
            "cpus": here.cpus,
            "memory_bytes": bench_memory.installed(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": here.versions | {"BLAS": f"{here.blas.name} {here.blas.version}"} | _versions(),
        "threads": {
            "BLAS": here.blas.threads,
            threads.VARIABLE: os.environ.get(threads.VARIABLE),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS"),
        },
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _versions() -> dict[str, str]:
    """Of the contenders' libraries, as far as they are installed."""
    libraries = sorted({row.library for row in CONTENDERS.values()} | {"threadpoolctl"})
    installed = {name for name in libraries if next(iter(metadata.distributions(name=name)), None)}
    return {name: metadata.version(name) for name in libraries if name in installed}


def save(results: Results, path: Path) -> None:
    """Write the file at once or not at all: an interruption leaves the one before."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> Results:
    """Read what `save` wrote."""
    results: Results = json.loads(path.read_text(encoding="utf-8"))
    return results


def merged(files: list[Results]) -> Results:
    """The first, with the cells of the others that it lacks: a run of the largest ones, say."""
    cells: dict[str, Results] = {}
    for results in files:
        for cell in results["cells"]:
            cells.setdefault(label_of(cell), cell)
    nets = list(PROBLEMS)
    in_order = sorted(cells.values(), key=lambda cell: (nets.index(cell["problem"]), cell["n"]))
    return files[0] | {"cells": in_order}


def duration(results: Results) -> str:
    """How long the run took, beside what is claimed of it."""
    claimed = CLAIMED_SECONDS.get(results["selection"])
    taken = f"{results['seconds']:.0f} s, selection {results['selection']}"
    return taken if claimed is None else f"{taken}; claimed: under {claimed} s"


def too_long(results: Results) -> bool:
    """Whether the run took longer than is claimed of its selection."""
    return bool(results["seconds"] >= CLAIMED_SECONDS.get(results["selection"], math.inf))


# --- targets ---------------------------------------------------------------------------------

Where = Callable[[Results], bool]  # of a cell
Ratios = dict[str, float]  # by the name of the cell
Reached = tuple[float, str] | None  # a figure, and where it comes from

OURS = ("prepared", "prepared_numba")
NARROW = ("2-10-5-1", "8-32-32-1")


class Target(NamedTuple):
    """A figure that the package is held to. The unit "x" is a speed, where more is better."""

    name: str
    must: float
    aim: float
    unit: str
    reached: Callable[[Results], Reached]

    def verdict(self, value: float) -> str:
        sign = 1 if self.unit == "x" else -1
        if sign * value >= sign * self.aim:
            return "aim reached"
        return "reached" if sign * value >= sign * self.must else "missed"


def label_of(cell: Results) -> str:
    """The name of a cell of the results, as it is read."""
    return label(cell["problem"], cell["n"], cell["dtype"])


def ratios(
    results: Results,
    ours: tuple[str, ...],
    others: tuple[str, ...],
    where: Where = lambda cell: True,
) -> Ratios:
    """The best of the others' medians over the best of ours, in the cells that have both."""
    found = {}
    for cell in results["cells"]:
        own = [cell["timings"][name]["median"] for name in ours if name in cell["timings"]]
        their = [cell["timings"][name]["median"] for name in others if name in cell["timings"]]
        if own and their and where(cell):
            found[label_of(cell)] = min(their) / min(own)
    return found


def _mean(found: Ratios) -> Reached:
    cells = "1 cell" if len(found) == 1 else f"{len(found)} cells"
    return (geometric_mean(found.values()), f"geometric mean of {cells}") if found else None


def _worst(found: Ratios) -> Reached:
    return min((value, name) for name, value in found.items()) if found else None


def _largest(results: Results, n: int, key: str, scale: float = 1.0) -> Reached:
    """Of an entry of our engines, on 2-10-5-1 in float32."""
    entries = [
        (cell["timings"][name][key] * scale, CONTENDERS[name].words)
        for cell in results["cells"]
        if (cell["problem"], cell["n"], cell["dtype"]) == ("2-10-5-1", n, "float32")
        for name in OURS
        if cell["timings"].get(name, {}).get(key) is not None
    ]
    return max(entries, default=None)


def _small(cell: Results) -> bool:
    return bool(cell["n"] <= 1024)


def _large(dtype: str) -> Where:
    return lambda cell: not _small(cell) and cell["dtype"] == dtype


def _narrow(cell: Results) -> bool:
    return cell["problem"] in NARROW


def _single(cell: Results) -> bool:
    return (cell["problem"], cell["n"]) == ("2-10-5-1", 1)


NUMPY, NUMBA, TORCH, JAX = ("prepared",), ("prepared_numba",), ("torch",), ("jax",)

TARGETS = (
    Target(
        "numpy engine against torch, n up to 1 024",
        *(2.5, 4, "x"),
        lambda results: _mean(ratios(results, NUMPY, TORCH, _small)),
    ),
    Target(
        "numpy engine against torch, n above 1 024, float32",
        *(1.15, 1.6, "x"),
        lambda results: _mean(ratios(results, NUMPY, TORCH, _large("float32"))),
    ),
    Target(
        "numpy engine against torch, n above 1 024, float64",
        *(1.1, 1.5, "x"),
        lambda results: _mean(ratios(results, NUMPY, TORCH, _large("float64"))),
    ),
    Target(
        "numpy engine against torch, worst cell",
        *(0.75, 1, "x"),
        lambda results: _worst(ratios(results, NUMPY, TORCH)),
    ),
    Target(
        "numba engine against torch, 2-10-5-1 and 8-32-32-1",
        *(5, 8, "x"),
        lambda results: _mean(ratios(results, NUMBA, TORCH, _narrow)),
    ),
    Target(
        "numba engine against JAX on these, worst cell",
        *(1.3, 2, "x"),
        lambda results: _worst(ratios(results, NUMBA, JAX, _narrow)),
    ),
    Target(
        "numba engine against torch, 2-10-5-1 with n = 1, bound",
        *(20, 40, "x"),
        lambda results: _worst(ratios(results, ("bound_numba",), TORCH, _single)),
    ),
    Target(
        "our better engine against the better of torch and JAX, worst cell",
        *(0.9, 1.1, "x"),
        lambda results: _worst(ratios(results, OURS, TORCH + JAX)),
    ),
    Target(
        "peak memory beyond the data, 2-10-5-1, n = 10 000 000, float32",
        *(64, 16, "MB"),
        lambda results: _largest(results, 10**7, "peak_bytes", 1e-6),
    ),
    Target(
        "error over largest entry of the gradient, 2-10-5-1, n = 1 000 000, float32",
        *(5e-7, 1e-7, ""),
        lambda results: _largest(results, 10**6, "error"),
    ),
    Target(
        "import mlp_backprop, beyond import numpy",
        *(0.15, 0.05, "s"),
        lambda results: (results["import_seconds"], "median of fresh processes"),
    ),
)


def summary(results: Results, targets: Iterable[Target] = TARGETS) -> list[Results]:
    """Every target with what was reached; None where its contenders or cells are missing."""
    rows = []
    for target in targets:
        value, where = target.reached(results) or (None, "not measured")
        rows.append(
            {
                "target": target.name,
                "must": target.must,
                "aim": target.aim,
                "unit": target.unit,
                "reached": value,
                "where": where,
                "verdict": None if value is None else target.verdict(value),
            }
        )
    return rows

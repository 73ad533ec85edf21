"""What the benchmarks write: the machine, a record per cell, and what follows from them.

A results file is JSON:

    selection, complete, date, machine, versions, threads, import_seconds
    cells: [{problem, n, dtype,
             timings: {contender: {median, quartiles, rounds (seconds per call),
                                   torch_ratio, torch_ratio_by_round (above 1: faster than torch),
                                   error, first_call, peak_bytes where it was measured}},
             skipped: {contender: reason},
             failed: {contender: reason}}]

`summary` holds it against the targets; the tables are for terminals and pages alike.
"""

import json
import os
import platform
from collections.abc import Callable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from statistics import geometric_mean
from typing import Any, NamedTuple

from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.environment import environment
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
    nets = list(dict.fromkeys(cell["problem"] for cell in cells.values()))
    in_order = sorted(cells.values(), key=lambda cell: (nets.index(cell["problem"]), cell["n"]))
    return files[0] | {"cells": in_order}


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


def label(problem: str, n: int, dtype: str) -> str:
    """The name of a cell, as it is read."""
    return f"{problem}, n = {_digits(n)}, {dtype}"


def label_of(cell: Results) -> str:
    """The same, of a cell of the results."""
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
        (cell["timings"][name][key] * scale, name)
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


def summary(results: Results) -> list[Results]:
    """Every target with what was reached; None where its contenders or cells are missing."""
    rows = []
    for target in TARGETS:
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


# --- tables ----------------------------------------------------------------------------------


class Table(NamedTuple):
    """Texts to lay out: the first column to the left, the others to the right."""

    head: list[str]
    rows: list[list[str]]


def summary_table(results: Results) -> Table:
    """The targets."""

    def figure(value: float | None, unit: str) -> str:
        return "–" if value is None else f"{value:.3g} {unit}".replace(" x", "x").strip()

    return Table(
        ["target", "must", "aim", "reached", "", "where"],
        [
            [
                row["target"],
                *(figure(row[key], row["unit"]) for key in ("must", "aim", "reached")),
                row["verdict"] or "",
                row["where"],
            ]
            for row in summary(results)
        ],
    )


def times_table(results: Results, dtype: str) -> Table:
    """Medians in microseconds, a row per cell and a column per contender."""
    return _by_contender(results, dtype, lambda entry: _digits(entry["median"] * 1e6))


def ratios_table(results: Results, dtype: str) -> Table:
    """How many times faster than torch; below 1 means slower."""
    return _by_contender(
        results, dtype, lambda e: f"{e['torch_ratio']:.2f}" if "torch_ratio" in e else "–"
    )


def errors_table(results: Results, dtype: str) -> Table:
    """Largest differences from the gradient in float64."""
    return _by_contender(results, dtype, lambda entry: f"{entry['error']:.0e}")


def memory_table(results: Results) -> Table:
    """Megabytes at the peak, beyond the data, in the cells where that was measured."""

    def megabytes(entry: Results) -> str:
        size = entry.get("peak_bytes")
        return "–" if size is None else _digits(size / 1e6)

    measured = [
        cell
        for cell in results["cells"]
        if any("peak_bytes" in entry for entry in cell["timings"].values())
    ]
    return _by_contender(results | {"cells": measured}, "float32", megabytes)


def missing_table(results: Results) -> Table:
    """Who is missing where, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in results["cells"]:
        for kind in ("skipped", "failed"):
            for name, reason in cell[kind].items():
                where.setdefault((name, reason), []).append(label_of(cell))
    everywhere = len(results["cells"])
    return Table(
        ["contender", "reason", "where"],
        [
            [name, reason, "everywhere" if len(cells) == everywhere else "; ".join(cells)]
            for (name, reason), cells in where.items()
        ],
    )


def surroundings_table(results: Results) -> Table:
    """Machine, versions and threads."""
    memory = results["machine"]["memory_bytes"]
    facts = {
        "date": results["date"],
        "CPU": f"{results['machine']['cpu']}, {results['machine']['cpus']} usable",
        "memory": "–" if memory is None else f"{memory / 1e9:.0f} GB",
        "system": results["machine"]["system"],
        **results["versions"],
        **{f"threads: {name}": value for name, value in results["threads"].items()},
    }
    return Table(["", ""], [[name, str(value)] for name, value in facts.items() if value])


def _by_contender(results: Results, dtype: str, text: Callable[[Results], str]) -> Table:
    cells = [cell for cell in results["cells"] if cell["dtype"] == dtype]
    names = [name for name in CONTENDERS if any(name in cell["timings"] for cell in cells)]
    rows = []
    for cell in cells:
        timings = cell["timings"]
        texts = [text(timings[name]) if name in timings else "–" for name in names]
        rows.append([cell["problem"], _digits(cell["n"]), *texts])
    return Table(["net", "n", *names], rows)


def _digits(value: float) -> str:
    """Three digits at least, and spaces between thousands: 12.3, 1 234; integers as they are."""
    decimals = max(0, 3 - len(str(int(value)))) if isinstance(value, float) else 0
    return f"{value:_.{decimals}f}".replace("_", " ")

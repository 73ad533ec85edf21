"""Texts of benchmark results, to be laid out in a terminal or a page."""

from collections.abc import Callable
from typing import NamedTuple

from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.problems import spaced
from mlp_backprop.bench.results import Results, duration, label_of, summary


class Texts(NamedTuple):
    """Texts to lay out: the first column to the left, the others to the right."""

    head: list[str]
    rows: list[list[str]]


def summary_table(results: Results) -> Texts:
    """The targets."""

    def figure(value: float | None, unit: str) -> str:
        return "–" if value is None else f"{value:.3g} {unit}".replace(" x", "x").strip()

    return Texts(
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


class Block(NamedTuple):
    """One net: texts by contender and cell, each a time and how many times faster than torch."""

    net: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def blocks(results: Results) -> list[Block]:
    """Every net with its contenders, for whoever reads the results in a terminal."""
    return [_block(results, net) for net in dict.fromkeys(c["problem"] for c in results["cells"])]


def _block(results: Results, net: str) -> Block:
    of_net = [cell for cell in results["cells"] if cell["problem"] == net]
    cells = sorted(of_net, key=lambda cell: (cell["dtype"], cell["n"]))
    timings = [cell["timings"] for cell in cells]
    return Block(
        net,
        [f"n = {spaced(cell['n'])}\n{cell['dtype']}" for cell in cells],
        [
            (
                row.words,
                [_time_and_ratio(entries[name]) if name in entries else "–" for entries in timings],
            )
            for name, row in CONTENDERS.items()
            if any(name in entries for entries in timings)
        ],
    )


def _time_and_ratio(entry: Results) -> str:
    """44.5 µs 4.23x; texts of one length under one another, but for ratios of hundreds."""
    ratio = f"{_digits(entry['torch_ratio'])}x" if "torch_ratio" in entry else ""
    return f"{_with_unit(entry['median'])} {ratio:>5}"


def _with_unit(seconds: float) -> str:
    """Three digits: 44.5 µs, 1.05 ms, 12.3 s."""
    for unit, size in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * size:
            return f"{_digits(seconds / size)} {unit}"
    return f"{_digits(seconds)} s"


def times_table(results: Results, dtype: str) -> Texts:
    """Medians in microseconds, a row per cell and a column per contender."""
    return _by_contender(results, dtype, lambda entry: _digits(entry["median"] * 1e6))


def ratios_table(results: Results, dtype: str) -> Texts:
    """How many times faster than torch; below 1 means slower."""
    return _by_contender(
        results, dtype, lambda e: f"{e['torch_ratio']:.2f}" if "torch_ratio" in e else "–"
    )


def errors_table(results: Results, dtype: str) -> Texts:
    """Largest differences from the gradient in float64."""
    return _by_contender(results, dtype, lambda entry: f"{entry['error']:.0e}")


def memory_table(results: Results) -> Texts:
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


def missing_table(results: Results) -> Texts:
    """Who is missing where, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for cell in results["cells"]:
        for kind in ("skipped", "failed"):
            for name, reason in cell[kind].items():
                where.setdefault((name, reason), []).append(label_of(cell))
    everywhere = len(results["cells"])
    return Texts(
        ["contender", "reason", "where"],
        [
            [
                CONTENDERS[name].words,
                reason,
                "everywhere" if len(cells) == everywhere else "; ".join(cells),
            ]
            for (name, reason), cells in where.items()
        ],
    )


def surroundings_table(results: Results) -> Texts:
    """Machine, versions and threads."""
    memory = results["machine"]["memory_bytes"]
    facts = {
        "date": results["date"],
        "duration": duration(results) if "seconds" in results else None,
        "CPU": f"{results['machine']['cpu']}, {results['machine']['cpus']} usable",
        "memory": "–" if memory is None else f"{memory / 1e9:.0f} GB",
        "system": results["machine"]["system"],
        **results["versions"],
        **{f"threads: {name}": value for name, value in results["threads"].items()},
    }
    return Texts(["", ""], [[name, str(value)] for name, value in facts.items() if value])


def _by_contender(results: Results, dtype: str, text: Callable[[Results], str]) -> Texts:
    cells = [cell for cell in results["cells"] if cell["dtype"] == dtype]
    names = [name for name in CONTENDERS if any(name in cell["timings"] for cell in cells)]
    rows = []
    for cell in cells:
        timings = cell["timings"]
        texts = [text(timings[name]) if name in timings else "–" for name in names]
        rows.append([cell["problem"], spaced(cell["n"]), *texts])
    return Texts(["net", "n", *(CONTENDERS[name].words for name in names)], rows)


def _digits(value: float) -> str:
    """Three digits at least, and spaces between thousands: 12.3, 1 234."""
    decimals = max(0, 3 - len(str(int(value))))
    return f"{value:_.{decimals}f}".replace("_", " ")

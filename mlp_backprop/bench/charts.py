"""Charts of benchmark results.

Each is a panel per net and dtype with a line per number of rows, on which every contender has a
mark: nothing is drawn where nothing was measured, and all panels have one scale.

Colours are those of M. Okabe and K. Ito, "Color universal design" (2008), which colour-blind
readers can tell apart; every contender has a marker of its own as well.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import Locator, LogLocator, NullFormatter

from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.problems import spaced
from mlp_backprop.bench.results import Results

# Drawn in this order, all that the targets speak of among them; the others are in the tables.
STYLES = {
    "torch": {"color": "#000000", "marker": "s"},
    "jax": {"color": "#E69F00", "marker": "^"},
    "sklearn": {"color": "#CC79A7", "marker": "v"},
    "derivation": {"color": "#56B4E9", "marker": "D"},
    "prepared": {"color": "#0072B2", "marker": "o"},
    "prepared_numba": {"color": "#D55E00", "marker": "P"},
    "bound_numba": {"color": "#009E73", "marker": "X"},
}

Value = Callable[[Results, str], float]  # of a cell and one of its contenders


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw all charts into the folder, each as SVG and as PNG; the paths of the files."""
    charts = {"throughput": throughput(results), "torch-ratio": torch_ratio(results)}
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    # Without date and random names, the same results give the same files.
    with matplotlib.rc_context({"svg.hashsalt": "mlp_backprop", "svg.fonttype": "none"}):
        for name, figure in charts.items():
            for kind, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                paths.append(folder / f"{name}.{kind}")
                figure.savefig(paths[-1], dpi=150, metadata=metadata)
    return paths


def throughput(results: Results) -> Figure:
    """Samples per second."""

    def samples_per_second(cell: Results, name: str) -> float:
        return float(cell["n"] / cell["timings"][name]["median"])

    figure = _marks(results, list(STYLES), samples_per_second, "samples per second", LogLocator())
    figure.suptitle("Samples per second: one loss and its gradient, more is better")
    return figure


def torch_ratio(results: Results) -> Figure:
    """How many times faster than torch; torch itself is the vertical line."""

    def ratio(cell: Results, name: str) -> float:
        return float(cell["timings"][name]["torch_ratio"])

    with_torch = [cell for cell in results["cells"] if "torch" in cell["timings"]]
    figure = _marks(
        results | {"cells": with_torch},
        [name for name in STYLES if name != "torch"],
        ratio,
        "times faster than torch (left of the line: slower)",
        LogLocator(subs=(1, 2, 5)),
    )
    for axes in figure.axes:
        axes.axvline(1, color=STYLES["torch"]["color"], linewidth=1.5, zorder=1)
        axes.xaxis.set_major_formatter("{x:g}")
    figure.suptitle(
        "Times faster than torch, eager with all its threads: one loss and its gradient"
    )
    return figure


def _marks(results: Results, names: list[str], value: Value, label: str, ticks: Locator) -> Figure:
    """Nets from top to bottom and dtypes beside one another; a line per n, a mark per contender."""
    dtypes = ("float32", "float64")
    rows = {
        net: sorted({c["n"] for c in results["cells"] if c["problem"] == net})
        for net in dict.fromkeys(c["problem"] for c in results["cells"])
    }
    heights = [len(of_net) for of_net in rows.values()]
    figure = Figure(figsize=(9, 1.5 + 0.45 * len(rows) + 0.24 * sum(heights)), layout="constrained")
    panels = figure.subplots(
        len(rows),
        len(dtypes),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=[height + 0.6 for height in heights],
    )
    for (net, of_net), beside in zip(rows.items(), panels, strict=True):
        for dtype, axes in zip(dtypes, beside, strict=True):
            cells = [c for c in results["cells"] if (c["problem"], c["dtype"]) == (net, dtype)]
            for name in names:
                measured = [cell for cell in cells if name in cell["timings"]]
                axes.plot(
                    [value(cell, name) for cell in measured],
                    [of_net.index(cell["n"]) for cell in measured],
                    label=CONTENDERS[name].words,
                    linestyle="",
                    markersize=7,
                    markeredgecolor="white",  # one mark over another is seen
                    markeredgewidth=0.5,
                    **STYLES[name],
                )
            _frame(axes, f"{net}, {dtype}", of_net)
    for axes in panels[-1]:
        axes.set(xscale="log", xlabel=label)
        axes.xaxis.set_major_locator(ticks)
        axes.xaxis.set_minor_formatter(NullFormatter())
    handles, words = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, words, loc="outside lower center", ncols=4)
    return figure


def _frame(axes: Any, title: str, rows: list[int]) -> None:
    """Net and dtype above, the numbers of rows on the left, the smallest on top."""
    axes.set_title(title, loc="left", fontsize="medium")
    axes.set_yticks(range(len(rows)), [f"n = {spaced(n)}" for n in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)

"""Charts of benchmark results; the only file that imports matplotlib.

Colours are those of M. Okabe and K. Ito, "Color universal design" (2008), which colour-blind
readers can tell apart; every contender has a marker of its own as well.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from mlp_backprop.bench.results import Results, label_of

# Drawn in this order; the contenders left out here are in the tables.
STYLES = {
    "torch": {"color": "#000000", "marker": "s"},
    "jax": {"color": "#E69F00", "marker": "^"},
    "sklearn": {"color": "#CC79A7", "marker": "v"},
    "derivation": {"color": "#56B4E9", "marker": "D"},
    "prepared": {"color": "#0072B2", "marker": "o"},
    "prepared_numba": {"color": "#D55E00", "marker": "P"},
}


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
    """Samples per second against the number of rows: a panel per net and dtype."""
    dtypes = ("float32", "float64")
    nets = list(dict.fromkeys(cell["problem"] for cell in results["cells"]))
    figure = Figure(figsize=(8, 0.8 + 2.4 * len(nets)), layout="constrained")
    panels = figure.subplots(len(nets), len(dtypes), sharex="row", sharey="row", squeeze=False)
    for net, row in zip(nets, panels, strict=True):
        for dtype, axes in zip(dtypes, row, strict=True):
            cells = [
                (cell["n"], cell["timings"])
                for cell in results["cells"]
                if (cell["problem"], cell["dtype"]) == (net, dtype)
            ]
            for name in STYLES:
                points = [(n, n / by[name]["median"]) for n, by in cells if name in by]
                _plot(axes, points, name, linestyle="-")
            axes.set(xscale="log", yscale="log", title=f"{net}, {dtype}")
        row[0].set_ylabel("samples / s")
    for axes in panels[-1]:
        axes.set_xlabel("rows n")
    _legend(figure, panels.flat)
    return figure


def torch_ratio(results: Results) -> Figure:
    """How many times faster than torch: a line per cell, a vertical one where both are equal."""
    cells = [cell for cell in results["cells"] if "torch" in cell["timings"]][::-1]
    figure = Figure(figsize=(8, 1.4 + 0.26 * len(cells)), layout="constrained")
    axes = figure.subplots()
    axes.axvline(1, color=STYLES["torch"]["color"], linewidth=1.5)
    for name in STYLES:
        points = [
            (cell["timings"][name]["torch_ratio"], height)
            for height, cell in enumerate(cells)
            if name != "torch" and name in cell["timings"]
        ]
        _plot(axes, points, name, linestyle="")
    axes.set_yticks(range(len(cells)), [label_of(cell) for cell in cells])
    axes.set(xscale="log", xlabel="times faster than torch (left of the line: slower)")
    axes.margins(y=0.02)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    _legend(figure, [axes])
    return figure


def _plot(axes: Any, points: Sequence[tuple[float, float]], name: str, linestyle: str) -> None:
    if points:
        x, y = zip(*points, strict=True)
        axes.plot(x, y, label=name, **STYLES[name], linestyle=linestyle, markersize=5, linewidth=1)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure: Figure, panels: Any) -> None:
    """One for the whole figure, without doubles."""
    handles: dict[str, Any] = {}
    for axes in panels:
        lines, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, lines, strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=6)

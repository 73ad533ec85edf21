"""What the command line shows in a terminal, by rich.

Laid out for 80 columns; a wider terminal shows more entries beside one another.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import zip_longest

import numpy as np
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench import tables
from mlp_backprop.bench.results import Results
from mlp_backprop.edge.backends import BackendStatus
from mlp_backprop.programs import verification
from mlp_backprop.programs.verification import Comparison, Verification, Worked

TITLES = {
    "assignment": "1. The assignment",
    "published": "2. The published tables",
    "digits": "3. Handwritten digits",
}

TEXTS = {
    "assignment": "A 2-10-5-1 net: sigmoid hidden layers, identity output, loss E = (h3 - y)^2. "
    "One sample x, drawn from U[0, 1]^2 and labelled y = (x1^2 + x2^2)/2.",
    "published": "The assignment prints its gradients but not its weights. For one sample dE/dW "
    "is an outer product, so the tables determine an equivalent net; computed here, its gradients "
    "must give back every printed number.",
    "digits": "A 64-32-16-10 net on the 1797 images of scikit-learn, 8 x 8 pixels: sigmoid hidden "
    "layers, softmax cross entropy, mean over the images.",
}

BENCH = (
    "The time of one loss and its gradient, and how many times faster than torch, with all its "
    "threads, that is: below 1 is slower."
)

# Examples that are small enough to be shown entry by entry.
BY_ENTRY = ("assignment", "published")

# Of one block of entries: index, two numbers and their difference. Two blocks fit into 80 columns.
WIDTHS = (6, 10, 10, 7)
GAP = 2

# Of a table of differences: name and shape of the array, and each comparison.
SHAPES_WIDTH = 18
COMPARISON_WIDTH = 19

# Of a block of the benchmarks: a contender's words, and a cell, 44.5 µs 4.23x.
NAME_WIDTH = 20
CELL_WIDTH = 13 + GAP

INDENTED = (0, 0, 0, 4)
BLOCK_WIDTH = sum(WIDTHS) + GAP * len(WIDTHS)


def show_verification(result: Verification) -> None:
    """Print what `verify` found out."""
    console = _console()
    if result.backend is not None:
        _show_backend(console, result.backend)
    for example, title in TITLES.items():
        console.rule(title, align="left", style="dim")
        console.print(TEXTS[example], "", sep="\n")
        if example == "assignment":
            _show_pass(console, result.assignment[0])
        comparisons = [c for c in result.comparisons if c.example == example]
        if not comparisons:
            note = f"Left out: {result.missing['scikit-learn']}."
            console.print(note, "", sep="\n", style="yellow")
            continue
        if "torch" in result.missing and example != "published":
            note = f"No column by PyTorch: {result.missing['torch']}."
            console.print(note, "", sep="\n", style="yellow")
        if example in BY_ENTRY:
            _show_entries(console, comparisons[0], result.backend)
        for measure in dict.fromkeys(c.measure for c in comparisons):
            _show_differences(console, [c for c in comparisons if c.measure == measure])
    _show_verdict(console, result)


def _show_backend(console: Console, backend: BackendStatus) -> None:
    devices = ", ".join(backend.devices)
    text = f"Gradients by backend {backend.name} {backend.version}; its devices here: {devices}."
    console.print(text, "", sep="\n")


def _show_pass(console: Console, worked: Worked) -> None:
    """The sample, and every Z and H with one row per unit."""
    example, steps = worked
    x1, x2 = map(_number, example.X[0])
    y, h3, E = map(_number, (example.y[0, 0], steps.H[-1][0, 0], steps.loss[0]))
    console.print(f"x = ({x1}, {x2})   y = {y}   h3 = {h3}   E = {E}", "", sep="\n")
    columns = {}
    for l in range(1, len(steps.Z)):
        columns[f"z{l}"] = map(_number, steps.Z[l][0])
        columns[f"h{l}"] = map(_number, steps.H[l][0])
    table = _table("unit", *columns)
    for unit, row in enumerate(zip_longest(*columns.values(), fillvalue="")):
        table.add_row(f"[{unit}]", *row)
    console.print(f"Forward pass, by NumPy in {example.dtype}:", "", table, "", sep="\n")


def _show_entries(console: Console, comparison: Comparison, backend: BackendStatus | None) -> None:
    """Every entry of the gradient beside the reference's, in blocks beside one another."""
    headings = "printed", "computed"
    if comparison.example == "assignment":
        theirs, _, _ = comparison.reference.partition(" ")
        headings = f"by {theirs}", f"by {backend.name}" if backend else "by hand"
    console.print(f"Gradients, {comparison.precision}:", "", sep="\n")
    n_blocks = max(1, (console.width + GAP) // BLOCK_WIDTH)
    for table in comparison.tables:
        indices = list(np.ndindex(table.computed.shape))
        n_rows = math.ceil(len(indices) / n_blocks)
        blocks = Table.grid(padding=(0, GAP))
        blocks.add_row(
            *(
                _block(table, headings, indices[start : start + n_rows])
                for start in range(0, len(indices), n_rows)
            )
        )
        console.print(blocks, "")


def _block(
    table: verification.Table, headings: tuple[str, str], indices: list[tuple[int, ...]]
) -> Table:
    theirs, ours = headings
    if table.reference is None:
        block = _table(table.name, ours)
        for index in indices:
            block.add_row(str(list(index)), _number(table.computed[index]))
        return block
    block = _table(table.name, theirs, ours, "diff", widths=WIDTHS)
    for index in indices:
        expected, computed = table.reference[index], table.computed[index]
        difference = _small(abs(computed - expected))
        block.add_row(str(list(index)), _number(expected), _number(computed), difference)
    return block


def _show_differences(console: Console, comparisons: list[Comparison]) -> None:
    """The largest difference in every array, and the tolerance: one column per comparison."""
    relative = ", relative to the largest entry" if comparisons[0].measure == "relative" else ""
    console.print(f"Largest difference{relative}:", "", sep="\n")
    for start, end in _parts(len(comparisons), (console.width - SHAPES_WIDTH) // COMPARISON_WIDTH):
        shown = comparisons[start:end]
        table = _table("array", "shape", *(f"{c.reference}\n{c.precision}" for c in shown))
        for row in zip(*(c.tables for c in shown), strict=True):
            shape = " x ".join(map(str, row[0].computed.shape))
            table.add_row(row[0].name, shape, *(_small(t.difference) for t in row))
        table.add_section()
        table.add_row("tolerance", "", *(_small(c.tolerance) for c in shown))
        table.add_row("", "", *(_mark(c.passed) for c in shown))
        console.print(table, "", sep="\n")


def _parts(n: int, most: int) -> Iterator[tuple[int, int]]:
    """Start and end of parts of about equal size, with at most so many (and at least one) each."""
    size = math.ceil(n / math.ceil(n / max(1, most)))
    return ((start, min(start + size, n)) for start in range(0, n, size))


def _show_verdict(console: Console, result: Verification) -> None:
    console.rule("Result", align="left", style="dim")
    for c in result.comparisons:
        if not c.passed:
            differences = (
                f"{table.name} {_small(table.difference)}"
                for table in c.tables
                if not table.difference <= c.tolerance  # nan is not below any tolerance
            )
            console.print(
                f"{c.example}, {c.reference}, {c.precision}: above the tolerance of "
                f"{_small(c.tolerance)} are {', '.join(differences)}",
                style="red",
            )
    n_passed, n = sum(c.passed for c in result.comparisons), len(result.comparisons)
    absent = f" Left out, not installed: {', '.join(result.missing)}." if result.missing else ""
    console.print(
        f"{'Success' if result.passed else 'FAILED'}: {n_passed} of {n} comparisons are within "
        f"their tolerance.{absent} Largest differences: {_largest(result.comparisons)}.",
        style="green" if result.passed else "bold red",
    )


def _largest(comparisons: list[Comparison]) -> str:
    """The largest difference from each reference in each precision, over all examples."""
    largest: dict[str, float] = {}
    for c in comparisons:
        kind = f"{c.reference} ({c.precision})"
        largest[kind] = float(np.maximum(c.difference, largest.get(kind, 0.0)))
    return ", ".join(f"{kind} {_small(difference)}" for kind, difference in largest.items())


@contextmanager
def progress() -> Iterator[Callable[[int, int, str], None]]:
    """A bar for work in cells: call what it yields with (done, total, what comes now)."""
    columns = (
        MofNCompleteColumn(),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    # Drawn between cells only: a thread that redraws would be timed with them.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False) as bar:
        task = bar.add_task("starting", total=None)

        def advance(done: int, total: int, description: str) -> None:
            bar.update(task, completed=done, total=total, description=description, refresh=True)

        yield advance


def show_benchmarks(results: Results) -> None:
    """A block for each net, the targets, who is missing, and how long it took."""
    console = _console()
    console.print(BENCH, "", sep="\n")
    for block in tables.blocks(results):
        _show_block(console, block)
    _show_targets(console, results)
    _show_missing(console, results)
    style = "yellow" if bench_results.too_long(results) else ""
    console.print(f"This run took {bench_results.duration(results)}.", style=style)


def _show_block(console: Console, block: tables.Block) -> None:
    """One net, contenders down, as many cells beside one another as there is room for."""
    console.rule(block.net, align="left", style="dim")
    for start, end in _parts(len(block.columns), (console.width - NAME_WIDTH) // CELL_WIDTH):
        table = _table("", *block.columns[start:end])
        for words, texts in block.rows:
            table.add_row(words, *texts[start:end])
        console.print(table, "", sep="\n")


def _console() -> Console:
    """Square brackets are indices and names of extras here, not markup."""
    return Console(markup=False, emoji=False, highlight=False)


def _show_targets(console: Console, results: Results) -> None:
    console.rule("Targets", align="left", style="dim")
    for target, must, aim, reached, verdict, where in tables.summary_table(results).rows:
        style = {"": "dim", "missed": "red"}.get(verdict, "green")
        console.print(f"{target}: {reached} {verdict}".rstrip(), style=style)
        console.print(Padding(f"must {must}, aim {aim}; {where}", INDENTED))
    console.print()


def _show_missing(console: Console, results: Results) -> None:
    missing = tables.missing_table(results).rows
    if missing:
        console.rule("Left out", align="left", style="dim")
    for words, reason, where in missing:
        console.print(f"{words}: {reason}")
        console.print(Padding(where, INDENTED), "")


def _table(
    *headings: str, justify: str = "right", widths: tuple[int | None, ...] | None = None
) -> Table:
    """An empty table with names or indices in the first column."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for k, heading in enumerate(headings):
        table.add_column(
            heading,
            justify=justify if k else "left",
            style="" if k else "dim",
            width=widths[k] if widths else None,
        )
    return table


def _number(value: float) -> str:
    """Seven digits after the point, as the assignment prints them."""
    return f"{value:.7f}"


def _small(value: float) -> str:
    return f"{value:.1e}" if value else "0"


def _mark(passed: bool) -> Text:
    return Text("ok", style="green") if passed else Text("FAILED", style="bold red")

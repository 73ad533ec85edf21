"""From benchmark results to the documentation: charts in docs/images, tables in its pages.

    python benchmarks/report.py results.json [more.json ...]

In docs/benchmarks.md and README.md a table stands between the markers <!-- results:NAME --> and
<!-- /results -->; what is between them is replaced, and no figure there is written by hand.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from mlp_backprop.bench import charts
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench import tables as bench_tables
from mlp_backprop.bench.results import Results
from mlp_backprop.bench.tables import Texts

ROOT = Path(__file__).parents[1]
PAGES = ("docs/benchmarks.md", "README.md")
MARKED = re.compile(r"(?<=<!-- results:)([\w-]+) -->\n.*?(?=<!-- /results -->)", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> None:
    """Draw the charts and fill in the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        help="JSON files of `mlp-backprop bench`; of those after the first, only cells it lacks",
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of README.md and docs/")
    options = parser.parse_args(arguments)
    files = {path: bench_results.load(path) for path in options.results}
    for path, run in files.items():
        if "seconds" in run and bench_results.too_long(run):
            sys.exit(f"{path}: this run took {bench_results.duration(run)}")
    results = bench_results.merged(list(files.values()))
    for name in PAGES:
        page = options.root / name
        page.write_text(filled(page.read_text(encoding="utf-8"), tables(results)), encoding="utf-8")
    charts.draw(results, options.root / "docs/images")


def tables(results: Results) -> dict[str, Texts]:
    """Every table of the page, by the name in its marker."""
    by_dtype = {
        "times": bench_tables.times_table,
        "ratios": bench_tables.ratios_table,
        "errors": bench_tables.errors_table,
    }
    return {
        "targets": bench_tables.summary_table(results),
        "memory": bench_tables.memory_table(results),
        "missing": bench_tables.missing_table(results),
        "surroundings": bench_tables.surroundings_table(results),
    } | {
        f"{name}-{dtype}": table(results, dtype)
        for name, table in by_dtype.items()
        for dtype in ("float32", "float64")
    }


def filled(page: str, by_name: dict[str, Texts]) -> str:
    """The page with its tables; a marker without a table is a KeyError."""
    return MARKED.sub(lambda found: f"{found[1]} -->\n{markdown(by_name[found[1]])}", page)


def markdown(table: Texts) -> str:
    """A table as Markdown, the first column to the left, the others to the right."""
    lines = [table.head, ["---", *["---:"] * (len(table.head) - 1)], *table.rows]
    return "".join(f"| {' | '.join(cell.replace('|', '∣') for cell in line)} |\n" for line in lines)


if __name__ == "__main__":
    main()

"""What is made of benchmark results: targets, tables, durations, pages and charts."""

import importlib.util
import json
from pathlib import Path

import pytest

from mlp_backprop.bench import problems, tables
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import CONTENDERS

ROOT = Path(__file__).parents[2]


def made_up():
    """The full grid: torch takes 8, JAX 4, the NumPy engine 2, the numba engine 1, bound 0.8 s."""
    seconds = {"torch": 8.0, "jax": 4.0, "prepared": 2.0, "prepared_numba": 1.0, "bound_numba": 0.8}

    def entry(median):
        return {
            "median": median,
            "quartiles": [median, median],
            "rounds": 5,
            "torch_ratio": 8 / median,
            "torch_ratio_by_round": 8 / median,
            "error": 2e-7,
            "first_call": 1.0,
        }

    def record(cell):
        timings = {name: entry(median) for name, median in seconds.items()}
        if cell.dtype == "float32" and cell.n in cell.problem.memory:
            timings["prepared"]["peak_bytes"] = 10_000_000
            timings["torch"]["peak_bytes"] = None
        return {
            "problem": cell.problem.name,
            "n": cell.n,
            "dtype": cell.dtype,
            "timings": timings,
            "skipped": {"autograd": "No module named 'autograd'"},
            "failed": {},
        }

    return {
        "selection": "full",
        "complete": True,
        "seconds": 1234.5,
        **bench_results.surroundings(),
        "import_seconds": 0.2,
        "cells": [record(cell) for cell in problems.cells("full")],
    }


def test_summary_of_made_up_results():
    results = made_up()
    cells = {bench_results.label_of(cell): cell["timings"] for cell in results["cells"]}
    cells["2-10-5-1, n = 1, float32"]["prepared"]["median"] = 32.0
    cells["2-10-5-1, n = 1, float64"]["prepared_numba"]["median"] = 0.25
    rows = bench_results.summary(results)
    assert json.loads(json.dumps(rows)) == rows
    # Of 16 small cells one is at 1/4, the others at 4; of 16 narrow ones one is at 32.
    small, narrow = 4 ** (14 / 16), 8 * 4 ** (1 / 16)
    assert [row["reached"] for row in rows] == pytest.approx(
        [small, 4, 4, 0.25, narrow, 4, 10, 4, 10, 2e-7, 0.2]
    )
    assert [row["verdict"] for row in rows] == [
        *["reached", "aim reached", "aim reached", "missed", "aim reached", "aim reached"],
        *["missed", "aim reached", "aim reached", "reached", "missed"],
    ]
    assert rows[3]["where"] == "2-10-5-1, n = 1, float32"


def test_summary_leaves_out_what_is_missing():
    results = made_up()
    for cell in results["cells"]:
        del cell["timings"]["prepared_numba"], cell["timings"]["bound_numba"]
    missing = [row["target"] for row in bench_results.summary(results) if row["reached"] is None]
    assert len(missing) == 3
    assert all(target.startswith("numba engine") for target in missing)
    results["cells"].clear()
    measured = [row for row in bench_results.summary(results) if row["reached"] is not None]
    assert [row["target"] for row in measured] == ["import mlp_backprop, beyond import numpy"]


def test_tables_show_every_cell_and_every_reason():
    results = made_up()
    times = tables.times_table(results, "float32")
    ours = ["prepared call, numpy", "prepared call, numba", "bound call, numba"]
    assert times.head == ["net", "n", *ours, "torch", "JAX"]
    assert [
        "2-10-5-1",
        "10 000 000",
        "2 000 000",
        "1 000 000",
        "800 000",
        "8 000 000",
        "4 000 000",
    ] in times.rows
    assert len(times.rows) == len(results["cells"]) / 2
    assert tables.ratios_table(results, "float64").rows[0][2:] == [
        "4.00",
        "8.00",
        "10.00",
        "1.00",
        "2.00",
    ]
    assert tables.memory_table(results).rows[1] == [
        "2-10-5-1",
        "10 000 000",
        "10.0",
        "–",
        "–",
        "–",
        "–",
    ]
    assert tables.missing_table(results).rows == [
        ["HIPS autograd", "No module named 'autograd'", "everywhere"]
    ]
    assert len(tables.summary_table(results).rows) == 11
    assert ["Python", results["versions"]["Python"]] in tables.surroundings_table(results).rows


def test_blocks_have_a_column_per_cell_and_a_row_per_contender():
    results = made_up()
    blocks = tables.blocks(results)
    assert [block.net for block in blocks] == list(problems.PROBLEMS)
    last = blocks[-1]
    assert last.columns == [
        f"n = {n}\n{dtype}" for dtype in ("float32", "float64") for n in ("1 024", "100 000")
    ]
    assert dict(last.rows) == {
        "prepared call, numpy": ["2.00 s 4.00x"] * 4,
        "prepared call, numba": ["1.00 s 8.00x"] * 4,
        "bound call, numba": ["800 ms 10.0x"] * 4,
        "torch": ["8.00 s 1.00x"] * 4,
        "JAX": ["4.00 s 2.00x"] * 4,
    }
    del results["cells"][-1]["timings"]["jax"]
    assert dict(tables.blocks(results)[-1].rows)["JAX"] == ["4.00 s 2.00x"] * 3 + ["–"]
    del results["cells"][-1]["timings"]["torch"]["torch_ratio"]
    assert dict(tables.blocks(results)[-1].rows)["torch"][-1] == "8.00 s      "


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *[(7.83e-6, "7.83 µs"), (999.4e-6, "999 µs"), (999.6e-6, "1.00 ms"), (0.0445, "44.5 ms")],
        *[(0.9996, "1.00 s"), (12.34, "12.3 s"), (1234.0, "1 234 s")],
    ],
)
def test_times_have_a_unit(seconds, text):
    assert tables._with_unit(seconds) == text


def test_every_contender_has_words():
    words = [row.words for row in CONTENDERS.values()]
    assert all(words)
    assert len(set(words)) == len(words)


def test_merging_adds_the_cells_that_the_first_lacks():
    first, second = made_up(), made_up()
    other = first["cells"][0] | {"n": 7}
    second["cells"] = [other, first["cells"][0] | {"timings": {}}]
    merged = bench_results.merged([first, second])
    assert merged | {"cells": first["cells"]} == first
    assert [cell for cell in merged["cells"] if cell["n"] != 7] == first["cells"]
    assert merged["cells"][2] == other  # after the same net with a single row


def test_merging_keeps_to_the_order_of_the_grid():
    whole = made_up()
    first = whole | {"cells": whole["cells"][12:14]}
    assert bench_results.merged([first, whole])["cells"] == whole["cells"]


# --- durations -------------------------------------------------------------------------------


def test_a_run_that_took_longer_than_is_claimed_is_known():
    for selection, claimed in problems.CLAIMED_SECONDS.items():
        run = {"selection": selection, "seconds": claimed - 0.1}
        assert not bench_results.too_long(run)
        assert bench_results.too_long(run | {"seconds": claimed})
        assert bench_results.duration(run).endswith(f"claimed: under {claimed} s")
    assert not bench_results.too_long({"selection": "full", "seconds": 1e9})
    text = bench_results.duration({"selection": "full", "seconds": 1234.5})
    assert text == "1234 s, selection full"


def test_the_claims_are_those_of_the_texts():
    """In words: under a minute, and under fifteen minutes."""
    assert problems.CLAIMED_SECONDS == {"quick": 60, "default": 15 * 60}
    for page in ("docs/benchmarks.md", "CONTRIBUTING.md", "Makefile"):
        assert "under fifteen minutes" in (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks/results").glob("*.json")), ids=lambda path: path.stem
)
def test_the_results_that_the_pages_are_made_of_keep_to_the_claims(path):
    run = bench_results.load(path)
    if "seconds" not in run or "selection" not in run:
        pytest.skip("of a time when durations were not kept, or no run of the grid")
    assert not bench_results.too_long(run)


# --- pages and charts ------------------------------------------------------------------------


@pytest.fixture
def report():
    pytest.importorskip("matplotlib", reason="charts need matplotlib")
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_report_refuses_a_run_that_took_longer_than_is_claimed(report, tmp_path):
    path = tmp_path / "results.json"
    bench_results.save(made_up() | {"selection": "default", "seconds": 901.0}, path)
    with pytest.raises(SystemExit, match="took 901 s, selection default; claimed: under 900 s"):
        report.main([str(path), "--root", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [path]


def test_charts_have_every_contender_that_the_targets_speak_of():
    charts = pytest.importorskip("mlp_backprop.bench.charts", reason="charts need matplotlib")
    results = made_up()
    spoken_of = set()
    for name in CONTENDERS:
        without = made_up()
        for cell in without["cells"]:
            cell["timings"].pop(name, None)
        if bench_results.summary(without) != bench_results.summary(results):
            spoken_of.add(name)
    assert spoken_of == {"torch", "jax", "prepared", "prepared_numba", "bound_numba"}
    assert spoken_of <= set(charts.STYLES)


@pytest.mark.parametrize("chart", ["throughput", "torch_ratio"])
def test_charts_have_titles_words_and_one_scale_and_no_lines(chart):
    charts = pytest.importorskip("mlp_backprop.bench.charts", reason="charts need matplotlib")
    figure = getattr(charts, chart)(made_up())
    assert figure.get_suptitle()
    words = {"JAX", "prepared call, numpy", "prepared call, numba", "bound call, numba"}
    assert words <= {text.get_text() for text in figure.legends[0].get_texts()}
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [f"{net}, {d}" for net in problems.PROBLEMS for d in ("float32", "float64")]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    for axes in figure.axes:
        marks = [line for line in axes.lines if line.get_marker() != "None"]
        assert marks
        assert {line.get_linestyle() for line in marks} == {"None"}


def test_report_fills_the_page_and_draws_the_charts(report, tmp_path):
    (tmp_path / "docs").mkdir()
    for name in report.PAGES:
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    page = tmp_path / "docs/benchmarks.md"
    results = made_up()
    results["cells"] = [cell for cell in results["cells"] if cell["problem"] == "2-10-5-1"]
    bench_results.save(results, tmp_path / "results.json")
    arguments = [str(tmp_path / "results.json"), "--root", str(tmp_path)]
    report.main(arguments)

    once = page.read_text(encoding="utf-8")
    assert "| 2-10-5-1 | 1 | 2 000 000 | 1 000 000 | 800 000 | 8 000 000 | 4 000 000 |\n" in once
    assert "| 2-10-5-1 | 1 | " in (tmp_path / "README.md").read_text(encoding="utf-8")
    charts = {path.name: path.read_bytes() for path in (tmp_path / "docs/images").iterdir()}
    assert {"throughput.svg", "throughput.png", "torch-ratio.svg", "torch-ratio.png"} == set(charts)
    for name, content in charts.items():
        assert content.startswith(b"\x89PNG" if name.endswith("png") else b"<?xml")
    for text in (b"prepared call, numba", b"2-10-5-1, float64", b"n = 100 000"):
        assert text in charts["torch-ratio.svg"]

    report.main(arguments)  # again: the same page and the same charts
    assert page.read_text(encoding="utf-8") == once
    assert charts == {path.name: path.read_bytes() for path in (tmp_path / "docs/images").iterdir()}
    with pytest.raises(KeyError):
        report.filled("<!-- results:unheard-of -->\n<!-- /results -->", report.tables(results))

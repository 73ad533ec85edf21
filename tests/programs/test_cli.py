"""The program as its users meet it: exit status, text, JSON, and the installed wheel."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mlp_backprop
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.environment import environment
from mlp_backprop.programs import cli, info
from mlp_backprop.programs.verification import verify

ROOT = Path(__file__).parents[2]


@pytest.fixture
def no_rich(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.delitem(sys.modules, "mlp_backprop.programs.screens", raising=False)


@pytest.fixture
def bare(monkeypatch):
    """Neither torch nor scikit-learn."""
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)


@pytest.fixture
def wrong_sigmoid(monkeypatch, derivation_only):
    row = ACTIVATIONS["sigmoid"]
    wrong = row._replace(df=lambda xp, Z, H: 1.001 * row.df(xp, Z, H))
    monkeypatch.setitem(ACTIVATIONS, "sigmoid", wrong)


@pytest.fixture(params=[80, 120])
def terminal(request, monkeypatch):
    """A terminal of that many columns."""
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def one_line(text):
    """Text as it was before a terminal wrapped it."""
    return re.sub(r"\s+", " ", text)


def test_verify_shows_every_number_and_succeeds(terminal, capsys):
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert cli.main(["verify"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= terminal
    single = verify().assignment[0].trace
    for array in (*single.Z, *single.H, *(A for layer in single.grads for A in layer)):
        assert all(f"{value:.7f}" in shown for value in array.flat)
    for heading in ("by PyTorch", "by hand", "printed", "computed", "diff"):
        assert heading in shown
    last = one_line(shown).rpartition("Result")[2]
    assert "Success: 6 of 6 comparisons are within their tolerance." in last
    assert re.search(r"Largest differences: PyTorch autograd \(float32\) \d\.\de-\d\d, ", last)


def test_verify_in_a_narrow_terminal(monkeypatch, capsys, bare):
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", "40")
    assert cli.main(["verify"]) == 0
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 40


def test_verify_where_the_terminal_has_no_unicode(tmp_path):
    pytest.importorskip("rich", reason="rich is not installed")
    shown = subprocess.run(
        [sys.executable, "-m", "mlp_backprop", "verify"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"},
        check=True,
        capture_output=True,
    ).stdout
    assert "Success" in shown.decode("ascii")


def test_seeds_show_different_nets(capsys, bare):
    pytest.importorskip("rich", reason="rich is not installed")
    shown = []
    for seed in ("0", "1", "1"):
        assert cli.main(["verify", "--seed", seed]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] != shown[1]
    assert shown[1] == shown[2]


def test_verify_says_what_is_not_installed(terminal, capsys, bare):
    assert cli.main(["verify"]) == 0
    shown = one_line(capsys.readouterr().out)
    assert "No column by PyTorch: backend 'torch' needs torch" in shown
    assert "pip install 'mlp-backprop[torch]'; central differences take its place." in shown
    assert "Left out: the handwritten digits need scikit-learn" in shown
    assert "pip install 'mlp-backprop[cli]'." in shown
    assert "by PyTorch by hand" not in shown
    assert "Left out, not installed: torch, scikit-learn. Largest differences: central" in shown


def test_verify_of_a_backend(terminal, capsys, bare):
    """Without torch, NumPy in float64 stands beside it all the same."""
    assert cli.main(["verify", "--backend", "numpy"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= terminal
    assert "Gradients by backend numpy" in shown
    assert "by NumPy by numpy diff" in one_line(shown)
    assert "pip install 'mlp-backprop[torch]'; NumPy in float64 is left." in one_line(shown)


def test_verify_of_a_backend_that_is_not_installed(capsys, bare):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", "--json", "--backend", "torch"])
    assert stopped.value.code.startswith("mlp-backprop: backend 'torch' needs torch")
    assert capsys.readouterr().out == ""


def test_a_wrong_derivative_is_named_and_exits_1(terminal, capsys, wrong_sigmoid):
    pytest.importorskip("torch", reason="torch is not installed")
    assert cli.main(["verify"]) == 1
    shown = one_line(capsys.readouterr().out)
    assert (
        "assignment, PyTorch autograd, float64: above the tolerance of 1.0e-12 are dE/dW1" in shown
    )
    assert "FAILED: 0 of" in shown


def test_a_wrong_derivative_exits_1_with_json(capsys, bare, wrong_sigmoid):
    assert cli.main(["verify", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["passed"] is False


def test_json_has_everything_in_full_precision(capsys, no_rich):
    """And needs no rich."""
    pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert cli.main(["verify", "--json", "--seed", "7"]) == 0
    content, result = json.loads(capsys.readouterr().out), verify(seed=7)
    assert (content["seed"], content["passed"], content["missing"]) == (7, True, {})
    assert len(content["comparisons"]) == 6
    for read, comparison in zip(content["comparisons"], result.comparisons, strict=True):
        assert {**read, "tables": 0} == {**comparison._asdict(), "tables": 0}
        for table, expected in zip(read["tables"], comparison.tables, strict=True):
            assert table["name"] == expected.name
            assert np.array_equal(table["computed"], expected.computed)
            assert np.array_equal(table["reference"], expected.reference)
    for read, worked in zip(content["assignment"], result.assignment, strict=True):
        assert np.array_equal(read["example"]["X"], worked.example.X)
        assert [layer["W"] for layer in read["example"]["params"]] == [
            W.tolist() for W, _ in worked.example.params
        ]
        for name in ("Z", "H", "D"):
            assert read["trace"][name] == [A.tolist() for A in getattr(worked.trace, name)]


def test_without_rich_one_line_says_what_to_install(no_rich):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify"])
    # A string as the status: Python prints it to stderr and exits with 1.
    assert "pip install 'mlp-backprop[cli]'" in stopped.value.code
    assert "\n" not in stopped.value.code


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["verfy"], "invalid choice"),
        (["verify", "--seed", "-1"], "a seed is an integer, 0 or more; got '-1'"),
        (["verify", "--seed", "1.5"], "a seed is an integer, 0 or more; got '1.5'"),
        (["verify", "--fast"], "unrecognized arguments"),
        (["verify", "--backend", "tensorflow"], "invalid choice: 'tensorflow'"),
        (["info", "--seed", "1"], "unrecognized arguments"),
    ],
)
def test_usage_errors_exit_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_no_command_shows_help(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("verify", "info", "--version"))


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"mlp-backprop {mlp_backprop.__version__}\n"


PIPED = """
import sys

for name in ("torch", "jax", "sklearn.datasets"):
    sys.modules[name] = None  # it takes seconds
from mlp_backprop.programs.cli import main

sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["info", "info --json", "verify", "verify --json"])
def test_a_reader_who_has_gone_is_no_error(command, tmp_path):
    """As `| head` does it; here nobody reads from the start."""
    pytest.importorskip("rich", reason="rich is not installed")
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", PIPED, *command.split()],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        os.close(writer)
    assert done.stderr == ""
    assert done.returncode == (1 if command == "verify" else cli.READER_GONE)  # rich's is 1


@pytest.mark.parametrize("columns", [80, 140])
def test_info_lists_versions_and_backends(columns, capsys, monkeypatch, no_rich):
    """And needs no rich."""
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setitem(sys.modules, "torch", None)
    assert cli.main(["info"]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= columns
    for line in (f"mlp-backprop {mlp_backprop.__version__}", f"NumPy {np.__version__}"):
        assert line in shown
    for name in ("BLAS", "CPUs", "numpy", "cupy", "torch", "jax"):
        assert name in shown
    assert "pip install 'mlp-backprop[torch]'" in one_line(shown)


def test_info_as_json(capsys, no_rich):
    assert cli.main(["info", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["versions"]["NumPy"] == np.__version__
    assert content["cpus"] >= 1
    assert content["blas"]["name"]
    assert content["threads"] >= 1
    assert set(content["import_seconds"]) == {row["name"] for row in content["backends"]}
    backends = {backend["name"]: backend for backend in content["backends"]}
    assert list(backends) == ["numpy", "numba", "cupy", "torch", "jax"]
    assert backends["numpy"]["devices"] == ["cpu"]
    assert all(backend["usable"] == (backend["reason"] is None) for backend in backends.values())


def test_info_without_threadpoolctl_knows_no_threads(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "threadpoolctl", None)
    assert cli.main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["blas"]["threads"] is None


def test_info_says_which_library_was_slow_to_import():
    here = environment()
    seconds = dict.fromkeys(here.import_seconds, 0.01)
    assert "Slow" not in info.text(here._replace(import_seconds=seconds), 80)
    shown = info.text(here._replace(import_seconds=seconds | {"torch": 2.52, "jax": 0.9}), 80)
    assert shown.endswith("\n\nSlow to import here: torch 2.5 s, jax 0.9 s\n")


RESULTS = {
    "selection": "quick",
    "complete": True,
    "seconds": 47.0,
    "import_seconds": 0.03,
    "cells": [
        {
            "problem": "2-10-5-1",
            "n": 1,
            "dtype": "float32",
            "timings": {
                "prepared": {"median": 2e-5, "torch_ratio": 10.0, "error": 1e-7},
                "torch": {"median": 2e-4, "torch_ratio": 1.0, "error": 1e-7},
            },
            "skipped": {"jax": "not here"},
            "failed": {},
        }
    ],
}


@pytest.fixture
def measured(monkeypatch):
    """A grid that is measured at once, and what it was asked for."""
    asked = {}

    def main_grid(selection, *, path, progress):
        asked.update(selection=selection, path=path)
        progress(0, 1, "2-10-5-1")
        progress(1, 1, "")
        return asked.get("results", RESULTS)

    monkeypatch.setattr("mlp_backprop.bench.grid.main_grid", main_grid)
    return asked


def test_bench_shows_times_ratios_targets_and_who_is_missing(terminal, capsys, measured, tmp_path):
    path = tmp_path / "results.json"
    assert cli.main(["bench", "--selection", "quick", "--json", str(path)]) == 0
    assert measured == {"selection": "quick", "path": path}
    shown = one_line(capsys.readouterr().out)
    for text in ("prepared call, numpy 20.0 µs 10.0x", "aim reached", "JAX: not here everywhere"):
        assert text in shown
    assert shown.endswith("This run took 47 s, selection quick; claimed: under 60 s. ")


@pytest.mark.parametrize(("columns", "n_tables"), [(80, 2), (140, 1), (40, 8)])
def test_bench_has_a_block_per_net_and_whole_words(
    columns, n_tables, capsys, measured, monkeypatch
):
    """Eight cells, four of them beside one another in 80 columns, all in 140."""
    pytest.importorskip("rich", reason="rich is not installed")
    monkeypatch.setenv("COLUMNS", str(columns))
    (cell,) = RESULTS["cells"]
    timings = {name: {"median": 1.234e-2, "torch_ratio": 12.3, "error": 0.0} for name in CONTENDERS}
    measured["results"] = RESULTS | {
        "cells": [
            cell | {"problem": net, "n": n, "dtype": dtype, "timings": timings}
            for net in ("784-1024-1024-10", "2-10-5-1")
            for n in (1, 1024, 100_000, 1_000_000)
            for dtype in ("float32", "float64")
        ]
    }
    assert cli.main(["bench", "--selection", "quick"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    for row in CONTENDERS.values():
        beside = [line for line in lines if line.startswith(f"{row.words}  ")]
        assert len(beside) == 2 * n_tables
        assert all(line.count("12.3 ms 12.3x") == 8 // n_tables for line in beside)
    assert "…" not in "".join(lines)
    assert sum(line.startswith("784-1024-1024-10 ─") for line in lines) == 1


def test_bench_draws_charts(measured, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    assert cli.main(["bench", "--plot", str(tmp_path)]) == 0
    assert (tmp_path / "torch-ratio.svg").exists()


def test_bench_tells_of_wrong_answers_and_of_interruption(capsys, measured):
    (cell,) = RESULTS["cells"]
    measured["results"] = RESULTS | {"cells": [cell | {"failed": {"jax": "wrong answer"}}]}
    assert cli.main(["bench"]) == 1
    measured["results"] = RESULTS | {"complete": False}
    assert cli.main(["bench"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_bench_needs_a_folder_for_its_results(measured, tmp_path):
    with pytest.raises(SystemExit, match="No such file or directory"):
        cli.main(["bench", "--json", str(tmp_path / "absent" / "results.json")])
    assert "selection" not in measured


def test_the_wheel_verifies_from_an_empty_directory(tmp_path):
    """Package data, and nothing of the checkout: the wheel is what Python imports."""
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    built = subprocess.run(
        [sys.executable, "-c", build, str(tmp_path)],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    wheel = tmp_path / built.stdout.split()[-1]
    empty = tmp_path / "empty"
    empty.mkdir()

    def run(*arguments):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(wheel)},
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    where = run("-c", "import mlp_backprop; print(mlp_backprop.__file__)")
    assert where.startswith(str(wheel))
    content = json.loads(run("-m", "mlp_backprop", "verify", "--json"))
    assert content["passed"] is True
    assert {c["example"] for c in content["comparisons"]} >= {"assignment", "published"}

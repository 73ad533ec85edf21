"""The benchmarks measure what they say: right answers only, in turns, and nothing lost on the way.

No test here asserts how long anything takes: the clock is made up.
"""

import gc
import os
import subprocess
import sys
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from mlp_backprop import compute_grads
from mlp_backprop.bench import grid, problems
from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import CONTENDERS, Contender, Ready
from mlp_backprop.programs import cli

ROOT = Path(__file__).parents[2]
SMALL = grid.Cell(grid.PROBLEMS["8-32-32-1"], 3, "float32")
LABELS = grid.Cell(grid.PROBLEMS["784-128-64-10"], 2, "float64")
EFFORT = grid.Effort(min_rounds=3, max_rounds=3, seconds=0.0)


class Clock:
    """Moves only when something is called."""

    def __init__(self):
        self.now = 0
        self.log = []

    def __call__(self):
        return self.now

    def contender(self, name, nanoseconds):
        """A contender that takes so long, or one after the other of several times."""
        times = iter(nanoseconds) if isinstance(nanoseconds, list) else count(nanoseconds, 0)

        def call():
            self.log.append(name)
            self.now += next(times)

        return Ready(call, read=lambda result: result)


@pytest.fixture(autouse=True)
def nothing_is_collected(monkeypatch):
    """As before each timing: in a process as large as that of all tests it takes their time."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


# --- tables ----------------------------------------------------------------------------------


def test_grid_has_the_promised_cells():
    def rows(selection):
        found = {"float32": {}, "float64": {}}
        for cell in grid.cells(selection):
            found[cell.dtype].setdefault(cell.problem.name, []).append(cell.n)
        assert found["float32"] == found["float64"]
        return found["float64"]

    default = {
        "2-10-5-1": [1, 1024, 100_000, 1_000_000],
        "8-32-32-1": [1, 1024, 100_000],
        "64-64-64-1": [64, 1024, 100_000],
        "784-128-64-10": [128, 8192],
        "784-1024-1024-10": [1024],
    }
    assert rows("default") == default
    default["2-10-5-1"].append(10_000_000)
    default["784-1024-1024-10"].append(100_000)
    assert rows("full") == default
    assert set(grid.cells("quick")) < set(grid.cells("default"))


@pytest.mark.parametrize("cell", [SMALL, LABELS], ids=str)
def test_data_is_the_same_every_time_and_in_range(cell):
    task, again = grid.make_task(cell), grid.make_task(cell)
    assert task.X.dtype == task.params[0].W.dtype == cell.dtype
    assert task.X.shape == (cell.n, cell.problem.sizes[0])
    assert 0 <= task.X.min() <= task.X.max() <= 1
    np.testing.assert_array_equal(task.X, again.X)
    np.testing.assert_array_equal(task.y, again.y)
    compute_grads(task.params, task.X, task.y, activation=task.activation, loss=task.loss)


# --- answers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", [SMALL, LABELS], ids=lambda cell: cell.problem.name)
@pytest.mark.parametrize("name", sorted(set(CONTENDERS) - {"torch_compile"}))  # compiles for long
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the contenders' own making
def test_contender_is_right(name, cell, dtype):
    task = grid.make_task(cell._replace(dtype=dtype))
    try:
        _, facts = grid.prepare(CONTENDERS[name], task, grid.reference(task), 2e-6)
    except ImportError as reason:
        pytest.skip(str(reason))
    assert facts["error"] < (1e-12 if dtype == "float64" else 2e-6)


def test_reference_adds_up_over_blocks():
    task = grid.make_task(SMALL)
    whole, blocks = grid.reference(task), grid.reference(task, block=2)
    assert grid.largest_error(blocks, whole) < 1e-15
    loss, grads = compute_grads(
        [(W.astype(float), b.astype(float)) for W, b in task.params],
        task.X.astype(float),
        task.y.astype(float),
    )
    assert loss == pytest.approx(whole.loss, rel=1e-14)
    np.testing.assert_allclose(grads[0].W, whole.grads[0], rtol=1e-12)


def wrong(change):
    """The derivation, its answer changed."""

    def build(task):
        ready = CONTENDERS["derivation"].build(task)

        def read(result):
            answer = ready.read(result)
            change(answer.grads)
            return answer

        return ready._replace(read=read)

    return Contender("wrong", "none", "", build)


def double(grads):
    grads[1] *= 2


def forget(grads):
    grads[0][0, 0] = np.nan


def transpose(grads):
    grads[2] = grads[2].T.copy().reshape(grads[2].shape)


def drop(grads):
    grads.pop()


@pytest.mark.parametrize("change", [double, forget, transpose, drop])
def test_wrong_answer_is_refused_and_not_timed(change):
    record = grid.measure(SMALL, [CONTENDERS["derivation"], wrong(change)], EFFORT)
    assert list(record["timings"]) == ["derivation"]
    assert record["failed"]["wrong"].startswith("ArithmeticError: wrong answer")


def refuses(error):
    def build(task):
        raise error

    return Contender("absent", "none", "bench", build, arrays=1)


@pytest.mark.parametrize(
    ("error", "kind", "reason"),
    [
        (ImportError("No module named 'x'"), "skipped", "No module named 'x'; pip install 'mlp-"),
        (ValueError("does not know this loss"), "skipped", "does not know this loss"),
        (ZeroDivisionError("oh"), "failed", "ZeroDivisionError: oh"),
    ],
)
def test_whoever_is_missing_has_a_reason(error, kind, reason):
    record = grid.measure(SMALL, [refuses(error), CONTENDERS["derivation"]], EFFORT)
    assert record[kind]["absent"].startswith(reason)
    assert list(record["timings"]) == ["derivation"]


def test_what_does_not_fit_into_memory_is_skipped(monkeypatch):
    monkeypatch.setattr(bench_memory, "available", lambda: 3 * (32 + 32 + 1) * 4 - 1)
    record = grid.measure(SMALL, [refuses(AssertionError("built"))], EFFORT)
    assert "GB of memory" in record["skipped"]["absent"]


# --- timer -----------------------------------------------------------------------------------


def test_timer_interleaves_in_rotating_order():
    clock, long = Clock(), 20_000_000
    ready = {name: clock.contender(name, long) for name in "abc"}
    samples = grid.interleave(ready, grid.Effort(4, 9, 0.0), clock)
    assert "".join(clock.log) == "aabbcc" + "abc" + "bca" + "cab" + "abc"  # first two calls each
    assert samples == {name: [0.02] * 4 for name in "abc"}


def test_timer_repeats_short_calls_and_divides():
    clock = Clock()
    ready = {"short": clock.contender("s", 3_000_000), "long": clock.contender("l", 10_000_000)}
    samples = grid.interleave(ready, grid.Effort(1, 1, 0.0), clock)
    assert samples == {"short": [0.003], "long": [0.01]}
    assert clock.log.count("s") == 2 + 1 + 4  # to see how long, to wake up, 12 ms
    assert clock.log.count("l") == 2 + 1


def test_timer_goes_on_until_the_time_is_over():
    clock = Clock()
    ready = {"a": clock.contender("a", 20_000_000)}
    assert len(grid.interleave(ready, grid.Effort(2, 9, 0.1), clock)["a"]) == 5
    assert len(grid.interleave(ready, grid.Effort(2, 3, 0.1), clock)["a"]) == 3
    assert grid.interleave({}, grid.Effort(2, 3, 0.1), clock) == {}


def test_context_is_held_around_every_call():
    inside = []

    @contextmanager
    def around():
        inside.append(True)
        yield
        inside.pop()

    def build(task):
        ready = CONTENDERS["derivation"].build(task)

        def call():
            assert inside
            return ready.call()

        return ready._replace(call=call, around=around)

    record = grid.measure(SMALL, [Contender("a", "none", "", build)], EFFORT)
    assert list(record["timings"]) == ["a"]
    assert not inside


def test_torch_on_one_thread_gives_the_others_back():
    torch = pytest.importorskip("torch", reason="torch is not installed")
    kept = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with CONTENDERS["torch_1"].build(grid.make_task(SMALL)).around():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(kept)


def test_measure_reports_medians_quartiles_and_ratios():
    clock = Clock()

    def timed(name, nanoseconds):
        def build(task):
            # Two more calls in front: the check, which the clock does not see, and the wake-up.
            times = [0, *nanoseconds[:1] * 2, *nanoseconds]
            answer = clock.contender(name, times)
            derivation = CONTENDERS["derivation"].build(task)
            return Ready(answer.call, lambda _: derivation.read(derivation.call()))

        return Contender(name, "none", "", build)

    ms = 1_000_000
    torch = timed("torch", [60 * ms, 20 * ms, 40 * ms])
    ours = timed("ours", [10 * ms, 20 * ms, 30 * ms])
    timings = grid.measure(SMALL, [torch, ours], EFFORT, clock)["timings"]
    assert timings["torch"]["median"] == pytest.approx(0.04)
    assert timings["torch"]["torch_ratio"] == 1
    assert timings["ours"]["quartiles"] == pytest.approx([0.015, 0.025])
    assert timings["ours"]["rounds"] == 3
    assert timings["ours"]["torch_ratio"] == pytest.approx(2)
    assert timings["ours"]["torch_ratio_by_round"] == pytest.approx(40 / 30)


# --- memory and files ------------------------------------------------------------------------


PEAK = """
import numpy as np
from mlp_backprop.bench import memory

print(memory.peak_above(lambda: np.ones(200_000_000 // 8)))
"""


def test_peak_memory_sees_what_was_freed_again():
    """In a process that keeps nothing of what it freed: that would be taken again."""
    if bench_memory.peak_above(lambda: None) is None:
        pytest.skip("peak memory is read from /proc, as Linux has it")
    environment = {name: value for name, value in os.environ.items() if "MALLOC_" not in name}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, "-c", PEAK], env=environment, capture_output=True)
    assert 180e6 < int(done.stdout) < 220e6


def test_peak_memory_in_a_process_of_its_own(monkeypatch):
    if bench_memory.available() is None:
        pytest.skip("peak memory is read from /proc, as Linux has it")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    cell = grid.Cell(grid.PROBLEMS["2-10-5-1"], 100_000, "float64")
    # Z, H, D of the widest layer alone are 24 MB.
    assert 24e6 < grid.peak_memory(cell, "derivation") < 200e6
    assert grid.peak_memory(cell, "unheard of") is None


@pytest.fixture
def two_cells(monkeypatch):
    """A grid of two small cells and two contenders."""
    problem = problems.PROBLEMS["2-10-5-1"]._replace(quick=(1, 2), memory=())
    contenders = {
        "derivation": CONTENDERS["derivation"],
        "absent": refuses(ImportError("not here")),
    }
    monkeypatch.setattr(problems, "PROBLEMS", {problem.name: problem})
    monkeypatch.setattr(problems, "TOLERANCES", {"float64": 1e-9})
    monkeypatch.setattr(grid, "CONTENDERS", contenders)
    for module in (grid, problems):
        monkeypatch.setattr(module, "SELECTIONS", {"quick": EFFORT})
    monkeypatch.setattr(grid, "import_seconds", lambda: 0.01)


@pytest.mark.usefixtures("two_cells")
def test_results_are_written_and_read_back(tmp_path):
    path, seen = tmp_path / "results.json", []
    results = grid.main_grid("quick", path=path, progress=lambda *step: seen.append(step))
    assert seen == [
        (0, 2, "2-10-5-1, n = 1, float64"),
        (1, 2, "2-10-5-1, n = 2, float64"),
        (2, 2, ""),
    ]
    assert results["complete"]
    assert bench_results.load(path) == results
    assert list(tmp_path.iterdir()) == [path]
    assert results["versions"]["NumPy"] == np.__version__
    seconds = [cell["seconds"] for cell in results["cells"]]
    assert min(seconds) > 0
    assert results["seconds"] >= sum(seconds)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the contenders' own making
@pytest.mark.usefixtures("two_cells")
def test_every_contender_runs_and_is_shown(tmp_path, monkeypatch, capsys):
    """What `make bench-quick` does, but for the size of the grid."""
    contenders = {name: row for name, row in CONTENDERS.items() if row.since == "quick"}
    monkeypatch.setattr(grid, "CONTENDERS", contenders)
    path = tmp_path / "results.json"
    assert cli.main(["bench", "--selection", "quick", "--json", str(path)]) == 0
    for cell in bench_results.load(path)["cells"]:
        assert cell["failed"] == {}
        assert {*cell["timings"], *cell["skipped"]} == {*contenders}
        assert {"derivation", "prepared"} <= {*cell["timings"]}
    assert "2-10-5-1" in capsys.readouterr().out


@pytest.mark.usefixtures("two_cells")
def test_interruption_keeps_what_is_measured(tmp_path, monkeypatch):
    measure = grid.measure

    def interrupted(cell, *arguments):
        if cell.n == 2:
            raise KeyboardInterrupt
        return measure(cell, *arguments)

    monkeypatch.setattr(grid, "measure", interrupted)
    results = grid.main_grid("quick", path=tmp_path / "results.json")
    assert [cell["n"] for cell in results["cells"]] == [1]
    assert not results["complete"]
    assert bench_results.load(tmp_path / "results.json") == results


def test_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="did you mean 'quick'"):
        grid.main_grid("quik")

"""The benchmark under load: every public function, in turns, and its load started and stopped.

No test here asserts how long anything takes: the clock is made up.
"""

import json
import sys
import time
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import bench_load as bench
import numpy as np
import pytest

import mlp_backprop
from mlp_backprop.bench import grid
from mlp_backprop.bench.contenders import CONTENDERS
from mlp_backprop.bench.problems import PROBLEMS, Cell

# What there is beside calls that compute.
# What computes nothing, or what other calls do; bench_training.py has `train` beside a load.
NO_CALLS = {
    *("BackendStatus", "EpochInfo", "History", "Layer", "LossAndGrads", "MeanAndStd", "Net"),
    *("Params", "PreparedGrads", "Trace", "TrainResult"),
    *("backends", "check_grads", "ensemble_forward", "init_params", "optimizers", "plot_history"),
    *("ravel_params", "schedules", "stack_params", "train", "unravel_params", "unstack_params"),
}


class Log(list):
    """Stands for the spinners, the others and a call, and keeps what happens."""

    @contextmanager
    def spinning(self):
        self.append("busy")
        yield

    @contextmanager
    def watched(self):
        self.append("quiet")
        yield


def test_every_public_function_that_computes_is_measured():
    task = grid.make_task(Cell(PROBLEMS["2-10-5-1"], 3, "float32"))
    names = {name.partition(",")[0] for name in bench.calls(task)}
    in_the_table = {"compute_grads", "prepare_grads"}  # of contenders
    assert names | in_the_table | NO_CALLS == set(mlp_backprop.__all__)
    assert {"call", "prepared", "prepared_numba", "torch", "jax"} <= set(bench.GRADIENTS)
    assert set(bench.GRADIENTS) <= set(CONTENDERS)


@pytest.mark.parametrize(("net", "n"), [("64-64-64-1", 5), ("784-128-64-10", 2)])
def test_calls_of_every_net_run(net, n):
    for call in bench.calls(grid.make_task(Cell(PROBLEMS[net], n, "float32"))).values():
        assert all(np.isfinite(A).all() for A in bench.arrays_of(call()))


def test_samples_take_turns_and_ratios_are_those_of_the_modes(monkeypatch):
    log, now = Log(), [0.0]
    monkeypatch.setattr(bench.grid, "settle", lambda: None)

    def call():
        now[0] += 3.0 if log[-1] == "busy" else 1.0

    effort = bench.Effort(rounds=3, seconds=10.0)
    found = bench.measure(call, effort, log, log, lambda: now[0])
    assert log == ["quiet", "busy", "busy", "quiet", "quiet", "busy"]
    assert found["ratio"] == {"median": 3.0, "mean": 3.0}
    assert found["quiet"] == {"median": 1.0, "mean": 1.0, "worst": 1.0, "calls": 30}
    assert found["busy"]["calls"] == 3 * 4


def test_a_single_slow_call_shows_in_the_mean_and_the_worst():
    assert bench.statistics([1.0, 1.0, 1.0, 7.0]) == {
        "median": 1.0,
        "mean": 2.5,
        "worst": 7.0,
        "calls": 4,
    }


def test_other_bits_under_load_end_the_run():
    answers = count()
    bench.check_bits("same", lambda: (np.ones(2), [(np.zeros(3),)]), Log())
    with pytest.raises(ArithmeticError, match="other bits under load"):
        bench.check_bits("other", lambda: [np.full(2, next(answers))], Log())


def state_of(process):
    """The letter that Linux has for what a process does."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_spinners_are_stopped_but_while_they_spin():
    spinners = bench.Spinners(2)
    try:
        for _ in range(2):
            wait_until(lambda: {state_of(process) for process in spinners.processes} == {"T"})
            with spinners.spinning():
                wait_until(lambda: "T" not in map(state_of, spinners.processes))
    finally:
        spinners.end()
    assert all(process.poll() is not None for process in spinners.processes)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_has_every_call_and_the_table_fits(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "NETS", (("2-10-5-1", 3),))
    monkeypatch.setattr(bench, "QUICK", bench.Effort(1, 0.0))
    monkeypatch.setattr(bench, "GRADIENTS", ("call", "prepared"))
    path = tmp_path / "results.json"
    bench.main(["--quick", "--json", str(path)])
    results = json.loads(path.read_text(encoding="utf-8"))
    for name in ("seconds", "others", "spinners", "machine", "versions", "date"):
        assert results[name] is not None
    task = grid.make_task(Cell(PROBLEMS["2-10-5-1"], 3, "float32"))
    assert len(results["calls"]) == 2 + len(bench.calls(task))
    for record in results["calls"]:
        assert record["ratio"].keys() == {"median", "mean"}
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert all(record["call"] in printed for record in results["calls"])


def test_the_table_fits_for_long_times_too():
    slow = {"median": 9.0, "mean": 9.0, "worst": 99.0, "calls": 3}
    record = {"net": "784-1024-1024-10", "n": 100_000, "dtype": "float32", "call": "a" * 26}
    record |= {"quiet": slow, "busy": slow, "ratio": {"median": 123.45, "mean": 123.45}}
    assert max(map(len, bench.table([record]).splitlines())) <= 80


def test_the_summary_is_of_ours():
    def record(call, ratio):
        where = {"net": "2-10-5-1", "n": 3, "dtype": "float32", "call": call}
        return where | {"ratio": {"median": ratio, "mean": 2 * ratio}}

    results = {"calls": [record("hvp", 1.5), record("torch", 9.0), record("forward", 1.2)]}
    text = bench.summary(results | {"others": 0.25})
    assert text.splitlines() == [
        "slowest under load by median: 1.50x (hvp, 2-10-5-1, n = 3)",
        "slowest under load by mean: 3.00x (hvp, 2-10-5-1, n = 3)",
        "other processes, while quiet: 0.25 cores",
    ]
    assert bench.summary({"calls": []}) == ""

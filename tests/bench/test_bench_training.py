"""The benchmark of training: whose answers count, and what it makes of its timings.

No test here asserts how long anything takes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest


@pytest.fixture
def bench(programs):
    import bench_training

    return bench_training


@pytest.fixture
def tiny(bench, monkeypatch):
    """Little of everything, by our own loop, torch and scikit-learn."""
    pytest.importorskip("torch")
    pytest.importorskip("sklearn")
    names = ("reference", "torch_1", "sklearn")
    net = bench.NETS[0]._replace(n=50, contenders=names)
    monkeypatch.setattr(bench, "QUICK_NETS", (net,))
    monkeypatch.setattr(bench, "UNDER_LOAD", ())
    monkeypatch.setattr(bench, "OVERHEAD", ())
    monkeypatch.setattr(bench, "small", lambda net: net)
    return net


def wrong(bench, name, **changes):
    """A contender whose task is not the one that it was given."""
    row = bench.CONTENDERS[name]

    def build(task):
        for what, value in changes.items():
            setattr(task, what, value)
        return row.build(task)

    return row._replace(build=build)


@pytest.mark.parametrize("index", range(7))
def test_everybody_agrees_on_every_net(bench, index):
    for library in ("torch", "jax", "sklearn", "numba"):
        pytest.importorskip(library)
    net = bench.small(bench.NETS[index])._replace(n=60)
    expected = bench.expected_of(net)
    for name in net.contenders:
        errors = bench.errors_of(bench.CONTENDERS[name], net, expected)
        assert errors.keys() == {"float64", "float32"}


@pytest.mark.parametrize("name", ["reference", "torch_1", "torch_fused_1", "sklearn"])
def test_a_wrong_answer_is_caught(bench, tiny, name):
    expected = bench.expected_of(tiny)
    bench.errors_of(bench.CONTENDERS[name], tiny, expected)
    for changes in ({"eps": 1e-6}, {"batch_size": 31}, {"activation": "tanh"}):
        with pytest.raises(ArithmeticError, match="wrong answer: off by"):
            bench.errors_of(wrong(bench, name, **changes), tiny, expected)


def test_losses_parameters_and_shapes_count(bench):
    expected, begin = (np.array([2.0, 1.0]), np.array([[3.0, 4.0], [6.0, 8.0]])), np.zeros((2, 2))
    assert bench.error_of(expected, expected, begin) == 0
    losses, vector = (A.copy() for A in expected)
    losses[1] += 0.125
    assert bench.error_of((losses, expected[1]), expected, begin) == 0.125
    vector[0, 0] += 1
    assert bench.error_of((expected[0], vector), expected, begin) == 1 / 5
    with pytest.raises(ArithmeticError, match="wrong answer: of shapes"):
        bench.error_of((losses[:1], vector), expected, begin)


def test_nan_is_a_wrong_answer(bench, tiny):
    expected = bench.expected_of(tiny)
    layers = tiny.task().layers
    row = wrong(bench, "torch_1", layers=[type(l)(l.W * np.nan, l.b) for l in layers])
    with pytest.raises(ArithmeticError, match="off by nan"):
        bench.errors_of(row, tiny, expected)


def test_a_wrong_contender_is_reported_and_not_timed(bench, tiny, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(bench.CONTENDERS, "torch_1", wrong(bench, "torch_1", shuffle=False))
    monkeypatch.setattr(bench, "records", lambda plan, nets, _: one_net(bench, plan, nets))
    path = tmp_path / "results.json"
    with pytest.raises(SystemExit, match="failed"):
        bench.main(["--quick", "--json", str(path)])
    [record] = json.loads(path.read_text(encoding="utf-8"))["nets"]
    assert record["timings"].keys() == {"reference", "sklearn"}
    assert record["failed"]["torch_1"].startswith("ArithmeticError: wrong answer: off by")
    assert "failed: torch, one thread: ArithmeticError" in capsys.readouterr().out


def one_net(bench, plan, nets):
    yield "nets", bench.measured(nets[0], nets[0].contenders, plan)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_file_is_complete_and_the_tables_fit(bench, tiny, tmp_path, capsys):
    pytest.importorskip("numba")
    path = tmp_path / "results.json"
    bench.main(["--quick", "--json", str(path)])
    results = json.loads(path.read_text(encoding="utf-8"))
    for name in ("seconds", "machine", "versions", "date", "memory"):
        assert results[name]
    [record] = results["nets"]
    for entry in record["timings"].values():
        assert entry["median"] > 0
        assert entry["errors"]["float64"] < 1e-9
    assert [record["data"] for record in results["data"]] == ["assignment", "digits", "diabetes"]
    assert [row["target"] for row in results["targets"]] == [t.name for t in bench.TARGETS]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert "ours, reference loop" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="stops processes, and reads /proc")
def test_load_and_overhead_have_all_that_the_targets_read(bench):
    pytest.importorskip("numba")
    net = bench.small(bench.NETS[0])
    load = bench.training_uses.under_load(net, 0.0, bench.QUICK.load)
    overhead = bench.training_uses.overhead(net, 0.0, bench.QUICK.effort)
    results = {"nets": [], "data": [], "load": [load], "overhead": [overhead]}
    rows = bench.bench_results.summary(results, bench.TARGETS)
    found = {row["target"]: row["reached"] for row in rows if row["reached"] is not None}
    assert found == {
        "beside a busy process: times slower": load["ratio"]["mean"],
        "a run over its bare steps, more by": 100 * overhead["share"]["train"],
    }
    for key, record in (("load", load), ("overhead", overhead)):
        assert net.name in bench.line(key, record)


def made_up(bench):
    """Steps of ours take 1 s, those of others 2, 3, ... in the order of the table."""
    nets = []
    for net in bench.NETS:
        seconds = {name: 1.0 + place for place, name in enumerate(net.contenders)}
        entries = {name: {"median": s, "core_median": 2 * s} for name, s in seconds.items()}
        nets.append({"net": net.name, "timings": entries})
    return {"nets": nets, "data": [], "load": [], "overhead": []}


def test_the_best_of_the_peers_counts(bench):
    results = made_up(bench)
    results["nets"][0]["timings"]["torch_compile"] = {"median": 0.5}
    rows = {row["target"]: row for row in bench.bench_results.summary(results, bench.TARGETS)}
    assert rows["2-10-5-1, batch 32: to torch"]["reached"] == 0.5
    assert rows["2-10-5-1, batch 32: to torch"]["where"] == "torch.compile"
    assert rows["8-32-32-1, batch 32: to torch"]["reached"] == 3
    assert rows["8-32-32-1, batch 32: to JAX"]["reached"] == 7
    assert rows["8-32-32-1, batch 32: to JAX"]["verdict"] == "aim reached"
    assert rows["reference loop, 2-10-5-1: to torch"]["reached"] == 0.25
    assert rows["4-32-16-4, 10 000 epochs: core s"]["reached"] == 20_000
    assert rows["100 members over 100 single runs"]["reached"] == 0.5
    assert rows["100 members over 100 single runs"]["verdict"] == "aim reached"
    assert rows["100 members: to torch.func"]["verdict"] == "missed"
    assert len(bench.targets_table([*rows.values()]).splitlines()) == 1 + len(bench.TARGETS)


def test_every_net_of_a_target_is_measured(bench):
    names = {net.name for net in bench.NETS}
    import training_targets

    assert {*training_targets.SPEEDS, training_targets.FULL, training_targets.MEMBERS} == names
    assert {*bench.UNDER_LOAD, *bench.OVERHEAD} <= names


def test_epoch_means_count_rows(bench):
    task = bench.NETS[0]._replace(n=5, batch_size=2).task()
    losses = np.array([[1.0, 10], [2, 20], [3, 30], [4, 40], [5, 50], [6, 60]])
    assert np.allclose(task.epoch_means(losses), [[9 / 5, 18], [24 / 5, 48]])


def test_the_exponential_is_that_of_a_matrix(bench):
    linalg = pytest.importorskip("scipy.linalg")
    import training_tasks

    A = np.concatenate(
        [np.random.default_rng(0).normal(size=(9, 4)), np.zeros((1, 4)), [[0, 1, 0, 0]]]
    )
    expected = [linalg.expm(row.reshape(2, 2)).ravel() for row in A]
    assert np.allclose(training_tasks.exponentials(A), expected, rtol=1e-12, atol=1e-12)


def test_the_program_says_what_it_takes(bench):
    command = [sys.executable, bench.__file__, "--help"]
    child = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "--compile" in child.stdout

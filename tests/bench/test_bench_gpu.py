"""The GPU benchmark without a card: a run on NumPy arrays, its clock, figures and tables.

No test here asserts how long anything takes: the clock is made up.
"""

import json
import sys
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest

from mlp_backprop.bench.contenders import Answer, Contender, Ready


@pytest.fixture
def clock(monkeypatch, programs):
    """A millisecond passes between any two readings; a cell is over after the fewest rounds."""
    effort = programs.bench.EFFORT._replace(max_rounds=5)
    monkeypatch.setattr(programs.bench, "EFFORT", effort)
    readings = count(0, 1_000_000)
    return lambda: next(readings)


def cell(programs, net, n, precision="float32"):
    return programs.bench.Cell(programs.bench.NETS[net], n, precision)


# Measuring ---------------------------------------------------------------------------------------


ON_NUMPY = ("prepared", "bound", "call", "derivation", "torch", "jax")


def on_numpy(programs, precision, names=ON_NUMPY):
    rows = programs.contenders.contenders(programs.contenders.QUICK, precision)
    return [row for row in rows if row.name in names]


@pytest.mark.parametrize("net", ["2-10-5-1", "64-64-64-1", "784-128-64-10"])
def test_a_cell_on_numpy(programs, clock, net):
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    rows = on_numpy(programs, "float32")
    record = programs.bench.measure(cell(programs, net, 7), rows, np.asarray, clock)
    assert record["skipped"] == {}
    assert tuple(record["timings"]) == ON_NUMPY
    for timing in record["timings"].values():
        assert timing["error"] < 1e-5
        assert timing["median"] > 0
    json.dumps(record)


def test_several_outputs_with_a_squared_error(programs, clock, monkeypatch):
    """The wide net's loss is summed over outputs, whatever torch's own mean divides by."""
    net = programs.bench.NETS["2-10-5-1"]._replace(sizes=(3, 5, 4), activation="relu")
    monkeypatch.setitem(programs.bench.NETS, net.name, net)
    rows = on_numpy(programs, "float32")
    record = programs.bench.measure(cell(programs, net.name, 7), rows, np.asarray, clock)
    assert record["skipped"] == {}


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_others_in_bfloat16(programs, clock, library):
    pytest.importorskip(library)
    rows = on_numpy(programs, "bfloat16", names=(library,))
    one = cell(programs, "64-64-64-1", 100, "bfloat16")
    record = programs.bench.measure(one, rows, np.asarray, clock)
    assert record["skipped"] == {}
    assert 1e-4 < record["timings"][library]["error"] < 0.2


def test_torch_that_converts_gives_float32_and_the_gradients_of_bfloat16(programs, clock):
    pytest.importorskip("torch")
    both = ("torch", "torch_converting")
    rows = on_numpy(programs, "bfloat16", names=both)
    one = cell(programs, "784-128-64-10", 50, "bfloat16")
    record = programs.bench.measure(one, rows, np.asarray, clock)
    assert record["skipped"] == {}
    task = programs.bench.make_task(one, np.asarray)
    results = {}
    for name in both:
        ready = programs.contenders.QUICK[name](task, precision="bfloat16")
        results[name] = ready.call()
        answers = ready.read(results[name])
        assert len(answers.grads) == 6
    assert {g.dtype.itemsize for g in results["torch"][1]} == {2}
    assert {g.dtype.itemsize for g in results["torch_converting"][1]} == {4}
    for A, B in zip(results["torch"][1], results["torch_converting"][1], strict=True):
        np.testing.assert_array_equal(A.float().numpy(), B.numpy())


@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_where_nothing_is_converted_no_contender_says_it_does(programs, clock, precision):
    pytest.importorskip("torch")
    rows = on_numpy(programs, precision, names=("torch_converting",))
    one = cell(programs, "64-64-64-1", 3, precision)
    record = programs.bench.measure(one, rows, np.asarray, clock)
    assert record["timings"] == {}
    assert record["skipped"] == {
        "torch_converting": "ValueError: there is nothing to convert",
    }


def test_ours_refuse_what_the_library_does_not_do(programs, clock):
    rows = on_numpy(programs, "tf32", names=("prepared", "call", "derivation", "tiny"))
    record = programs.bench.measure(
        cell(programs, "64-64-64-1", 2, "tf32"), rows, np.asarray, clock
    )
    assert record["timings"] == {}
    assert len(record["skipped"]) == 4
    assert "precision='tf32'" in record["skipped"]["prepared"]


def test_a_wrong_answer_is_not_timed(programs, clock):
    def build(task):
        expected = programs.bench.reference(task)
        wrong = Answer(expected.loss, [1.01 * g for g in expected.grads])
        return Ready(lambda: wrong, lambda answer: answer)

    rows = [Contender("wrong", "", "", build), *on_numpy(programs, "float32", ("call",))]
    record = programs.bench.measure(cell(programs, "2-10-5-1", 5), rows, np.asarray, clock)
    assert list(record["timings"]) == ["call"]
    assert "wrong answer: off by 0.01" in record["skipped"]["wrong"]


def test_nothing_is_begun_when_the_time_is_up(programs, clock):
    over = iter([False, True])
    freed = []
    record = programs.bench.measure(
        cell(programs, "2-10-5-1", 5),
        on_numpy(programs, "float32", ("prepared", "call")),
        np.asarray,
        clock,
        lambda: next(over),
        lambda: freed.append(True),
    )
    assert list(record["timings"]) == ["prepared"]
    assert record["skipped"] == {"call": "the time was up"}
    assert freed == [True]


def test_the_reference_adds_up_blocks(programs):
    task = programs.bench.make_task(cell(programs, "784-128-64-10", 7), np.asarray)
    whole, blocks = programs.bench.reference(task), programs.bench.reference(task, block=3)
    assert whole.loss == pytest.approx(blocks.loss, rel=1e-14)
    for A, B in zip(whole.grads, blocks.grads, strict=True):
        np.testing.assert_allclose(A, B, rtol=1e-10, atol=1e-15)


def test_the_clock_adds_up_the_time_between_events(programs):
    times, log = iter([0.0, 1.5, 4.0]), []

    class Event:
        def record(self):
            self.time = next(times)
            log.append("record")

        def synchronize(self):
            log.append("wait")

    cuda = SimpleNamespace(
        Event=Event,
        get_elapsed_time=lambda a, b: b.time - a.time,
        runtime=SimpleNamespace(deviceSynchronize=lambda: log.append("device")),
    )
    clock = programs.bench.DeviceClock(cuda)
    assert [clock(), clock()] == [1_500_000, 4_000_000]
    assert log == ["device", "record", "wait"] * 3


# What is missing ---------------------------------------------------------------------------------


class Device:
    """So much of CuPy as tells how many devices there are."""

    class CUDARuntimeError(RuntimeError):
        pass

    def __init__(self, count):
        self.__version__ = "14.2.0"
        self.cuda = SimpleNamespace(
            runtime=SimpleNamespace(
                getDeviceCount=lambda: count, CUDARuntimeError=self.CUDARuntimeError
            )
        )


@pytest.fixture
def installed(monkeypatch):
    """Puts CuPy with so many devices, array-api-compat's namespace and torch in place."""

    def install(devices=1, without=()):
        modules = {
            "cupy": Device(devices),
            "array_api_compat": SimpleNamespace(),
            "array_api_compat.cupy": SimpleNamespace(),
            "torch": SimpleNamespace(),
        }
        for name, module in modules.items():
            missing = name.partition(".")[0] in without
            monkeypatch.setitem(sys.modules, name, None if missing else module)

    return install


def test_with_everything_there_nothing_is_said(programs, installed):
    installed()
    programs.bench.require(programs.bench.NEEDED)


@pytest.mark.parametrize(
    ("without", "hint"),
    [
        (["array_api_compat"], "pip install array-api-compat ("),
        (["cupy", "torch"], "pip install cupy-cuda13x torch ("),
    ],
)
def test_what_is_missing_is_told_in_one_line(programs, installed, without, hint):
    installed(without=without)
    with pytest.raises(SystemExit) as ended:
        programs.bench.require(programs.bench.NEEDED)
    assert hint in ended.value.code
    assert "\n" not in ended.value.code


def test_a_run_without_a_contender_of_ours_does_not_begin(programs, installed, monkeypatch):
    installed(without=["array_api_compat"])
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py"])
    with pytest.raises(SystemExit, match="array-api-compat"):
        programs.bench.main()


def test_no_device_is_told_in_one_line(programs, installed):
    installed(devices=0)
    with pytest.raises(SystemExit, match="CuPy sees none here") as ended:
        programs.bench.require(programs.bench.NEEDED)
    assert "\n" not in ended.value.code


# Results -----------------------------------------------------------------------------------------


def made_up(programs, precision="float32", **medians):
    record = {"net": "2-10-5-1", "n": 10_000_000, "precision": precision, "skipped": {}}
    record["timings"] = {name: {"median": median} for name, median in medians.items()}
    return programs.bench.with_figures(record, programs.limits)


def test_figures_of_a_cell(programs):
    medians = {"prepared": 1e-3, "bound": 5e-4, "torch": 12e-3, "torch_graph": 9e-3}
    record = made_up(programs, **medians, jax=1e-9)
    assert record["ratios"] == pytest.approx({"torch": 12, "best_torch": 18})
    ours = record["timings"]["prepared"]
    assert ours["GB/s"] == pytest.approx((12e7 + 728) / 1e-3 / 1e9)
    assert ours["TFLOP/s"] == pytest.approx(4.1)
    assert ours["of_floor"] == pytest.approx(record["floor"] / 1e-3)
    assert record["floor"] == pytest.approx(410e7 / 50e12)


def test_in_bfloat16_eager_torch_converts_as_the_prepared_call_does(programs):
    medians = {"prepared": 2e-3, "bound": 1e-3, "torch": 4e-3, "torch_converting": 10e-3}
    record = made_up(programs, precision="bfloat16", **medians)
    assert record["ratios"] == pytest.approx({"torch": 5, "best_torch": 4})
    del medians["torch_converting"]
    record = made_up(programs, precision="bfloat16", **medians)
    assert record["ratios"] == {"torch": None, "best_torch": 4}


def test_the_legend_says_what_each_time_includes(programs):
    contenders = programs.contenders
    assert {*contenders.INCLUDES} == {*contenders.QUICK, *contenders.COMPILED}
    records = [made_up(programs, bound=1e-3), made_up(programs, bound=1e-3, torch=1e-3)]
    assert programs.bench.legend(records).splitlines() == [
        f"{name}: {contenders.INCLUDES[name]}" for name in ("bound", "torch")
    ]


@pytest.mark.parametrize(
    ("eager", "graph", "expected"),
    [(17, 15, "aim reached"), (17, 9, "reached"), (9, 9, "missed"), (17, 7, "missed")],
)
def test_verdicts(programs, eager, graph, expected):
    record = made_up(programs, prepared=1e-3, torch=eager * 1e-3, torch_graph=graph * 1e-3)
    line = programs.bench.table([record]).splitlines()[-1]
    assert line.endswith(f"| 10x, 8x: {expected} |")


def test_records_of_one_cell_are_joined(programs):
    first = made_up(programs, prepared=1e-3, torch=17e-3)
    second = made_up(programs, torch_compile=15e-3)
    second["skipped"] = {"torch_autotune": "the time was up"}
    record = programs.bench.with_figures(programs.bench.joined(first, second), programs.limits)
    assert list(record["timings"]) == ["prepared", "torch", "torch_compile"]
    assert record["skipped"] == second["skipped"]
    assert record["ratios"] == pytest.approx({"torch": 17, "best_torch": 15})
    assert programs.bench.joined(None, first) is first


def test_a_cell_without_ours_is_not_measured(programs):
    record = made_up(programs, torch=1e-3)
    head, rule, line = programs.bench.table([record]).splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    assert line == ("| 2-10-5-1 | 10000000 | float32 | 1000 | – | – | – | 10x, 8x: not measured |")

"""What `make check-gpu` asks a card, asked of emulated kernels and of planted faults."""

import json
import sys
from itertools import count
from types import SimpleNamespace

import emulation
import numpy as np
import pytest
from engines.cuda.test_emulated import host  # noqa: F401 - a fixture

from mlp_backprop.edge import validation
from mlp_backprop.engines.cuda import engine
from mlp_backprop.types import Layer

# Answers -----------------------------------------------------------------------------------------


def on_emulated_kernels(task, precision):
    """As gpu_answers.prepared; the engine's own entrance, since NumPy's arrays have another one."""
    spec, *_ = validation.problem(
        [tuple(np.asarray(A) for A in layer) for layer in task.params],
        np.asarray(task.X),
        np.asarray(task.y),
        activation=task.names,
        loss=task.loss,
        reduction="mean",
        sample_weight=None,
        backend=None,
    )
    run = engine.prepare(spec, len(task.X), precision)
    params = [Layer(W, b) for W, b in task.params]

    @np.errstate(invalid="ignore")  # NumPy stands for cuBLASLt
    def call(X, y):
        return run(params, X, y, None)

    return "emulated", call


def cells(programs, n, precision=None):
    return [
        cell
        for cell in programs.answers.CELLS
        if cell.n == n and precision in (None, cell.precision)
    ]


def test_a_net_for_each_tier_in_each_precision_and_number_of_rows(programs):
    answers = programs.answers
    assert len(answers.CELLS) == len(set(answers.CELLS)) == 36
    assert {cell.precision for cell in answers.CELLS} == {
        "float32",
        "float32_exact",
        "tf32",
        "bfloat16",
    }
    assert {cell.n for cell in answers.CELLS} == {1, 33, 40_001}


@emulation.needs_compiler
@pytest.mark.parametrize("n", [1, 33])
def test_the_engine_on_emulated_kernels_passes(programs, host, tmp_path, n):  # noqa: F811
    records = programs.answers.examine_all(
        cells(programs, n), host.array, on_emulated_kernels, tmp_path / "answers.json"
    )
    assert [record for record in records if record["problems"]] == []
    assert len(records) == 12


@emulation.needs_compiler
def test_every_tier_is_asked(programs, host):  # noqa: F811
    answers = programs.answers
    tiers = {}
    for cell in cells(programs, 33):
        task = programs.bench.make_task(cell, np.asarray)
        tiers[cell.problem.name, cell.precision] = answers.tier_of(task, cell.precision)
    assert tiers == {
        **{("2-10-5-3", precision): "tiny" for precision in answers.TOLERANCES},
        **{("64-64-10", precision): "warp_tiles" for precision in answers.TOLERANCES},
        ("64-64-10", "float32_exact"): "layers",
        **{("200-130-10", precision): "layers" for precision in answers.TOLERANCES},
    }


def planted(call_of):
    """A plan whose answers are those of float64 in float32, after a fault."""
    return lambda task, precision: ("planted", call_of(task))


def right(programs, task):
    """Loss and gradients as float64 has them, in float32."""

    @np.errstate(invalid="ignore")
    def call(X, y):
        labels = (y >= 0) & (y < task.params[-1].W.shape[0])
        answer = programs.bench.reference(task._replace(X=X, y=np.where(labels, y, 0)))
        grads = [A.astype(np.float32) for A in answer.grads]
        loss = np.float32(answer.loss if labels.all() else np.nan)
        return loss, list(zip(grads[::2], grads[1::2], strict=True))

    return call


def problems_of(programs, call_of):
    cell = cells(programs, 33, "float32")[0]
    return programs.answers.examine(cell, np.asarray, planted(call_of))["problems"]


def test_right_answers_have_no_problems(programs):
    assert problems_of(programs, lambda task: right(programs, task)) == []


def test_a_wrong_number_is_a_problem(programs):
    def call_of(task):
        def call(X, y):
            loss, grads = right(programs, task)(X, y)
            grads[1][0][2, 3] += 1e-4 * np.abs(grads[1][0]).max()
            return loss, grads

        return call

    (first, inf) = problems_of(programs, call_of)
    assert first == "off by 0.0001 of the largest entry; 2e-05 is allowed"
    assert inf.startswith("an infinity in X")


def test_other_bits_the_second_time_are_a_problem(programs):
    def call_of(task):
        factors = iter([1, np.float32(1 + 1e-7), 1, 1, 1, 1])

        def call(X, y):
            loss, grads = right(programs, task)(X, y)
            return next(factors) * loss, grads

        return call

    assert problems_of(programs, call_of) == ["the second call gave other bits"]


def test_a_loss_for_a_label_out_of_range_is_a_problem(programs):
    def call_of(task):
        return lambda X, y: right(programs, task)(X, np.clip(y, 0, 2))

    assert problems_of(programs, call_of) == [
        f"label {label} is out of range, and the loss is not nan" for label in (-1, 3)
    ]


@pytest.mark.parametrize(
    "hides",
    [
        lambda X: np.nan_to_num(X, posinf=1e30),  # nothing is nan
        lambda X: np.where(np.isinf(X).any(axis=1, keepdims=True), np.nan, X),  # all of it is
    ],
)
def test_an_infinity_that_is_hidden_or_spreads_is_a_problem(programs, hides):
    def call_of(task):
        return lambda X, y: right(programs, task)(np.float32(hides(X)), y)

    (problem,) = problems_of(programs, call_of)
    assert problem.startswith("an infinity in X")


def test_numbers_beside_an_infinity_must_be_right_too(programs):
    def call_of(task):
        def call(X, y):
            loss, grads = right(programs, task)(X, y)
            return loss, [(W, b + np.isinf(X).any()) for W, b in grads]

        return call

    (problem,) = problems_of(programs, call_of)
    assert problem.startswith("an infinity in X")


def test_a_cell_that_fails_is_told_and_the_next_is_asked(programs, tmp_path):
    path, calls = tmp_path / "answers.json", count()

    def plan(task, precision):
        if next(calls) == 0:
            raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS")
        return "planted", right(programs, task)

    programs.answers.examine_all(cells(programs, 1, "float32"), np.asarray, plan, path)
    first, *others = json.loads(path.read_text())["cells"]
    assert first["problems"] == ["RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS"]
    assert [(c["tier"], c["problems"]) for c in others] == [("planted", [])] * 2


# The card ----------------------------------------------------------------------------------------


def cupy_with(attributes):
    device = SimpleNamespace(
        id=0, mem_info=(70e9, 80e9), compute_capability="90", attributes=attributes
    )
    runtime = SimpleNamespace(
        getDeviceProperties=lambda id: {"name": b"NVIDIA H100"},
        getDeviceCount=lambda: 1,
        driverGetVersion=lambda: 13000,
        runtimeGetVersion=lambda: 13000,
    )
    nvrtc = SimpleNamespace(getVersion=lambda: (13, 0))
    cuda = SimpleNamespace(Device=lambda: device, runtime=runtime, nvrtc=nvrtc)
    return SimpleNamespace(cuda=cuda, __version__="14.2.0")


def test_the_facts_of_a_card(programs, monkeypatch):
    attributes = dict.fromkeys(programs.card.ATTRIBUTES, 132)
    monkeypatch.setitem(sys.modules, "cupy", cupy_with(attributes))
    facts = programs.card.facts()
    assert facts["card"] == "NVIDIA H100"
    assert facts["MultiProcessorCount"] == 132
    assert facts["memory"] == "70.0 of 80.0 GB free"
    assert facts["numpy"] == np.__version__
    del attributes["L2CacheSize"]
    with pytest.raises(KeyError, match="L2CacheSize"):
        programs.card.facts()

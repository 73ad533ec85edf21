"""The CuPy engine's choices without a device: tiers, streams, devices, memory, one division.

CuPy is played by NumPy arrays that say where they lie. test_cupy_device.py runs on a card.
"""

import ctypes
import sys
import weakref
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import make_problem

from mlp_backprop import backprop, validation
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Sums
from mlp_backprop.engines import cupy_engine
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

# A card, played by the host ----------------------------------------------------------------------


class Pointer:
    """As cupy.cuda.MemoryPointer."""

    def __init__(self, ptr, device_id):
        self.ptr, self.device_id = ptr, device_id

    def __add__(self, offset):
        return Pointer(self.ptr + offset, self.device_id)


class Device:
    """A card that knows when it is the current one."""

    mem_info = (3e9, 8e9)

    def __init__(self, card, index):
        self.card, self.id = card, index

    def __enter__(self):
        self.card.current.append(self.id)

    def __exit__(self, *error):
        self.card.current.pop()

    def __str__(self):
        return f"<CUDA Device {self.id}>"


class Array(np.ndarray):
    """On device 0, unless `place` says otherwise."""

    device_id, card = 0, None

    def __array_finalize__(self, source):
        self.device_id = getattr(source, "device_id", 0)
        self.card = getattr(source, "card", None)

    @property
    def data(self):
        return Pointer(self.ctypes.data, self.device_id)

    @property
    def device(self):
        return Device(self.card, self.device_id)


class OutOfMemoryError(MemoryError):
    """As CuPy's."""


class Card:
    """What the engine asks of CuPy, and what happened."""

    def __init__(self):
        self.current = [0]
        self.stream = 0
        self.freed = 0

    def array(self, values, device_id=0):
        values = np.asarray(values)
        array = Array(values.shape, values.dtype)
        array[...] = values
        array.device_id, array.card = device_id, self
        return array

    def view(self, shape, dtype, place):
        """As cupy.ndarray(shape, dtype, memory)."""
        n_bytes = np.dtype(dtype).itemsize * int(np.prod(shape))
        array = Array(shape, dtype, (ctypes.c_char * n_bytes).from_address(place.ptr))
        array.card = self
        return array

    def free_all_blocks(self):
        self.freed += 1

    @property
    def module(self):
        return SimpleNamespace(
            cuda=SimpleNamespace(
                get_current_stream=lambda: SimpleNamespace(ptr=self.stream),
                memory=SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
            ),
            get_default_memory_pool=lambda: self,
        )


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setitem(sys.modules, "cupy", card.module)
    return card


def placed(card, problem, device_id=0):
    """The arguments of a run, on the card."""
    options = problem.options | {"reduction": "sum", "backend": None}
    spec, params, *data = validation.problem(problem.params, problem.X, problem.y, **options)
    params = [Layer(card.array(W, device_id), card.array(b, device_id)) for W, b in params]
    X, y, weight = (None if A is None else card.array(A, device_id) for A in data)
    spec = spec._replace(xp=SimpleNamespace(**vars(np) | {"ndarray": card.view}))
    return spec, (params, X, y, weight)


class Tier:
    """A tier whose plans run the derivation, on workspace of their own, and note their calls."""

    def __init__(self, card, covers=True, fails=0):
        self.card, self.covers, self.fails = card, covers, fails
        self.plans, self.calls = [], []
        self.n_workspaces = 0

    def plan(self, spec, n, precision):
        if not self.covers:
            return None
        self.plans.append((n, precision, self.card.current[-1], self.card.stream))
        return self._run(spec, n)

    def _run(self, spec, n):
        on_host = backprop.plan(spec._replace(xp=np))
        n_params = sum(n_out * (n_in + 1) for n_in, n_out in pairwise(spec.sizes))
        workspace = self.card.array(np.full(n_params + 1, np.nan, spec.dtype))
        self.n_workspaces += 1
        weakref.finalize(workspace, self._gone)

        def run(params, X, y, weight):
            assert len(X) <= n
            self.calls.append((len(X), self.card.current[-1]))
            if self.fails:
                self.fails -= 1
                raise OutOfMemoryError("out of memory")
            sums = on_host(params, X, y, weight)
            start, grads = 0, []
            for W, b in sums.grads:
                views = []
                for A in (W, b):
                    views.append(workspace[start : start + A.size].reshape(A.shape))
                    views[-1][...] = A
                    start += A.size
                grads.append(Layer(*views))
            workspace[-1] = sums.loss
            return Sums(workspace[-1:].reshape(()), sums.weight, grads)

        return run

    def _gone(self):
        self.n_workspaces -= 1


PROBLEM = make_problem(sizes=(3, 4, 2), n=7, weighted=True)


def expected_grads(problem, divisor=1.0):
    options = problem.options | {"reduction": "sum", "backend": None}
    spec, *arrays = validation.problem(problem.params, problem.X, problem.y, **options)
    loss, grads = backprop.plan(spec)(*arrays).divided(spec, divisor)
    return [loss, *flat(grads)]


def assert_sums(spec, sums, problem):
    loss, grads = sums.divided(spec, 1.0)
    for A, B in zip([loss, *flat(grads)], expected_grads(problem), strict=True):
        np.testing.assert_allclose(A, B, rtol=1e-13)


# Tiers -------------------------------------------------------------------------------------------


def test_the_first_tier_that_covers_the_problem_runs(card, monkeypatch):
    tiers = Tier(card, covers=False), Tier(card), Tier(card)
    monkeypatch.setattr(cupy_engine, "TIERS", tiers)
    spec, arrays = placed(card, PROBLEM)
    run = cupy_engine.plan(spec, 7, "tf32")
    assert_sums(spec, run(*arrays), PROBLEM)
    run(*arrays)
    assert [tier.plans for tier in tiers] == [[], [(7, "tf32", 0, 0)], []]
    assert len(tiers[1].calls) == 2


def test_what_no_tier_covers_runs_the_derivation(card, monkeypatch):
    monkeypatch.setattr(cupy_engine, "TIERS", (Tier(card, covers=False),))
    spec, arrays = placed(card, PROBLEM)
    run = cupy_engine.plan_here(spec._replace(xp=np), 7, "float32")
    assert_sums(spec._replace(xp=np), run(*arrays), PROBLEM)


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [(np.int8, [-1]), (np.uint8, [200, 255]), (np.int64, [-1, 200, 2**40])],
)
def test_the_derivation_marks_labels_out_of_range(dtype, outside):
    problem = make_problem(sizes=(3, 200), n=5, loss="softmax_cross_entropy")
    options = problem.options | {"reduction": "sum", "backend": None}
    spec, params, X, y, _ = validation.problem(problem.params, problem.X, problem.y, **options)
    run = cupy_engine.derivation(spec)
    y = (y % 100).astype(dtype)
    right = run(params, X, y, None)
    assert right.loss == backprop.plan(spec)(params, X, y, None).loss
    for label in outside:
        y_wrong = y.copy()
        y_wrong[3] = label
        assert np.isnan(run(params, X, y_wrong, None).loss)
    assert run(params, X, np.eye(200)[y], None).loss == pytest.approx(right.loss)


# Devices, streams, memory ------------------------------------------------------------------------


def test_a_plan_for_each_device_and_stream(card, monkeypatch):
    tier = Tier(card)
    monkeypatch.setattr(cupy_engine, "TIERS", (tier,))
    spec, arrays = placed(card, PROBLEM)
    _, on_one = placed(card, PROBLEM, device_id=1)
    run = cupy_engine.plan(spec, 9, "float32")
    for stream, here in ((0, arrays), (5, arrays), (0, on_one), (5, arrays), (0, arrays)):
        card.stream = stream
        assert_sums(spec, run(*here), PROBLEM)
    assert tier.plans == [(9, "float32", 0, 0), (9, "float32", 0, 5), (9, "float32", 1, 0)]
    assert [device for _, device in tier.calls] == [0, 0, 1, 0, 0]
    assert card.current == [0]
    assert tier.n_workspaces == 3


def test_streams_that_come_and_go_leave_no_plans_behind(card, monkeypatch):
    tier = Tier(card)
    monkeypatch.setattr(cupy_engine, "TIERS", (tier,))
    spec, arrays = placed(card, PROBLEM)
    run = cupy_engine.plan(spec, 7, "float32")
    for card.stream in range(30):
        assert_sums(spec, run(*arrays), PROBLEM)
        assert tier.n_workspaces <= cupy_engine.MOST_PLANS


def test_devices_are_not_mixed(card, monkeypatch):
    monkeypatch.setattr(cupy_engine, "TIERS", (Tier(card),))
    spec, (params, X, y, weight) = placed(card, PROBLEM)
    run = cupy_engine.plan(spec, 7, "float32")
    there = card.array(y, device_id=1)
    with pytest.raises(ValueError, match="CUDA devices 0 and 1: move all to one device first"):
        run(params, X, there, weight)
    with pytest.raises(ValueError, match="devices 0 and 3"):
        run(params, X, y, card.array(weight, device_id=3))
    W, b = params[1]
    with pytest.raises(ValueError, match="devices 0 and 2"):
        run([params[0], Layer(W, card.array(b, device_id=2))], X, y, weight)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_short_of_memory_the_rows_are_halved_once(card, monkeypatch, n, weighted):
    tier = Tier(card, fails=1)
    monkeypatch.setattr(cupy_engine, "TIERS", (tier,))
    problem = make_problem(sizes=(3, 4, 2), n=n, weighted=weighted)
    spec, arrays = placed(card, problem)
    run = cupy_engine.plan(spec, n, "float32")

    def free_all_blocks():
        assert tier.n_workspaces == 0  # else the pool could not free it
        card.freed += 1

    card.free_all_blocks = free_all_blocks
    half = -(-n // 2)
    parts = [half, n - half] if n > half else [half]
    assert_sums(spec, run(*arrays), problem)
    assert [rows for rows, _ in tier.calls] == [n, *parts]
    assert_sums(spec, run(*arrays), problem)  # the next call begins with halves
    assert [rows for rows, _ in tier.calls] == [n, *parts, *parts]
    assert card.freed == 1
    assert [rows for rows, *_ in tier.plans] == [n, half]


def test_twice_short_of_memory(card, monkeypatch):
    monkeypatch.setattr(cupy_engine, "TIERS", (Tier(card, fails=2),))
    spec, arrays = placed(card, PROBLEM)
    run = cupy_engine.plan(spec, 7, "float32")
    message = r"3\.0 of 8\.0 GB are free on <CUDA Device 0>, .* 4 rows at a time of widths 3-4-2"
    with pytest.raises(MemoryError, match=message) as caught:
        run(*arrays)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    assert_sums(spec, run(*arrays), PROBLEM)  # and is still of use when there is memory again


# One division ------------------------------------------------------------------------------------


def test_sums_in_one_array_are_divided_at_once(card, monkeypatch):
    monkeypatch.setattr(cupy_engine, "TIERS", (Tier(card),))
    spec, arrays = placed(card, PROBLEM)
    sums = cupy_engine.plan(spec, 7, "float32")(*arrays)
    assert type(sums) is cupy_engine.OneArray
    divisor = card.array(sums.weight)
    loss, grads = sums.divided(spec, divisor)
    for A, B in zip([loss, *flat(grads)], expected_grads(PROBLEM, divisor), strict=True):
        np.testing.assert_allclose(A, B, rtol=1e-13)
    for A, B in zip([loss, *flat(grads)], [sums.sums.loss, *flat(sums.sums.grads)], strict=True):
        assert A.shape == B.shape
        assert not np.shares_memory(A, sums.array)


@pytest.mark.parametrize("change", ["loss apart", "a gradient apart", "another dtype"])
def test_sums_that_are_laid_out_otherwise(card, change):
    spec, arrays = placed(card, PROBLEM)
    sums = Tier(card)._run(spec, 7)(*arrays)
    if change == "loss apart":
        sums = sums._replace(loss=card.array(sums.loss))
    elif change == "a gradient apart":
        (W, b), last = sums.grads
        sums = sums._replace(grads=[Layer(W, card.array(b)), last])
    else:
        spec = spec._replace(dtype=np.dtype(np.float32))
    assert cupy_engine.in_one_array(spec, sums) is sums


def test_parts_are_added_though_each_is_written_over_the_last(card):
    spec, (params, X, y, weight) = placed(card, PROBLEM)
    run = Tier(card)._run(spec, 7)
    rows = (slice(0, 3), slice(3, 5), slice(5, 7))
    total = cupy_engine.added(run(params, X[r], y[r], weight[r]) for r in rows)
    assert_sums(spec._replace(xp=np), total, PROBLEM)
    assert_array_equal(total.weight, PROBLEM.options["sample_weight"].sum())


# Which net goes where ----------------------------------------------------------------------------


def first_tier(sizes, precision, dtype=np.float32, activation="tanh"):
    names = [activation] * (len(sizes) - 2) + ["identity"]
    rows = tuple(ACTIVATIONS[name] for name in names)
    spec = backprop.Spec(np, sizes, np.dtype(dtype), rows, LOSSES["squared_error"])
    tiers = (tier for tier in cupy_engine.TIERS if tier.specialise(spec, precision))
    return next((tier.__name__.rpartition(".")[2] for tier in tiers), None)


@pytest.mark.parametrize(
    ("sizes", "precision", "tier"),
    [
        *(((2, 10, 5, 1), precision, "cuda_tiny") for precision in validation.PRECISIONS),
        ((64, 64, 64, 1), "float32", "cuda_warp_tiles"),
        ((64, 64, 64, 1), "tf32", "cuda_warp_tiles"),
        ((64, 64, 64, 1), "bfloat16", "cuda_warp_tiles"),
        ((64, 64, 64, 1), "float32_exact", "cuda_layers"),
        *(((784, 128, 64, 10), precision, "cuda_layers") for precision in validation.PRECISIONS),
        *(((4096,) * 5, precision, "cuda_layers") for precision in validation.PRECISIONS),
    ],
)
def test_the_tier_of_a_net(sizes, precision, tier):
    assert first_tier(sizes, precision) == tier


def test_the_tier_of_a_dtype():
    assert first_tier((2, 10, 5, 1), "float32", np.float64) == "cuda_layers"
    assert first_tier((2, 10, 5, 1), "float32", np.float16) is None

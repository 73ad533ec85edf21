"""The CuPy engine's choices without a device: tiers, streams, devices, memory, where results go.

CuPy is played by NumPy arrays that say where they lie. test_cupy_device.py runs on a card.
"""

import sys
import weakref

import cupy_api
import numpy as np
import pytest
from derivation import by_derivation, checked
from oracles import assert_grads_close, make_problem

from mlp_backprop import backprop
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.edge import rules
from mlp_backprop.engines.cuda import engine
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

# A card, played by the host ----------------------------------------------------------------------


class Device(cupy_api.StandIn, of="cuda.Device"):
    """A card that knows when it is the current one."""

    mem_info = (3e9, 8e9)

    def __init__(self, card, index):
        self._card, self.id = card, index
        self.compute_capability = card.compute_capability

    def __enter__(self):
        self._card.current.append(self.id)

    def __exit__(self, *error):
        self._card.current.pop()

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
        place = {"ptr": self.ctypes.data, "device_id": self.device_id}
        return cupy_api.instance("cuda.MemoryPointer", **place)

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
        self.compute_capability = "90"
        self.freed = 0

    def array(self, values, device_id=0):
        values = np.asarray(values)
        array = Array(values.shape, values.dtype)
        array[...] = values
        array.device_id, array.card = device_id, self
        return array

    def free_all_blocks(self):
        self.freed += 1

    def driver_version(self):
        return 13010

    @property
    def module(self):
        pool = cupy_api.instance("cuda.MemoryPool", free_all_blocks=lambda: self.free_all_blocks())
        return cupy_api.library(
            {
                "cuda.Device": lambda: Device(self, self.current[-1]),
                "cuda.get_current_stream": lambda: cupy_api.instance(
                    "cuda.Stream", ptr=self.stream
                ),
                "cuda.memory.OutOfMemoryError": OutOfMemoryError,
                "cuda.runtime.getDevice": lambda: self.current[-1],
                "cuda.runtime.getDeviceProperties": lambda device: {
                    "name": f"Card {device}".encode()
                },
                "cuda.runtime.runtimeGetVersion": lambda: 13000,
                "cuda.runtime.driverGetVersion": self.driver_version,
                "__version__": "14.2.0",
                "get_default_memory_pool": lambda: pool,
            }
        )


@pytest.fixture
def card(monkeypatch):
    card = Card()
    monkeypatch.setitem(sys.modules, "cupy", card.module)
    return card


def placed(card, problem, device_id=0, reduction="sum"):
    """The arguments of a run, on the card."""
    spec, params, *data = checked(problem, reduction)
    params = [Layer(card.array(W, device_id), card.array(b, device_id)) for W, b in params]
    X, y, weight = (None if A is None else card.array(A, device_id) for A in data)
    return spec, (params, X, y, weight)


class Tier:
    """A tier whose plans run the derivation and note their calls; each has a workspace."""

    def __init__(self, card, covers=True, fails=0):
        self.card, self.covers, self.fails = card, covers, fails
        self.plans, self.calls = [], []
        self.n_workspaces = 0

    def prepare(self, spec, n, precision):
        if not self.covers:
            return None
        self.plans.append((n, precision, self.card.current[-1], self.card.stream))
        workspace = self.card.array(np.zeros(n))
        self.n_workspaces += 1
        weakref.finalize(workspace, self._gone)
        derivation = engine.derivation(spec, n)

        def run(arguments):
            self.calls.append((len(workspace), self.card.current[-1]))
            if self.fails:
                self.fails -= 1
                raise OutOfMemoryError("out of memory")
            assert all(A.flags.c_contiguous for A in flat(arguments.out or []))
            return derivation(arguments)

        return run

    def _gone(self):
        self.n_workspaces -= 1


PROBLEM = make_problem(sizes=(3, 4, 2), n=7, weighted=True)
FLOAT32 = make_problem(sizes=(3, 4, 2), n=8, weighted=True, dtype=np.float32)


def assert_right(results, problem=PROBLEM, reduction="sum"):
    loss, grads = by_derivation(problem, reduction)
    assert results[0] == pytest.approx(loss, rel=1e-13)
    assert_grads_close(results[1], grads, 1e-13)


# Tiers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_first_tier_that_covers_the_problem_runs(card, monkeypatch, reduction):
    tiers = Tier(card, covers=False), Tier(card), Tier(card)
    monkeypatch.setattr(engine, "TIERS", tiers)
    spec, arrays = placed(card, PROBLEM, reduction=reduction)
    run = engine.prepare(spec, 7, "tf32")
    for _ in range(2):
        assert_right(run(*arrays), reduction=reduction)
    assert [tier.plans for tier in tiers] == [[], [(7, "tf32", 0, 0)], []]
    assert len(tiers[1].calls) == 2


def test_what_no_tier_covers_runs_the_derivation(card, monkeypatch):
    monkeypatch.setattr(engine, "TIERS", (Tier(card, covers=False),))
    spec, arrays = placed(card, PROBLEM)
    assert_right(engine.prepare(spec, 7, "float32")(*arrays))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [0, 1, 3, 100])
def test_the_derivation_takes_so_many_rows_at_a_time(n, weighted):
    problem = make_problem(sizes=(3, 4, 2), n=7, weighted=weighted)
    spec, *arrays = checked(problem)
    run = engine.derivation(spec, n)
    assert_right(run(Arguments(*arrays, False, None)), problem)
    assert_right(run(Arguments(*arrays, True, None)), problem, "mean")


def test_the_derivation_of_no_rows():
    problem = make_problem(sizes=(3, 4, 2), n=0)
    spec, *arrays = checked(problem)
    loss, grads = engine.derivation(spec, 0)(Arguments(*arrays, False, None))
    assert not any(A.any() for A in (loss, *flat(grads)))


@pytest.mark.parametrize(
    ("dtype", "outside"),
    [(np.int8, [-1]), (np.uint8, [200, 255]), (np.int64, [-1, 200, 2**40])],
)
def test_the_derivation_marks_labels_out_of_range(dtype, outside):
    problem = make_problem(sizes=(3, 200), n=5, loss="softmax_cross_entropy")
    spec, params, X, y, _ = checked(problem)
    run = engine.derivation(spec, 5)
    y = (y % 100).astype(dtype)

    def loss_of(y):
        return run(Arguments(params, X, y, None, False, None))[0]

    right = loss_of(y)
    assert right == backprop.loss_and_grad_sums(spec, params, X, y, None).loss
    for label in outside:
        y_wrong = y.copy()
        y_wrong[3] = label
        assert np.isnan(loss_of(y_wrong))
    assert loss_of(np.eye(200)[y]) == pytest.approx(right)


@pytest.mark.parametrize("precision", rules.PRECISIONS)
@pytest.mark.parametrize(
    ("compute_capability", "has_types"),
    [("70", False), ("75", False), ("80", True), ("89", True), ("100", True), ("120", True)],
)
def test_cards_before_ampere_compute_in_float32(
    card, monkeypatch, precision, compute_capability, has_types
):
    card.compute_capability, tier = compute_capability, Tier(card)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    spec, arrays = placed(card, PROBLEM)
    assert_right(engine.prepare(spec, 7, precision)(*arrays))
    assert [plan[1] for plan in tier.plans] == [precision if has_types else "float32_exact"]


# Devices, streams, memory ------------------------------------------------------------------------


def test_a_plan_for_each_device_and_stream(card, monkeypatch):
    tier = Tier(card)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    spec, arrays = placed(card, PROBLEM)
    _, on_one = placed(card, PROBLEM, device_id=1)
    run = engine.prepare(spec, 9, "float32")
    for stream, here in ((0, arrays), (5, arrays), (0, on_one), (5, arrays), (0, arrays)):
        card.stream = stream
        assert_right(run(*here))
    assert tier.plans == [(9, "float32", 0, 0), (9, "float32", 0, 5), (9, "float32", 1, 0)]
    assert [device for _, device in tier.calls] == [0, 0, 1, 0, 0]
    assert card.current == [0]
    assert tier.n_workspaces == 3


def test_streams_that_come_and_go_leave_no_plans_behind(card, monkeypatch):
    tier = Tier(card)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    spec, arrays = placed(card, PROBLEM)
    run = engine.prepare(spec, 7, "float32")
    for card.stream in range(30):
        assert_right(run(*arrays))
        assert tier.n_workspaces <= engine.MOST_PLANS


def test_devices_are_not_mixed(card, monkeypatch):
    monkeypatch.setattr(engine, "TIERS", (Tier(card),))
    spec, (params, X, y, weight) = placed(card, PROBLEM)
    run = engine.prepare(spec, 7, "float32")
    there = card.array(y, device_id=1)
    with pytest.raises(ValueError, match="CUDA devices 0 and 1: move all to one device first"):
        run(params, X, there, weight)
    with pytest.raises(ValueError, match="devices 0 and 3"):
        run(params, X, y, card.array(weight, device_id=3))
    W, b = params[1]
    b_there = card.array(b, device_id=2)
    with pytest.raises(ValueError, match="devices 0 and 2"):
        run([params[0], Layer(W, b_there)], X, y, weight)
    with pytest.raises(ValueError, match="devices 0 and 2"):
        run(params, X, y, weight, [params[0], Layer(W, b_there)])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7])
def test_short_of_memory_the_rows_are_halved_once(card, monkeypatch, n, weighted):
    tier = Tier(card, fails=1)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    problem = make_problem(sizes=(3, 4, 2), n=n, weighted=weighted)
    spec, arrays = placed(card, problem, reduction="mean")
    run = engine.prepare(spec, n, "float32")

    def free_all_blocks():
        assert tier.n_workspaces == 0  # else the pool could not free it
        card.freed += 1

    card.free_all_blocks = free_all_blocks
    half = -(-n // 2)
    assert_right(run(*arrays), problem, "mean")
    assert_right(run(*arrays), problem, "mean")  # the next call begins with halves
    assert [rows for rows, _ in tier.calls] == [n, half, half]
    assert card.freed == 1
    assert [rows for rows, *_ in tier.plans] == [n, half]


def test_twice_short_of_memory(card, monkeypatch):
    monkeypatch.setattr(engine, "TIERS", (Tier(card, fails=2),))
    spec, arrays = placed(card, PROBLEM)
    run = engine.prepare(spec, 7, "float32")
    message = r"3\.0 of 8\.0 GB are free on <CUDA Device 0>, .* 4 rows at a time of widths 3-4-2"
    with pytest.raises(MemoryError, match=message) as caught:
        run(*arrays)
    assert isinstance(caught.value.__cause__, OutOfMemoryError)
    assert_right(run(*arrays))  # and is still of use when there is memory again


# Faults of the engine ----------------------------------------------------------------------------


class FaultyTier(Tier):
    """Its plans raise this error; or only what they have bound, once it is launched."""

    def __init__(self, card, error, only_bound=False):
        super().__init__(card)
        self.error, self.only_bound = error, only_bound

    def prepare(self, spec, n, precision):
        return FaultyRun(self, super().prepare(spec, n, precision))


class FaultyRun:
    def __init__(self, tier, run):
        self.tier, self.run = tier, run

    def __call__(self, arguments):
        if not self.tier.only_bound:
            raise self.tier.error
        return self.run(arguments)

    def bound(self, arguments):
        return self.fail

    def fail(self):
        raise self.tier.error


@pytest.mark.parametrize("only_bound", [False, True])
@pytest.mark.parametrize(
    ("dtype", "precision", "way_on"),
    [
        (np.float32, "float32", "try precision='float32_exact', .* or backend='numpy' with"),
        (np.float32, "float32_exact", "try backend='numpy' with cupy.asnumpy"),
        (np.float64, "float32", "try backend='numpy' with cupy.asnumpy"),
    ],
)
def test_a_fault_of_the_engine_says_what_to_report(
    card, monkeypatch, dtype, precision, way_on, only_bound
):
    error = KeyError("ComputeCapabilityMajor")
    monkeypatch.setattr(engine, "TIERS", (FaultyTier(card, error, only_bound),))
    spec, arrays = placed(card, FLOAT32.astype(dtype))
    run = engine.prepare(spec, 8, precision)
    facts = f"3-4-2, tanh, identity, squared_error, {np.dtype(dtype)}, precision='{precision}', "
    facts += "Card 0 of compute capability 90, CuPy 14.2.0, CUDA 13000, driver 13010"
    message = f"failed with KeyError: 'ComputeCapabilityMajor'.* widths {facts}.*{way_on}"
    with pytest.raises(RuntimeError, match=message) as caught:
        run.bound(*arrays)() if only_bound else run(*arrays)
    assert caught.value.__cause__ is error


def test_a_card_that_does_not_answer_hides_no_fault(card, monkeypatch):
    def illegal_access():
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(card, "driver_version", illegal_access)
    monkeypatch.setitem(sys.modules, "cupy", card.module)
    error = TypeError("no such argument\nand more")
    monkeypatch.setattr(engine, "TIERS", (FaultyTier(card, error),))
    spec, arrays = placed(card, PROBLEM)
    message = r"TypeError: no such argument\. .* a card that does not answer \(an illegal memory"
    with pytest.raises(RuntimeError, match=message) as caught:
        engine.prepare(spec, 7, "float32")(*arrays)
    assert caught.value.__cause__ is error


def test_what_the_user_can_mend_is_left_as_it_is(card, monkeypatch):
    error = ImportError("backend 'cupy' needs cuBLASLt")
    monkeypatch.setattr(engine, "TIERS", (FaultyTier(card, error),))
    spec, arrays = placed(card, PROBLEM)
    with pytest.raises(ImportError) as caught:
        engine.prepare(spec, 7, "float32")(*arrays)
    assert caught.value is error


# Where results go --------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["C", "F"])  # written by the tier, and copied
def test_gradients_are_written_to_out(card, monkeypatch, order):
    monkeypatch.setattr(engine, "TIERS", (Tier(card),))
    spec, arrays = placed(card, PROBLEM, reduction="mean")
    out = [
        Layer(np.full_like(W, np.nan, order=order), np.full_like(b, np.nan)) for W, b in arrays[0]
    ]
    results = engine.prepare(spec, 7, "float32")(*arrays, out)
    assert results[1] is out
    assert_right(results, reduction="mean")


# Bound to arrays ---------------------------------------------------------------------------------


class BindingTier(Tier):
    """A tier that can make up its launches beforehand."""

    def __init__(self, card, refuses=False):
        super().__init__(card)
        self.refuses, self.n_bound = refuses, 0

    def prepare(self, spec, n, precision):
        return BoundRun(self, super().prepare(spec, n, precision))


class BoundRun:
    def __init__(self, tier, run):
        self.tier, self.run = tier, run

    def __call__(self, arguments):
        return self.run(arguments)

    def bound(self, arguments):
        self.tier.n_bound += 1
        self.tier.bound_on = self.tier.card.current[-1]
        if self.tier.refuses is not False:
            if self.tier.refuses is not True:
                raise self.tier.refuses
            return None
        return lambda: self.run(arguments)


def bound_to(card, monkeypatch, tier, change=lambda arrays: arrays):
    monkeypatch.setattr(engine, "TIERS", (tier,))
    spec, arrays = placed(card, FLOAT32, reduction="mean")
    arrays = change(arrays)
    return arrays, engine.prepare(spec, 8, "float32").bound(*arrays)


def assert_follows_the_arrays(arrays, call):
    params, X, *_ = arrays
    for factor in (1, 2, 3):
        X[...] = factor * FLOAT32.X
        params[0].W[...] = factor * FLOAT32.params[0][0]
        (W, b), last = FLOAT32.params
        problem = FLOAT32._replace(X=factor * FLOAT32.X, params=[(factor * W, b), last])
        loss, grads = call()
        expected = by_derivation(problem.astype(np.float64), "mean")
        assert loss == pytest.approx(expected[0], rel=1e-5)
        assert_grads_close(grads, expected[1], 1e-5)
    assert all(A is B for A, B in zip(flat(grads), flat(call()[1]), strict=True))


def test_launches_are_made_up_once(card, monkeypatch):
    tier = BindingTier(card)
    arrays, call = bound_to(card, monkeypatch, tier)
    assert_follows_the_arrays(arrays, call)
    assert tier.n_bound == 1
    assert len(tier.plans) == 1


def test_a_tier_that_cannot_is_called(card, monkeypatch):
    tier = Tier(card)
    assert_follows_the_arrays(*bound_to(card, monkeypatch, tier))
    assert len(tier.plans) == 1


@pytest.mark.parametrize("refuses", [True, OutOfMemoryError("for what it would keep")])
def test_a_tier_may_refuse(card, monkeypatch, refuses):
    tier = BindingTier(card, refuses=refuses)
    assert_follows_the_arrays(*bound_to(card, monkeypatch, tier))
    assert tier.n_bound == 1


def test_launches_are_made_up_where_X_lies(card, monkeypatch):
    """Their results are allocated there."""
    tier = BindingTier(card)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    spec, arrays = placed(card, FLOAT32, device_id=1)
    engine.prepare(spec, 8, "float32").bound(*arrays)
    assert tier.bound_on == 1


@pytest.mark.parametrize(("dtype", "n_bound"), [(np.int8, 0), (np.int32, 1), (np.int64, 1)])
def test_labels_that_kernels_do_not_read_are_cast_at_every_call(card, monkeypatch, dtype, n_bound):
    tier = BindingTier(card)
    monkeypatch.setattr(engine, "TIERS", (tier,))
    monkeypatch.setattr(engine, "derivation", lambda *_: lambda *_: (0.0, []))
    problem = make_problem(sizes=(3, 4, 2), n=8, loss="softmax_cross_entropy", dtype=np.float32)
    spec, (params, X, y, weight) = placed(card, problem)
    y = card.array(y.astype(dtype))
    engine.prepare(spec, 8, "float32").bound(params, X, y, weight)()
    assert tier.n_bound == n_bound


def shifted(card, A):
    memory = card.array(np.zeros(A.size + 1, A.dtype))
    view = memory[1:].reshape(A.shape)
    view[...] = A
    return view


def test_what_kernels_cannot_read_as_it_lies_is_copied_at_every_call(card, monkeypatch):
    def misaligned(arrays):
        params, X, *rest = arrays
        return params, shifted(card, X), *rest

    def by_columns(arrays):
        (first, *above), *rest = arrays
        W = card.array(first.W.T.copy()).T
        return [first._replace(W=W), *above], *rest

    for change in (misaligned, by_columns):
        tier = BindingTier(card)
        assert_follows_the_arrays(*bound_to(card, monkeypatch, tier, change))
        assert tier.n_bound == 0


def test_on_another_stream_or_device_a_bound_call_has_another_workspace(card, monkeypatch):
    tier = BindingTier(card)
    arrays, call = bound_to(card, monkeypatch, tier)
    card.stream = 5
    assert_follows_the_arrays(arrays, call)
    card.current = [1]
    assert_follows_the_arrays(arrays, call)
    assert tier.plans == [(8, "float32", 0, 0), (8, "float32", 0, 5)]
    assert {device for _, device in tier.calls} == {0}


# Which net goes where ----------------------------------------------------------------------------


def first_tier(sizes, precision, dtype=np.float32, activation="tanh"):
    names = [activation] * (len(sizes) - 2) + ["identity"]
    rows = tuple(ACTIVATIONS[name] for name in names)
    spec = backprop.Spec(np, sizes, np.dtype(dtype), rows, LOSSES["squared_error"])
    tiers = (tier for tier in engine.TIERS if tier.specialise(spec, precision))
    return next((tier.__name__.rpartition(".")[2] for tier in tiers), None)


@pytest.mark.parametrize(
    ("sizes", "precision", "tier"),
    [
        *(((2, 10, 5, 1), precision, "tiny") for precision in rules.PRECISIONS),
        ((64, 64, 64, 1), "float32", "warp_tiles"),
        ((64, 64, 64, 1), "tf32", "warp_tiles"),
        ((64, 64, 64, 1), "bfloat16", "warp_tiles"),
        ((64, 64, 64, 1), "float32_exact", "layers"),
        *(((784, 128, 64, 10), precision, "layers") for precision in rules.PRECISIONS),
        *(((4096,) * 5, precision, "layers") for precision in rules.PRECISIONS),
    ],
)
def test_the_tier_of_a_net(sizes, precision, tier):
    assert first_tier(sizes, precision) == tier


def test_the_tier_of_a_dtype():
    assert first_tier((2, 10, 5, 1), "float32", np.float64) == "layers"
    assert first_tier((2, 10, 5, 1), "float32", np.float16) is None

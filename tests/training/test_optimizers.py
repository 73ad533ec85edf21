"""Optimizers: torch's numbers, any library's arrays, and nothing changed but what is returned."""

import copy
import inspect
import pickle
from dataclasses import fields
from itertools import pairwise

import numpy as np
import pytest

from mlp_backprop import Net, compute_grads, init_params, optimizers, schedules
from mlp_backprop.maths import optimizers as rows
from mlp_backprop.types import Layer, flat

SIZES = (3, 4, 2)
VARIANTS = [
    optimizers.SGD(),
    optimizers.SGD(momentum=0.9),
    optimizers.SGD(momentum=0.8, weight_decay=0.03),
    optimizers.SGD(momentum=0.9, nesterov=True, weight_decay=0.03),
    optimizers.SGD(weight_decay=0.1),
    optimizers.Adam(),
    optimizers.Adam(betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05),
    optimizers.Adam(betas=(0, 0)),
    optimizers.AdamW(),
    optimizers.AdamW(betas=(0.5, 0.99), eps=1e-6, weight_decay=0.2),
    optimizers.RMSprop(),
    optimizers.RMSprop(alpha=0.9, eps=1e-4, weight_decay=0.02),
    optimizers.RMSprop(momentum=0.9, weight_decay=0.02),
    optimizers.Adagrad(),
    optimizers.Adagrad(lr_decay=0.01, weight_decay=0.02, initial_accumulator_value=0.1, eps=1e-3),
    optimizers.Rprop(),
    optimizers.Rprop(etas=(0.6, 1.1), step_sizes=(1e-3, 0.5)),
]
OF_EACH = [optimizers.SGD(momentum=0.9, nesterov=True), *optimizers.OPTIMIZERS.values()]


def draw(seed, dtype="float64", members=()):
    """Something like parameters, or like gradients."""
    rng = np.random.default_rng(seed)
    return [
        Layer(
            rng.normal(size=(*members, n_out, n_in)).astype(dtype),
            rng.normal(size=(*members, n_out)).astype(dtype),
        )
        for n_in, n_out in pairwise(SIZES)
    ]


def walk(optimizer, params, gradients, rates):
    """The parameters after all steps, and the state."""
    state = optimizer.init(params)
    for grads, rate in zip(gradients, rates, strict=True):
        params, state = optimizer.update(params, grads, state, rate)
    return params, state


def same(layers, others):
    for A, B in zip(flat(layers), flat(others), strict=True):
        np.testing.assert_array_equal(A, B)


# torch ------------------------------------------------------------------------------------------


def torch_class(optimizer):
    torch = pytest.importorskip("torch", reason="torch is not installed")
    return getattr(torch.optim, type(optimizer).__name__)


def torch_walk(optimizer, params, gradients, rates):
    """The same by torch.optim."""
    import torch

    tensors = [torch.tensor(A) for A in flat(params)]
    options = {field.name: getattr(optimizer, field.name) for field in fields(optimizer)}
    theirs = torch_class(optimizer)(tensors, lr=rates[0], **options)
    for grads, rate in zip(gradients, rates, strict=True):
        for tensor, grad in zip(tensors, flat(grads), strict=True):
            tensor.grad = torch.tensor(grad)
        theirs.param_groups[0]["lr"] = rate
        theirs.step()
    return [tensor.numpy() for tensor in tensors]


def assert_like_torch(optimizer, rates):
    params = draw(0)
    gradients = [draw(1 + k) for k in range(len(rates))]
    ours, state = walk(optimizer, params, gradients, rates)
    theirs = torch_walk(optimizer, params, gradients, rates)
    for A, B in zip(flat(ours), theirs, strict=True):
        np.testing.assert_allclose(A, B, rtol=1e-12, atol=1e-12)
    assert state.step == len(rates)


@pytest.mark.parametrize("rate", [1e-3, 0.1, "changing"])
@pytest.mark.parametrize("optimizer", VARIANTS, ids=str)
def test_a_thousand_steps_are_those_of_torch(optimizer, rate):
    torch_class(optimizer)
    rates = schedules.one_cycle(0.05, 1000) if rate == "changing" else [rate] * 1000
    assert_like_torch(optimizer, list(map(float, rates)))


@pytest.mark.parametrize("optimizer", optimizers.OPTIMIZERS.values(), ids=str)
def test_names_and_defaults_are_those_of_torch(optimizer):
    theirs = inspect.signature(torch_class(optimizer)).parameters
    assert optimizer.learning_rate == theirs["lr"].default
    for field in fields(optimizer):
        assert getattr(optimizer, field.name) == theirs[field.name].default


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    optimizer = optimizers.SGD(momentum=0.5, nesterov=nesterov)
    p, b = 1.0, 0.0
    params, grads = [([[p]], [0.0])], [([[3.0]], [0.0])]
    state = optimizer.init(params)
    for _ in range(3):
        params, state = optimizer.update(params, grads, state, 0.25)
        b = 0.5 * b + 3.0
        p -= 0.25 * (3.0 + 0.5 * b if nesterov else b)
        assert p == params[0].W


def counted_from_two(self, xp, t, *others):
    return rows.Adam.step(self, xp, t + 1, *others)


def decayed_through_the_gradient(self, *arguments):
    return rows.Adam.step(self, *arguments)


def ahead_from_the_old_momentum(self, xp, t, p, g, slots, rate):
    _, after = rows.SGD.step(self, xp, t, p, g, slots, rate)
    return p - rate * (g + self.momentum * slots[0]), after


def moved_where_the_gradient_turned(self, xp, t, p, g, slots, rate):
    moved, (_, size) = rows.Rprop.step(self, xp, t, p, g, slots, rate)
    return xp.where(g * slots[0] < 0, p - size * xp.sign(g), moved), (g, size)


def root_of_the_sum(self, xp, t, p, g, slots, rate):
    v = self.alpha * slots[0] + (1 - self.alpha) * g * g
    return p - rate * g / xp.sqrt(v + self.eps), (v,)


def decaying_from_the_first_step(self, xp, t, *others):
    return rows.Adagrad.step(self, xp, t + 1, *others)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (optimizers.Adam(), counted_from_two),
        (optimizers.AdamW(), decayed_through_the_gradient),
        (optimizers.SGD(momentum=0.9, nesterov=True), ahead_from_the_old_momentum),
        (optimizers.Rprop(), moved_where_the_gradient_turned),
        (optimizers.RMSprop(), root_of_the_sum),
        (optimizers.Adagrad(lr_decay=0.1), decaying_from_the_first_step),
    ],
)
def test_a_wrong_formula_is_found(monkeypatch, right, wrong):
    torch_class(right)
    assert_like_torch(right, [0.01] * 50)
    monkeypatch.setattr(type(right), "step", wrong)
    with pytest.raises(AssertionError):
        assert_like_torch(right, [0.01] * 50)


# Arrays -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OF_EACH, ids=str)
def test_every_library(backend, optimizer):
    params, gradients, rates = draw(0), [draw(k) for k in (1, 2, 3)], [0.1, 0.2, 0.05]
    there = lambda layers: [Layer(*map(backend.array, layer)) for layer in layers]  # noqa: E731
    moved, state = walk(optimizer, there(params), list(map(there, gradients)), rates)
    expected, own = walk(optimizer, params, gradients, rates)
    results = [*flat(moved), *state.slots]
    assert {type(A) for A in results} == {type(backend.array(np.ones(2)))}
    for A, B in zip(results, [*flat(expected), *own.slots], strict=True):
        np.testing.assert_allclose(backend.numpy(A), B, rtol=1e-13, atol=1e-15)
        assert str(A.dtype).endswith("float64")


RATES = [0.1, np.float64(0.1), np.float32(0.1), np.array(0.1), 1]


@pytest.mark.parametrize("rate", RATES, ids=lambda rate: type(rate).__name__)
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16"])
@pytest.mark.parametrize("optimizer", OF_EACH, ids=str)
def test_no_rate_widens_the_parameters(optimizer, dtype, rate):
    params, state = walk(optimizer, draw(0, dtype), [draw(1, dtype)] * 3, [rate] * 3)
    assert {A.dtype for A in (*flat(params), *state.slots)} == {np.dtype(dtype)}
    assert all(np.isfinite(A).all() for A in flat(params))


def test_no_option_widens_the_parameters():
    optimizer = optimizers.Adam(
        betas=(np.float64(0.9), np.float64(0.99)), weight_decay=np.float64(1)
    )
    params, _ = walk(optimizer, draw(0, "float32"), [draw(1, "float32")], [0.1])
    assert {A.dtype for A in flat(params)} == {np.dtype("float32")}
    assert optimizer == optimizers.Adam(betas=(0.9, 0.99), weight_decay=1.0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", OF_EACH, ids=str)
@pytest.mark.parametrize("library", ["torch", "jax.numpy"])
def test_half_precision_stays(library, optimizer, dtype):
    xp = pytest.importorskip(library, reason=f"{library} is not installed")
    narrow = getattr(xp, dtype)
    make = xp.asarray
    p, g = (
        [Layer(make(W, dtype=narrow), make(b, dtype=narrow)) for W, b in draw(k)] for k in (0, 1)
    )
    params, state = walk(optimizer, p, [g, g], [0.1, np.float64(0.1)])
    assert {A.dtype for A in (*flat(params), *state.slots)} == {p[0].W.dtype}


def test_the_device_is_kept():
    strict = pytest.importorskip("array_api_strict", reason="array-api-strict is not installed")
    device = strict.Device("device1")
    there = lambda A: strict.asarray(A, device=device)  # noqa: E731
    params, grads = ([Layer(*map(there, layer)) for layer in draw(k)] for k in (0, 1))
    for optimizer in OF_EACH:
        moved, state = walk(optimizer, params, [grads] * 2, [0.1, np.array(0.1)])
        assert {A.device for A in (*flat(moved), *state.slots)} == {device}


@pytest.mark.parametrize("optimizer", VARIANTS, ids=str)
def test_nothing_that_is_given_is_changed(optimizer):
    params, grads = draw(0), draw(1)
    _, state = optimizer.update(params, grads, optimizer.init(params), 0.1)
    given = params, grads, state
    for A in (*flat(params), *flat(grads), *state.slots):
        A.flags.writeable = False
    before = copy.deepcopy(given)
    moved, after = optimizer.update(*given, 0.1)
    same(params, before[0])
    same(grads, before[1])
    assert state.step == 1
    for A, B in zip(state.slots, before[2].slots, strict=True):
        np.testing.assert_array_equal(A, B)
    for A in (*flat(moved), *after.slots):
        A[...] = 7.0  # all of it is the caller's own
    same(params, before[0])
    same(grads, before[1])


@pytest.mark.parametrize("optimizer", VARIANTS, ids=str)
def test_a_state_is_plain_data(optimizer):
    gradients = [draw(k) for k in range(1, 7)]
    whole, _ = walk(optimizer, draw(0), gradients, [0.1] * 6)
    params, state = walk(optimizer, draw(0), gradients[:3], [0.1] * 3)
    assert type(state.step) is int
    assert all(type(slot) is np.ndarray for slot in state.slots)
    assert len(state.slots) == optimizer.n_slots
    optimizer, params, state = pickle.loads(pickle.dumps((optimizer, params, state)))
    for grads in gradients[3:]:
        params, state = optimizer.update(params, grads, state, 0.1)
    same(params, whole)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("optimizer", VARIANTS, ids=str)
def test_members_go_as_single_nets(optimizer, dtype):
    params = draw(0, dtype, members=(3,))
    gradients = [draw(k, dtype, members=(3,)) for k in range(1, 5)]
    rates = [0.1, 0.03, 0.01]
    moved, _ = walk(optimizer, params, gradients, [np.array(rates)] * 4)
    for e, rate in enumerate(rates):
        of_one = lambda layers, e=e: [Layer(W[e], b[e]) for W, b in layers]  # noqa: E731
        alone, _ = walk(optimizer, of_one(params), list(map(of_one, gradients)), [rate] * 4)
        same(of_one(moved), alone)


def test_a_rate_for_each_member_of_every_library(backend):
    params, grads, rates = draw(0, members=(2,)), draw(1, members=(2,)), np.array([0.1, 0.3])
    there = lambda layers: [Layer(*map(backend.array, layer)) for layer in layers]  # noqa: E731
    expected, _ = walk(optimizers.Adam(), params, [grads], [rates])
    for given in (rates, backend.array(rates), rates.tolist()):
        moved, _ = walk(optimizers.Adam(), there(params), [there(grads)], [given])
        for A, B in zip(flat(moved), flat(expected), strict=True):
            np.testing.assert_allclose(backend.numpy(A), B, rtol=1e-13)


def test_a_step_may_have_a_rate_for_each_number():
    """What training passes on: one array of any shape, and a rate that is broadcast to it."""
    p, g = np.ones((2, 3), np.float32), np.full((2, 3), 0.5, np.float32)
    rate = np.array([[0.1], [0.2]])
    for row in OF_EACH:
        slots = row.first_slots(np, p, rate)
        moved, _ = row.step(np, 1, p, g, slots, rate)
        for e in range(2):
            alone = row.first_slots(np, p[e], float(rate[e, 0]))
            single, _ = row.step(np, 1, p[e], g[e], alone, float(rate[e, 0]))
            np.testing.assert_array_equal(moved[e], single)


@pytest.mark.parametrize("optimizer", OF_EACH[:-1], ids=str)
def test_inside_jit(optimizer):
    """All but rprop, which looks at the number of the step."""
    jax = pytest.importorskip("jax", reason="jax is not installed")
    there = lambda layers: [Layer(*map(jax.numpy.array, layer)) for layer in layers]  # noqa: E731
    params, grads = there(draw(0)), there(draw(1))
    compiled = jax.jit(optimizer.update)
    moved, state = params, optimizer.init(params)
    for _ in range(3):
        moved, state = compiled(moved, grads, state, 0.1)
    expected, _ = walk(optimizer, params, [grads] * 3, [0.1] * 3)
    for A, B in zip(flat(moved), flat(expected), strict=True):
        np.testing.assert_allclose(A, B, rtol=1e-12)


# What may be passed -----------------------------------------------------------------------------


def test_a_net_stays_a_net():
    net = Net(init_params(SIZES, rng=0), "tanh", "huber")
    X, y = np.ones((5, 3)), np.zeros((5, 2))
    optimizer = optimizers.Adam()
    state = optimizer.init(net)
    first = compute_grads(net, X, y).loss
    for _ in range(20):
        net, state = optimizer.update(net, compute_grads(net, X, y).grads, state, 0.05)
    assert net[1:] == ("tanh", "huber")
    assert compute_grads(net, X, y).loss < first / 2


def test_lists_and_tuples_are_parameters_too():
    params, grads = draw(0), draw(1)
    expected, _ = walk(optimizers.Adam(), params, [grads], [0.1])
    for kind in (tuple, lambda layers: [[W.tolist(), b.tolist()] for W, b in layers]):
        moved, _ = walk(optimizers.Adam(), kind(params), [kind(grads)], [0.1])
        same(moved, expected)


def test_without_a_rate_it_is_that_of_torch():
    for optimizer in OF_EACH:
        default, _ = walk(optimizer, draw(0), [draw(1)], [None])
        same(default, walk(optimizer, draw(0), [draw(1)], [optimizer.learning_rate])[0])


def test_an_optimizer_is_equal_to_its_like_alone():
    assert optimizers.Adam(betas=[0.9, 0.999]) == optimizers.OPTIMIZERS["adam"]
    assert optimizers.Adam(weight_decay=1e-2) != optimizers.AdamW()
    assert len(set(VARIANTS)) == len(VARIANTS)
    assert (
        str(optimizers.SGD(momentum=0.9)) == "SGD(momentum=0.9, nesterov=False, weight_decay=0.0)"
    )


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Adam", {"betas": (0.9, 1.0)}, r"betas\[1\] must be in \[0, 1\), got 1"),
        ("Adam", {"betas": (-0.1, 0.9)}, r"betas\[0\] must be in"),
        ("Adam", {"betas": 0.9}, "betas must be two numbers, got 0.9"),
        ("Adam", {"betas": (0.9, "a")}, r"betas\[1\] must be a number, got str"),
        ("Adam", {"eps": 0}, "eps must be finite and positive, got 0"),
        ("Adam", {"eps": np.nan}, "eps must be finite and positive, got nan"),
        ("AdamW", {"weight_decay": -1}, "weight_decay must be finite and not negative, got -1"),
        ("AdamW", {"weight_decay": True}, "weight_decay must be a number, got bool"),
        ("SGD", {"momentum": np.inf}, "momentum must be finite and not negative, got inf"),
        ("SGD", {"nesterov": True}, "nesterov=True needs a momentum"),
        ("SGD", {"nesterov": 1, "momentum": 0.9}, "nesterov must be True or False, got 1"),
        ("RMSprop", {"alpha": 1.5}, r"alpha must be in \[0, 1\], got 1.5"),
        ("Adagrad", {"lr_decay": "fast"}, "lr_decay must be a number, got str"),
        ("Adagrad", {"initial_accumulator_value": -1}, "initial_accumulator_value must be"),
        ("Rprop", {"etas": (1.2, 0.5)}, "etas must be one below 1 and one above 1"),
        ("Rprop", {"step_sizes": (1, 0.5)}, "step_sizes must be the smallest and the largest"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(optimizers, name)(**options)


def other(**changes):
    """A right call of update, but for these arguments."""
    params = draw(0)
    state = optimizers.Adam().init(params)
    given = {"params": params, "grads": draw(1), "state": state, "learning_rate": 0.1}
    return given | changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": -1}, "learning_rate must be finite and not negative, got -1"),
        ({"learning_rate": np.nan}, "learning_rate must be finite and not negative, got nan"),
        ({"learning_rate": "cosine"}, "learning_rate must hold real numbers"),
        ({"learning_rate": np.ones(3)}, r"learning_rate must be a number; got shape \(3,\)"),
        ({"grads": draw(1)[:1]}, "grads must have the shapes of params"),
        ({"grads": draw(1, members=(2,))}, "grads must have the shapes of params"),
        ({"grads": draw(1, "float32")}, "W of layer 1 in grads has dtype float32"),
        ({"grads": None}, "grads must be a sequence of"),
        ({"state": (0, ())}, "state must be an OptimizerState, got tuple: begin with"),
        ({"state": optimizers.SGD().init(draw(0))}, r"state is not one of Adam\("),
        ({"state": optimizers.Adam().init(draw(0)[:1])}, r"2 arrays \(26,\) of float64: begin"),
        ({"state": optimizers.Adam().init(draw(0, "float32"))}, "state is not one of Adam"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises((TypeError, ValueError), match=message):
        optimizers.Adam().update(**other(**changes))


def test_rates_and_parameters_of_members_are_checked():
    params = draw(0, members=(2,))
    optimizer = optimizers.SGD()
    state = optimizer.init(params)
    with pytest.raises(ValueError, match=r"or \(2,\), one for each member; got shape \(3,\)"):
        optimizer.update(params, params, state, np.ones(3))
    with pytest.raises(ValueError, match="learning_rate must be finite and not negative, got -1"):
        optimizer.update(params, params, state, np.array([1.0, -1.0]))
    mixed = [params[0], draw(0)[1]]
    with pytest.raises(ValueError, match="with the same members in front of all"):
        optimizer.init(mixed)


def test_parameters_of_two_dtypes_are_refused():
    mixed = [draw(0)[0], draw(0, "float32")[1]]
    with pytest.raises(TypeError, match="W of layer 2 has dtype float32, W of layer 1 float64"):
        optimizers.SGD().init(mixed)

"""Compiled steps of training, held to a loop written out here: same vectors, histories, ends."""

import threading
from copy import deepcopy
from dataclasses import fields
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import init_params
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Spec
from mlp_backprop.derivatives.gradients import compute_grads
from mlp_backprop.derivatives.per_sample import clipped_grads
from mlp_backprop.engines import choice, orders, threads
from mlp_backprop.engines.compiled import drawing, optimizers, schedule, team, training
from mlp_backprop.engines.compiled.engine import by_layer
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.losses import LOSSES
from mlp_backprop.maths.optimizers import SGD, Adagrad, Adam, AdamW, RMSprop, Rprop
from mlp_backprop.maths.runs import DIVERGED, FINISHED, RUNNING, STOPPED, State, Task
from mlp_backprop.types import flat, n_params

SIZES = (3, 9, 2)
HISTORY = "loss", "validation_loss", "learning_rate", "grad_norms"


# What an optimizer does, from torch's documentation ----------------------------------------------


ROWS = {
    "sgd": SGD(),
    "momentum": SGD(momentum=0.8, weight_decay=0.01),
    "nesterov": SGD(momentum=0.8, nesterov=True),
    "adam": Adam(),
    "adam, decay": Adam(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.02),
    "adamw": AdamW(weight_decay=0.03),
    "rmsprop": RMSprop(eps=1e-3, weight_decay=0.01),
    "rmsprop, momentum": RMSprop(eps=1e-3, momentum=0.5),
    "adagrad": Adagrad(weight_decay=0.01, lr_decay=0.1),
    "rprop": Rprop(step_sizes=(1e-5, 0.02)),
}


def textbook_step(o, t, p, g, slots, rate):
    if o.name == "rprop":
        before, size = slots
        turn = np.sign(before * g)
        size = np.clip(size * np.select([turn > 0, turn < 0], [*o.etas[::-1]], 1.0), *o.step_sizes)
        g = np.where(turn < 0, 0.0, g)
        return p - np.sign(g) * size, (g, size)
    if o.name == "adamw":
        p = p - rate * o.weight_decay * p
    else:
        g = g + o.weight_decay * p
    if o.name == "sgd":
        if not o.momentum:
            return p - rate * g, ()
        b = o.momentum * slots[0] + g
        return p - rate * (g + o.momentum * b if o.nesterov else b), (b,)
    if o.name in ("adam", "adamw"):
        (m, v), (b1, b2) = slots, o.betas
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return p - rate * (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + o.eps), (m, v)
    if o.name == "rmsprop":
        v = o.alpha * slots[0] + (1 - o.alpha) * g**2
        d = g / (np.sqrt(v) + o.eps)
        if not o.momentum:
            return p - rate * d, (v,)
        b = o.momentum * slots[1] + d
        return p - rate * b, (v, b)
    v = slots[0] + g**2
    return p - rate / (1 + (t - 1) * o.lr_decay) * g / (np.sqrt(v) + o.eps), (v,)


# A run, and the loop that it is held to ----------------------------------------------------------


def made(
    sizes=SIZES, n=23, members=1, dtype=np.float64, loss="squared_error", own=False, **options
):
    """A task and its state; of labels where the loss is of classes."""
    rng = np.random.default_rng(3)
    front = (members,) if own else ()
    X = rng.normal(size=(*front, n, sizes[0])).astype(dtype)
    y = rng.uniform(0.1, 0.9, size=(*front, n, sizes[-1])).astype(dtype)
    if loss == "softmax_cross_entropy":
        y = rng.integers(sizes[-1], size=(*front, n))
    names = [options.pop("activation", "tanh")] * (len(sizes) - 2) + ["identity"]
    spec = Spec(np, sizes, np.dtype(dtype), tuple(ACTIVATIONS[f] for f in names), LOSSES[loss])
    options.setdefault("epochs", 4)
    return Task(spec, X, y, None, members, Adam(), np.empty(0), None, batch_size=5, shuffle=True,
                seeds=tuple(range(7, 7 + members)), **options)  # fmt: skip


def run_of(
    batch_size=5, shuffle=True, weight=None, optimizer=None, rates=None, scale=None, **options
):
    task = made(**options)
    n_steps = task.epochs * -(-task.X.shape[-2] // batch_size)
    if rates is None:
        rates = 0.01 + 0.01 * np.cos(np.arange(n_steps))
    task = task._replace(batch_size=batch_size, shuffle=shuffle, weight=weight, rates=rates,
                         optimizer=optimizer or Adam(), scale=scale)  # fmt: skip
    return task, begun(task)


def begun(task):
    E, P, dtype = task.n_members, n_params(task.spec.sizes), task.spec.dtype
    seeds = [init_params(list(task.spec.sizes), e, dtype=np.dtype(dtype).name) for e in range(E)]
    vector = np.array([np.concatenate([A.ravel() for A in flat(params)]) for params in seeds])
    slots = np.zeros((task.optimizer.n_slots, E, P), dtype)
    if task.optimizer.name == "rprop":
        slots[1] = task.rates[..., 0] if task.rates.ndim == 1 else task.rates[:, :1]
    zeros, counts = partial(np.zeros, E), partial(np.zeros, E, np.int64)
    history = [np.full((task.epochs + 1, E), np.nan) for _ in range(5)]
    history[-1][0] = 0.0
    return State(vector, slots, counts(), zeros(), zeros(), zeros(), vector.copy(),
                 np.full(E, np.inf), counts(), vector.copy(), counts(), counts(),
                 *history)  # fmt: skip


def member_data(task, e, validation=False):
    X, y, weight = task.validation if validation else (task.X, task.y, task.weight)
    X, y = X[e] if X.ndim == 3 else X, y[e] if X.ndim == 3 else y
    rows = task.validation_rows if validation else None
    weight = np.ones(len(X), X.dtype) if weight is None else weight
    return [A if rows is None else A[rows[e]] for A in (X, y, weight)]


def net(task, vector):
    names = [f.name for f in task.spec.activations]
    options = {"activation": names, "loss": task.spec.loss.name, "backend": "numpy"}
    return by_layer(vector.copy(), task.spec.sizes), options


def gradient(task, vector, X, y, weight):
    params, options = net(task, vector)
    options |= {"sample_weight": weight, "reduction": "sum"}
    loss, grads = compute_grads(params, X, y, **options)
    if task.max_sample_norm is not None:
        _, grads = clipped_grads(params, X, y, max_norm=task.max_sample_norm, **options)
    return float(loss), np.concatenate([A.ravel() for A in flat(grads)])


def plain(task, state, most_steps=10**9):
    """The whole run, by the equations of maths/runs.py."""
    for e in range(task.n_members):
        plain_member(task, state, e, most_steps)
    return state


def plain_member(task, s, e, most_steps):
    X, y, weight = member_data(task, e)
    slots = tuple(A[e] for A in s.slots)
    for epoch in range(task.epochs):
        order = orders.order(task, e, epoch)
        mean = np.mean(weight[order])
        for first in range(0, len(order), task.batch_size):
            rows = order[first : first + task.batch_size]
            loss, g = gradient(task, s.vector[e], X[rows], y[rows], weight[rows])
            g = g / (len(rows) * mean)
            norm = np.sqrt(np.sum(g**2))
            if not np.isfinite(loss + norm):
                s.status[e] = DIVERGED
                return
            if task.max_grad_norm is not None:
                g = g * min(1.0, task.max_grad_norm / norm)
            s.step[e] += 1
            t = int(s.step[e])
            rate = task.rates[t - 1] if task.rates.ndim == 1 else task.rates[e, t - 1]
            scale = 1.0 if task.scale is None else task.scale
            s.vector[e], slots = textbook_step(
                task.optimizer, t, s.vector[e], g, slots, rate * scale
            )
            for k, slot in enumerate(slots):
                s.slots[k, e] = slot
            s.loss_sum[e] += loss
            s.weight_sum[e] += np.sum(weight[rows])
            s.grad_norm[e] = norm
            if task.average == "ema":
                d = min(0.999, (1 + t) / (10 + t))
                s.average[e] += (1 - d) * (s.vector[e] - s.average[e])
            if t == most_steps and first + len(rows) < len(order):
                return
        plain_end(task, s, e, epoch + 1, rate)
        if s.status[e] != RUNNING or t == most_steps:
            return


def plain_end(task, s, e, k, rate):
    s.loss[k, e] = s.loss_sum[e] / s.weight_sum[e]
    s.learning_rate[k, e], s.grad_norms[k, e] = rate, s.grad_norm[e]
    s.loss_sum[e] = s.weight_sum[e] = 0.0
    if task.average == "swa":
        s.n_averaged[e] = 1 if k <= task.first_averaged else s.n_averaged[e] + 1
        s.average[e] += (s.vector[e] - s.average[e]) / s.n_averaged[e]
    if task.validation is not None:
        judged = s.average[e] if task.average else s.vector[e]
        X, y, weight = member_data(task, e, validation=True)
        params, options = net(task, judged)
        loss = compute_grads(params, X, y, sample_weight=weight, **options).loss
        s.validation_loss[k, e] = loss
        if loss < s.best_loss[e]:
            s.best[e], s.best_loss[e], s.best_epoch[e] = judged, loss, k
    if k == task.epochs:
        s.status[e] = FINISHED
    elif task.patience is not None and k - s.best_epoch[e] >= task.patience:
        s.status[e] = STOPPED


def compiled(task, state, slices=(60.0,)):
    runner = training.Runner(task, state)
    for seconds in slices:
        runner.advance(seconds)
    return state


def assert_close(got, expected, tolerance=1e-10):
    for field in fields(State):
        if field.name != "seconds":
            A, B = getattr(got, field.name), getattr(expected, field.name)
            message = field.name
            np.testing.assert_allclose(A, B, rtol=tolerance, atol=tolerance, err_msg=message)


def assert_same(got, expected):
    for field in fields(State):
        if field.name != "seconds":
            A, B = getattr(got, field.name), getattr(expected, field.name)
            assert np.array_equal(A, B, equal_nan=A.dtype.kind == "f"), field.name


def check(tolerance=1e-10, **options):
    task, state = run_of(**options)
    assert training.covers(task)
    expected = plain(task, deepcopy(state))
    assert_close(compiled(task, state), expected, tolerance)
    return task, state


# The answers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_optimizers(name):
    n_steps = 20 * 5
    scale = np.random.default_rng(1).uniform(0.5, 2.0, size=n_params(SIZES))
    if name == "rprop":  # whose steps would hang on the last bit where a gradient is nearly 0
        check(optimizer=ROWS[name], batch_size=23, epochs=40, rates=np.full(40, 0.01))
        return
    _, state = check(optimizer=ROWS[name], epochs=20, scale=scale)
    assert state.step[0] == n_steps


def test_the_table_of_optimizers():
    assert {o.name for o in ROWS.values()} == set(optimizers.OPTIMIZERS) == set(optimizers.ROWS)


@pytest.mark.parametrize("loss", LOSSES)
def test_losses(loss):
    check(loss=loss, sizes=(3, 5, 4), optimizer=SGD())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation):
    check(activation=activation, sizes=(9, 8, 10, 2), optimizer=SGD())


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_weights_short_batches_and_no_shuffle(loss):
    weight = np.random.default_rng(0).uniform(0.0, 3.0, size=23)
    weight[4] = 0.0
    for batch_size, shuffle in ((1, True), (5, False), (23, True), (100, True)):
        check(
            loss=loss,
            weight=weight,
            batch_size=batch_size,
            shuffle=shuffle,
            rates=np.full(92, 0.01),
        )


def test_in_float32():
    check(tolerance=2e-5, dtype=np.float32, optimizer=SGD(momentum=0.5), sizes=(17, 10, 3))


def test_clipping():
    _, state = check(max_grad_norm=0.3, optimizer=SGD())
    assert state.grad_norms[1] > 0.3
    check(max_sample_norm=0.2, optimizer=SGD(), weight=np.linspace(0.1, 2.0, 23))


def validated(**options):
    rng = np.random.default_rng(8)
    X = rng.normal(size=(11, SIZES[0]))
    return {"validation": (X, rng.uniform(size=(11, SIZES[-1])), rng.uniform(size=11)), **options}


@pytest.mark.parametrize("average", ["", "ema", "swa"])
def test_validation_and_averages(average):
    _, state = check(**validated(average=average, epochs=9, rates=np.full(45, 0.02)))
    assert state.best_epoch[0] > 0
    assert state.status[0] == FINISHED


def test_patience():
    _, state = check(**validated(patience=2, epochs=60, rates=np.full(300, 0.3)))
    assert state.status[0] == STOPPED
    assert 0 < state.best_epoch[0] == state.step[0] // 5 - 2


def test_divergence_leaves_the_last_finite_net():
    rates = np.full(20, 1e-3)
    rates[6:] = 1e200
    task, state = run_of(members=2, optimizer=SGD(), rates=np.stack([rates, np.full(20, 1e-3)]))
    with np.errstate(all="ignore"):
        expected = plain(task, deepcopy(state))
    compiled(task, state)
    assert [*state.status] == [DIVERGED, FINISHED]
    assert state.step[0] == 7
    assert np.isfinite(state.vector).all()
    assert_close(state, expected)


def test_many_rows_in_many_chunks_and_tiles():
    for sizes, n in (((3, 64, 2), 700), ((40, 64, 2), 300)):
        task, state = run_of(sizes=sizes, n=n, batch_size=n - 9, epochs=3, optimizer=SGD())
        runner = training.Runner(task, deepcopy(state))
        assert runner.members["chunk_rows"][0] < task.batch_size
        assert_close(compiled(task, state), plain(task, begun(task)))


def test_no_copy_of_the_data_is_asked_for():
    task, state = run_of()
    expected = compiled(task, deepcopy(state))
    wide = np.zeros((46, 9))
    wide[::2, 8:2:-2] = task.X
    strided = task._replace(X=wide[::2, 8:2:-2], y=np.asfortranarray(task.y))
    assert_same(compiled(strided, state), expected)


def test_labels_as_they_lie():
    options = {"loss": "softmax_cross_entropy", "sizes": (3, 5, 4), "optimizer": SGD()}
    task, state = run_of(**options)
    rng = np.random.default_rng(8)
    validation = rng.normal(size=(11, 3)), rng.integers(4, size=11), None
    task = task._replace(validation=validation)
    expected = compiled(task, deepcopy(state))
    assert_close(expected, plain(task, deepcopy(state)))
    spread = np.full((23, 3), 99, np.int16)
    spread[:, 1] = task.y
    strided = task._replace(
        y=spread[:, 1], validation=(validation[0], np.uint8(validation[1]), None)
    )
    assert_same(compiled(strided, state), expected)


@pytest.mark.parametrize("sizes", [(2, 10, 5, 1), (8, 32, 32, 1), (64, 64, 64, 1), (700, 200, 9)])
def test_a_batch_is_cut_by_its_own_size_alone(sizes):
    """A workspace for more rows, of other members or for validation, changes no chunk or tile."""
    for n in (1, 7, 31, 64, 100, 200, 255, 256, 300, 1000, 5000):
        cuts = set()
        for most in (n, n + 5, 2 * n, 10 * n):
            tile_rows = layout(sizes, most, np.dtype(np.float32)).tile_rows
            rows = schedule.batch_chunk_rows(n, tile_rows, schedule.operations(sizes, 3), 10_000)
            cuts.add((rows, min(rows, n, tile_rows)))
        assert len(cuts) == 1, n


# Members -----------------------------------------------------------------------------------------


def member_rows(E, n=23):
    rng = np.random.default_rng(5)
    return tuple(rng.permutation(n)[: 23 - 3 * e].astype(np.int64) for e in range(E))


def test_members_are_single_runs_bit_for_bit():
    E = 3
    rates = np.random.default_rng(2).uniform(0.001, 0.02, size=(E, 30))
    options = {"members": E, "epochs": 6, "rates": rates, "rows": member_rows(E), "own": True}
    rng = np.random.default_rng(8)
    X, y = rng.normal(size=(11, SIZES[0])), rng.uniform(size=(11, SIZES[-1]))
    options |= {"validation": (X, y, None), "validation_rows": member_rows(E, 11), "patience": 3}
    options |= {"weight": rng.uniform(0.1, 3.0, size=23)}
    task, state = run_of(**options)
    all_of_them = compiled(task, deepcopy(state))
    assert_close(all_of_them, plain(task, deepcopy(state)))
    for e in range(E):
        alone = task._replace(
            X=task.X[e], y=task.y[e], n_members=1, rates=rates[e], seeds=task.seeds[e : e + 1],
            rows=task.rows[e : e + 1], validation_rows=task.validation_rows[e : e + 1],
        )  # fmt: skip
        single = compiled(alone, member(state, e))
        assert_same(single, member(all_of_them, e))


def test_labels_of_their_own():
    task, state = run_of(members=2, own=True, loss="softmax_cross_entropy", optimizer=SGD())
    assert task.y.shape == (2, 23)
    assert not np.array_equal(task.y[0], task.y[1])
    assert_close(compiled(task, deepcopy(state)), plain(task, state))


def member(state, e):
    def part(name, A):
        front = name == "slots" or name in (*HISTORY, "seconds")
        return (A[:, e : e + 1] if front else A[e : e + 1]).copy()

    return State(**{f.name: part(f.name, getattr(state, f.name)) for f in fields(State)})


# Slices ------------------------------------------------------------------------------------------


def test_short_slices_are_one_long_one():
    task, state = run_of(**validated(members=2, epochs=5, average="ema"))
    expected = compiled(task, deepcopy(state))
    runner, n_slices = training.Runner(task, state), 0
    while (state.status == RUNNING).any():
        before = state.step.sum()
        runner.advance(0.0)
        n_slices += 1
        assert before < state.step.sum()
        assert_close(member(state, 0), plain_so_far(task, state))
    assert n_slices > 2
    assert_same(state, expected)


def plain_so_far(task, state):
    """The same member, up to where it is now: a state is true between any two steps."""
    alone = task._replace(n_members=1, seeds=task.seeds[:1])
    return plain(alone, begun(alone), most_steps=int(state.step[0]))


def test_a_new_runner_goes_on():
    task, state = run_of(epochs=6)
    expected = compiled(task, deepcopy(state))
    while (state.status == RUNNING).any():
        training.Runner(task, state).advance(0.0)
    assert_same(state, expected)


def test_an_epoch_that_is_taken_up_at_its_very_end_is_ended():
    task, state = run_of(**validated(epochs=1))
    ended = deepcopy(compiled(task, state))
    state.status[:] = RUNNING
    state.weight_sum[:], state.loss_sum[:] = 23, 23 * ended.loss[1]
    for name in HISTORY:
        getattr(state, name)[1] = np.nan
    training.Runner(task, state).advance(0.0)
    for name in HISTORY:
        np.testing.assert_allclose(getattr(state, name)[1], getattr(ended, name)[1], rtol=1e-12)
    assert state.status[0] == FINISHED
    assert state.step[0] == 5


def test_whole_epochs():
    task, state = run_of(members=2, epochs=3, rows=member_rows(2))
    runner = training.Runner(task, state)
    for epoch in (1, 2, 3):
        runner.advance(0.0, whole_epoch=True)
        assert [*state.step] == [5 * epoch, 4 * epoch]
    assert [*state.status] == [FINISHED, FINISHED]


def test_no_epochs_are_finished_at_once():
    task, state = run_of(epochs=0, rates=np.empty(0))
    compiled(task, state)
    assert [*state.status] == [FINISHED]
    assert state.step[0] == 0


def test_seconds_go_on():
    task, state = run_of(epochs=6)
    training.Runner(task, state).advance(0.0, whole_epoch=True)
    state.seconds[1] = 1000.0
    compiled(task, state)
    assert (np.diff(state.seconds[1:, 0]) >= 0).all()
    assert 1000 < state.seconds[-1, 0] < 1000 + 600


def test_an_interrupt_between_slices_loses_nothing(monkeypatch):
    task, state = run_of(**validated(epochs=6, average="ema"))
    expected = compiled(task, deepcopy(state))
    runner = training.Runner(task, state)
    lead_alone = runner.lead_alone

    def interrupted(*arguments):
        runner.run["until"] = 0
        lead_alone(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "lead_alone", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runner.advance(60.0)
    assert 0 < state.step[0] < 30
    assert_close(state, plain_so_far(task, state))
    monkeypatch.undo()
    runner.advance(60.0)
    assert_same(state, expected)


# Orders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ahead", [True, False])
def test_few_orders_are_drawn_ahead_or_none(ahead, monkeypatch):
    task, state = run_of(members=2, epochs=40, rows=member_rows(2))
    expected = compiled(task, deepcopy(state))
    monkeypatch.setattr(drawing, "RING_BYTES", 0)
    if not ahead:
        monkeypatch.setattr(drawing.Orders, "draw_ahead", lambda *_: None)
    runner = training.Runner(task, state)
    assert [ring.shape for ring in runner.orders.rings] == [(2, 23), (2, 20)]
    runner.advance(60.0)
    assert_same(state, expected)


def test_an_order_in_use_is_not_drawn_over(monkeypatch):
    monkeypatch.setattr(drawing, "RING_BYTES", 0)
    task, state = run_of(epochs=5)
    drawn = training.Runner(task, state).orders
    for _ in range(4):
        drawn.draw(0)
    assert drawn.n_drawn[0] == 2
    for epoch in (0, 1):
        assert np.array_equal(drawn.rings[0][epoch], orders.order(task, 0, epoch))


def test_orders_take_a_megabyte_or_two_of_each():
    task, state = run_of(members=2, n=9000, batch_size=4000)
    rings = training.Runner(task, state).orders.rings
    assert [ring.shape for ring in rings] == [(7, 9000)] * 2


def test_members_of_one_seed_share_what_is_drawn(monkeypatch):
    task, state = run_of(members=3, epochs=2)
    task = task._replace(seeds=(5, 5, 5))
    drawn = []

    def counted(task, e, epoch):
        drawn.append(epoch)
        return orders.order(task, e, epoch)

    monkeypatch.setattr(drawing, "orders", SimpleNamespace(order=counted))
    runner = training.Runner(task, state)
    runner.orders.draw_first(np.arange(3))
    assert drawn == [0]


# Threads -----------------------------------------------------------------------------------------


@pytest.fixture
def always_together(monkeypatch):
    monkeypatch.setattr(training.Pace, "turns", lambda self: [(self.n_workers, 1.0)])


def wide_enough_to_share(**options):
    """Batches, parameters and validation rows in several parts."""
    sizes, rng = (64, 64, 2), np.random.default_rng(8)
    X, y = rng.normal(size=(300, 64)), rng.uniform(size=(300, 2))
    options = {"sizes": sizes, "n": 300, "batch_size": 130, "epochs": 4, **options}
    task, state = run_of(validation=(X, y, None), average="ema", max_grad_norm=0.5, **options)
    runner = training.Runner(task, deepcopy(state))
    assert runner.n_chunks > 1
    assert runner.run["n_ranges"] > 1
    assert runner.members["validation_chunk_rows"][0] < 300
    return task, state


def by_threads(task, state, n, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, str(n))
    return compiled(task, deepcopy(state), slices=(0.0, 0.002, 60.0))


@pytest.mark.parametrize("members", [1, 5])
def test_the_number_of_threads_changes_no_bit(members, always_together, monkeypatch):
    task, state = wide_enough_to_share(members=members)
    one, *others = [by_threads(task, state, n, monkeypatch) for n in (1, 2, 8)]
    assert_close(one, plain(task, deepcopy(state)), 1e-9)
    for other in others:
        assert_same(other, one)


def test_helpers_that_never_come_are_not_waited_for(always_together, monkeypatch):
    task, state = wide_enough_to_share()
    expected = by_threads(task, state, 1, monkeypatch)
    runner_of_one = training.Runner(task, deepcopy(state)).lead_alone
    monkeypatch.setattr(team, "run", lambda work, run, n, _, rested: runner_of_one(work, run, n))
    assert_same(by_threads(task, state, 2, monkeypatch), expected)


def test_runs_at_the_same_time(always_together, monkeypatch):
    """One of them has the helpers, the others go on alone."""
    task, state = wide_enough_to_share()
    expected = by_threads(task, state, 1, monkeypatch)
    monkeypatch.setenv(threads.VARIABLE, "2")
    states = [deepcopy(state) for _ in range(3)]
    running = [threading.Thread(target=compiled, args=(task, own)) for own in states]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    for own in states:
        assert_same(own, expected)


def test_the_faster_way_is_taken():
    pace = training.Pace(4)
    rates = {1: 100.0, 4: 300.0}
    slices = []
    for k in range(20):
        slices.append([])
        for n, share in pace.turns():
            slices[-1].append((n, share))
            pace.tell(n, rates[n])
        if k == 9:
            rates[4] = 50.0
    trial = [(1, 0.1), (4, 0.9)]
    assert slices[0] == [(1, 0.1), (4, 0.1), (4, 0.8)]
    assert slices[1:5] == [trial, trial, [(4, 1.0)], trial]
    assert slices[5:11] == [[(4, 1.0)]] * 5 + [trial]
    assert slices[11:] == [[(1, 1.0)]] * 9
    assert [*training.Pace(1).turns()] == [(1, 1.0)]


# What is covered ---------------------------------------------------------------------------------


def test_the_door():
    task, state = run_of()
    assert choice.training(task, state, "numpy") is None
    assert isinstance(choice.training(task, state, "numba"), training.Runner)
    wide = task._replace(spec=task.spec._replace(sizes=(3, 999, 2)))
    assert choice.training(wide, state, "numba") is None

"""Whole runs: against loops written out, against torch, and what must hold of every run."""

import signal
import threading
import time

import numpy as np
import pytest

from mlp_backprop import (
    Net,
    compute_grads,
    init_params,
    optimizers,
    per_sample_grads,
    ravel_params,
    train,
    unravel_params,
)
from mlp_backprop.losses import LOSSES

RNG = np.random.default_rng(0)
X = RNG.random((70, 3))
Y = np.sin(X.sum(axis=1, keepdims=True))
WEIGHT = RNG.random(70) + 0.1
PARAMS = init_params([3, 5, 1], rng=1)


def shuffled(key, n):
    """The rows of an epoch, as the docstring tells."""
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def vector(result):
    return ravel_params(result.net.params)


def test_three_epochs_of_sgd_by_hand():
    """Steps of 32, 32 and 6 rows, in the order that the docstring tells."""
    params, losses = PARAMS, []
    for epoch in range(3):
        order = shuffled([7, epoch], 70)
        total = 0.0
        for start in range(0, 70, 32):
            rows = order[start : start + 32]
            loss, grads = compute_grads(params, X[rows], Y[rows])
            total += loss * len(rows)
            params = [
                (W - 0.1 * dW, b - 0.1 * db) for (W, b), (dW, db) in zip(params, grads, strict=True)
            ]
        losses.append(total / 70)
    result = train(PARAMS, X, Y, optimizer="sgd", learning_rate=0.1, epochs=3, seed=7)
    np.testing.assert_allclose(vector(result), ravel_params(params), rtol=1e-12, atol=1e-14)
    first = compute_grads(PARAMS, X, Y).loss
    np.testing.assert_allclose(result.history.loss, [first, *losses], rtol=1e-12)
    assert np.isnan([result.history.grad_norm[0], result.history.learning_rate[0]]).all()
    assert (result.history.learning_rate[1:] == 0.1).all()
    assert np.isnan(result.history.validation_loss).all()
    assert (np.diff(result.history.seconds) > 0).all()
    assert (result.status, result.best_epoch) == ("finished", 3)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_seconds_go_on_from_slice_to_slice(monkeypatch, backend):
    monkeypatch.setattr("mlp_backprop.training.train.SLICE", 0.0)
    first = train(PARAMS, X, Y, epochs=5, backend=backend)
    both = train(PARAMS, X, Y, epochs=5, backend=backend, resume=first.state)
    assert both.history.seconds[0] == 0
    assert (np.diff(both.history.seconds) > 0).all()


def test_weights_are_normalised_over_the_training_set():
    order = shuffled([0, 0], 70)[:32]
    result = train(PARAMS, X, Y, sample_weight=WEIGHT, optimizer="sgd", learning_rate=1.0, epochs=1)
    second = shuffled([0, 0], 70)
    theta = ravel_params(PARAMS)
    for rows in (order, second[32:64], second[64:]):
        _, grads = compute_grads(
            unravel_params(theta, PARAMS),
            X[rows],
            Y[rows],
            sample_weight=WEIGHT[rows],
            reduction="sum",
        )
        theta = theta - ravel_params(grads) / (len(rows) * WEIGHT.mean())
    np.testing.assert_allclose(vector(result), theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_rows_are_as_if_there_were_no_others(backend):
    """A fold or a bootstrap sample: the same bits as on a copy of these rows."""
    rows = np.random.default_rng(3).integers(0, 70, 50)
    options = {"epochs": 3, "backend": backend}
    result = train(PARAMS, X, Y, rows=rows, sample_weight=WEIGHT, **options)
    copied = train(PARAMS, X[rows], Y[rows], sample_weight=WEIGHT[rows], **options)
    np.testing.assert_array_equal(result.history.loss, copied.history.loss)
    np.testing.assert_array_equal(vector(result), vector(copied))


@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averages_are_those_of_the_steps(average):
    """Full batches, so that a step is an epoch."""
    theta = mean = ravel_params(PARAMS)
    ends = []
    for t in range(1, 9):
        _, grads = compute_grads(unravel_params(theta, PARAMS), X, Y)
        theta = theta - 0.2 * ravel_params(grads)
        decay = min(0.999, (1 + t) / (10 + t))
        mean = decay * mean + (1 - decay) * theta
        ends.append(theta)
    expected = mean if average == "ema" else np.mean(ends[6:], axis=0)
    options = {
        "optimizer": "sgd",
        "learning_rate": 0.2,
        "epochs": 8,
        "batch_size": 70,
        "shuffle": False,
    }
    result = train(PARAMS, X, Y, weight_average=average, **options)
    np.testing.assert_allclose(vector(result), expected, rtol=1e-11, atol=1e-13)


def test_the_whole_gradient_is_clipped_and_its_norm_told():
    _, grads = compute_grads(PARAMS, X, Y)
    g = ravel_params(grads)
    norm = np.linalg.norm(g)
    result = train(
        PARAMS,
        X,
        Y,
        optimizer="sgd",
        learning_rate=1.0,
        epochs=1,
        batch_size=100,
        max_grad_norm=norm / 3,
    )
    assert result.history.grad_norm[1] == pytest.approx(norm)
    np.testing.assert_allclose(vector(result), ravel_params(PARAMS) - g / 3, rtol=1e-12)


def test_each_row_is_clipped_with_its_weight():
    weight = WEIGHT / WEIGHT.mean()
    G = ravel_params(per_sample_grads(PARAMS, X, Y, sample_weight=weight))
    norms = np.linalg.norm(G, axis=1)
    most = float(np.median(norms))
    mean = (G * np.minimum(1, most / norms)[:, None]).sum(axis=0) / 70
    options = {
        "optimizer": "sgd",
        "learning_rate": 1.0,
        "epochs": 1,
        "batch_size": 70,
        "shuffle": False,
    }
    result = train(PARAMS, X, Y, sample_weight=WEIGHT, max_sample_norm=most, **options)
    np.testing.assert_allclose(vector(result), ravel_params(PARAMS) - mean, rtol=1e-11)


def test_layers_have_their_own_rates():
    _, grads = compute_grads(PARAMS, X, Y)
    options = {"optimizer": "sgd", "learning_rate": 1.0, "epochs": 1, "batch_size": 70}
    result = train(PARAMS, X, Y, layer_scale=[0.5, (0.25, 0.0)], **options)
    for (new, old), factors in zip(
        zip(result.net.params, PARAMS, strict=True), [(0.5, 0.5), (0.25, 0.0)], strict=True
    ):
        l = 0 if factors == (0.5, 0.5) else 1
        for k in range(2):
            np.testing.assert_allclose(new[k], old[k] - factors[k] * grads[l][k], rtol=1e-12)


def test_validation_keeps_the_best_and_patience_ends():
    """A rate that is too large, so that the loss goes up and down."""
    rng = np.random.default_rng(5)
    X_val, y_val = rng.random((20, 3)), rng.random((20, 1))
    options = {"optimizer": "sgd", "learning_rate": 0.4, "validation": (X_val, y_val)}
    result = train(PARAMS, X, Y, epochs=30, patience=4, **options)
    judged = result.history.validation_loss
    best = int(np.argmin(judged))
    assert (result.best_epoch, result.status) == (best, "stopped early")
    assert len(judged) == best + 4 + 1
    loss, _ = compute_grads(result.net, X_val, y_val)
    assert loss == pytest.approx(judged[best], rel=1e-12)
    whole = train(PARAMS, X, Y, epochs=best, **options)
    assert (vector(whole) == vector(result)).all()


def test_a_fraction_has_every_class_in_its_share():
    y = np.repeat([0, 1, 2], [40, 20, 10])
    net = Net(init_params([3, 4, 3], rng=0), "tanh", "softmax_cross_entropy")
    seen = {}
    result = train(net, X, y, validation=0.2, epochs=1)
    again = train(net, X, y, validation=0.2, epochs=1)
    other = train(net, X, y, validation=0.2, epochs=1, seed=1)
    seen = {r.history.validation_loss[0] for r in (result, again, other)}
    assert len(seen) == 2  # drawn by the seed
    from mlp_backprop.training.checked import _chosen

    assert np.bincount(y[_chosen(0.2, 70, y, 0)]).tolist() == [8, 4, 2]


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("average", [None, "ema"])
@pytest.mark.parametrize("optimizer", ["adam", "rprop", optimizers.SGD(momentum=0.9)])
def test_ten_epochs_and_ten_more_are_twenty(backend, average, optimizer):
    options = {
        "optimizer": optimizer,
        "learning_rate": 0.01,
        "weight_average": average,
        "validation": 0.2,
        "backend": backend,
    }
    whole = train(PARAMS, X, Y, epochs=20, **options)
    first = train(PARAMS, X, Y, epochs=10, **options)
    kept = {name: np.copy(A) for name, A in first.state.items() if name != "run"}
    both = train(init_params([3, 5, 1], rng=9), X, Y, epochs=10, resume=first.state, **options)
    assert (vector(both) == vector(whole)).all()
    assert both.best_epoch == whole.best_epoch
    for name in ("loss", "validation_loss", "learning_rate", "grad_norm"):
        np.testing.assert_array_equal(getattr(both.history, name), getattr(whole.history, name))
    for name, A in kept.items():
        np.testing.assert_array_equal(first.state[name], A)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_a_run_that_diverges_keeps_the_last_finite_net(backend):
    options = {
        "optimizer": "sgd",
        "learning_rate": 1e160,
        "epochs": 5,
        "batch_size": 10,
        "backend": backend,
    }
    with pytest.warns(RuntimeWarning, match=r"no longer finite in epoch 1, step \d+:"):
        result = train(PARAMS, X, Y, **options)
    assert result.status == "diverged"
    assert np.isfinite(vector(result)).all()
    assert not (vector(result) == ravel_params(PARAMS)).all()


def test_the_net_passed_is_never_changed_and_may_be_read_only():
    params = [(W.copy(), b.copy()) for W, b in PARAMS]
    for A in (params[0][0], params[1][1]):
        A.flags.writeable = False
    result = train(params, X, Y, epochs=2)
    assert all((A == B).all() for A, B in zip(params[0], PARAMS[0], strict=True))
    kept = result.state["vector"].copy()
    result.net.params[0][0][...] = 0  # nor is the state that is kept
    np.testing.assert_array_equal(result.state["vector"], kept)


def test_a_callback_is_told_each_epoch_and_may_end_the_run():
    told = []

    def callback(info):
        told.append((info.epoch, info.loss, compute_grads(info.net, X, Y).loss))
        return info.epoch == 3

    result = train(PARAMS, X, Y, epochs=9, callback=callback)
    assert [epoch for epoch, *_ in told] == [1, 2, 3]
    np.testing.assert_array_equal([loss for _, loss, _ in told], result.history.loss[1:])
    assert told[-1][2] == compute_grads(result.net, X, Y).loss
    assert result.status == "stopped early"


@pytest.fixture
def ctrl_c():
    """A function that presses it a moment later, in another thread."""

    def press():
        time.sleep(0.3)
        signal.raise_signal(signal.SIGINT)

    # A process that a shell began in the background ignores Ctrl-C, unless it is told otherwise.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield lambda: threading.Thread(target=press).start()
    signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_ctrl_c_gives_what_was_reached(ctrl_c, backend):
    options = {"validation": 0.3, "backend": backend}
    train(PARAMS, X, Y, epochs=1, **options)  # compiled by now

    def pressed(info):
        if info.epoch == 3:
            ctrl_c()

    result = train(PARAMS, X, Y, epochs=10**6, callback=pressed, **options)
    n = len(result.history.loss) - 1
    assert (result.status, 3 <= n < 10**6) == ("interrupted", True)
    whole = train(PARAMS, X, Y, epochs=n, **options)
    assert (whole.history.loss == result.history.loss).all()
    assert (vector(whole) == vector(result)).all()
    on = train(PARAMS, X, Y, epochs=5, resume=result.state, **options)
    further = train(PARAMS, X, Y, epochs=n + 5, **options)
    assert (on.history.loss == further.history.loss).all()


@pytest.mark.parametrize("loss", LOSSES)
def test_the_compiled_loop_agrees_with_the_reference(loss):
    rng = np.random.default_rng(5)
    net = Net(init_params([3, 5, 4, 2], rng=0), ["tanh", "silu", "identity"], loss)
    y = rng.integers(0, 2, (70, 2)).astype(float)
    y = y[:, 0].astype(int) if loss == "softmax_cross_entropy" else y
    options = {"sample_weight": WEIGHT, "epochs": 34, "validation": 0.2, "max_grad_norm": 0.5}
    one, other = (train(net, X, y, backend=backend, **options) for backend in ("numpy", "numba"))
    np.testing.assert_allclose(vector(other), vector(one), rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(one.history[:4], other.history[:4], strict=True):
        np.testing.assert_allclose(theirs, mine, rtol=1e-10)


def test_lbfgs_learns_the_function_of_the_assignment():
    data = np.random.default_rng(1).random((500, 2))
    target = (data**2).sum(axis=1, keepdims=True) / 2
    params = init_params([2, 10, 5, 1], rng=0)
    result = train(params, data, target, optimizer="lbfgs", epochs=500)
    assert result.history.loss[-1] < 1e-5
    assert (np.diff(result.history.loss) <= 0).all()


def test_a_callback_ends_lbfgs_and_it_goes_on_anew():
    options = {"optimizer": "lbfgs", "validation": 0.3}
    told = []

    def callback(info):
        told.append(info.epoch)
        return info.epoch == 3

    first = train(PARAMS, X, Y, epochs=50, callback=callback, **options)
    assert (first.status, told, len(first.history.loss)) == ("stopped early", [1, 2, 3], 4)
    more = train(PARAMS, X, Y, epochs=5, resume=first.state, **options)
    assert (more.status, len(more.history.loss)) == ("finished", 9)
    np.testing.assert_array_equal(more.history.loss[:4], first.history.loss)
    assert more.history.loss[-1] < first.history.loss[-1]


def test_a_result_is_printed_in_a_line():
    result = train(PARAMS, X, Y, epochs=2)
    loss = f"{result.history.loss[-1]:.4g}"
    assert str(result) == f"{result.net}; finished after 2 epochs, loss {loss}"

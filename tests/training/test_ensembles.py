"""Many nets in one run: each as if it were alone."""

import numpy as np
import pytest

from mlp_backprop import (
    Net,
    init_params,
    ravel_params,
    stack_params,
    train,
    unstack_params,
)

RNG = np.random.default_rng(0)
X = RNG.random((60, 3))
Y = np.sin(X.sum(axis=1, keepdims=True))
NETS = [init_params([3, 5, 1], rng=seed) for seed in range(4)]
STACKED = stack_params(NETS)
ENGINES = [None, "numba"]


def check_equal_bits(result, singles):
    assert result.status == tuple(single.status for single in singles)
    for e, (net, single) in enumerate(zip(unstack_params(result.net), singles, strict=True)):
        np.testing.assert_array_equal(ravel_params(net), ravel_params(single.net))
        assert result.best_epoch[e] == single.best_epoch
        for mine, theirs in zip(result.history[:4], single.history[:4], strict=True):
            np.testing.assert_array_equal(mine[: len(theirs), e], theirs)
            assert np.isnan(mine[len(theirs) :, e]).all()


@pytest.mark.parametrize("backend", ENGINES)
def test_each_member_has_the_bits_of_its_single_run(backend):
    """Seeds, rows and rates of its own; a fraction for validation; an end of its own."""
    rng = np.random.default_rng(5)
    rows = [rng.integers(0, 60, 40 + 3 * e) for e in range(4)]
    rates = [0.001, 0.3, 0.02, 0.5]
    options = {
        "epochs": 25,
        "optimizer": "rmsprop",
        "validation": 0.25,
        "patience": 3,
        "sample_weight": rng.random(60) + 0.1,
        "weight_average": "ema",
        "max_grad_norm": 1.0,
        "backend": backend,
    }
    result = train(STACKED, X, Y, seed=[5, 6, 7, 8], rows=rows, learning_rate=rates, **options)
    singles = [
        train(NETS[e], X, Y, seed=5 + e, rows=rows[e], learning_rate=rates[e], **options)
        for e in range(4)
    ]
    assert len({single.status for single in singles}) == 2  # some stop early, some do not
    check_equal_bits(result, singles)


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("own", ["X", "y", "Xy"])
def test_members_may_have_data_of_their_own(backend, own):
    rng = np.random.default_rng(5)
    own_X = rng.random((4, 30, 3))
    own_y = rng.integers(0, 2, (4, 30))
    nets = Net(
        stack_params([init_params([3, 4, 2], rng=e) for e in range(4)]),
        "tanh",
        "softmax_cross_entropy",
    )
    data = {"X": own_X if "X" in own else own_X[0], "y": own_y if "y" in own else own_y[0]}
    options = {"epochs": 4, "batch_size": 8, "validation": 0.2, "backend": backend}
    result = train(nets, **data, **options)
    singles = [
        train(
            net,
            data["X"][e] if "X" in own else data["X"],
            data["y"][e] if "y" in own else data["y"],
            **options,
        )
        for e, net in enumerate(unstack_params(nets))
    ]
    check_equal_bits(result, singles)


@pytest.mark.parametrize("backend", ENGINES)
def test_one_that_diverges_leaves_the_others_alone(backend):
    with pytest.warns(RuntimeWarning, match="of member 2 was no longer finite"):
        result = train(
            STACKED,
            X,
            Y,
            optimizer="sgd",
            learning_rate=[0.1, 0.2, 1e160, 0.3],
            epochs=5,
            batch_size=7,
            backend=backend,
        )
    assert result.status == ("finished", "finished", "diverged", "finished")
    assert np.isfinite(ravel_params(result.net)).all()
    single = train(
        NETS[3], X, Y, optimizer="sgd", learning_rate=0.3, epochs=5, batch_size=7, backend=backend
    )
    np.testing.assert_array_equal(
        ravel_params(unstack_params(result.net)[3]), ravel_params(single.net)
    )


@pytest.mark.parametrize("backend", ENGINES)
def test_ten_epochs_and_ten_more_are_twenty_for_members_too(backend):
    options = {"seed": [0, 1, 2, 3], "validation": 0.2, "backend": backend}
    whole = train(STACKED, X, Y, epochs=20, **options)
    first = train(STACKED, X, Y, epochs=10, **options)
    second = train(STACKED, X, Y, epochs=10, resume=first.state, **options)
    np.testing.assert_array_equal(second.history.loss, whole.history.loss)
    np.testing.assert_array_equal(ravel_params(second.net), ravel_params(whole.net))


@pytest.mark.parametrize("seeds", [0, [0, 1, 2, 3]])
def test_other_libraries_take_members_together(backend, seeds):
    rng = np.random.default_rng(5)
    if backend.name == "numpy":
        pytest.skip("there each goes alone")
    params = [(backend.array(W), backend.array(b)) for W, b in STACKED]
    options = {
        "seed": seeds,
        "epochs": 3,
        "learning_rate": [0.01, 0.02, 1e160, 0.03],
        "optimizer": "sgd",
    }
    options |= {"max_grad_norm": 10.0, "validation": 0.2, "weight_average": "swa", "batch_size": 20}
    weight = rng.random(60) + 0.1
    with pytest.warns(RuntimeWarning, match="of member 2"):
        expected = train(STACKED, X, Y, sample_weight=weight, **options)
    with pytest.warns(RuntimeWarning, match="of member 2"):
        result = train(
            params,
            backend.array(X),
            backend.array(Y),
            sample_weight=backend.array(weight),
            **options,
        )
    assert result.status == expected.status
    for mine, theirs in zip(result.history[:4], expected.history[:4], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11)
    np.testing.assert_allclose(
        backend.numpy(ravel_params(result.net)), ravel_params(expected.net), rtol=1e-9
    )


def test_patience_of_members_together(backend):
    """On other libraries too each stops by itself, and keeps what it had."""
    rng = np.random.default_rng(5)
    if backend.name not in ("torch", "array_api_strict"):
        pytest.skip("two libraries will do")
    params = [(backend.array(W), backend.array(b)) for W, b in STACKED]
    X_val = rng.random((20, 3))
    y_val = np.sin(X_val.sum(axis=1, keepdims=True))
    options = {
        "learning_rate": [0.4, 0.01, 0.8, 0.5],
        "optimizer": "sgd",
        "epochs": 30,
        "patience": 4,
    }
    expected = train(STACKED, X, Y, validation=(X_val, y_val), **options)
    result = train(
        params,
        backend.array(X),
        backend.array(Y),
        validation=(backend.array(X_val), backend.array(y_val)),
        **options,
    )
    assert result.status == expected.status
    assert len(set(result.status)) == 2
    np.testing.assert_array_equal(result.best_epoch, expected.best_epoch)
    np.testing.assert_array_equal(result.state["step"], expected.state["step"])
    np.testing.assert_allclose(
        backend.numpy(result.state["vector"]), expected.state["vector"], rtol=1e-9
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": [1, 2]}, "2 entries for 4 members"),
        ({"rows": [[0, 1], [2]]}, "for each of 4 members"),
        ({"learning_rate": [0.1, 0.2]}, "2 entries, the whole run"),
        ({"learning_rate": [[0.1], [0.2]]}, r"got shape \(2, 200\)"),
        ({"X": RNG.random((3, 60, 3))}, "since params are those of 4 nets"),
    ],
)
def test_bad_input(options, match):
    with pytest.raises(ValueError, match=match):
        train(**({"net_or_params": STACKED, "X": X, "y": Y} | options))


def test_one_callback_ends_all_members_of_lbfgs():
    told = []

    def callback(info):
        told.append(info.epoch)
        return len(told) == 1  # and no second time

    result = train(STACKED, X, Y, optimizer="lbfgs", epochs=50, callback=callback)
    assert result.status == ("stopped early",) * 4
    assert (len(result.history.loss), told) == (2, [1])

"""`train` on every array library: the same rows, the same losses, arrays of the caller's kind."""

import numpy as np
import pytest

from mlp_backprop import Net, init_params, ravel_params, train

RNG = np.random.default_rng(0)
X = RNG.random((50, 3))
Y = RNG.random((50, 2))
WEIGHT = RNG.random(50) + 0.1
LABELS = RNG.integers(0, 2, 50)
PARAMS = init_params([3, 4, 2], rng=0)


def of(backend, params):
    return [(backend.array(W), backend.array(b)) for W, b in params]


def test_all_libraries_go_the_same_way(backend):
    """Short last batches, weights, clipping, an average, validation."""
    options = {
        "epochs": 3,
        "learning_rate": 0.05,
        "max_grad_norm": 0.3,
        "weight_average": "ema",
        "layer_scale": [1.0, 0.5],
    }
    expected = train(PARAMS, X, Y, sample_weight=WEIGHT, validation=0.2, **options)
    arrays = {"X": backend.array(X), "y": backend.array(Y), "sample_weight": backend.array(WEIGHT)}
    result = train(of(backend, PARAMS), **arrays, validation=0.2, **options)
    for mine, theirs in zip(result.history[:4], expected.history[:4], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-11)
    W = result.net.params[0].W
    assert type(W) is type(arrays["X"])
    np.testing.assert_allclose(
        backend.numpy(ravel_params(result.net)), ravel_params(expected.net), rtol=1e-10
    )
    more = train(
        of(backend, PARAMS),
        **arrays,
        validation=0.2,
        resume=result.state,
        **(options | {"epochs": 1}),
    )
    again = train(PARAMS, X, Y, sample_weight=WEIGHT, validation=0.2, **(options | {"epochs": 4}))
    np.testing.assert_allclose(more.history.loss, again.history.loss, rtol=1e-11)


@pytest.mark.parametrize("optimizer", ["sgd", "lbfgs"])
def test_labels_and_clipped_rows(backend, optimizer):
    net = Net(PARAMS, "tanh", "softmax_cross_entropy")
    options = {"epochs": 2, "optimizer": optimizer}
    options |= {"max_sample_norm": 0.2, "learning_rate": 0.5} if optimizer == "sgd" else {}
    expected = train(net, X, LABELS, **options)
    result = train(
        net._replace(params=of(backend, PARAMS)), backend.array(X), backend.array(LABELS), **options
    )
    np.testing.assert_allclose(result.history.loss, expected.history.loss, rtol=1e-10)


def test_a_step_that_diverges_is_found_without_waiting(backend):
    options = {"optimizer": "sgd", "learning_rate": 1e160, "epochs": 3, "batch_size": 10}
    with pytest.warns(RuntimeWarning, match="no longer finite") as expected:
        one = train(PARAMS, X, Y, **options)
    with pytest.warns(RuntimeWarning, match="no longer finite") as found:
        other = train(of(backend, PARAMS), backend.array(X), backend.array(Y), **options)
    assert str(found[0].message) == str(expected[0].message)
    np.testing.assert_allclose(
        backend.numpy(ravel_params(other.net)), ravel_params(one.net), rtol=1e-9
    )

"""Whole runs beside torch's, and on real data."""

import numpy as np
import pytest

from mlp_backprop import (
    Net,
    forward,
    init_params,
    optimizers,
    ravel_params,
    schedules,
    train,
)

RNG = np.random.default_rng(0)
X = RNG.random((90, 3))
Y = np.sin(X.sum(axis=1, keepdims=True))


def shuffled(key, n):
    return np.random.Generator(np.random.Philox(key=key)).permutation(n)


def torch_run(torch, params, optimizer, options, epochs, seed):
    """The same steps as a user of torch would write them; parameters and the epochs' losses."""
    modules = []
    for W, b in params:
        layer = torch.nn.Linear(W.shape[1], W.shape[0], dtype=torch.float64)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(W))
            layer.bias.copy_(torch.tensor(b))
        modules += [layer, torch.nn.Tanh()]
    net = torch.nn.Sequential(*modules[:-1])
    steps = getattr(torch.optim, optimizer)(net.parameters(), **options)
    inputs, targets, losses = torch.tensor(X), torch.tensor(Y), []
    for epoch in range(epochs):
        order = torch.tensor(shuffled([seed, epoch], len(X)))
        total = 0.0
        for start in range(0, len(X), 32):
            rows = order[start : start + 32]
            steps.zero_grad()
            loss = torch.nn.functional.mse_loss(net(inputs[rows]), targets[rows])
            loss.backward()
            steps.step()
            total += loss.item() * len(rows)
        losses.append(total / len(X))
    return torch.nn.utils.parameters_to_vector(net.parameters()).detach().numpy(), losses


@pytest.mark.parametrize("backend", [None, "numba"])
@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}, 1e-9),
        ("Adam", {"weight_decay": 0.01}, 1e-9),
        ("AdamW", {"betas": (0.8, 0.95)}, 1e-9),
        ("Adagrad", {"lr_decay": 0.01}, 1e-9),
        # It divides by the root of a mean that begins near 0, which makes much of rounding.
        ("RMSprop", {"momentum": 0.5}, 1e-6),
    ],
)
def test_whole_runs_are_torchs(backend, name, options, tolerance):
    torch = pytest.importorskip("torch")
    params = init_params([3, 6, 1], rng=0)
    row = getattr(optimizers, name)(**options)
    result = train(
        Net(params, "tanh"),
        X,
        Y,
        optimizer=row,
        learning_rate=0.01,
        epochs=40,
        seed=3,
        backend=backend,
    )
    expected, losses = torch_run(torch, params, name, options | {"lr": 0.01}, 40, seed=3)
    np.testing.assert_allclose(ravel_params(result.net), expected, rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(result.history.loss[1:], losses, rtol=tolerance)


def test_the_function_of_the_assignment_is_learnt_to_a_millionth():
    data = np.random.default_rng(1).random((1000, 2))
    target = (data**2).sum(axis=1, keepdims=True) / 2
    rates = schedules.cosine(0.03, 1500 * 32, warmup=100)
    params = init_params([2, 10, 5, 1], rng=0)
    result = train(params, data, target, learning_rate=rates, epochs=1500, backend="numba")
    assert result.history.loss[-1] < 1e-6


def test_digits_are_read():
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    images, held_out = images / 16, np.arange(len(images)) % 5 == 0
    params = init_params([64, 100, 10], rng=0, scheme="he")
    net = Net(params, "relu", "softmax_cross_entropy")
    options = {"optimizer": "adamw", "learning_rate": 3e-3, "epochs": 40, "backend": "numba"}
    result = train(net, images[~held_out], labels[~held_out], **options)
    read = forward(result.net, images[held_out], backend="numba").argmax(axis=1)
    assert np.mean(read == labels[held_out]) >= 0.97


def test_diabetes_is_fitted_as_well_as_by_scikit_learn():
    """Held-out error over five splits, with the same widths, optimizer, batches and epochs."""
    datasets = pytest.importorskip("sklearn.datasets")
    from sklearn.neural_network import MLPRegressor

    data, target = datasets.load_diabetes(return_X_y=True)
    data, target = data / data.std(axis=0), (target - target.mean()) / target.std()
    fold = np.random.default_rng(0).integers(0, 5, len(data))
    ours, theirs = [], []
    for k in range(5):
        fit, held = fold != k, fold == k
        net = Net(init_params([10, 16, 1], rng=k), "tanh")
        result = train(
            net,
            data[fit],
            target[fit, None],
            epochs=60,
            learning_rate=2e-3,
            backend="numba",
            seed=k,
        )
        ours.append(np.mean((forward(result.net, data[held])[:, 0] - target[held]) ** 2))
        peer = MLPRegressor(
            hidden_layer_sizes=(16,),
            activation="tanh",
            alpha=0,
            batch_size=32,
            learning_rate_init=2e-3,
            max_iter=60,
            tol=0,
            n_iter_no_change=1000,
            random_state=k,
        )
        with pytest.warns(UserWarning, match="reached"):
            peer.fit(data[fit], target[fit])
        theirs.append(np.mean((peer.predict(data[held]) - target[held]) ** 2))
    assert np.mean(ours) < 1.1 * np.mean(theirs)

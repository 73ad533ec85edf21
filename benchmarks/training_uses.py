"""What bench_training.py measures of `train` alone: beside a load, its overhead, memory, real data.

Each function gives a record for the results file.
"""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import bench_load
import numpy as np
from training_tasks import Net, Task

from mlp_backprop import forward, init_params, schedules, train
from mlp_backprop.bench import grid
from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench.contenders import Ready
from mlp_backprop.bench.problems import Effort
from mlp_backprop.types import Array


def runs_of(task: Task, epochs: int, **options: Any) -> Callable[[], Any]:
    """A call that trains for so many epochs, compiled, and gives the layers."""
    options = task.options | options
    return lambda: (
        train(task.layers, task.X, task.y, epochs=epochs, backend="numba", **options).net.params
    )


def epochs_for(run: Callable[[int], Any], seconds: float) -> int:
    """With how many run(epochs) takes about so long."""
    epochs = 1
    while True:
        began = time.perf_counter()
        run(epochs)
        spent = time.perf_counter() - began
        if spent >= seconds / 4:
            return max(1, round(epochs * seconds / spent))
        epochs *= 4


# Under load ---------------------------------------------------------------------------------------


def under_load(net: Net, seconds: float, effort: bench_load.Effort) -> dict[str, Any]:
    """The same run with one process spinning and without, in turns; its bits are the same."""
    task = net.task()
    epochs = epochs_for(lambda epochs: runs_of(task, epochs)(), seconds)
    call = runs_of(task, epochs)
    spinners, others = bench_load.Spinners(1), bench_load.Others()
    try:
        bench_load.check_bits(net.name, call, spinners)
        record = bench_load.measure(call, effort, spinners, others)
    finally:
        spinners.end()
    return {"net": net.name, "epochs": epochs, **record, "others": others.cores()}


# Overhead -----------------------------------------------------------------------------------------

TILES = 64  # epochs that the bare run has in one


def overhead(net: Net, seconds: float, effort: Effort) -> dict[str, Any]:
    """What a run costs above its bare steps: a call, orders, ends of epochs, slices, history.

    Bare are the steps of one long epoch over the same rows, which come again and again in an order
    drawn before, less a run of no epochs. What a step itself does is in both. `in_order` is a run
    without shuffling: no orders are drawn beside it.
    """
    task = net.task()
    epochs = epochs_for(lambda epochs: runs_of(task, epochs)(), seconds)
    epochs = -(-epochs // TILES) * TILES
    rows = np.tile(np.random.default_rng(0).permutation(len(task.X)), TILES)
    long = {"rows": rows, "shuffle": False}
    calls = {
        "train": runs_of(task, epochs),
        "in_order": runs_of(task, epochs, shuffle=False),
        "long": runs_of(task, epochs // TILES, **long),
        "start": runs_of(task, 0, **long),
    }
    ready = {name: Ready(call, lambda result: result) for name, call in calls.items()}
    samples = {name: np.array(A) for name, A in grid.interleave(ready, effort).items()}
    n_steps = {
        "train": epochs * task.steps_per_epoch,
        "long": epochs // TILES * -(-len(rows) // task.batch_size),
    }
    bare = (samples["long"] - samples["start"]) / n_steps["long"]
    shares = {name: samples[name] / n_steps["train"] / bare - 1 for name in ("train", "in_order")}
    return {
        "net": net.name,
        "steps": n_steps["train"],
        "rounds": len(bare),
        "share": {name: float(np.median(of)) for name, of in shares.items()},
        "quartiles": {name: np.percentile(of, [25, 75]).tolist() for name, of in shares.items()},
    }


# Memory -------------------------------------------------------------------------------------------


def memory(n: int) -> dict[str, Any]:
    """By how many bytes a process grows that trains 64-64-64-1 on n rows it has."""
    code = f"import training_uses; print(training_uses.own_growth({n}))"
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=paths)
    last = child.stdout.split()[-1]
    return {
        "net": "64-64-64-1, batch 32",
        "n": n,
        "bytes": None if last == "None" else int(last),
        "data_bytes": n * 65 * 4,
        "order_bytes": n * 8,
    }


def own_growth(n: int) -> int | None:
    """The same in this process; a small run before loads what is compiled."""
    small, large = (Net("", (64, 64, 64, 1), rows, 32, ()).task() for rows in (100, n))
    runs_of(small, 2)()
    return bench_memory.peak_above(runs_of(large, 2))


# Real data ----------------------------------------------------------------------------------------


def assignment(epochs: int) -> dict[str, Any]:
    """y = (x1² + x2²) / 2 by a net 2-10-5-1 of sigmoids, judged on rows that it has not seen."""
    X = np.random.default_rng(0).random((4000, 2))
    y = (X**2).sum(axis=1, keepdims=True) / 2
    rates = schedules.one_cycle(0.03, epochs * 63)
    began = time.perf_counter()
    options: dict[str, Any] = {"epochs": epochs, "learning_rate": rates, "backend": "numba"}
    net = train(init_params([2, 10, 5, 1], rng=0), X[:2000], y[:2000], **options).net
    seconds = time.perf_counter() - began
    error = forward(net, X[2000:]) - y[2000:]
    return {"data": "assignment", "seconds": seconds, "loss": float(np.mean(error**2))}


def digits(epochs: int) -> dict[str, Any]:
    """Images of 8 x 8 pixels by a net 64-128-10; a fifth is held out, of each class the same."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    X, X_held_out, y, y_held_out = train_test_split(
        (images / 16).astype("float32"), labels, test_size=0.2, stratify=labels, random_state=0
    )
    options: dict[str, Any] = {"activation": "relu", "loss": "softmax_cross_entropy"}
    rates = schedules.cosine(3e-3, epochs * -(-len(X) // 32))
    options |= {"epochs": epochs, "learning_rate": rates, "backend": "numba"}
    seconds, accuracies = [], []
    for seed in range(5):
        layers = init_params([64, 128, 10], rng=seed, dtype="float32", scheme="he")
        began = time.perf_counter()
        net = train(layers, X, y, seed=seed, **options).net
        seconds.append(time.perf_counter() - began)
        right = np.argmax(forward(net, X_held_out), axis=1) == y_held_out
        accuracies.append(float(np.mean(right)))
    return {
        "data": "digits",
        "seconds": max(seconds),
        "accuracy": median(accuracies),
        "accuracies": accuracies,
    }


def diabetes(epochs: int, rounds: int) -> dict[str, Any]:
    """442 patients by 10-32-32-1, ours and scikit-learn's in turns: errors held out, and seconds.

    Both take the same steps of Adam with weight decay off; y has mean 0 and variance 1.
    """
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import train_test_split

    X, y = load_diabetes(return_X_y=True)
    X, y = ((A - A.mean(axis=0)) / A.std(axis=0) for A in (X, y))
    X, X_held_out, y, y_held_out = train_test_split(X, y, test_size=0.25, random_state=0)
    found: dict[str, Any] = {"ours": ([], []), "scikit-learn": ([], [])}
    for seed in range(rounds):
        for name, fit in (("ours", _by_train), ("scikit-learn", _by_sklearn)):
            began = time.perf_counter()
            predict = fit(X, y, epochs, seed)
            found[name][0].append(time.perf_counter() - began)
            found[name][1].append(float(np.mean((predict(X_held_out) - y_held_out) ** 2)))
    return {
        "data": "diabetes",
        "epochs": epochs,
        "by": {
            name: {"seconds": median(seconds), "loss": median(losses), "losses": losses}
            for name, (seconds, losses) in found.items()
        },
    }


def _by_train(X: Array, y: Array, epochs: int, seed: int) -> Callable[[Array], Array]:
    layers = init_params([10, 32, 32, 1], rng=seed, scheme="glorot")
    options: dict[str, Any] = {"activation": "tanh", "epochs": epochs, "backend": "numba"}
    net = train(layers, X, y[:, None], seed=seed, **options).net
    return lambda X: forward(net, X)[:, 0]


def _by_sklearn(X: Array, y: Array, epochs: int, seed: int) -> Callable[[Array], Array]:
    from sklearn.neural_network import MLPRegressor

    stop = {"tol": 0.0, "n_iter_no_change": epochs + 1, "max_iter": epochs}
    how = {
        "hidden_layer_sizes": (32, 32),
        "activation": "tanh",
        "alpha": 0.0,
        "batch_size": 32,
        "random_state": seed,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it has not converged
        return MLPRegressor(**how, **stop).fit(X, y).predict

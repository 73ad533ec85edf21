"""The table of contenders: every way to one loss and gradient that the benchmarks compare.

A builder takes a task, NumPy arrays, and does all that a user does once, outside the loop of a
training: inputs and parameters in the library's own arrays, functions compiled. What is timed is
`call`, one loss and gradient of all parameters. An optional library is imported in its builder;
ImportError, or ValueError for a task that it cannot express, leaves a contender out.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.derivatives.gradients import compute_grads
from mlp_backprop.edge import validation
from mlp_backprop.engines import choice
from mlp_backprop.types import Array, BackendName, Layer, Params


class Task(NamedTuple):
    """One batch, as NumPy arrays; the loss is a mean over its rows."""

    params: list[Layer]
    X: Array
    y: Array
    activation: Any  # of the hidden layers, before an identity output
    loss: Any

    @property
    def names(self) -> list[str]:
        """One activation per layer."""
        return [self.activation] * (len(self.params) - 1) + ["identity"]


class Answer(NamedTuple):
    """The mean loss, and its gradients W_1, b_1, W_2, ... as NumPy arrays."""

    loss: float
    grads: list[Array]


class Ready(NamedTuple):
    """What a builder returns: the call, how its result is read, and what holds around a sample."""

    call: Callable[[], Any]
    read: Callable[[Any], Answer]
    around: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext


class Contender(NamedTuple):
    """One row; files have the name, whoever reads has the words."""

    name: str
    library: str  # the distribution whose version counts
    extra: str  # of this package, which installs it; our own calls name theirs when they refuse
    build: Callable[[Task], Ready]
    arrays: int = 0  # of n (d_1 + ... + d_L) numbers, held at the peak; 0: memory does not grow
    since: str = "quick"  # the smallest selection it takes part in
    words: str = ""


def _flat(layers: Params) -> list[Array]:
    return list(chain.from_iterable(layers))


def _read(result: Any) -> Answer:
    """Any library on the CPU: (loss, [(W, b), ...]); copies, for a workspace is written again."""
    loss, grads = result
    return Answer(float(loss), [np.array(g, dtype=float) for g in _flat(grads)])


def _call(backend: str, task: Task) -> Ready:
    params, X, y, activation, loss = task
    options: dict[str, Any] = {"activation": activation, "loss": loss, "backend": backend}
    return Ready(lambda: compute_grads(params, X, y, **options), _read)


def _prepared(backend: BackendName, task: Task) -> Ready:
    from mlp_backprop import prepare_grads

    params, X, y, activation, loss = task
    grad_fn = prepare_grads(params, n=len(X), activation=activation, loss=loss, backend=backend)
    return Ready(lambda: grad_fn(params, X, y), _read)


# Beyond so many rows it is what a prepared call is.
MOST_BOUND_ROWS = 1024


def _bound(backend: BackendName, task: Task) -> Ready:
    from mlp_backprop import prepare_grads

    params, X, y, activation, loss = task
    if len(X) > MOST_BOUND_ROWS:
        raise ValueError(f"bound calls are timed up to {MOST_BOUND_ROWS} rows")
    grad_fn = prepare_grads(params, n=len(X), activation=activation, loss=loss, backend=backend)
    return Ready(grad_fn.bind(params, X, y), _read)


def _derivation(task: Task) -> Ready:
    """The derivation as it stands, on the arrays' own dtype."""
    params, X, y, activation, loss = task
    checked = validation.problem(params, X, y, activation, loss, "mean", None, "numpy")
    return Ready(lambda: choice.derivation(*checked), _read)


def _torch(task: Task, *, compiled: bool = False, n_threads: int | None = None) -> Ready:
    import torch
    import torch.nn.functional as F

    from mlp_backprop.checks import torch_reference

    # torch's own mean, one kernel; it also divides by d_L, which is 1 in the regressions.
    criteria = {"squared_error": F.mse_loss, "softmax_cross_entropy": F.cross_entropy}
    criterion = _expressible("torch", task, criteria)
    X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)
    params = [tuple(torch.tensor(A, requires_grad=True) for A in layer) for layer in task.params]
    leaves, names = _flat(params), task.names

    def loss_of(params: Any, X: Any, y: Any) -> Any:
        return criterion(torch_reference.forward(params, X, names), y)

    if compiled:
        if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
            raise ImportError("torch.compile needs a C++ compiler")
        torch.compiler.reset()  # else it would give up on static shapes after the first few n
        loss_of = torch.compile(loss_of, dynamic=False)

    def call() -> tuple[Any, Any]:
        loss = loss_of(params, X, y)
        return loss, torch.autograd.grad(loss, leaves)

    def read(result: Any) -> Answer:
        loss, grads = result
        return Answer(loss.item(), [g.numpy().astype(float) for g in grads])

    @contextmanager
    def threads() -> Iterator[None]:
        kept = torch.get_num_threads()
        torch.set_num_threads(n_threads or kept)
        try:
            yield
        finally:
            torch.set_num_threads(kept)

    return Ready(call, read, threads)


def _jax(task: Task) -> Ready:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32

    def squared_error(H: Array, y: Array) -> Array:
        return jnp.mean(jnp.sum((H - y) ** 2, axis=1))

    def cross_entropy(H: Array, y: Array) -> Array:
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(H), y[:, None], axis=1))

    criteria = {"squared_error": squared_error, "softmax_cross_entropy": cross_entropy}
    criterion = _expressible("jax", task, criteria)
    activation = {"sigmoid": jax.nn.sigmoid, "relu": jax.nn.relu}[task.activation]

    def loss_of(params: Any, X: Array, y: Array) -> Array:
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            X = activation(X @ W.T + b)
        return criterion(X @ W_L.T + b_L, y)

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))
    arguments = jax.device_put((task.params, task.X, task.y), jax.devices("cpu")[0])
    return Ready(lambda: jax.block_until_ready(value_and_grad(*arguments)), _read)


def _sklearn(task: Task) -> Ready:
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    # Its squared error has a factor 1/2, and its gradient misses a division by d_L = 1.
    rows = {"squared_error": (MLPRegressor, 2.0), "softmax_cross_entropy": (MLPClassifier, 1.0)}
    estimator, scale = _expressible("scikit-learn", task, rows)
    activation = {"sigmoid": "logistic", "relu": "relu"}[task.activation]
    y = task.y if task.y.ndim == 2 else np.eye(len(task.params[-1].b), dtype=task.X.dtype)[task.y]

    # The private method that fit() calls per batch, on a model set up as fit() does it.
    model = estimator(activation=activation, alpha=0.0)
    model.loss, model.out_activation_ = (
        ("log_loss", "softmax") if estimator is MLPClassifier else ("squared_error", "identity")
    )
    model.n_layers_ = len(task.params) + 1
    model.coefs_ = [np.ascontiguousarray(W.T) for W, _ in task.params]
    model.intercepts_ = [b.copy() for _, b in task.params]
    deltas, W_grads, b_grads = ([None] * len(task.params) for _ in range(3))

    def call() -> Any:
        activations = [task.X] + [None] * len(task.params)
        return model._backprop(task.X, y, None, activations, deltas, W_grads, b_grads)

    def read(result: Any) -> Answer:
        loss, W_grads, b_grads = result
        grads = [(W.T, b) for W, b in zip(W_grads, b_grads, strict=True)]
        return Answer(scale * float(loss), [scale * g.astype(float) for g in _flat(grads)])

    return Ready(call, read)


def _autograd(task: Task) -> Ready:
    import autograd.numpy as anp
    from autograd import value_and_grad

    def squared_error(H: Array) -> Array:
        return anp.sum((H - task.y) ** 2) / len(task.X)

    def cross_entropy(H: Array) -> Array:
        S = H - anp.max(H, axis=1, keepdims=True)
        log_p = S - anp.log(anp.sum(anp.exp(S), axis=1, keepdims=True))
        return -anp.sum(one_hot * log_p) / len(task.X)

    criteria = {"squared_error": squared_error, "softmax_cross_entropy": cross_entropy}
    criterion = _expressible("autograd", task, criteria)
    activations: dict[str, Callable[[Array], Array]] = {
        "sigmoid": lambda Z: 1 / (1 + anp.exp(-Z)),
        "relu": lambda Z: anp.maximum(Z, 0),
    }
    activation = activations[task.activation]
    if task.loss == "softmax_cross_entropy":
        one_hot = np.eye(len(task.params[-1].b), dtype=task.X.dtype)[task.y]

    def loss_of(params: Any) -> Array:
        H = task.X
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            H = activation(anp.dot(H, W.T) + b)
        return criterion(anp.dot(H, W_L.T) + b_L)

    both = value_and_grad(loss_of)
    params = [tuple(layer) for layer in task.params]
    return Ready(lambda: both(params), _read)


def _expressible(library: str, task: Task, criteria: dict[str, Any]) -> Any:
    """What stands for the task's loss, or ValueError."""
    if task.loss not in criteria or task.activation not in ("sigmoid", "relu"):
        raise ValueError(f"{library} is set up here for {', '.join(criteria)}, sigmoid and relu")
    if task.loss == "squared_error" and task.y.shape[1] != 1:  # means over outputs differ
        raise ValueError(f"{library} is set up here for squared errors of a single output")
    return criteria[task.loss]


CONTENDERS = {
    row.name: row
    for row in (
        Contender(
            "prepared",
            "mlp-backprop",
            "",
            partial(_prepared, "numpy"),
            words="prepared call, numpy",
        ),
        Contender("call", "mlp-backprop", "", partial(_call, "numpy"), words="plain call, numpy"),
        Contender(
            "prepared_numba", "numba", "", partial(_prepared, "numba"), words="prepared call, numba"
        ),
        Contender("bound_numba", "numba", "", partial(_bound, "numba"), words="bound call, numba"),
        Contender("call_numba", "numba", "", partial(_call, "numba"), words="plain call, numba"),
        Contender(
            "derivation", "mlp-backprop", "", _derivation, arrays=5, words="derivation, numpy"
        ),
        Contender("torch", "torch", "torch", _torch, arrays=3, words="torch"),
        Contender(
            "torch_1",
            "torch",
            "torch",
            partial(_torch, n_threads=1),
            arrays=3,
            words="torch, one thread",
        ),
        Contender(
            "torch_compile",
            "torch",
            "torch",
            partial(_torch, compiled=True),
            3,
            since="full",
            words="torch.compile",
        ),
        Contender("jax", "jax", "jax", _jax, arrays=3, words="JAX"),
        Contender("sklearn", "scikit-learn", "cli", _sklearn, arrays=3, words="scikit-learn"),
        Contender("autograd", "autograd", "bench", _autograd, arrays=6, words="HIPS autograd"),
    )
}

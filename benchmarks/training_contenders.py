"""Everybody who can train a net, for bench_training.py: whole runs from the same beginning.

A builder takes a task and does all that is done once: arrays of the library, functions compiled.
What is timed is `run(epochs)`, a training from the initial parameters, which gives something that
`read` makes (losses, parameters) of: the mean loss of each epoch, and the vector at the end.
"""

import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from training_tasks import LEARNING_RATE, Task, flat

from mlp_backprop import train
from mlp_backprop.types import Array

MOST_SECONDS = 60  # that torch.compile may take


class Built(NamedTuple):
    """Ready to run; `around` holds while it does."""

    run: Callable[[int], Any]
    read: Callable[[Any], tuple[Array, Array]]
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


class Contender(NamedTuple):
    """One row; files have the name, whoever reads has the words."""

    name: str
    words: str
    build: Callable[[Task], Built]
    # Draws an order of its own, and adds eps elsewhere: it is compared on rows as they lie, with an
    # eps that counts for nothing.
    own_ways: bool = False
    tolerance: float = 1e-9  # in float64


# Ours ---------------------------------------------------------------------------------------------


def by_train(task: Task, backend: Any) -> Built:
    def run(epochs: int) -> Any:
        layers, options = task.layers, task.options
        return train(layers, task.X, task.y, epochs=epochs, backend=backend, **options)

    return Built(run, lambda result: (result.history.loss[1:], flat(result.net.params)))


def one_by_one(task: Task, backend: Any) -> Built:
    """Members, each in a run of its own."""
    members, options = task.members, task.options

    def run(epochs: int) -> Any:
        keep = partial(train, X=task.X, y=task.y, epochs=epochs, backend=backend, **options)
        return [keep(layers) for layers in members]

    def read(results: Any) -> tuple[Array, Array]:
        losses = np.stack([result.history.loss[1:] for result in results], axis=-1)
        return losses, np.stack([flat(result.net.params) for result in results])

    return Built(run, read)


# torch --------------------------------------------------------------------------------------------


@contextmanager
def torch_threads(n_threads: int | None) -> Iterator[None]:
    """So many, or all."""
    import torch

    kept = torch.get_num_threads()
    torch.set_num_threads(n_threads or kept)
    try:
        yield
    finally:
        torch.set_num_threads(kept)


def by_torch(
    task: Task, fused: bool = False, n_threads: int | None = None, compiled: bool = False
) -> Built:
    import torch

    X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)
    net, criterion = torch_net(task), torch_criterion(task)
    leaves = list(net.parameters())
    optimizer = torch.optim.Adam(leaves, lr=LEARNING_RATE, eps=task.eps, fused=fused)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = criterion(net(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    take = _compiled(step) if compiled else step

    def run(epochs: int) -> Any:
        with torch.no_grad():
            for leaf, A in zip(leaves, (A for layer in task.layers for A in layer), strict=True):
                leaf.copy_(torch.from_numpy(A))
            for A in (A for state in optimizer.state.values() for A in state.values()):
                A.zero_()
        if task.is_full:
            return [take(X, y) for _ in range(epochs)]
        losses = []
        for order in map(torch.from_numpy, task.orders(epochs)):
            for batch in task.batches:
                rows = order[batch]
                losses.append(take(X[rows], y[rows]))
        return losses

    def read(losses: Any) -> tuple[Array, Array]:
        vector = torch.nn.utils.parameters_to_vector(leaves).detach().numpy()
        return task.epoch_means(torch.stack(losses).double().numpy()), vector.astype(float)

    if compiled:
        _refuse_slow(run)
    return Built(run, read, partial(torch_threads, n_threads))


def torch_net(task: Task) -> Any:
    """As its users write it."""
    from torch import float32, float64, nn

    activation = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU}[task.activation]
    dtype = {"float32": float32, "float64": float64}[task.X.dtype.name]
    modules: list[Any] = []
    for W, _ in task.layers:
        modules += [nn.Linear(W.shape[-1], W.shape[-2], dtype=dtype), activation()]
    return nn.Sequential(*modules[:-1])


def torch_criterion(task: Task) -> Any:
    """torch's mean; that of squares also divides by d_L, which is taken back where it is not 1."""
    import torch.nn.functional as F

    if task.loss == "softmax_cross_entropy":
        return F.cross_entropy
    d_L = task.sizes[-1]
    return F.mse_loss if d_L == 1 else lambda H, y: F.mse_loss(H, y) * d_L


def _compiled(step: Any) -> Any:
    import torch

    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise ImportError("torch.compile needs a C++ compiler")
    torch.compiler.reset()
    return torch.compile(step, dynamic=False)


def _refuse_slow(run: Callable[[int], Any]) -> None:
    began = time.perf_counter()
    run(1)
    seconds = time.perf_counter() - began
    if seconds > MOST_SECONDS:
        raise ImportError(f"it took {seconds:.0f} s to compile, more than {MOST_SECONDS}")


def by_vmap(task: Task, n_threads: int | None = None) -> Built:
    """Members by torch.func; its optimizer takes steps of stacked parameters as of any."""
    import torch

    X, y, criterion = torch.from_numpy(task.X), torch.from_numpy(task.y), torch_criterion(task)
    activation = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "relu": torch.relu}[task.activation]

    def loss_of(layers: Any, x: Any, y: Any) -> Any:
        return criterion(outputs(torch.nn.functional.linear, activation, layers, x), y)

    of_members = torch.func.vmap(torch.func.grad_and_value(loss_of), in_dims=(0, None, None))

    def run(epochs: int) -> Any:
        layers = [tuple(map(torch.tensor, layer)) for layer in task.layers]
        leaves = [A for layer in layers for A in layer]
        optimizer = torch.optim.Adam(leaves, lr=LEARNING_RATE, eps=task.eps, fused=True)
        losses = []
        for order in map(torch.from_numpy, task.orders(epochs)):
            for batch in task.batches:
                rows = order[batch]
                grads, loss = of_members(layers, X[rows], y[rows])
                for A, g in zip(leaves, (g for layer in grads for g in layer), strict=True):
                    A.grad = g
                optimizer.step()
                losses.append(loss)
        return losses, layers

    def read(result: Any) -> tuple[Array, Array]:
        losses, layers = result
        return task.epoch_means(torch.stack(losses).double().numpy()), flat(layers)

    return Built(run, read, partial(torch_threads, n_threads))


def outputs(linear: Any, activation: Any, layers: Any, x: Any) -> Any:
    """H_L, in words that torch.func and JAX share."""
    *hidden, last = layers
    for W, b in hidden:
        x = activation(linear(x, W, b))
    return linear(x, *last)


# JAX ----------------------------------------------------------------------------------------------


def by_jax(task: Task) -> Built:
    """An epoch is one compiled call, whose steps are a scan; members are mapped inside."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
    epoch = jax.jit(jax_epoch(task, jax, jnp))
    layers = [tuple(layer) for layer in task.layers]
    slots = [tuple(map(np.zeros_like, layer)) for layer in layers]
    t = np.zeros(())  # in float64: the corrections of the first steps are precise in float32 too
    begin, X, y = jax.device_put(((layers, slots, slots, t), task.X, task.y), jax.devices("cpu")[0])
    placed: list[Any] = []

    def run(epochs: int) -> Any:
        orders = task.orders(1) * epochs if task.is_full else task.orders(epochs)
        placed.extend(map(jnp.asarray, orders[len(placed) :]))
        state, losses = begin, []
        for order in placed[:epochs]:
            state, of_batches = epoch(state, order, X, y)
            losses.append(of_batches)
        return jax.block_until_ready((losses, state[0]))

    def read(result: Any) -> tuple[Array, Array]:
        losses, layers = result
        return task.epoch_means(np.concatenate(losses).astype(float)), flat(layers)

    return Built(run, read)


def jax_epoch(task: Task, jax: Any, jnp: Any) -> Callable[..., Any]:
    """epoch((layers, m, v, t), order, X, y) gives the next of these and the losses of batches."""
    activation = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}[task.activation]

    def loss_of(layers: Any, x: Any, y: Any) -> Any:
        H = outputs(lambda x, W, b: x @ W.T + b, activation, layers, x)
        if task.loss == "softmax_cross_entropy":
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(H), y[:, None], axis=1))
        return jnp.mean(jnp.sum((H - y) ** 2, axis=1))

    loss_and_grads = jax.value_and_grad(loss_of)
    if task.n_members:
        loss_and_grads = jax.vmap(loss_and_grads, in_axes=(0, None, None))

    def step(state: Any, x: Any, y: Any) -> Any:
        layers, m, v, t = state
        loss, g = loss_and_grads(layers, x, y)
        t = t + 1
        m = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, m, g)
        v = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, v, g)
        rate = (LEARNING_RATE / (1 - 0.9**t)).astype(x.dtype)
        scale = (1 / (1 - 0.999**t)).astype(x.dtype)

        def moved(A: Any, m: Any, v: Any) -> Any:
            return A - rate * m / (jnp.sqrt(v * scale) + task.eps)

        return (jax.tree.map(moved, layers, m, v), m, v, t), loss

    def epoch(state: Any, order: Any, X: Any, y: Any) -> Any:
        if task.is_full:
            state, loss = step(state, X, y)
            return state, loss[None]
        n, size = len(order), task.batch_size
        whole, rest = order[: n // size * size].reshape(-1, size), order[n // size * size :]
        state, losses = jax.lax.scan(lambda s, rows: step(s, X[rows], y[rows]), state, whole)
        if len(rest):
            state, loss = step(state, X[rest], y[rest])
            losses = jnp.concatenate([losses, loss[None]])
        return state, losses

    return epoch


# scikit-learn -------------------------------------------------------------------------------------


def by_sklearn(task: Task) -> Built:
    """`fit` of an estimator that goes on from the parameters it has: those of the task."""
    from sklearn.neural_network import MLPClassifier, MLPRegressor

    is_regression = task.loss == "squared_error"
    scale = 2.0 if is_regression else 1.0  # its squared error has a factor 1/2
    model = (MLPRegressor if is_regression else MLPClassifier)(
        hidden_layer_sizes=task.sizes[1:-1],
        activation={"sigmoid": "logistic"}.get(task.activation, task.activation),
        learning_rate_init=LEARNING_RATE,
        epsilon=task.eps / scale,
        alpha=0.0,
        batch_size=task.batch_size,
        shuffle=task.shuffle,
        random_state=0,
        warm_start=True,
        tol=0.0,
        n_iter_no_change=10**9,
    )
    y = task.y.ravel()

    def run(epochs: int) -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it has not converged
            if not hasattr(model, "coefs_"):
                model.set_params(max_iter=1).fit(task.X, y)
            model.coefs_ = [np.ascontiguousarray(W.T) for W, _ in task.layers]
            model.intercepts_ = [b.copy() for _, b in task.layers]
            model.set_params(max_iter=epochs).fit(task.X, y)
        return scale * np.array(model.loss_curve_[-epochs:])

    def read(losses: Any) -> tuple[Array, Array]:
        return losses, flat(
            [(W.T, b) for W, b in zip(model.coefs_, model.intercepts_, strict=True)]
        )

    return Built(run, read)


CONTENDERS = {
    row.name: row
    for row in (
        Contender("numba", "ours, numba", partial(by_train, backend="numba")),
        Contender("alone", "ours, numba, one by one", partial(one_by_one, backend="numba")),
        Contender("reference", "ours, reference loop", partial(by_train, backend=None)),
        Contender("torch", "torch", by_torch),
        Contender("torch_1", "torch, one thread", partial(by_torch, n_threads=1)),
        Contender("torch_fused", "torch, fused Adam", partial(by_torch, fused=True)),
        Contender(
            "torch_fused_1",
            "torch, fused Adam, one thread",
            partial(by_torch, fused=True, n_threads=1),
        ),
        # torch counts steps in float32, and compiled code corrects the first ones from that.
        Contender(
            "torch_compile", "torch.compile", partial(by_torch, compiled=True), tolerance=1e-4
        ),
        Contender("vmap", "torch.func, vmap", by_vmap),
        Contender("vmap_1", "torch.func, vmap, one thread", partial(by_vmap, n_threads=1)),
        Contender("jax", "JAX, epoch in lax.scan", by_jax),
        Contender("sklearn", "scikit-learn", by_sklearn, own_ways=True),
    )
}

"""Hessian-vector products and whole Hessians, against torch and JAX.

    python benchmarks/bench_products.py [--quick] [--json FILE]

A product is set beside torch's double backward and JAX's jvp of grad, a Hessian beside torch.func
and jax.hessian; what is JAX's is compiled beforehand. All start from parameters, vector, inputs and
targets in their own arrays, and the loss is a mean over the rows. Expected is what the derivation
gives in float64, in no engine.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import compare
import numpy as np

from mlp_backprop.bench import grid
from mlp_backprop.bench.contenders import Task
from mlp_backprop.derivatives.curvature import hessian
from mlp_backprop.derivatives.products import hvp
from mlp_backprop.edge import validation
from mlp_backprop.maths import tangents
from mlp_backprop.nets.vectors import n_numbers, ravel_params, unravel_params
from mlp_backprop.types import Layer, flat

NETS = {"2-10-5-1": 1024, "64-64-64-1": 1024}
WHOLE = ("2-10-5-1",)  # the nets whose Hessian is formed

Vector = list[Layer]


def cases(quick: bool) -> Iterator[compare.Case]:
    """The product on every net in both dtypes, the Hessian on the small one."""
    for net, n in NETS.items():
        for dtype in ("float32",) if quick else ("float32", "float64"):
            task = grid.make_task(grid.Cell(grid.PROBLEMS[net], n, dtype))
            yield product_case(f"hvp, {net}, n = {n:_}", task)
            if net in WHOLE:
                yield hessian_case(f"hessian, {net}, n = {n:_}", task)


def product_case(name: str, task: Task) -> compare.Case:
    rng = np.random.default_rng(1)
    v = unravel_params(rng.normal(size=n_numbers(task.params)).astype(task.X.dtype), task.params)
    builders = {"mlp_backprop": our_hvp, "torch": torch_hvp, "JAX": jax_hvp}
    return compare.Case(
        name, str(task.X.dtype), flat(exact_product(task, v)), rows(builders, task, v)
    )


def hessian_case(name: str, task: Task) -> compare.Case:
    units = np.eye(n_numbers(task.params))
    columns = [exact_product(task, unravel_params(e, task.params)) for e in units]
    expected = [np.stack([ravel_params(column) for column in columns])]
    builders = {"mlp_backprop": our_hessian, "torch.func": torch_hessian, "JAX": jax_hessian}
    return compare.Case(name, str(task.X.dtype), expected, rows(builders, task))


def rows(builders: dict[str, Callable[..., Any]], *arguments: Any) -> list[compare.Contender]:
    return [
        compare.Contender(name, partial(build, *arguments), read)
        for name, build in builders.items()
    ]


def read(result: Any) -> list[np.ndarray]:
    """NumPy arrays in float64, from arrays of any library on the CPU, in layers or not."""
    layers = result if isinstance(result[0], tuple) else [result]
    return [
        np.asarray(A.detach() if hasattr(A, "detach") else A, dtype=float)
        for A in chain.from_iterable(layers)
    ]


def exact_product(task: Task, v: Vector) -> Vector:
    """In float64, by the derivation."""

    def double(layers: Vector) -> Vector:
        return [Layer(W.astype(float), b.astype(float)) for W, b in layers]

    spec, *arrays = validation.problem(
        double(task.params),
        task.X.astype(float),
        task.y.astype(float),
        activation=task.activation,
        loss=task.loss,
        reduction="mean",
        sample_weight=None,
        backend=None,
    )
    params, *data = arrays
    sums = tangents.product_sums(spec, tangents.KINDS["hessian"], params, double(v), *data)
    return [Layer(W / len(task.X), b / len(task.X)) for W, b in sums]


# Contenders --------------------------------------------------------------------------------------


def our_hvp(task: Task, v: Vector) -> Callable[[], Any]:
    options = {"activation": task.activation, "loss": task.loss}
    return lambda: hvp(task.params, task.X, task.y, v, **options)


def our_hessian(task: Task) -> Callable[[], Any]:
    options = {"activation": task.activation, "loss": task.loss}
    return lambda: [hessian(task.params, task.X, task.y, **options)]


def torch_loss(task: Task) -> Callable[[list[Any]], Any]:
    """The loss as a function of [W_1, b_1, ...]; torch's own mean, for d_L is 1."""
    import torch.nn.functional as F
    from torch import from_numpy

    from mlp_backprop.checks import torch_reference

    X, y = from_numpy(task.X), from_numpy(task.y)

    def loss_of(leaves: list[Any]) -> Any:
        layers = list(zip(leaves[::2], leaves[1::2], strict=True))
        return F.mse_loss(torch_reference.forward(layers, X, task.names), y)

    return loss_of


def torch_hvp(task: Task, v: Vector) -> Callable[[], Any]:
    import torch

    loss_of = torch_loss(task)
    leaves = [torch.tensor(A, requires_grad=True) for A in flat(task.params)]
    vector = [torch.tensor(A) for A in flat(v)]

    def call() -> Any:
        grads = torch.autograd.grad(loss_of(leaves), leaves, create_graph=True)
        return torch.autograd.grad(grads, leaves, vector)

    return lambda: [call()]


def torch_hessian(task: Task) -> Callable[[], Any]:
    import torch

    loss_of, x = torch_loss(task), torch.tensor(ravel_params(task.params))
    sizes = [A.shape for A in flat(task.params)]

    def loss_of_vector(x: Any) -> Any:
        parts = torch.split(x, [int(np.prod(size)) for size in sizes])
        return loss_of([part.reshape(size) for part, size in zip(parts, sizes, strict=True)])

    matrix = torch.func.hessian(loss_of_vector)
    return lambda: [matrix(x)]


def jax_loss(task: Task) -> tuple[Callable[..., Any], Any]:
    """The loss as a function of (params, X, y), and JAX's module."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32

    def loss_of(params: Any, X: Any, y: Any) -> Any:
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            X = jax.nn.sigmoid(X @ W.T + b)
        return jnp.mean(jnp.sum((X @ W_L.T + b_L - y) ** 2, axis=1))

    return loss_of, jax


def jax_hvp(task: Task, v: Vector) -> Callable[[], Any]:
    loss_of, jax = jax_loss(task)

    @jax.jit
    def product(params: Any, v: Any, X: Any, y: Any) -> Any:
        return jax.jvp(lambda p: jax.grad(loss_of)(p, X, y), (params,), (v,))[1]

    arguments = jax.device_put((task.params, v, task.X, task.y), jax.devices("cpu")[0])
    return lambda: jax.block_until_ready(product(*arguments))


def jax_hessian(task: Task) -> Callable[[], Any]:
    loss_of, jax = jax_loss(task)

    @jax.jit
    def matrix(x: Any, X: Any, y: Any) -> Any:
        return jax.hessian(lambda x: loss_of(unravel(x), X, y))(x)

    def unravel(x: Any) -> Any:
        layers, end = [], 0
        for W, b in task.params:
            begin, middle, end = end, end + W.size, end + W.size + b.size
            layers.append((x[begin:middle].reshape(W.shape), x[middle:end]))
        return layers

    device = jax.devices("cpu")[0]
    arguments = jax.device_put((ravel_params(task.params), task.X, task.y), device)
    return lambda: [jax.block_until_ready(matrix(*arguments))]


if __name__ == "__main__":
    compare.main(cases)

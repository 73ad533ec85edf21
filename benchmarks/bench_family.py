"""The compiled derivatives beside torch.func and JAX, and what they are held to.

    python benchmarks/bench_family.py [--quick] [--json FILE]

Norms and clipped sums of samples' gradients, products with the Hessian and the Gauss-Newton matrix,
Jacobians and Laplacians by inputs, of nets with tanh. JAX is compiled, and waited for; torch.func
is used with vmap, as its users would. All start from inputs in their own arrays. Below the table
stand geometric means over nets and dtypes of the faster peer over ours, and the worst cell.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from statistics import geometric_mean
from typing import Any, NamedTuple

import compare
import numpy as np

from mlp_backprop import (
    clipped_grads,
    ggnvp,
    hvp,
    init_params,
    jacobian,
    laplacian,
    per_sample_grad_norms,
)
from mlp_backprop.types import Array, Layer

NETS = {
    "2-10-5-1": 1024,
    "64-64-64-1": 1024,
    "3-64-64-1": 1024,
    "784-128-64-10": 128,
}
MAX_NORM = 1.0


class Task(NamedTuple):
    """A net, a vector, data, all NumPy arrays; the loss is the sum of squared errors."""

    params: list[Layer]
    v: list[Layer]
    X: Array
    y: Array


class Goal(NamedTuple):
    """Geometric means over nets that are wanted."""

    nets: tuple[str, ...]
    must: float
    aim: float


GOALS = {
    "norms": Goal(tuple(NETS), 4, 8),
    "clipped": Goal(tuple(NETS), 4, 8),
    "hvp": Goal(tuple(NETS), 2, 3),
    "ggnvp": Goal(tuple(NETS), 2, 3),
    "jacobian": Goal(("2-10-5-1", "64-64-64-1", "3-64-64-1"), 2, 4),
    "laplacian": Goal(("3-64-64-1",), 3, 6),
}


def cases(quick: bool) -> Iterator[compare.Case]:
    """Every derivative on its nets in both dtypes."""
    for kind, goal in GOALS.items():
        for net in goal.nets:
            for dtype in ("float32",) if quick else ("float32", "float64"):
                sizes, n = tuple(map(int, net.split("-"))), NETS[net]
                rng = np.random.default_rng(0)
                params = init_params(sizes, rng, dtype=dtype)
                v = [Layer(*(rng.normal(size=A.shape).astype(dtype) for A in l)) for l in params]
                X, y = (rng.uniform(-1, 1, (n, d)).astype(dtype) for d in (sizes[0], sizes[-1]))
                yield make_case(kind, f"{kind}, {net}, n = {n}", dtype, Task(params, v, X, y))


def make_case(kind: str, name: str, dtype: str, task: Task) -> compare.Case:
    builders = {
        "numba": partial(ours, backend="numba"),
        "NumPy": partial(ours, backend=None),
        "torch.func": by_torch,
        "JAX": by_jax,
    }
    double = Task(*(_double(part) for part in task))
    expected = read(ours(kind, double, backend=None)())
    contenders = [
        compare.Contender(peer, partial(build, kind, task), read)
        for peer, build in builders.items()
    ]
    return compare.Case(name, dtype, expected, contenders)


def _double(part: Any) -> Any:
    return (
        [Layer(*(A.astype(float) for A in layer)) for layer in part]
        if isinstance(part, list)
        else part.astype(float)
    )


def read(result: Any) -> list[np.ndarray]:
    """NumPy arrays in float64, from arrays of any library on the CPU, in layers or not."""
    layers = result if isinstance(result[0], tuple | list) else [result]
    return [
        np.asarray(A.detach() if hasattr(A, "detach") else A, dtype=float)
        for A in chain.from_iterable(layers)
    ]


# Contenders --------------------------------------------------------------------------------------


def ours(kind: str, task: Task, backend: Any) -> Callable[[], Any]:
    params, v, X, y = task
    options = {"activation": ["tanh"] * (len(params) - 1) + ["identity"], "backend": backend}
    summed = {**options, "reduction": "sum"}
    return {
        "norms": lambda: [per_sample_grad_norms(params, X, y, **options)],
        "clipped": lambda: clipped_grads(params, X, y, max_norm=MAX_NORM, **summed).grads,
        "hvp": lambda: hvp(params, X, y, v, **summed),
        "ggnvp": lambda: ggnvp(params, X, y, v, **summed),
        "jacobian": lambda: [jacobian(params, X, **options)],
        "laplacian": lambda: [laplacian(params, X, **options)],
    }[kind]


def outputs(tanh: Any, params: Any, x: Any) -> Any:
    *hidden, (W_L, b_L) = params
    for W, b in hidden:
        x = tanh(x @ W.T + b)
    return x @ W_L.T + b_L


def derivatives(kind: str, func: Any, tanh: Any, xp: Any) -> Callable[..., Any]:
    """One derivative as a function of params, v, X, y, in words that torch.func and JAX share."""
    net = partial(outputs, tanh)

    def loss(params: Any, X: Any, y: Any) -> Any:
        return ((net(params, X) - y) ** 2).sum()

    rows_of = func.vmap(func.grad(loss), in_dims=(None, 0, 0))

    def scaled(params: Any, X: Any, y: Any) -> tuple[Any, Any]:
        grads = rows_of(params, X, y)
        squares = sum((A.reshape(len(X), -1) ** 2).sum(1) for layer in grads for A in layer)
        return grads, squares**0.5

    def clipped(params: Any, v: Any, X: Any, y: Any) -> Any:
        grads, norms = scaled(params, X, y)
        c = (MAX_NORM / norms).clip(max=1)
        return [[xp.einsum("i,i...->...", c, A) for A in layer] for layer in grads]

    def hessian_product(params: Any, v: Any, X: Any, y: Any) -> Any:
        return func.jvp(lambda p: func.grad(loss)(p, X, y), (params,), (v,))[1]

    def gauss_newton_product(params: Any, v: Any, X: Any, y: Any) -> Any:
        _, change = func.jvp(lambda p: net(p, X), (params,), (v,))
        return func.vjp(lambda p: net(p, X), params)[1](2 * change)[0]

    def per_row(f: Any) -> Any:
        return func.vmap(f, in_dims=(None, 0))

    def laplacians(params: Any, v: Any, X: Any, y: Any) -> Any:
        H = per_row(func.jacfwd(func.jacrev(net, argnums=1), argnums=1))(params, X)
        return [xp.einsum("iojj->io", H)]

    return {
        "norms": lambda params, v, X, y: [scaled(params, X, y)[1]],
        "clipped": clipped,
        "hvp": hessian_product,
        "ggnvp": gauss_newton_product,
        "jacobian": lambda params, v, X, y: [per_row(func.jacrev(net, argnums=1))(params, X)],
        "laplacian": laplacians,
    }[kind]


def by_torch(kind: str, task: Task) -> Callable[[], Any]:
    import torch

    params, v = ([tuple(map(torch.tensor, layer)) for layer in part] for part in task[:2])
    arguments = (params, v, *map(torch.tensor, task[2:]))
    call = derivatives(kind, torch.func, torch.tanh, torch)
    return lambda: call(*arguments)


def by_jax(kind: str, task: Task) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
    params, v = ([tuple(layer) for layer in part] for part in task[:2])
    arguments = jax.device_put((params, v, *task[2:]), jax.devices("cpu")[0])
    call = jax.jit(derivatives(kind, _JaxWords(jax), jnp.tanh, jnp))
    return lambda: jax.block_until_ready(call(*arguments))


class _JaxWords:
    """JAX by the names and keywords of torch.func."""

    def __init__(self, jax: Any) -> None:
        self.grad, self.jvp, self.vjp = jax.grad, jax.jvp, jax.vjp
        self.jacrev, self.jacfwd = jax.jacrev, jax.jacfwd
        self.vmap = lambda f, in_dims: jax.vmap(f, in_axes=in_dims)


# What came out -----------------------------------------------------------------------------------


def reached(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per derivative the geometric mean of the faster peer over ours, and the worst cell."""
    rows = []
    for kind, goal in GOALS.items():
        ratios = {
            f"{record['case'].split(', ')[1]} {record['dtype']}": min(
                record["timings"][peer]["ratio"] for peer in ("torch.func", "JAX")
            )
            for record in records
            if record["case"].startswith(f"{kind},")
        }
        if ratios:
            worst = min(ratios, key=lambda cell: ratios[cell])
            mean = geometric_mean(ratios.values())
            rows.append(
                {
                    "derivative": kind,
                    "must": f"{goal.must}x",
                    "aim": f"{goal.aim}x",
                    "reached": f"{mean:.2f}x",
                    "worst cell": f"{ratios[worst]:.2f}x, {worst}",
                }
            )
    return rows


if __name__ == "__main__":
    compare.main(cases, summary=reached)

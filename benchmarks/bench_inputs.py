"""Derivatives with respect to inputs, against torch.func and JAX.

    python benchmarks/bench_inputs.py [--quick] [--json FILE]

Each peer is used as its own users would: vmap over rows of jacrev for the Jacobian, of hessian for
the Laplacian, and for a physics-informed fit the gradient through both. JAX is compiled, and waited
for. All start from inputs in their own arrays; the nets are those of such fits, with tanh.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import compare
import numpy as np

from mlp_backprop import init_params
from mlp_backprop.derivatives.inputs import jacobian, laplacian
from mlp_backprop.derivatives.residuals import residual_grads
from mlp_backprop.types import Array, Layer

NETS = {"3-64-64-1": (3, 64, 64, 1), "2-20-20-20-3": (2, 20, 20, 20, 3)}
KINDS = ("jacobian", "laplacian", "residual")


class Task(NamedTuple):
    """A net and points, as NumPy arrays."""

    params: list[Layer]
    X: Array


def cases(quick: bool) -> Iterator[compare.Case]:
    """Every kind of answer on every net."""
    for kind in KINDS:
        for net, sizes in NETS.items():
            for dtype in ("float32",) if quick else ("float32", "float64"):
                rng = np.random.default_rng(0)
                params = init_params(sizes, rng, dtype=dtype)
                X = rng.uniform(-1, 1, (1024, sizes[0])).astype(dtype)
                yield make_case(kind, f"{kind}, {net}, n = 1 024", dtype, Task(params, X))


def make_case(kind: str, name: str, dtype: str, task: Task) -> compare.Case:
    builders = {"mlp_backprop": ours, "torch.func": by_torch, "JAX": by_jax}
    contenders = [
        compare.Contender(name, partial(build, kind, task), read)
        for name, build in builders.items()
    ]
    return compare.Case(name, dtype, expected(kind, task), contenders)


def expected(kind: str, task: Task) -> list[np.ndarray]:
    """By torch.func in float64; without torch, by ourselves in float64."""
    params = [Layer(W.astype(float), b.astype(float)) for W, b in task.params]
    wide = Task(params, task.X.astype(float))
    try:
        return read(by_torch(kind, wide)())
    except ImportError:
        return read(ours(kind, wide)())


def read(result: Any) -> list[np.ndarray]:
    """NumPy arrays in float64, from a list of arrays of any library on the CPU."""
    return [np.asarray(A.detach() if hasattr(A, "detach") else A, dtype=float) for A in result]


def ours(kind: str, task: Task) -> Callable[[], Any]:
    params, X = task
    one = np.ones((len(X), 1, 1), X.dtype) * np.eye(params[-1].b.shape[0], dtype=X.dtype)

    def helmholtz(X: Array, Y: Array, dY: Array, lap: Array) -> tuple[Array, Any]:
        return lap + Y, (one, None, one)

    def residual() -> list[Array]:
        loss, grads = residual_grads(params, X, helmholtz, activation="tanh")
        return [loss, *chain(*grads)]

    return {
        "jacobian": lambda: [jacobian(params, X, activation="tanh")],
        "laplacian": lambda: [laplacian(params, X, activation="tanh")],
        "residual": residual,
    }[kind]


def by_torch(kind: str, task: Task) -> Callable[[], Any]:
    import torch
    from torch.func import hessian, jacrev, vmap

    leaves = [tuple(torch.tensor(A, requires_grad=True) for A in layer) for layer in task.params]
    fixed = [tuple(A.detach() for A in layer) for layer in leaves]
    X = torch.tensor(task.X)

    def outputs(params: Any, x: Any) -> Any:
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            x = torch.tanh(W @ x + b)
        return W_L @ x + b_L

    def laplacians(params: Any) -> Any:
        H = vmap(hessian(partial(outputs, params)))(X)
        return H.diagonal(dim1=2, dim2=3).sum(dim=2)

    def residual() -> list[Any]:
        r = laplacians(leaves) + vmap(partial(outputs, leaves))(X)
        loss = (r**2).sum() / len(X)
        return [loss.detach(), *torch.autograd.grad(loss, list(chain(*leaves)))]

    return {
        "jacobian": lambda: [vmap(jacrev(partial(outputs, fixed)))(X)],
        "laplacian": lambda: [laplacians(fixed)],
        "residual": residual,
    }[kind]


def by_jax(kind: str, task: Task) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)  # float32 arrays stay float32
    arguments = jax.device_put(tuple(task), jax.devices("cpu")[0])

    def outputs(params: Any, x: Any) -> Any:
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            x = jnp.tanh(W @ x + b)
        return W_L @ x + b_L

    def rows(f: Callable[..., Any]) -> Callable[..., Any]:
        return jax.vmap(f, in_axes=(None, 0))

    def laplacians(params: Any, X: Any) -> Any:
        return jnp.trace(rows(jax.hessian(outputs, argnums=1))(params, X), axis1=2, axis2=3)

    def loss(params: Any, X: Any) -> Any:
        return jnp.sum((laplacians(params, X) + rows(outputs)(params, X)) ** 2) / len(X)

    kinds = {
        "jacobian": rows(jax.jacrev(outputs, argnums=1)),
        "laplacian": laplacians,
        "residual": jax.value_and_grad(loss),
    }
    compiled = jax.jit(lambda *given: jax.tree.leaves(kinds[kind](*given)))
    return lambda: jax.block_until_ready(compiled(*arguments))


if __name__ == "__main__":
    compare.main(cases)

"""The contenders of the GPU benchmark: every way to one loss and gradient on the same card.

A task holds CuPy arrays of float32, which every builder takes without a copy. Rounding is the same
on both sides:

    precision   ours                     torch                     JAX
    float32     precision="float32"      products in float32       products in float32
    tf32        precision="tf32"         products in TF32          products in TF32
    bfloat16    precision="bfloat16"     all tensors in bfloat16   all arrays in bfloat16

Ours takes float32 arrays in each. The others are given arrays of the precision's type, converted
beforehand; torch_converting is not. INCLUDES says for every contender what its time has in it.
NumPy arrays do as well: so the tests run this file without a card, all but the CUDA graphs.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from mlp_backprop import backprop, compute_grads, prepare_grads
from mlp_backprop.bench.contenders import Answer, Contender, Ready, Task
from mlp_backprop.edge import validation
from mlp_backprop.engines import choice
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.types import flat


def on_host(array: Any) -> np.ndarray:
    """A NumPy copy in float64, of a CuPy, JAX or NumPy array."""
    return np.array(array.get() if hasattr(array, "get") else array, dtype=float)


def _read(result: Any) -> Answer:
    loss, grads = result
    return Answer(float(loss), [on_host(A) for A in flat(grads)])


def _options(task: Task) -> dict[str, Any]:
    return {"activation": task.names, "loss": task.loss}


# Ours --------------------------------------------------------------------------------------------


def _prepared(task: Task, precision: str) -> Ready:
    grad_fn = prepare_grads(task.params, n=len(task.X), precision=precision, **_options(task))
    return Ready(lambda: grad_fn(task.params, task.X, task.y), _read)


def _bound(task: Task, precision: str) -> Ready:
    """From the same arrays into the same arrays every time, as a CUDA graph."""
    grad_fn = prepare_grads(task.params, n=len(task.X), precision=precision, **_options(task))
    step = grad_fn.bind(task.params, task.X, task.y, constant_X=True)  # as torch's is
    return Ready(step, _read)


def _call(task: Task, precision: str) -> Ready:
    params, X, y = task[:3]
    options = _options(task)
    return Ready(lambda: compute_grads(params, X, y, precision=precision, **options), _read)


def _tier(name: str, task: Task, precision: str) -> Ready:
    """One tier of the CuPy engine, also where the engine would take another."""
    spec, arrays = checked(task)
    run = import_module(f"mlp_backprop.engines.cuda.{name}").prepare(spec, len(task.X), precision)
    if run is None:
        raise ValueError("this net is not covered")
    arguments = Arguments(*arrays, mean=True, out=None)
    return Ready(lambda: run(arguments), _read)


def _tiny_in_shared_memory(task: Task, precision: str) -> Ready:
    """The other variant of the first tier: parameters in shared memory, a third block."""
    from mlp_backprop.engines.cuda import tiny

    spec, arrays = checked(task)
    placed = tiny.variants(spec)[1:]
    if not placed:
        raise ValueError("this net has no other variant")
    run = tiny.prepare(spec, len(task.X), precision, *placed)
    assert run is not None
    arguments = Arguments(*arrays, mean=True, out=None)
    return Ready(lambda: run(arguments), _read)


def _derivation(task: Task, precision: str) -> Ready:
    """backprop.py on the arrays' library, one operation after the other."""
    if precision != "float32":
        raise ValueError("the derivation computes in float32")
    spec, arrays = checked(task)
    return Ready(lambda: choice.derivation(spec, *arrays), _read)


def checked(task: Task) -> tuple[backprop.Spec, list[Any]]:
    spec, *arrays = validation.problem(
        *task[:3], reduction="mean", sample_weight=None, backend=None, **_options(task)
    )
    return spec, arrays


# torch -------------------------------------------------------------------------------------------


@contextmanager
def torch_precision(precision: str) -> Iterator[None]:
    """Whether torch may use TF32, which is a switch of the whole process there."""
    import torch

    kept = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(kept)


def _torch(
    task: Task,
    precision: str,
    *,
    compile_mode: str | None = None,
    graph: bool = False,
    converts: bool = False,
) -> Ready:
    import torch

    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    if converts and dtype == torch.float32:
        raise ValueError("there is nothing to convert")
    leaves, X, y = _tensors(task, torch.float32 if converts else dtype)
    loss_of = _torch_loss(task, dtype if converts else None)
    if compile_mode is not None:
        torch.compiler.reset()  # else it would give up on static shapes after the first few
        loss_of = torch.compile(loss_of, dynamic=False, mode=compile_mode)

    def call() -> Any:
        if compile_mode == "max-autotune":  # it replays CUDA graphs, over their last outputs
            torch.compiler.cudagraph_mark_step_begin()
        loss = loss_of(leaves, X, y)
        return loss, torch.autograd.grad(loss, leaves)

    around = partial(torch_precision, precision)
    if graph:
        with around():
            call = _captured(call)
    return Ready(call, _read_torch, around)


def _tensors(task: Task, dtype: Any) -> tuple[list[Any], Any, Any]:
    """Parameters in one list, X and y; class labels stay integers."""
    import torch

    X, y = torch.from_dlpack(task.X).to(dtype), torch.from_dlpack(task.y)
    leaves = [torch.from_dlpack(A).to(dtype, copy=True).requires_grad_() for A in flat(task.params)]
    return leaves, X, y if y.ndim == 1 else y.to(dtype)


def _torch_loss(task: Task, converted: Any) -> Callable[[Any, Any, Any], Any]:
    """The mean loss of leaves, X and y, which become of this dtype first if there is one."""
    import torch.nn.functional as F

    from mlp_backprop.checks import torch_reference

    names = task.names

    def loss_of(leaves: Any, X: Any, y: Any) -> Any:
        if converted is not None:
            *leaves, X = (A.to(converted) for A in (*leaves, X))
            y = y if y.ndim == 1 else y.to(converted)
        params = list(zip(leaves[::2], leaves[1::2], strict=True))
        H = torch_reference.forward(params, X, names)
        if task.loss == "softmax_cross_entropy":
            return F.cross_entropy(H, y)
        return F.mse_loss(H, y, reduction="sum") / len(X)

    return loss_of


def _read_torch(result: Any) -> Answer:
    loss, grads = result
    return Answer(loss.item(), [on_host(g.float().numpy(force=True)) for g in grads])


def _captured(call: Any) -> Any:
    """The same kernels as one CUDA graph."""
    import torch

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # torch asks for some calls on a stream before a capture
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


# JAX ---------------------------------------------------------------------------------------------

JAX_PRECISIONS = {"float32": "float32", "tf32": "tensorfloat32", "bfloat16": "bfloat16"}


def _jax(task: Task, precision: str) -> Ready:
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leave memory to the others
    import jax
    import jax.numpy as jnp

    activation = {"sigmoid": jax.nn.sigmoid, "tanh": jnp.tanh, "relu": jax.nn.relu}[task.activation]
    dtype = jnp.bfloat16 if precision == "bfloat16" else jnp.float32
    X = jnp.from_dlpack(task.X).astype(dtype)
    y = jnp.from_dlpack(task.y.astype("int32") if task.y.ndim == 1 else task.y)
    params = [tuple(jnp.from_dlpack(A).astype(dtype) for A in layer) for layer in task.params]

    def loss_of(params: Any, X: Any, y: Any) -> Any:
        *hidden, (W_L, b_L) = params
        for W, b in hidden:
            X = activation(X @ W.T + b)
        H = X @ W_L.T + b_L
        if task.loss == "softmax_cross_entropy":
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(H), y[:, None], axis=1))
        return jnp.mean(jnp.sum((H - y.astype(dtype)) ** 2, axis=1))

    value_and_grad = jax.jit(jax.value_and_grad(loss_of))

    def call() -> Any:
        # XLA has streams of its own, on which the timer's events are not: every call is waited for.
        return jax.block_until_ready(value_and_grad(params, X, y))

    return Ready(call, _read, lambda: jax.default_matmul_precision(JAX_PRECISIONS[precision]))


# Tables ------------------------------------------------------------------------------------------


QUICK = {
    "prepared": _prepared,
    "bound": _bound,
    "call": _call,
    "tiny": partial(_tier, "tiny"),
    "tiny_in_shared_memory": _tiny_in_shared_memory,
    "warp_tiles": partial(_tier, "warp_tiles"),
    "layers": partial(_tier, "layers"),
    "derivation": _derivation,
    "torch": _torch,
    "torch_converting": partial(_torch, converts=True),
    "torch_graph": partial(_torch, graph=True),
    "jax": _jax,
}

# These compile for half a minute, for every net and number of rows anew.
COMPILED = {
    "torch_compile": partial(_torch, compile_mode="default"),
    "torch_autotune": partial(_torch, compile_mode="max-autotune"),
}

# What a time has in it. Beforehand is before the clock starts.
INCLUDES = {
    "prepared": "float32 in, new arrays out; what is rounded to bfloat16 is so in every call",
    "bound": "the same arrays every time; X is rounded to bfloat16 beforehand, W in every call",
    "call": "as prepared, and all checks; for class labels it waits for the device",
    "tiny": "one tier of ours, without checks, as prepared",
    "tiny_in_shared_memory": "the same, in the variant whose parameters lie there",
    "warp_tiles": "the same",
    "layers": "the same",
    "derivation": "backprop.py on CuPy's arrays, one operation after the other, without checks",
    "torch": "autograd, eager; X, y and parameters are of the precision's type beforehand",
    "torch_converting": "float32 in and out; X, y and parameters become bfloat16 in every call",
    "torch_graph": "as torch, replayed as a CUDA graph: the same arrays every time",
    "jax": "jit of value_and_grad; arrays of the precision's type beforehand; waits for the device",
    "torch_compile": "as torch, compiled beforehand",
    "torch_autotune": "the same with max-autotune: it replays CUDA graphs, the same arrays out",
}

OURS = ("prepared", "bound")
TORCH = ("torch", "torch_graph", *COMPILED)


def contenders(builders: Mapping[str, Callable[..., Ready]], precision: str) -> list[Contender]:
    """The rows of QUICK or COMPILED, in a precision."""
    return [
        Contender(name, "", "", partial(build, precision=precision))
        for name, build in builders.items()
    ]

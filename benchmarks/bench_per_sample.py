"""Gradients of single samples, their norms and clipped sums, against torch.func, Opacus, BackPACK.

    pip install opacus backpack-for-pytorch
    python benchmarks/bench_per_sample.py [--quick] [--json FILE]

Each peer is used as its own users would: torch.func with vmap(grad), Opacus with its hooks, ghost
norms and ghost clipping, BackPACK with its extensions. All start from inputs in their own arrays
and end with the answer; losses are sums over samples. Then comes the peak memory of the two that
form no gradient of a sample, each in a process of its own, beside the size of those gradients.
"""

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import compare
import numpy as np

from mlp_backprop.bench import grid
from mlp_backprop.bench import memory as bench_memory
from mlp_backprop.bench.contenders import Task
from mlp_backprop.derivatives.per_sample import (
    clipped_grads,
    per_sample_grad_norms,
    per_sample_grads,
)
from mlp_backprop.types import Layer

NETS = {"2-10-5-1": 1024, "64-64-64-1": 1000, "784-128-64-10": 128}
KINDS = ("norms", "grads", "clipped")
PEAK_ROWS = {"2-10-5-1": 1_000_000, "64-64-64-1": 100_000, "784-128-64-10": 10_000}


def cases(quick: bool) -> Iterator[compare.Case]:
    """Every kind of answer on every net."""
    for kind in KINDS:
        for net, n in NETS.items():
            for dtype in ("float32",) if quick else ("float32", "float64"):
                task = grid.make_task(grid.Cell(grid.PROBLEMS[net], n, dtype))
                yield make_case(kind, f"{kind}, {net}, n = {n:_}", task)


def make_case(kind: str, name: str, task: Task) -> compare.Case:
    grads = formed(task)
    norms = np.sqrt(sum((g.reshape(len(g), -1) ** 2).sum(axis=1) for g in grads))
    max_norm = float(np.median(norms))  # half of the samples are clipped
    c = np.minimum(1, max_norm / norms)
    expected = {
        "norms": [norms],
        "grads": grads,
        "clipped": [np.einsum("i,i...->...", c, g) for g in grads],
    }
    builders = {"mlp_backprop": ours, "torch.func": by_torch_func, "Opacus": by_opacus}
    if kind != "clipped":
        builders["BackPACK"] = by_backpack
    contenders = [
        compare.Contender(peer, partial(build, kind, task, max_norm), read)
        for peer, build in builders.items()
    ]
    return compare.Case(name, str(task.X.dtype), expected[kind], contenders)


def formed(task: Task) -> list[np.ndarray]:
    """The gradient of every sample in float64: one backward pass for each, by the derivation."""
    params = [Layer(W.astype(float), b.astype(float)) for W, b in task.params]
    y = task.y if task.y.ndim == 1 else task.y.astype(float)
    task = task._replace(params=params, X=task.X.astype(float), y=y)
    rows = [
        grid.reference(task._replace(X=task.X[i : i + 1], y=task.y[i : i + 1])).grads
        for i in range(len(task.X))
    ]
    return [np.stack(parts) for parts in zip(*rows, strict=True)]


def read(result: Any) -> list[np.ndarray]:
    """NumPy arrays in float64, from a list of arrays of any library on the CPU."""
    return [np.asarray(A.detach() if hasattr(A, "detach") else A, dtype=float) for A in result]


# Contenders --------------------------------------------------------------------------------------


def ours(kind: str, task: Task, max_norm: float) -> Callable[[], Any]:
    params, X, y, activation, loss = task
    args, options = (params, X, y), {"activation": activation, "loss": loss}
    clip = {"max_norm": max_norm, "reduction": "sum"}
    return {
        "norms": lambda: [per_sample_grad_norms(*args, **options)],
        "grads": lambda: list(chain(*per_sample_grads(*args, **options))),
        "clipped": lambda: list(chain(*clipped_grads(*args, **options, **clip).grads)),
    }[kind]


def torch_model(task: Task) -> Any:
    """The net as torch modules, in the task's dtype."""
    import torch

    modules: list[Any] = []
    for W, b in task.params:
        linear = torch.nn.Linear(*W.shape[::-1], dtype=torch.from_numpy(W).dtype)
        linear.load_state_dict({"weight": torch.tensor(W), "bias": torch.tensor(b)})
        modules += [linear, {"sigmoid": torch.nn.Sigmoid, "relu": torch.nn.ReLU}[task.activation]()]
    return torch.nn.Sequential(*modules[:-1])


def torch_loss(task: Task, reduction: str) -> Any:
    import torch

    losses = {"squared_error": torch.nn.MSELoss, "softmax_cross_entropy": torch.nn.CrossEntropyLoss}
    return losses[task.loss](reduction=reduction)


def by_torch_func(kind: str, task: Task, max_norm: float) -> Callable[[], Any]:
    import torch
    from torch.func import functional_call, grad, vmap

    model, criterion = torch_model(task), torch_loss(task, "sum")
    params = {name: p.detach() for name, p in model.named_parameters()}
    X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)

    def loss_of(params: Any, x: Any, t: Any) -> Any:
        return criterion(functional_call(model, params, (x[None],)), t[None])

    per_sample = vmap(grad(loss_of), in_dims=(None, 0, 0))

    def norms_of(grads: list[Any]) -> Any:
        return torch.stack([g.flatten(1).norm(dim=1) for g in grads]).norm(dim=0)

    def grads() -> list[Any]:
        return list(per_sample(params, X, y).values())

    def clipped() -> list[Any]:
        formed = grads()
        c = (max_norm / norms_of(formed)).clamp(max=1)
        return [torch.einsum("i,i...->...", c, g) for g in formed]

    return {"norms": lambda: [norms_of(grads())], "grads": grads, "clipped": clipped}[kind]


def by_opacus(kind: str, task: Task, max_norm: float) -> Callable[[], Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    import torch

    X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)
    criterion, values = torch_loss(task, "sum"), torch_loss(task, "none")
    wrap = GradSampleModule if kind == "grads" else GradSampleModuleFastGradientClipping
    limit = {} if kind == "grads" else {"max_grad_norm": max_norm}
    model = wrap(torch_model(task), loss_reduction="sum", **limit)

    def grads() -> list[Any]:
        model.zero_grad(set_to_none=True)
        criterion(model(X), y).backward()
        return [p.grad_sample for p in model.parameters()]

    def norms() -> list[Any]:
        model.zero_grad(set_to_none=True)
        criterion(model(X), y).backward()
        return [model.get_norm_sample()]

    def clipped() -> list[Any]:
        # As its DPTensorFastGradientClipping does it: a second backward pass, of weighted losses.
        model.zero_grad(set_to_none=True)
        losses = values(model(X), y).reshape(len(X), -1).sum(dim=1)
        losses.sum().backward(retain_graph=True)
        model.zero_grad(set_to_none=True)
        c = model.get_clipping_coef()
        model.disable_hooks()
        (c * losses).sum().backward()
        model.enable_hooks()
        return [p.grad for p in model.parameters()]

    return {"norms": norms, "grads": grads, "clipped": clipped}[kind]


def by_backpack(kind: str, task: Task, max_norm: float) -> Callable[[], Any]:
    import torch
    from backpack import backpack, extend
    from backpack.extensions import BatchGrad, BatchL2Grad

    X, y = torch.from_numpy(task.X), torch.from_numpy(task.y)
    model, criterion = extend(torch_model(task)), extend(torch_loss(task, "sum"))

    def norms() -> list[Any]:
        model.zero_grad()
        with backpack(BatchL2Grad()):
            criterion(model(X), y).backward()
        return [torch.stack([p.batch_l2 for p in model.parameters()]).sum(dim=0).sqrt()]

    def grads() -> list[Any]:
        model.zero_grad()
        with backpack(BatchGrad()):
            criterion(model(X), y).backward()
        return [p.grad_batch for p in model.parameters()]

    return {"norms": norms, "grads": grads}[kind]


# Memory ------------------------------------------------------------------------------------------


def peaks(quick: bool) -> list[dict[str, Any]]:
    """Peak memory above the inputs in MB, beside what the formed gradients would take."""
    records = []
    for net, n in PEAK_ROWS.items():
        n = min(n, 10_000) if quick else n
        sizes = grid.PROBLEMS[net].sizes
        record = {"net": net, "n": n}
        record["gradients, MB"] = 4e-6 * n * sum((a + 1) * b for a, b in pairwise(sizes))
        for kind in ("norms", "clipped"):
            record[f"{kind}, MB"] = peak_of(kind, net, n)
        records.append(record)
    return records


def peak_of(kind: str, net: str, n: int) -> float | None:
    """The peak of one call, in a process of its own; None where it cannot be known."""
    code = f"import bench_per_sample as b; print(b.own_peak({kind!r}, {net!r}, {n}))"
    child = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent,
    )
    return None if child.stdout.strip() == "None" else int(child.stdout) / 1e6


def own_peak(kind: str, net: str, n: int) -> int | None:
    """The same in this process, in float32."""
    task = grid.make_task(grid.Cell(grid.PROBLEMS[net], n, "float32"))
    ours(kind, task._replace(X=task.X[:1], y=task.y[:1]), 1.0)()  # what is loaded once
    return bench_memory.peak_above(ours(kind, task, 1.0))


if __name__ == "__main__":
    # Of Opacus and BackPACK, in every call: their inputs require no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    compare.main(cases, memory=peaks)

"""Compiled passes but for the gradient: planned and run in one go, over tiles and by threads.

A pass is a function of a job, a chunk of rows and a worker, as kernels.gradient_pass is. It writes
to the rows of an array `out`, or adds to the sums of its chunk, which are added up here in their
order: the number of threads changes no bit.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_target_values
from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import kernels, parts, team
from mlp_backprop.engines.compiled.jobs import Job, as_compiled, job_of, labels_of
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.engines.compiled.schedule import chunks, operations
from mlp_backprop.types import Array, Layer


def run(
    make: Callable[..., Any],
    spec: Spec,
    params: list[Layer],
    X: Array,
    y: Array | None = None,
    weight: Array | None = None,
    *,
    products: float,
    n_sums: int = 0,
    more_rows: int = 0,
    **fields: int | Array,
) -> Array:
    """The sums of a pass, in float64: what make(sources, real) gives, over all rows of X.

    `products` says how often a row is multiplied by every weight, `more_rows` how many rows of a
    tile the pass needs for itself, `fields` what else its job holds.
    """
    dtype, plan = np.dtype(spec.dtype), layout(spec.sizes, len(X), spec.dtype, more_rows)
    n_chunks, chunk_rows = chunks(len(X), plan.tile_rows, operations(spec.sizes, products), n_sums)
    n_workers = min(threads.thread_count(), n_chunks)
    own = [Layer(as_compiled(W), as_compiled(b)) for W, b in params]
    sums = np.empty((n_chunks, n_sums))
    workspaces = np.empty((n_workers, plan.size), dtype)
    job = job_of(spec, own, plan, workspaces=workspaces, sums=sums, **fields)
    job.set(n_sums=n_sums)
    labels = _place(job, dtype, X, y, weight, n_chunks, chunk_rows)
    if n_chunks == 1:
        _add_rows(make, dtype)(job.address, 0, 0)
    else:
        team.run(_work(make, dtype), job.address, n_chunks, n_workers)
    if job.record["unknown"][0]:
        check_target_values(Argument("y", y, np), spec.loss, spec.sizes[-1])
    del labels  # which had to live until now
    for more in sums[1:]:
        sums[0] += more
    return sums[0]


@cache  # for signatures take long to look up
def _add_rows(make: Callable[..., Any], dtype: np.dtype[Any]) -> Any:
    return parts.entry(make, kernels.CHUNK, dtype)


@cache
def _work(make: Callable[..., Any], dtype: np.dtype[Any]) -> int:
    return parts.work(make, kernels.CHUNK, dtype)


@cache
def _placer(dtype: np.dtype[Any]) -> Any:
    return parts.entry(kernels.place, kernels.placing(dtype))


def _place(
    job: Job,
    dtype: np.dtype[Any],
    X: Array,
    y: Array | None,
    weight: Array | None,
    n_chunks: int,
    chunk_rows: int,
) -> Array:
    """Tell a job where the data is. The labels returned are to be kept."""
    no_targets, results = np.empty((0, 0), dtype), np.empty(0, dtype)
    targets = no_targets if y is None or y.ndim == 1 else y
    labels = labels_of(no_targets if y is None else y)
    weights = results if weight is None else weight
    _placer(dtype)(job.address, n_chunks, chunk_rows, X, targets, labels, weights, results)
    return labels

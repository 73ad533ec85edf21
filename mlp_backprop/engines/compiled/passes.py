"""Compiled passes but for the gradient: planned and run in one go, over tiles and by threads.

What a pass does with a tile of rows it writes to the rows of an array, or adds to the sums of their
chunk, which are added up here in their order: the number of threads changes no bit.
"""

from functools import cache
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_target_values
from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import kernels, parts, team
from mlp_backprop.engines.compiled.jobs import W_PLACE, Job, as_compiled, job_of, labels_of
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.engines.compiled.schedule import chunks, operations
from mlp_backprop.engines.memory import Kept
from mlp_backprop.types import Array, Layer, Layers


class Plan(NamedTuple):
    """What shapes decide: a job without its arrays, room for its sums, and the cut of the rows."""

    job: Job
    layers: Array
    sums: Array
    n_chunks: int
    chunk_rows: int
    n_workers: int


_kept = Kept()
MOST_SUMS = 1 << 17  # of the chunks of a plan that is kept: a megabyte


def run(
    tile: Any,
    spec: Spec,
    params: Layers,
    X: Array,
    y: Array | None = None,
    weight: Array | None = None,
    *,
    products: float,
    n_sums: int = 0,
    more_rows: int = 0,
    **fields: int | Array,
) -> Array:
    """The sums in float64 of a pass over all rows of X: what kernels.of_tiles made of its tiles.

    `products` says how often a row is multiplied by every weight, `more_rows` how many rows of a
    tile the pass needs for itself, `fields` what else its job holds.
    """
    shapes = tile, spec, len(X), products, n_sums, more_rows, threads.thread_count()
    plan = _kept.take(shapes) or _plan(*shapes)
    job, dtype = plan.job, np.dtype(spec.dtype)
    own = [Layer(as_compiled(W), as_compiled(b)) for W, b in params]
    plan.layers[:, W_PLACE:] = [(W.ctypes.data, b.ctypes.data) for W, b in own]
    job.set(**fields)
    labels = _place(plan, dtype, X, y, weight)
    if plan.n_chunks == 1:
        _add_rows(dtype)(job.address, 0, 0)
    else:
        team.run(_work(dtype), job.address, plan.n_chunks, plan.n_workers)
    if job.record["unknown"][0]:
        check_target_values(Argument("y", y, np), spec.loss, spec.sizes[-1])
    del own, labels  # which had to live until now
    job.forget(fields)
    sums = plan.sums[0].copy()
    for more in plan.sums[1:]:
        sums += more
    if plan.sums.size <= MOST_SUMS:
        _kept.put(shapes, plan)
    return sums


def _plan(
    tile: Any,
    spec: Spec,
    n: int,
    products: float,
    n_sums: int,
    more_rows: int,
    n_threads: int,
) -> Plan:
    places = layout(spec.sizes, n, spec.dtype, more_rows)
    n_chunks, rows = chunks(n, places.tile_rows, operations(spec.sizes, products), n_sums)
    n_workers = min(n_threads, n_chunks)
    workspaces, sums = np.empty((n_workers, places.size), spec.dtype), np.empty((n_chunks, n_sums))
    nowhere = [
        Layer(np.empty((n_out, n_in), spec.dtype), np.empty(n_out, spec.dtype))
        for n_in, n_out in pairwise(spec.sizes)
    ]
    job = job_of(spec, nowhere, places, workspaces=workspaces, sums=sums)
    job.set(n_sums=n_sums, tile=kernels.tile_address(spec.dtype, tile))
    return Plan(job, job.kept["layers"], sums, n_chunks, rows, n_workers)


@cache  # for signatures take long to look up
def _add_rows(dtype: np.dtype[Any]) -> Any:
    return parts.entry(kernels.over_tiles, kernels.CHUNK, dtype)


@cache
def _work(dtype: np.dtype[Any]) -> int:
    return parts.work(kernels.over_tiles, kernels.CHUNK, dtype)


@cache
def _placer(dtype: np.dtype[Any]) -> Any:
    return parts.entry(kernels.place, kernels.placing(dtype))


def _place(
    plan: Plan, dtype: np.dtype[Any], X: Array, y: Array | None, weight: Array | None
) -> Array:
    """Tell a job where the data is. The labels returned are to be kept."""
    no_targets, results = np.empty((0, 0), dtype), np.empty(0, dtype)
    targets = no_targets if y is None or y.ndim == 1 else y
    labels = labels_of(no_targets if y is None else y)
    weights = results if weight is None else weight
    cut = plan.n_chunks, plan.chunk_rows
    _placer(dtype)(plan.job.address, *cut, X, targets, labels, weights, results)
    return labels

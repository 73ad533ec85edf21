"""Compiled passes but for the gradient: planned and run in one go, over tiles and by threads.

What a pass does with a tile of rows it writes to the rows of an array, or adds to the sums of their
chunk, which are added up here in their order: the number of threads changes no bit.
"""

from collections.abc import Callable
from functools import cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.backprop import Spec
from mlp_backprop.edge.arguments import Argument
from mlp_backprop.edge.rules import check_target_values
from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import kernels, parts, team
from mlp_backprop.engines.compiled.jobs import (
    W_PLACE,
    Job,
    address_of_data,
    as_compiled,
    job_of,
    labels_of,
)
from mlp_backprop.engines.compiled.layout import layout
from mlp_backprop.engines.compiled.schedule import chunks, operations
from mlp_backprop.engines.memory import Kept
from mlp_backprop.types import Array, Layer, Layers, flat


class Plan(NamedTuple):
    """What shapes decide: a job without its arrays, room for its sums, and the cut of the rows.

    `places` says where the addresses of W_1, b_1, ... are found, and those of a vector; and where
    the job has them.
    """

    job: Job
    places: Array
    sums: Array
    cut: tuple[int, int]
    n_workers: int
    no_targets: Array
    nothing: Array


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
    room: int = 0,
    vector: Layers | None = None,
    **fields: int | Array,
) -> Array:
    """The sums of a pass over all rows of X, or means: what kernels.of_tiles made of its tiles.

    `products` says how often a row is multiplied by every weight, `more_rows` how many rows of a
    tile the pass needs for itself, `room` how many numbers P, `fields` what else its job holds.
    """
    shapes = tile, spec, len(X), products, n_sums, more_rows, room, threads.thread_count()
    plan = _kept.take(shapes) or _plan(*shapes)
    job, dtype, results = plan.job, plan.nothing.dtype, np.empty(n_sums, plan.nothing.dtype)
    own = [as_compiled(A) for A in (*flat(params), *flat(vector or ()))]
    plan.places[: len(own), 0] = [address_of_data(A) for A in own]
    job.set(**fields)
    labels = labels_of(plan.no_targets if y is None else y)
    targets = plan.no_targets if y is None or y.ndim == 1 else y
    weights = plan.nothing if weight is None else weight
    place, add_rows, work, add_chunks = _compiled(dtype)
    place(job.address, *plan.cut, X, targets, labels, weights, results)
    if plan.cut[0] == 1:
        known = add_rows(job.address, 0, 0)
    else:
        team.run(work(), job.address, plan.cut[0], plan.n_workers)
        known = not job.record["unknown"][0]
        if n_sums:
            add_chunks()(job.address)
    if not known:
        check_target_values(Argument("y", y, np), spec.loss, spec.sizes[-1])
    del own, labels  # which had to live until now
    job.forget(fields)
    if plan.sums.size <= MOST_SUMS:
        _kept.put(shapes, plan)
    return results


def _plan(
    tile: Any,
    spec: Spec,
    n: int,
    products: float,
    n_sums: int,
    more_rows: int,
    room: int,
    n_threads: int,
) -> Plan:
    places = layout(spec.sizes, n, spec.dtype, more_rows, room)
    cut = chunks(n, places.tile_rows, operations(spec.sizes, products), n_sums)
    n_workers = min(n_threads, cut[0])
    workspaces, sums = np.empty((n_workers, places.size), spec.dtype), np.empty((cut[0], n_sums))
    nowhere = [
        Layer(np.empty((n_out, n_in), spec.dtype), np.empty(n_out, spec.dtype))
        for n_in, n_out in pairwise(spec.sizes)
    ]
    vector = np.zeros((len(nowhere), 2), np.int64)
    job = job_of(spec, nowhere, places, workspaces=workspaces, sums=sums, vector=vector)
    job.set(n_sums=n_sums, tile=kernels.tile_address(spec.dtype, tile))
    no_targets, nothing = np.empty((0, 0), spec.dtype), np.empty(0, spec.dtype)
    return Plan(job, _places(job), sums, cut, n_workers, no_targets, nothing)


def _places(job: Job) -> Array:
    """For the parameters, and for a vector beside them, from 0 on; nothing is looked for yet."""
    tables = job.kept["layers"][:, W_PLACE:], job.kept["vector"]
    cells = [table[l, k : k + 1] for table in tables for l in range(len(table)) for k in (0, 1)]
    nowhere = np.zeros(1, np.int64)
    places = np.array([(nowhere.ctypes.data, cell.ctypes.data) for cell in cells])
    job.set(places=places, n_places=len(places))
    job.kept["nowhere"] = nowhere
    return places


@cache  # for signatures take long to look up
def _compiled(dtype: np.dtype[Any]) -> tuple[Any, Any, Callable[[], int], Callable[[], Any]]:
    """place, and the pass over one chunk; for many its address, and what adds them up."""
    pass_ = kernels.over_tiles, kernels.CHUNK, dtype
    return (
        parts.entry(kernels.place, kernels.placing(dtype)),
        parts.entry(*pass_),
        cache(partial(parts.work, *pass_)),
        cache(partial(parts.entry, kernels.results_pass, kernels.WHOLE, dtype)),
    )

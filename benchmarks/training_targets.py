"""What `train` is held to, and what a results file of bench_training.py says of it."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from training_contenders import CONTENDERS
from training_tasks import TORCH

from mlp_backprop.bench.results import Reached, Results, Target

PUBLISHED_EPOCHS = 10_000  # of 4-32-16-4, whose core seconds are of so many
FULL, MEMBERS = "4-32-16-4, all 10 000 rows", "100 of 8-32-32-1, batch 64"

# Must and aim: how many times faster than the best torch, and than JAX.
SPEEDS = {
    "2-10-5-1, batch 32": ((150, 250), (4, 6)),
    "8-32-32-1, batch 32": ((40, 60), (1.15, 2)),
    "64-64-64-1, batch 32": ((10, 18), (1.0, 1.5)),
    "64-64-64-1, batch 200": ((5, 9), (1.3, 2)),
    "784-128-64-10, batch 128": ((1.0, 1.5), (1.0, 1.3)),
}


def timings_of(results: Results, net: str) -> dict[str, Any]:
    """By contender; nothing where the net was not measured."""
    found = [record["timings"] for record in results["nets"] if record["net"] == net]
    return found[0] if found else {}


def faster(net: str, peers: tuple[str, ...], ours: str, results: Results) -> Reached:
    """The best of the peers' medians over that of ours."""
    timings = timings_of(results, net)
    found = [(timings[peer]["median"], peer) for peer in peers if peer in timings]
    if ours not in timings or not found:
        return None
    seconds, best = min(found)
    return seconds / timings[ours]["median"], CONTENDERS[best].words


def core_seconds(results: Results) -> Reached:
    timings = timings_of(results, FULL)
    if "numba" not in timings:
        return None
    wall, cores = (timings["numba"][key] * PUBLISHED_EPOCHS for key in ("median", "core_median"))
    return cores, f"{wall:.1f} s of wall time"


def over_single_runs(results: Results) -> Reached:
    timings = timings_of(results, MEMBERS)
    if not {"numba", "alone"} <= timings.keys():
        return None
    return timings["numba"]["median"] / timings["alone"]["median"], CONTENDERS["alone"].words


def worst(key: str, figure: Callable[[Results], float], results: Results) -> Reached:
    """The largest figure of the records with this key, and whose it is."""
    return max(((figure(r), r["net"]) for r in results[key]), default=None)


def of_data(name: str, figure: Callable[[Results], float], results: Results) -> Reached:
    found = [record for record in results["data"] if record["data"] == name]
    return (figure(found[0]), "rows held out") if found else None


def speeds() -> Iterator[Target]:
    torch = (*TORCH, "torch_compile")
    for net, (to_torch, to_jax) in SPEEDS.items():
        yield Target(f"{net}: to torch", *to_torch, "x", partial(faster, net, torch, "numba"))
        yield Target(f"{net}: to JAX", *to_jax, "x", partial(faster, net, ("jax",), "numba"))
    net = "2-10-5-1, batch 32"
    reference = partial(faster, net, torch, "reference")
    yield Target("reference loop, 2-10-5-1: to torch", 4, 6, "x", reference)
    yield Target("4-32-16-4, 10 000 epochs: core s", 14, 9, "", core_seconds)
    yield Target("4-32-16-4: to torch", 5, 7, "x", partial(faster, FULL, torch, "numba"))
    yield Target("100 members over 100 single runs", 0.55, 0.52, "", over_single_runs)
    vmap = partial(faster, MEMBERS, ("vmap", "vmap_1"), "numba")
    yield Target("100 members: to torch.func", 10, 20, "x", vmap)
    yield Target("100 members: to JAX", 3, 5, "x", partial(faster, MEMBERS, ("jax",), "numba"))


TARGETS = (
    *speeds(),
    Target(
        "beside a busy process: times slower",
        *(2.5, 2.1, ""),
        partial(worst, "load", lambda record: record["ratio"]["mean"]),
    ),
    Target(
        "a run over its bare steps, more by",
        *(5, 2, "%"),
        partial(worst, "overhead", lambda record: 100 * record["share"]["train"]),
    ),
    Target(
        "the assignment's function: loss",
        *(1e-6, 1e-6, ""),
        partial(of_data, "assignment", lambda record: record["loss"]),
    ),
    Target(
        "digits: wrong of those held out",
        *(3, 3, "%"),
        partial(of_data, "digits", lambda record: 100 * (1 - record["accuracy"])),
    ),
    Target(
        "digits: seconds",
        *(5, 5, ""),
        partial(of_data, "digits", lambda record: record["seconds"]),
    ),
)

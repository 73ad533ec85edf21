"""The cells of the GPU benchmark: nets, rows and precisions, their order, and the targets.

A pattern picks cells by their parts, joined by colons, any of them and in any order:

    2-10-5-1                        all cells of this net
    784-128-64-10:tf32              those in a precision
    64-64-64-1:10000000:bfloat16    one
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from gpu_contenders import COMPILED, QUICK

from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Ready
from mlp_backprop.bench.problems import Problem

NETS = {
    net.name: net
    for net in (
        Problem((2, 10, 5, 1), "sigmoid", "squared_error"),
        Problem((64, 64, 64, 1), "tanh", "squared_error"),
        Problem((784, 128, 64, 10), "relu", "softmax_cross_entropy"),
        Problem((784, 1024, 1024, 10), "relu", "softmax_cross_entropy"),
        Problem((4096,) * 5, "relu", "squared_error"),
    )
}

PRECISIONS = ("float32", "tf32", "bfloat16")

ROWS = {
    "2-10-5-1": (1, 1_000, 100_000, 10_000_000),
    "64-64-64-1": (1_000, 100_000, 10_000_000),
    "784-128-64-10": (1_000, 100_000),
    "784-1024-1024-10": (1_000, 100_000),
    "4096-4096-4096-4096-4096": (1, 1_000),
}


class Cell(NamedTuple):
    """A net with n rows, in a precision; the arrays are float32."""

    problem: Problem
    n: int
    precision: str

    def __str__(self) -> str:
        return bench_results.label(self.problem.name, self.n, self.precision)


class Target(NamedTuple):
    """How many times faster than torch eager, and than torch's best variant."""

    net: str
    n: int
    precisions: tuple[str, ...]
    must: tuple[float, float]
    aim: tuple[float, float]


TARGETS = (
    Target("2-10-5-1", 1_000, ("float32",), (8, 4), (15, 10)),
    Target("2-10-5-1", 10_000_000, ("float32",), (10, 8), (16, 15)),
    Target("64-64-64-1", 10_000_000, ("bfloat16",), (6, 4), (8, 6)),
    Target("64-64-64-1", 10_000_000, ("float32",), (3, 3), (5, 5)),
    Target("784-128-64-10", 100_000, ("tf32",), (1.3, 1.2), (2.4, 2.0)),
    Target("784-1024-1024-10", 100_000, PRECISIONS, (1.1, 1.0), (1.5, 1.4)),
    Target("4096-4096-4096-4096-4096", 1_000, PRECISIONS, (1.0, 1.0), (1.1, 1.1)),
)

Builders = Mapping[str, Callable[..., Ready]]


def cells() -> list[Cell]:
    """What the targets need, then the rest. The tiny net, always in float32, is there once."""
    targets = [Cell(NETS[t.net], t.n, precision) for t in TARGETS for precision in t.precisions]
    grid = [
        Cell(net, n, precision)
        for net in NETS.values()
        for n in ROWS[net.name]
        for precision in (PRECISIONS if net.name != "2-10-5-1" else PRECISIONS[:1])
    ]
    return [*targets, *(cell for cell in grid if cell not in targets)]


def schedule(
    patterns: Iterable[str] | None = None, names: Iterable[str] | None = None
) -> list[tuple[Cell, Builders]]:
    """Which contenders in which cell: the quick ones everywhere before any that compiles.

    Those are for the cells of the targets. Patterns pick cells, names contenders; None takes all.
    """
    picked = cells() if patterns is None else matching(patterns)
    needed = [(net, n, p) for net, n, precisions, *_ in TARGETS for p in precisions]
    compiled = [cell for cell in picked if (cell.problem.name, *cell[1:]) in needed]
    phases = [
        (found, {name: build for name, build in builders.items() if names is None or name in names})
        for found, builders in ((picked, QUICK), (compiled, COMPILED))
    ]
    return [(cell, builders) for found, builders in phases if builders for cell in found]


def matching(patterns: Iterable[str]) -> list[Cell]:
    """The cells that have all parts of one of the patterns; ValueError where one has none."""
    found: set[Cell] = set()
    for pattern in patterns:
        wanted = set(pattern.split(":"))
        matches = [
            cell for cell in cells() if wanted <= {cell.problem.name, str(cell.n), cell.precision}
        ]
        if not matches:
            raise ValueError(
                f"no cell matches {pattern!r}: give NET, N or PRECISION or several of them joined "
                f"by colons, as in {cells()[0].problem.name}:float32; nets: {', '.join(NETS)}"
            )
        found |= set(matches)
    return [cell for cell in cells() if cell in found]

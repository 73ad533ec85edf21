"""The grid of the benchmarks as data: nets, numbers of rows, dtypes, and how long each is measured.

Screens, pages and charts show nets in the order of this table.
"""

from typing import NamedTuple


class Effort(NamedTuple):
    """How long a cell is measured: rounds until the seconds are over, within these limits."""

    min_rounds: int
    max_rounds: int
    seconds: float


# From small to large; each has all that the smaller ones have.
SELECTIONS = {
    "quick": Effort(min_rounds=3, max_rounds=20, seconds=0.3),
    "default": Effort(min_rounds=7, max_rounds=200, seconds=15.0),
    "full": Effort(min_rounds=5, max_rounds=200, seconds=15.0),
}


# What a run is said to take at most, in seconds; benchmarks/report.py refuses one that took longer.
CLAIMED_SECONDS = {"quick": 60, "default": 900}


class Problem(NamedTuple):
    """One row: a net, its loss, and the numbers of rows that each selection adds."""

    sizes: tuple[int, ...]
    activation: str
    loss: str
    quick: tuple[int, ...] = ()
    default: tuple[int, ...] = ()
    full: tuple[int, ...] = ()
    memory: tuple[int, ...] = ()  # with these, in float32, peak memory is measured too

    @property
    def name(self) -> str:
        return "-".join(map(str, self.sizes))

    def rows(self, selection: str) -> list[int]:
        """All n of a selection."""
        return sorted(n for s in SELECTIONS if included(s, selection) for n in getattr(self, s))


REGRESSION = ("sigmoid", "squared_error")
CLASSES = ("relu", "softmax_cross_entropy")

PROBLEMS = {
    row.name: row
    for row in (
        Problem(
            (2, 10, 5, 1),
            *REGRESSION,
            quick=(1, 1024),
            default=(100_000, 1_000_000),
            full=(10_000_000,),
            memory=(1_000_000, 10_000_000),
        ),
        Problem((8, 32, 32, 1), *REGRESSION, quick=(1024,), default=(1, 100_000)),
        Problem((64, 64, 64, 1), *REGRESSION, quick=(64,), default=(1024, 100_000)),
        Problem((784, 128, 64, 10), *CLASSES, quick=(128,), default=(8192,)),
        Problem((784, 1024, 1024, 10), *CLASSES, default=(1024,), full=(100_000,)),
    )
}

# Of the largest entry of each array, for up to a million rows. Beyond it they grow with n, as the
# rounding of a plain sum does: with ten million rows torch's float32 is off by 1.5e-2.
TOLERANCES = {"float32": 2e-3, "float64": 1e-9}


class Cell(NamedTuple):
    """A problem with n rows, in a dtype."""

    problem: Problem
    n: int
    dtype: str

    def __str__(self) -> str:
        return label(self.problem.name, self.n, self.dtype)


def label(problem: str, n: int, dtype: str) -> str:
    """The name of a cell, as it is read."""
    return f"{problem}, n = {spaced(n)}, {dtype}"


def spaced(number: int) -> str:
    """With spaces between thousands: 1 234."""
    return f"{number:_}".replace("_", " ")


def tolerance(cell: Cell) -> float:
    """How far an answer may be off."""
    return TOLERANCES[cell.dtype] * max(1, cell.n / 10**6)


def included(since: str, selection: str) -> bool:
    """Whether what comes in with one selection belongs to another."""
    order = list(SELECTIONS)
    return order.index(since) <= order.index(selection)


def cells(selection: str) -> list[Cell]:
    """The grid, of one of SELECTIONS."""
    return [
        Cell(problem, n, dtype)
        for problem in PROBLEMS.values()
        for n in problem.rows(selection)
        for dtype in TOLERANCES
    ]

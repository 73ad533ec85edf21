"""What the first times on a card are held to: expectations by arithmetic, none of them measured.

They come from counting instructions, bytes and operations of the compiled kernels, for an H100
with these facts; on another card they are shown as what they are, times for an H100.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

CARD = "H100"
FACTS = "132 multiprocessors, 1.755 GHz, 3.0 TB/s"


class Expectation(NamedTuple):
    """Of one loss and gradient, from one number of seconds to the other."""

    net: str
    n: int
    precision: str
    least: float
    most: float

    @property
    def pattern(self) -> str:
        return f"{self.net}:{self.n}:{self.precision}"


EXPECTED = (
    Expectation("2-10-5-1", 10_000_000, "float32", 140e-6, 190e-6),
    Expectation("64-64-64-1", 10_000_000, "bfloat16", 1.8e-3, 2.4e-3),
    Expectation("64-64-64-1", 10_000_000, "tf32", 2.8e-3, 3.5e-3),
    Expectation("64-64-64-1", 10_000_000, "float32", 6e-3, 7.5e-3),
    Expectation("784-1024-1024-10", 100_000, "float32", 20e-3, 20e-3),
    Expectation("784-1024-1024-10", 100_000, "tf32", 3.5e-3, 3.5e-3),
    Expectation("784-1024-1024-10", 100_000, "bfloat16", 2.5e-3, 2.5e-3),
)

OURS = "bound"  # the contender whose time is held to them


def compared(card: str, cells: Iterable[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """Lines to read, and what was not measured; a long time is told and is no fault.

    For it may as well be the expectation that is wrong.
    """
    found = {(cell["net"], cell["n"], cell["precision"]): cell for cell in cells}
    lines = [f"expected by counting instructions, for an {CARD} ({FACTS}):"]
    if CARD not in card:
        lines.append(f"this card is another, {card}")
    missing = []
    for row in EXPECTED:
        cell = found.get(row[:3], {"timings": {}, "skipped": {}})
        name = f"{row.net}, n = {row.n}, {row.precision}"
        if OURS in cell["timings"]:
            lines.append(f"{name}: {held_to(row, cell['timings'][OURS]['median'])}")
        else:
            missing.append(f"{name}: {cell['skipped'].get(OURS, 'the run did not come to it')}")
    return lines, missing


def held_to(row: Expectation, seconds: float) -> str:
    """The time, and how many times what was expected it is."""
    least, most = (f"{1e3 * end:.3g}" for end in (row.least, row.most))
    between = most if least == most else f"{least}-{most}"
    ratio = seconds / min(max(seconds, row.least), row.most)
    return f"{1e3 * seconds:.3g} ms, expected {between}: x {ratio:.2f}"

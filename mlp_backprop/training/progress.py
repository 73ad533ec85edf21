"""How far a run has come, for who waits at a terminal: a bar by rich, else a line now and then."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from time import perf_counter

Show = Callable[[int, float, float], None]  # epochs done, loss, validation loss (nan for none)

LINE_SECONDS = 5.0  # from one plain line to the next


@contextmanager
def shown(wanted: bool, epochs: int) -> Iterator[Show]:
    """A function to call when some epochs have ended."""
    if not wanted:
        yield lambda epoch, loss, validation_loss: None
    elif sys.stderr is not None and sys.stderr.isatty() and _has_rich():
        yield from _bar(epochs)
    else:
        yield _lines(epochs)


def _has_rich() -> bool:
    return find_spec("rich") is not None


def _said(loss: float, validation_loss: float) -> str:
    judged = f", validation {validation_loss:.4g}" if validation_loss == validation_loss else ""
    return f"loss {loss:.4g}{judged}"


def _bar(epochs: int) -> Iterator[Show]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=epochs)
        yield lambda epoch, loss, judged: progress.update(
            bar, completed=epoch, description=_said(loss, judged)
        )


def _lines(epochs: int) -> Show:
    last = perf_counter()

    def line(epoch: int, loss: float, validation_loss: float) -> None:
        nonlocal last
        if epoch == epochs or perf_counter() - last > LINE_SECONDS:
            last = perf_counter()
            sys.stderr.write(f"epoch {epoch} of {epochs}: {_said(loss, validation_loss)}\n")

    return line

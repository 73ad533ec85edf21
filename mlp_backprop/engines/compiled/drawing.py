"""Orders of rows, drawn ahead by a thread in the background while compiled steps run.

Each member has a ring of them. Steps read from the epoch under way on, drawing writes behind what
has been drawn, and neither waits for the other: steps come back when they have run out.
"""

import threading
from typing import Any

import numpy as np

from mlp_backprop.engines import orders
from mlp_backprop.engines.compiled import parts, steps
from mlp_backprop.maths.runs import Task
from mlp_backprop.types import Array

RING_BYTES = 1 << 20  # of all members together; but at least two orders of each
ENDLESS = 1 << 62
PAUSE = 0.001  # seconds until another look for room


class Orders:
    """Those of all members: `table` is of steps.MEMBER, and is told where they are."""

    def __init__(self, task: Task, table: Array) -> None:
        self.task, self.table = task, table
        self.publish = parts.entry(steps.publish, steps.PUBLISH)
        self.drawing = threading.Lock()  # one thread at a time
        self.last: tuple[Any, Array] = (None, np.empty(0, np.int64))
        n_rows = [task.n_rows(e) for e in range(task.n_members)]
        n_orders = max(2, RING_BYTES // (8 * sum(n_rows)))
        self.rings: list[Array] = []
        constant: dict[int, Array] = {}
        for e, n in enumerate(n_rows):
            # Of a batch of all rows the order does not matter.
            if task.shuffle and task.steps_per_epoch(e) > 1:
                ring = np.empty((n_orders, n), np.int64)
                table["n_drawn"][e] = table["epoch"][e]
            else:
                ring = in_turn(task, e, constant)
                table["n_drawn"][e] = ENDLESS
            self.rings.append(ring)
            table["orders"][e], table["n_orders"][e] = ring.ctypes.data, len(ring)

    def draw_first(self, members: Array) -> None:
        """So that none of these is without an order for its epoch under way."""
        table = self.table
        for e in members[table["n_drawn"][members] <= table["epoch"][members]]:
            self.draw(int(e))

    def draw(self, e: int) -> bool:
        """One more of a member, if there is room."""
        row, ring = self.table[e], self.rings[e]
        with self.drawing:
            epoch = int(row["n_drawn"])
            if epoch >= row["epoch"] + len(ring):
                return False
            ring[epoch % len(ring)] = self.order(e, epoch)
            self.publish(self.table.ctypes.data + e * steps.MEMBER_BYTES + steps.N_DRAWN, epoch + 1)
        return True

    def order(self, e: int, epoch: int) -> Array:
        """Members of one seed often come one after the other: theirs is drawn once."""
        task = self.task
        what = (task.seeds[e], epoch, task.n_rows(e)) if task.rows is None else None
        if what is None or what != self.last[0]:
            self.last = what, orders.order(task, e, epoch)
        return self.last[1]

    def draw_ahead(self, members: Array, over: threading.Event) -> None:
        """Fill the rings, in rounds, until it is over."""
        while not over.is_set():
            drawn = [self.draw(int(e)) for e in members if not over.is_set()]
            if not any(drawn):
                over.wait(PAUSE)


def in_turn(task: Task, e: int, known: dict[int, Array]) -> Array:
    """The rows of a member as they lie, (1, n); all rows are one array for every member."""
    if task.rows is not None:
        return np.ascontiguousarray(task.rows[e], dtype=np.int64)[None]
    n = task.n_rows(e)
    return known.setdefault(n, np.arange(n)[None])

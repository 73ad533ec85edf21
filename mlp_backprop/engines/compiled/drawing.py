"""Orders of rows, drawn ahead by a thread in the background while compiled steps run.

Each member has a ring of them. Steps read from the epoch under way on, drawing writes behind what
has been drawn, and neither waits for the other: steps come back when they have run out.
"""

import threading
from typing import Any

import numpy as np

from mlp_backprop.engines import orders
from mlp_backprop.engines.compiled import parts, records, steps
from mlp_backprop.maths.runs import Task
from mlp_backprop.types import Array

RING_BYTES = 1 << 20  # of all members together; but at least two orders of each
ENDLESS = 1 << 62
PAUSE = 0.001  # seconds until another look for room
MOST_LOOKS = 1000  # in vain: steps are long, or an interrupt has kept anyone from saying it is over


class Orders:
    """Those of all members: `table` is of records.MEMBER, and is told where they are."""

    def __init__(self, task: Task, table: Array) -> None:
        self.task, self.table = task, table
        self.publish = parts.entry(steps.publish, steps.PUBLISH)
        self.place_of_n_drawn = table.ctypes.data + records.N_DRAWN
        self.n_drawn, self.epochs, self.n_orders = (
            table[name] for name in ("n_drawn", "epoch", "n_orders")
        )
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
        for e in members[self.n_drawn[members] <= self.epochs[members]].tolist():
            self.draw(e)

    def draw(self, e: int) -> None:
        """One more of a member, if there is room."""
        ring = self.rings[e]
        with self.drawing:
            epoch = int(self.n_drawn[e])
            if epoch < self.epochs[e] + len(ring):
                ring[epoch % len(ring)] = self.order(e, epoch)
                self.publish(self.place_of_n_drawn + e * records.MEMBER_BYTES, epoch + 1)

    def order(self, e: int, epoch: int) -> Array:
        """Members of one seed often come one after the other: theirs is drawn once."""
        task = self.task
        what = (task.seeds[e], epoch, task.n_rows(e)) if task.rows is None else None
        if what is None or what != self.last[0]:
            self.last = what, orders.order(task, e, epoch)
        return self.last[1]

    def begin_drawing(self, members: Array, over: threading.Event) -> None:
        """Let a thread fill the rings of these, if one is half empty, until it is over."""
        if len(self.with_room(members, 0.5)):
            work = threading.Thread(target=self.draw_ahead, args=(members, over), daemon=True)
            work.start()

    def draw_ahead(self, members: Array, over: threading.Event) -> None:
        """In rounds."""
        looks = 0
        while not over.is_set() and looks < MOST_LOOKS:
            short = self.with_room(members).tolist()
            for e in short:
                if not over.is_set():
                    self.draw(e)
            if not short:
                looks += 1
                over.wait(PAUSE)

    def with_room(self, members: Array, part: float = 1.0) -> Array:
        """Those in whose ring at most this part is ahead of the steps."""
        n_ahead = self.n_drawn[members] - self.epochs[members]
        return members[n_ahead < np.ceil(part * self.n_orders[members])]


def in_turn(task: Task, e: int, known: dict[int, Array]) -> Array:
    """The rows of a member as they lie, (1, n); all rows are one array for every member."""
    if task.rows is not None:
        return np.ascontiguousarray(task.rows[e], dtype=np.int64)[None]
    n = task.n_rows(e)
    return known.setdefault(n, np.arange(n)[None])

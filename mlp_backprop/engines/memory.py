"""Memory stays at hand for the next call: what is freed, and small workspaces by what they are for.

glibc gives freed blocks above a limit, at first 128 KB, back to the system, and to get fresh pages
costs more than the arithmetic on them: a gradient of 64-64-64-1 for 1024 rows took twice as long.
The limit follows the largest block that has been freed, up to 32 MB; then up to twice as much free
memory stays with the process. Where MALLOC_ variables set the limits, they hold.
"""

import threading
from typing import Any

import numpy as np


def keep_freed_memory() -> None:
    """Raise the limit: free one large block, which is never touched and so takes no memory."""
    np.empty(31 << 20, np.uint8)


class Kept(threading.local):
    """Small workspaces of a thread that are not in use, by what they are for.

    Who takes one finds nobody else with it; a call that interrupts another makes its own.
    """

    MOST = 8  # of a few MB at most

    def __init__(self) -> None:
        self.by_use: dict[Any, Any] = {}

    def take(self, use: Any) -> Any:
        """One for this use, or None."""
        return self.by_use.pop(use, None)

    def put(self, use: Any, workspace: Any) -> None:
        """Keep it for the next; when there are too many, begin anew."""
        if len(self.by_use) >= self.MOST:
            self.by_use.clear()
        self.by_use[use] = workspace

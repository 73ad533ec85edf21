"""Memory that is freed stays at hand for the next call.

glibc gives freed blocks above a limit, at first 128 KB, back to the system, and to get fresh pages
costs more than the arithmetic on them: a gradient of 64-64-64-1 for 1024 rows took twice as long.
The limit follows the largest block that has been freed, up to 32 MB; then up to twice as much free
memory stays with the process. Where MALLOC_ variables set the limits, they hold.
"""

import numpy as np


def keep_freed_memory() -> None:
    """Raise the limit: free one large block, which is never touched and so takes no memory."""
    np.empty(31 << 20, np.uint8)

"""The kernels of a pass, launched one by one or as a CUDA graph."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from mlp_backprop.types import Array, LossAndGrads


class Launches:
    """The launches of a pass over certain arrays, to be done once or, by a call, again and again.

    Kernels are handed addresses. So `reads` has all that they read: CuPy's pool gives the memory
    of an array that is gone to the next who asks, on another thread too, and to write there.
    """

    def __init__(
        self, enqueue: Callable[[], Any], reads: list[Array], results: LossAndGrads
    ) -> None:
        self.enqueue, self.reads, self.results = enqueue, reads, results
        self.graph: Any = None

    def once(self) -> LossAndGrads:
        """Launch them one by one."""
        self.enqueue()
        return self.results

    def __call__(self) -> LossAndGrads:
        """Launch them as a graph, which is recorded now if this is the first time.

        They must have been launched before: loading a kernel cannot be recorded.
        """
        if self.graph is None:
            self.graph = recorded(self.enqueue)
        self.graph.launch()
        return self.results


def recorded(enqueue: Callable[[], Any]) -> Any:
    """The graph of what this enqueues, on a stream of its own."""
    import cupy

    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        try:
            enqueue()
        except BaseException:
            with suppress(Exception):  # the error to tell is the first
                stream.end_capture()
            raise
        return stream.end_capture()

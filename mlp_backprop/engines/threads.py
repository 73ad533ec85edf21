"""Threads for engines that walk blocks of rows: one shared pool, and who may use BLAS's threads.

The work is cut into chunks by its shape alone; threads only decide who takes which chunk, so that
no setting changes a bit of the result. The calling thread works too: calls from many threads at
once make progress without waiting for the pool.
"""

import math
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache, partial
from itertools import takewhile
from typing import Any

# How many threads a call may use, its own included; read at every call.
VARIABLE = "MLP_BACKPROP_NUM_THREADS"

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None


def thread_count() -> int:
    """The CPUs this process may use, or what the environment variable says."""
    setting = os.environ.get(VARIABLE)
    if setting is None:
        return usable_cpus()
    if not setting.isdecimal() or int(setting) < 1:
        raise ValueError(f"{VARIABLE} must be a whole number from 1, got {setting!r}")
    return int(setting)


@cache
def usable_cpus() -> int:
    """The CPUs this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_chunks(task: Callable[[int, int], None], n_chunks: int, n_workers: int) -> None:
    """Call task(chunk, worker) for every chunk; a worker is one thread at a time.

    Returns when nothing runs any more, also after an exception or Ctrl-C: what a task writes to
    is then no longer in use. An exception of any task is raised here.
    """
    waiting = deque(range(n_chunks))

    def take() -> int | None:
        try:
            return waiting.popleft()
        except IndexError:
            return None

    def work(worker: int) -> None:
        try:
            for chunk in iter(take, None):
                task(chunk, worker)
        except BaseException:
            waiting.clear()  # nobody begins another
            raise

    futures: list[Future[None]] = []
    try:
        for worker in range(1, min(n_chunks, n_workers)):
            futures.append(_shared_pool().submit(work, worker))
        work(0)
    finally:
        waiting.clear()
        started = [future for future in futures if not future.cancel()]
        _to_the_end(lambda: wait(started))
    for future in started:
        future.result()


def _to_the_end(step: Callable[[], object]) -> None:
    """Repeat a step until it has ended; Ctrl-C meanwhile is raised after that."""
    interrupt = None
    while True:
        try:
            step()
            break
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _shared_pool() -> ThreadPoolExecutor:
    global _pool
    with _lock:
        if _pool is None:
            _pool = ThreadPoolExecutor(max(32, usable_cpus()), thread_name_prefix="mlp_backprop")
        return _pool


# The limit on BLAS is one for the process, and the bits of a large product depend on it. So those
# who want BLAS on one thread, and those who leave products to its threads, take turns, in the order
# in which they came; any number who want the same are inside at a time. By thread, what it wants:
_turns = threading.Condition()
_waiting: dict[int, float] = {}
_inside: dict[int, float] = {}
_limited: dict[Any, tuple[int, int]] = {}  # BLAS libraries: the limit that was set, and before


def blas_on_one_thread() -> AbstractContextManager[None]:
    """Hold BLAS to one thread; without threadpoolctl, do nothing."""
    return _Turn(1)


def blas_on_its_threads() -> AbstractContextManager[None]:
    """Leave products to BLAS's threads, but to no more than a call may use."""
    return _Turn(thread_count() if VARIABLE in os.environ else math.inf)


class _Turn(AbstractContextManager[None]):
    """BLAS limited for this thread. (A generator would take twice as long to enter and leave.)"""

    def __init__(self, limit: float) -> None:
        self.limit = limit

    def __enter__(self) -> None:
        self.me = threading.get_ident()
        self.outer = _inside.get(self.me)  # of a call that this one interrupts, by a signal
        self.is_needed = self.outer != self.limit and bool(_blas_libraries())
        if self.is_needed:
            try:
                if self.outer is not None:
                    _leave(self.me)
                _enter(self.me, self.limit)
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        if self.is_needed:
            _to_the_end(partial(_leave, self.me))
            if self.outer is not None:
                _enter(self.me, self.outer)


def _enter(me: int, limit: float) -> None:
    with _turns:
        if _waiting or _inside:
            _waiting[me] = limit
            _turns.wait_for(partial(_may_enter, me, limit))
            del _waiting[me]
        _inside[me] = limit
        for library in _blas_libraries() if limit < math.inf else ():
            n_threads = library.get_num_threads()
            if n_threads > limit:
                _limited.setdefault(library, (int(limit), n_threads))
                _set_blas_threads(library, int(limit))


def _may_enter(me: int, limit: float) -> bool:
    """Whether all inside, and all who came before, want the same."""
    before = takewhile(lambda other: other != me, _waiting)
    return {*_inside.values(), *map(_waiting.__getitem__, before)} <= {limit}


def _leave(me: int) -> None:
    with _turns:
        _waiting.pop(me, None)
        _inside.pop(me, None)
        if not _inside:
            _restore_blas()
        if _waiting:
            _turns.notify_all()


def _restore_blas() -> None:
    for library, (limit, before) in _limited.items():
        if library.get_num_threads() == limit:  # else somebody else has set it since
            _set_blas_threads(library, before)
    _limited.clear()


def _set_blas_threads(library: Any, n_threads: int) -> None:
    # From 3.8 on threadpoolctl heeds, without a word, only the first thread that sets OpenBLAS,
    # until it lets go. Here any thread may set it: one after the other, by the lock.
    let_go = getattr(library, "clear_controlling_thread", lambda force: None)
    let_go(force=True)
    library.set_num_threads(n_threads)
    let_go(force=True)


@cache
def _blas_libraries() -> list[Any]:
    """threadpoolctl's handles on the BLAS libraries loaded; none if it is not installed."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return list(ThreadpoolController().select(user_api="blas").lib_controllers)


def can_limit_blas() -> bool:
    """Whether threads over blocks of rows are possible: only where BLAS can be held."""
    return bool(_blas_libraries())


def _after_fork() -> None:
    """A forked child has none of its parent's threads, and no caller inside the limit."""
    global _lock, _pool, _turns
    _lock, _pool, _turns = threading.Lock(), None, threading.Condition()
    _waiting.clear()
    _inside.clear()
    _restore_blas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

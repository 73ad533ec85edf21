"""Threads for engines that walk blocks of rows: one shared pool, and BLAS held to one thread.

The work is cut into chunks by its shape alone; threads only decide who takes which chunk, so that
no setting changes a bit of the result. The calling thread works too: calls from many threads at
once make progress without waiting for the pool.

BLAS's own threads are never used. They meet many times within a product, and where a core is busy
with something else each meeting may wait for the scheduler: products were seen to take ten to a
hundred times as long. A thread that takes chunks from a queue delays nobody but by its last chunk.
"""

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

# How many threads a call may use, its own included; read at every call.
VARIABLE = "MLP_BACKPROP_NUM_THREADS"

_lock = threading.Lock()
_holding = threading.RLock()  # for a signal may interrupt who has it
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


# How many threads BLAS has is one number for the process. It is held at one while anybody is here:
_inside: set[int] = set()  # threads
_limited: dict[Any, int] = {}  # BLAS libraries: how many threads each had


def blas_on_one_thread() -> AbstractContextManager[None]:
    """Hold BLAS to one thread; without threadpoolctl, do nothing."""
    return _Hold()


class _Hold(AbstractContextManager[None]):
    """BLAS held by this thread. (A generator would take twice as long to enter and leave.)"""

    def __enter__(self) -> None:
        self.me = threading.get_ident()
        # A call that this one interrupts, by a signal, holds BLAS already.
        self.is_needed = self.me not in _inside and bool(_blas_libraries())
        if self.is_needed:
            try:
                _hold(self.me)
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *_: object) -> None:
        if self.is_needed:
            _to_the_end(partial(_let_go, self.me))


def _hold(me: int) -> None:
    with _holding:
        is_first = not _inside
        _inside.add(me)
        for library in _blas_libraries() if is_first else ():
            n_threads = library.get_num_threads()
            if n_threads > 1:
                _limited[library] = n_threads
                _set_blas_threads(library, 1)


def _let_go(me: int) -> None:
    with _holding:
        _inside.discard(me)
        if not _inside:
            _restore_blas()


def _restore_blas() -> None:
    for library, before in _limited.items():
        if library.get_num_threads() == 1:  # else somebody else has set it since
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
    global _lock, _pool, _holding
    _lock, _pool, _holding = threading.Lock(), None, threading.RLock()
    _inside.clear()
    _restore_blas()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

"""Threads for compiled passes of 50 us and more: they wait, and share out work, in compiled code.

    run(work, job, n_chunks, n_workers)      work(job, chunk, worker) for every chunk

A thread of a pool needs the interpreter to wake up. A helper never does: it stays in `serve`, which
leaves the interpreter's lock alone, until the process ends. It sleeps on a lock that compiled code
can open; while calls follow one another closely, it first looks out for the next one for a moment.
The caller takes chunks too, beginning with the first, and waits only for helpers that are at work
on one: whoever comes later finds the job closed. One caller at a time has the helpers, and others
meanwhile work alone.

What helpers cost is measured in every call: a chunk of the caller's tells how long all would have
taken without them. Time lost, because somebody else wants a helper's core or because the work was
done before anybody woke up, is followed by PAY times as much work without helpers. So calls lose
one part in PAY in the long run, whatever else the machine is doing.

The chunks are the caller's, cut by the shape of the work alone; who takes which changes no bit.
"""

import atexit
import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from mlp_backprop.engines import threads
from mlp_backprop.engines.compiled import parts

# The type of `work`, for numba.cfunc. `job` is what it makes of it, an address as a rule. It must
# come to an end and cannot raise; what it returns is lost.
WORK = types.void(types.int64, types.int64, types.int64)

MOST_WORKERS = 64
LOOK_OUT = 50_000  # nanoseconds for which a helper looks out for the next call
PATIENCE = 20_000  # after as long as a chunk takes, and this, a caller waits asleep
PAY = 10

# The words of a team lie in lines, so that threads do not write to one another's lines of the
# cache; the last ones are those of the workers, of whom the caller is number 0.
LINE = 128
GENERATION, FUNCTION, JOB, N_CHUNKS, N_WORKERS, GAP, STOPPED = range(0, 56, 8)
NEXT, INSIDE = LINE, 2 * LINE
IS_LED, N_HELPERS, REST, LAST_END = range(3 * LINE, 3 * LINE + 32, 8)
CPUS = 4 * LINE
WORKERS = 5 * LINE
IS_ASLEEP, LOCK, THREAD, SECONDS, NANOSECONDS = range(0, 40, 8)

MONOTONIC = getattr(time, "CLOCK_MONOTONIC", None)  # None on Windows: run_chunks takes over
ON_LINUX = sys.platform == "linux"

compiled = njit(nogil=True)

# Words in memory, and functions at addresses ----------------------------------------------------

_Word = ir.IntType(64)


def _word(builder, address):
    return builder.inttoptr(address, _Word.as_pointer())


@intrinsic
def load(context, address):
    def generate(context, builder, signature, args):
        return builder.load_atomic(_word(builder, args[0]), "seq_cst", 8)

    return types.int64(types.int64), generate


@intrinsic
def exchange(context, address, value):
    """Write; the result is what was there before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def add(context, address, value):
    """Add; the result is what was there before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _word(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def call(context, work, job, chunk, worker):
    def generate(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [_Word] * 3)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


# Python's own locks are the same on every system, and need the interpreter's lock for nothing.
_int, _address = types.int32, types.int64
acquire_lock = types.ExternalFunction("PyThread_acquire_lock", _int(_address, _int))
release_lock = types.ExternalFunction("PyThread_release_lock", types.void(_address))
clock_gettime = types.ExternalFunction("clock_gettime", _int(_int, _address))
sched_getcpu = types.ExternalFunction("sched_getcpu", _int())
sched_getaffinity = types.ExternalFunction("sched_getaffinity", _int(_int, _address, _address))
sched_setaffinity = types.ExternalFunction("sched_setaffinity", _int(_int, _address, _address))


@compiled
def line(team, worker):
    return team + WORKERS + LINE * worker


@compiled
def now(me):
    clock_gettime(MONOTONIC, me + SECONDS)
    return load(me + SECONDS) * 1_000_000_000 + load(me + NANOSECONDS)


@compiled
def sleep(me):
    """After the mark has been set, and a second look, for others may not have seen the mark.

    Whoever takes it away opens the lock, or need not sleep.
    """
    acquire_lock(load(me + LOCK), 1)


@compiled
def wake(other):
    if exchange(other + IS_ASLEEP, 0):
        release_lock(load(other + LOCK))


# The helper -------------------------------------------------------------------------------------


@compiled
def serve(team, thread):
    worker = add(team + N_HELPERS, 1) + 1
    me = line(team, worker)
    exchange(me + THREAD, thread)
    seen = 0
    while not load(team + STOPPED):
        seen = take_part(team, worker, seen)
        if load(team + GAP) < LOOK_OUT:
            until = now(me) + LOOK_OUT
            while not is_called(team, seen) and now(me) < until:
                pass
        exchange(me + IS_ASLEEP, 1)
        if not is_called(team, seen) or not exchange(me + IS_ASLEEP, 0):
            sleep(me)


@compiled
def is_called(team, seen):
    generation = load(team + GENERATION)
    return (generation & 1 and generation != seen) or load(team + STOPPED)


@compiled
def take_part(team, worker, seen):
    """In the job that is open, an odd generation: it changes only when nobody is inside."""
    add(team + INSIDE, 1)
    generation = load(team + GENERATION)
    if generation & 1:
        seen = generation
        if worker < load(team + N_WORKERS):
            take(team, worker, add(team + NEXT, 1))
    if add(team + INSIDE, -1) == 1:
        wake(line(team, 0))
    return seen


@compiled
def take(team, worker, chunk):
    """This chunk, and others until none is left; how many they were."""
    work, job, n_chunks = load(team + FUNCTION), load(team + JOB), load(team + N_CHUNKS)
    taken = 0
    while chunk < n_chunks:
        call(work, job, chunk, worker)
        taken += 1
        chunk = add(team + NEXT, 1)
    return taken


# The caller -------------------------------------------------------------------------------------


@compiled
def lead(team, work, job, n_chunks, n_workers):
    if n_chunks < 2 or n_workers < 2 or not load(team + N_HELPERS) or exchange(team + IS_LED, 1):
        alone(work, job, n_chunks)
        return
    me = line(team, 0)
    start = now(me)
    exchange(team + GAP, start - load(team + LAST_END))
    rest = load(team + REST)
    if rest > 0:
        alone(work, job, n_chunks)
        exchange(team + REST, rest - (now(me) - start))
    else:
        exchange(team + REST, PAY * lost_together(team, work, job, n_chunks, n_workers, start))
    exchange(team + LAST_END, now(me))
    exchange(team + IS_LED, 0)


@compiled
def alone(work, job, n_chunks):
    for chunk in range(n_chunks):
        call(work, job, chunk, 0)


@compiled
def lost_together(team, work, job, n_chunks, n_workers, start):
    """Do the job with helpers; how much longer it took than without, in nanoseconds."""
    me = line(team, 0)
    exchange(team + FUNCTION, work)
    exchange(team + JOB, job)
    exchange(team + N_CHUNKS, n_chunks)
    exchange(team + N_WORKERS, n_workers)
    exchange(team + NEXT, 1)
    add(team + GENERATION, 1)  # open
    wake_helpers(team, min(n_workers - 1, load(team + N_HELPERS)))
    begun = now(me)
    taken = take(team, 0, 0)
    add(team + GENERATION, 1)  # closed
    done = now(me)
    per_chunk = (done - begun) // taken
    wait(team, me, done + per_chunk + PATIENCE)
    if taken == n_chunks and load(team + GAP) < LOOK_OUT:
        return 0  # helpers are on their way, and in time for a later call of this loop
    return now(me) - start - n_chunks * per_chunk


@compiled
def wait(team, me, until):
    """Until no helper is inside: at first awake, for no longer than one should take."""
    while load(team + INSIDE):
        if now(me) > until:
            exchange(me + IS_ASLEEP, 1)
            if load(team + INSIDE) or not exchange(me + IS_ASLEEP, 0):
                sleep(me)


@compiled
def wake_helpers(team, n):
    for worker in range(1, n + 1):
        other = line(team, worker)
        if load(other + IS_ASLEEP):
            steer(team, other)
            wake(other)


def _steer(team, other):
    """Keep a helper off the caller's core, and on those that the caller may use.

    In a virtual machine an idle core can look taken, and Linux would wake the helper where the
    caller runs, in its place.
    """
    if sched_getaffinity(0, LINE, team + CPUS) == 0:
        cpu = sched_getcpu()
        cpus = team + CPUS + cpu // 64 * 8
        exchange(cpus, load(cpus) & ~(1 << cpu % 64))
        sched_setaffinity(load(other + THREAD), LINE, team + CPUS)


def _leave(team, other):
    """No system but Linux lets a thread choose its cores so."""


steer = compiled(_steer if ON_LINUX else _leave)


# The team of this process ------------------------------------------------------------------------

_raw = ctypes.pythonapi
_calloc = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t)(
    ("PyMem_RawCalloc", _raw)
)
_new_lock = ctypes.PYFUNCTYPE(ctypes.c_void_p)(("PyThread_allocate_lock", _raw))
_acquire = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)(
    ("PyThread_acquire_lock", _raw)
)
_release = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyThread_release_lock", _raw))


class Team:
    """Its words, which are never given back: threads may read them to the very end."""

    def __init__(self) -> None:
        self.lead = parts.entry(_lead, types.void(*[types.int64] * 5))
        self.serve = parts.entry(_serve, types.void(*[types.int64] * 2))
        self.address = -(-_calloc(1, WORKERS + (MOST_WORKERS + 1) * LINE) // LINE) * LINE
        self.helpers: list[threading.Thread] = []
        self.is_over = False
        self.locks = [_new_lock() for _ in range(MOST_WORKERS)]
        for worker, lock in enumerate(self.locks):
            _acquire(lock, 1)
            self.word(WORKERS + LINE * worker + LOCK).value = lock

    def word(self, offset: int) -> ctypes.c_int64:
        return ctypes.c_int64.from_address(self.address + offset)

    def grow(self, n_helpers: int) -> None:
        while len(self.helpers) < n_helpers and not self.is_over:
            helper = threading.Thread(target=self._help, name="mlp_backprop", daemon=True)
            self.helpers.append(helper)  # first, for Ctrl-C may come when it has started
            with suppress(RuntimeError):  # there can be no more threads: do with fewer
                helper.start()

    def _help(self) -> None:
        self.serve(self.address, threading.get_native_id())

    def stop(self) -> None:
        self.is_over = True
        self.word(STOPPED).value = 1
        for lock in self.locks[1:]:
            _release(lock)
        for helper in self.helpers:
            if helper.is_alive():
                helper.join()


def _lead(sources: int) -> Callable[..., None]:
    def lead_one(team, work, job, n_chunks, n_workers):
        _ = sources
        lead(team, work, job, n_chunks, n_workers)

    return lead_one


def _serve(sources: int) -> Callable[..., None]:
    def serve_one(team, thread):
        _ = sources
        serve(team, thread)

    return serve_one


_lock = threading.Lock()
_team: Team | None = None


def run(work: int, job: int, n_chunks: int, n_workers: int, rested: bool = False) -> None:
    """Call work(job, chunk, worker), a compiled function at an address, for every chunk.

    A worker, from 0 to n_workers - 1, is one thread at a time, and the caller is number 0. Returns
    when nothing runs any more; Ctrl-C is raised after that. `rested` is for callers who measure by
    themselves what helpers cost: what was lost before counts for nothing.
    """
    n_workers = min(n_workers, n_chunks, MOST_WORKERS)
    if MONOTONIC is None:
        threads.run_chunks(partial(_from_python(work), job), n_chunks, n_workers)
    else:
        team = _team_for(n_workers)
        if rested:
            team.word(REST).value = 0
        team.lead(team.address, work, job, n_chunks, n_workers)


def _team_for(n_workers: int) -> Team:
    global _team
    if _team is None or len(_team.helpers) < n_workers - 1:
        with _lock:
            _team = _team or Team()
            _team.grow(n_workers - 1)
    return _team


def _from_python(work: int) -> Any:
    return ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(work)


def _stop() -> None:
    """When Python ends: compiled code must not be taken away from under a thread."""
    if _team is not None:
        _team.stop()


def _after_fork() -> None:
    """A forked child has none of its parent's threads."""
    global _lock, _team
    _lock, _team = threading.Lock(), None


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

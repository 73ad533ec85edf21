"""Threads over chunks, and the limit on BLAS: nothing lost, nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
from numpy.testing import assert_array_equal
from oracles import make_problem

from mlp_backprop import compute_grads
from mlp_backprop.engines import threads
from mlp_backprop.engines.threads import blas_on_one_thread, run_chunks
from mlp_backprop.types import flat

needs_signals = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="this system has no signals to threads"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PATIENCE = 300  # seconds, at the end of which something hangs, on however busy a machine


@pytest.fixture
def blas_threads():
    """A function that reads how many threads BLAS may use; the limit tried here is 2."""
    threadpoolctl = pytest.importorskip("threadpoolctl")

    def read():
        return {library.get_num_threads() for library in threads._blas_libraries()}

    with threadpoolctl.threadpool_limits(2, user_api="blas"):
        if read() != {2}:
            pytest.skip("this BLAS cannot be given two threads")
        yield read


# Chunks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("n_chunks", [0, 1, 2, 5, 64])
def test_every_chunk_runs_once(n_chunks, n_workers):
    seen = []
    run_chunks(lambda chunk, worker: seen.append((chunk, worker)), n_chunks, n_workers)
    assert sorted(chunk for chunk, _ in seen) == list(range(n_chunks))
    assert {worker for _, worker in seen} <= set(range(n_workers))


def test_one_worker_is_the_caller_in_order():
    seen = []
    run_chunks(lambda chunk, worker: seen.append((chunk, threading.get_ident())), 5, 1)
    assert seen == [(chunk, threading.get_ident()) for chunk in range(5)]


def test_workers_run_at_the_same_time():
    meeting = threading.Barrier(2, timeout=PATIENCE)
    run_chunks(lambda chunk, worker: meeting.wait(), 2, 2)


def test_a_worker_is_one_thread_at_a_time():
    busy = [threading.Lock() for _ in range(3)]

    def task(chunk, worker):
        assert busy[worker].acquire(blocking=False)
        time.sleep(1e-4)
        busy[worker].release()

    run_chunks(task, 60, 3)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_comes_after_everything_has_stopped(error, failing, monkeypatch):
    # Chunks 0 and 1 start together; the one fails at once, the other is still at work when those
    # that wait have been dropped.
    meeting, dropped = threading.Barrier(2, timeout=PATIENCE), threading.Event()
    seen, finished = [], []

    class Waiting(deque):
        def clear(self):
            super().clear()
            dropped.set()

    def task(chunk, worker):
        seen.append(chunk)
        if chunk < 2:
            meeting.wait()
        if chunk == failing:
            raise error("the reason")
        assert dropped.wait(PATIENCE)
        time.sleep(0.05)
        finished.append(chunk)

    monkeypatch.setattr(threads, "deque", Waiting)
    with pytest.raises(error, match="the reason"):
        run_chunks(task, 100, 2)
    assert finished == [1 - failing]
    assert sorted(seen) == [0, 1]
    time.sleep(0.05)
    assert sorted(seen) == [0, 1]


@needs_signals
def test_ctrl_c_while_waiting_comes_after_everything_has_stopped(monkeypatch):
    # The caller's own chunk is done, and it waits for the other when the interrupt comes.
    meeting, waits = threading.Barrier(2, timeout=PATIENCE), threading.Event()
    finished, wait = [], threads.wait

    def noted(futures):
        waits.set()
        return wait(futures)

    def task(chunk, worker):
        meeting.wait()
        if threading.current_thread() is not threading.main_thread():
            assert waits.wait(PATIENCE)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            time.sleep(0.05)
            finished.append(chunk)

    monkeypatch.setattr(threads, "wait", noted)
    # A process that a shell began in the background ignores Ctrl-C, unless it is told otherwise.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run_chunks(task, 2, 2)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert len(finished) == 1


def test_calls_from_many_threads_and_from_within_a_task_finish():
    # More callers than the pool has threads, each with calls inside its calls.
    counts = []

    def inner(chunk, worker):
        counts.append(1)

    def outer(chunk, worker):
        run_chunks(inner, 3, 4)

    with ThreadPoolExecutor(80) as callers:
        for call in [callers.submit(run_chunks, outer, 5, 4) for _ in range(80)]:
            call.result(timeout=PATIENCE)
    assert len(counts) == 80 * 5 * 3


def test_the_number_of_threads_is_read_at_every_call(monkeypatch):
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    assert threads.thread_count() == threads.usable_cpus() >= 1
    for setting in ("1", "3", "100"):
        monkeypatch.setenv(threads.VARIABLE, setting)
        assert threads.thread_count() == int(setting)


@pytest.mark.parametrize("setting", ["", "0", "-1", "two", "1.5", "²"])
def test_a_bad_number_of_threads(setting, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, setting)
    with pytest.raises(ValueError, match=rf"{threads.VARIABLE} must be a whole number .*{setting}"):
        threads.thread_count()


def test_a_bad_number_of_threads_stops_compute_grads(blas_threads, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "two")
    with pytest.raises(ValueError, match=r"must be a whole number from 1, got 'two'"):
        run(make_problem((2, 10, 5, 1), 100_000))
    assert blas_threads() == {2}


# The limit on BLAS -------------------------------------------------------------------------------


def test_blas_is_held_and_let_go(blas_threads):
    with blas_on_one_thread():
        assert blas_threads() == {1}
    assert blas_threads() == {2}


def test_interleaved_callers_do_not_undo_one_another(blas_threads):
    # Each is a thread of its own, still alive when the last one leaves.
    first, second = blas_on_one_thread(), blas_on_one_thread()
    with ThreadPoolExecutor(1) as first_thread, ThreadPoolExecutor(1) as second_thread:
        first_thread.submit(first.__enter__).result()
        assert blas_threads() == {1}
        second_thread.submit(second.__enter__).result()
        first_thread.submit(first.__exit__, None, None, None).result()
        assert blas_threads() == {1}
        second_thread.submit(second.__exit__, None, None, None).result()
        assert blas_threads() == {2}


def test_the_limit_stays_free_for_others(blas_threads):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with ThreadPoolExecutor(1) as caller:
        caller.submit(run, make_problem((2, 10, 5, 1), 10_000)).result()
        with threadpoolctl.threadpool_limits(1, user_api="blas"):
            assert blas_threads() == {1}
        assert blas_threads() == {2}


def test_many_threads_at_once_leave_the_limit_as_it_was(blas_threads):
    def hold(_):
        for _ in range(100):
            with blas_on_one_thread():
                assert blas_threads() == {1}

    with ThreadPoolExecutor(8) as callers:
        list(callers.map(hold, range(8)))
    assert blas_threads() == {2}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_lets_blas_go(error, blas_threads):
    with pytest.raises(error), blas_on_one_thread():
        raise error
    assert blas_threads() == {2}


def test_without_threadpoolctl_nothing_is_held_and_no_thread_is_used(blas_threads, monkeypatch):
    problem = make_problem((2, 10, 5, 1), 100_000)
    expected = run(problem)
    monkeypatch.setattr(threads, "_blas_libraries", list)
    used = []

    def counting(task, n_chunks, n_workers):
        used.append(n_workers)
        run_chunks(task, n_chunks, n_workers)

    monkeypatch.setattr(threads, "run_chunks", counting)
    monkeypatch.setenv(threads.VARIABLE, "4")
    assert_same_bits(run(problem), expected)
    assert used == [1]
    with blas_on_one_thread():
        assert not threads.can_limit_blas()
    monkeypatch.undo()
    assert blas_threads() == {2}


def test_threads_are_used_where_it_pays(blas_threads, monkeypatch):
    seen = set()

    def watching(task, n_chunks, n_workers):
        seen.add(n_workers)
        run_chunks(task, n_chunks, n_workers)
        assert blas_threads() == {1}

    monkeypatch.setattr(threads, "run_chunks", watching)
    monkeypatch.setenv(threads.VARIABLE, "3")
    run(make_problem((2, 10, 5, 1), 100_000))
    assert seen == {3}


# compute_grads -----------------------------------------------------------------------------------


def run(problem):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options)


def assert_same_bits(got, expected):
    for A, B in zip(flat(got.grads), flat(expected.grads), strict=True):
        assert_array_equal(A, B)
    assert got.loss == expected.loss


@pytest.mark.parametrize("n", [5, 1000, 100_000])
def test_calls_from_several_threads_at_once(n, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "3")
    problems = [make_problem((2, 10, 5, 1), n, seed=seed) for seed in range(4)]
    expected = [run(problem) for problem in problems]
    with ThreadPoolExecutor(8) as callers:
        results = list(callers.map(run, problems * 4))
    for got, answer in zip(results, expected * 4, strict=True):
        assert_same_bits(got, answer)


# Forks and signals -------------------------------------------------------------------------------

SCRIPT = """
import os, random, signal, threading
import numpy as np
from mlp_backprop import compute_grads, init_params
from mlp_backprop.engines import threads

rng = np.random.default_rng(0)
params = init_params([2, 10, 5, 1], rng)
X, y = rng.normal(size=(200_000, 2)), rng.normal(size=(200_000, 1))

def gradients():
    loss, grads = compute_grads(params, X, y)
    return b"".join([loss.tobytes(), *(A.tobytes() for layer in grads for A in layer)])

def blas_threads():
    return [library.get_num_threads() for library in threads._blas_libraries()]

for library in threads._blas_libraries():
    library.set_num_threads(2)
before = blas_threads()

def fork_and(check):
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        os._exit(0 if check() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

def is_as_before():
    with threads.blas_on_one_thread():
        is_held = set(blas_threads()) <= {1}
    return is_held and gradients() == expected and blas_threads() == before
"""


def assert_runs(script):
    """In a process of its own, with threads over chunks."""
    environment = os.environ | {threads.VARIABLE: "3"}
    command = [sys.executable, "-c", SCRIPT + script]
    process = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout == "done\n"


@needs_fork
def test_a_fork_computes_and_so_does_its_parent():
    assert_runs("""
expected = gradients()
fork_and(is_as_before)
assert is_as_before()
print("done")
""")


@needs_fork
def test_a_fork_while_others_compute():
    assert_runs("""
expected = gradients()
stop = threading.Event()

def compute():
    while not stop.is_set():
        gradients()

others = [threading.Thread(target=compute, daemon=True) for _ in range(2)]
for other in others:
    other.start()
for _ in range(5):
    fork_and(is_as_before)
stop.set()
for other in others:
    other.join()
assert is_as_before()
print("done")
""")


@needs_fork
def test_a_fork_lets_go_what_another_thread_held():
    assert_runs("""
expected = gradients()
inside, leave = threading.Event(), threading.Event()

def hold():
    with threads.blas_on_one_thread():
        inside.set()
        leave.wait()

holder = threading.Thread(target=hold, daemon=True)
holder.start()
inside.wait()
assert set(blas_threads()) <= {1}
fork_and(lambda: blas_threads() == before and is_as_before())
leave.set()
holder.join()
assert is_as_before()
print("done")
""")


@needs_signals
@pytest.mark.parametrize("n", [2000, 200_000])
def test_ctrl_c_leaves_nothing_broken(n):
    # With few rows it often comes while BLAS is being held or let go.
    assert_runs(
        f"X, y = X[:{n}], y[:{n}]"
        """
expected = gradients()
random.seed(0)
signal.signal(signal.SIGINT, signal.default_int_handler)
for _ in range(30):
    ctrl_c = (os.kill, (os.getpid(), signal.SIGINT))
    try:
        threading.Timer(random.uniform(0.001, 0.02), *ctrl_c).start()
        while True:
            gradients()
    except KeyboardInterrupt:
        pass
    assert is_as_before()
print("done")
"""
    )

"""Threads over chunks, and BLAS held to one thread: nothing lost, nothing left behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import bench_load
import numpy as np
import pytest
from bench_load import arrays_of
from numpy.testing import assert_allclose, assert_array_equal
from oracles import make_problem

from mlp_backprop import (
    backprop,
    clipped_grads,
    compute_grads,
    forward,
    hvp,
    input_grads,
    jacobian,
    jvp,
    laplacian,
    ntk,
    prepare_grads,
    sobolev_grads,
    vjp,
)
from mlp_backprop.bench.contenders import Task
from mlp_backprop.engines import numpy_products, numpy_tiles, schedule, threads
from mlp_backprop.engines.threads import blas_on_one_thread, run_chunks
from mlp_backprop.maths import row_blocks, samples, tangents
from mlp_backprop.types import Layer, flat

# A wide net, and others with products of a size that BLAS would divide.
WIDE = make_problem((100, 170, 2), n=60)
SMALL = make_problem((20, 30, 4), n=20)
HALF = make_problem((20, 30, 4), n=20, dtype=np.float16)

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
@pytest.mark.parametrize("problem", [make_problem((8, 32, 32, 1), n=500), WIDE])
def test_an_exception_that_is_kept_does_not_keep_blas(problem, error, blas_threads, monkeypatch):
    # With its traceback it keeps every frame that it came through.
    def clipped_sums(*_):
        raise error("in the middle")

    monkeypatch.setattr(samples, "clipped_sums", clipped_sums)
    with pytest.raises(error, match="in the middle") as kept:
        clipped_grads(problem.params, problem.X, problem.y, max_norm=1.0)
    assert kept.value.__traceback__ is not None
    assert not threads._inside
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


# No public function uses BLAS's threads ----------------------------------------------------------


def net_and_loss(function, *more, problem):
    return lambda: function(problem.params, problem.X, problem.y, *more)


def calls(problem):
    """Every public function but for two, as far as its result has a sensible size."""
    params = [Layer(*layer) for layer in problem.params]
    return bench_load.calls(Task(params, problem.X, problem.y, "sigmoid", "squared_error"))


# On NumPy's arrays, with products that BLAS would divide: of a wide net where a short pass of the
# other takes none.
CALLS = {
    **calls(SMALL),
    **calls(WIDE),
    "compute_grads": net_and_loss(compute_grads, problem=WIDE),
    "compute_grads, half precision": net_and_loss(compute_grads, problem=HALF),
    "prepare_grads": lambda: prepare_grads(WIDE.params, n=60)(WIDE.params, WIDE.X, WIDE.y),
    "clipped_grads, half precision": lambda: clipped_grads(*HALF[:3], max_norm=1.0),
    "hvp, half precision": net_and_loss(hvp, HALF.params, problem=HALF),
}


@pytest.fixture
def seen(blas_threads, monkeypatch):
    """The numbers of threads that BLAS had at the first product of every pass."""
    numbers = []

    def watched(function):
        def watching(*args):
            numbers.append(blas_threads())
            return function(*args)

        return watching

    for owner, name in (
        (numpy_tiles.TiledRun, "_forward"),
        (numpy_products.ProductRun, "_up"),
        (backprop, "forward"),
        (tangents, "tangents"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    return numbers


@pytest.mark.parametrize("name", CALLS)
def test_products_are_formed_on_one_thread_of_blas(name, seen, blas_threads):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    got = CALLS[name]()
    assert seen
    assert all(number == {1} for number in seen)
    assert blas_threads() == {2}
    with threadpoolctl.threadpool_limits(1, user_api="blas"):
        expected = CALLS[name]()
    for A, answer in zip(arrays_of(got), arrays_of(expected), strict=True):
        assert_array_equal(A, answer)


def test_small_products_need_no_hold(seen):
    # It would take longer than they do.
    few = make_problem((20, 30, 4), n=5)
    run(few)
    forward(few.params, few.X)
    hvp(few.params, few.X, few.y, few.params)
    assert seen == [{2}] * 3


def test_those_who_hold_blas_are_inside_together(blas_threads):
    meeting = threading.Barrier(2, timeout=PATIENCE)

    def meet(_):
        with blas_on_one_thread():
            meeting.wait()

    with ThreadPoolExecutor(2) as callers:
        list(callers.map(meet, range(2)))
    assert blas_threads() == {2}


def test_a_call_within_a_call_leaves_blas_to_the_outer(blas_threads):
    with blas_on_one_thread():
        with blas_on_one_thread():
            assert blas_threads() == {1}
        assert blas_threads() == {1}
    assert blas_threads() == {2}
    assert not threads._inside


def test_identical_calls_beside_others_give_identical_bits(blas_threads):
    # With OpenBLAS the first has other bits on one thread than on two.
    wide = make_problem((784, 128, 64, 10), 256, dtype=np.float32)
    narrow = make_problem((2, 10, 5, 1), 20_000)
    expected = run(wide), run(narrow)

    def repeat(problem, answer):
        for _ in range(10):
            assert_same_bits(run(problem), answer)

    with ThreadPoolExecutor(4) as callers:
        list(callers.map(repeat, (wide, narrow) * 2, expected * 2))
    assert blas_threads() == {2}


def test_a_limit_of_the_users_that_was_set_meanwhile_is_kept(blas_threads):
    with blas_on_one_thread():
        for library in threads._blas_libraries():
            threads._set_blas_threads(library, 3)
    assert blas_threads() == {3}


def test_a_limit_of_the_users_that_ended_meanwhile_does_not_come_back(blas_threads):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    limit = threadpoolctl.threadpool_limits(1, user_api="blas")
    with blas_on_one_thread():
        limit.restore_original_limits()
    assert blas_threads() == {2}


# Blocks of rows -----------------------------------------------------------------------------------

MANY = make_problem((20, 30, 4), n=500)
IN_BLOCKS = {
    "forward": lambda: forward(MANY.params, MANY.X),
    "input_grads": lambda: input_grads(MANY.params, MANY.X, MANY.y),
    "jacobian": lambda: jacobian(MANY.params, MANY.X),
    "laplacian": lambda: laplacian(MANY.params, MANY.X),
    "sobolev_grads": lambda: sobolev_grads(
        MANY.params, MANY.X, MANY.y, np.zeros((500, 4, 20)), activation="tanh"
    ),
    "jvp": lambda: jvp(MANY.params, MANY.X, MANY.params),
    "vjp": lambda: vjp(MANY.params, MANY.X, MANY.y),
    "ntk": lambda: ntk(MANY.params, MANY.X[:60], MANY.X[:7]),
}


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_no_number_of_threads_changes_a_bit_of_blocks(name, blas_threads, monkeypatch):
    whole = IN_BLOCKS[name]()
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 20_000)
    workers, results = [], []

    def counting(task, n_chunks, n_workers):
        assert n_chunks > 2
        assert blas_threads() == {1}
        workers.append(n_workers)
        run_chunks(task, n_chunks, n_workers)

    monkeypatch.setattr(threads, "run_chunks", counting)
    for setting in ("1", "2", "7"):
        monkeypatch.setenv(threads.VARIABLE, setting)
        results.append(arrays_of(IN_BLOCKS[name]()))
    assert workers == [1, 2, 7]
    assert blas_threads() == {2}
    for result in results:
        for A, first, all_rows in zip(result, results[0], arrays_of(whole), strict=True):
            assert_array_equal(A, first)
            assert_allclose(A, all_rows, rtol=1e-10, atol=1e-10)


def test_no_thread_over_blocks_warns_of_infinities(monkeypatch):
    # NumPy's settings of what to warn of are each thread's own.
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setenv(threads.VARIABLE, "4")
    X = np.tile([np.inf, -np.inf], (500, 10))
    jvp(SMALL.params, X, SMALL.params)


def test_sums_over_blocks_are_few(monkeypatch):
    # Of each thread that adds some up, and no matter how many rows there are.
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(schedule, "CHUNK_BYTES", 8 * 3 * 800)
    shares = []
    monkeypatch.setattr(
        threads,
        "run_chunks",
        lambda task, n_chunks, n: shares.append(n_chunks) or run_chunks(task, n_chunks, n),
    )
    vjp(MANY.params, MANY.X, MANY.y)
    assert shares == [3]


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

"""Compiled work shared out among helpers: nothing lost, nobody waited for, no trace left."""

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop.engines import threads  # noqa: E402
from mlp_backprop.engines.compiled import team  # noqa: E402
from mlp_backprop.engines.compiled.team import add, exchange, load  # noqa: E402

needs_team = pytest.mark.skipif(
    team.MONOTONIC is None, reason="this system has no clock for compiled code"
)
needs_signals = pytest.mark.skipif(
    not hasattr(signal, "pthread_kill"), reason="this system has no signals to threads"
)
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

PATIENCE = 300  # seconds, at the end of which something hangs, on however busy a machine

# A job is an array of words: those of the work, and from word MOST on three of every chunk.
N_TERMS, INSIDE, GATE, TEAM = range(0, 32, 8)
MOST = 16
COUNT, WORKER, SUM = range(0, 24, 8)


@numba.njit
def wait_for(address, value):
    """Until so much is there; in vain for minutes at the most, so that a test fails and ends."""
    for _ in range(1 << 36):
        if load(address) >= value:
            break


@numba.njit
def sum_terms(job, chunk, worker):
    """A sum of the chunk's own, whose bits depend on the order of its terms."""
    n = load(job + N_TERMS)
    total = 0.0
    for k in range(1 + chunk * n, 1 + (chunk + 1) * n):
        total += 1 / k**1.5
    own = job + 8 * (MOST + 3 * chunk)
    exchange(own + SUM, np.float64(total).view(np.int64))
    exchange(own + WORKER, worker)
    add(own + COUNT, 1)


@numba.cfunc(team.WORK)
def sums(job, chunk, worker):
    sum_terms(job, chunk, worker)


@numba.cfunc(team.WORK)
def meeting(job, chunk, worker):
    """No chunk ends before as many are at work as the gate says."""
    add(job + INSIDE, 1)
    wait_for(job + INSIDE, load(job + GATE))
    sum_terms(job, chunk, worker)


@numba.cfunc(team.WORK)
def racing(job, chunk, worker):
    """Two workers set out for the other chunks together."""
    if chunk < 2:
        add(job + INSIDE, 1)
        wait_for(job + INSIDE, 2)
    sum_terms(job, chunk, worker)


@numba.cfunc(team.WORK)
def gated(job, chunk, worker):
    """No chunk ends before the gate is opened."""
    add(job + INSIDE, 1)
    wait_for(job + GATE, 1)
    sum_terms(job, chunk, worker)


@numba.cfunc(team.WORK)
def outlasting(job, chunk, worker):
    """Two chunks meet, and that of a helper ends when the caller has gone to sleep."""
    add(job + INSIDE, 1)
    wait_for(job + INSIDE, 2)
    if worker != 0:
        wait_for(load(job + TEAM) + team.WORKERS + team.IS_ASLEEP, 1)
    sum_terms(job, chunk, worker)


class Job:
    def __init__(self, n_chunks, n_terms=100, gate=0):
        self.words = np.zeros(MOST + 3 * n_chunks, np.int64)
        self.words[:3] = n_terms, 0, gate
        self.address = self.words.ctypes.data
        self.n_chunks = n_chunks

    def run(self, work, n_workers):
        team.run(work.address, self.address, self.n_chunks, n_workers)
        return self

    @property
    def chunks(self):
        return self.words[MOST:].reshape(-1, 3)

    def assert_done(self, n_workers):
        assert (self.chunks[:, 0] == 1).all()
        assert set(self.chunks[:, 1]) <= set(range(n_workers))
        return self

    def assert_met(self, n_workers):
        """All at once, each with a chunk."""
        self.assert_done(n_workers)
        assert sorted(self.chunks[:, 1]) == list(range(n_workers))

    def total(self):
        """The sums of the chunks, added in their order."""
        return sum(self.chunks[:, 2].copy().view(np.float64))


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


@pytest.fixture
def fresh_team(monkeypatch):
    """A function that gives a team with so many helpers, all there, and no time to make up for."""
    teams = []

    def make(n_helpers):
        monkeypatch.setattr(team, "_team", None)
        made = team._team_for(n_helpers + 1)
        teams.append(made)
        wait_until(lambda: made.word(team.N_HELPERS).value == n_helpers)
        return made

    yield make
    for made in teams:
        made.stop()


# The work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_workers", [1, 2, 8, 1000])
@pytest.mark.parametrize("n_chunks", [0, 1, 2, 5, 100])
def test_every_chunk_is_done_once(n_chunks, n_workers):
    for _ in range(20):
        Job(n_chunks).run(sums, n_workers).assert_done(n_workers)


def test_no_number_of_workers_changes_a_bit():
    expected = Job(7, 1000).run(sums, 1).total()
    assert expected == pytest.approx(sum(1 / k**1.5 for k in range(1, 7001)), rel=1e-13)
    for n_workers in (2, 3, 8) * 20:
        assert Job(7, 1000).run(sums, n_workers).total() == expected


@pytest.mark.parametrize("setting", ["1", "2", "8"])
def test_the_variable_says_how_many(setting, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, setting)
    Job(20).run(sums, threads.thread_count()).assert_done(int(setting))


@needs_team
@pytest.mark.parametrize("n_workers", [2, 3, 8])
def test_workers_work_at_the_same_time(n_workers, fresh_team):
    fresh_team(n_workers - 1)
    Job(n_workers, gate=n_workers).run(meeting, n_workers).assert_met(n_workers)


@needs_team
def test_no_chunk_is_given_to_two(fresh_team):
    made = fresh_team(1)
    for _ in range(5):
        made.word(team.REST).value = 0
        Job(10_000, n_terms=1).run(racing, 2).assert_done(2)


@needs_team
def test_a_helper_that_is_not_asked_for_takes_nothing(fresh_team):
    made = fresh_team(2)
    asleep = made.word(team.WORKERS + 2 * team.LINE + team.IS_ASLEEP)
    wait_until(lambda: asleep.value)
    job = Job(3)
    with ThreadPoolExecutor(1) as caller:
        result = caller.submit(job.run, gated, 2)
        wait_until(lambda: job.words[1] == 2)
        asleep.value = 0
        team._release(made.locks[2])
        wait_until(lambda: asleep.value or job.words[1] > 2)
        assert job.words[1] == 2
        job.words[2] = 1
        result.result(PATIENCE).assert_done(2)


@needs_team
def test_helpers_come_again_when_they_have_slept(fresh_team):
    made = fresh_team(1)
    helper = team.WORKERS + team.LINE
    for _ in range(10):
        wait_until(lambda: made.word(helper + team.IS_ASLEEP).value)
        made.word(team.REST).value = 0
        Job(2, gate=2).run(meeting, 2).assert_met(2)


def test_where_compiled_code_has_no_clock_a_pool_does_it(monkeypatch):
    expected = Job(7).run(sums, 1).total()
    monkeypatch.setattr(team, "MONOTONIC", None)
    monkeypatch.setattr(team, "_team_for", None)
    assert Job(7).run(sums, 3).assert_done(3).total() == expected
    Job(3, gate=3).run(meeting, 3).assert_met(3)


# Calls beside others -----------------------------------------------------------------------------


@needs_team
def test_a_second_caller_does_not_wait_for_the_first(fresh_team):
    fresh_team(1)
    first = Job(2)
    with ThreadPoolExecutor(1) as caller:
        result = caller.submit(first.run, gated, 2)
        wait_until(lambda: first.words[1] == 2)
        second = Job(5).run(sums, 2).assert_done(1)
        assert not result.done()
        first.words[2] = 1
        result.result(PATIENCE).assert_done(2)
    assert set(second.chunks[:, 1]) == {0}


@pytest.mark.parametrize("n_workers", [2, 8])
def test_calls_from_many_threads_at_once(n_workers):
    expected = Job(7).run(sums, 1).total()

    def repeat(_):
        for _ in range(300):
            assert Job(7).run(sums, n_workers).assert_done(n_workers).total() == expected

    with ThreadPoolExecutor(8) as callers:
        for _ in callers.map(repeat, range(8)):
            pass


# What helpers cost -------------------------------------------------------------------------------


@needs_team
def test_time_lost_by_a_late_helper_is_made_up_for_by_work_without(fresh_team):
    made = fresh_team(1)
    job = Job(2)
    job.words[TEAM // 8] = made.address
    job.run(outlasting, 2).assert_done(2)
    lost = made.word(team.REST).value
    assert lost >= team.PAY * team.PATIENCE
    assert set(Job(20).run(sums, 2).assert_done(2).chunks[:, 1]) == {0}
    assert made.word(team.REST).value < lost
    made.word(team.REST).value = 0
    Job(2, gate=2).run(meeting, 2).assert_met(2)


@needs_team
def test_a_helper_that_has_slept_through_a_job_costs_what_waking_it_took(fresh_team):
    made = fresh_team(1)
    helper = team.WORKERS + team.LINE
    wait_until(lambda: made.word(helper + team.IS_ASLEEP).value)
    made.word(helper + team.IS_ASLEEP).value = 0  # so nobody wakes it
    Job(20, n_terms=1).run(sums, 2).assert_done(1)
    assert made.word(team.REST).value > 0
    made.word(helper + team.IS_ASLEEP).value = 1


@needs_team
@pytest.mark.skipif(not team.ON_LINUX, reason="only Linux lets a thread choose its cores")
def test_a_helper_is_kept_off_the_callers_core_and_on_its_cores(fresh_team):
    cores = os.sched_getaffinity(0)
    if len(cores) == 1:
        pytest.skip("one core")
    made = fresh_team(1)
    helper = team.WORKERS + team.LINE
    wait_until(lambda: made.word(helper + team.IS_ASLEEP).value)
    own = min(cores)
    try:
        os.sched_setaffinity(0, {own, max(cores)})
        Job(2, gate=2).run(meeting, 2).assert_met(2)
        (left,) = os.sched_getaffinity(made.helpers[0].native_id)
    finally:
        os.sched_setaffinity(0, cores)
    assert left in {own, max(cores)}


# Forks, signals, the end -------------------------------------------------------------------------


@needs_team
@needs_signals
def test_ctrl_c_comes_when_nothing_runs_any_more(fresh_team):
    fresh_team(1)
    job = Job(2)

    def interrupt():
        wait_until(lambda: job.words[1] == 2)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        job.words[2] = 1

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with ThreadPoolExecutor(1) as other:
            other.submit(interrupt)
            with pytest.raises(KeyboardInterrupt):
                job.run(gated, 2)
    finally:
        signal.signal(signal.SIGINT, handler)
    job.assert_done(2)
    team._team.word(team.REST).value = 0
    Job(2, gate=2).run(meeting, 2).assert_met(2)


SCRIPT = """
import atexit, os, signal, sys, threading

at_the_very_end = []
atexit.register(lambda: [act() for act in at_the_very_end])  # after what is registered later

sys.path.insert(0, sys.argv[1])
from test_team import Job, gated, meeting, sums, team, wait_until

def meet():
    # Two workers, whatever was lost before; and nothing to make up for.
    made = team._team_for(2)
    wait_until(lambda: made.word(team.N_HELPERS).value)
    made.word(team.REST).value = 0
    Job(2, gate=2).run(meeting, 2).assert_met(2)
    made.word(team.REST).value = 0

def fork_and(check):
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        check()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


def assert_runs(script):
    """In a process of its own, which comes to its end."""
    # Newer Pythons warn of every fork beside threads.
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT + script, str(Path(__file__).parent)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert process.returncode == 0, process.stderr
    assert (process.stdout, process.stderr) == ("done\n", "")


@needs_team
@needs_fork
def test_a_fork_has_helpers_of_its_own_and_so_has_its_parent():
    assert_runs("""
meet()
parents = team._team
fork_and(lambda: meet() or team._team is not parents or os._exit(1))
meet()
assert team._team is parents
print("done")
""")


@needs_team
@needs_fork
def test_a_fork_while_another_thread_has_the_helpers():
    assert_runs("""
meet()
job = Job(2)
other = threading.Thread(target=job.run, args=(gated, 2))
other.start()
wait_until(lambda: job.words[1] == 2)
fork_and(meet)
job.words[2] = 1
other.join()
meet()
print("done")
""")


@needs_team
@pytest.mark.parametrize(
    "before",
    [
        "meet(); wait_until(lambda: team._team.word(team.WORKERS + team.LINE).value)",  # asleep
        "[Job(50).run(sums, 8) for _ in range(20)]",  # on their way, or looking out
        "team._team_for(8)",  # just begun
        "pass",  # never called
    ],
)
def test_python_ends(before):
    assert_runs(f"{before}\nprint('done')\n")


@needs_team
def test_python_ends_while_a_helper_is_at_work():
    assert_runs("""
meet()
job = Job(2)
other = threading.Thread(target=job.run, args=(gated, 2), daemon=True)
other.start()
wait_until(lambda: job.words[1] == 2)

def open_the_gate():
    job.words[2] = 1
    other.join()
    job.assert_done(2)

atexit.register(open_the_gate)
print("done")
""")


@needs_team
def test_no_helper_is_left_at_the_very_end_and_calls_work_alone():
    assert_runs("""
meet()

def check():
    assert len(team._team.helpers) == 1
    assert not team._team.helpers[0].is_alive()
    Job(20).run(sums, 8).assert_done(1)
    assert len(team._team.helpers) == 1
    print("done")

at_the_very_end.append(check)
""")

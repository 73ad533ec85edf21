"""The steps of training, for one member: what a thread does from a clock's stroke to the next.

maths/runs.py says what a step is, step_parts.py does its parts, records.py says what is where.
"""

from collections.abc import Callable
from math import isfinite, sqrt

from numba import types

from mlp_backprop.engines.compiled import team
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import job_at
from mlp_backprop.engines.compiled.records import (
    CHUNK,
    DATA_BYTES,
    EPOCH,
    FRAME_BYTES,
    JUDGE,
    MEMBER_BYTES,
    N_DRAWN,
    REDUCE,
    SWA,
    UPDATE,
    WORDS,
    data_at,
    floats,
    frame_at,
    integers,
    member_at,
    run_at,
    squares_of,
)
from mlp_backprop.engines.compiled.rows import copy
from mlp_backprop.engines.compiled.step_parts import towards
from mlp_backprop.engines.compiled.tiles import ONE
from mlp_backprop.engines.compiled.vectors import call, pointer, shifted
from mlp_backprop.maths.runs import DIVERGED, FINISHED, RUNNING, STOPPED
from mlp_backprop.types import DType

LEADING, PUBLISH = types.void(*[types.int64] * 3), types.void(*[types.int64] * 2)

# Where threads meet, each word in a line of the cache of its own.
TICKET, DONE, CLOSED, MEETING_BYTES = range(0, 512, 128)
SPINS = 4000  # two microseconds or so
sched_yield = types.ExternalFunction("sched_yield", types.int32())


# A step ------------------------------------------------------------------------------------------


@compiled
def share(run, frame, kind, n_parts):
    """All parts of a kind, with helpers if they come: nobody is waited for but who has taken one.

    A ticket holds how many parts there are, and how many have been taken. It is unlike all others:
    who comes late cannot take a part of one for a part of the next.
    """
    frame.kind = kind
    if run.meeting == 0 or n_parts == 1:
        for part in range(n_parts):
            call(run.part, (run.address, frame.address, part, frame.worker))
        return
    team.exchange(run.meeting + DONE, 0)
    serial = (team.load(run.meeting + TICKET) >> 32) + 1
    team.exchange(run.meeting + TICKET, (serial << 32) | (n_parts << 16))
    take_parts(run, frame, frame.worker)
    n_spins = 0
    while team.load(run.meeting + DONE) != n_parts:
        n_spins = rest(n_spins)


@compiled
def take_parts(run, frame, worker):
    """Take parts until none is left."""
    ticket = team.add(run.meeting + TICKET, 1)
    while taken_of(ticket) < parts_of(ticket):
        call(run.part, (run.address, frame.address, taken_of(ticket), worker))
        team.add(run.meeting + DONE, 1)
        ticket = team.add(run.meeting + TICKET, 1)


@compiled
def parts_of(ticket):
    return (ticket >> 16) & 0xFFFF


@compiled
def taken_of(ticket):
    return ticket & 0xFFFF


@compiled
def rest(n_spins):
    """Spin for a moment; after that let others have the core, who may be waited for."""
    if n_spins >= SPINS:
        sched_yield()
    return n_spins + 1


@compiled
def help(run, worker):
    """Take parts of the leader's steps until the slice is over."""
    frame, n_spins = frame_at(run.frames), 0
    while not team.load(run.meeting + CLOSED):
        ticket = team.load(run.meeting + TICKET)
        if taken_of(ticket) < parts_of(ticket):
            take_parts(run, frame, worker)
            n_spins = 0
        n_spins = rest(n_spins)


@compiled
def take_step(run, member, frame, A, epoch, k):
    """The k-th of an epoch; False where loss or gradient is not finite, and none is taken."""
    data = data_at(run.data + frame.member * DATA_BYTES)
    first = k * run.batch_size
    frame.n = min(run.batch_size, data.n - first)
    frame.rows = member.orders + 8 * ((epoch % member.n_orders) * data.n + first)
    frame.chunk_rows, frame.layers = member.chunk_rows, member.layers
    frame.n_chunks = (frame.n + frame.chunk_rows - 1) // frame.chunk_rows
    share(run, frame, CHUNK, frame.n_chunks)
    frame.factor = 1 / (frame.n * member.mean_weight)
    share(run, frame, REDUCE, run.n_ranges)
    squares, loss, weight = 0.0, 0.0, 0.0
    for part in range(run.n_ranges):
        squares += floats(squares_of(run, frame, A))[part]
    for chunk in range(frame.n_chunks):
        last = shifted(floats(frame.sums), (chunk + 1) * (run.n_params + 2) - 2)
        loss += last[0]
        weight += last[1]
    norm = sqrt(squares)
    if not isfinite(loss + norm):
        return False
    frame.clip = run.max_grad_norm / norm if norm > run.max_grad_norm else 1.0
    frame.rate, frame.t = member.rates + 8 * frame.step, frame.step + 1
    share(run, frame, UPDATE, run.n_ranges)
    frame.loss_sum += loss
    frame.weight_sum += weight
    frame.grad_norm = norm
    frame.step += 1
    return True


# The end of an epoch -----------------------------------------------------------------------------


@compiled
def end_epoch(run, member, frame, A, e, now):
    """The row of history, the average, the judgement; who goes on."""
    epoch = frame.step // member.steps_per_epoch
    row, status = epoch * run.n_members + e, integers(run.status)
    floats(run.loss)[row] = frame.loss_sum / frame.weight_sum
    floats(run.learning_rate)[row] = floats(member.rates)[frame.step - 1]
    floats(run.grad_norms)[row] = frame.grad_norm
    frame.loss_sum = frame.weight_sum = 0.0
    if run.kind_of_average == SWA:
        average_ends(run, A, e, epoch)
    if run.validation:
        judge(run, member, frame, A, e, epoch)
    if epoch == run.epochs:
        status[e] = FINISHED
    elif 0 <= run.patience <= epoch - integers(run.best_epoch)[e]:
        status[e] = STOPPED
    floats(run.seconds)[row] = run.elapsed + (team.now(now) - run.began) * 1e-9


@compiled
def average_ends(run, A, e, epoch):
    """The mean of the vectors at the ends of the last epochs; before these, the vector."""
    n = run.n_params
    average = shifted(pointer(A, run.average), e * n)
    p, n_averaged = shifted(pointer(A, run.vector), e * n), integers(run.n_averaged)
    if epoch <= run.first_averaged:
        n_averaged[e] = 1
        copy(average, p, ONE, n, n)
    else:
        n_averaged[e] += 1
        towards(average, p, type(A[0])(1 / n_averaged[e]), n)


@compiled
def judge(run, member, frame, A, e, epoch):
    """The loss over the validation rows; the best net so far."""
    data = data_at(run.validation + e * DATA_BYTES)
    frame.n, frame.rows, frame.layers = data.n, data.rows, member.judged
    frame.chunk_rows = member.validation_chunk_rows
    n_chunks = (frame.n + frame.chunk_rows - 1) // frame.chunk_rows
    share(run, frame, JUDGE, n_chunks)
    loss, weight = 0.0, 0.0
    for chunk in range(n_chunks):
        loss += floats(frame.sums)[2 * chunk]
        weight += floats(frame.sums)[2 * chunk + 1]
    loss /= weight
    floats(run.validation_loss)[epoch * run.n_members + e] = loss
    if loss < floats(run.best_loss)[e]:
        n = run.n_params
        judged = pointer(A, run.average if run.kind_of_average else run.vector)
        copy(shifted(pointer(A, run.best), e * n), shifted(judged, e * n), ONE, n, n)
        floats(run.best_loss)[e], integers(run.best_epoch)[e] = loss, epoch


# A slice of time ---------------------------------------------------------------------------------


@compiled
def begin(run, frame, e, worker):
    """In a frame of the worker's own, for states of members lie too close for threads."""
    frame.address, frame.worker, frame.member = run.frames + worker * FRAME_BYTES, worker, e
    frame.sums = run.sums + worker * run.sums_bytes
    frame.g = run.grads + worker * run.grads_bytes
    frame.step, frame.grad_norm = integers(run.step)[e], floats(run.grad_norm)[e]
    frame.loss_sum, frame.weight_sum = floats(run.loss_sum)[e], floats(run.weight_sum)[e]


@compiled
def write_down(run, frame, e):
    integers(run.step)[e], floats(run.grad_norm)[e] = frame.step, frame.grad_norm
    floats(run.loss_sum)[e], floats(run.weight_sum)[e] = frame.loss_sum, frame.weight_sum


@compiled
def take_steps(run, A, e, worker, until):
    """Of a member, until then or as far as it may go."""
    place = run.members + e * MEMBER_BYTES
    member, frame = member_at(place), frame_at(run.frames + worker * FRAME_BYTES)
    begin(run, frame, e, worker)
    words, per_epoch = run.words + worker * WORDS, member.steps_per_epoch
    status, looks = integers(run.status), 0
    if frame.step > 0 and frame.step % per_epoch == 0 and frame.weight_sum > 0:
        end_epoch(run, member, frame, A, e, words)
    if status[e] == RUNNING and frame.step >= run.epochs * per_epoch:
        status[e] = FINISHED
    while status[e] == RUNNING and frame.step < member.goal:
        epoch = frame.step // per_epoch
        k = frame.step - epoch * per_epoch
        if k == 0:
            team.exchange(place + EPOCH, epoch)
        if team.load(place + N_DRAWN) <= epoch:
            break
        if not take_step(run, member, frame, A, epoch, k):
            status[e] = DIVERGED
        elif k + 1 == per_epoch:
            end_epoch(run, member, frame, A, e, words)
        looks += 1
        if looks >= run.clock_steps:
            looks = 0
            if team.now(words) >= until:
                break
    write_down(run, frame, e)


def training_pass(sources: int, real: DType) -> Callable[[int, int, int], None]:
    """The slice of a member that is open, by its place among these; or with others on the first."""

    def training_pass(address, place, worker):
        _ = sources
        run = run_at(address)
        if run.meeting and place > 0:
            help(run, worker)
            return
        now = team.now(run.words + worker * WORDS)
        if place == 0 or now < run.until:
            job = job_at(run.job)
            A = pointer(real, job.workspaces + worker * job.workspace_bytes)
            until = min(run.until, now + run.quota)
            take_steps(run, A, integers(run.open)[place], worker, until)
        if run.meeting:
            team.exchange(run.meeting + CLOSED, 1)

    return training_pass


def lead_alone(sources: int) -> Callable[[int, int, int], None]:
    """All members in turn, by one thread: what Python calls."""

    def lead_alone(work, address, n):
        _ = sources
        for place in range(n):
            team.call(work, address, place, 0)

    return lead_alone


def publish(sources: int) -> Callable[[int, int], None]:
    """Write a word that others look at."""

    def publish(address, value):
        _ = sources
        team.exchange(address, value)

    return publish

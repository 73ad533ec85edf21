"""The steps of training, for one member: what a thread does from a clock's stroke to the next.

maths/runs.py says what a step is. Its work is cut into parts by shapes alone, of four kinds:

    CHUNK     the sums over some rows of the batch
    REDUCE    g, and its squares, of a range of the parameters
    UPDATE    the optimizer, on a range of the parameters
    JUDGE     the loss over some rows of the validation data

Records tell all: RUN what the members share, MEMBER one of them, DATA its rows for training or for
validation, FRAME the work under way, of the thread that leads it.
"""

from collections.abc import Callable
from math import inf, isfinite, sqrt
from typing import Any

import numpy as np
from numba import carray, njit, types

from mlp_backprop.engines.compiled import team
from mlp_backprop.engines.compiled.first_order import add_layers, clip_factors, squared_norms
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import job_at, reader
from mlp_backprop.engines.compiled.layout import stride_for, whole_vectors
from mlp_backprop.engines.compiled.rows import at, copy, fill, multiply_by_row, row_sum
from mlp_backprop.engines.compiled.tiles import (
    ONE,
    ZERO,
    backward,
    forward,
    gather,
    gather_labels,
    output_grads,
    weight_grads,
)
from mlp_backprop.engines.compiled.vectors import (
    VECTOR_BYTES,
    call,
    lanes,
    pointer,
    shifted,
)
from mlp_backprop.maths.runs import DIVERGED, EMA_DECAY, FINISHED, RUNNING, STOPPED
from mlp_backprop.types import DType

CHUNK, REDUCE, UPDATE, JUDGE = range(4)
EMA, SWA = 1, 2


def _fields(*integers: str, floats: str = "") -> Any:
    names = [(name, np.int64) for name in " ".join(integers).split()]
    return np.dtype([*names, *((name, np.float64) for name in floats.split())])


STATE = (
    "vector slots step loss_sum weight_sum grad_norm best best_loss best_epoch average n_averaged "
    "status loss validation_loss learning_rate grad_norms seconds"
)
RUN = _fields(
    # What every pass is told; the work on a part; records of the members, and of their rows
    "address job part members data validation n_members n_params n_layers",
    # Of the task
    "epochs batch_size patience kind_of_average first_averaged",
    # The optimizer: address of its part, its options, factors of the rate
    "update options scale",
    # How parameters are cut into ranges
    "n_ranges range_size",
    # A frame for each worker, with its sums and its g; words for each
    "frames sums sums_bytes grads grads_bytes words",
    # When Python called, in nanoseconds. The slice: the members that are open, in turn; when it
    # ends; how long each may have; after how many steps the clock is looked at; where threads meet
    # that take the steps of one member together, or 0
    "began open until quota clock_steps meeting",
    STATE,
    floats="max_grad_norm max_sample_norm elapsed",  # no limit is inf
)
MEMBER = _fields(
    # layer_tables of its vector, and of the net that is judged
    "layers judged",
    # A ring of orders; how many have been drawn since the run began, the epoch under way
    "orders n_orders n_drawn epoch",
    # Rows of a chunk; steps of an epoch, steps to stop at, rates of all steps
    "chunk_rows validation_chunk_rows steps_per_epoch goal rates",
    floats="mean_weight",
)
DATA = _fields("n X X_row X_column y y_row y_column labels label_step weight weight_step rows")
FRAME = _fields(
    "address worker member kind rows n chunk_rows n_chunks layers sums g rate t",
    floats="factor clip",
)

run_at, member_at, data_at, frame_at = map(reader, (RUN, MEMBER, DATA, FRAME))
RUN_BYTES, MEMBER_BYTES, DATA_BYTES, FRAME_BYTES = (
    dtype.itemsize for dtype in (RUN, MEMBER, DATA, FRAME)
)
MOST_RANGES = 8
TICKET, DONE, CLOSED, MEETING_BYTES = range(0, 512, 128)  # each in a line of the cache of its own
SPINS = 4000  # two microseconds or so
sched_yield = types.ExternalFunction("sched_yield", types.int32())
WORDS = 128  # bytes of a worker's, for the clock
EPOCH, N_DRAWN = (int(MEMBER.fields[name][1]) for name in ("epoch", "n_drawn"))

PART = types.void(*[types.int64] * 4)
LEADING, PUBLISH = types.void(*[types.int64] * 3), types.void(*[types.int64] * 2)

# As rows.summing, and into float64 from anything.
summing = njit(error_model="numpy", fastmath={"contract", "reassoc", "nsz"})


@compiled
def floats(address):
    return pointer(np.float64, address)


@compiled
def integers(address):
    return pointer(np.int64, address)


@compiled
def layers_at(run, address):
    return carray(integers(address), (run.n_layers, 8))


# Rows into a tile --------------------------------------------------------------------------------


@compiled
def load_rows(job, data, layers, A, stride, rows, n, m):
    """Inputs, targets and weights of the n rows of these numbers."""
    n_in, n_out = layers[0, 1], layers[-1, 2]
    gather(A, stride, m, data.X, data.X_row, data.X_column, rows, n, n_in)
    Y, weights = shifted(A, job.Y * stride), shifted(A, job.weights * stride)
    if data.labels:
        gather_labels(Y, stride, m, integers(data.labels), data.label_step // 8, rows, n, n_out)
    else:
        gather(Y, stride, m, data.y, data.y_row, data.y_column, rows, n, n_out)
    if data.weight:
        gather(weights, stride, m, data.weight, data.weight_step, ZERO, rows, n, ONE)
    else:
        fill(weights, type(A[0])(1), ONE, n, n)
        fill(shifted(weights, n), type(A[0])(0), ONE, m - n, m - n)


# Parts -------------------------------------------------------------------------------------------


def part_pass(sources: int, real: DType) -> Callable[[int, int, int, int], None]:
    """A part of the work that a frame tells of."""

    def part_pass(run_address, frame_address, part, worker):
        _ = sources
        run, frame = run_at(run_address), frame_at(frame_address)
        job = job_at(run.job)
        A = pointer(real, job.workspaces + worker * job.workspace_bytes)
        if frame.kind == REDUCE:
            reduce(run, frame, A, part)
        elif frame.kind == UPDATE:
            update(run, frame, A, part)
        else:
            add_rows(run, frame, A, part)

    return part_pass


@compiled
def add_rows(run, frame, A, part):
    """The sums of a chunk: of the gradients, as the parameters lie, then of losses and weights.

    Of validation rows of the last two alone.
    """
    job, is_batch = job_at(run.job), frame.kind == CHUNK
    tables, n_sums = (run.data, job.n_sums) if is_batch else (run.validation, 2)
    data, layers = data_at(tables + frame.member * DATA_BYTES), layers_at(run, frame.layers)
    sums = shifted(floats(frame.sums), part * n_sums)
    sums[n_sums - 2] = sums[n_sums - 1] = 0.0
    begin = part * frame.chunk_rows
    end = min(begin + frame.chunk_rows, frame.n)
    for start in range(begin, end, job.tile_rows):
        n = min(job.tile_rows, end - start)
        m = whole_vectors(n, lanes(A))
        stride = stride_for(m, lanes(A))
        load_rows(job, data, layers, A, stride, shifted(integers(frame.rows), start), n, m)
        forward(job, layers, A, stride, m)
        sums[n_sums - 2] += output_grads(job, layers, A, stride, m)
        sums[n_sums - 1] += row_sum(shifted(A, job.weights * stride), m)
        if is_batch:
            backward(job, layers, A, stride, n, m)
            if run.max_sample_norm < inf:
                clip_samples(run, job, layers, A, stride, m)
            for l in range(len(layers)):
                weight_grads(job, layers[l], A, stride, n, m, sums, start == begin)


@compiled
def clip_samples(run, job, layers, A, stride, m):
    """Equations (P2) to (P4) of maths/samples.py: every D_l times the factor of its row."""
    c = squared_norms(job, layers, A, stride, m)
    add_layers(c, len(layers), stride, m)
    clip_factors(c, type(A[0])(run.max_sample_norm), m)
    for l in range(len(layers)):
        multiply_by_row(shifted(A, layers[l, 4] * stride), c, layers[l, 2], stride, m)


@compiled
def range_of(run, part):
    begin = part * run.range_size
    return begin, min(begin + run.range_size, run.n_params)


@compiled
def reduce(run, frame, A, part):
    """The sums of all chunks, in their order; g; and the squares of g, behind g."""
    begin, end = range_of(run, part)
    n_sums = run.n_params + 2
    sums = shifted(floats(frame.sums), begin)
    for chunk in range(1, frame.n_chunks):
        more = shifted(sums, chunk * n_sums)
        for p in range(at(end - begin)):
            sums[p] += more[p]
    g = shifted(pointer(A, frame.g), begin)
    squares = divided(g, sums, frame.factor, end - begin)
    floats(squares_of(run, frame, A))[part] = squares


@compiled
def squares_of(run, frame, A):
    """Where they lie, one for each range: behind g, aligned."""
    return frame.g + (run.n_params * (VECTOR_BYTES // lanes(A)) + 7) // 8 * 8


@summing
def divided(g, sums, factor, n):
    total = 0.0
    for p in range(at(n)):
        g[p] = type(g[0])(sums[p] * factor)
        total += np.float64(g[p]) * np.float64(g[p])
    return total


@compiled
def update(run, frame, A, part):
    """The step of the optimizer, and of the average of all steps."""
    begin, end = range_of(run, part)
    n, first = end - begin, frame.member * run.n_params + begin
    p, g = shifted(pointer(A, run.vector), first), shifted(pointer(A, frame.g), begin)
    if frame.clip < 1:
        clip = type(A[0])(frame.clip)
        for i in range(at(n)):
            g[i] *= clip
    s = shifted(pointer(A, run.slots), first)
    u = shifted(s, run.n_members * run.n_params)
    scale = shifted(pointer(A, run.scale), begin)
    call(run.update, (p, g, s, u, scale, run.options, frame.rate, frame.t, n))
    if run.kind_of_average == EMA:
        keep = min(EMA_DECAY, (1 + frame.t) / (10 + frame.t))
        share = type(A[0])(1 - keep)
        towards(shifted(pointer(A, run.average), first), p, share, n)


@compiled
def towards(average, p, share, n):
    for i in range(at(n)):
        average[i] += share * (p[i] - average[i])


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
    """Take parts until none is left; how many were taken."""
    taken = 0
    while True:
        ticket = team.add(run.meeting + TICKET, 1)
        if taken_of(ticket) >= parts_of(ticket):
            return taken
        call(run.part, (run.address, frame.address, taken_of(ticket), worker))
        team.add(run.meeting + DONE, 1)
        taken += 1


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
def take_step(run, member, frame, A, e, step, k):
    """The k-th of its epoch; False where loss or gradient is not finite, and none is taken."""
    data = data_at(run.data + e * DATA_BYTES)
    epoch = step // member.steps_per_epoch
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
    frame.rate, frame.t = member.rates + 8 * step, step + 1
    share(run, frame, UPDATE, run.n_ranges)
    floats(run.loss_sum)[e] += loss
    floats(run.weight_sum)[e] += weight
    floats(run.grad_norm)[e] = norm
    integers(run.step)[e] = step + 1
    return True


# The end of an epoch -----------------------------------------------------------------------------


@compiled
def end_epoch(run, member, frame, A, e, epoch, now):
    """The row of history, the average, the judgement; who goes on."""
    row, status = epoch * run.n_members + e, integers(run.status)
    last = integers(run.step)[e] - 1
    floats(run.loss)[row] = floats(run.loss_sum)[e] / floats(run.weight_sum)[e]
    floats(run.learning_rate)[row] = floats(member.rates)[last]
    floats(run.grad_norms)[row] = floats(run.grad_norm)[e]
    floats(run.loss_sum)[e], floats(run.weight_sum)[e] = 0.0, 0.0
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
def take_steps(run, A, e, worker, until):
    """Of a member, until then or as far as it may go."""
    member = member_at(run.members + e * MEMBER_BYTES)
    frame = frame_at(run.frames + worker * FRAME_BYTES)
    frame.address, frame.worker, frame.member = run.frames + worker * FRAME_BYTES, worker, e
    frame.sums = run.sums + worker * run.sums_bytes
    frame.g = run.grads + worker * run.grads_bytes
    words = run.words + worker * WORDS
    status, step, looks = integers(run.status), integers(run.step)[e], 0
    if step > 0 and step % member.steps_per_epoch == 0 and floats(run.weight_sum)[e] > 0:
        end_epoch(run, member, frame, A, e, step // member.steps_per_epoch, words)
    if status[e] == RUNNING and step >= run.epochs * member.steps_per_epoch:
        status[e] = FINISHED
    while status[e] == RUNNING and step < member.goal:
        epoch = step // member.steps_per_epoch
        k = step - epoch * member.steps_per_epoch
        if k == 0:
            team.exchange(run.members + e * MEMBER_BYTES + EPOCH, epoch)
        if team.load(run.members + e * MEMBER_BYTES + N_DRAWN) <= epoch:
            break
        if not take_step(run, member, frame, A, e, step, k):
            status[e] = DIVERGED
            break
        step += 1
        if k + 1 == member.steps_per_epoch:
            end_epoch(run, member, frame, A, e, epoch + 1, words)
        looks += 1
        if looks >= run.clock_steps:
            looks = 0
            if team.now(words) >= until:
                break


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

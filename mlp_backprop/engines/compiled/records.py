"""What compiled steps of training are told: records of numbers and addresses.

RUN is what the members share, MEMBER is one of them, DATA its rows for training or for validation,
FRAME the work under way, of the thread that leads it. Work is cut into parts of four kinds:

    CHUNK     the sums over some rows of the batch
    REDUCE    g, and its squares, of a range of the parameters
    UPDATE    the optimizer, on a range of the parameters
    JUDGE     the loss over some rows of the validation data
"""

from typing import Any

import numpy as np
from numba import carray

from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.jobs import reader
from mlp_backprop.engines.compiled.vectors import VECTOR_BYTES, lanes, pointer

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
    "address worker member step kind rows n chunk_rows n_chunks layers sums g rate t",
    floats="factor clip loss_sum weight_sum grad_norm",
)

run_at, member_at, data_at, frame_at = map(reader, (RUN, MEMBER, DATA, FRAME))
MEMBER_BYTES, DATA_BYTES = MEMBER.itemsize, DATA.itemsize
FRAME_BYTES = 256  # so that threads do not write to one another's lines of the cache
MOST_RANGES = 8
WORDS = 128  # bytes of a worker's, for the clock
EPOCH, N_DRAWN = (int(MEMBER.fields[name][1]) for name in ("epoch", "n_drawn"))


@compiled
def floats(address):
    return pointer(np.float64, address)


@compiled
def integers(address):
    return pointer(np.int64, address)


@compiled
def layers_at(run, address):
    return carray(integers(address), (run.n_layers, 8))


@compiled
def squares_of(run, frame, A):
    """Where they lie, one for each range: behind g, aligned."""
    return frame.g + (run.n_params * (VECTOR_BYTES // lanes(A)) + 7) // 8 * 8

"""The NumPy engine against the derivation: the same answers, whatever the cut, and no traces left.

`cut` makes tiles of a few rows, so that borders of tiles and chunks are met in small problems;
where the real cut matters, the number of rows is taken from it.
"""

import numpy as np
import pytest
from derivation import checked
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    TAKE_LOGITS,
    assert_close,
    assert_grads_close,
    make_problem,
    peak_bytes,
)

from mlp_backprop import backprop, compute_grads
from mlp_backprop.engines import choice, numpy_tiles, threads
from mlp_backprop.engines.schedule import make_schedule
from mlp_backprop.types import flat

TILE, CHUNK = 4, 12
ALL_THREADED = {"tile_threads": True, "holds_blas": True}
ONE_CHUNK = {"tile_threads": False, "holds_blas": True, "chunk_rows": 1000 * TILE}


@pytest.fixture
def cut(monkeypatch):
    """A function that sets parts of every schedule made from then on."""

    def set_parts(**parts):
        def make(spec, n, itemsize):
            return make_schedule(spec, n, itemsize)._replace(**parts)

        monkeypatch.setattr(numpy_tiles, "make_schedule", make)

    set_parts(tile_rows=TILE, chunk_rows=CHUNK)
    return set_parts


@np.errstate(all="ignore")
def by_tiles(problem):
    spec, *arrays = checked(problem)
    return numpy_tiles.prepare(spec, len(problem.X)).sums(*arrays)


@np.errstate(all="ignore")
def by_derivation(problem):
    spec, *arrays = checked(problem)
    return backprop.loss_and_grad_sums(spec, *arrays)


def assert_like_derivation(problem, tolerance=1e-12, dtype=np.float64):
    """In this dtype, against the derivation in float64."""
    problem = problem.astype(dtype)
    assert_sums_close(by_tiles(problem), by_derivation(problem.astype(np.float64)), tolerance)


def assert_sums_close(got, expected, tolerance=1e-12):
    assert_close(got.loss, expected.loss, tolerance)
    assert_close(got.weight, expected.weight, 1e-14)
    assert_grads_close(got.grads, expected.grads, tolerance)


def run(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def arrays_of(result):
    return [result.loss, *flat(result.grads)]


def assert_same_bits(first, second):
    for A, B in zip(arrays_of(first), arrays_of(second), strict=True):
        assert_array_equal(A, B)


# Against the derivation --------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-12), (np.float32, 2e-5)])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n_in", [3, 20])  # X is copied into the tile, or seen in place
def test_every_activation_and_loss(n_in, activation, loss, dtype, tolerance, cut):
    options = {"activation": activation, "loss": loss}
    for weighted in (False, True):
        problem = make_problem((n_in, 5, 2, 4), n=30, weighted=weighted, **options)
        assert_like_derivation(problem, tolerance, dtype)
    cut(tile_rows=30)
    assert_like_derivation(problem, tolerance, dtype)


@pytest.mark.parametrize("parts", [ALL_THREADED, ONE_CHUNK])
@pytest.mark.parametrize("sizes", [(3, 2), (1, 1), (2, 1, 3), (4, 1), (70, 3, 1), (70, 2), (16, 1)])
@pytest.mark.parametrize("n", [1, TILE - 1, TILE, TILE + 1, CHUNK, CHUNK + 1, 5 * CHUNK + TILE + 3])
def test_rows_around_the_borders(n, sizes, parts, cut):
    cut(tile_rows=TILE, **{"chunk_rows": CHUNK} | parts)
    for loss in ("squared_error", "softmax_cross_entropy"):
        problem = make_problem(sizes, n, loss=loss, weighted=n > 1)
        assert_like_derivation(problem)


@pytest.mark.parametrize("sizes", [(2, 10, 5, 1), (70, 6, 3)])
def test_rows_around_the_borders_of_the_real_cut(sizes):
    spec = checked(make_problem(sizes)).spec
    tile_rows = make_schedule(spec, 10**9, 8).tile_rows
    for n in (tile_rows - 1, tile_rows, tile_rows + 1, 40 * tile_rows + 7):
        assert_like_derivation(make_problem(sizes, n, weighted=True, seed=n))


@pytest.mark.parametrize("copies_X", [False, True])
@pytest.mark.parametrize("sizes", [(3, 5, 2), (70, 4), (1, 1)])
def test_inputs_viewed_or_copied(sizes, copies_X, cut):
    cut(tile_rows=TILE, chunk_rows=CHUNK, copies_X=copies_X)
    assert_like_derivation(make_problem(sizes, 30, weighted=True))


@pytest.mark.parametrize("seed", range(12))
def test_any_sequence_of_activations(seed, cut):
    rng = np.random.default_rng(seed)
    names = [str(name) for name in rng.choice(list(ACTIVATIONS), rng.integers(1, 5))]
    loss = str(rng.choice([name for name in LOSSES if name not in TAKE_LOGITS]))
    sizes = tuple(rng.integers(1, 20, len(names) + 1))
    n = int(rng.integers(1, 60))
    assert_like_derivation(make_problem(sizes, n, activation=names, loss=loss, seed=seed))


def test_half_precision_is_left_to_the_derivation():
    spec = checked(make_problem()).spec
    assert choice.is_for_numpy(spec)
    assert not choice.is_for_numpy(spec._replace(dtype=np.dtype(np.float16)))


# Beyond the finite -------------------------------------------------------------------------------


def assert_same_numbers(problem):
    """Equal where finite, and the same infinities and nan."""
    got, expected = by_tiles(problem), by_derivation(problem)
    for A, B in zip(arrays_of(got), arrays_of(expected), strict=True):
        finite = np.isfinite(B)
        assert_array_equal(np.where(finite, 0, A), np.where(finite, 0, B))
        assert_close(np.where(finite, A, 0), np.where(finite, B, 0), 1e-11)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [1e9, -1e9, np.inf, -np.inf, np.nan])
def test_extreme_inputs(value, activation, loss, cut):
    problem = make_problem((3, 5, 2, 4), 30, activation=activation, loss=loss)
    problem.X[9] = value
    assert_same_numbers(problem)
    problem.X[9, 1:] = 0
    assert_same_numbers(problem)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [1e9, -1e9, np.inf, -np.inf, np.nan])
def test_extreme_targets(value, activation, cut):
    for sizes in [(3, 5, 2, 4), (3, 5, 2, 1)]:
        problem = make_problem(sizes, 30, activation=activation)
        problem.y[9] = value
        assert_same_numbers(problem)


@pytest.mark.parametrize("loss", TAKE_LOGITS)
@pytest.mark.parametrize("value", [1e9, -1e9])
def test_extreme_logits(value, loss, cut):
    problem = make_problem((3, 5, 2, 4), 30, activation="sigmoid", loss=loss)
    problem.params[-1][1][1] = value
    assert_same_numbers(problem)


def test_no_thread_warns_of_infinities(cut, monkeypatch):
    # NumPy's settings of what to warn of are each thread's own.
    cut(tile_rows=TILE, chunk_rows=TILE, **ALL_THREADED)
    monkeypatch.setenv(threads.VARIABLE, "4")
    problem = make_problem((3, 5, 2), 2000, activation="sigmoid")
    problem.X[...] = [-1e9, np.inf, 1e9]
    run(problem)


# The caller's arrays -----------------------------------------------------------------------------

LAYOUTS = {
    "fortran": np.asfortranarray,
    "strided": lambda A: np.repeat(A, 2, axis=-1)[..., ::2],
    "reversed": lambda A: A[::-1].copy()[::-1],
    "read-only": lambda A: np.frombuffer(A.tobytes(), A.dtype).reshape(A.shape),
    "broadcast": lambda A: np.broadcast_to(A[:1], A.shape),
}


@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), (70, 3, 2), (16, 1)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_of_the_arrays(layout, sizes, cut):
    for loss in ("squared_error", "softmax_cross_entropy"):
        problem = make_problem(sizes, 30, loss=loss, weighted=True).map(LAYOUTS[layout])
        assert_sums_close(by_tiles(problem), by_derivation(problem))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("n", [TILE, 30])
def test_the_callers_arrays_are_not_changed(n, activation, cut):
    problem = make_problem((20, 5, 2, 4), n, activation=activation, weighted=True)
    kept = problem.map(np.copy)
    run(problem)
    for A, B in zip(flat(problem.params), flat(kept.params), strict=True):
        assert_array_equal(A, B)
    assert_array_equal(problem.X, kept.X)
    assert_array_equal(problem.y, kept.y)
    assert_array_equal(problem.options["sample_weight"], kept.options["sample_weight"])


# Sums --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_sums_of_float32_are_kept_in_float64(weighted):
    problem = make_problem(
        (2, 10, 5, 1), 200_000, activation="sigmoid", dtype=np.float32, weighted=weighted
    )
    got, expected = run(problem), run(problem.astype(np.float64))
    assert_close(got.loss, expected.loss, 1e-7)
    assert_grads_close(got.grads, expected.grads, 5e-7)


@pytest.mark.parametrize("chunk_rows", [1, 2000])
def test_small_terms_are_not_lost_beside_a_large_one(chunk_rows, cut):
    # dE/db is the sum of 2^26 and 2000 terms of 2: in float32 each of them would be rounded away.
    cut(tile_rows=1, chunk_rows=chunk_rows)
    y = -np.ones((2001, 1), np.float32)
    y[0] = -(2.0**25)
    params = [(np.zeros((1, 1), np.float32), np.zeros(1, np.float32))]
    _, [(_, db)] = compute_grads(params, np.zeros_like(y), y, reduction="sum")
    assert db.dtype == np.float32
    assert db == 2**26 + 4000


# One bit for every number of threads -------------------------------------------------------------

WIDE = (64, 200, 100, 10)
NETS = [(2, 10, 5, 1), (1, 8), (1, 15), (8, 1), (15, 1), (70, 3, 1), (64, 64, 64, 1)]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", NETS)
def test_no_number_of_threads_changes_a_bit(sizes, dtype, cut, monkeypatch):
    cut(tile_rows=64, chunk_rows=128, tile_threads=True)
    problem = make_problem(sizes, 2000, dtype=dtype, weighted=True)
    results = []
    for setting in ("1", "2", "3", "7"):
        monkeypatch.setenv(threads.VARIABLE, setting)
        results.append(run(problem))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [*NETS, WIDE])
@pytest.mark.parametrize("n", [500, 1024, 2048, 20_000])
def test_no_setting_of_blas_changes_a_bit(n, sizes, dtype):
    threadpoolctl = pytest.importorskip("threadpoolctl")
    problem = make_problem(sizes, n, dtype=dtype)
    results = []
    for n_threads in (1, 2, 4):
        with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
            results.append(run(problem))
    for result in results[1:]:
        assert_same_bits(result, results[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_number_of_threads_changes_a_bit_of_shared_products(dtype, monkeypatch):
    pytest.importorskip("threadpoolctl", reason="else one thread does it all")
    problem = make_problem(WIDE, 5000, dtype=dtype, weighted=True)
    assert numpy_tiles.prepare(checked(problem)[0], 5000).schedule.shares_products
    run_chunks, workers, results = threads.run_chunks, set(), []

    def counting(task, n_chunks, n_workers):
        workers.add(n_workers)
        run_chunks(task, n_chunks, n_workers)

    for setting in (1, 2, 3, 7):
        monkeypatch.setenv(threads.VARIABLE, str(setting))
        with monkeypatch.context() as patch:
            patch.setattr(threads, "run_chunks", counting)
            results.append(run(problem))
    assert workers == {1, 2, 3, 7}
    for result in results[1:]:
        assert_same_bits(result, results[0])


# The workspace -----------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [ALL_THREADED, ONE_CHUNK])
def test_a_plan_serves_any_number_of_rows(parts, cut):
    cut(tile_rows=TILE, **{"chunk_rows": CHUNK} | parts)
    spec, *arrays = checked(make_problem((20, 5, 2, 4), 50, weighted=True))
    params, *data = arrays
    plan = numpy_tiles.prepare(spec, 50)
    for n in (3, 50, 2, 4, 0, 13, 1, 49, 50):
        rows = [A[:n] for A in data]
        assert_sums_close(
            plan.sums(params, *rows), backprop.loss_and_grad_sums(spec, params, *rows)
        )


def test_a_plan_does_not_keep_a_workspace_for_every_number_of_rows():
    spec, params, X, y, _ = checked(make_problem((8, 32, 32, 1), 600))
    plan = numpy_tiles.prepare(spec, 600)

    def run_all():
        for n in range(500, 600):
            plan.sums(params, X[:n], y[:n], None)

    assert peak_bytes(run_all) < 10e6


@pytest.mark.parametrize(("sizes", "rows"), [((2, 10, 5, 1), 300_000), ((64, 64, 64, 1), 100_000)])
def test_memory_does_not_grow_with_the_rows(sizes, rows, monkeypatch):
    # With more threads there is a tile for each that came in time to do some of the work.
    monkeypatch.setenv(threads.VARIABLE, "1")
    peaks = []
    for n in (rows, 3 * rows):
        problem = make_problem(sizes, n, activation="sigmoid", dtype=np.float32)
        peaks.append(peak_bytes(lambda problem=problem: run(problem)))
    assert peaks[1] - peaks[0] < 1e6
    assert peaks[1] < 64e6

"""The cut of a problem: what the engine and the determinism of its results rely on."""

import os
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest

from mlp_backprop import init_params
from mlp_backprop.edge import validation
from mlp_backprop.engines import numpy_products, schedule, threads
from mlp_backprop.maths import row_blocks

NARROW = [(1, 1), (2, 10, 5, 1), (8, 32, 32, 1), (64, 64, 64, 1), (3, 200, 2)]
WIDE = [(784, 128, 64, 10), (784, 1024, 1024, 10), (4096, 512), (1, 2000, 2000, 1)]
ROWS = [0, 1, 2, 255, 1024, 1025, 100_000, 1_000_000, 10_000_000]


def spec_of(sizes, dtype=np.float32):
    return validation.specification(
        init_params(sizes, 0, dtype=dtype),
        activation="sigmoid",
        loss="squared_error",
        reduction="sum",
        backend=None,
    )


@pytest.mark.parametrize("n", ROWS)
@pytest.mark.parametrize("sizes", NARROW + WIDE)
@pytest.mark.parametrize("itemsize", [4, 8])
def test_chunks_are_whole_tiles_and_few(sizes, n, itemsize):
    cut = schedule.make_schedule(spec_of(sizes), n, itemsize)
    assert 1 <= cut.tile_rows <= max(1, n)
    assert cut.chunk_rows % cut.tile_rows == 0
    n_chunks = -(-n // cut.chunk_rows)
    n_params = sum(a * b for a, b in pairwise(sizes))
    assert n_chunks <= schedule.MAX_CHUNKS
    assert n_chunks == 1 or n_chunks * 8 * n_params <= schedule.CHUNK_BYTES


@pytest.mark.parametrize("sizes", WIDE)
def test_wide_nets_share_out_their_products(sizes):
    cut = schedule.make_schedule(spec_of(sizes), 100_000, 4)
    assert cut.shares_products
    assert not cut.tile_threads
    assert cut.chunk_rows >= 100_000
    assert not schedule.make_schedule(spec_of(sizes), 1, 4).shares_products


@pytest.mark.parametrize("sizes", NARROW)
def test_narrow_nets_share_out_many_rows(sizes):
    cut = schedule.make_schedule(spec_of(sizes), 1_000_000, 4)
    assert cut.tile_threads
    assert cut.chunk_rows < 1_000_000


@pytest.mark.parametrize("sizes", NARROW + WIDE)
@pytest.mark.parametrize("n", ROWS)
def test_blas_is_held_wherever_it_would_divide_a_product(sizes, n):
    cut = schedule.make_schedule(spec_of(sizes), n, 4)
    largest = cut.tile_rows * max((a + 1) * b for a, b in pairwise(sizes))
    assert cut.holds_blas == (largest > schedule.SMALLEST_DIVIDED_PRODUCT)


def test_a_short_pass_is_one_thread_s():
    for sizes, n in (((64, 64, 64, 1), 1024), ((784, 128, 64, 10), 128)):
        cut = schedule.make_schedule(spec_of(sizes), n, 4)
        assert not cut.tile_threads
        assert not cut.shares_products


def test_few_rows_wake_no_thread():
    assert not schedule.make_schedule(spec_of((2, 10, 5, 1)), 64, 4).tile_threads


def cuts_of(sizes, n):
    """How every engine on the CPU, and the derivation, cuts the rows."""
    spec = spec_of(sizes)
    X = np.empty((n, sizes[0]), np.float32)
    cuts = [
        schedule.make_schedule(spec, n, 4),
        numpy_products.cut(spec, n),
        tuple(str(rows) for rows in row_blocks.row_blocks(np, X, sum(sizes))),
    ]
    if find_spec("numba") and max(sizes) <= 64:
        from mlp_backprop.engines.compiled import engine

        cuts.append(engine.prepare(spec, n).chunks(n))
    return tuple(cuts)


@pytest.mark.parametrize("n", [1000, 100_000])
@pytest.mark.parametrize("sizes", NARROW + WIDE)
def test_neither_threads_nor_cpus_move_the_cut(sizes, n, monkeypatch):
    cuts = {cuts_of(sizes, n)}
    for setting in ("1", "2", "7"):
        monkeypatch.setenv(threads.VARIABLE, setting)
        cuts.add(cuts_of(sizes, n))
    monkeypatch.delenv(threads.VARIABLE)
    for n_cpus in (1, 3, 64):
        monkeypatch.setattr(os, "cpu_count", lambda n_cpus=n_cpus: n_cpus)
        monkeypatch.setattr(os, "process_cpu_count", os.cpu_count, raising=False)
        monkeypatch.setattr(
            os, "sched_getaffinity", lambda _, n=n_cpus: set(range(n)), raising=False
        )
        monkeypatch.setattr(threads, "usable_cpus", os.cpu_count)
        cuts.add(cuts_of(sizes, n))
    assert len(cuts) == 1

"""Large products in slices: NumPy's answer, every entry once, of any layout and on any threads."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from mlp_backprop.engines import shared_products, threads
from mlp_backprop.engines.shared_products import LEAST_SLICE, shared_dot, slice_count
from mlp_backprop.engines.threads import blas_on_one_thread

SHAPES = [(7, 5, 30), (30, 5, 7), (13, 2, 13), (1, 3, 29), (29, 3, 1)]


@pytest.fixture
def small_slices(monkeypatch):
    """Cuts every product, also those that a test can look at."""
    monkeypatch.setattr(shared_products, "SHARED_PRODUCT", 20)
    monkeypatch.setattr(shared_products, "LEAST_SLICE", 4)


def factors(m, k, n, dtype=np.float64):
    rng = np.random.default_rng(m)
    return rng.normal(size=(m, k)).astype(dtype), rng.normal(size=(k, n)).astype(dtype)


def layouts(A):
    """The same matrix row by row, column by column, and as a part of others."""
    wider = np.full((len(A), A.shape[1] + 3), np.nan, A.dtype)
    wider[:, 1:-2] = A
    return [A, np.asfortranarray(A), wider[:, 1:-2]]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_slices_are_the_product(shape, dtype, small_slices):
    A, B = factors(*shape, dtype)
    assert slice_count(*shape) > 1
    for A_laid in layouts(A):
        for B_laid in layouts(B):
            out = np.full((shape[0], shape[2]), np.nan, dtype)
            result = shared_dot(A_laid, B_laid, out)
            assert result is out
            assert_allclose(out, A @ B, rtol=0, atol=1e-5 if dtype == np.float32 else 1e-13)


def test_without_a_place_the_product_is_new(small_slices):
    A, B = factors(7, 5, 30, np.float32)
    result = shared_dot(A, B)
    assert result.dtype == np.float32
    assert result.flags.c_contiguous
    assert_allclose(result, A @ B, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(600, 300, 700), (700, 300, 600)])
def test_no_number_of_threads_changes_a_bit(shape, monkeypatch):
    A, B = factors(*shape, np.float32)
    run_chunks, cuts, results = threads.run_chunks, [], []

    def counting(task, n_chunks, n_workers):
        cuts.append(n_chunks)
        run_chunks(task, n_chunks, n_workers)

    monkeypatch.setattr(threads, "run_chunks", counting)
    for setting in ("1", "2", "7"):
        monkeypatch.setenv(threads.VARIABLE, setting)
        with blas_on_one_thread():
            results.append(shared_dot(A, B))
    assert cuts == [2, 2, 2]  # BLAS may well give the same bits for others
    for result in results[1:]:
        assert_array_equal(result, results[0])


def test_no_thread_warns_of_infinities(small_slices, monkeypatch):
    monkeypatch.setenv(threads.VARIABLE, "4")
    A, B = factors(7, 5, 30)
    A[:], B[:, ::2] = np.inf, -np.inf
    with np.errstate(all="ignore"):  # as around every call
        expected = A @ B
    assert_array_equal(shared_dot(A, B), expected)


def test_slices_are_long_and_products_worth_it():
    assert slice_count(256, 256, 256) == 1
    assert slice_count(100, 10_000, 100) == 1
    for shape in [(1024, 1024, 1024), (128, 784, 4096), (100_000, 3, 100), (784, 8192, 128)]:
        assert 1 < slice_count(*shape) <= max(shape[0], shape[2]) // LEAST_SLICE


def test_no_thread_is_woken_where_blas_cannot_be_held(small_slices, monkeypatch):
    used = []
    monkeypatch.setattr(threads, "_blas_libraries", list)
    monkeypatch.setattr(threads, "run_chunks", lambda task, n_chunks, n: used.append(n))
    monkeypatch.setenv(threads.VARIABLE, "4")
    shared_dot(*factors(7, 5, 30))
    assert used == [1]

"""Register-blocked products: every remainder of rows and widths, any strides, nothing beyond."""

from functools import cache

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="compiled products need numba")

from mlp_backprop.engines.compiled import parts, products, vectors  # noqa: E402
from mlp_backprop.engines.compiled.vectors import call, pointer  # noqa: E402

FLOATS = (np.float32, np.float64)
SENTINEL = 77.0


@pytest.fixture(params=FLOATS)
def dtype(request):
    return request.param


@cache
def caller(dtype, kinds):
    """A compiled function of a part's address and arguments: addresses of numbers, or integers."""
    places = [f"pointer(like, a{k})" if kind == "A" else f"a{k}" for k, kind in enumerate(kinds)]
    names = ", ".join(f"a{k}" for k in range(len(kinds)))
    scope = {"call": call, "pointer": pointer}
    source = f"def f(like, part, {names}):\n    call(part, ({', '.join(places)},))"
    exec(source, scope)
    return numba.njit(scope["f"])


def run(name, dtype, *arguments):
    _, kinds = parts.PARTS[name]
    numbers = [A.ctypes.data if isinstance(A, np.ndarray) else int(A) for A in arguments]
    caller(dtype, kinds)(np.empty(0, dtype), parts.address(np.dtype(dtype), name), *numbers)


def lanes(dtype):
    return vectors.VECTOR_BYTES // np.dtype(dtype).itemsize


def rows_with_gaps(n_rows, n, dtype, rng):
    """An array of rows, and its stride: behind each lie numbers that are nobody's."""
    stride = n + 3
    A = np.full((n_rows, stride), SENTINEL, dtype)
    A[:, :n] = rng.uniform(-1, 1, (n_rows, n))
    return A, stride


def assert_rows(C, expected, dtype):
    """The rows, and nothing beyond them, are written."""
    m = expected.shape[1]
    np.testing.assert_allclose(C[:, :m], expected, rtol=0, atol=200 * np.finfo(dtype).eps)
    assert (C[:, m:] == SENTINEL).all()


@pytest.mark.parametrize("start", ["nothing", "itself", "column"])
@pytest.mark.parametrize("n_rows", [*range(1, 14), 24, 31])
def test_product_of_every_height_and_width(n_rows, start, dtype):
    rng = np.random.default_rng(n_rows)
    for n_vectors in (1, 2, 3, 4, 5):
        for n_k in (1, 2, 7):
            m = n_vectors * lanes(dtype)
            A, A_row = rows_with_gaps(n_rows, n_k, dtype, rng)
            B, B_row = rows_with_gaps(n_k, m, dtype, rng)
            C, C_row = rows_with_gaps(n_rows, m, dtype, rng)
            b = rng.uniform(-1, 1, n_rows).astype(dtype)
            begun = {"nothing": 0, "itself": C[:, :m].copy(), "column": b[:, None]}[start]
            expected = begun + A[:, :n_k] @ B[:, :m]
            code = {"nothing": products.NOTHING, "itself": products.ITSELF}.get(
                start, products.COLUMN
            )
            run("product", dtype, code, b, C, C_row, A, A_row, 1, B, B_row, n_rows, n_k, m)
            assert_rows(C, expected, dtype)


@pytest.mark.parametrize("n_rows", [1, 5, 6, 7, 13])
def test_product_with_the_left_side_transposed(n_rows, dtype):
    rng = np.random.default_rng(0)
    m = 3 * lanes(dtype)
    A, A_row = rows_with_gaps(9, n_rows, dtype, rng)
    B, B_row = rows_with_gaps(9, m, dtype, rng)
    C, C_row = rows_with_gaps(n_rows, m, dtype, rng)
    run("product", dtype, products.NOTHING, C, C, C_row, A, 1, A_row, B, B_row, n_rows, 9, m)
    assert_rows(C, A[:, :n_rows].T @ B[:, :m], dtype)


@pytest.mark.parametrize("n_columns", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("n_rows", range(1, 10))
def test_dots_of_every_height_and_width(n_rows, n_columns, dtype):
    rng = np.random.default_rng(n_rows)
    for n_vectors in (1, 2, 5, 32):
        m = n_vectors * lanes(dtype)
        A, A_row = rows_with_gaps(n_rows, m, dtype, rng)
        B, B_row = rows_with_gaps(n_columns, m, dtype, rng)
        C, C_row = rows_with_gaps(n_rows, n_columns, dtype, rng)
        run("dots", dtype, C, C_row, A, A_row, B, B_row, n_rows, n_columns, m)
        assert_rows(C, A[:, :m] @ B[:, :m].T, dtype)


def test_inf_and_nan_reach_the_sums_they_are_in_and_no_others(dtype):
    A, B = np.ones((7, 3), dtype), np.ones((3, 2 * lanes(dtype)), dtype)
    A[2, 1], B[0, 3] = np.nan, np.inf
    C = np.empty((7, B.shape[1]), dtype)
    width = B.shape[1]
    run("product", dtype, products.NOTHING, C, C, width, A, 3, 1, B, width, 7, 3, width)
    np.testing.assert_array_equal(C, A @ B)


@pytest.mark.parametrize("n_rows", [1, 3, 8, 9, 20])
@pytest.mark.parametrize("n_columns", [1, 4, 8, 17])
def test_transposed_by_whole_squares(n_rows, n_columns, dtype):
    transpose = compiled_transpose()
    whole = [-(-n // lanes(dtype)) * lanes(dtype) for n in (n_rows, n_columns)]
    A = np.random.default_rng(0).uniform(-1, 1, whole).astype(dtype)
    C = np.full((whole[1], whole[0] + 2), SENTINEL, dtype)
    transpose(C, C.ctypes.data, C.shape[1], A.ctypes.data, A.shape[1], n_rows, n_columns)
    np.testing.assert_array_equal(C[:, : whole[0]], A.T)
    assert (C[:, whole[0] :] == SENTINEL).all()


@cache
def compiled_transpose():
    @numba.njit
    def transpose(like, C, C_row, A, A_row, n_rows, n_columns):
        products.transpose(pointer(like, C), C_row, pointer(like, A), A_row, n_rows, n_columns)

    return transpose

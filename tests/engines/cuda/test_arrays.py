"""What kernels are handed: copies only where they must be, pointers, places for results."""

import sys

import cupy_api
import emulation
import numpy as np
import pytest
from emulation import on_device

from mlp_backprop.engines.cuda import arrays as cuda_arrays
from mlp_backprop.types import Layer, flat


@pytest.mark.parametrize("n_in", [1, 2, 3, 4, 6])
def test_rows_are_aligned_to_the_vectors_they_are_read_in(n_in):
    memory = on_device(np.arange(8 * n_in + 65, dtype=np.float32))
    memory = memory[-memory.ctypes.data % 64 // 4 :]
    rows, off = (memory[k : k + 8 * n_in].reshape(8, n_in) for k in (0, 1))

    def is_copied(A):
        readable = cuda_arrays.readable(A, cuda_arrays.vector_bytes(n_in))
        np.testing.assert_array_equal(readable, A)
        assert readable.flags.c_contiguous
        return not np.shares_memory(readable, A)

    assert not is_copied(rows)
    assert not is_copied(rows[1:])
    assert is_copied(off) == (n_in % 2 == 0)
    assert is_copied(rows.copy(order="F")) == (n_in > 1)


def placed(values, shift=0):
    """On the device, `shift` numbers after a multiple of 64 bytes."""
    memory = on_device(np.zeros(values.size + 64 // values.itemsize + shift, values.dtype))
    start = -memory.ctypes.data % 64 // values.itemsize + shift
    array = memory[start : start + values.size].reshape(values.shape)
    array[...] = values
    return array


@pytest.mark.parametrize("shift", [0, 1])
def test_inputs_are_copied_only_where_kernels_cannot_read_them(shift):
    rng = np.random.default_rng(0)
    X, y, W, b, weight = (
        placed(rng.random(shape, np.float32), shift) for shape in ((6, 2), (6, 4), (4, 2), 4, 6)
    )
    arguments = cuda_arrays.Arguments([Layer(W, b)], X, y, weight, mean=True, out=None)
    own, *data = cuda_arrays.readable_inputs(arguments, X_vectors=8, y_vectors=16)
    for got, given, is_copied in zip(
        [*own, *data], (W, b, X, y, weight), (0, 0, 1, 1, 0), strict=True
    ):
        np.testing.assert_array_equal(got, given)
        assert (got is not given) == bool(shift and is_copied)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64])
def test_labels_need_no_vectors_and_some_a_cast(dtype):
    X, labels = placed(np.zeros((6, 2), np.float32)), placed(np.arange(6).astype(dtype), shift=1)
    arguments = cuda_arrays.Arguments([], X, labels, None, mean=True, out=None)
    _, _, y, weight = cuda_arrays.readable_inputs(arguments, X_vectors=8, y_vectors=16)
    np.testing.assert_array_equal(y, labels)
    assert (y is labels) == (dtype != np.int8)
    assert y.dtype == (np.int32 if dtype == np.int32 else np.int64)
    assert weight is cuda_arrays.NULL


def test_a_struct_of_pointers():
    arrays = [on_device(np.zeros(k + 1)) for k in range(4)]
    struct = cuda_arrays.pointers_to(arrays)
    assert struct.shape == (1,)  # one value, which CuPy passes as it is
    assert struct.tobytes() == np.array([A.data.ptr for A in arrays], np.uint64).tobytes()
    assert cuda_arrays.pointers_to(arrays[::-1]).tobytes() != struct.tobytes()


@pytest.fixture
def cupy(monkeypatch):
    cupy = cupy_api.library(
        {
            "empty": lambda shape, dtype: on_device(np.zeros(shape, dtype)),
            "ndarray": emulation.view,
        }
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)


def test_results_lie_side_by_side_in_the_order_of_the_parameters(cupy):
    results = cuda_arrays.Results((3, 4, 2))
    loss, grads = results(None)
    arrays = [*flat(grads), loss]
    assert [A.shape for A in arrays] == [(4, 3), (4,), (2, 4), (2,), ()]
    assert all(isinstance(layer, Layer) for layer in grads)
    ends = [A.data.ptr + A.nbytes for A in arrays]
    assert [A.data.ptr for A in arrays[1:]] == ends[:-1]
    other_loss, others = results(None)
    for A in arrays:
        assert A.dtype == np.float32
        assert not any(np.shares_memory(A, B) for B in [*flat(others), other_loss])


def test_results_in_arrays_of_the_caller(cupy):
    _, out = cuda_arrays.Results((3, 2))(None)
    loss, grads = cuda_arrays.Results((3, 2))(out)
    assert grads is out
    assert loss.shape == ()
    assert not any(np.shares_memory(loss, A) for A in flat(out))

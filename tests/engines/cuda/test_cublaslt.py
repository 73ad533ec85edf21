"""Products by cuBLASLt: the binding against a library of host memory, which reads by columns."""

import ctypes
import gc
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from host_device import ELEMENTS, HostDevice, to_bfloat16, to_float
from numpy.testing import assert_allclose, assert_array_equal

from mlp_backprop.engines.cuda import cublaslt
from mlp_backprop.engines.cuda.cublaslt import Matrix

# Name of the precision: dtypes of operands and result, and the error of the model of each.
PRECISIONS = {
    "float32": ("float32", "float32", 1e-6),
    "float32_exact": ("float32", "float32", 1e-6),
    "float64": ("float64", "float64", 1e-14),
    "tf32": ("float32", "float32", 2e-3),
    "bfloat16": ("bfloat16", "float32", 1e-6),
}


@pytest.fixture
def device(monkeypatch):
    device = HostDevice()
    device.install(monkeypatch)
    yield device
    assert not device.lt.errors
    device.check_guards()


def place(device, A, stride, dtype):
    """A by rows, `stride` elements apart, with nan between them."""
    memory = device.empty((len(A), stride), ELEMENTS[dtype])
    memory[:, : A.shape[1]] = to_bfloat16(A) if dtype == "bfloat16" else A
    # The last row ends with its last element.
    flat = device.empty((len(A) - 1) * stride + A.shape[1], memory.dtype)
    flat[...] = memory.reshape(-1)[: flat.size]
    return flat


def run(device, A, B, *, transpose_A=False, transpose_B=False, compute="float32", **options):
    """A product through the binding, with rows farther apart than they are long."""
    operand, result, _ = PRECISIONS[compute]
    shape = (A.shape[transpose_A], B.shape[not transpose_B])
    C = options.get("C", np.full(shape, np.nan))
    strides = [M.shape[1] + gap for M, gap in ((A, 3), (B, 5), (C, 1))]
    memory = [
        place(device, M, stride, dtype)
        for M, stride, dtype in zip((A, B, C), strides, (operand, operand, result), strict=True)
    ]
    matrices = [
        Matrix(*M.shape, stride, dtype)
        for M, stride, dtype in zip((A, B, C), strides, (operand, operand, result), strict=True)
    ]
    flags = {"transpose_A": transpose_A, "transpose_B": transpose_B}
    product = cublaslt.product(0, *matrices, compute=compute, **flags)
    workspace = device.empty(cublaslt.WORKSPACE_BYTES, np.uint8)
    product(
        *(M.data.ptr for M in memory),
        accumulate="C" in options,
        workspace=workspace.data.ptr,
        stream=0,
        **({"scale": options["scale"]} if "scale" in options else {}),
    )
    rows = np.lib.stride_tricks.as_strided(
        memory[2], C.shape, (strides[2] * memory[2].itemsize, memory[2].itemsize)
    )
    return to_float(rows)


@pytest.mark.parametrize("compute", PRECISIONS)
@pytest.mark.parametrize("transpose_B", [False, True])
@pytest.mark.parametrize("transpose_A", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 4), (4, 2, 1), (1, 5, 3), (1, 1, 1)])
def test_products_by_rows(device, shape, transpose_A, transpose_B, compute):
    m, k, n = shape
    rng = np.random.default_rng(0)
    A, B, C = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=(m, n))
    if compute == "bfloat16":
        A, B = (to_float(to_bfloat16(M)) for M in (A, B))
    operands = (A.T if transpose_A else A, B.T if transpose_B else B)
    flags = {"transpose_A": transpose_A, "transpose_B": transpose_B, "compute": compute}
    tolerance = PRECISIONS[compute][2] * k
    assert_allclose(run(device, *operands, **flags), A @ B, atol=tolerance)
    assert_allclose(run(device, *operands, **flags, C=C), C + A @ B, atol=tolerance)
    scaled = run(device, *operands, **flags, C=C, scale=1 / 3)
    assert_allclose(scaled, C + (A @ B) / 3, atol=tolerance)


@pytest.mark.parametrize("compute", PRECISIONS)
def test_the_scale_is_of_the_compute_type(device, compute):
    one, third = np.ones((1, 1)), 1 / 3
    got = run(device, one, one, compute=compute, scale=third)
    exact = third if compute == "float64" else np.float32(third)
    assert_array_equal(got, [[exact]])


def test_what_the_library_is_asked(device):
    A, B = Matrix(7, 3, 4, "float32"), Matrix(5, 3, 3, "float32")
    cublaslt.product(0, A, B, Matrix(7, 5, 8, "float32"), transpose_B=True, compute="tf32")
    (question,) = device.lt.heuristics
    assert question["compute"] == 77
    assert question["scale"] == 0
    # By columns, so transposed; B comes first.
    assert question["A"] == ("float32", 3, 5, 3)
    assert question["B"] == ("float32", 3, 7, 4)
    assert question["C"] == ("float32", 5, 7, 8)
    assert (question[cublaslt.DESC_TRANSPOSE_A], question[cublaslt.DESC_TRANSPOSE_B]) == (1, 0)
    # No sums in place: their order would be that of the blocks. Nothing but addresses of 16 bytes.
    assert question["preference"] == {1: 1 << 10, 3: 2, 5: 16, 6: 16, 7: 16, 8: 16}


def test_the_struct_that_the_library_fills():
    """64 bytes of algorithm, a size, two 4-byte numbers and 16 bytes that are reserved."""
    layout = {
        name: getattr(cublaslt.Heuristic, name).offset for name, _ in cublaslt.Heuristic._fields_
    }
    assert layout == {
        "algorithm": 0,
        "workspace_bytes": 64,
        "status": 72,
        "waves": 76,
        "reserved": 80,
    }
    assert ctypes.sizeof(cublaslt.Heuristic) == 96


def test_a_shape_is_planned_once(device):
    M = Matrix(4, 4, 4, "float32")
    first = cublaslt.product(0, M, M, M, compute="float32")
    assert cublaslt.product(0, M, M, M, compute="float32") is first
    assert cublaslt.product(0, M, M, M, compute="tf32") is not first
    assert cublaslt.product(0, M, M, M, compute="float32", transpose_A=True) is not first
    assert len(device.lt.heuristics) == 3


def test_nothing_of_the_library_is_left_behind(device):
    M = Matrix(4, 4, 4, "float32")
    product = cublaslt.Product(0, M, M, M, False, False, "float32")
    assert len(device.lt.live) == 6  # handle, descriptor, three layouts, preference
    del product
    gc.collect()
    assert list(device.lt.live.values()) == ["handle"]


def test_a_product_without_an_algorithm(device):
    device.lt.unsupported = lambda question: question["A"][0] == "float64"
    M = Matrix(4, 4, 4, "float32")
    cublaslt.product(0, M, M, M, compute="float32")
    M = M._replace(dtype="float64")
    with pytest.raises(cublaslt.Unsupported, match="cublasLtMatmulAlgoGetHeuristic"):
        cublaslt.product(0, M, M, M, compute="float64")


def test_errors_name_the_function_and_the_status(device):
    M = Matrix(4, 4, 4, "float32")
    product = cublaslt.product(0, M, M, M, compute="float32")
    device.lt.statuses["cublasLtMatmul"] = 13
    with pytest.raises(RuntimeError, match=r"^cublasLtMatmul: STATUS_13$"):
        product(0, 0, 0, workspace=0, stream=0)
    cublaslt.handle.cache_clear()
    device.lt.statuses["cublasLtCreate"] = cublaslt.NOT_INITIALIZED
    with pytest.raises(RuntimeError, match="cublasLtCreate: STATUS_1: no usable device"):
        cublaslt.handle(0)


def test_without_the_library(monkeypatch):
    def load(name):
        raise RuntimeError(f"no {name}")

    pathfinder = SimpleNamespace(load_nvidia_dynamic_lib=load)
    monkeypatch.setitem(sys.modules, "cuda", SimpleNamespace(pathfinder=pathfinder))
    with pytest.raises(ImportError, match=r"no cublasLt\): pip install 'mlp-backprop\[cuda12\]'"):
        cublaslt.library.__wrapped__()


# The library itself, which loads without a driver; test_cublaslt_header.py reads its header -------


@pytest.fixture
def library():
    try:
        return cublaslt.library()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.kernels
def test_numbers_of_the_library(library):
    """Set through the binding, then read back by the getters of the C API."""
    layout = cublaslt._create("cublasLtMatrixLayoutCreate", 14, 3, 5, 8)
    descriptor = cublaslt._create("cublasLtMatmulDescCreate", 77, 0)
    flag = ctypes.c_int32(cublaslt.TRANSPOSE)
    set_attribute = "cublasLtMatmulDescSetAttribute"
    cublaslt._set(set_attribute, descriptor, cublaslt.DESC_TRANSPOSE_B, flag)

    def read(getter, thing, attribute, ctype):
        value, written = ctype(), ctypes.c_size_t()
        status = getattr(library, getter)(
            *(ctypes.c_void_p(thing), attribute, ctypes.byref(value)),
            *(ctypes.c_size_t(ctypes.sizeof(value)), ctypes.byref(written)),
        )
        assert (status, written.value) == (0, ctypes.sizeof(value))
        return value.value

    kinds = (ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64)
    got = [
        read("cublasLtMatrixLayoutGetAttribute", layout, attribute, kind)
        for attribute, kind in enumerate(kinds)
    ]
    assert got == [14, 0, 3, 5, 8]  # type, order by columns, rows, columns, stride
    got = [
        read("cublasLtMatmulDescGetAttribute", descriptor, attribute, ctypes.c_int32)
        for attribute in (0, 1, cublaslt.DESC_TRANSPOSE_A, cublaslt.DESC_TRANSPOSE_B)
    ]
    assert got == [77, 0, 0, 1]  # compute type, type of alpha, flags
    preference = cublaslt._create("cublasLtMatmulPreferenceCreate")
    for attribute, default in zip(cublaslt.PREF_ALIGNMENTS, [256] * 4, strict=True):
        kind = ctypes.c_uint32
        assert read("cublasLtMatmulPreferenceGetAttribute", preference, attribute, kind) == default
    library.cublasLtMatrixLayoutDestroy(layout)
    library.cublasLtMatmulDescDestroy(descriptor)
    library.cublasLtMatmulPreferenceDestroy(preference)
    assert library.cublasLtGetStatusName(15) == b"CUBLAS_STATUS_NOT_SUPPORTED"


# On a device -------------------------------------------------------------------------------------


# Relative to the norms of the operands.
BOUNDS = {"float32": 2e-6, "float32_exact": 2e-6, "float64": 1e-14, "tf32": 2e-3, "bfloat16": 2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("compute", BOUNDS)
@pytest.mark.parametrize("shape", [(2048, 784, 1024), (1000, 1, 3), (8, 3000, 10), (1, 64, 1)])
def test_products_on_a_device(cupy, shape, compute):
    m, k, n = shape
    operand, result, _ = PRECISIONS[compute]
    rng = np.random.default_rng(0)
    A, B, C = rng.normal(size=(m, k)), rng.normal(size=(k, n)), rng.normal(size=(m, n))
    gap = 16 // {"float32": 4, "float64": 8, "bfloat16": 2}[operand]
    padded = [np.pad(M, ((0, 0), (0, gap))) for M in (A, B)]
    if operand == "bfloat16":
        padded = [to_bfloat16(M) for M in padded]
    on_device = [cupy.asarray(M.astype(ELEMENTS[operand])) for M in padded]
    matrices = [Matrix(*M.shape, M.shape[1] + gap, operand) for M in (A, B)]
    product = cublaslt.product(0, *matrices, Matrix(m, n, n, result), compute=compute)
    workspace = cupy.empty(cublaslt.WORKSPACE_BYTES, np.uint8)
    bound = BOUNDS[compute] * np.linalg.norm(A) * np.linalg.norm(B)

    def run(accumulate, scale=1.0):
        sums = cupy.asarray(C.astype(ELEMENTS[result]))
        product(
            *(M.data.ptr for M in (*on_device, sums)),
            scale=scale,
            accumulate=accumulate,
            workspace=workspace.data.ptr,
            stream=cupy.cuda.get_current_stream().ptr,
        )
        return sums.get()

    assert_allclose(run(False), A @ B, rtol=0, atol=bound)
    assert_allclose(run(True), C + A @ B, rtol=0, atol=bound)
    assert_allclose(run(True, 1 / 3), C + (A @ B) / 3, rtol=0, atol=bound)
    assert_array_equal(run(True), run(True))


@pytest.mark.gpu
def test_nan_passes_on_a_device(cupy):
    M = Matrix(64, 64, 64, "float32")
    A, B, C = (cupy.ones((64, 64), cupy.float32) for _ in range(3))
    A[3, 5] = cupy.nan
    workspace = cupy.empty(cublaslt.WORKSPACE_BYTES, np.uint8)
    stream = cupy.cuda.get_current_stream().ptr
    product = cublaslt.product(0, M, M, M, compute="tf32")
    product(A.data.ptr, B.data.ptr, C.data.ptr, workspace=workspace.data.ptr, stream=stream)
    expected = np.full((64, 64), 64.0)
    expected[3] = np.nan
    assert_array_equal(C.get(), expected)

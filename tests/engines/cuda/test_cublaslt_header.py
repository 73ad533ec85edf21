"""The numbers and signatures of cublaslt.py against cublasLt.h, which comes with NVIDIA's wheel.

    make test-kernels

installs that: it is a few hundred megabytes.
"""

import ctypes
import re
import sys
from pathlib import Path

import pytest

from mlp_backprop.engines.cuda import cublaslt

pytestmark = pytest.mark.kernels


@pytest.fixture(scope="module")
def headers():
    """cublasLt.h and cublas_api.h, without comments."""
    found = [file for path in sys.path for file in Path(path).glob("nvidia/*/include/cublasLt.h")]
    if not found:
        pytest.skip("nvidia-cublas is not installed: make test-kernels")
    files = found[0], found[0].with_name("cublas_api.h")
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


NUMBERS = {
    "CUBLAS_COMPUTE_32F": cublaslt.COMPUTE_TYPES["float32"],
    "CUBLAS_COMPUTE_32F_PEDANTIC": cublaslt.COMPUTE_TYPES["float32_exact"],
    "CUBLAS_COMPUTE_64F": cublaslt.COMPUTE_TYPES["float64"],
    "CUBLAS_COMPUTE_32F_FAST_TF32": cublaslt.COMPUTE_TYPES["tf32"],
    "CUBLAS_OP_T": cublaslt.TRANSPOSE,
    "CUBLASLT_MATMUL_DESC_TRANSA": cublaslt.DESC_TRANSPOSE_A,
    "CUBLASLT_MATMUL_DESC_TRANSB": cublaslt.DESC_TRANSPOSE_B,
    "CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES": cublaslt.PREF_WORKSPACE,
    "CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK": cublaslt.PREF_REDUCTION,
    **{
        f"CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{M}_BYTES": number
        for M, number in zip("ABCD", cublaslt.PREF_ALIGNMENTS, strict=True)
    },
    "CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE": cublaslt.REDUCTION_IN_COMPUTE_TYPE,
    "CUBLAS_STATUS_SUCCESS": 0,
    "CUBLAS_STATUS_NOT_INITIALIZED": cublaslt.NOT_INITIALIZED,
    "CUBLAS_STATUS_NOT_SUPPORTED": cublaslt.NOT_SUPPORTED,
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers(headers, name):
    assert re.findall(rf"\b{name} = (\d+)", headers) == [str(NUMBERS[name])]


HANDLES = r"cublasLt(Handle|MatrixLayout|MatmulDesc|MatmulPreference)_t$|cudaStream_t$"
NUMBER_TYPES = {
    "size_t": ctypes.c_size_t,
    "uint64_t": ctypes.c_uint64,
    "int64_t": ctypes.c_int64,
}


def c_type(declared):
    """What ctypes passes for a parameter "const void* name": the rest are int and enums."""
    kind, _, name = declared.strip().rpartition(" ")
    if "*" in declared or name.endswith("[]") or re.match(HANDLES, kind):
        return ctypes.c_void_p
    return NUMBER_TYPES.get(kind, ctypes.c_int)


@pytest.mark.parametrize("function", cublaslt.SIGNATURES)
def test_signatures(headers, function):
    (parameters,) = re.findall(rf"cublasStatus_t CUBLASWINAPI {function}\((.*?)\);", headers, re.S)
    assert tuple(map(c_type, parameters.split(","))) == cublaslt.SIGNATURES[function]


def test_the_struct_of_a_heuristic(headers):
    (fields,) = re.findall(r"struct \{([^}]*)\} cublasLtMatmulHeuristicResult_t;", headers)
    declared = [re.split(r"\s+(?=\S+$)", field.strip())[0] for field in fields.split(";")[:-1]]
    expected = ["cublasLtMatmulAlgo_t", "size_t", "cublasStatus_t", "float", "int"]
    assert declared == expected
    assert re.search(r"int reserved\[4\]", fields)
    assert re.search(r"uint64_t data\[8\];\s*\} cublasLtMatmulAlgo_t;", headers)

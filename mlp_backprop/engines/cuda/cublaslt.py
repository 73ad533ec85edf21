"""cuBLASLt by ctypes: products of row-major matrices on the device, planned once per shape.

CuPy's own calls of cuBLAS cannot be captured in a CUDA graph, and their compute type is a switch
for the whole process; here stream, workspace and compute type belong to the product.

cuBLAS stores matrices by columns. What is (rows, columns) by rows, with `stride` elements from row
to row, is its transpose by columns, with that leading dimension. So the operands change places,

    C = op(A) op(B)  by rows        is        Cᵀ = op(B)ᵀ op(A)ᵀ  by columns,

each keeps its flag, and nothing is moved. Columns come in nowhere but in Product.

Of the epilogues none is used. The one for relu makes 0 of nan, which would hide a net that has
diverged; those for biases and their gradients would spare nothing, since a kernel goes over the
same elements for the activation, which is in none of them for most. Numbers are those of
cublasLt.h.
"""

import ctypes
import weakref
from functools import cache, lru_cache
from typing import Any, NamedTuple

ALIGNMENT = 16  # bytes, of every matrix: what vector loads and the tensor memory engine ask for
WORKSPACE_BYTES = 32 << 20  # what cuBLAS takes for itself on the largest devices

DATA_TYPES = {"float32": 0, "float64": 1, "bfloat16": 14}  # cudaDataType

COMPUTE_TYPES = {  # cublasComputeType
    "float32": 68,
    "float32_exact": 69,  # "pedantic": float32 in all phases
    "float64": 70,
    "tf32": 77,
    "bfloat16": 68,  # of the operands; sums are float32
}

TRANSPOSE = 1  # cublasOperation
DESC_TRANSPOSE_A, DESC_TRANSPOSE_B = 3, 4  # cublasLtMatmulDescAttributes
PREF_WORKSPACE, PREF_REDUCTION, PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)  # ...MatmulPreference...

# Parts of a long product (a dE/dW of few tiles and many rows) may be summed in a second step, in
# the compute type, from the workspace: the library's heuristic decides whether, and how many.
# In place, the order would be that in which they are done.
REDUCTION_IN_COMPUTE_TYPE = 2

NOT_INITIALIZED, NOT_SUPPORTED = 1, 15  # cublasStatus

_int, _pointer, _size = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t

# Each returns a cublasStatus; pointers to what is created come first.
SIGNATURES = {
    "cublasLtCreate": (_pointer,),
    "cublasLtMatrixLayoutCreate": (
        _pointer,
        _int,
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_int64,
    ),
    "cublasLtMatrixLayoutDestroy": (_pointer,),
    "cublasLtMatmulDescCreate": (_pointer, _int, _int),
    "cublasLtMatmulDescSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatmulDescDestroy": (_pointer,),
    "cublasLtMatmulPreferenceCreate": (_pointer,),
    "cublasLtMatmulPreferenceSetAttribute": (_pointer, _int, _pointer, _size),
    "cublasLtMatmulPreferenceDestroy": (_pointer,),
    # handle, descriptor, layouts A B C D, preference, wanted, results, found
    "cublasLtMatmulAlgoGetHeuristic": (*(_pointer,) * 7, _int, _pointer, _pointer),
    # handle, descriptor, alpha, A and layout, B and layout, beta, C and layout, D and layout,
    # algorithm, workspace and its size, stream
    "cublasLtMatmul": (*(_pointer,) * 14, _size, _pointer),
}


class Heuristic(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t: an algorithm, and what it needs."""

    _fields_ = (
        ("algorithm", ctypes.c_uint64 * 8),
        ("workspace_bytes", _size),
        ("status", _int),
        ("waves", ctypes.c_float),
        ("reserved", _int * 4),
    )


class Unsupported(RuntimeError):
    """cuBLASLt has no algorithm for a product."""


class Matrix(NamedTuple):
    """A row-major matrix: its shape, elements from row to row, and a key of DATA_TYPES."""

    rows: int
    columns: int
    stride: int
    dtype: str


@cache
def library() -> Any:
    """The library that the CUDA extras install, or that of the system."""
    try:
        from cuda import pathfinder

        found = pathfinder.load_nvidia_dynamic_lib("cublasLt")
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"backend 'cupy' needs cuBLASLt ({error}): pip install 'mlp-backprop[cuda12]' "
            "or pip install 'mlp-backprop[cuda13]'"
        ) from error
    lib = ctypes.CDLL(found.abs_path)
    for name, arguments in SIGNATURES.items():
        getattr(lib, name).argtypes = arguments
    lib.cublasLtGetStatusName.restype = ctypes.c_char_p
    return lib


@cache
def handle(device: int) -> int:
    """The context of cuBLASLt on a device, which must be the current one."""
    return _create("cublasLtCreate")


def _call(function: str, *arguments: Any) -> None:
    lib = library()
    status = getattr(lib, function)(*arguments)
    if status == 0:
        return
    name = lib.cublasLtGetStatusName(status).decode()
    hint = ": no usable device, or a driver older than cuBLAS" if status == NOT_INITIALIZED else ""
    raise (Unsupported if status == NOT_SUPPORTED else RuntimeError)(f"{function}: {name}{hint}")


def _create(function: str, *arguments: Any) -> int:
    made = _pointer()
    _call(function, ctypes.byref(made), *arguments)
    assert made.value is not None
    return made.value


def _set(function: str, target: int, attribute: int, value: Any) -> None:
    _call(function, target, attribute, ctypes.byref(value), ctypes.sizeof(value))


class Product:
    """C = scale op(A) op(B), or C + scale op(A) op(B), for matrices of given shapes.

    Nothing in it changes after it is made, so that threads may share it.
    """

    def __init__(
        self,
        device: int,
        A: Matrix,
        B: Matrix,
        C: Matrix,
        transpose_A: bool,
        transpose_B: bool,
        compute: str,
    ) -> None:
        self.handle = handle(device)
        self.scalar: Any = ctypes.c_double if compute == "float64" else ctypes.c_float
        scalar_type = "float64" if compute == "float64" else "float32"
        self.zero, self.one = (ctypes.byref(self.scalar(number)) for number in (0, 1))
        self.descriptor = self._own(
            "cublasLtMatmulDesc", COMPUTE_TYPES[compute], DATA_TYPES[scalar_type]
        )
        # B is the first operand of the transposed product.
        self.layouts = tuple(self._layout(M) for M in (B, A, C))
        for attribute, transposed in (
            (DESC_TRANSPOSE_A, transpose_B),
            (DESC_TRANSPOSE_B, transpose_A),
        ):
            flag = ctypes.c_int32(TRANSPOSE if transposed else 0)
            _set("cublasLtMatmulDescSetAttribute", self.descriptor, attribute, flag)
        self.algorithm = self._algorithm(f"{A} {B} -> {C}")

    def _own(self, kind: str, *arguments: Any) -> int:
        """Something of the library's that lives as long as the product."""
        made = _create(f"{kind}Create", *arguments)
        weakref.finalize(self, getattr(library(), f"{kind}Destroy"), made)
        return made

    def _layout(self, M: Matrix) -> int:
        return self._own("cublasLtMatrixLayout", DATA_TYPES[M.dtype], M.columns, M.rows, M.stride)

    def _algorithm(self, shapes: str) -> Any:
        """The first choice of the library among those that repeat to the last bit."""
        preference = self._own("cublasLtMatmulPreference")
        for attribute, value in (
            (PREF_WORKSPACE, ctypes.c_uint64(WORKSPACE_BYTES)),
            (PREF_REDUCTION, ctypes.c_uint32(REDUCTION_IN_COMPUTE_TYPE)),
            *((attribute, ctypes.c_uint32(ALIGNMENT)) for attribute in PREF_ALIGNMENTS),
        ):
            _set("cublasLtMatmulPreferenceSetAttribute", preference, attribute, value)
        first, second, result = self.layouts
        best, found = Heuristic(), _int()
        _call(
            "cublasLtMatmulAlgoGetHeuristic",
            self.handle,
            self.descriptor,
            first,
            second,
            result,
            result,
            preference,
            1,
            ctypes.byref(best),
            ctypes.byref(found),
        )
        if found.value == 0 or best.status != 0:
            raise Unsupported(f"cuBLASLt has no algorithm for {shapes}")
        return ctypes.byref(best.algorithm)

    def __call__(
        self,
        A: int,
        B: int,
        C: int,
        *,
        scale: float = 1.0,
        accumulate: bool = False,
        workspace: int,
        stream: int,
    ) -> None:
        """Enqueue the product of matrices at these addresses on a stream."""
        first, second, result = self.layouts
        _call(
            "cublasLtMatmul",
            self.handle,
            self.descriptor,
            ctypes.byref(self.scalar(scale)),
            B,
            first,
            A,
            second,
            self.one if accumulate else self.zero,
            C,
            result,
            C,
            result,
            self.algorithm,
            workspace,
            WORKSPACE_BYTES,
            stream,
        )


@lru_cache(maxsize=1024)
def product(
    device: int,
    A: Matrix,
    B: Matrix,
    C: Matrix,
    *,
    transpose_A: bool = False,
    transpose_B: bool = False,
    compute: str,
) -> Product:
    """The Product of these shapes on a device, planned at the first call."""
    return Product(device, A, B, C, transpose_A, transpose_B, compute)

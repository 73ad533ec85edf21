"""A device made of host memory: so much of CuPy and cuBLASLt that whole passes run without a GPU.

    cupy      arrays in memory with guards, streams, graphs that record and replay; made by
              cupy_api.py, so that nothing is offered that the real library has not
    library   the C functions of cuBLASLt that cublaslt.py binds, over the C calling convention;
              matrices are read by columns, as cuBLAS does, and multiplied in float64
    module    kernels in the emulation

All work goes through `enqueue`, which does it at once or records it. Addresses outside of what is
allocated fail; fresh memory holds nan. Memory of arrays that are gone holds nan at once, and is
given out again.
"""

import ctypes
import sys
import weakref
from functools import lru_cache
from types import SimpleNamespace

import cupy_api
import emulation
import numpy as np

from mlp_backprop.engines.cuda import build, cublaslt

GUARD = 256  # bytes, before and after each array
MOST_NUMBER = 1 << 40  # that a kernel is given: beyond are addresses
DTYPES = {number: name for name, number in cublaslt.DATA_TYPES.items()}
ELEMENTS = {"float32": np.float32, "float64": np.float64, "bfloat16": np.uint16}


class HostDevice:
    """What the tests put in place of a device; see `install`."""

    def __init__(self, l2_bytes=1 << 20, free_bytes=1 << 40):
        self.blocks = []  # all memory: (address, bytes, with what lies around it)
        self.live = {}  # address: bytes, of each array
        self.free = {}  # bytes: addresses and memory, as in CuPy's pool
        self.recording = None
        self.launches = []  # names, in order
        self.n_graph_launches = 0
        self.current = 0
        self.lt = HostCublasLt(self)
        self.facts = {
            "id": 0,
            "mem_info": (free_bytes, 1 << 40),
            "compute_capability": "90",
            "attributes": cupy_api.attributes(
                L2CacheSize=l2_bytes,
                MaxSharedMemoryPerBlockOptin=227 * 1024,
                MaxSharedMemoryPerMultiprocessor=228 * 1024,
                MultiProcessorCount=3,
            ),
        }
        pool = cupy_api.instance("cuda.MemoryPool", free_bytes=lambda: 0)
        self.cupy = cupy_api.library(
            {
                "empty": self.empty,
                "zeros": lambda shape, dtype: self.array(np.zeros(shape, dtype)),
                "ndarray": ndarray,
                "ascontiguousarray": self.ascontiguousarray,
                "divide": np.divide,
                "get_default_memory_pool": lambda: pool,
                "cuda.Device": lambda: HostCard(self),
                "cuda.Stream": lambda non_blocking: HostStream(self),
                "cuda.get_current_stream": lambda: cupy_api.instance(
                    "cuda.Stream", ptr=self.current
                ),
                "cuda.memory.OutOfMemoryError": MemoryError,
                "cuda.runtime.getDevice": lambda: 0,
            }
        )

    def install(self, monkeypatch):
        """Put this device in the place of CuPy, cuBLASLt and NVRTC."""
        monkeypatch.setitem(sys.modules, "cupy", self.cupy)
        monkeypatch.setattr(cublaslt, "library", lambda: self.lt.library)
        monkeypatch.setattr(cublaslt, "WORKSPACE_BYTES", 1 << 10)
        monkeypatch.setattr(build, "module", self.module)
        for name in ("handle", "product"):  # what they keep is this device's
            cached = lru_cache(getattr(cublaslt, name).__wrapped__)
            monkeypatch.setattr(cublaslt, name, cached)

    def enqueue(self, work):
        if self.recording is None:
            work()
        else:
            self.recording.append(work)

    def launch_graph(self, work):
        self.n_graph_launches += 1
        for do in work:
            self.enqueue(do)

    # Memory --------------------------------------------------------------------------------------

    def empty(self, shape, dtype):
        assert self.recording is None, "memory is allocated while a graph is recorded"
        dtype = np.dtype(dtype)
        size = int(np.prod(shape)) * dtype.itemsize
        free = self.free.setdefault(size, [])
        address, memory = free.pop() if free else self._block(size)
        start = address - memory.ctypes.data
        memory[start : start + size] = 0xFF
        self.live[address] = size
        # Arrays and their views keep this alive.
        held = (ctypes.c_char * max(size, 1)).from_buffer(memory, start)
        weakref.finalize(held, self._release, address, memory).atexit = False
        array = np.ndarray(shape, dtype, buffer=held).view(HostArray)
        array.owner = self
        return array

    def _block(self, size):
        memory = np.full(size + 3 * GUARD, 0xFF, np.uint8)
        address = memory.ctypes.data + GUARD + -memory.ctypes.data % GUARD
        self.blocks.append((address, size, memory))
        return address, memory

    def _release(self, address, memory):
        """CuPy's pool gives it to the next who asks, who may write to it before a kernel runs."""
        size = self.live.pop(address)
        memory[...] = 0xFF
        self.free[size].append((address, memory))

    def array(self, values, shift=0):
        """Values placed on the device, `shift` elements away from where allocations begin."""
        values = np.asarray(values)
        array = self.empty(values.size + shift, values.dtype)[shift:].reshape(values.shape)
        array[...] = values
        return array

    def ascontiguousarray(self, array, dtype):
        if array.flags.c_contiguous and array.dtype == np.dtype(dtype):
            return array
        copy = self.empty(array.shape, dtype)
        copy[...] = array
        return copy

    def check(self, address, size):
        if size and not any(
            start <= address and address + size <= start + n for start, n in self.live.items()
        ):
            raise AssertionError(f"{size} bytes at {address:#x} belong to no array")

    def check_guards(self):
        for address, size, memory in self.blocks:
            start = address - memory.ctypes.data
            assert (memory[:start] == 0xFF).all(), "written before an array"
            assert (memory[start + size :] == 0xFF).all(), "written behind an array"

    # Kernels -------------------------------------------------------------------------------------

    def module(self, specialisation):
        compiled = emulation.module(specialisation)

        def get_function(name):
            def launch(grid, block, arguments):
                def work():
                    for argument in arguments:
                        if argument > MOST_NUMBER:
                            self.check(argument, 1)
                    compiled.launch(name, grid, block, *arguments)

                self.enqueue(work)
                self.launches.append(name)

            return launch

        return cupy_api.instance("RawModule", get_function=get_function)


class HostCard(cupy_api.StandIn, of="cuda.Device"):
    """The only device, which is always the current one."""

    def __init__(self, device):
        for name, fact in device.facts.items():
            setattr(self, name, fact)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


class HostArray(np.ndarray):
    """An array of HostDevice.empty, or a view of one."""

    owner = None

    def __array_finalize__(self, source):
        self.owner = getattr(source, "owner", None)

    @property
    def data(self):
        return HostMemory(self)

    @property
    def device(self):
        return HostCard(self.owner)

    def copy(self, order="C"):
        assert order == "C"
        copy = self.owner.empty(self.shape, self.dtype)
        copy[...] = self
        return copy


class HostMemory(cupy_api.StandIn, of="cuda.MemoryPointer"):
    """What lies in an array from an offset on."""

    device_id = 0

    def __init__(self, array, offset=0):
        self._array, self._offset, self._owner = array, offset, array.owner
        self.ptr = array.ctypes.data + offset if array.size else 0

    def __add__(self, offset):
        return HostMemory(self._array, self._offset + offset)

    def memset_async(self, value, size):
        self._owner.check(self.ptr, size)
        self._owner.enqueue(lambda: ctypes.memset(self.ptr, value, size))

    def copy_from_device_async(self, src, size):
        for pointer in (self.ptr, src.ptr):
            self._owner.check(pointer, size)
        self._owner.enqueue(lambda: ctypes.memmove(self.ptr, src.ptr, size))


def ndarray(shape, dtype, memory):
    """As cupy.ndarray: the numbers there."""
    size = np.dtype(dtype).itemsize * int(np.prod(shape))
    there = slice(memory._offset, memory._offset + size)
    return memory._array.reshape(-1).view(np.uint8)[there].view(dtype).reshape(shape)


class HostStream(cupy_api.StandIn, of="cuda.Stream"):
    def __init__(self, device):
        self._device, self.ptr = device, id(self)

    def __enter__(self):
        self._before, self._device.current = self._device.current, self.ptr
        return self

    def __exit__(self, *_):
        self._device.current = self._before

    def begin_capture(self):
        self._device.recording = []

    def end_capture(self):
        work, self._device.recording = self._device.recording, None
        return cupy_api.instance("cuda.Graph", launch=lambda: self._device.launch_graph(work))


# cuBLASLt ----------------------------------------------------------------------------------------


class HostCublasLt:
    """The functions of cublaslt.SIGNATURES. What they create has an address; `live` holds it."""

    def __init__(self, device):
        self.device = device
        self.live = {}
        self.heuristics = []  # one dict per question
        self.unsupported = lambda question: False
        self.statuses = {}  # function: what it returns in place of 0
        functions = {
            name: ctypes.CFUNCTYPE(ctypes.c_int, *arguments)(self._guarded(name))
            for name, arguments in cublaslt.SIGNATURES.items()
        }
        self.errors = []
        self.library = SimpleNamespace(
            **functions, cublasLtGetStatusName=lambda status: f"STATUS_{status}".encode()
        )

    def _guarded(self, name):
        """Errors in callbacks do not reach the caller, so they are kept, and made a status."""

        def function(*arguments):
            if name in self.statuses:
                return self.statuses[name]
            try:
                return getattr(self, name)(*arguments) or 0
            except Exception as error:
                self.errors.append(error)
                return 7

        return function

    def _create(self, place, thing):
        address = max(self.live, default=0x1000) + 16
        self.live[address] = thing
        ctypes.c_void_p.from_address(place).value = address

    def _set(self, target, attribute, buffer, size):
        self.live[target][attribute] = int.from_bytes(ctypes.string_at(buffer, size), "little")

    def _destroy(self, address):
        del self.live[address]

    def cublasLtCreate(self, place):
        self._create(place, "handle")

    def cublasLtMatrixLayoutCreate(self, place, dtype, rows, columns, stride):
        self._create(place, (DTYPES[dtype], rows, columns, stride))

    def cublasLtMatmulDescCreate(self, place, compute, scale):
        self._create(place, {"compute": compute, "scale": scale})

    def cublasLtMatmulPreferenceCreate(self, place):
        self._create(place, {})

    cublasLtMatmulDescSetAttribute = cublasLtMatmulPreferenceSetAttribute = _set
    cublasLtMatrixLayoutDestroy = cublasLtMatmulDescDestroy = _destroy
    cublasLtMatmulPreferenceDestroy = _destroy

    def _question(self, handle, descriptor, *layouts):
        assert self.live[handle] == "handle"
        A, B, C, D = (self.live[layout] for layout in layouts)
        assert C == D
        return {**self.live[descriptor], "A": A, "B": B, "C": C}

    def cublasLtMatmulAlgoGetHeuristic(self, *arguments):
        *problem, preference, wanted, results, found = arguments
        question = self._question(*problem)
        self.heuristics.append(question | {"preference": self.live[preference]})
        assert wanted == 1
        supported = not self.unsupported(question)
        best = cublaslt.Heuristic.from_address(results)
        best.algorithm[0] = hash(str(question)) % 2**63
        ctypes.c_int.from_address(found).value = supported
        return 0 if supported else cublaslt.NOT_SUPPORTED

    def cublasLtMatmul(self, handle, descriptor, alpha, *rest):
        A, A_layout, B, B_layout, beta, C, C_layout, D, D_layout, *run = rest
        algorithm, workspace, workspace_bytes, stream = run
        question = self._question(handle, descriptor, A_layout, B_layout, C_layout, D_layout)
        planned = ctypes.c_uint64.from_address(algorithm).value
        assert planned == hash(str(question)) % 2**63, "the algorithm is for another product"
        assert C == D
        assert (stream or 0) == self.device.current
        self.device.check(workspace, workspace_bytes)
        real = ctypes.c_double if question["scale"] == 1 else ctypes.c_float
        scales = [real.from_address(place).value for place in (alpha, beta)]
        self.device.enqueue(lambda: self._multiply(question, scales, A, B, C))
        self.device.launches.append("product")

    def _multiply(self, question, scales, A, B, C):
        compute = question["compute"]
        operands = []
        for name, address, flag in (("A", A, 3), ("B", B, 4)):
            M = self.matrix(question[name], address)
            operands.append(M.T if question[flag] else M)
        result = self.matrix(question["C"], C)
        assert not any(np.may_share_memory(result, M) for M in operands), "C is also an operand"
        first, second = (round_to(compute, to_float(M)) for M in operands)
        total = scales[0] * (first @ second)
        if scales[1]:  # beta = 0: C is not read
            total += scales[1] * to_float(result)
        result[...] = to_bfloat16(total) if result.dtype == np.uint16 else total

    def matrix(self, layout, address):
        """The matrix of a layout in memory, by columns."""
        dtype, rows, columns, stride = layout
        item = np.dtype(ELEMENTS[dtype])
        assert stride >= rows, "columns overlap"
        assert address % cublaslt.ALIGNMENT == 0, "the address is not aligned"
        size = (stride * (columns - 1) + rows) * item.itemsize
        self.device.check(address, size)
        memory = (ctypes.c_char * size).from_address(address)
        strides = (item.itemsize, stride * item.itemsize)
        return np.ndarray((rows, columns), item, buffer=memory, strides=strides)


def to_float(A):
    """Any numbers of the device in float64; uint16 stands for bfloat16."""
    if A.dtype == np.uint16:
        return (A.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return A.astype(np.float64)


def to_bfloat16(A):
    bits = np.asarray(A, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def round_to(compute, A):
    """What the tensor cores keep of an operand: of tf32 there are ten bits behind the point."""
    if compute != cublaslt.COMPUTE_TYPES["tf32"]:
        return A
    bits = A.astype(np.float32).view(np.uint32)
    return ((bits + 0x1000) & 0xFFFFE000).view(np.float32).astype(np.float64)

"""Runs the CUDA kernels of the package on the host, thread by thread: cuda_emulation/emulation.h.

The system's C++ compiler makes a library of a kernel's source; `Module.launch` then takes NumPy
arrays where the device takes pointers. Each array lies between guards filled with NaN, which are
looked at afterwards: a kernel that writes outside an array fails, one that reads there sees NaN.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import cupy_api
import numpy as np
import pytest
from locks import held

from mlp_backprop.engines.cuda import build

HERE = Path(__file__).parent
SOURCES = HERE.parent / "mlp_backprop" / "engines" / "cuda"
EMULATION = HERE / "cuda_emulation"
LIBRARIES = HERE.parent / "build" / "emulation"  # kept from run to run

COMPILER = shutil.which(os.environ.get("CXX", "c++"))
needs_compiler = pytest.mark.skipif(
    COMPILER is None or sys.platform != "linux",
    reason="needs Linux and a C++ compiler, c++ or $CXX",
)

GUARD = 256  # bytes
# Libraries of different constants must not share their statics.
FLAGS = ["-std=c++17", "-Og", "-shared", "-fPIC", "-fno-gnu-unique", "-w", "-DEMULATION"]


class EmulationError(Exception):
    """The kernel did what CUDA forbids: the message says what, and where."""


@cache
def library(code: str, defines: tuple[tuple[str, str], ...] = ()) -> ctypes.CDLL:
    """C++ that may include the sources of the package, compiled and loaded."""
    assert COMPILER is not None
    command = [COMPILER, *FLAGS, *(f"-D{name}={value}" for name, value in defines)]
    digest = hashlib.sha256("\0".join([*command, code]).encode())
    for file in sorted([*SOURCES.glob("*.cuh"), *EMULATION.glob("*.h")]):
        digest.update(file.read_bytes())
    path = LIBRARIES / f"{digest.hexdigest()[:32]}.so"
    if path.exists():
        return ctypes.CDLL(str(path))
    with held(path.with_suffix(".lock")):
        if not path.exists():
            compile_library(command, code, path)
    return ctypes.CDLL(str(path))


def compile_library(command: list[str], code: str, path: Path) -> None:
    folders = [f"-I{SOURCES}", f"-I{EMULATION}"]
    command = [*command, "-include", str(standard_headers()), *folders, "-x", "c++", "-"]
    run_compiler(command, path, code)


@cache
def standard_headers() -> Path:
    """What emulation.h includes of the C++ library: to read it is half of compiling most kernels.

    What lies beside it precompiled is taken in its place, unless another compiler has made that.
    """
    assert COMPILER is not None
    lines = re.findall("#include <.+>", (EMULATION / "emulation.h").read_text(encoding="utf-8"))
    code, command = "\n".join([*lines, ""]), [COMPILER, *FLAGS, "-x", "c++-header"]
    digest = hashlib.sha256("\0".join([*command, code]).encode())
    header = LIBRARIES / f"{digest.hexdigest()[:32]}.h"
    precompiled = header.with_suffix(".h.gch")
    with held(header.with_suffix(".lock")):
        if not precompiled.exists():
            header.write_text(code, encoding="utf-8")
            run_compiler([*command, str(header)], precompiled)
    return header


def run_compiler(command: list[str], path: Path, code: str = "") -> None:
    scratch = path.with_suffix(".new")
    command = [*command, "-o", str(scratch)]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")
    scratch.replace(path)


def module(specialisation: Any) -> "Module":
    """The kernels of a `build.Specialisation`."""
    return Module(specialisation.source, specialisation.kernels, specialisation.defines)


def faulty(source: str, fault: tuple[str, str] | None, folder: Path) -> Path:
    """A source of the package; with a fault, a copy in which a text is replaced by another."""
    if fault is None:
        return SOURCES / source
    text = build.source_text(source)
    if fault[0] not in text:  # no AssertionError, which a fault is allowed to raise
        raise LookupError(fault[0])
    copy = folder / source
    copy.write_text(text.replace(*fault))
    return copy


class Module:
    """Kernels of one source, a file of the package or any other, compiled with these defines."""

    def __init__(
        self, source: str, kernels: Iterable[str], defines: Iterable[tuple[str, str]] = ()
    ) -> None:
        code = (SOURCES / source).read_text(encoding="utf-8")
        entries = "".join(f"EMULATED({kernel})\n" for kernel in kernels)
        self.library = library(f'#line 1 "{SOURCES / source}"\n{code}{entries}', tuple(defines))

    def launch(
        self,
        kernel: str,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *arguments: Any,
        shared_bytes: int = 0,
        backward: bool = False,
    ) -> None:
        """Run a grid of blocks; arrays are changed in place.

        Arguments are as for CuPy: C-contiguous arrays, None for a null pointer, NumPy numbers of
        the kernel's own types, int for int64, float for double; also lists of arrays, for a struct
        of pointers, or such a struct itself. `backward` runs blocks and threads from the last to
        the first.
        """
        arrays: list[Guarded] = []

        def address(argument: Any) -> Any:
            if argument is None:
                return None
            arrays.append(Guarded(argument))
            return arrays[-1].address

        def value(argument: Any) -> Any:
            """What the kernel gets: kept alive until it has run."""
            if isinstance(argument, np.ndarray) and argument.dtype.kind == "V":
                return (ctypes.c_char * argument.nbytes).from_buffer_copy(argument.tobytes())
            if isinstance(argument, list):
                return (ctypes.c_void_p * len(argument))(*map(address, argument))
            if argument is None or isinstance(argument, np.ndarray):
                return ctypes.c_void_p(address(argument))
            if isinstance(argument, int | float):
                argument = np.asarray(argument)[()]
            if isinstance(argument, np.generic):
                return np.ctypeslib.as_ctypes_type(argument.dtype)(argument.item())
            return argument

        values = [value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        launch = self.library[f"emulated_{kernel}"]
        launch.restype = ctypes.c_char_p
        error = launch(
            _three(grid), _three(block), ctypes.c_size_t(shared_bytes), backward, pointers
        )
        if error:
            raise EmulationError(error.decode())
        for guarded in arrays:
            guarded.copy_back()


def _three(size: int | Sequence[int]) -> Any:
    sizes = [size] if isinstance(size, int) else list(size)
    return (ctypes.c_uint * 3)(*sizes, *[1] * (3 - len(sizes)))


class Guarded:
    """A copy of an array between guards, aligned as the array itself is."""

    def __init__(self, array: np.ndarray) -> None:
        assert array.flags.c_contiguous
        self.array = array
        self.memory = np.full(array.nbytes + 4 * GUARD, 0xFF, np.uint8)
        self.start = GUARD + (array.ctypes.data - self.memory.ctypes.data) % GUARD
        self.address = self.memory.ctypes.data + self.start
        self.inside[...] = array.reshape(-1).view(np.uint8)

    @property
    def inside(self) -> np.ndarray:
        return self.memory[self.start : self.start + self.array.nbytes]

    def copy_back(self) -> None:
        outside = (self.memory[: self.start], self.memory[self.start + self.array.nbytes :])
        if not all((part == 0xFF).all() for part in outside):
            raise EmulationError(f"an array of {self.array.shape} was written to outside")
        if self.array.flags.writeable:
            self.array.reshape(-1).view(np.uint8)[...] = self.inside


# Arrays that tell their address as CuPy's do ------------------------------------------------------


class Place(cupy_api.StandIn, of="cuda.MemoryPointer"):
    """A byte of an array."""

    def __init__(self, array: np.ndarray, offset: int = 0) -> None:
        self._array, self._offset = array, offset
        self.ptr = array.ctypes.data + offset

    def __add__(self, offset: int) -> "Place":
        return Place(self._array, self._offset + offset)


class DeviceArray(np.ndarray):
    """A NumPy array with CuPy's `data`."""

    @property
    def data(self) -> Place:
        return Place(self)


def on_device(A: np.ndarray | None) -> DeviceArray | None:
    return None if A is None else A.view(DeviceArray)


def cupy_of(attributes: Callable[[], dict[str, int]]) -> Any:
    """What narrow nets ask of CuPy; new arrays are full of nan. A device has these attributes."""
    return cupy_api.library(
        {
            "empty": lambda shape, dtype: on_device(np.full(shape, np.nan, dtype)),
            "zeros": lambda shape, dtype: on_device(np.zeros(shape, dtype)),
            "ndarray": view,
            "cuda.Device": lambda: cupy_api.instance("cuda.Device", attributes=attributes()),
        }
    )


def view(shape: tuple[int, ...], dtype: Any, place: Place) -> DeviceArray:
    """As cupy.ndarray(shape, dtype, memory)."""
    n_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = place._array.reshape(-1).view(np.uint8)[place._offset :][:n_bytes]
    return memory.view(dtype).reshape(shape)

"""NVRTC by itself: CUDA sources compiled on machines without a GPU.

The library comes with the wheel nvidia-cuda-nvrtc; the C API is called through ctypes. The tests
look at what ptxas reports each kernel to use, and at the PTX itself.
"""

import ctypes
import re
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from functools import cache
from importlib import metadata
from typing import NamedTuple

import pytest


class Usage(NamedTuple):
    """What ptxas says of one kernel: registers per thread, and bytes."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int  # static


WHEELS = ("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12")


@cache
def library():
    """The shared library of the wheel; the test is skipped where there is none."""
    for wheel in WHEELS:
        for distribution in metadata.distributions(name=wheel):
            for file in distribution.files or ():
                if re.fullmatch(r"libnvrtc\.so\.\d+|nvrtc64_\w+\.dll", file.name):
                    return ctypes.CDLL(str(file.locate()))
    pytest.skip("needs the wheel nvidia-cuda-nvrtc")


def compiled(code, options, architecture):
    """Usage by kernel of a source, compiled to machine code for an architecture such as "sm_90"."""
    with _program(code, (*options, "--ptxas-options=-v"), architecture) as program:
        return _usage(_text("ProgramLog", program))


def ptx(code, options, architecture):
    """The PTX of a source."""
    with _program(code, options, architecture.replace("sm", "compute")) as program:
        return _text("PTX", program)


@contextmanager
def _program(code, options, architecture):
    nvrtc, program = library(), c_void_p()
    encoded = [flag.encode() for flag in (*options, f"--gpu-architecture={architecture}")]
    _check(nvrtc.nvrtcCreateProgram(byref(program), code.encode(), b"kernels.cu", 0, None, None))
    try:
        arguments = (c_char_p * len(encoded))(*encoded)
        failed = nvrtc.nvrtcCompileProgram(program, c_int(len(encoded)), arguments)
        assert not failed, _text("ProgramLog", program)
        yield program
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))


def _check(status):
    assert status == 0, library().nvrtcGetErrorString(status)


def _text(name, program):
    """What nvrtcGet<name> gives, a text of the size that nvrtcGet<name>Size tells."""
    size = c_size_t()
    _check(library()[f"nvrtcGet{name}Size"](program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library()[f"nvrtcGet{name}"](program, text))
    return text.value.decode()


# Three lines per kernel: its name, its stack and spills, its registers and shared memory.
_KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def _usage(log):
    usage = {}
    for found in _KERNEL.finditer(log):
        shared = re.search(r"(\d+) bytes smem", found["rest"])
        usage[found["name"]] = Usage(
            registers=int(found["registers"]),
            spill_bytes=int(found["stores"]) + int(found["loads"]),
            stack_bytes=int(found["stack"]),
            shared_bytes=int(shared[1]) if shared else 0,
        )
    return usage

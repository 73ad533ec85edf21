"""NVRTC by itself: CUDA sources compiled to machine code on machines without a GPU.

The library comes with the wheel nvidia-cuda-nvrtc; the C API is called through ctypes. ptxas
reports what each kernel uses, which is what the tests look at.
"""

import ctypes
import re
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
    """Usage by kernel of a source, compiled for an architecture such as "sm_90"."""
    nvrtc, program = library(), c_void_p()
    flags = [*options, f"--gpu-architecture={architecture}", "--ptxas-options=-v"]
    encoded = [flag.encode() for flag in flags]
    _check(nvrtc.nvrtcCreateProgram(byref(program), code.encode(), b"kernels.cu", 0, None, None))
    try:
        arguments = (c_char_p * len(encoded))(*encoded)
        failed = nvrtc.nvrtcCompileProgram(program, c_int(len(encoded)), arguments)
        log = _log(nvrtc, program)
        assert not failed, log
    finally:
        nvrtc.nvrtcDestroyProgram(byref(program))
    return _usage(log)


def _check(status):
    assert status == 0, library().nvrtcGetErrorString(status)


def _log(nvrtc, program):
    size = c_size_t()
    _check(nvrtc.nvrtcGetProgramLogSize(program, byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(nvrtc.nvrtcGetProgramLog(program, text))
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

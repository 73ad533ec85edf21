"""CUDA sources and their compile-time constants, made into modules.

A tier chooses a Specialisation: one source file of engines/cuda/, the kernels in it, and the
constants (widths, activations, loss, precision) that NVRTC compiles it with. Everything up to
`compiler_input` is text, known without CuPy and without a device.
"""

import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

SOURCES = Path(__file__).parent

# No --use_fast_math, which would round coarsely in every formula: the sources use a fast
# instruction where its error is known. CuPy adds -ftz=true, so that float32 subnormals are 0.
OPTIONS = ("--std=c++17",)


class Specialisation(NamedTuple):
    """A kernel source with its compile-time constants.

    `max_registers` is the ceiling per thread that __launch_bounds__ implies; the compile tests
    hold every kernel to it.
    """

    source: str  # the name of a file in engines/cuda/
    kernels: tuple[str, ...]  # extern "C"
    defines: tuple[tuple[str, str], ...]
    max_registers: int


def compiler_input(specialisation: Specialisation) -> tuple[str, tuple[str, ...]]:
    """The source, in one piece, and the options that NVRTC is called with."""
    defines = (f"-D{name}={value}" for name, value in specialisation.defines)
    return source_text(specialisation.source), (*OPTIONS, *defines)


# Other includes (the host emulation's, behind an #ifdef) stay as they are.
_OWN_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)


@cache
def source_text(name: str) -> str:
    """A source with our headers in the place of their includes, each once.

    CuPy keeps cubins on disk by the text it is given: a header that was merely named there could
    change without being compiled again.
    """
    included = set()

    def replaced(found: re.Match[str]) -> str:
        if found[1] in included:
            return ""
        included.add(found[1])
        return text_of(found[1])

    def text_of(file: str) -> str:
        text = (SOURCES / file).read_text(encoding="utf-8").replace("#pragma once\n", "")
        return _OWN_INCLUDE.sub(replaced, text)

    return text_of(name)


@cache
def module(specialisation: Specialisation) -> Any:
    """The compiled module (cupy.RawModule), kept for the process; it loads itself per device."""
    import cupy

    code, options = compiler_input(specialisation)
    return cupy.RawModule(code=code, options=options, backend="nvrtc")

"""CUDA sources in one piece, and compiled for every architecture without a GPU.

Every specialisation that a tier chooses for a list of nets is compiled to machine code by the
NVRTC of its wheel: no register may be spilled, and no kernel may need more than its ceiling.
"""

import re
import sys
from types import SimpleNamespace

import numpy as np
import nvrtc
import pytest

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Spec
from mlp_backprop.edge.rules import PRECISIONS
from mlp_backprop.engines.cuda import build, tiny, warp_tiles
from mlp_backprop.engines.cuda import layers as cuda_layers
from mlp_backprop.engines.cuda.build import Specialisation
from mlp_backprop.losses import LOSSES

# Sources -----------------------------------------------------------------------------------------

SOURCES = sorted(path.name for path in build.SOURCES.glob("*.cu"))
HEADERS = sorted(path.name for path in build.SOURCES.glob("*.cuh"))


def included(text):
    return re.findall(r'#include "(.+)"', text)


@pytest.mark.parametrize("source", SOURCES)
def test_a_source_comes_with_every_header_once(source):
    text = build.source_text(source)
    assert not set(included(text)) & set(HEADERS)
    assert "#pragma once" not in text
    for header in included((build.SOURCES / source).read_text("utf-8")):
        first, *_ = (build.SOURCES / header).read_text("utf-8").splitlines()
        assert text.count(first) == 1


def test_a_header_may_be_included_twice_and_inside_another(monkeypatch, tmp_path):
    files = {
        "k.cu": '#include "b.cuh"\n#include "a.cuh"\n#include "emulation.h"\nbody\n',
        "b.cuh": '#pragma once\n#include "a.cuh"\nb\n',
        "a.cuh": "#pragma once\na\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    build.source_text.cache_clear()
    assert build.source_text("k.cu").split() == ["a", "b", "#include", '"emulation.h"', "body"]
    build.source_text.cache_clear()


def test_constants_become_options():
    row = Specialisation("tiny.cu", ("tiny",), (("SIZES", "2,3,1"), ("LOSS", "HUBER")), 255)
    code, options = build.compiler_input(row)
    assert code == build.source_text("tiny.cu")
    assert options == (*build.OPTIONS, "-DSIZES=2,3,1", "-DLOSS=HUBER")


def test_a_module_is_made_once(monkeypatch):
    calls = []

    def raw_module(**arguments):
        calls.append(arguments)
        return object()

    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(RawModule=raw_module))
    row = Specialisation("tiny.cu", ("tiny",), (("MADE_FOR", "this test"),), 1)
    assert build.module(row) is build.module(Specialisation(*row))
    code, options = build.compiler_input(row)
    assert calls == [{"code": code, "options": options, "backend": "nvrtc"}]


# Compiled ----------------------------------------------------------------------------------------

# Of each generation of cards the shared memory decides how tier 2 is cut; the oldest that
# NVRTC 13 knows have none of it.
ARCHITECTURES = {
    "sm_75": None,
    "sm_80": warp_tiles.LIMITS[1],
    "sm_90": warp_tiles.LIMITS[0],
    "sm_120": warp_tiles.LIMITS[2],
}

# CuPy adds these to ours.
CUPY_OPTIONS = ("-ftz=true", "--device-as-default-execution-space")


def make_spec(sizes, activation, loss, dtype=np.float32):
    names = [activation] * (len(sizes) - 2) + ["identity"]
    rows = tuple(ACTIVATIONS[name] for name in names)
    return Spec(np, sizes, np.dtype(dtype), rows, LOSSES[loss])


def specialisations(spec, architecture):
    """What the tiers choose for a net, in every precision and with every kind of data."""
    labels = (np.int32, np.int64) if spec.loss.targets == "class" else ()
    for target in (np.float32, *labels):
        for weighted in (False, True):
            yield tiny.specialise(spec, "float32", target=target, weighted=weighted)
        limits = ARCHITECTURES[architecture]
        for precision in PRECISIONS if limits else ():
            yield warp_tiles.specialisation(spec, precision, limits, target)
    for precision in PRECISIONS:
        yield from cuda_layers.specialise(spec, precision)
    yield from cuda_layers.specialise(spec._replace(dtype=np.dtype(np.float64)), "float32")


COVERING = (
    ((2, 10, 5, 1), "sigmoid", "squared_error"),
    ((64, 64, 64, 1), "tanh", "squared_error"),
    ((784, 128, 64, 10), "gelu_tanh", "softmax_cross_entropy"),
)

RELU = (
    ((2, 10, 5, 1), "relu", "binary_cross_entropy"),
    ((784, 128, 64, 10), "relu", "softmax_cross_entropy"),
)

# Every activation and every loss, on nets that lie well within each tier and at its border.
NETS = ((2, 10, 5, 1), (3, 7, 4), (16, 32, 10), (64, 64, 64, 1), (128, 128, 10), (784, 1024, 10))
ALL = (
    *((sizes, activation, "squared_error") for sizes in NETS for activation in ACTIVATIONS),
    *((sizes, "tanh", loss) for sizes in NETS for loss in LOSSES),
)


def of_all(cases, architectures):
    """Each specialisation once: in other nets and precisions it may be the same."""
    found = {
        (row, architecture): None
        for architecture in architectures
        for case in cases
        for row in specialisations(make_spec(*case), architecture)
        if row is not None
    }
    return [pytest.param(*pair, id=label(*pair)) for pair in found]


def label(row, architecture):
    return " ".join([architecture, row.source, *(value for _, value in row.defines)])


def assert_compiles_well(row, architecture):
    code, options = build.compiler_input(row)
    usage = nvrtc.compiled(code, (*options, *CUPY_OPTIONS), architecture)
    assert set(usage) == set(row.kernels)
    for kernel, used in usage.items():
        assert used.spill_bytes == 0, f"{kernel}: {used}"
        assert used.registers <= row.max_registers, f"{kernel}: {used}"


# On sm_75 the nets whose instructions differ there.
@pytest.mark.parametrize(
    ("row", "architecture"),
    [*of_all(COVERING, ["sm_90"]), *of_all(RELU, ["sm_75"])],
)
def test_no_spills(row, architecture):
    assert_compiles_well(row, architecture)


@pytest.mark.kernels
@pytest.mark.parametrize(("row", "architecture"), of_all(ALL, ARCHITECTURES))
def test_no_spills_anywhere(row, architecture):
    assert_compiles_well(row, architecture)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("activation", ["sigmoid", pytest.param("tanh", marks=pytest.mark.kernels)])
def test_shared_parameters_leave_room_for_three_blocks(activation, architecture):
    """The other way to place the parameters of 2-10-5-1, to be compared with on a card."""
    row = tiny.specialise(make_spec((2, 10, 5, 1), activation, "squared_error"), "float32")
    other = dict(row.defines) | {"PARAMS_IN_REGISTERS": "0", "BLOCKS": "3"}
    assert dict(row.defines) != other
    row = row._replace(defines=tuple(other.items()), max_registers=tiny.CEILINGS[3])
    assert_compiles_well(row, architecture)


GREEDY = """
extern "C" __global__ void __launch_bounds__(1024, 1) greedy(float* x, int n) {
  float a[LIVE];
  #pragma unroll
  for (int i = 0; i < LIVE; ++i) a[i] = x[i * n + threadIdx.x];
  for (int j = 0; j < n; ++j) {
    #pragma unroll
    for (int i = 0; i < LIVE; ++i) a[i] = a[i] * a[(i + 7) % LIVE] + x[j];
  }
  #pragma unroll
  for (int i = 0; i < LIVE; ++i) x[i * n + threadIdx.x] = a[i];
}
"""


@pytest.mark.parametrize(
    ("live", "kernel", "ceiling", "fault"),
    [
        (160, "greedy", 255, "spill_bytes"),
        (4, "greedy", 8, "registers"),
        (4, "absent", 64, "absent"),
        (4, "greedy", 64, None),
    ],
)
def test_the_check_can_fail(monkeypatch, live, kernel, ceiling, fault):
    """A block of 1024 threads has 64 registers for each."""
    compiler_input = (GREEDY, (*build.OPTIONS, f"-DLIVE={live}"))
    monkeypatch.setattr(build, "compiler_input", lambda row: compiler_input)
    row = Specialisation("", (kernel,), (), ceiling)
    if fault is None:
        assert_compiles_well(row, "sm_90")
        return
    with pytest.raises(AssertionError, match=fault):
        assert_compiles_well(row, "sm_90")


def test_an_error_of_the_compiler_is_told():
    with pytest.raises(AssertionError, match='identifier "undeclared" is undefined'):
        nvrtc.compiled("__global__ void k() { undeclared(); }", build.OPTIONS, "sm_90")


# PTX ---------------------------------------------------------------------------------------------

# What the emulation replaces, so that nothing but the text itself shows where an operand goes.
LARGEST = """
extern "C" __global__ void largest(float a, float b, float* c) { *c = maximum(a, b); }
"""
PACKED = """
extern "C" __global__ void packed(float a, float b, unsigned* c) { *c = pack(a, b); }
"""


def instruction(code, opcode, architecture, *options):
    """The operands of the one instruction with this opcode, a and b being the parameters."""
    text = nvrtc.ptx(code, (*build.OPTIONS, *CUPY_OPTIONS, *options), architecture)
    registers = dict(re.findall(r"ld\.param\.[bf]32\s+(%\w+), \[\w+_param_(\d)\]", text))
    (operands,) = re.findall(rf"{re.escape(opcode)}\s+%\w+, (%\w+), (%\w+);", text)
    return ["ab"[int(registers[register])] for register in operands]


def assert_packs_in_order(code, is_float16):
    """The first operand of the instruction is what comes to the upper half of the word."""
    opcode = f"cvt.rn.{'f16' if is_float16 else 'bf16'}x2.f32"
    operands = instruction(code, opcode, "sm_90", f"-DFLOAT16={is_float16}")
    assert operands == ["b", "a"]


@pytest.mark.parametrize("is_float16", [0, 1])
def test_the_first_of_two_numbers_is_packed_into_the_low_half(is_float16):
    code = build.source_text("mma.cuh") + PACKED
    assert_packs_in_order(code, is_float16)
    order = '"f"(high), "f"(low)'
    assert order in code
    with pytest.raises(AssertionError):
        assert_packs_in_order(code.replace(order, '"f"(low), "f"(high)'), is_float16)


def test_the_larger_number_is_one_instruction_from_sm_80_on():
    code = build.source_text("device.cuh") + LARGEST
    for architecture in ("sm_80", "sm_90", "sm_120"):
        assert sorted(instruction(code, "max.NaN.f32", architecture)) == ["a", "b"]


def test_the_larger_number_is_compared_for_as_in_the_emulation_below_sm_80():
    code = build.source_text("device.cuh") + LARGEST
    text = nvrtc.ptx(code, (*build.OPTIONS, *CUPY_OPTIONS), "sm_75")
    assert "setp." in text
    assert "max." not in text

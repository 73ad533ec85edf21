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

# Of each generation of cards the shared memory decides how tier 2 is cut.
ARCHITECTURES = {
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
        for precision in PRECISIONS:
            limits = ARCHITECTURES[architecture]
            yield warp_tiles.specialisation(spec, precision, limits, target)
    for precision in PRECISIONS:
        yield from cuda_layers.specialise(spec, precision)
    yield from cuda_layers.specialise(spec._replace(dtype=np.dtype(np.float64)), "float32")


COVERING = (
    ((2, 10, 5, 1), "sigmoid", "squared_error"),
    ((64, 64, 64, 1), "tanh", "squared_error"),
    ((784, 128, 64, 10), "gelu_tanh", "softmax_cross_entropy"),
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


@pytest.mark.parametrize(("row", "architecture"), of_all(COVERING, ["sm_90"]))
def test_no_spills_on_sm_90(row, architecture):
    assert_compiles_well(row, architecture)


@pytest.mark.kernels
@pytest.mark.parametrize(("row", "architecture"), of_all(ALL, ARCHITECTURES))
def test_no_spills_anywhere(row, architecture):
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

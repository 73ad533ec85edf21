"""The engine held to CuPy as it is: its sources to the record in cupy_api.py, that to the library.

CuPy imports without a driver. Where it is not installed, the first half runs.
"""

import ast
import ctypes
import inspect
import re
import sys
from functools import cache
from pathlib import Path

import cuda_card
import cupy_api
import numpy as np
import pytest
from cupy_api import CALLS, DEVICE_ATTRIBUTES, RETURNS, VALUES

import mlp_backprop
from mlp_backprop.edge import backends
from mlp_backprop.engines.cuda import arrays as cuda_arrays
from mlp_backprop.engines.cuda import cublaslt

SOURCES = Path(mlp_backprop.__file__).parent

# What the sources use ----------------------------------------------------------------------------


class Uses(ast.NodeVisitor):
    """Paths of CuPy that a module uses, the calls among them, and keys of device attributes."""

    def __init__(self, source):
        self.of = {"cupy": ""}  # variables: the path of what they hold
        self.paths, self.calls, self.keys = set(), [], set()
        self.visit(ast.parse(source))

    def path(self, node):
        """Where in CuPy an expression leads; None for everywhere else."""
        match node:
            case ast.Name(id=name):
                return self.of.get(name)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant("cupy")]):
                return ""
            case ast.Call(func=called):
                path = self.path(called)
                is_class = path and path.rpartition(".")[2][:1].isupper()
                return path if is_class else RETURNS.get(path)
            case ast.Attribute(value=value, attr=name):
                path = self.path(value)
                return None if path is None else f"{path}.{name}".lstrip(".")
        return None

    def visit_Assign(self, node):
        (target, *_), value = node.targets, node.value
        if isinstance(target, ast.Name) and self.path(value) is not None:
            self.of[target.id] = self.path(value)
        self.generic_visit(node)

    def visit_With(self, node):
        for item in node.items:
            path = self.path(item.context_expr)
            if path:
                self.paths |= {f"{path}.__enter__", f"{path}.__exit__"}
                if item.optional_vars is not None:
                    self.of[item.optional_vars.id] = path
        self.generic_visit(node)

    def visit_Attribute(self, node):
        path = self.path(node)
        if path:
            self.paths.add(path)
        self.generic_visit(node)

    def visit_Call(self, node):
        path = self.path(node.func)
        if path:
            names = [keyword.arg for keyword in node.keywords]
            self.calls.append((path, len(node.args), names))
        self.generic_visit(node)

    def visit_Subscript(self, node):
        is_constant = isinstance(node.slice, ast.Constant)
        if is_constant and self.path(node.value) == "cuda.Device.attributes":
            self.keys.add(node.slice.value)
        self.generic_visit(node)


@cache
def uses():
    """By file, of those that use CuPy."""
    files = SOURCES.rglob("*.py")
    found = {file: Uses(file.read_text(encoding="utf-8")) for file in files}
    return {file: used for file, used in found.items() if used.paths}


def test_uses_are_found():
    """In all their forms: else the tests below would be of nothing."""
    used = Uses(
        "import cupy\n"
        "cuda = importlib.import_module('cupy').cuda\n"
        "device = cuda.Device(3)\n"
        "x = device.attributes['MultiProcessorCount'], cupy.cuda.Device().attributes['Cores']\n"
        "with cuda.Stream(True, priority=1) as stream:\n"
        "    graph = stream.end_capture()\n"
        "    graph.launch(cupy.cuda.get_current_stream().done)\n"
        "numpy.zeros(3)\n"
    )
    assert used.paths - {"cuda"} == {
        "cuda.Device",
        "cuda.Device.attributes",
        "cuda.Graph.launch",
        "cuda.Stream",
        "cuda.Stream.__enter__",
        "cuda.Stream.__exit__",
        "cuda.Stream.done",
        "cuda.Stream.end_capture",
        "cuda.get_current_stream",
    }
    assert used.keys == {"MultiProcessorCount", "Cores"}
    assert ("cuda.Stream", 1, ["priority"]) in used.calls
    assert set.union(*(used.keys for used in uses().values())) == DEVICE_ATTRIBUTES


def test_every_name_that_the_engine_uses_is_recorded():
    recorded = {*CALLS, *VALUES}
    modules = {path[:k] for path in recorded for k, c in enumerate(path) if c == "."}
    for file, used in uses().items():
        assert used.paths <= recorded | modules, file
        assert used.keys <= DEVICE_ATTRIBUTES, file


def test_every_call_of_the_engine_fits_the_signature():
    for file, used in uses().items():
        for path, n_positional, names in used.calls:
            try:
                cupy_api.signature(path).bind(*[None] * n_positional, **dict.fromkeys(names))
            except TypeError as error:
                pytest.fail(f"{file} calls {path}: {error}")


# The stand-ins -----------------------------------------------------------------------------------


def test_stand_ins_offer_what_is_recorded_and_nothing_else():
    with pytest.raises(AssertionError, match="not known to have ComputeCapabilityMajor"):
        cupy_api.attributes(ComputeCapabilityMajor=9)
    with pytest.raises(AssertionError, match=r"cuda\.synchronise"):
        cupy_api.library({"cuda.synchronise": print})
    with pytest.raises(AssertionError, match=r"cuda\.Device\.cores"):
        cupy_api.instance("cuda.Device", cores=3)
    with pytest.raises(AssertionError, match=r"cuda\.Stream\.wait"):

        class Stream(cupy_api.StandIn, of="cuda.Stream"):
            def wait(self):
                pass


def test_stand_ins_refuse_what_the_signature_does_not_take():
    cupy = cupy_api.library({"empty": lambda *arguments, **options: arguments})

    class Stream(cupy_api.StandIn, of="cuda.Stream"):
        def begin_capture(self, *modes):
            return modes

    assert cupy.empty(3, dtype=int) == (3,)
    assert Stream().begin_capture(1) == (1,)
    with pytest.raises(TypeError, match="unexpected keyword argument 'device'"):
        cupy.empty(3, device=0)
    with pytest.raises(TypeError, match="too many positional arguments"):
        Stream().begin_capture(1, 2)


# Beside a card -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["cupy", "array_api_compat.cupy"])
def test_beside_a_card_nothing_may_be_missing(monkeypatch, missing):
    """Else `pytest -m gpu` would look green where it has run nothing."""
    monkeypatch.setitem(sys.modules, "cupy", cupy_api.library({}))
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setattr(cuda_card, "n_cards", lambda: 1)
    with pytest.raises((ImportError, pytest.skip.Exception)) as caught:
        cuda_card.cupy_on_a_card()
    assert caught.type is ImportError  # a skip would skip this test as well
    monkeypatch.setattr(cuda_card, "n_cards", lambda: 0)
    with pytest.raises(pytest.skip.Exception, match="sees no CUDA device"):
        cuda_card.cupy_on_a_card()


# The library -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cupy():
    """Which need not see a card."""
    return pytest.importorskip("cupy", reason="CuPy is not installed")


def thing(cupy, path):
    for name in path.split("."):
        cupy = getattr(cupy, name)
    return cupy


def real_signature(function):
    """Of Python; for what Cython compiled, as the first line of its documentation has it."""
    first_line = (function.__doc__ or "").strip().partition("\n")[0]
    documented = re.match(r"[\w.]+\((.*)\)", first_line.replace("\\", ""))
    if documented is None:
        return inspect.signature(function)
    parts = filter(None, re.split(r", (?![^()]*\))", documented[1]))
    return inspect.signature(eval(f"lambda {', '.join(map(_undeclared, parts))}: None"))


def _undeclared(part):
    """Without a type: "int size=0" is C's, "size: int = 0" Python's."""
    declared, has_default, _ = part.partition("=")
    words = declared.split(":")[0].split()
    return words[-1] + ("=None" if has_default else "")


def shape_of(signature):
    """What decides whether a call fits."""
    return [
        (parameter.name, parameter.kind, parameter.default is parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name not in ("self", "cls")
    ]


@pytest.mark.parametrize("path", CALLS)
def test_recorded_signatures_are_those_of_cupy(cupy, path):
    recorded = cupy_api.signature(path)
    assert shape_of(real_signature(thing(cupy, path))) == shape_of(recorded)


@pytest.mark.parametrize("path", sorted(VALUES))
def test_recorded_values_are_there(cupy, path):
    if path == "cuda.Stream.ptr":  # which instances have, and only they
        assert "~Stream.ptr" in cupy.cuda.Stream.__doc__
    else:
        thing(cupy, path)


def device_attributes(cupy):
    """CuPy makes them of these constants."""
    prefix = "cudaDevAttr"
    return {name.removeprefix(prefix) for name in dir(cupy.cuda.runtime) if prefix in name}


def test_device_attributes_are_those_of_cupy(cupy):
    assert device_attributes(cupy) >= DEVICE_ATTRIBUTES
    assert not any("Capability" in name for name in device_attributes(cupy))


def test_the_programs_for_a_card_use_what_cupy_has(cupy):
    """Which run nowhere else."""
    files = [*(SOURCES.parent / "benchmarks").glob("*.py")]
    used = [Uses(file.read_text(encoding="utf-8")) for file in files]
    paths = {path for uses in used for path in uses.paths}
    if not paths:
        pytest.skip("the benchmarks are not here")
    for path in sorted(paths):
        thing(cupy, path)
    assert {key for uses in used for key in uses.keys} <= device_attributes(cupy)


def test_data_types_of_cublaslt_are_those_of_cupy(cupy):
    names = {"float32": "CUDA_R_32F", "float64": "CUDA_R_64F", "bfloat16": "CUDA_R_16BF"}
    numbers = {dtype: getattr(cupy.cuda.runtime, name) for dtype, name in names.items()}
    assert numbers == cublaslt.DATA_TYPES


def test_arrays_are_used_as_those_of_cupy(cupy):
    """Stand-ins of arrays are NumPy's, which have more: nothing of that is used on any object."""
    only_numpy = {name for name in dir(np.ndarray) if not hasattr(cupy.ndarray, name)}
    assert "ctypes" in only_numpy
    for file in uses():
        nodes = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        assert not used & only_numpy, file


def test_a_struct_of_pointers_is_passed_by_value(cupy):
    """The kernel gets what lies in the one element of the array."""
    memory = cupy.cuda.UnownedMemory(1 << 40, 64, None, 0)
    pointer = cupy.cuda.MemoryPointer(memory, 0)
    arrays = [cupy.ndarray((2,), np.float32, pointer + 8 * k) for k in range(3)]
    struct = cuda_arrays.pointers_to(arrays)
    passed = cupy.cuda.function.CNumpyArray(struct)
    expected = np.array([(1 << 40) + 8 * k for k in range(3)], np.uint64)
    assert ctypes.string_at(passed.ptr, struct.nbytes) == expected.tobytes()


def test_arrays_tell_how_they_lie(cupy):
    memory = cupy.cuda.MemoryPointer(cupy.cuda.UnownedMemory(1 << 40, 64, None, 0), 0)
    A = cupy.ndarray((3, 2), np.float32, memory + 4)
    assert (A.data.ptr, A.data.device_id, A.nbytes) == ((1 << 40) + 4, 0, 24)
    assert A.flags.c_contiguous
    assert not A.T.flags.c_contiguous
    assert cuda_arrays.readable(A, 4) is A


def test_without_a_device_it_is_the_device_that_is_missing(cupy):
    if cupy.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(ImportError, match="needs a CUDA device, and CuPy sees none here"):
        backends.namespace("cupy")

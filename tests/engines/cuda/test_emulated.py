"""From the CuPy engine down to the kernels, with all but the card: emulated kernels, host memory.

The tiers have tests of their own; here the engine chooses among them, and binds them to arrays.
"""

from types import SimpleNamespace

import emulation
import host_device
import numpy as np
import pytest
from oracles import assert_close, assert_grads_close, make_problem

from mlp_backprop import backprop
from mlp_backprop.edge import validation
from mlp_backprop.engines.cuda import build, engine, tiny, warp_tiles
from mlp_backprop.types import Layer, flat

pytestmark = emulation.needs_compiler


class Array(host_device.HostArray):
    """On device 0 of one."""

    @property
    def device(self):
        return self.owner.cupy.cuda.Device()


class Device(SimpleNamespace):
    """The current device, entered again."""

    def __enter__(self):
        pass

    def __exit__(self, *error):
        pass


class Kernel:
    """As cupy.RawKernel; it notes its name."""

    max_dynamic_shared_size_bytes = 48 * 1024

    def __init__(self, module, name, launches):
        self.module, self.name, self.launches = module, name, launches

    def __call__(self, grid, block, arguments, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        self.module.launch(self.name, grid, block, *arguments, shared_bytes=shared_mem)
        self.launches.append(self.name)


@pytest.fixture
def host(monkeypatch):
    """The host's memory, with what the engine and the other tiers ask of CuPy besides."""
    monkeypatch.setattr(host_device, "HostArray", Array)
    host = host_device.HostDevice()
    host.install(monkeypatch)
    facts = vars(host.cupy.cuda.Device())
    facts["attributes"] |= {
        "MultiProcessorCount": 3,
        "ComputeCapabilityMajor": 9,
        "MaxSharedMemoryPerBlockOptin": 227 * 1024,
        "MaxSharedMemoryPerMultiprocessor": 228 * 1024,
    }
    host.cupy.zeros = lambda shape, dtype: host.array(np.zeros(shape, dtype))
    host.cupy.cuda.Device = lambda: Device(**facts)
    host.cupy.cuda.runtime = SimpleNamespace(getDevice=lambda: 0)
    host.cupy.cuda.memory = SimpleNamespace(OutOfMemoryError=MemoryError)

    def module(specialisation):
        if specialisation.source == "elements.cu":  # takes addresses inside of arrays
            return host.module(specialisation)
        emulated = emulation.module(specialisation)
        return SimpleNamespace(get_function=lambda name: Kernel(emulated, name, host.launches))

    monkeypatch.setattr(build, "module", module)
    for tier in (tiny, warp_tiles):
        monkeypatch.setattr(tier, "pointers_to", list)
    return host


def placed(host, problem, precision):
    """The pass for a problem, and its arguments."""
    options = problem.options | {"reduction": "mean", "backend": None}
    spec, params, *data = validation.problem(problem.params, problem.X, problem.y, **options)
    params = [Layer(host.array(W), host.array(b)) for W, b in params]
    X, y, weight = (None if A is None else host.array(A) for A in data)
    return engine.prepare(spec, len(X), precision), (params, X, y, weight, "mean")


CASES = [
    ((2, 10, 5, 1), "float32", "tiny", 2e-5),
    ((2, 10, 5, 1), "bfloat16", "tiny", 2e-5),
    ((20, 33, 10), "float32", "warp_tiles", 2e-5),
    ((20, 33, 10), "tf32", "warp_tiles", 1e-2),
    ((20, 33, 10), "bfloat16", "warp_tiles", 0.1),
    ((20, 33, 10), "float32_exact", "activate", 2e-5),
    ((3, 150, 2), "float32", "activate", 2e-5),
    ((3, 150, 2), "bfloat16", "activate", 0.1),
]


def mean(problem):
    """By the derivation, in float64."""
    exact = problem.astype(np.float64)
    options = exact.options | {"reduction": "mean", "backend": None}
    spec, *arrays = validation.problem(exact.params, exact.X, exact.y, **options)
    return backprop.reduced(spec, backprop.loss_and_grad_sums(spec, *arrays), "mean")


def assert_results_close(got, expected, tolerance):
    assert_close(got[0], expected[0], tolerance)
    assert_grads_close(got[1], expected[1], tolerance)


@pytest.mark.parametrize(("sizes", "precision", "kernel", "tolerance"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_engine_on_emulated_kernels(host, sizes, precision, kernel, tolerance, weighted):
    problem = make_problem(sizes, 37, weighted=weighted, dtype=np.float32)
    run, arguments = placed(host, problem, precision)
    loss, grads = run(*arguments)
    assert kernel in host.launches
    assert_results_close((loss, grads), mean(problem), tolerance)
    assert all(A.dtype == np.float32 for A in [loss, *flat(grads)])
    host.check_guards()


@pytest.mark.parametrize(("sizes", "precision", "kernel", "tolerance"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_bound_call_on_emulated_kernels(host, sizes, precision, kernel, tolerance, weighted):
    problem = make_problem(sizes, 37, weighted=weighted, dtype=np.float32)
    run, arguments = placed(host, problem, precision)
    call = run.bound(*arguments)
    for factor in (1, 2, 3):
        now = problem._replace(X=np.float32(factor) * problem.X)
        arguments[1][...] = now.X
        assert_results_close(call(), mean(now), tolerance)
    host.check_guards()

"""From the CuPy engine down to the kernels, with all but the card: emulated kernels, host memory.

The tiers have tests of their own; here the engine chooses among them, and binds them to arrays.
"""

import cupy_api
import emulation
import host_device
import numpy as np
import pytest
from derivation import by_derivation, checked
from oracles import assert_result_close, make_problem

from mlp_backprop.edge import rules
from mlp_backprop.engines.cuda import build, engine, warp_tiles
from mlp_backprop.types import Layer, flat

pytestmark = emulation.needs_compiler


class Kernel(cupy_api.StandIn, of="RawKernel"):
    """It notes its name."""

    def __init__(self, host, module, name):
        self._host, self._module, self._name = host, module, name
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(self, grid, block, args, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes

        def work():
            for struct in (A for A in args if getattr(A, "dtype", None) and A.dtype.kind == "V"):
                for address in struct.view(np.uint64):
                    self._host.check(int(address), 1)
            self._module.launch(self._name, grid, block, *args, shared_bytes=shared_mem)

        self._host.enqueue(work)
        self._host.launches.append(self._name)


@pytest.fixture
def host(monkeypatch):
    """The host's memory, and every kernel in the emulation."""
    host = host_device.HostDevice()
    host.install(monkeypatch)

    def module(specialisation):
        if specialisation.source == "elements.cu":  # takes addresses inside of arrays
            return host.module(specialisation)
        emulated = emulation.module(specialisation)
        return cupy_api.instance(
            "RawModule", get_function=lambda name: Kernel(host, emulated, name)
        )

    monkeypatch.setattr(build, "module", module)
    return host


def placed(host, problem, precision):
    """The pass for a problem, and its arguments."""
    spec, params, *data = checked(problem, "mean")
    params = [Layer(host.array(W), host.array(b)) for W, b in params]
    X, y, weight = (None if A is None else host.array(A) for A in data)
    return engine.prepare(spec, len(X), precision), (params, X, y, weight)


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
    return by_derivation(problem.astype(np.float64), "mean")


@pytest.mark.parametrize(("sizes", "precision", "kernel", "tolerance"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_engine_on_emulated_kernels(host, sizes, precision, kernel, tolerance, weighted):
    problem = make_problem(sizes, 37, weighted=weighted, dtype=np.float32)
    run, arguments = placed(host, problem, precision)
    loss, grads = run(*arguments)
    assert kernel in host.launches
    assert_result_close((loss, grads), mean(problem), tolerance)
    assert all(A.dtype == np.float32 for A in [loss, *flat(grads)])
    host.check_guards()


@pytest.mark.parametrize(("sizes", "precision", "kernel", "tolerance"), CASES)
def test_copies_of_parameters_are_there_when_kernels_run(host, sizes, precision, kernel, tolerance):
    """Parameters that lie by columns, or not at a multiple of 16 bytes, are copied."""
    problem = make_problem(sizes, 37, dtype=np.float32)
    run, ((first, *above), *rest) = placed(host, problem, precision)
    first = Layer(host.array(first.W.T).T, host.array(first.b, shift=1))
    above = [Layer(host.array(W, shift=1), b) for W, b in above]
    arguments = [first, *above], *rest
    assert_result_close(run(*arguments), mean(problem), tolerance)
    assert_result_close(run.bound(*arguments)(), mean(problem), tolerance)


@pytest.mark.parametrize("precision", rules.PRECISIONS)
@pytest.mark.parametrize(("sizes", "kernel"), [((2, 10, 5, 1), "tiny"), ((20, 33, 10), "activate")])
def test_a_card_before_ampere(host, sizes, kernel, precision):
    host.facts["compute_capability"] = "75"
    problem = make_problem(sizes, 37, dtype=np.float32)
    run, arguments = placed(host, problem, precision)
    assert_result_close(run(*arguments), mean(problem), 2e-5)
    assert kernel in host.launches
    assert not {*warp_tiles.KERNELS} & {*host.launches}
    assert {row["compute"] for row in host.lt.heuristics} <= {69}


@pytest.mark.parametrize(("sizes", "precision", "kernel", "tolerance"), CASES)
@pytest.mark.parametrize("weighted", [False, True])
def test_a_bound_call_on_emulated_kernels(host, sizes, precision, kernel, tolerance, weighted):
    problem = make_problem(sizes, 37, weighted=weighted, dtype=np.float32)
    run, arguments = placed(host, problem, precision)
    call = run.bound(*arguments)
    for factor in (1, 2, 3):
        now = problem._replace(X=np.float32(factor) * problem.X)
        arguments[1][...] = now.X
        assert_result_close(call(), mean(now), tolerance)
    host.check_guards()
    # The weights of a wide net's mean are divided anew: such a call is recorded at its second time.
    assert host.n_graph_launches == (2 if weighted and kernel == "activate" else 3)


def test_all_kernels_of_a_pass_divide_the_memory_alike(host):
    """Between shared memory and cache: to change it, a multiprocessor must have finished."""
    run, arguments = placed(host, make_problem((20, 33, 10), 37, dtype=np.float32), "float32")
    run(*arguments)
    (tier,) = run.runs.values()
    (kernels,) = tier.kernels.values()
    assert {kernel.preferred_shared_memory_carveout for kernel in kernels} == {100}

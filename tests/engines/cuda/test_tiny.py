"""Tier 1 of the CuPy engine, kernel and plan together, run on the host in place of a device."""

import sys
from types import SimpleNamespace

import cupy_api
import emulation
import numpy as np
import pytest
from derivation import by_derivation, specification
from emulation import EmulationError, on_device
from oracles import assert_close, assert_grads_close, make_problem

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.derivatives.gradients import LossAndGrads
from mlp_backprop.engines.cuda import build, tiny
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

RAGGED = (0, 1, 31, 32, 33, 127, 128, 129, 255, 1003)

# Every activation and loss, one to four layers, parameters in registers and in shared memory.
NETS = [
    ((2, 10, 5, 1), "sigmoid", "squared_error", False),
    ((1, 1), "identity", "absolute_error", True),
    ((13, 2), "tanh", "huber", False),
    ((3, 7, 4), "relu", "softmax_cross_entropy", True),
    ((4, 2, 3, 2, 5), "silu", "binary_cross_entropy", False),
    ((6, 5, 2), "leaky_relu", "poisson", True),
    ((8, 11, 1), "elu", "squared_error", False),
    ((2, 7, 9, 1), "softplus", "huber", True),
    ((4, 12, 4), "gelu_tanh", "softmax_cross_entropy", False),
]

# Cancellation costs digits where a residual or a sum over samples is small.
TOLERANCE = 2e-5


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Stands for CuPy and a device; `fault` replaces a text of the kernel by another."""
    state = SimpleNamespace(multiprocessors=3, backward=False, fault=None, launches=[])
    cupy = emulation.cupy_of(lambda: cupy_api.attributes(MultiProcessorCount=state.multiprocessors))

    def module(specialisation):
        source = emulation.faulty(specialisation.source, state.fault, tmp_path)
        emulated = emulation.module(specialisation._replace(source=source))

        def get_function(name):
            def launch(grid, block, args):
                state.launches.append((dict(specialisation.defines), grid[0]))
                emulated.launch(name, grid, block, *args, backward=state.backward)

            return launch

        return cupy_api.instance("RawModule", get_function=get_function)

    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setattr(build, "module", module)
    monkeypatch.setattr(tiny, "pointers_to", list)
    return state


def sizes_of(problem):
    return (problem.X.shape[1], *(len(b) for _, b in problem.params))


def problem_of(sizes, activation, loss, n, **options):
    """Where the loss takes no logits, the last layer has the activation too."""
    last = "identity" if LOSSES[loss].takes_logits else activation
    names = [activation] * (len(sizes) - 2) + [last]
    return make_problem(sizes, n, activation=names, loss=loss, dtype=np.float32, **options)


def spec_of(*sizes):
    return specification(problem_of(sizes, "sigmoid", "squared_error", 1))


def plan(problem, n=3000, placed=None):
    run = tiny.prepare(specification(problem), n, "float32", placed)
    assert run is not None
    return run


def run_on(run, problem, mean=False, out=None):
    params, X, y, options = problem.map(on_device)
    params = [Layer(W, b) for W, b in params]
    return LossAndGrads(*run(Arguments(params, X, y, options["sample_weight"], mean, out)))


def derivation(problem, dtype=np.float64, mean=False):
    return by_derivation(problem.astype(dtype), "mean" if mean else "sum")


def assert_results_close(got, expected):
    assert_close(got.loss, expected.loss, TOLERANCE)
    assert_grads_close(got.grads, expected.grads, TOLERANCE)


def relative_error(got, expected):
    """Of the whole gradient."""
    got, expected = (np.concatenate([A.ravel() for A in flat(s.grads)]) for s in (got, expected))
    return np.linalg.norm(got - expected) / np.linalg.norm(expected)


# The kernel --------------------------------------------------------------------------------------


@emulation.needs_compiler
@pytest.mark.parametrize(("sizes", "activation", "loss", "weighted"), NETS)
def test_sums_are_those_of_the_derivation(sizes, activation, loss, weighted, device):
    for n in RAGGED:
        problem = problem_of(sizes, activation, loss, n, weighted=weighted, seed=n)
        assert_results_close(run_on(plan(problem), problem), derivation(problem))


@emulation.needs_compiler
@pytest.mark.parametrize(("sizes", "activation", "loss", "weighted"), NETS)
def test_gradients_are_as_accurate_as_float32_allows(sizes, activation, loss, weighted, device):
    for seed in range(4):
        problem = problem_of(sizes, activation, loss, 1003, weighted=weighted, seed=seed)
        assert relative_error(run_on(plan(problem), problem), derivation(problem)) < 2**-23


@emulation.needs_compiler
@pytest.mark.kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("loss", "class_rows"), [*((loss, False) for loss in LOSSES), ("softmax_cross_entropy", True)]
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_loss(activation, loss, class_rows, weighted, device):
    options = {"class_rows": class_rows, "weighted": weighted}
    for n in RAGGED:
        problem = problem_of((3, 5, 2, 4), activation, loss, n, **options, seed=n)
        assert_results_close(run_on(plan(problem), problem), derivation(problem))


@emulation.needs_compiler
@pytest.mark.parametrize("placed", tiny.variants(spec_of(2, 10, 5, 1)))
def test_every_variant_gives_the_sums(placed, device):
    problem = problem_of((2, 10, 5, 1), "sigmoid", "squared_error", 3000)
    assert_results_close(run_on(plan(problem, placed=placed), problem), derivation(problem))
    defines, n_blocks = device.launches[-1]
    assert defines["PARAMS_IN_REGISTERS"] == str(int(placed.in_registers))
    assert int(defines["BLOCKS"]) == placed.blocks
    assert n_blocks == 3 * placed.blocks


@emulation.needs_compiler
@pytest.mark.parametrize("multiprocessors", [1, 2, 20])
@pytest.mark.parametrize(("sizes", "resident"), [((2, 10, 5, 1), 2), ((2, 4, 1), 4)])
def test_any_number_of_blocks_gives_the_sums(sizes, resident, multiprocessors, device):
    """Threads have up to twelve rows, of which one or two are loaded ahead."""
    device.multiprocessors = multiprocessors
    problem = problem_of(sizes, "sigmoid", "squared_error", 3000)
    assert_results_close(run_on(plan(problem), problem), derivation(problem))
    assert device.launches[-1][1] == min(resident * multiprocessors, 24)


@emulation.needs_compiler
def test_a_repetition_gives_the_same_bits_whatever_the_order_of_blocks(device):
    problem = problem_of((2, 10, 5, 1), "sigmoid", "squared_error", 1003)
    run = plan(problem)
    first = run_on(run, problem)
    for device.backward in (False, True):
        again = run_on(run, problem)
        assert run.ticket == 0
        arrays = ([sums.loss, *flat(sums.grads)] for sums in (first, again))
        for A, B in zip(*arrays, strict=True):
            np.testing.assert_array_equal(A, B)


@emulation.needs_compiler
def test_no_rows(device):
    problem = problem_of((3, 7, 4), "relu", "softmax_cross_entropy", 0, weighted=True)
    loss, grads = run_on(plan(problem, 0), problem)
    assert not any(A.any() for A in (loss, *flat(grads)))


@emulation.needs_compiler
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int16])
def test_labels_of_every_integer_type(dtype, device):
    problem = problem_of((3, 7, 4), "relu", "softmax_cross_entropy", 130, weighted=True)
    problem = problem._replace(y=problem.y.astype(dtype))
    assert_results_close(run_on(plan(problem), problem), derivation(problem))
    expected = "int" if dtype == np.int32 else "long long"
    assert device.launches[-1][0]["TARGET"] == expected


@emulation.needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n", [1, 100, 1003])  # in one block, and in several
def test_the_mean(n, weighted, device):
    problem = problem_of((4, 6, 3), "tanh", "squared_error", n, weighted=weighted)
    expected = derivation(problem, mean=True)
    assert_results_close(run_on(plan(problem), problem, mean=True), expected)


@emulation.needs_compiler
def test_results_are_new_arrays_or_those_of_out(device):
    problems = [problem_of((4, 6, 3), "tanh", "huber", 130, seed=seed) for seed in range(3)]
    run = plan(problems[0])
    first, second = run_on(run, problems[0]), run_on(run, problems[1])
    out = [Layer(np.full_like(W, np.nan), np.full_like(b, np.nan)) for W, b in first.grads]
    third = run_on(run, problems[2], out=out)
    assert third.grads is out
    for problem, results in zip(problems, (first, second, third), strict=True):
        assert_results_close(results, derivation(problem))


@emulation.needs_compiler
def test_more_rows_than_planned_for(device):
    problem = problem_of((4, 6, 3), "tanh", "huber", 1003)
    assert_results_close(run_on(plan(problem, n=130), problem), derivation(problem))
    assert device.launches[-1][1] == 2


@emulation.needs_compiler
def test_rows_of_class_weights(device):
    problem = problem_of((4, 6, 3), "tanh", "softmax_cross_entropy", 130, class_rows=True)
    assert_results_close(run_on(plan(problem), problem), derivation(problem))


@emulation.needs_compiler
@pytest.mark.parametrize("label", [-1, 4, 2**32, -(2**63)])
def test_a_label_out_of_range_makes_the_loss_nan(label, device):
    problem = problem_of((3, 7, 4), "relu", "softmax_cross_entropy", 130, weighted=True)
    problem.y[77] = label
    assert np.isnan(run_on(plan(problem), problem).loss)


FAULTS = {
    "one row too many": ("for (; r < n;", "for (; r <= n;", AssertionError),
    "no barrier": (
        "place_of<1>(pointers, i);\n  }\n  __syncthreads",
        "place_of<1>(pointers, i);\n  }\n  __threadfence",
        AssertionError,
    ),
    "write outside an array": ("* PADDED + i, sum", "* PADDED + i + 32, sum", EmulationError),
    "half a warp": (
        "  add_lanes<PADDED>(sums);\n  const",
        "  if (threadIdx.x % 2) add_lanes<PADDED>(sums);\n  const",
        EmulationError,
    ),
}
MORE_FAULTS = {
    "row 1 too far": ("X + r * N_INPUTS", "X + (r + 1) * N_INPUTS", AssertionError),
    "transposed W": ("D[o] * H_below[i]", "D[i % A::n_out] * H_below[i]", AssertionError),
    "wrong half": ("const bool upper =", "const bool upper = !", AssertionError),
    "write outside shared memory": ("lane * PER_LANE + k", "lane * 99 + k", EmulationError),
}


@emulation.needs_compiler
@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.kernels) for name in MORE_FAULTS)]
)
def test_a_fault_in_the_kernel_is_found(fault, device):
    *device.fault, error = (FAULTS | MORE_FAULTS)[fault]
    problem = problem_of((2, 3, 2), "tanh", "squared_error", 300)
    with pytest.raises(error):
        assert_results_close(run_on(plan(problem, 300), problem), derivation(problem))


# What comes with the kernel ----------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 128, 129, 33792, 10**7, 10**9, 10**12])
def test_blocks_for_any_number_of_rows(n):
    n_blocks = tiny.n_blocks(n, 264)
    rows_of_thread = -(-n // (n_blocks * tiny.BLOCK))
    assert 1 <= n_blocks < 2**31
    assert rows_of_thread <= tiny.MOST_ROWS
    assert n_blocks <= 264 or rows_of_thread == tiny.MOST_ROWS
    assert n_blocks >= min(264, n // tiny.BLOCK)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 4, 1), (True, 4)),
        ((2, 10, 5, 1), (True, 2)),
        ((8, 11, 1), (False, 2)),
        ((3, 32, 1), None),
        ((64, 64, 64, 1), None),
    ],
)
def test_parameters_decide_what_is_covered(sizes, expected):
    problem = problem_of(sizes, "sigmoid", "squared_error", 1)
    assert tiny.placement(specification(problem)) == expected
    chosen = tiny.specialise(specification(problem), "float32")
    assert (chosen is None) == (expected is None)
    if chosen is not None:
        assert chosen.max_registers == tiny.CEILINGS[expected[1]]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((2, 4, 1), [(True, 4)]),
        ((2, 10, 5, 1), [(True, 2), (False, 3)]),
        ((8, 11, 1), [(False, 2), (False, 3)]),
        ((64, 64, 64, 1), []),
    ],
)
def test_what_there_is_to_choose_between(sizes, expected):
    assert tiny.variants(spec_of(*sizes)) == expected


def test_only_float32_is_covered():
    spec = specification(problem_of((2, 4, 1), "sigmoid", "squared_error", 1), np.float64)
    assert tiny.prepare(spec, 1, "float32") is None

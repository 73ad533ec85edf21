"""Tier 2 of the CuPy engine, kernels and plan together, run on the host in place of a device.

The emulated tensor cores cut off what does not fit into a sum, as devices do.
"""

import sys
from itertools import pairwise
from types import SimpleNamespace

import cupy_api
import emulation
import numpy as np
import pytest
from derivation import by_derivation, specification
from emulation import EmulationError, on_device
from oracles import assert_close, make_problem

from mlp_backprop import backprop
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.derivatives.gradients import LossAndGrads
from mlp_backprop.engines.cuda import build, warp_tiles
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.engines.cuda.warp_tiles import GEOMETRIES, LIMITS, OPERANDS
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

RAGGED = (0, 1, 15, 16, 17, 127, 128, 129, 300)

# Of the whole gradient, relative: sums over a few samples may cancel, which costs digits.
BOUND = 2e-6

# Every activation and loss; widths that fill 16 x 16 tiles and that do not; one to four layers.
NETS = [
    ((64, 64, 64, 1), ("tanh", "sigmoid", "identity"), "squared_error", True),
    ((20, 32, 16, 10), ("relu", "softplus", "identity"), "softmax_cross_entropy", True),
    (
        (5, 40, 3, 24, 2),
        ("silu", "leaky_relu", "gelu_tanh", "identity"),
        "binary_cross_entropy",
        False,
    ),
    ((7, 50, 18), ("elu", "identity"), "poisson", True),
    ((33, 17), ("tanh",), "huber", False),
    ((1, 1), ("identity",), "absolute_error", True),
]
SMALL = ((5, 7, 3), ("tanh", "identity"), "squared_error")


class Kernel(cupy_api.StandIn, of="RawKernel"):
    """Large shared memory must have been asked for before the launch."""

    def __init__(self, module, name, state):
        self._module, self._name, self._state = module, name, state
        self.max_dynamic_shared_size_bytes = 48 * 1024

    def __call__(self, grid, block, args, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        not_finite = args[-1]
        if self._name == "exact_rows":
            self._state.exact = bool(not_finite[0])
        self._module.launch(
            self._name,
            grid,
            block,
            *args,
            shared_bytes=shared_mem,
            backward=self._state.backward,
        )


@pytest.fixture
def device(monkeypatch, tmp_path):
    """Stands for CuPy and a device; `fault` replaces a text of the kernel by another."""
    state = SimpleNamespace(
        multiprocessors=1, limits=LIMITS[0], backward=False, fault=None, exact=None
    )

    def attributes():
        return cupy_api.attributes(
            MultiProcessorCount=state.multiprocessors,
            MaxSharedMemoryPerBlockOptin=state.limits.block,
            MaxSharedMemoryPerMultiprocessor=state.limits.multiprocessor,
        )

    def module(specialisation):
        source = emulation.faulty(specialisation.source, state.fault, tmp_path)
        emulated = emulation.module(specialisation._replace(source=source))
        return cupy_api.instance(
            "RawModule", get_function=lambda name: Kernel(emulated, name, state)
        )

    monkeypatch.setitem(sys.modules, "cupy", emulation.cupy_of(attributes))
    monkeypatch.setattr(build, "module", module)
    monkeypatch.setattr(warp_tiles, "pointers_to", list)
    return state


def problem_of(sizes, activations, loss, n, **options):
    return make_problem(sizes, n, activation=activations, loss=loss, dtype=np.float32, **options)


def plan(problem, precision, n=300):
    run = warp_tiles.prepare(specification(problem), n, precision)
    assert run is not None
    return run


def run_on(run, problem, mean=False, out=None):
    params, X, y, options = problem.map(on_device)
    params = [Layer(W, b) for W, b in params]
    results = LossAndGrads(*run(Arguments(params, X, y, options["sample_weight"], mean, out)))
    assert run.not_finite == 0  # ready for the next call
    return results


def derivation(problem, dtype=np.float64, mean=False):
    return by_derivation(problem.astype(dtype), "mean" if mean else "sum")


def relative_error(got, expected):
    """Of the whole gradient."""
    got, expected = (np.concatenate([A.ravel() for A in flat(s.grads)]) for s in (got, expected))
    scale = np.linalg.norm(expected)
    return np.linalg.norm(got - expected) / scale if scale else np.linalg.norm(got)


def assert_results_close(got, expected, bound):
    assert relative_error(got, expected) < bound
    assert_close(got.loss, expected.loss, bound)


def assert_same_bits(first, second):
    pairs = ([results.loss, *flat(results.grads)] for results in (first, second))
    for A, B in zip(*pairs, strict=True):
        np.testing.assert_array_equal(A, B)


# The kernels -------------------------------------------------------------------------------------


@emulation.needs_compiler
@pytest.mark.parametrize(("sizes", "activations", "loss", "weighted"), NETS)
def test_sums_are_those_of_the_derivation(sizes, activations, loss, weighted, device):
    for n in RAGGED:
        problem = problem_of(sizes, activations, loss, n, weighted=weighted, seed=n)
        sums = run_on(plan(problem, "float32"), problem)
        assert_results_close(sums, derivation(problem), BOUND)
        assert not device.exact


def rounded(A, bits):
    """A with so many bits, of whatever exponent."""
    mantissa, exponent = np.frexp(A)
    return np.ldexp(np.rint(mantissa * 2**bits) / 2**bits, exponent)


def rounded_derivation(problem, bits):
    """The derivation in float64, with the operands of all products rounded."""
    params, X, y, options = problem.astype(np.float64)
    spec = specification(problem, np.float64)
    Z, H, W = [X], [rounded(X, bits)], [rounded(W, bits) for W, _ in params]
    for l, row in enumerate(spec.activations):
        Z.append(H[l] @ W[l].T + params[l][1])
        H.append(rounded(row.f(np, Z[-1]), bits))
    H_L = spec.activations[-1].f(np, Z[-1])
    values, G = backprop.loss_and_output_grad(spec, H_L, y, options["sample_weight"])
    grads = []
    for l in range(len(W), 0, -1):
        row = spec.activations[l - 1]
        if l == len(W):
            slope = row.df(np, Z[l], H_L)
        elif warp_tiles.keeps_slopes(row.name, parts=1):
            slope = rounded(row.df(np, Z[l], row.f(np, Z[l])), bits)
        else:
            slope = row.df(np, H[l], H[l])
        D = rounded(G * slope, bits)
        grads.append(Layer(D.T @ H[l - 1], D.sum(axis=0)))
        G = D @ W[l - 1]
    return LossAndGrads(values.sum(), grads[::-1])


@emulation.needs_compiler
@pytest.mark.parametrize(("precision", "bits"), [("tf32", 11), ("bfloat16", 8)])
@pytest.mark.parametrize(("sizes", "activations", "loss", "weighted"), NETS[1:3])
def test_one_part_is_the_derivation_with_rounded_operands(
    sizes, activations, loss, weighted, precision, bits, device
):
    for n in RAGGED[-3:]:
        problem = problem_of(sizes, activations, loss, n, weighted=weighted, seed=n)
        sums = run_on(plan(problem, precision), problem)
        # What float32 sums change may round an operand the other way.
        assert_results_close(sums, rounded_derivation(problem, bits), 1e-4)


@emulation.needs_compiler
@pytest.mark.parametrize(("sizes", "activations", "loss", "weighted"), NETS[:3])
def test_two_parts_are_as_accurate_as_float32(sizes, activations, loss, weighted, device):
    errors = []
    for seed in range(4):
        problem = problem_of(sizes, activations, loss, 300, weighted=weighted, seed=seed)
        expected = derivation(problem)
        both = run_on(plan(problem, "float32"), problem), derivation(problem, np.float32)
        errors.append([relative_error(sums, expected) for sums in both])
    ours, float32 = np.mean(errors, axis=0)
    assert ours < float32


@emulation.needs_compiler
def test_what_tensor_cores_cut_off_does_not_add_up(device):
    """Of numbers that are all positive, each cut makes the sum smaller: eight of them in a row."""
    problem = problem_of((128, 16), ("identity",), "squared_error", 300)
    ((W, b),) = problem.params
    problem = problem._replace(X=np.abs(problem.X), params=[(np.abs(W), b)], y=0 * problem.y)
    sums = run_on(plan(problem, "float32"), problem)
    (got,), (expected,) = sums.grads, derivation(problem).grads
    assert abs(np.mean(got.W / expected.W - 1)) < 4e-8


@emulation.needs_compiler
@pytest.mark.parametrize("precision", ["float32", "tf32"])
def test_a_power_of_two_changes_no_bit(precision, device):
    problem = problem_of(*NETS[1][:3], 129, weighted=True)
    (W, b), *above = problem.params
    sums = run_on(plan(problem, precision), problem)
    for exponent in (-100, -40, 40):
        power, inverse = np.float32(2.0**exponent), np.float32(2.0**-exponent)
        other = problem._replace(X=problem.X * power, params=[(W * inverse, b), *above])
        first, *rest = sums.grads
        expected = sums._replace(grads=[Layer(first.W * power, first.b), *rest])
        assert_same_bits(run_on(plan(other, precision), other), expected)
        weight = problem.options["sample_weight"] * power
        other = problem._replace(options=problem.options | {"sample_weight": weight})
        grads = [Layer(W * power, b * power) for W, b in sums.grads]
        expected = LossAndGrads(sums.loss * power, grads)
        assert_same_bits(run_on(plan(other, precision), other), expected)


@emulation.needs_compiler
@pytest.mark.parametrize("case", ["unweighted", "weighted", "not finite"])
@pytest.mark.parametrize("multiprocessors", [1, 4])  # one row of sums, and several
def test_the_mean(multiprocessors, case, device):
    device.multiprocessors = multiprocessors
    problem = problem_of(*NETS[1][:3], 300, weighted=case == "weighted")
    if case == "not finite":
        device.fault = ("sums[N_PARAMS + threadIdx.x] = sum;", "*not_finite = 1;")
    results = run_on(plan(problem, "float32"), problem, mean=True)
    assert_results_close(results, derivation(problem, mean=True), BOUND)


@emulation.needs_compiler
def test_results_are_new_arrays_or_those_of_out(device):
    problems = [problem_of(*SMALL, 130, seed=seed) for seed in range(3)]
    run = plan(problems[0], "float32")
    first, second = run_on(run, problems[0]), run_on(run, problems[1])
    out = [Layer(np.full_like(W, np.nan), np.full_like(b, np.nan)) for W, b in first.grads]
    third = run_on(run, problems[2], out=out)
    assert third.grads is out
    for problem, results in zip(problems, (first, second, third), strict=True):
        assert_results_close(results, derivation(problem), BOUND)


@emulation.needs_compiler
def test_more_rows_than_planned_for(device):
    device.multiprocessors = 4
    problem = problem_of(*SMALL, 1003)
    results = run_on(plan(problem, "float32", 130), problem)
    assert_results_close(results, derivation(problem), BOUND)


@emulation.needs_compiler
def test_sums_over_many_tiles(device):
    problem = problem_of(*SMALL, 40000)
    sums = run_on(plan(problem, "float32", 40000), problem)
    assert_results_close(sums, derivation(problem), 5e-7)


def not_finite_problems():
    problem = problem_of(*SMALL, 40, weighted=True)
    (W, b), last = problem.params
    X, W_nan = problem.X.copy(), W.copy()
    X[13, 2], X[14, 1] = np.inf, -np.inf
    W_nan[3, 4] = np.nan
    huge = np.float32(1e30)
    return {
        "inf in X": problem._replace(X=X),
        "nan in W": problem._replace(params=[(W_nan, b), last]),
        "overflow": problem._replace(params=[(W, b), (last[0] * huge, last[1] * huge)]),
    }


@emulation.needs_compiler
@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("case", not_finite_problems())
def test_what_is_not_finite_is_as_in_float32(case, precision, device):
    problem = not_finite_problems()[case]
    sums = run_on(plan(problem, precision), problem)
    assert device.exact
    with np.errstate(all="ignore"):
        expected = derivation(problem, np.float32)
    pairs = ([A.loss, *flat(A.grads)] for A in (sums, expected))
    for got, wanted in zip(*pairs, strict=True):
        finite = np.isfinite(wanted)
        np.testing.assert_array_equal(np.isfinite(got), finite)
        np.testing.assert_allclose(got[finite], wanted[finite], rtol=1e-4, atol=1e-4)


@emulation.needs_compiler
@pytest.mark.parametrize(("sizes", "activations", "loss", "weighted"), NETS[1:2])
def test_the_exact_kernel_alone(sizes, activations, loss, weighted, device):
    device.fault = ("sums[N_PARAMS + threadIdx.x] = sum;", "*not_finite = 1;")
    for n in (1, 7, 8, 9, 129):
        problem = problem_of(sizes, activations, loss, n, weighted=weighted, seed=n)
        assert_results_close(run_on(plan(problem, "tf32"), problem), derivation(problem), BOUND)
        assert device.exact


@emulation.needs_compiler
@pytest.mark.parametrize("multiprocessors", [1, 2, 20])
def test_any_number_of_blocks_gives_the_sums(multiprocessors, device):
    device.multiprocessors = multiprocessors
    problem = problem_of(*SMALL, 1003)
    assert_results_close(
        run_on(plan(problem, "float32", 1003), problem), derivation(problem), BOUND
    )


@emulation.needs_compiler
@pytest.mark.parametrize("precision", OPERANDS)
def test_a_repetition_gives_the_same_bits_whatever_the_order_of_blocks(precision, device):
    device.multiprocessors = 2
    problem = problem_of(*SMALL, 1003)
    run = plan(problem, precision, 1003)
    first = run_on(run, problem)
    for device.backward in (False, True):
        assert_same_bits(first, run_on(run, problem))


@emulation.needs_compiler
@pytest.mark.kernels
@pytest.mark.parametrize("limits", LIMITS)
def test_every_kind_of_device(limits, device):
    device.limits = limits
    problem = problem_of(*NETS[1][:3], 129)
    run = plan(problem, "float32")
    assert run.shared_bytes <= limits.block
    assert_results_close(run_on(run, problem), derivation(problem), BOUND)


@emulation.needs_compiler
@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8])
def test_labels_of_every_integer_type(dtype, device):
    problem = problem_of(*NETS[1][:3], 130)
    problem = problem._replace(y=problem.y.astype(dtype))
    assert_results_close(run_on(plan(problem, "float32"), problem), derivation(problem), BOUND)


@emulation.needs_compiler
def test_rows_of_class_weights(device):
    problem = problem_of(*NETS[1][:3], 130, class_rows=True)
    assert_results_close(run_on(plan(problem, "float32"), problem), derivation(problem), BOUND)


@emulation.needs_compiler
@pytest.mark.parametrize("label", [-1, 10, 2**32])
def test_a_label_out_of_range_makes_the_loss_nan(label, device):
    problem = problem_of(*NETS[1][:3], 130)
    problem.y[77] = label
    assert np.isnan(run_on(plan(problem, "float32"), problem).loss)


FAULTS = {
    "one row too many": ("inside = row < samples.n", "inside = row <= samples.n", AssertionError),
    "rows of another warp": ("warp() * SLAB_ROWS + 16 * m", "16 * m", AssertionError),
    "W not transposed": (
        "load_block<true, DOWN>(B, W",
        "load_block<false, DOWN>(B, W",
        AssertionError,
    ),
    "no barrier": (
        "__syncthreads();  // every slab",
        "__syncwarp();  // every slab",
        AssertionError,
    ),
    "write outside an array": ("sums[N_PARAMS + thr", "sums[N_SUMS + thr", EmulationError),
}
MORE_FAULTS = {
    "another scale": ("D_scale * sum[0]", "2 * D_scale * sum[0]", AssertionError),
    "low parts left out": ("p >= 0; --p) multiply", "p >= 1; --p) multiply", AssertionError),
    "not aligned": ("eighth % 2 * 8 : eighth", "eighth % 2 * 4 : eighth", EmulationError),
    "write outside shared memory": (
        ") shared.rows_scale[l][",
        ") shared.rows_scale[l - 5][",
        EmulationError,
    ),
    "half a warp": ("scale_of(warp_max", "scale_of(lane() % 2 ? 0 : warp_max", EmulationError),
}


@emulation.needs_compiler
@pytest.mark.parametrize(
    "fault", [*FAULTS, *(pytest.param(name, marks=pytest.mark.kernels) for name in MORE_FAULTS)]
)
def test_a_fault_in_the_kernel_is_found(fault, device):
    *device.fault, error = (FAULTS | MORE_FAULTS)[fault]
    problem = problem_of(*SMALL, 130)

    def check():
        assert_results_close(run_on(plan(problem, "float32"), problem), derivation(problem), BOUND)
        assert not device.exact  # nor that it is hidden

    with pytest.raises(error):
        check()


@emulation.needs_compiler
@pytest.mark.kernels
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_with_every_loss(activation, loss, weighted, device):
    for n in RAGGED:
        # Where the loss takes no logits, the last layer has the activation too.
        names = [activation] * 2 + ["identity" if LOSSES[loss].takes_logits else activation]
        problem = problem_of((3, 20, 17, 4), names, loss, n, weighted=weighted, seed=n)
        sums = run_on(plan(problem, "float32"), problem)
        assert_results_close(sums, derivation(problem), BOUND)


@emulation.needs_compiler
@pytest.mark.kernels
@pytest.mark.parametrize(("precision", "bits"), [("tf32", 11), ("bfloat16", 8)])
@pytest.mark.parametrize(  # but tanh, which bfloat16 has roughly
    "activation", [name for name in ACTIVATIONS if name != "tanh"]
)
def test_every_activation_of_one_part(activation, precision, bits, device):
    for n in RAGGED:
        problem = problem_of((3, 20, 17, 4), [activation] * 3, "squared_error", n, seed=n)
        sums = run_on(plan(problem, precision), problem)
        assert_results_close(sums, rounded_derivation(problem, bits), 1e-4)


# What comes with the kernels ---------------------------------------------------------------------


def spec_of(*sizes, dtype=np.float32):
    return specification(problem_of(sizes, "tanh", "squared_error", 0), dtype)


@pytest.mark.parametrize(
    ("spec", "precision"),
    [
        (spec_of(784, 128, 10), "float32"),
        (spec_of(129, 1), "bfloat16"),
        (spec_of(64, 64, 1, dtype=np.float64), "float32"),
        (spec_of(64, 64, 1), "float32_exact"),
        (spec_of(128, 128, 128, 128, 10), "bfloat16"),
    ],
)
def test_what_is_not_covered(spec, precision, device):
    assert warp_tiles.specialise(spec, precision) == ()
    assert warp_tiles.prepare(spec, 1000, precision) is None


@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("sizes", [(2, 10, 5, 1), (64, 64, 64, 1), (16, 128, 10), (96, 96, 1)])
def test_what_is_chosen_fits(sizes, limits, precision):
    spec, parts = spec_of(*sizes), OPERANDS[precision].PARTS
    geometry = warp_tiles.choose(spec, parts, limits)
    if geometry is None:
        assert not any(
            warp_tiles.shared_bytes(spec, parts, other) <= limits.block
            and warp_tiles.registers(spec, parts, other) <= other.max_registers
            for other in GEOMETRIES[parts]
        )
        return
    size = warp_tiles.shared_bytes(spec, parts, geometry)
    assert size <= limits.block
    assert geometry.BLOCKS * (size + warp_tiles.RESERVED) <= limits.multiprocessor
    assert 32 * geometry.WARPS * geometry.BLOCKS * geometry.max_registers <= 65536
    assert warp_tiles.exact_bytes(spec) <= size


@pytest.mark.parametrize("n", [0, 1, 128, 129, 10**7, 10**9, 10**12])
def test_blocks_for_any_number_of_rows(n):
    n_blocks = warp_tiles.n_blocks(n, 128, 264)
    tiles_of_block = -(-n // (128 * n_blocks))
    assert 1 <= n_blocks < 2**31
    assert tiles_of_block <= warp_tiles.MOST_TILES
    assert n_blocks <= 264 or tiles_of_block == warp_tiles.MOST_TILES
    assert n_blocks >= min(264, n // 128)


def test_gradients_of_a_layer_are_dealt_out_to_all_warps():
    for n_out, n_in in pairwise((16, 32, 96, 128, 16, 64)):
        rows, columns = warp_tiles.share(n_out, n_in, 8)
        assert rows * columns * 8 >= n_out * n_in / 256


# On a card ---------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("precision", OPERANDS)
@pytest.mark.parametrize(("sizes", "activations", "loss", "weighted"), NETS[:3])
def test_on_a_device(cupy, sizes, activations, loss, weighted, precision):
    for n in (*RAGGED, 100_003):
        problem = problem_of(sizes, activations, loss, n, weighted=weighted, seed=n)
        params, X, y, options = problem.map(cupy.asarray)
        run = plan(problem, precision, n)
        layers = [Layer(W, b) for W, b in params]
        first, again = (
            LossAndGrads(
                cupy.asnumpy(loss), [Layer(cupy.asnumpy(W), cupy.asnumpy(b)) for W, b in grads]
            )
            for loss, grads in (
                run(Arguments(layers, X, y, options["sample_weight"], False, None))
                for _ in range(2)
            )
        )
        assert_same_bits(first, again)
        if precision == "float32":
            assert_results_close(first, derivation(problem), BOUND)
        elif "tanh" not in activations:
            bits = 11 if precision == "tf32" else 8
            assert_results_close(first, rounded_derivation(problem, bits), 1e-3)

"""What lies between the products of wide nets: the kernels of elements.cu, in the emulation."""

import ctypes
from itertools import product

import emulation
import numpy as np
import oracles
import pytest
from host_device import to_bfloat16, to_float
from numpy.testing import assert_array_equal
from oracles import assert_close

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines.cuda import build
from mlp_backprop.engines.cuda.layer_shapes import LANES, SLAB
from mlp_backprop.engines.cuda.layers import KERNELS, WARPS
from mlp_backprop.engines.cuda.tiny import SLOPES_FROM_Z
from mlp_backprop.losses import LOSSES

KINDS = {"float": ("float", np.float32), "double": ("double", np.float64)}
KINDS["bfloat16"] = ("float", np.uint16)  # arithmetic, and what a matrix is made of
TOLERANCE = {"float": 2e-6, "double": 1e-14, "bfloat16": 2.0**-8}

# Rows in several slabs, the last one ragged; columns in several blocks.
EXTENTS = [(1, 1), (SLAB, 2), (SLAB + 9, LANES + 1), (3, 2 * LANES)]

# Compiling takes longer than running, so that a module serves an activation and a loss together.
LOSS_BESIDE = dict(zip(ACTIVATIONS, [*LOSSES, *LOSSES], strict=False))
ACTIVATION_BESIDE = {loss: activation for activation, loss in LOSS_BESIDE.items()}


def each(names, few):
    """Every name in float, and a few in other kinds; all of them with the marker `kernels`."""
    return [
        pytest.param(
            name, kind, marks=[] if kind == "float" or name in few else pytest.mark.kernels
        )
        for kind in KINDS
        for name in names
    ]


def kernels(activation=None, loss=None, kind="float", code=None):
    """The kernels of elements.cu, or of changed code."""
    activation = activation or ACTIVATION_BESIDE[loss]
    loss = loss or LOSS_BESIDE[activation]
    defines = (
        ("ACTIVATION", activation.upper()),
        ("LOSS", loss.upper()),
        ("REAL", KINDS[kind][0]),
        ("STORED", kind),
    )
    module = emulation.Module("elements.cu", KERNELS, defines)
    if code is not None:
        entries = [f"EMULATED({name})" for name in KERNELS]
        module.library = emulation.library("\n".join([code, *entries, ""]), defines)
    return module


def launch(module, name, rows, width, *arguments, **options):
    grid = (-(-width // LANES), -(-rows // SLAB))
    module.launch(name, grid, (LANES, WARPS), *arguments, **options)


def reals(kind, *shape, seed=0):
    A = np.random.default_rng(seed).normal(size=shape) * 3
    return A.astype(np.float64 if kind == "double" else np.float32)


def rows_of(kind, A, gap=3):
    """A as a matrix of the kernels: so many elements of nan behind each row."""
    A = np.pad(A.astype(float), ((0, 0), (0, gap)), constant_values=np.nan)
    return to_bfloat16(A) if kind == "bfloat16" else A.astype(KINDS[kind][1])


def read_rows(memory, gap=3):
    """The matrix again, in float64; nothing was written behind the rows."""
    A = to_float(memory)
    assert np.isnan(A[:, -gap:]).all()
    return A[:, :-gap]


def activated(module, kind, Z, b, keeps_Z):
    H, kept = rows_of(kind, Z), rows_of(kind, np.zeros_like(Z))
    extent = (*Z.shape, H.shape[1])
    launch(module, "activate", *Z.shape, H, kept if keeps_Z else None, b, *extent)
    return read_rows(H), read_rows(kept)


def assert_activates(activation, kind, code=None):
    module, row = kernels(activation, kind=kind, code=code), ACTIVATIONS[activation]
    keeps_Z = activation in SLOPES_FROM_Z
    for rows, width in EXTENTS:
        Z, b = read_rows(rows_of(kind, reals(kind, rows, width))), reals(kind, width, seed=1)
        H, kept = activated(module, kind, Z, b, keeps_Z)
        assert_close(H, row.f(np, Z + b), TOLERANCE[kind])
        assert_close(kept, (Z + b) * keeps_Z, TOLERANCE[kind])


@emulation.needs_compiler
@pytest.mark.parametrize(("activation", "kind"), each(ACTIVATIONS, ("elu", "softplus")))
def test_activate(activation, kind):
    assert_activates(activation, kind)


# The columns of partials that are not a kernel's own.
MORE = 4


def assert_sums(partials, expected, sizes, tolerance):
    """Sums over the rows of each slab, relative to those of the sizes of what is added up."""
    for slab, sums in enumerate(partials):
        part = slice(slab * SLAB, (slab + 1) * SLAB)
        error = np.abs(sums - expected[part].sum(0))
        assert (error <= tolerance * np.abs(sizes[part]).sum(0)).all()


def assert_deltas(activation, kind, code=None):
    module, row = kernels(activation, kind=kind, code=code), ACTIVATIONS[activation]
    for (rows, width), accumulate in product(EXTENTS, (False, True)):
        D, Z = (rows_of(kind, reals(kind, rows, width, seed=seed)) for seed in (0, 1))
        H, G = rows_of(kind, row.f(np, read_rows(Z))), read_rows(D)
        expected = G * row.df(np, read_rows(Z), read_rows(H))
        slabs, n_partials = -(-rows // SLAB), width + MORE
        partials = np.ones((slabs, n_partials))
        launch(
            *(module, "delta", rows, width, D, H, Z if activation in SLOPES_FROM_Z else None),
            *(rows, width, D.shape[1], partials, n_partials, accumulate),
        )
        assert_close(read_rows(D), expected, TOLERANCE[kind])
        assert (partials[:, width:] == 1).all()
        assert_sums(partials[:, :width] - accumulate, expected, G, TOLERANCE[kind])


@emulation.needs_compiler
@pytest.mark.parametrize(("activation", "kind"), each(ACTIVATIONS, ("elu", "softplus")))
def test_delta(activation, kind):
    assert_deltas(activation, kind)


# The output layer --------------------------------------------------------------------------------


def written(module, kind, A, b, y, weight, blocks, accumulate=False, **options):
    """D_L, its column sums for each slab, and the loss of each block, for products A."""
    rows, width = A.shape
    D = rows_of(kind, A)
    slabs, n_partials = -(-rows // SLAB), width + blocks + MORE
    partials = np.full((slabs, n_partials), 1.0 if accumulate else np.nan)
    partials[:, -MORE:] = 7
    Y, labels = (None, y) if y.ndim == 1 else (y, None)
    given = (D, b, Y, labels, weight, rows, width, D.shape[1])
    arguments = (*given, partials, n_partials, accumulate)
    module.launch("output", (blocks, slabs), (LANES, WARPS), *arguments, **options)
    assert (partials[:, -MORE:] == 7).all()
    partials -= accumulate
    return read_rows(D), partials[:, :width], partials[:, width:-MORE]


def output_blocks(loss, width):
    """The columns of each block of a slab."""
    step = width if loss == "softmax_cross_entropy" else LANES
    return [slice(first, min(first + step, width)) for first in range(0, width, step)]


def assert_writes(loss, kind, weighted, activation=None, code=None):
    activation = activation or ACTIVATION_BESIDE[loss]
    module = kernels(activation, loss, kind, code)
    softmax = loss == "softmax_cross_entropy"  # takes the outputs for logits
    f, row = ACTIVATIONS["identity" if softmax else activation], LOSSES[loss]
    rng, real = np.random.default_rng(0), reals(kind).dtype
    cases = [*EXTENTS, (5, 3), (3, 2 * LANES + 6)]
    for i, (rows, width) in enumerate([*cases, (SLAB + 1, 600)] if softmax else cases):
        A = read_rows(rows_of(kind, reals(kind, rows, width)))
        b = reals(kind, width, seed=1)
        y = oracles.make_targets(rng, loss, rows, width, class_rows=i % 2 == 1)
        y = y if y.ndim == 1 else y.astype(real)
        weight = rng.uniform(0.5, 2, rows).astype(real) if weighted else None
        blocks = output_blocks(loss, width)
        D, sums, losses = written(module, kind, A, b, y, weight, len(blocks), i % 2 == 0)

        w = np.ones(rows) if weight is None else weight.astype(float)
        Y = y if y.ndim == 1 else y.astype(float)
        Z = A + b
        H = f.f(np, Z)
        _, G = row.value_and_grad(np, H, Y)
        expected = w[:, None] * G * f.df(np, Z, H)
        assert_close(D, expected, TOLERANCE[kind])
        assert_sums(
            sums, expected, np.full_like(G, np.max(w[:, None] * np.abs(G))), TOLERANCE[kind]
        )
        values = [
            w * row.value_and_grad(np, H[:, k], Y if Y.ndim == 1 else Y[:, k])[0] for k in blocks
        ]
        by_slab = [[v[i : i + SLAB].sum() for v in values] for i in range(0, rows, SLAB)]
        assert_close(losses, by_slab, min(TOLERANCE[kind], 2e-6))


@emulation.needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("loss", "kind"), each(LOSSES, ("squared_error", "softmax_cross_entropy")))
def test_output(loss, kind, weighted):
    assert_writes(loss, kind, weighted)


@emulation.needs_compiler
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS)[len(LOSSES) :])
def test_output_with_other_activations(activation, kind):
    assert_writes(LOSS_BESIDE[activation], kind, True, activation)


@pytest.mark.kernels
@emulation.needs_compiler
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("kind", KINDS)
def test_output_of_every_pair(activation, loss, kind):
    if LOSSES[loss].takes_logits:
        activation = "identity"
    assert_writes(loss, kind, True, activation)


@emulation.needs_compiler
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_in_its_row(loss, value):
    module, row = kernels("identity", loss), LOSSES[loss]
    A, b = reals("float", SLAB + 2, 5), np.zeros(5, np.float32)
    A[SLAB, 3] = value
    rng = np.random.default_rng(0)
    y = oracles.make_targets(rng, loss, *A.shape)
    y = y if y.ndim == 1 else y.astype(np.float32)
    D, sums, losses = written(module, "float", A, b, y, None, 1)
    with np.errstate(invalid="ignore"):
        values, expected = row.value_and_grad(np, A.astype(float), y)
    bad = np.arange(len(A)) == SLAB
    assert np.isfinite(D[~bad]).all()
    assert_array_equal(np.isfinite(D[bad]), np.isfinite(expected[bad]))
    assert_array_equal(np.isfinite(losses[:, 0]), [True, np.isfinite(values[bad][0])])
    assert np.isfinite(sums[0]).all()


@emulation.needs_compiler
def test_weights_per_class_and_large_logits():
    module, row = kernels(loss="softmax_cross_entropy"), LOSSES["softmax_cross_entropy"]
    Z = np.array([[1000.0, -1000, 0], [-89, 89, 88], [1e9, 0, -1e9]])
    Y, zero = np.array([[0.0, 2, 0.5], [1, 0, 0], [0, 0, 0]]), np.zeros(3, np.float32)
    D, _, losses = written(module, "float", Z, zero, Y.astype(np.float32), None, 1)
    values, expected = row.value_and_grad(np, Z, Y)
    assert_close(losses, [[values.sum()]], 1e-6)
    assert_close(D, expected, 1e-6)


@emulation.needs_compiler
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**62)])
def test_a_label_out_of_range_gives_nan(label):
    """In its own row, and nothing is read for it."""
    module = kernels(loss="softmax_cross_entropy")
    labels, zero = np.array([4, label, 0]), np.zeros(5, np.float32)
    D, _, losses = written(module, "float", reals("float", 3, 5), zero, labels, None, 1)
    assert np.isnan(losses).all()
    assert_array_equal(np.isnan(D).all(axis=1), [False, True, False])
    assert np.isfinite(D[[0, 2]]).all()


# Sums of all slabs -------------------------------------------------------------------------------


def assert_sums_partials(code=None):
    module = kernels("identity", code=code)
    for slabs, n_columns, n_losses, divisor in [
        *((1, 1, 1, 1.0), (WARPS + 3, LANES + 7, 1, 3.0)),
        *((2, LANES, LANES + 5, 7.0), (WARPS + 1, 3, 2, 1.0)),
    ]:
        n_partials = n_columns + n_losses
        partials, sums = reals("double", slabs, n_partials), np.full(n_columns + 1, np.nan, "f4")
        grid = (-(-n_columns // LANES) + 1, 1)
        arguments = (partials, slabs, n_partials, n_columns, divisor, sums)
        module.launch("sum_partials", grid, (LANES, WARPS), *arguments)
        columns, losses = partials[:, :n_columns].sum(0), partials[:, n_columns:].sum()
        assert_close(sums, np.append(columns, losses) / divisor, 1e-6)


@emulation.needs_compiler
def test_sums_of_partials():
    assert_sums_partials()


@emulation.needs_compiler
def test_bfloat16_is_rounded_to_nearest():
    values = [1 + 2**-8, 1 + 3 * 2**-8, 1.01, -3e38, 3.4e38, 1e-40, 0.0, -0.0, np.inf, np.nan]
    A, bits = np.array([values], np.float32), np.zeros((1, len(values)), np.uint16)
    extent = (1, len(values), len(values))
    launch(kernels("elu", kind="bfloat16"), "to_stored", 1, len(values), A, bits, *extent)
    assert_array_equal(to_float(bits)[0, :2], [1, 1 + 2**-6])  # ties to even
    assert_array_equal(bits[0, :-1], to_bfloat16(A)[0, :-1])
    assert np.isnan(to_float(bits)[0, -1])


@emulation.needs_compiler
def test_the_order_of_threads_does_not_matter():
    for loss in ("squared_error", "softmax_cross_entropy"):
        module, A = kernels(loss=loss), reals("float", SLAB + 9, LANES + 1)
        softmax = loss == "softmax_cross_entropy"
        y = np.arange(len(A)) % 7 if softmax else reals("float", *A.shape, seed=1)
        b, blocks = reals("float", A.shape[1], seed=2), len(output_blocks(loss, A.shape[1]))
        forward, backward = (
            written(module, "float", A, b, y, None, blocks, backward=order)
            for order in (False, True)
        )
        for first, second in zip(forward, backward, strict=True):
            assert_array_equal(first, second)


SOURCE = (build.SOURCES / "elements.cu").read_text("utf-8")
ASSERTIONS = {
    "activate": lambda code: assert_activates("softplus", "float", code),
    "delta": lambda code: assert_deltas("tanh", "float", code),
    "output": lambda code: assert_writes("absolute_error", "float", True, "silu", code),
    "softmax": lambda code: assert_writes("softmax_cross_entropy", "float", True, code=code),
    "sum_partials": assert_sums_partials,
}
MUTANTS = [
    ("* stride + column", "* (stride - 3) + column", "delta"),
    ("accumulate ? place + sum : sum", "place + sum", "output"),
    ("weight[k] * slope", "slope", "output"),
    ("other += columns", "other += 2 * columns", "softmax"),
    ("slab += WARPS", "slab = slabs", "sum_partials"),
]
MORE_MUTANTS = [
    ("(blockIdx.y) * SLAB + threadIdx.y", "(blockIdx.y) * (SLAB - 1) + threadIdx.y", "delta"),
    ("first + k * WARPS < rows", "first + k * WARPS <= rows", "delta"),
    ("accumulate ? place + sum : sum", "sum", "delta"),
    (" : Real(0);\n  Real z[OWN], y", " * 0 : Real(0);\n  Real z[OWN], y", "output"),
    ("slope * Function::df(z[k], h);", "slope;", "output"),
    ("width + blockIdx.x", "width + blockIdx.x + 1", "output"),
    ("width + blockIdx.x", "width", "output"),
    ("load(D[k]) + b[k]", "load(D[k])", "softmax"),
    ("first += THREADS / size", "first += THREADS", "softmax"),
    ("row += THREADS / columns", "row += THREADS", "softmax"),
    ("total / divisor", "total", "sum_partials"),
    ("k += LANES", "k = end", "sum_partials"),
]


@emulation.needs_compiler
@pytest.mark.parametrize(
    ("right", "wrong", "kernel"),
    [*MUTANTS, *(pytest.param(*mutant, marks=pytest.mark.kernels) for mutant in MORE_MUTANTS)],
)
def test_mutants_of_the_kernels_are_caught(right, wrong, kernel):
    assert right in SOURCE
    with pytest.raises((AssertionError, emulation.EmulationError)):
        ASSERTIONS[kernel](SOURCE.replace(right, wrong))


@emulation.needs_compiler
def test_which_slopes_need_Z():
    ids = range(len(ACTIVATIONS))
    flags = ", ".join(f"!Activation<{i}, float>::slope_from_output" for i in ids)
    code = f'#include "formulas.cuh"\nextern "C" const bool keep_Z[] = {{{flags}}};\n'
    keep_Z = (ctypes.c_bool * len(ids)).in_dll(emulation.library(code), "keep_Z")
    assert {n for n, keep in zip(ACTIVATIONS, keep_Z, strict=True) if keep} == SLOPES_FROM_Z


def test_constants_are_those_of_the_source():
    assert f"LANES = {LANES}, WARPS = {WARPS}," in SOURCE
    assert f"SLAB = {SLAB};" in SOURCE
    assert SOURCE.count("__global__") == len(KERNELS)
    for name in KERNELS:
        assert f" {name}(" in SOURCE

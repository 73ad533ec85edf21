"""What lies between the products of wide nets: the kernels of elements.cu, in the emulation."""

import ctypes

import emulation
import numpy as np
import oracles
import pytest
from host_device import to_bfloat16, to_float
from numpy.testing import assert_array_equal
from oracles import assert_close

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines import cuda_build
from mlp_backprop.engines.cuda_layer_shapes import SLAB
from mlp_backprop.engines.cuda_layers import KERNELS, LANES, WARPS
from mlp_backprop.engines.cuda_tiny import SLOPES_FROM_Z
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


def assert_deltas(activation, kind, code=None):
    module, row = kernels(activation, kind=kind, code=code), ACTIVATIONS[activation]
    for rows, width in EXTENTS:
        D, Z = (rows_of(kind, reals(kind, rows, width, seed=seed)) for seed in (0, 1))
        H, G = rows_of(kind, row.f(np, read_rows(Z))), read_rows(D)
        expected = G * row.df(np, read_rows(Z), read_rows(H))
        slabs, n_sums = -(-rows // SLAB), width + 4
        partials = np.ones(slabs * n_sums)
        launch(
            *(module, "delta", rows, width, D, H, Z if activation in SLOPES_FROM_Z else None),
            *(rows, width, D.shape[1], partials, n_sums),
        )
        assert_close(read_rows(D), expected, TOLERANCE[kind])
        partials = partials.reshape(slabs, n_sums)
        assert (partials[:, width:] == 1).all()
        for slab, sums in enumerate(partials[:, :width] - 1):
            part = slice(slab * SLAB, (slab + 1) * SLAB)
            error = np.abs(sums - expected[part].sum(0)) / np.abs(G[part]).sum(0)
            assert np.max(error) < TOLERANCE[kind]


@emulation.needs_compiler
@pytest.mark.parametrize(("activation", "kind"), each(ACTIVATIONS, ("elu", "softplus")))
def test_delta(activation, kind):
    assert_deltas(activation, kind)


def lost(module, kind, H, Y, labels, weight, **options):
    """Loss of each slab, and G."""
    rows, width = H.shape
    H = rows_of(kind, H)
    G, slabs, n_sums = rows_of(kind, np.zeros((rows, width))), -(-rows // SLAB), 3
    partials = np.ones((slabs, n_sums))
    extent = (rows, width, H.shape[1])
    launch(
        *(module, "loss", rows, 1, H, Y, labels, weight, G, *extent, partials, n_sums), **options
    )
    assert (partials[:, :-1] == 1).all()
    return partials[:, -1] - 1, read_rows(G)


def assert_loses(loss, kind, weighted, code=None):
    module, row = kernels(loss=loss, kind=kind, code=code), LOSSES[loss]
    rng = np.random.default_rng(0)
    for rows, width in [*EXTENTS, (5, 3)]:
        H = read_rows(rows_of(kind, reals(kind, rows, width)))
        y = oracles.make_targets(rng, loss, rows, width)
        y = y if y.ndim == 1 else y.astype(reals(kind).dtype)
        weight = rng.uniform(0.5, 2, rows).astype(reals(kind).dtype) if weighted else None
        Y, labels = (None, y) if y.ndim == 1 else (y, None)
        sums, G = lost(module, kind, H, Y, labels, weight)
        values, expected = row.value_and_grad(np, H, y.astype(float) if y.ndim == 2 else y)
        if weighted:
            values, expected = values * weight, expected * weight[:, None].astype(float)
        assert_close(G, expected, TOLERANCE[kind])
        by_slab = [values[i : i + SLAB].sum() for i in range(0, rows, SLAB)]
        assert_close(sums, by_slab, min(TOLERANCE[kind], 2e-6))


@emulation.needs_compiler
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("loss", "kind"), each(LOSSES, ("squared_error", "softmax_cross_entropy")))
def test_loss(loss, kind, weighted):
    assert_loses(loss, kind, weighted)


@emulation.needs_compiler
def test_weights_per_class_and_large_logits():
    module, row = kernels(loss="softmax_cross_entropy"), LOSSES["softmax_cross_entropy"]
    H = np.array([[1000.0, -1000, 0], [-89, 89, 88], [1e9, 0, -1e9]])
    Y = np.array([[0.0, 2, 0.5], [1, 0, 0], [0, 0, 0]])
    sums, G = lost(module, "float", H, Y.astype(np.float32), None, None)
    values, expected = row.value_and_grad(np, H, Y)
    assert_close(sums, [values.sum()], 1e-6)
    assert_close(G, expected, 1e-6)


@emulation.needs_compiler
@pytest.mark.parametrize("label", [-1, 5, 2**40, -(2**62)])
def test_a_label_out_of_range_gives_nan(label):
    """In its own row, and nothing is read for it."""
    module = kernels(loss="softmax_cross_entropy")
    labels = np.array([4, label, 0])
    sums, G = lost(module, "float", reals("float", 3, 5), None, labels, None)
    assert np.isnan(sums).all()
    assert_array_equal(np.isnan(G).all(axis=1), [False, True, False])
    assert np.isfinite(G[[0, 2]]).all()


@emulation.needs_compiler
def test_sums_of_partials():
    for slabs, n_sums in [(1, 1), (WARPS + 3, LANES + 7), (2, 3)]:
        partials, sums = reals("double", slabs, n_sums), np.full(n_sums, np.nan, np.float32)
        grid = (-(-n_sums // LANES), 1)
        arguments = (partials, slabs, n_sums, sums)
        kernels("identity").launch("sum_partials", grid, (LANES, WARPS), *arguments)
        assert_close(sums, partials.sum(0), 1e-6)


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
        module, H = kernels(loss=loss), reals("float", SLAB + 9, LANES + 1)
        labels = np.arange(len(H)) % 7 if loss != "squared_error" else None
        Y = None if labels is not None else reals("float", *H.shape, seed=1)
        forward, backward = (
            lost(module, "float", H, Y, labels, None, backward=order) for order in (False, True)
        )
        for A, B in zip(forward, backward, strict=True):
            assert_array_equal(A, B)


SOURCE = (cuda_build.SOURCES / "elements.cu").read_text("utf-8")
ASSERTIONS = {
    "activate": lambda code: assert_activates("softplus", "float", code),
    "delta": lambda code: assert_deltas("tanh", "float", code),
    "loss": lambda code: assert_loses("squared_error", "float", False, code),
}
MUTANTS = [
    ("* stride + column", "* (stride - 3) + column", "delta"),
    ("(blockIdx.y) * SLAB + threadIdx.y", "(blockIdx.y) * (SLAB - 1) + threadIdx.y", "delta"),
    ("first + k * WARPS < rows", "first + k * WARPS <= rows", "delta"),
    ("step = THREADS / 2", "step = THREADS / 4", "loss"),
]


@emulation.needs_compiler
@pytest.mark.parametrize(("right", "wrong", "kernel"), MUTANTS)
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

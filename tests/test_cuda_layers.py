"""Wide nets on the GPU: shapes, and whole passes on a device made of host memory."""

import importlib
import weakref
from itertools import pairwise, product

import emulation
import numpy as np
import pytest
from host_device import HostDevice
from oracles import assert_close, assert_grads_close, make_problem

from mlp_backprop import backprop, namespaces
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.backprop import Spec
from mlp_backprop.engines import cublaslt, cuda_layer_shapes, cuda_layers
from mlp_backprop.engines.cuda_layer_shapes import SLAB
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer

# Dtypes of a pass, and what of a sum may be lost.
PRECISIONS = {
    "float32": (np.float32, 1e-5),
    "float32_exact": (np.float32, 1e-5),
    "float64": (np.float64, 1e-13),
    "tf32": (np.float32, 5e-3),
    "bfloat16": (np.float32, 5e-2),
}


def spec_of(problem, dtype=np.float32):
    sizes = (problem.X.shape[1], *(len(b) for _, b in problem.params))
    rows = tuple(ACTIVATIONS[name] for name in problem.names)
    return Spec(np, sizes, np.dtype(dtype), rows, LOSSES[problem.options["loss"]])


def derivation(problem):
    """The sums in float64."""
    exact = problem.astype(np.float64)
    params = [Layer(*layer) for layer in exact.params]
    weight = exact.options["sample_weight"]
    return backprop.plan(spec_of(exact, np.float64))(params, exact.X, exact.y, weight)


# Shapes ------------------------------------------------------------------------------------------


def plan_shapes(sizes, precision="float32", activation="softplus", dtype=np.float32):
    problem = make_problem(sizes, n=1, activation=activation)
    spec = spec_of(problem, dtype)
    types = cuda_layer_shapes.arithmetic(spec, precision)
    return cuda_layer_shapes.shapes(spec, types), types


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_gradients_are_aligned(precision):
    dtype = PRECISIONS[precision][0]
    s, types = plan_shapes((5, 3, 8, 10), precision, dtype=dtype)
    item = cuda_layer_shapes.ITEM_BYTES[types.stored]
    ours = s.strides if types.converts else s.strides[1:]
    ours = ours + s.weight_strides * types.converts
    assert all(stride * item % cublaslt.ALIGNMENT == 0 for stride in ours)
    if not types.converts:
        assert s.strides[0] == 5
        assert s.weight_strides == [5, 3, 8]
    assert all(n >= size for n, size in zip(s.strides, s.sizes, strict=True))
    places = [*s.grad_offsets, s.sums_offset]
    real = cuda_layer_shapes.ITEM_BYTES[types.real]
    assert all(place * real % cublaslt.ALIGNMENT == 0 for place in places)
    assert all(b - a >= n for (a, b), n in zip(pairwise(places), (15, 24, 80), strict=True))
    assert (s.bias_offsets, s.n_sums) == ([0, 3, 11], 22)


def test_bytes_of_a_row():
    s, _ = plan_shapes((5, 3, 8, 10))  # rows of 4, 8 and 12 floats; Z_1 and Z_2 are kept
    assert s.row_bytes == 4 * ((4 + 8 + 12) + (4 + 8) + 2 * 12)
    assert s.near_bytes == 4 * 2 * 12
    s, _ = plan_shapes((5, 3, 8, 10), "bfloat16", "relu")  # 8, 8, 8 and 16 halves; X is copied
    assert s.row_bytes == 2 * ((8 + 8 + 8 + 16) + 2 * 16)


def test_chunks():
    s, _ = plan_shapes((784, 1024, 1024, 10), activation="relu")

    def rows(n, cache=50 << 20, free=100 << 30):
        return cuda_layer_shapes.chunk_rows(s, n, cache, free)

    assert rows(0) == rows(1) == rows(SLAB) == SLAB
    assert rows(SLAB + 1) == 2 * SLAB
    assert rows(8192) == 8192
    assert rows(8193) == 65 * SLAB  # two chunks of about one size
    assert rows(100_000) == 7744  # thirteen
    assert rows(10**6, cache=1 << 30) == 62528  # sixteen, of almost CHUNK_BYTES
    assert rows(100_000, free=1 << 20) == SLAB  # hardly any memory
    assert rows(100_000, free=0) == SLAB
    narrow, _ = plan_shapes((1, 1), activation="relu")
    assert (
        cuda_layer_shapes.chunk_rows(narrow, 10**8, 1 << 40, 1 << 40) <= cuda_layer_shapes.MOST_ROWS
    )


def test_what_is_not_covered():
    spec = spec_of(make_problem(), np.float16)
    assert cuda_layers.specialise(spec, "float32") is None
    assert cuda_layers.plan(spec, 10, "float32") is None


def test_specialisations():
    spec = spec_of(make_problem(activation=["relu", "tanh", "identity"], loss="huber"))
    ids = [dict(s.defines)["ACTIVATION"] for s in cuda_layers.specialise(spec, "tf32")]
    assert ids == ["RELU", "TANH", "IDENTITY"]
    (first, *_) = cuda_layers.specialise(spec, "bfloat16")
    expected = {"ACTIVATION": "RELU", "LOSS": "HUBER", "REAL": "float", "STORED": "bfloat16"}
    assert dict(first.defines) == expected


# Passes ------------------------------------------------------------------------------------------

CHUNK = 2 * SLAB  # the most rows at once, in these tests


@pytest.fixture
def device(monkeypatch):
    if emulation.COMPILER is None:
        pytest.skip("needs a C++ compiler, c++ or $CXX")
    monkeypatch.setattr(cuda_layer_shapes, "LEAST_ROWS", CHUNK)
    device = HostDevice(l2_bytes=1)
    device.install(monkeypatch)
    yield device
    assert not device.lt.errors
    device.check_guards()


def arguments(device, problem, shift=0):
    """The problem on the device."""
    placed = problem.map(lambda A: device.array(A, shift))
    params = [Layer(*layer) for layer in placed.params]
    return params, placed.X, placed.y, placed.options["sample_weight"]


def assert_sums_close(got, problem, tolerance):
    expected = derivation(problem)
    assert_close(got.loss, expected.loss, tolerance)
    assert_close(got.weight, expected.weight, 1e-6)
    assert_grads_close(got.grads, expected.grads, tolerance)


SIZES = (5, 9, 4, 3)


# Those that test_cuda_elements.py compiles together: compiling takes longer than running.
HIDDEN = dict(
    zip(LOSSES, ("softplus", "silu", "gelu_tanh", "relu", "leaky_relu", "elu"), strict=True)
)


def net(n, loss="squared_error", sizes=SIZES, dtype=np.float32, **options):
    return make_problem(sizes, n, activation=HIDDEN[loss], loss=loss, dtype=dtype, **options)


FEW_PASSES = [
    *((precision, "squared_error") for precision in PRECISIONS),
    ("float32", "softmax_cross_entropy"),
]
EVERY_PASS = [
    pytest.param(*kind, marks=[] if kind in FEW_PASSES else pytest.mark.kernels)
    for kind in product(PRECISIONS, LOSSES)
]


@pytest.mark.parametrize(("precision", "loss"), EVERY_PASS)
def test_a_pass(device, precision, loss):
    dtype, tolerance = PRECISIONS[precision]
    problem = net(7, loss=loss, dtype=dtype, weighted=True)
    run = cuda_layers.plan(spec_of(problem, dtype), 7, precision)
    sums = run(*arguments(device, problem))
    assert sums.loss.dtype == sums.grads[0].W.dtype == dtype
    assert_sums_close(sums, problem, tolerance)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_pass_with_every_activation(device, activation):
    names = [activation, "sigmoid", activation]
    for sizes in (SIZES, (2, 1, 3, 1)):
        problem = make_problem(sizes, 9, activation=names, dtype=np.float64)
        run = cuda_layers.plan(spec_of(problem, np.float64), 9, "float32")
        assert_sums_close(run(*arguments(device, problem)), problem, 1e-13)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_chunks_add_up(device, precision):
    dtype, tolerance = PRECISIONS[precision]
    problem = net(2 * CHUNK + SLAB + 7, sizes=(3, 4, 2), dtype=dtype, weighted=True)
    run = cuda_layers.plan(spec_of(problem, dtype), len(problem.X), precision)
    assert run.rows == CHUNK
    args = arguments(device, problem)
    assert_sums_close(run(*args), problem, tolerance)
    assert device.launches.count("loss") == 3
    assert device.launches.count("sum_partials") == 1


@pytest.mark.parametrize("n", [0, 1, 2, SLAB, SLAB + 1, CHUNK, CHUNK + 1])
def test_fewer_rows_than_planned(device, n):
    run = None
    for seed in (1, 1, 0):
        weighted = {"weighted": seed == 1, "seed": seed}
        problem = net(n, sizes=(3, 4, 2), dtype=np.float64, **weighted)
        run = run or cuda_layers.plan(spec_of(problem, np.float64), 2 * CHUNK, "float32")
        assert_sums_close(run(*arguments(device, problem)), problem, 1e-13)


def test_one_layer(device):
    problem = net(5, sizes=(3, 2), dtype=np.float64)
    run = cuda_layers.plan(spec_of(problem, np.float64), 5, "float32")
    assert_sums_close(run(*arguments(device, problem)), problem, 1e-13)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_pass_repeats_to_the_last_bit(device, precision):
    problem = net(CHUNK + 5, weighted=True)
    results = []
    for planned in (2 * CHUNK, 2 * CHUNK, 4 * CHUNK):
        run = cuda_layers.plan(spec_of(problem), planned, precision)
        run(*arguments(device, problem))
        results.append(b"".join(A.tobytes() for layer in run.results.grads for A in layer))
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("change", ["strided", "shifted", "fortran", "labels"])
def test_inputs_as_they_come(device, change):
    problem = net(9, loss="softmax_cross_entropy", weighted=True)
    params, X, y, weight = arguments(device, problem, shift=1 if change == "shifted" else 0)
    if change == "strided":
        X = device.array(np.repeat(problem.X, 2, axis=0))[::2]
    if change == "fortran":
        params[0] = Layer(device.array(params[0].W.T).T, params[0].b)
    if change == "labels":
        y = device.array(problem.y.astype(np.int16))
    before = X.tobytes(), y.tobytes()
    sums = cuda_layers.plan(spec_of(problem), 9, "float32")(params, X, y, weight)
    assert_sums_close(sums, problem, 1e-5)
    assert (X.tobytes(), y.tobytes()) == before


def test_nan_in_a_row_reaches_the_loss(device):
    problem = net(4, loss="poisson")  # so hidden layers have relu
    problem.X[2, 1] = np.nan
    sums = cuda_layers.plan(spec_of(problem), 4, "float32")(*arguments(device, problem))
    assert np.isnan(sums.loss)
    assert np.isnan(sums.grads[0].W).any()


def test_a_pass_asked_for_again_becomes_a_graph(device):
    run = None
    for seed in range(4):
        problem = net(9, weighted=True, seed=seed)
        run = run or cuda_layers.plan(spec_of(problem), 9, "float32")
        sums = run(*arguments(device, problem))
        assert_sums_close(sums, problem, 1e-5)
        assert (run.graph is not None) == (seed > 0)
    launched = len(device.launches)
    run(*arguments(device, problem))
    assert len(device.launches) == launched  # all of it is in the graph


def test_a_graph_is_of_one_kind(device):
    """Another number of rows, or no weights: the graph is dropped, and another recorded."""
    problem = net(9, weighted=True)
    fewer = problem.map(lambda A: A)._replace(X=problem.X[:5], y=problem.y[:5])
    fewer.options["sample_weight"] = problem.options["sample_weight"][:5]
    unweighted = problem._replace(options=problem.options | {"sample_weight": None})
    run = cuda_layers.plan(spec_of(problem), 9, "float32")
    for p in (problem, problem, fewer, fewer, unweighted, unweighted, problem):
        assert_sums_close(run(*arguments(device, p)), p, 1e-5)
    assert run.graph is None


def test_a_graph_reads_nothing_of_the_caller(device):
    problem = net(9, weighted=True)
    run = cuda_layers.plan(spec_of(problem), 9, "float32")
    for _ in range(2):
        args = arguments(device, problem)
        run(*args)
    for array in (*(A for layer in args[0] for A in layer), *args[1:]):
        array[...] = np.nan
    run.graph.graph.launch(None)
    assert_sums_close(run(*arguments(device, problem)), problem, 1e-5)
    assert np.isfinite(run.results.sums).all()


def test_large_inputs_make_no_graph(device, monkeypatch):
    monkeypatch.setattr(cuda_layers, "GRAPH_BYTES", 100)
    problem = net(9)
    run = cuda_layers.plan(spec_of(problem), 9, "float32")
    for _ in range(3):
        assert_sums_close(run(*arguments(device, problem)), problem, 1e-5)
    assert run.graph is None


def test_a_dropped_plan_is_freed_at_once(device):
    problem = net(9)
    run = cuda_layers.plan(spec_of(problem), 9, "float32")
    for _ in range(2):
        run(*arguments(device, problem))
    gone = weakref.ref(run)
    del run
    assert gone() is None


def test_products_are_planned_once_per_shape(device):
    problem = net(CHUNK + SLAB + 7, sizes=(3, 4, 2), dtype=np.float64)
    run = cuda_layers.plan(spec_of(problem, np.float64), CHUNK + SLAB + 7, "float32")
    run(*arguments(device, problem))
    planned = len(device.lt.heuristics)
    assert planned == 2 * (2 + 2 + 1)  # two lengths: forward, gradients, and one down
    again = cuda_layers.plan(spec_of(problem, np.float64), CHUNK + SLAB + 7, "float32")
    again(*arguments(device, problem))
    assert len(device.lt.heuristics) == planned


def test_without_an_algorithm_the_net_is_not_covered(device):
    device.lt.unsupported = lambda question: True
    problem = net(5)
    assert cuda_layers.plan(spec_of(problem), 5, "float32") is None


def test_a_mutant_of_the_mapping_is_caught(device, monkeypatch):
    """Operands that keep their places, as if cuBLAS stored by rows."""
    multiply = cublaslt.Product.__call__
    monkeypatch.setattr(
        cublaslt.Product, "__call__", lambda self, A, B, C, **kw: multiply(self, B, A, C, **kw)
    )
    problem = net(9, dtype=np.float64)
    run = cuda_layers.plan(spec_of(problem, np.float64), 9, "float32")
    with pytest.raises((AssertionError, RuntimeError)):
        assert_sums_close(run(*arguments(device, problem)), problem, 1e-13)
    device.lt.errors.clear()


# On a device -------------------------------------------------------------------------------------


@pytest.fixture
def cupy():
    try:
        namespaces.namespace("cupy")
    except ImportError as error:
        pytest.skip(str(error))
    return importlib.import_module("cupy")


DEVICE_BOUNDS = {
    "float32": 1e-5,
    "float32_exact": 1e-5,
    "float64": 1e-12,
    "tf32": 1e-2,
    "bfloat16": 5e-2,
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("sizes", [(784, 128, 64, 10), (3, 300, 1), (33, 1, 257, 5)])
@pytest.mark.parametrize("activation", ["tanh", "silu"])
def test_passes_on_a_device(cupy, monkeypatch, precision, sizes, activation):
    """Launched one by one, then as a graph, with the same bits; in one chunk and in several."""
    dtype, kind = PRECISIONS[precision][0], {"activation": activation, "weighted": True}
    loss = "softmax_cross_entropy" if sizes[-1] > 1 else "huber"
    problem = make_problem(sizes, 1000, loss=loss, dtype=dtype, **kind)
    placed = problem.map(cupy.asarray)
    params = [Layer(*layer) for layer in placed.params]
    args = (params, placed.X, placed.y, placed.options["sample_weight"])
    spec = spec_of(problem, dtype)._replace(xp=cupy)
    for most_rows in (cuda_layer_shapes.MOST_ROWS, 2 * SLAB):
        monkeypatch.setattr(cuda_layer_shapes, "MOST_ROWS", most_rows)
        run, bits = cuda_layers.plan(spec, 1000, precision), set()
        for _ in range(3):
            sums = run(*args)
            host = backprop.Sums(
                sums.loss.get(),
                sums.weight.get(),
                [Layer(W.get(), b.get()) for W, b in sums.grads],
            )
            assert_sums_close(host, problem, DEVICE_BOUNDS[precision])
            bits.add(b"".join(A.tobytes() for layer in host.grads for A in layer))
        assert run.graph is not None
        assert len(bits) == 1


@pytest.mark.gpu
def test_nan_reaches_the_loss_on_a_device(cupy):
    """Whatever the products do with relu: see cublaslt.py."""
    problem = make_problem((64, 128, 10), 300, activation="relu", dtype=np.float32)
    problem.X[7, 3] = np.nan
    placed = problem.map(cupy.asarray)
    run = cuda_layers.plan(spec_of(problem)._replace(xp=cupy), 300, "tf32")
    sums = run([Layer(*layer) for layer in placed.params], placed.X, placed.y, None)
    assert np.isnan(sums.loss.get())

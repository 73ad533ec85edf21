"""Wide nets on the GPU: shapes, and whole passes on a device made of host memory."""

import weakref
from itertools import pairwise, product

import emulation
import numpy as np
import pytest
from derivation import by_derivation, specification
from host_device import HostDevice
from oracles import Problem, assert_close, assert_grads_close, make_problem

from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.engines.cuda import cublaslt, layer_shapes
from mlp_backprop.engines.cuda import layers as cuda_layers
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.engines.cuda.layer_shapes import LANES, SLAB
from mlp_backprop.losses import LOSSES
from mlp_backprop.types import Layer, flat

# Dtypes of a pass, and what of a sum may be lost.
PRECISIONS = {
    "float32": (np.float32, 1e-5),
    "float32_exact": (np.float32, 1e-5),
    "float64": (np.float64, 1e-13),
    "tf32": (np.float32, 5e-3),
    "bfloat16": (np.float32, 5e-2),
}


def derivation(problem, mean=False):
    """Loss and gradients in float64."""
    return by_derivation(problem.astype(np.float64), "mean" if mean else "sum")


# Shapes ------------------------------------------------------------------------------------------


def plan_shapes(sizes, precision="float32", activation="softplus", dtype=np.float32):
    problem = make_problem(sizes, n=1, activation=activation)
    spec = specification(problem, dtype)
    types = layer_shapes.arithmetic(spec, precision)
    return layer_shapes.shapes(spec, types), types


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rows_and_gradients_are_aligned(precision):
    dtype = PRECISIONS[precision][0]
    s, types = plan_shapes((5, 3, 8, 10), precision, dtype=dtype)
    item = layer_shapes.ITEM_BYTES[types.stored]
    ours = s.strides if types.converts else s.strides[1:]
    ours = ours + s.weight_strides * types.converts
    assert all(stride * item % cublaslt.ALIGNMENT == 0 for stride in ours)
    if not types.converts:
        assert s.strides[0] == 5
        assert s.weight_strides == [5, 3, 8]
    assert all(n >= size for n, size in zip(s.strides, s.sizes, strict=True))
    places = [*s.grad_offsets, s.n_results]
    real = layer_shapes.ITEM_BYTES[types.real]
    assert all(place * real % cublaslt.ALIGNMENT == 0 for place in places)
    assert all(b - a >= n for (a, b), n in zip(pairwise(places), (15, 24, 80), strict=True))
    assert (s.bias_offsets, s.loss_offset) == ([0, 3, 11], 21)
    assert places[0] >= 22
    assert (s.loss_blocks, s.n_partials) == (1, 22)


def test_bytes_of_a_row():
    s, _ = plan_shapes((5, 3, 8, 10))  # rows of 4, 8 and 12 floats; H and Z of two layers are kept
    assert s.row_bytes == 4 * ((4 + 8) + (4 + 8) + 2 * 12)
    assert s.near_bytes == 4 * 2 * 12
    s, _ = plan_shapes((5, 3, 8, 10), "bfloat16", "relu")  # 8, 8, 8 and 16 halves; X is copied
    assert s.row_bytes == 2 * ((8 + 8 + 8) + 2 * 16)


def test_parts_of_the_loss():
    """One for each block of LANES columns; softmax cross entropy has whole rows in a block."""
    for width, parts in [(1, 1), (LANES, 1), (LANES + 1, 2), (70, 3)]:
        for loss, expected in [("huber", parts), ("softmax_cross_entropy", 1)]:
            spec = specification(make_problem((5, 3, width), n=1, loss=loss))
            types = layer_shapes.arithmetic(spec, "float32")
            s = layer_shapes.shapes(spec, types)
            assert (s.loss_offset, s.loss_blocks) == (3 + width, expected)
            assert s.n_partials == 3 + width + expected


def test_chunks():
    s, _ = plan_shapes((784, 1024, 1024, 10), activation="relu")

    def rows(n, cache=50 << 20, free=100 << 30):
        return layer_shapes.chunk_rows(s, n, cache, free)

    assert rows(0) == rows(1) == rows(SLAB) == SLAB
    assert rows(SLAB + 1) == 2 * SLAB
    assert rows(32_767) == 32_768
    assert rows(32_768) == layer_shapes.LEAST_ROWS == 16_384
    assert rows(40_000) == 313 * SLAB  # two chunks of about one size
    assert rows(100_000) == 16_704  # six
    assert rows(10**6, cache=1 << 30) == 66_688  # fifteen, of half the cache
    assert rows(2 * 10**6, cache=1 << 40) == 125_056  # sixteen, of almost CHUNK_BYTES
    assert rows(100_000, free=1 << 20) == SLAB  # hardly any memory
    assert rows(100_000, free=0) == SLAB
    narrow, _ = plan_shapes((1, 1), activation="relu")
    assert layer_shapes.chunk_rows(narrow, 10**8, 1 << 40, 1 << 40) <= layer_shapes.MOST_ROWS


def test_what_is_not_covered():
    spec = specification(make_problem(), np.float16)
    assert cuda_layers.specialise(spec, "float32") is None
    assert cuda_layers.prepare(spec, 10, "float32") is None


def test_specialisations():
    spec = specification(make_problem(activation=["relu", "tanh", "identity"], loss="huber"))
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
    monkeypatch.setattr(layer_shapes, "MOST_ROWS", CHUNK)
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


def assert_right(got, problem, tolerance, mean=False):
    loss, grads = derivation(problem, mean)
    assert_close(got[0], loss, tolerance)
    assert_grads_close(got[1], grads, tolerance)


def bits_of(result):
    """A copy of loss and gradients."""
    return b"".join(A.tobytes() for A in [result[0], *flat(result[1])])


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


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize(("precision", "loss"), EVERY_PASS)
def test_a_pass(device, precision, loss, mean):
    dtype, tolerance = PRECISIONS[precision]
    problem = net(7, loss=loss, dtype=dtype, weighted=True)
    run = cuda_layers.prepare(specification(problem, dtype), 7, precision)
    result = run(Arguments(*arguments(device, problem), mean, None))
    assert all(A.dtype == dtype for A in [result[0], *flat(result[1])])
    assert_right(result, problem, tolerance, mean)


@pytest.mark.kernels
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_pass_with_every_activation(device, activation):
    names = [activation, "sigmoid", activation]
    for sizes in (SIZES, (2, 1, 3, 1)):
        problem = make_problem(sizes, 9, activation=names, dtype=np.float64)
        run = cuda_layers.prepare(specification(problem, np.float64), 9, "float32")
        assert_right(run(Arguments(*arguments(device, problem), False, None)), problem, 1e-13)


def test_an_activation_at_the_output(device):
    problem = net(9, dtype=np.float64)
    problem.options["activation"] = [HIDDEN["squared_error"]] * 3
    run = cuda_layers.prepare(specification(problem, np.float64), 9, "float32")
    assert_right(run(Arguments(*arguments(device, problem), False, None)), problem, 1e-13)


@pytest.mark.parametrize(
    ("loss", "class_rows"),
    [
        ("softmax_cross_entropy", True),
        ("softmax_cross_entropy", False),
        ("squared_error", False),
        ("poisson", False),
        *(
            pytest.param(loss, False, marks=pytest.mark.kernels)
            for loss in ("absolute_error", "huber", "binary_cross_entropy")
        ),
    ],
)
def test_wide_outputs(device, loss, class_rows):
    """Three slabs, and three blocks of columns; a mean without weights over two chunks."""
    sizes, n = (3, 2, 70), CHUNK + 9
    problem = net(n, loss=loss, sizes=sizes, dtype=np.float64, class_rows=class_rows)
    run = cuda_layers.prepare(specification(problem, np.float64), n, "float32")
    assert_right(run(Arguments(*arguments(device, problem), True, None)), problem, 1e-13, mean=True)


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_chunks_add_up(device, precision, weighted, mean):
    dtype, tolerance = PRECISIONS[precision]
    problem = net(2 * CHUNK + SLAB + 7, sizes=(3, 4, 2), dtype=dtype, weighted=weighted)
    run = cuda_layers.prepare(specification(problem, dtype), len(problem.X), precision)
    assert run.rows == CHUNK
    assert_right(run(Arguments(*arguments(device, problem), mean, None)), problem, tolerance, mean)
    assert device.launches.count("output") == 3
    assert device.launches.count("sum_partials") == 1


@pytest.mark.parametrize("n", [0, 1, 2, SLAB, SLAB + 1, CHUNK, CHUNK + 1])
def test_fewer_rows_than_planned(device, n):
    run = None
    for seed in (1, 1, 0):
        weighted = {"weighted": seed == 1, "seed": seed}
        problem = net(n, sizes=(3, 4, 2), dtype=np.float64, **weighted)
        run = run or cuda_layers.prepare(specification(problem, np.float64), 2 * CHUNK, "float32")
        for mean in {False, n > 1}:  # the second weight is 0
            assert_right(
                run(Arguments(*arguments(device, problem), mean, None)), problem, 1e-13, mean
            )


def test_one_layer(device):
    problem = net(5, sizes=(3, 2), dtype=np.float64)
    run = cuda_layers.prepare(specification(problem, np.float64), 5, "float32")
    assert_right(run(Arguments(*arguments(device, problem), False, None)), problem, 1e-13)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_pass_repeats_to_the_last_bit(device, precision):
    problem = net(CHUNK + 5, weighted=True)
    results = []
    for planned in (2 * CHUNK, 2 * CHUNK, 4 * CHUNK):
        run = cuda_layers.prepare(specification(problem), planned, precision)
        results.append(bits_of(run(Arguments(*arguments(device, problem), True, None))))
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
    before = X.tobytes(), y.tobytes(), weight.tobytes()
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    for mean in (False, True):
        assert_right(run(Arguments(params, X, y, weight, mean, None)), problem, 1e-5, mean)
    assert (X.tobytes(), y.tobytes(), weight.tobytes()) == before


def test_the_sum_of_weights_may_leave_float32(device):
    """It is formed in float64."""
    problem = net(9, weighted=True)
    problem.options["sample_weight"] *= np.float32(1e38)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    assert_right(run(Arguments(*arguments(device, problem), True, None)), problem, 1e-5, mean=True)


def test_nan_in_a_row_reaches_the_loss(device):
    problem = net(4, loss="poisson")  # so hidden layers have relu
    problem.X[2, 1] = np.nan
    run = cuda_layers.prepare(specification(problem), 4, "float32")
    loss, grads = run(Arguments(*arguments(device, problem), False, None))
    assert np.isnan(loss)
    assert np.isnan(grads[0].W).any()


# Results and where they go -----------------------------------------------------------------------


def test_results_are_the_callers(device):
    """Those of one call are not touched by the next, whether it is launched or a graph."""
    problem, other = (net(9, weighted=True, seed=seed) for seed in (0, 1))
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    args, kept = arguments(device, problem), []
    for _ in range(4):
        result = run(Arguments(*args, True, None))
        kept.append((result, bits_of(result)))
    run(Arguments(*arguments(device, other), True, None))
    assert len({bits for _, bits in kept}) == 1
    assert all(bits_of(result) == bits for result, bits in kept)
    places = {A.data.ptr for result, _ in kept for A in [result[0], *flat(result[1])]}
    assert len(places) == 4 * 7


def out_like(device, problem, shift=0):
    return [
        Layer(*(device.array(np.full(A.shape, 7, A.dtype), shift) for A in layer))
        for layer in problem.params
    ]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("n", [0, 9, CHUNK + 9])
def test_out_is_written(device, n, shift):
    """Products go there at once if the matrices are aligned."""
    problem = net(n, dtype=np.float64, weighted=n > 0)
    out = out_like(device, problem, shift)
    run = cuda_layers.prepare(specification(problem, np.float64), n, "float32")
    args = arguments(device, problem)
    for _ in range(3):
        loss, grads = run(Arguments(*args, n > 0, out))
        assert all(A is B for A, B in zip(flat(grads), flat(out), strict=True))
        assert_right((loss, out), problem, 1e-13, n > 0)
        assert loss.size == 1
        for A in flat(out):
            A[...] = 7
    if n:
        sizes = {call.dW == tuple(W.data.ptr for W, _ in out) for call in run.graphs}
        assert sizes == {shift == 0}


def test_gradients_without_out_need_one_array(device):
    problem = net(9)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    live = len(device.live)
    args = arguments(device, problem)
    held = len(device.live)
    assert held - live == 8
    result = run(Arguments(*args, True, None))
    assert len(device.live) == held + 1
    del result
    assert len(device.live) == held


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
@pytest.mark.parametrize("what", ["params", "X", "y", "weight"])
@pytest.mark.parametrize("mean", [False, True])
def test_out_may_be_what_is_read(device, precision, what, mean):
    """Every array is read to the end before a gradient is written over it; over chunks, too."""
    dtype, tolerance = PRECISIONS[precision]
    problem = net(CHUNK + 9, dtype=dtype, weighted=True)
    run = cuda_layers.prepare(specification(problem, dtype), CHUNK + 9, precision)
    for _ in range(3):
        args = params, X, y, weight = arguments(device, problem)
        out = out_like(device, problem)
        if what == "params":
            out = params
        else:  # from the second vector of 16 bytes on
            memory, begin = {"X": X, "y": y, "weight": weight}[what].reshape(-1), 16 // X.itemsize
            out[1] = Layer(memory[begin : begin + 36].reshape(4, 9), out[1].b)
        loss, grads = run(Arguments(*args, mean, out))
        assert_right((loss, grads), problem, tolerance, mean)


# Graphs ------------------------------------------------------------------------------------------


def change_in_place(args, problem):
    """Other numbers at the same addresses."""
    params, *data = args
    new = [*flat(problem.params), problem.X, problem.y, problem.options["sample_weight"]]
    for array, values in zip([*flat(params), *data], new, strict=True):
        if array is not None:
            array[...] = values


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("to_out", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_the_same_addresses_become_a_graph(device, weighted, precision, to_out, mean):
    """Launched, recorded, then replayed, with other numbers each time."""
    tolerance = PRECISIONS[precision][1]
    first = net(CHUNK + 9, weighted=weighted)
    run = cuda_layers.prepare(specification(first), CHUNK + 9, precision)
    args = arguments(device, first)
    out = out_like(device, first) if to_out else None
    launched = []
    for seed in range(4):
        problem = net(CHUNK + 9, weighted=weighted, seed=seed)
        change_in_place(args, problem)
        result = run(Arguments(*args, mean, out))
        assert_right(result, problem, tolerance, mean)
        del result  # its memory is the next one's
        assert len(run.graphs) == 1
        launched.append(len(device.launches))
        (graph,) = run.graphs.values()
        assert (graph is not None) == (seed > 0)
    assert launched == [launched[0], 2 * launched[0], 2 * launched[0], 2 * launched[0]]


@pytest.mark.parametrize(("weighted", "mean"), [(False, False), (False, True), (True, False)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_bound_pass_reads_what_the_arrays_hold_by_then(device, precision, weighted, mean):
    first = net(CHUNK + 9, weighted=weighted)
    args = arguments(device, first)
    run = cuda_layers.prepare(specification(first), CHUNK + 9, precision)
    run(Arguments(*args, mean, None))
    launch = run.bound(Arguments(*args, mean, None))
    for seed in range(4):
        problem = net(CHUNK + 9, weighted=weighted, seed=seed)
        change_in_place(args, problem)
        result = launch()
        assert_right(result, problem, PRECISIONS[precision][1], mean)
    assert device.n_graph_launches == 4
    assert all(A is B for A, B in zip(flat(result[1]), flat(launch()[1]), strict=True))


def test_a_constant_X_is_converted_once(device):
    """For all chunks; parameters are converted in every pass."""
    n = CHUNK + 9
    problem = net(n)
    args = arguments(device, problem)
    run = cuda_layers.prepare(specification(problem), n, "bfloat16")
    bits = bits_of(run(Arguments(*args, True, None)))
    n_converted = device.launches.count("to_stored")
    launch = run.bound(Arguments(*args, True, None, constant_X=True))
    assert device.launches.count("to_stored") == n_converted + 2
    assert bits_of(launch()) == bits
    assert device.launches.count("to_stored") == n_converted + 2 + len(problem.params)
    other = net(n, seed=1)._replace(X=problem.X)
    change_in_place(args, other)
    assert_right(launch(), other, PRECISIONS["bfloat16"][1], mean=True)


def test_what_is_read_as_it_lies_is_not_kept(device):
    args = arguments(device, net(9))
    run = cuda_layers.prepare(specification(net(9)), 9, "float32")
    run(Arguments(*args, True, None))
    live = len(device.live)
    launch = run.bound(Arguments(*args, True, None, constant_X=True))
    assert len(device.live) == live + 1  # the results
    change_in_place(args, net(9, seed=1))
    assert_right(launch(), net(9, seed=1), 1e-5, mean=True)


@pytest.mark.parametrize("what", ["no rows", "labels", "weights", "shifted"])
def test_what_is_converted_at_every_call_cannot_be_bound(device, what):
    problem = net(
        0 if what == "no rows" else 9, "softmax_cross_entropy", weighted=what == "weights"
    )
    params, X, y, weight = arguments(device, problem, shift=1 if what == "shifted" else 0)
    if what == "labels":
        y = device.array(problem.y.astype(np.int32))
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    assert run.bound(Arguments(params, X, y, weight, what == "weights", None)) is None


def test_graphs_of_results_that_take_turns(device):
    """As in a loop whose last results live until there are new ones."""
    problem = net(9, weighted=True)
    run, result = cuda_layers.prepare(specification(problem), 9, "float32"), None
    args = arguments(device, problem)
    for seed in range(7):
        problem = net(9, weighted=True, seed=seed)
        change_in_place(args, problem)
        result = run(Arguments(*args, True, None))
        assert_right(result, problem, 1e-5, mean=True)
    assert len(run.graphs) == 2
    assert None not in run.graphs.values()
    launched = len(device.launches)
    assert_right(run(Arguments(*args, True, None)), problem, 1e-5, mean=True)
    assert len(device.launches) == launched  # all of it is in the graph


def test_other_addresses_are_launched(device):
    """Each array in turn, with other numbers elsewhere."""
    problem, other = (net(9, weighted=True, seed=seed) for seed in (0, 1))
    run = cuda_layers.prepare(specification(problem), 9, "float32")

    def in_one_list(problem):
        weight = problem.options["sample_weight"]
        return [*flat(problem.params), problem.X, problem.y, weight]

    def call(arrays):
        *params, X, y, weight = arrays
        layers = list(map(Layer, params[::2], params[1::2]))
        return layers, X, y, weight

    values, places = in_one_list(problem), [device.array(A) for A in in_one_list(problem)]
    for _ in range(3):
        assert_right(run(Arguments(*call(places), False, None)), problem, 1e-5)
    for i, changed in enumerate(in_one_list(other)):
        params, X, y, weight = call([*values[:i], changed, *values[i + 1 :]])
        expected = Problem(params, X, y, problem.options | {"sample_weight": weight})
        args = call([*places[:i], device.array(changed), *places[i + 1 :]])
        launched = len(device.launches)
        assert_right(run(Arguments(*args, False, None)), expected, 1e-5)
        assert len(device.launches) > launched


def test_other_kinds_of_calls_are_launched(device):
    """Fewer rows, a mean, no weights, rows of targets in place of labels: at the same addresses."""
    problem = net(9, loss="softmax_cross_entropy", weighted=True)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    params, X, y, weight = arguments(device, problem)
    options, rows = problem.options, np.eye(3, dtype=np.float32)[problem.y] * 2
    unweighted = problem._replace(options=options | {"sample_weight": None})
    fewer = problem._replace(
        X=problem.X[:5],
        y=problem.y[:5],
        options=options | {"sample_weight": options["sample_weight"][:5]},
    )
    targets = device.array(rows)
    calls = [
        ((params, X, y, weight, False), problem),
        ((params, X[:5], y[:5], weight[:5], False), fewer),
        ((params, X, y, None, False), unweighted),
        ((params, X, y, None, True), unweighted),
        ((params, X, targets, None, True), unweighted._replace(y=rows)),
    ]
    for _ in range(4):
        for call, expected in calls:
            assert_right(run(Arguments(*call, None)), expected, 1e-5, call[-1])
    assert len(run.graphs) == len(calls)
    assert None not in run.graphs.values()


def test_few_graphs_are_kept(device):
    """The last ones; one that was dropped is launched again."""
    problem = net(5, sizes=(3, 2))
    run = cuda_layers.prepare(specification(problem), 5, "float32")
    places = [arguments(device, problem) for _ in range(cuda_layers.MOST_GRAPHS + 1)]
    for args in places[:-1]:
        for _ in range(2):
            run(Arguments(*args, False, None))
    run(Arguments(*places[0], False, None))
    assert len(run.graphs) == cuda_layers.MOST_GRAPHS
    launched = len(device.launches)
    run(Arguments(*places[-1], False, None))
    assert len(device.launches) > launched
    assert len(run.graphs) == cuda_layers.MOST_GRAPHS
    launched = len(device.launches)
    run(Arguments(*places[0], False, None))  # was used since
    assert len(device.launches) == launched
    assert_right(run(Arguments(*places[1], False, None)), problem, 1e-5)
    assert len(device.launches) > launched


def test_copies_of_arguments_stay_while_a_graph_reads_them(device):
    """They are of memory that comes back, so that such calls become graphs, too."""
    problem = net(9, loss="softmax_cross_entropy", weighted=True)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    params, X, y, weight = arguments(device, problem, shift=1)
    y = device.array(problem.y.astype(np.int16))
    for seed in range(4):
        problem = net(9, loss="softmax_cross_entropy", weighted=True, seed=seed)
        change_in_place((params, X, y, weight), problem)
        assert_right(run(Arguments(params, X, y, weight, True, None)), problem, 1e-5, mean=True)
    assert len(run.graphs) < 4
    assert any(graph is not None for graph in run.graphs.values())


def test_a_recording_that_fails_is_ended(device, monkeypatch):
    problem = net(9)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    args = arguments(device, problem)
    run(Arguments(*args, False, None))
    device.lt.statuses["cublasLtMatmul"] = 13
    for _ in range(2):
        with pytest.raises(RuntimeError, match="STATUS_13"):
            run(Arguments(*args, False, None))
        assert device.recording is None
        assert device.current == 0
    device.lt.statuses.clear()
    for _ in range(2):
        assert_right(run(Arguments(*args, False, None)), problem, 1e-5)
    assert all(graph is not None for graph in run.graphs.values())


def test_a_call_that_fails_is_not_noted(device):
    problem = net(9)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    device.lt.statuses["cublasLtMatmul"] = 13
    with pytest.raises(RuntimeError, match="STATUS_13"):
        run(Arguments(*arguments(device, problem), False, None))
    assert not run.graphs


def test_a_dropped_plan_is_freed_at_once(device):
    problem = net(9)
    run = cuda_layers.prepare(specification(problem), 9, "float32")
    args = arguments(device, problem)
    for _ in range(3):
        run(Arguments(*args, True, None))
    gone = weakref.ref(run)
    del run
    assert gone() is None
    assert len(device.live) == 8  # the arguments


def test_products_are_planned_once_per_shape(device):
    problem = net(CHUNK + SLAB + 7, sizes=(3, 4, 2), dtype=np.float64)
    run = cuda_layers.prepare(specification(problem, np.float64), CHUNK + SLAB + 7, "float32")
    run(Arguments(*arguments(device, problem), False, None))
    planned = len(device.lt.heuristics)
    assert planned == 2 * (2 + 2 + 1)  # two lengths: forward, gradients, and one down
    again = cuda_layers.prepare(specification(problem, np.float64), CHUNK + SLAB + 7, "float32")
    again(Arguments(*arguments(device, problem), False, None))
    assert len(device.lt.heuristics) == planned


def test_without_an_algorithm_the_net_is_not_covered(device):
    device.lt.unsupported = lambda question: True
    problem = net(5)
    assert cuda_layers.prepare(specification(problem), 5, "float32") is None


def test_a_mutant_of_the_mapping_is_caught(device, monkeypatch):
    """Operands that keep their places, as if cuBLAS stored by rows."""
    multiply = cublaslt.Product.__call__
    monkeypatch.setattr(
        cublaslt.Product, "__call__", lambda self, A, B, C, **kw: multiply(self, B, A, C, **kw)
    )
    problem = net(9, dtype=np.float64)
    run = cuda_layers.prepare(specification(problem, np.float64), 9, "float32")
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(run(Arguments(*arguments(device, problem), False, None)), problem, 1e-13)
    device.lt.errors.clear()


# On a device -------------------------------------------------------------------------------------


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
    spec = specification(problem, dtype)._replace(xp=cupy)
    out = [Layer(cupy.empty_like(W), cupy.empty_like(b)) for W, b in params]
    for most_rows, mean, to in (
        (layer_shapes.MOST_ROWS, False, None),
        (2 * SLAB, True, None),
        (2 * SLAB, True, out),
        (2 * SLAB, True, params),  # the last: nothing reads them again
    ):
        monkeypatch.setattr(layer_shapes, "MOST_ROWS", most_rows)
        run, bits = cuda_layers.prepare(spec, 1000, precision), set()
        for _ in range(1 if to is params else 4):
            result = run(Arguments(*args, mean, to))
            host = result[0].get(), [Layer(W.get(), b.get()) for W, b in result[1]]
            assert_right(host, problem, DEVICE_BOUNDS[precision], mean)
            bits.add(bits_of(host))
            del result  # its memory is the next one's
        assert to is params or None not in run.graphs.values()
        assert len(bits) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("weighted", [False, True])
def test_a_graph_reads_what_is_there_on_a_device(cupy, weighted):
    first = make_problem((40, 70, 3), 300, weighted=weighted, dtype=np.float32)
    placed = first.map(cupy.asarray)
    args = ([Layer(*layer) for layer in placed.params], placed.X, placed.y)
    weight = placed.options["sample_weight"]
    run = cuda_layers.prepare(specification(first)._replace(xp=cupy), 300, "float32")
    kept = []
    for seed in range(5):
        problem = make_problem((40, 70, 3), 300, weighted=weighted, seed=seed, dtype=np.float32)
        new = problem.map(cupy.asarray)
        change_in_place((*args, weight), new)
        kept.append((run(Arguments(*args, weight, True, None)), problem))
    for (loss, grads), problem in kept:  # each in memory of its own
        host = loss.get(), [Layer(W.get(), b.get()) for W, b in grads]
        assert_right(host, problem, 1e-5, mean=True)


@pytest.mark.gpu
def test_nan_reaches_the_loss_on_a_device(cupy):
    """Whatever the products do with relu: see cublaslt.py."""
    problem = make_problem((64, 128, 10), 300, activation="relu", dtype=np.float32)
    problem.X[7, 3] = np.nan
    placed = problem.map(cupy.asarray)
    run = cuda_layers.prepare(specification(problem)._replace(xp=cupy), 300, "tf32")
    params = [Layer(*layer) for layer in placed.params]
    loss, _ = run(Arguments(params, placed.X, placed.y, None, True, None))
    assert np.isnan(loss.get())

"""The prepared call: the bits of compute_grads for any batch that fits, and every refusal."""

import copy
import importlib
import pickle
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from numpy.testing import assert_array_equal
from oracles import LOSSES, make_problem

from mlp_backprop import Layer, backprop, compute_grads, prepare_grads
from mlp_backprop.edge import backends
from mlp_backprop.engines import choice
from mlp_backprop.engines.cuda import engine
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.types import flat


def prepare(problem, n=7, **options):
    options = problem.options | options
    del options["sample_weight"]
    return prepare_grads(problem.params, n=n, **options)


def call(grad_fn, problem, **out):
    weight = problem.options["sample_weight"]
    return grad_fn(problem.params, problem.X, problem.y, weight, **out)


def bind(grad_fn, problem, **options):
    weight = problem.options["sample_weight"]
    return grad_fn.bind(problem.params, problem.X, problem.y, weight, **options)


def run(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def first_rows(problem, n):
    weight = problem.options["sample_weight"]
    options = problem.options | {"sample_weight": None if weight is None else weight[:n]}
    return problem._replace(X=problem.X[:n, ...], y=problem.y[:n, ...], options=options)


def arrays_of(result):
    return [result.loss, *flat(result.grads)]


def assert_same_bits(got, expected, numpy=np.asarray):
    assert got._fields == expected._fields
    for A, B in zip(arrays_of(got), arrays_of(expected), strict=True):
        assert type(A) is type(B)
        assert A.dtype == B.dtype
        assert_array_equal(numpy(A), numpy(B))


# The same answers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("weighted", "reduction"), [(False, "sum"), (True, "mean")])
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_compute_grads_on_every_library(loss, weighted, reduction, backend):
    problem = make_problem(loss=loss, weighted=weighted).map(backend.array)
    got = call(prepare(problem, reduction=reduction), problem)
    assert_same_bits(got, run(problem, reduction=reduction), backend.numpy)
    assert all(type(layer) is Layer for layer in got.grads)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("n", [1, 100, 5000, 100_000])
def test_equals_compute_grads_over_many_tiles(n, dtype):
    problem = make_problem((2, 10, 5, 1), n, dtype=dtype, weighted=n > 1)
    assert_same_bits(call(prepare(problem, n), problem), run(problem))


def test_any_number_of_rows_in_any_order(backend):
    problem = make_problem(n=20, weighted=True).map(backend.array)
    grad_fn = prepare(problem, 20)
    for n in (3, 20, 2, 20, 3):
        rows = first_rows(problem, n)
        assert_same_bits(call(grad_fn, rows), run(rows), backend.numpy)


def test_no_rows_sum_to_zero(backend):
    problem = make_problem(n=0).map(backend.array)
    result = call(prepare(problem, 0, reduction="sum"), problem)
    assert_same_bits(result, run(problem, reduction="sum"), backend.numpy)
    assert backend.numpy(result.loss) == 0


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_other_parameters_of_the_same_shapes(dtype):
    grad_fn = prepare(make_problem(dtype=dtype))
    for seed in range(3):
        problem = make_problem(dtype=dtype, seed=seed)
        assert_same_bits(call(grad_fn, problem), run(problem))


def test_tuples_lists_and_integers_are_taken_as_by_compute_grads():
    problem = make_problem()
    expected = run(problem)
    grad_fn = prepare(problem)
    for params in (tuple(problem.params), [Layer(W, b) for W, b in problem.params]):
        assert_same_bits(call(grad_fn, problem._replace(params=params)), expected)
    listed = problem.map(lambda A: A.tolist())
    assert_same_bits(call(grad_fn, listed), expected)
    assert_same_bits(call(prepare(listed), listed), expected)
    whole = problem._replace(X=np.arange(21).reshape(7, 3), y=np.arange(28).reshape(7, 4))
    assert_same_bits(call(grad_fn, whole), run(whole))


def test_numpy_arrays_for_a_named_backend():
    pytest.importorskip("torch")
    problem = make_problem()
    got = call(prepare(problem, backend="torch"), problem)
    assert_same_bits(got, run(problem, backend="torch"))


# Results -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("sizes", [(2, 10, 5, 1), (70, 3, 2), (70, 2)])
@pytest.mark.parametrize("n", [5, 5000])
def test_results_stay_as_they_were(n, sizes, dtype, reduction):
    problem = make_problem(sizes, n, dtype=dtype)
    grad_fn = prepare(problem, n, reduction=reduction)
    first = call(grad_fn, problem)
    kept = [np.copy(A) for A in arrays_of(first)]
    second = call(grad_fn, make_problem(sizes, n, dtype=dtype, seed=1))
    for A, B in zip(arrays_of(first), kept, strict=True):
        assert_array_equal(A, B)
    for A, B in zip(flat(first.grads), flat(second.grads), strict=True):
        assert not np.shares_memory(A, B)


def test_results_may_be_changed():
    problem = make_problem()
    grad_fn = prepare(problem)
    expected = run(problem)
    for _ in range(2):
        got = call(grad_fn, problem)
        assert_same_bits(got, expected)
        for A in flat(got.grads):
            A[...] = np.nan


def writeable(backend):
    if backend.name == "jax":
        pytest.skip("JAX arrays cannot be written to")
    return backend


def test_out_is_written_to_and_returned(backend):
    backend = writeable(backend)
    problem = make_problem().map(backend.array)
    out = [
        tuple(backend.array(np.full(A.shape, np.nan)) for A in layer) for layer in problem.params
    ]
    result = call(prepare(problem), problem, out=out)
    for A, B in zip(flat(result.grads), flat(out), strict=True):
        assert A is B
    assert_same_bits(result, run(problem), backend.numpy)
    assert all(type(layer) is Layer for layer in result.grads)


def test_out_may_be_the_parameters(backend):
    backend = writeable(backend)
    problem = make_problem().map(backend.array)
    expected = run(problem)
    assert_same_bits(call(prepare(problem), problem, out=problem.params), expected, backend.numpy)
    for A, B in zip(flat(problem.params), flat(expected.grads), strict=True):
        assert_array_equal(backend.numpy(A), backend.numpy(B))


def test_out_may_be_views():
    problem = make_problem()
    everything = np.zeros(100)
    out, end = [], 0
    for W, b in problem.params:
        start, middle, end = end, end + W.size, end + W.size + b.size
        out.append((everything[start:middle].reshape(W.shape), everything[middle:end]))
    call(prepare(problem), problem, out=out)
    flattened = [A.ravel() for A in flat(run(problem).grads)]
    assert_array_equal(everything[:end], np.concatenate(flattened))
    assert_array_equal(everything[end:], 0)


# Bound to arrays ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_bound_call_equals_compute_grads_on_every_library(loss, weighted, backend):
    problem = make_problem(loss=loss, weighted=weighted).map(backend.array)
    bound = bind(prepare(problem), problem)
    for _ in range(2):
        assert_same_bits(bound(), run(problem), backend.numpy)


def test_a_constant_X_is_a_promise_that_every_library_takes(backend):
    problem = make_problem().map(backend.array)
    bound = bind(prepare(problem), problem, constant_X=True)
    assert_same_bits(bound(), run(problem), backend.numpy)


@pytest.mark.parametrize("constant_X", [False, True])
def test_the_promise_reaches_the_engine(monkeypatch, constant_X):
    promised = []

    def bound(params, X, y, weight, constant_X):
        promised.append(constant_X)
        return lambda: (0.0, [])

    run = choice.Pass(SimpleNamespace(bound=bound))
    monkeypatch.setattr(choice, "plan", lambda *_: run)
    bind(prepare(make_problem()), make_problem(), constant_X=constant_X)()
    assert promised == [constant_X]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["numpy", "numba"])
@pytest.mark.parametrize(("sizes", "n"), [((3, 5, 4), 7), ((2, 10, 5, 1), 100_000), ((70, 4), 30)])
def test_a_bound_call_reads_what_the_arrays_hold_by_then(sizes, n, name, reduction):
    if name == "numba":
        pytest.importorskip("numba")
    problem = make_problem(sizes, n, weighted=True, dtype=np.float32)
    options = {"backend": name, "reduction": reduction}
    bound = bind(prepare(problem, n, **options), problem)
    for seed in (1, 2):
        other = make_problem(sizes, n, weighted=True, dtype=np.float32, seed=seed)
        changed = [*flat(problem.params), problem.X, problem.y, problem.options["sample_weight"]]
        new = [*flat(other.params), other.X, other.y, other.options["sample_weight"]]
        for array, values in zip(changed, new, strict=True):
            array[...] = values
        assert_same_bits(bound(), run(other, **options))


def test_the_prepared_call_and_bound_ones_may_alternate():
    pytest.importorskip("numba")
    problems = [make_problem(seed=seed) for seed in range(3)]
    grad_fn = prepare(problems[0], backend="numba")
    calls = [
        *(bind(grad_fn, problem) for problem in problems[:2]),
        lambda: call(grad_fn, problems[2]),
    ]
    for k in (0, 1, 2, 0, 2, 1, 0):
        assert_same_bits(calls[k](), run(problems[k], backend="numba"))


def test_values_are_looked_at_in_every_bound_call():
    problem = make_problem(loss="softmax_cross_entropy", weighted=True)
    bound = bind(prepare(problem), problem)
    expected = run(problem)
    problem.y[1] = 4
    with pytest.raises(ValueError, match="class indices from 0 to 3"):
        bound()
    problem.y[1] = -1
    with pytest.raises(ValueError, match="class indices from 0 to 3"):
        bound()
    problem.y[...] = make_problem(loss="softmax_cross_entropy", weighted=True).y
    assert_same_bits(bound(), expected)
    problem.options["sample_weight"][0] = -1
    with pytest.raises(ValueError, match="weights that are not negative"):
        bound()


def test_infinities_in_a_bound_call_are_no_warnings():
    pytest.importorskip("numba")
    problem = make_problem()
    for name in ("numpy", "numba"):
        bound = bind(prepare(problem, backend=name), problem)
        problem.X[0] = np.inf
        assert np.isnan(bound().grads[0].W).any()
        problem.X[0] = 1


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_a_call_is_bound_to_arrays_not_to_the_list_of_them(name):
    if name == "numba":
        pytest.importorskip("numba")
    problem = make_problem()
    bound, expected = bind(prepare(problem, backend=name), problem), run(problem, backend=name)
    problem.params[0] = (np.zeros(1), np.zeros(1))
    assert_same_bits(bound(), expected)


def test_lists_are_read_when_they_are_bound():
    problem = make_problem().map(lambda A: A.tolist())
    bound, expected = bind(prepare(problem), problem), run(problem)
    problem.X[0][0] = 1e3
    assert_same_bits(bound(), expected)


# One caller at a time ----------------------------------------------------------------------------


@pytest.fixture(params=["numpy", "numba"])
def engine_name(request):
    """The engines with a workspace on the CPU."""
    if request.param == "numba":
        pytest.importorskip("numba")
    return request.param


def callable_as(form, grad_fn, problem):
    return bind(grad_fn, problem) if form == "bound" else lambda: call(grad_fn, problem)


@pytest.mark.parametrize("second", ["called", "bound"])
@pytest.mark.parametrize("first", ["called", "bound"])
def test_a_second_caller_is_refused(first, second, engine_name, monkeypatch):
    problem = make_problem()
    grad_fn = prepare(problem, backend=engine_name)
    first, second = (callable_as(form, grad_fn, problem) for form in (first, second))
    inside, leave = threading.Event(), threading.Event()

    def written(*arrays):
        inside.set()
        leave.wait(20)
        return divided(*arrays)

    if engine_name == "numpy":
        owner, name = backprop, "reduced"
    else:
        owner, name = (
            importlib.import_module("mlp_backprop.engines.compiled.engine").NarrowRun,
            "run",
        )
    divided = getattr(owner, name)
    monkeypatch.setattr(owner, name, written)
    with ThreadPoolExecutor(1) as caller:
        result = caller.submit(first)
        assert inside.wait(20)
        with pytest.raises(RuntimeError, match=r"one thread at a time.*prepare one for each"):
            second()
        leave.set()
        expected = run(problem, backend=engine_name)
        assert_same_bits(result.result(20), expected)
    assert_same_bits(second(), expected)


@pytest.mark.parametrize("n", [7, 50_000])
def test_callers_from_many_threads_get_right_numbers_or_an_error(n, engine_name):
    problems = [make_problem((8, 32, 32, 1), n, seed=seed) for seed in range(2)]
    grad_fn = prepare(problems[0], n, backend=engine_name)
    expected = [run(problem, backend=engine_name) for problem in problems]

    def repeat(k):
        refused = 0
        for _ in range(20):
            try:
                result = call(grad_fn, problems[k])
            except RuntimeError:
                refused += 1
            else:
                assert_same_bits(result, expected[k])
        return refused

    with ThreadPoolExecutor(2) as callers:
        assert sum(callers.map(repeat, range(2))) < 40


def test_ctrl_c_never_leaves_a_call_in_use():
    interrupts = [True, False, True, False]

    def run(*_, **__):
        if interrupts.pop(0):
            raise KeyboardInterrupt
        return "done"

    run.bound = lambda *_: run
    once = choice.Pass(run)
    for call in (once, once.bound()):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert call() == "done"


def by_pickle(grad_fn):
    return pickle.loads(pickle.dumps(grad_fn))


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, by_pickle])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_copy_has_a_workspace_of_its_own(dtype, copied, backend):
    problem = make_problem(loss="huber", dtype=dtype, weighted=True).map(backend.array)
    grad_fn = prepare(problem, reduction="sum")
    other = copied(grad_fn)
    assert other is not grad_fn
    with grad_fn._run._in_use:  # as by another thread
        got = call(other, problem)
    assert_same_bits(got, run(problem, reduction="sum"), backend.numpy)
    with pytest.raises(ValueError, match="prepared for up to 7 rows"):
        call(other, make_problem(loss="huber", dtype=dtype, n=8).map(backend.array))


@pytest.mark.parametrize("name", ["numba", "torch", "jax"])
@pytest.mark.parametrize("copied", [copy.copy, by_pickle])
def test_a_copy_is_for_the_same_backend_and_activations(copied, name):
    pytest.importorskip(name)
    activation = ["relu", "sigmoid", "tanh"]
    problem = make_problem(activation=activation)
    other = copied(prepare(problem, backend=name))
    assert_same_bits(call(other, problem), run(problem, backend=name))


def test_a_bound_call_is_not_copied():
    problem = make_problem()
    bound = bind(prepare(problem), problem)
    assert copy.copy(bound) is copy.deepcopy(bound) is bound
    with pytest.raises((AttributeError, pickle.PicklingError), match="local"):
        pickle.dumps(bound)


# Arrays changed in place -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["X", "y", "weight", "W", "b"])
@pytest.mark.parametrize("change", ["resized", "reshaped"])
def test_a_bound_call_refuses_arrays_of_another_shape(change, name, engine_name):
    problem = make_problem((4, 6, 4), n=8, weighted=True)
    bound = bind(prepare(problem, 8, backend=engine_name), problem)
    expected = [np.copy(A) for A in arrays_of(bound())]
    (W, b), weight = problem.params[0], problem.options["sample_weight"]
    array = {"X": problem.X, "y": problem.y, "weight": weight, "W": W, "b": b}[name]
    shape, values = array.shape, array.copy()
    new = (1, *shape) if array.ndim == 1 else (shape[1], shape[0])
    if change == "resized":
        array.resize((2 * shape[0], *shape[1:]), refcheck=False)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # from NumPy 2.5 on
            array.shape = new
    with pytest.raises(ValueError, match="an array was resized or reshaped after bind: bind anew"):
        bound()
    array.resize(shape, refcheck=False)
    assert_array_equal(array, values)
    for A, B in zip(arrays_of(bound()), expected, strict=True):
        assert_array_equal(A, B)


# Refused -----------------------------------------------------------------------------------------


def assert_refused(grad_fn, problem, error, message, **out):
    """Refused with the message; the next call is right again."""
    with pytest.raises(error, match=message):
        call(grad_fn, problem, **out)
    if not out:
        with pytest.raises(error, match=message):
            bind(grad_fn, problem)
    for good in (make_problem(), make_problem(weighted=True)):
        assert_same_bits(call(grad_fn, good), run(good))


@pytest.mark.parametrize("n", [-1, 1.0, "7", None, True])
def test_n_must_be_a_number_of_rows(n):
    with pytest.raises(ValueError, match=r"n must be an integer, 0 or more: .* got"):
        prepare(make_problem(), n)


@pytest.mark.parametrize(
    "options",
    [{"loss": "huge"}, {"activation": "tan"}, {"reduction": "none"}, {"backend": "tf"}],
)
def test_names_are_checked_when_preparing(options):
    with pytest.raises(ValueError, match="unknown"):
        prepare(make_problem(), **options)


@pytest.mark.parametrize(
    ("problem", "error", "message"),
    [
        (make_problem(n=8), ValueError, "prepared for up to 7 rows, X has 8"),
        (make_problem((3, 5, 2, 1)), ValueError, "prepared for numpy.* 3-5-2-4; .* 3-5-2-1"),
        (make_problem((2, 5, 2, 4)), ValueError, "prepared for .* 3-5-2-4; .* 2-5-2-4"),
        (make_problem((3, 5, 4)), ValueError, "prepared for .* 3-5-2-4; .* 3-5-4"),
        (make_problem(dtype=np.float32), ValueError, "prepared for .*float64.*; .*float32"),
        (make_problem(n=0), ValueError, "no rows"),
    ],
)
def test_another_problem(problem, error, message):
    assert_refused(prepare(make_problem()), problem, error, message)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"X": np.zeros((7, 4))}, ValueError, "X has 4 columns"),
        ({"X": np.zeros(7)}, ValueError, "X must have two dimensions"),
        ({"X": np.array(1.0)}, ValueError, "X must have two dimensions"),
        ({"X": np.zeros((7, 3), np.float32)}, TypeError, "X has dtype float32"),
        ({"X": np.zeros((7, 3), complex)}, TypeError, "X must hold real numbers"),
        ({"y": np.zeros(7)}, ValueError, "y must have shape"),
        ({"y": np.zeros((7, 1))}, ValueError, "y must have shape"),
        ({"y": np.zeros((6, 4))}, ValueError, "X has 7 rows, y has 6"),
        ({"y": np.zeros((7, 4), np.float32)}, TypeError, "y has dtype float32"),
        ({"params": []}, ValueError, "params is empty"),
        ({"params": [1.0, 2.0, 3.0]}, TypeError, "layer 1 must be a pair"),
        ({"params": None}, TypeError, "params must be a sequence"),
    ],
)
def test_arrays_that_do_not_fit(changed, error, message):
    assert_refused(prepare(make_problem()), make_problem()._replace(**changed), error, message)


def test_one_output_is_never_broadcast():
    problem = make_problem((3, 5, 1))
    with pytest.raises(ValueError, match=r"pass y\[:, None\]"):
        call(prepare(problem), problem._replace(y=problem.y[:, 0]))


@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (-np.ones(7), ValueError, "weights that are not negative"),
        (np.zeros(7), ValueError, "all zero"),
        (np.ones(6), ValueError, "sample_weight must have shape"),
        (np.ones((7, 1)), ValueError, "sample_weight must have shape"),
        (np.ones(7, np.float32), TypeError, "sample_weight has dtype float32"),
    ],
)
def test_bad_weights(weight, error, message):
    problem = make_problem()
    problem.options["sample_weight"] = weight
    assert_refused(prepare(problem), problem, error, message)


@pytest.mark.parametrize("dtype", [np.int64, np.int8, np.uint8, np.uint64])
@pytest.mark.parametrize("label", [4, 100, -1, -100])
def test_labels_out_of_range(label, dtype):
    problem = make_problem(loss="softmax_cross_entropy")
    grad_fn = prepare(problem)
    y = problem.y.astype(dtype)
    assert_same_bits(call(grad_fn, problem._replace(y=y)), run(problem))
    y[5] = np.array(label).astype(dtype)
    with pytest.raises(ValueError, match=r"class indices from 0 to 3, got .* at \[5\]"):
        call(grad_fn, problem._replace(y=y))
    assert_same_bits(call(grad_fn, problem), run(problem))


def test_labels_must_be_integers():
    problem = make_problem(loss="softmax_cross_entropy")
    with pytest.raises(TypeError, match="class indices must be integers"):
        call(prepare(problem), problem._replace(y=problem.y.astype(float)))


@pytest.mark.parametrize("form", ["called", "bound"])
@pytest.mark.parametrize("value", [-1e-9, 1.0000001, 2])
def test_probabilities_out_of_range(value, form, engine_name):
    problem = make_problem(loss="binary_cross_entropy")
    now = callable_as(form, prepare(problem, backend=engine_name), problem)
    problem.y[3, 1] = value
    with pytest.raises(ValueError, match=r"probabilities from 0 to 1, got .* at \[3, 1\]"):
        now()


@pytest.mark.parametrize("form", ["called", "bound"])
def test_negative_class_weights(form, engine_name):
    problem = make_problem(loss="softmax_cross_entropy", class_rows=True)
    now = callable_as(form, prepare(problem, backend=engine_name), problem)
    problem.y[3, 1] = -0.5
    with pytest.raises(ValueError, match=r"weights per class .*, got -0\.5 at \[3, 1\]"):
        now()


def test_another_library():
    torch = pytest.importorskip("torch")
    problem = make_problem()
    tensors = problem.map(torch.tensor)
    assert_refused(prepare(problem), tensors, ValueError, "prepared for numpy .* are torch")
    with pytest.raises(ValueError, match=r"prepared for torch .* are numpy"):
        call(prepare(tensors), problem)
    mixed = problem._replace(X=tensors.X)
    assert_refused(prepare(problem), mixed, TypeError, "X a torch array")


GOOD = make_problem().params


@pytest.mark.parametrize(
    ("out", "error", "message"),
    [
        (GOOD[:2], ValueError, "out must be a list of"),
        ([*GOOD, GOOD[0]], ValueError, "out must be a list of"),
        ([(W.T, b) for W, b in GOOD], ValueError, "out must be a list of"),
        ([(W, b[:, None]) for W, b in GOOD], ValueError, "out must be a list of"),
        ([(W.astype("f4"), b) for W, b in GOOD], ValueError, "out must be a list of"),
        ([(W.tolist(), b.tolist()) for W, b in GOOD], ValueError, "out must be a list of"),
        ([W for W, _ in GOOD], TypeError, "layer 1 .*must be a pair"),
        (GOOD[0][0], TypeError, "must be a sequence"),
    ],
)
def test_an_out_that_does_not_fit(out, error, message):
    assert_refused(prepare(make_problem()), make_problem(), error, message, out=out)


def test_an_out_that_cannot_be_written_to():
    out = [(W.copy(), b.copy()) for W, b in GOOD]
    out[1][1].flags.writeable = False
    before = [np.copy(A) for A in flat(out)]
    assert_refused(
        prepare(make_problem()), make_problem(), ValueError, "cannot be written", out=out
    )
    for A, B in zip(flat(out), before, strict=True):
        assert_array_equal(A, B)


OVERLAPS = {
    "the same array twice": (
        "W of layer 1 in out and W of layer 2",
        lambda A: [(A[0], A[3]), (A[0], A[4])],
    ),
    "a row of W for b": (
        "W of layer 1 in out and b of layer 1",
        lambda A: [(A[0], A[0][1, :]), (A[1], A[4])],
    ),
    "a part of W": (
        "b of layer 1 in out and b of layer 2",
        lambda A: [(A[0], A[2][0, :]), (A[1], A[2][0, :])],
    ),
    "by one number": (
        "b of layer 1 in out and b of layer 2",
        lambda A: [(A[0], A[5][:5]), (A[1], A[5][4:9])],
    ),
}


@pytest.mark.parametrize("container", [list, tuple])  # the short way through, and the long one
@pytest.mark.parametrize("case", OVERLAPS)
def test_an_out_of_arrays_that_overlap(case, container, backend):
    backend = writeable(backend)
    problem = make_problem((5, 5, 5)).map(backend.array)
    arrays = [backend.array(np.zeros(shape)) for shape in [(5, 5)] * 3 + [(5,)] * 2 + [(9,)]]
    message, make = OVERLAPS[case]
    grad_fn = prepare(problem)
    for _ in range(2):
        with pytest.raises(ValueError, match=f"{message} in out share memory: .* of its own"):
            call(grad_fn, problem, out=container(make(arrays)))
    assert not any(backend.numpy(A).any() for A in arrays)


# In numbers, of a W of two rows and three columns.
FOLDED = [(0, 1), (1, 0), (0, 0), (1, 1), (2, 1), (1.5, 0.5), (-2, 1)]


@pytest.mark.parametrize("container", [list, tuple])
@pytest.mark.parametrize("strides", FOLDED)
def test_an_out_whose_own_numbers_overlap(strides, container):
    problem, memory = make_problem((3, 2)), np.zeros(9)
    folded = as_strided(memory[3:], (2, 3), [int(8 * step) for step in strides])
    grad_fn = prepare(problem)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"W of layer 1 in out .* in one place: .* its own"):
            call(grad_fn, problem, out=container([(folded, np.zeros(2))]))
    with pytest.raises(ValueError, match=r"b of layer 1 in out .* in one place: .* its own"):
        call(grad_fn, problem, out=container([(np.zeros((2, 3)), as_strided(memory, (2,), (0,)))]))
    assert not memory.any()


def test_a_tensor_whose_own_numbers_overlap():
    torch = pytest.importorskip("torch")
    problem = make_problem((3, 2)).map(torch.tensor)
    memory = torch.zeros(9, dtype=torch.float64)
    out = [(memory.as_strided((2, 3), (2, 1)), torch.zeros(2, dtype=torch.float64))]
    with pytest.raises(ValueError, match=r"W of layer 1 in out .* in one place"):
        call(prepare(problem), problem, out=out)
    assert not memory.any()


@pytest.mark.parametrize("strides", [(3, 2), (-3, 2), (1, 2), (4, -1)])
def test_an_out_of_unusual_strides_is_no_overlap(strides):
    problem, memory = make_problem((3, 2)), np.zeros(16)
    W = as_strided(memory[4:], (2, 3), [8 * step for step in strides])
    assert_same_bits(call(prepare(problem), problem, out=[(W, np.zeros(2))]), run(problem))


def test_an_out_of_interleaved_views_is_no_overlap(backend):
    # As by columns of [W b]: each between the first and the last number of the other.
    backend = writeable(backend)
    problem = make_problem().map(backend.array)
    stacks = [backend.array(np.zeros((W.shape[0], W.shape[1] + 1))) for W, _ in problem.params]
    out = [(A[:, :-1], A[:, -1]) for A in stacks]
    grad_fn = prepare(problem)
    for _ in range(2):
        assert_same_bits(call(grad_fn, problem, out=out), run(problem), backend.numpy)


def test_another_out_in_the_same_list_is_looked_at_anew():
    problem = make_problem((5, 5, 5))
    grad_fn = prepare(problem)
    out = [(np.empty((5, 5)), np.empty(5)) for _ in range(2)]
    for _ in range(2):
        assert_same_bits(call(grad_fn, problem, out=out), run(problem))
    kept, out[1] = out[1], out[0]
    with pytest.raises(ValueError, match="share memory"):
        call(grad_fn, problem, out=out)
    out[1] = kept
    assert_same_bits(call(grad_fn, problem, out=out), run(problem))
    kept[0].flags.writeable = False
    with pytest.raises(ValueError, match="cannot be written"):
        call(grad_fn, problem, out=out)


def test_an_out_on_a_device_is_compared_by_its_addresses():
    class OnDevice:
        def __init__(self, array):
            self.shape, self.strides, self.itemsize = array.shape, array.strides, array.itemsize
            self.data = SimpleNamespace(ptr=array.ctypes.data)
            self.__cuda_array_interface__ = {}

    A = np.empty((4, 3), np.float32)
    for one, other in [(A, A), (A[:, 1:], A[:, 1]), (A[1], A[:2]), (A[:, :-1], A[:, -1])]:
        expected = np.shares_memory(one, other)
        assert backends.share_memory("cupy", OnDevice(one), OnDevice(other)) == expected
    for strides in FOLDED:
        folded = as_strided(A[1, :], (2, 3), [int(4 * step) for step in strides])
        assert backends.overlaps_itself("cupy", OnDevice(folded))
        assert not backends.overlaps_itself("cupy", OnDevice(A[:, 1:]))


def test_jax_arrays_cannot_be_out():
    jax = pytest.importorskip("jax")
    problem = make_problem().map(jax.numpy.array)
    with pytest.raises(ValueError, match="cannot be written to"):
        call(prepare(problem), problem, out=problem.params)
    with pytest.raises(ValueError, match="out must be a list of"):
        call(prepare(problem), problem, out=GOOD)


# On a GPU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("container", [list, tuple])  # the short way through, and the long one
def test_on_cupy_values_are_not_looked_at(monkeypatch, container, weighted):
    """Which would wait for the device. Played by NumPy; shapes are checked all the same."""
    problem = make_problem(loss="softmax_cross_entropy", weighted=weighted)
    problem = problem._replace(params=container(problem.params))
    expected = run(problem)
    monkeypatch.setattr(backends, "library_name", lambda xp: "cupy")

    def plan(spec, n, *_):
        run = engine.derivation(spec, n)

        def of_a_tier(params, X, y, weight, out=None):
            return run(Arguments(params, X, y, weight, spec.reduction == "mean", out))

        return choice.Pass(of_a_tier)

    monkeypatch.setattr(choice, "plan", plan)
    grad_fn = prepare(problem, precision="float32")
    assert call(grad_fn, problem).loss == pytest.approx(expected.loss)
    problem.y[1] = 4
    if weighted:
        problem.options["sample_weight"][0] = -1
    with pytest.raises(ValueError, match="class indices from 0 to 3"):
        run(problem)
    assert np.isnan(call(grad_fn, problem).loss)
    with pytest.raises(ValueError, match="X has 4 columns"):
        call(grad_fn, problem._replace(X=np.zeros((7, 4))))
    with pytest.raises(ValueError, match="no rows"):
        call(grad_fn, first_rows(problem, 0))

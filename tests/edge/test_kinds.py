"""Calls like one before: known again by the kinds of their arguments, and checked all the same."""

import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import make_problem

import mlp_backprop as package
from mlp_backprop import Layer, Net, compute_grads, forward, per_sample_grad_norms, prepare_grads
from mlp_backprop.edge import kinds, validation
from mlp_backprop.engines import choice, memory, numpy_tiles, threads
from mlp_backprop.types import flat

RNG = np.random.default_rng(0)
SIZES = (3, 5, 4)


def net(sizes=SIZES, dtype=np.float64):
    return [
        Layer(RNG.normal(size=(b, a)).astype(dtype), RNG.normal(size=b).astype(dtype))
        for a, b in pairwise(sizes)
    ]


PARAMS, V = net(), net()
X, Y, DY = RNG.normal(size=(7, 3)), RNG.normal(size=(7, 4)), RNG.normal(size=(7, 4, 3))
WEIGHT, LABELS = RNG.random(7), RNG.integers(4, size=7)
CLASSES = {"loss": "softmax_cross_entropy"}


def residual(X, Y, dY, lap):
    return Y, (None, None, np.ones((*Y.shape, Y.shape[1])))


def with_backend(name):
    if name == "numba":
        pytest.importorskip("numba")
    return {"backend": name}


CALLS = {
    "compute_grads": lambda p: compute_grads(p, X, Y),
    "compute_grads, weighted": lambda p: compute_grads(p, X, Y, sample_weight=WEIGHT),
    "compute_grads, labels": lambda p: compute_grads(p, X, LABELS, **CLASSES),
    "forward": lambda p: forward(p, X),
    "trace": lambda p: package.trace(p, X, Y),
    "per_sample_grads": lambda p: package.per_sample_grads(p, X, Y),
    "per_sample_grad_norms": lambda p: per_sample_grad_norms(p, X, Y),
    "clipped_grads": lambda p: package.clipped_grads(p, X, Y, max_norm=1.0),
    "jvp": lambda p: package.jvp(p, X, V),
    "vjp": lambda p: package.vjp(p, X, Y),
    "hvp": lambda p: package.hvp(p, X, Y, V),
    "ggnvp": lambda p: package.ggnvp(p, X, Y, V),
    "fisher_vp": lambda p: package.fisher_vp(p, X, Y, V),
    "hessian": lambda p: package.hessian(p, X, Y),
    "ggn": lambda p: package.ggn(p, X, Y),
    "ntk": lambda p: package.ntk(p, X, X[:2]),
    "input_grads": lambda p: package.input_grads(p, X, Y),
    "jacobian": lambda p: package.jacobian(p, X),
    "laplacian": lambda p: package.laplacian(p, X),
    "input_hessian_diag": lambda p: package.input_hessian_diag(p, X),
    "input_hessian_entries": lambda p: package.input_hessian_entries(p, X, [(0, 1)]),
    "sobolev_grads": lambda p: package.sobolev_grads(p, X, Y, DY),
    "residual_grads": lambda p: package.residual_grads(p, X, residual, activation="tanh"),
}


def arrays_of(result):
    if not isinstance(result, list | tuple):
        return [np.asarray(result)]
    return [array for part in result for array in arrays_of(part)]


def assert_same_bits(result, expected):
    got, wanted = arrays_of(result), arrays_of(expected)
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        assert_array_equal(one, other, strict=True)


def in_new_thread(function):
    """Which has seen no call."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def no_more_checks(monkeypatch):
    def checked(*_):
        raise AssertionError("checked anew")

    monkeypatch.setattr(validation, "_checked", checked)


# Known again -------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [PARAMS, [tuple(p) for p in PARAMS], Net(PARAMS)], ids=type)
@pytest.mark.parametrize("name", CALLS)
def test_what_was_right_is_not_checked_again(name, given, monkeypatch):
    if isinstance(given, Net) and "labels" in name:
        given = given._replace(loss="softmax_cross_entropy")
    if isinstance(given, Net) and name == "residual_grads":
        given = given._replace(activation="tanh")
    expected = CALLS[name](given)
    no_more_checks(monkeypatch)
    for _ in range(3):
        assert_same_bits(CALLS[name](given), expected)


@pytest.mark.parametrize("name", ["numpy", "numba", None])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_known_calls_compute_with_what_the_arrays_hold_by_then(name, dtype):
    options = with_backend(name)
    for seed in range(4):
        problem = make_problem(SIZES, 7, dtype=dtype, seed=seed, weighted=True)
        arguments = problem.params, problem.X, problem.y
        call = partial(compute_grads, *arguments, **problem.options, **options)
        assert_same_bits(call(), in_new_thread(call))
    assert len(kinds.seen.calls) == 1


@pytest.mark.parametrize("name", ["numpy", "numba"])
def test_results_are_the_callers(name):
    call = partial(compute_grads, PARAMS, X, Y, **with_backend(name))
    call()
    results = [call() for _ in range(3)]
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            for a in flat(one.grads):
                assert not any(np.shares_memory(a, b) for b in flat(other.grads))


def test_a_plan_is_made_once(monkeypatch):
    plans, right = [], choice.plan

    def plan(*args):
        plans.append(args)
        return right(*args)

    monkeypatch.setattr(choice, "plan", plan)
    for _ in range(5):
        compute_grads(PARAMS, X, Y)
    assert len(plans) == 2  # one for the call that was checked, one for all like it


def test_tiles_of_sweeps_are_made_once(monkeypatch):
    made, right = [], numpy_tiles.TiledRun.__init__

    def init(self, *args):
        made.append(args)
        right(self, *args)

    monkeypatch.setattr(numpy_tiles.TiledRun, "__init__", init)
    for _ in range(5):
        per_sample_grad_norms(PARAMS, X, Y)
    assert len(made) == 1


# Refused as ever ---------------------------------------------------------------------------------


def replaced(**changes):
    """The arguments of a good call, but for these."""
    good = {"params": PARAMS, "X": X, "y": Y, "sample_weight": WEIGHT, "activation": "tanh"}
    return good | changes


(W1, B1), (W2, B2) = PARAMS
BAD = {
    "negative weight": replaced(sample_weight=-WEIGHT),
    "all weights zero": replaced(sample_weight=0 * WEIGHT),
    "weights of another dtype": replaced(sample_weight=WEIGHT.astype(np.float32)),
    "a column of weights": replaced(sample_weight=WEIGHT[:, None]),
    "X of another dtype": replaced(X=X.astype(np.float32)),
    "X transposed": replaced(X=np.ascontiguousarray(X.T)),
    "X of one axis": replaced(X=X[:, 0]),
    "X masked": replaced(X=np.ma.masked_array(X)),
    "X of objects": replaced(X=np.full((7, 3), None)),
    "X complex": replaced(X=X + 0j),
    "X of other bytes, too wide": replaced(X=np.ones((7, 4), ">f8")),
    "y of one axis": replaced(y=Y[:, 0]),
    "y None": replaced(y=None),
    "fewer rows of y": replaced(y=Y[:6]),
    "W transposed": replaced(params=[(np.ascontiguousarray(W1.T), B1), (W2, B2)]),
    "W of another dtype": replaced(params=[(W1.astype(np.float32), B1), (W2, B2)]),
    "W of three axes": replaced(params=[(W1[None], B1), (W2, B2)]),
    "b of another length": replaced(params=[(W1, B1[:4]), (W2, B2)]),
    "layers cut elsewhere": replaced(params=[(W1, B1, W2), (B2,)]),
    "all in one list": replaced(params=[W1, B1, W2, B2]),
    "a layer that is a dict": replaced(params=[{"W": W1, "b": B1}, (W2, B2)]),
    "a layer that is a generator": replaced(params=[(A for A in (W1, B1)), (W2, B2)]),
    "no layers": replaced(params=[]),
    "unknown activation": replaced(activation="tanhh"),
    "unknown activation in a list": replaced(activation=["tanh", "tanhh"]),
    "a list in the list": replaced(activation=["tanh", ["tanh"]]),
    "an array for a name": replaced(activation=np.array("tanh")),
    "unknown loss": replaced(loss="hubert"),
    "an array for a loss": replaced(loss=np.array("huber")),
    "a list for a reduction": replaced(reduction=["mean"]),
    "unknown backend": replaced(backend="nympy"),
    "precision": replaced(precision="tf32"),
    "a Net of another loss": replaced(params=Net(PARAMS, "tanh", "huber"), loss="squared_error"),
}


def error_of(function):
    with pytest.raises((TypeError, ValueError)) as caught:
        function()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_bad_calls_are_refused_with_the_same_words_after_good_ones(case, backend, nothing_seen):
    options = with_backend(backend)
    bad = BAD[case]
    if case == "a layer that is a generator":
        bad = bad | {"params": [(A for A in (W1, B1)), (W2, B2)]}
    call = partial(compute_grads, **options | bad)
    for good in (replaced(), replaced(sample_weight=None), replaced(params=Net(PARAMS, "tanh"))):
        for _ in range(3):
            compute_grads(**options | good)
    error = error_of(call)
    nothing_seen()
    if case == "a layer that is a generator":
        assert "must be a pair (W, b), got generator" in error[1]
    assert error == error_of(call)
    assert "hashable" not in error[1]


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize(
    ("loss", "y", "bad", "message"),
    [
        ("softmax_cross_entropy", LABELS, 4, r"class indices from 0 to 3, got 4 at \[2\]"),
        ("softmax_cross_entropy", LABELS, -1, r"class indices from 0 to 3, got -1 at \[2\]"),
        ("softmax_cross_entropy", np.abs(Y), -1, r"not negative, got -1 at \[2, 0\]"),
        ("binary_cross_entropy", np.full((7, 4), 0.5), 2, r"from 0 to 1, got 2 at \[2, 0\]"),
    ],
)
def test_values_are_looked_at_every_time(loss, y, bad, message, backend, weight):
    options = {"loss": loss, "sample_weight": weight}
    y = y.copy()
    for call in (partial(compute_grads, **with_backend(backend)), per_sample_grad_norms):
        right = y.copy()
        for _ in range(3):
            expected = call(PARAMS, X, y, **options)
        y[2] = bad if y.ndim == 1 else [bad, *y[2, 1:]]
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                call(PARAMS, X, y, **options)
        y[...] = right
        assert_same_bits(call(PARAMS, X, y, **options), expected)


@pytest.mark.parametrize(
    ("v", "u"),
    [
        ([(W1, B1)], Y[:6]),
        ([(W1.astype(np.float32), B1), (W2, B2)], Y.astype(np.float32)),
        ([(W1.T, B1), (W2, B2)], Y.T),
        (None, None),
        ([(np.ma.masked_array(W1), B1), (W2, B2)], np.ma.masked_array(Y)),
    ],
)
def test_vectors_are_refused_with_the_same_words(v, u, nothing_seen):
    calls = [partial(package.hvp, PARAMS, X, Y, v), partial(package.vjp, PARAMS, X, u)]
    package.hvp(PARAMS, X, Y, V)
    package.vjp(PARAMS, X, Y)
    errors = [error_of(call) for call in calls]
    nothing_seen()
    assert errors == [error_of(call) for call in calls]
    assert not any("operands" in message for _, message in errors)  # as NumPy would say


@pytest.mark.parametrize("backend", ["numpy", "numba"])
def test_labels_are_looked_at_before_weights(backend):
    labels, weights = LABELS.copy(), WEIGHT.copy()
    labels[2], weights[3] = 4, -1
    options = CLASSES | with_backend(backend)
    for _ in range(3):
        compute_grads(PARAMS, X, LABELS, sample_weight=WEIGHT, **options)
    with pytest.raises(ValueError, match="sample_weight must hold weights that are not negative"):
        compute_grads(PARAMS, X, LABELS, sample_weight=weights, **options)
    with pytest.raises(ValueError, match="y must hold class indices from 0 to 3, got 4"):
        compute_grads(PARAMS, X, labels, sample_weight=weights, **options)


def test_a_prepared_call_refuses_layers_cut_elsewhere():
    grad_fn = prepare_grads(PARAMS, n=7)
    grad_fn(PARAMS, X, Y)
    with pytest.raises(TypeError, match="layer 1 must be a pair"):
        grad_fn([(W1, B1, W2), (B2,)], X, Y)


def test_a_prepared_call_takes_tuples_of_half_precision():
    halves = [tuple(A.astype(np.float16) for A in layer) for layer in PARAMS]
    data = X.astype(np.float16), Y.astype(np.float16)
    assert_same_bits(prepare_grads(halves, n=7)(halves, *data), compute_grads(halves, *data))


# What changes between calls ----------------------------------------------------------------------


def test_another_dtype_shape_or_name_is_another_call():
    wide, other = net((3, 9, 4)), net(dtype=np.float32)
    calls = [
        partial(compute_grads, PARAMS, X, Y),
        partial(compute_grads, PARAMS, X[:3], Y[:3]),
        partial(compute_grads, PARAMS, X, Y, activation="tanh"),
        partial(compute_grads, PARAMS, X, Y, activation=["tanh", "tanh"]),
        partial(compute_grads, PARAMS, X, Y, loss="huber"),
        partial(compute_grads, PARAMS, X, Y, reduction="sum"),
        partial(compute_grads, PARAMS, X, Y, sample_weight=WEIGHT),
        partial(compute_grads, PARAMS, X, Y, sample_weight=WEIGHT.tolist()),
        partial(compute_grads, Net(PARAMS, "relu"), X, Y),
        partial(compute_grads, Net(PARAMS, ["relu", "tanh"]), X, Y),
        partial(compute_grads, Net(PARAMS, "relu", "huber"), X, Y),
        partial(compute_grads, wide, X, Y),
        partial(compute_grads, other, X.astype(np.float32), Y.astype(np.float32)),
        partial(compute_grads, PARAMS, X.tolist(), Y),
        partial(compute_grads, tuple(PARAMS), X, Y),
        partial(compute_grads, [list(layer) for layer in PARAMS], X, Y),
        partial(compute_grads, PARAMS, X.astype(">f8"), Y),
        partial(forward, PARAMS, X),
        partial(forward, other, np.ones((7, 3), int)),
        partial(forward, other, np.ones((7, 3), bool)),
    ]
    expected = [in_new_thread(call) for call in calls]
    for _ in range(3):
        for call, result in zip(calls, expected, strict=True):
            assert_same_bits(call(), result)


@pytest.mark.parametrize("as_net", [False, True])
def test_lists_changed_in_place_are_read_anew(as_net):
    names, params = ["tanh", "identity"], [*PARAMS]
    given = Net(params, names) if as_net else params
    options = {} if as_net else {"activation": names}

    def call():
        return compute_grads(given, X, Y, **options)

    for _ in range(3):
        call()
    names[0] = "relu"
    assert_same_bits(call(), compute_grads(PARAMS, X, Y, activation=("relu", "identity")))
    params[:] = net((3, 6, 4))
    assert_same_bits(call(), compute_grads(tuple(params), X, Y, activation="relu"))
    params[0] = (params[0].W[:5], params[0].b)
    with pytest.raises(ValueError, match="b of layer 1 has length 6, its W has 5 rows"):
        call()
    params[0] = Layer(params[0][0], params[0][1][:5])
    with pytest.raises(ValueError, match="W of layer 2 has shape"):
        call()
    names[0] = "rely"
    params[:] = PARAMS
    with pytest.raises(ValueError, match="did you mean 'relu'"):
        call()


def test_the_number_of_threads_is_read_every_time(monkeypatch):
    """By what shares its tiles out among threads, for example."""
    params = net((2, 10, 5, 1))
    data = RNG.normal(size=(100_000, 2)), RNG.normal(size=(100_000, 1))
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    for _ in range(3):
        expected = compute_grads(params, *data)
    monkeypatch.setenv(threads.VARIABLE, "none")
    with pytest.raises(ValueError, match=threads.VARIABLE):
        compute_grads(params, *data)
    monkeypatch.setenv(threads.VARIABLE, "2")
    assert_same_bits(compute_grads(params, *data), expected)


# What is kept ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["numpy", "numba"])
@pytest.mark.parametrize("sizes", [(3, 5, 4), (20, 5, 4), (20, 70, 4)])
def test_no_array_of_the_callers_is_kept_alive(sizes, backend):
    problem = make_problem(sizes, 7, activation="relu", weighted=True)
    arrays = [A.copy() for A in (*flat(problem.params), problem.X, problem.y, np.ones(7))]
    watched = [weakref.ref(A) for A in arrays]
    *flat_params, X, y, weight = arrays
    params = list(zip(flat_params[::2], flat_params[1::2], strict=True))
    options = {"activation": "relu", "sample_weight": weight}
    for _ in range(3):
        compute_grads(params, X, y, **options, **with_backend(backend))
        per_sample_grad_norms(params, X, y, **options)
        package.hvp(params, X, y, params, **options)
    assert choice._kept.by_use
    del arrays, flat_params, params, X, y, weight, options
    assert [A() for A in watched] == [None] * len(watched)


def test_little_is_kept():
    for n in range(1, 3 * kinds.MOST_CALLS):
        rows = RNG.normal(size=(n, 3)), RNG.normal(size=(n, 4))
        for _ in range(2):
            compute_grads(PARAMS, *rows)
            per_sample_grad_norms(PARAMS, *rows)
        assert 0 < len(kinds.seen.calls) <= kinds.MOST_CALLS
        assert 0 < len(choice._kept.by_use) <= memory.Kept.MOST


@pytest.mark.parametrize(("sizes", "n"), [((3, 5, 4), 5000), ((200, 200, 4), 1)])
def test_no_large_workspace_is_kept(sizes, n):
    params, X, Y = net(sizes), RNG.normal(size=(n, sizes[0])), RNG.normal(size=(n, 4))
    for _ in range(3):
        compute_grads(params, X, Y)
        per_sample_grad_norms(params, X, Y)
    assert kinds.seen.calls
    assert not choice._kept.by_use


def test_threads_have_their_own():
    compute_grads(PARAMS, X, Y)
    compute_grads(PARAMS, X, Y)
    assert in_new_thread(lambda: len(kinds.seen.calls) + len(choice._kept.by_use)) == 0
    assert len(kinds.seen.calls) == len(choice._kept.by_use) == 1


def test_many_threads_at_once_get_their_own_answers():
    params = [net() for _ in range(8)]
    expected = [compute_grads(p, X, Y) for p in params]
    start = threading.Barrier(8)

    def calls(i):
        start.wait()
        return [compute_grads(params[i], X, Y) for _ in range(100)]

    with ThreadPoolExecutor(8) as pool:
        for results, right in zip(pool.map(calls, range(8)), expected, strict=True):
            for result in results:
                assert_same_bits(result, right)


@pytest.mark.parametrize("call", [compute_grads, per_sample_grad_norms])
def test_a_call_may_interrupt_one_like_it(call, monkeypatch):
    """As from a signal's handler: it has a workspace of its own."""
    other = net()
    expected, of_other = in_new_thread(lambda: (call(PARAMS, X, Y), call(other, X, Y)))
    inner, right = [], numpy_tiles.TiledRun._loss

    def interrupted(self, *args):
        if len(inner) < 1:
            inner.append(None)
            inner[0] = call(other, X, Y)
        return right(self, *args)

    for _ in range(3):
        call(PARAMS, X, Y)
    monkeypatch.setattr(numpy_tiles.TiledRun, "_loss", interrupted)
    assert_same_bits(call(PARAMS, X, Y), expected)
    assert_same_bits(inner[0], of_other)
    assert_same_bits(call(PARAMS, X, Y), expected)


@pytest.mark.parametrize("call", [compute_grads, per_sample_grad_norms])
def test_a_call_that_was_broken_off_leaves_nothing_behind(call):
    def broken(*_):
        raise KeyboardInterrupt

    for _ in range(3):
        expected = call(PARAMS, X, Y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numpy_tiles.TiledRun, "_loss", broken)
        with pytest.raises(KeyboardInterrupt):
            call(PARAMS, X, Y)
    for _ in range(3):
        assert_same_bits(call(PARAMS, X, Y), expected)

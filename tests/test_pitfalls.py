"""The known ways to get the gradient of a net wrong, one test each."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest
from oracles import assert_close, assert_grads_close, central_differences, make_problem, read_only

from mlp_backprop import check_grads, compute_grads, forward, init_params, trace

LOGIT_LOSSES = ("poisson", "binary_cross_entropy", "softmax_cross_entropy")


def call(problem, **options):
    return compute_grads(problem.params, problem.X, problem.y, **problem.options | options)


def rows(problem, part):
    """The problem of some of its samples."""
    weight = problem.options["sample_weight"]
    options = problem.options | {"sample_weight": None if weight is None else weight[part]}
    return problem._replace(X=problem.X[part], y=problem.y[part], options=options)


def combined(parts, shares):
    """Gradients of several blocks of rows, added in given shares."""
    return [
        [
            sum(s * A for s, A in zip(shares, arrays, strict=True))
            for arrays in zip(*layers, strict=True)
        ]
        for layers in zip(*(grads for _, grads in parts), strict=True)
    ]


def arrays_of(grads):
    return [A for layer in grads for A in layer]


def test_scale_with_several_outputs():
    """A mean over n d_L where the loss is a mean over n makes the gradient d_L times too small."""
    problem = make_problem(sizes=(3, 4, 5), n=7)
    loss, grads = call(problem)
    R = forward(problem.params, problem.X, activation="tanh") - problem.y
    assert_close(loss, (R**2).sum() / 7)
    assert_close(grads[1].b, 2 * R.sum(axis=0) / 7)
    check_grads(problem.params, problem.X, problem.y, activation="tanh")


def test_a_column_and_a_vector_are_not_broadcast(backend):
    """(n, 1) minus (n,) is (n, n): every target is compared with every output, silently."""
    params, X, y, _ = make_problem(sizes=(3, 4, 1)).map(backend.array)
    for function in (compute_grads, trace, check_grads):
        with pytest.raises(ValueError, match=r"pass y\[:, None\]"):
            function(params, X, y[:, 0])
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        compute_grads(params, X, y, sample_weight=y**2)


def test_weights_are_normalised_by_their_sum():
    """Divided by n, doubled weights double the gradient; all zero, they divide 0 by 0."""
    problem = make_problem(weighted=True)
    weight = problem.options["sample_weight"]
    mean, total = call(problem), call(problem, reduction="sum")
    assert_grads_close(call(problem, sample_weight=2 * weight).grads, mean.grads)
    assert_grads_close([[weight.sum() * A for A in layer] for layer in mean.grads], total.grads)
    with pytest.raises(ValueError, match="all zero"):
        call(problem, sample_weight=0 * weight)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_unequal_last_block(weighted):
    """A short last block counts as much as a full one where block means are averaged."""
    problem = make_problem(n=7, weighted=weighted)
    blocks = [rows(problem, slice(i, i + 3)) for i in (0, 3, 6)]
    sums = combined([call(block, reduction="sum") for block in blocks], [1, 1, 1])
    assert_grads_close(sums, call(problem, reduction="sum").grads)
    averaged = combined([call(block) for block in blocks], [1 / 3] * 3)
    with pytest.raises(AssertionError):
        assert_grads_close(averaged, call(problem).grads, 1e-3)


def test_a_mean_of_means():
    """Means of blocks are averaged by the weights that stand behind them, not by rows."""
    problem = make_problem(n=6, weighted=True)
    blocks = [rows(problem, slice(0, 3)), rows(problem, slice(3, 6))]
    behind = np.array([block.options["sample_weight"].sum() for block in blocks])
    means = [call(block) for block in blocks]
    assert_grads_close(combined(means, behind / behind.sum()), call(problem).grads)
    with pytest.raises(AssertionError):
        assert_grads_close(combined(means, [0.5, 0.5]), call(problem).grads, 1e-3)


def test_no_samples(backend):
    """A sum over none is zero; a mean over none is 0 / 0."""
    empty = rows(make_problem(), slice(0, 0)).map(backend.array)
    loss, grads = call(empty, reduction="sum")
    assert float(loss) == 0
    for (W, b), (V, c) in zip(grads, empty.params, strict=True):
        assert (W.shape, b.shape) == (V.shape, c.shape)
        assert not backend.numpy(W).any()
        assert not backend.numpy(b).any()
    with pytest.raises(ValueError, match="a mean over none"):
        call(empty)


def test_constants_that_float32_cannot_hold(backend):
    """1 - 1e-15 is 1 in float32: a clip of probabilities to it clips nothing, or too much."""
    W, b = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    X, y = np.array([[18.0], [-30.0]], np.float32), np.ones((2, 1), np.float32)
    params = [(backend.array(W), backend.array(b))]
    steps = trace(params, backend.array(X), backend.array(y), loss="binary_cross_entropy")
    assert_close(backend.numpy(steps.loss)[0], np.log1p(np.exp(-18.0)), 1e-6)
    assert_close(backend.numpy(steps.loss)[1], 30.0, 1e-6)
    assert_close(backend.numpy(steps.D[1])[1], [-1.0], 1e-6)


@pytest.mark.parametrize("loss", LOGIT_LOSSES)
@pytest.mark.parametrize("size", [36.0, 89.0, 700.0])
def test_extreme_logits(backend, loss, size):
    """exp overflows, and the log of a rounded 0 is -inf, though loss and gradient are finite."""
    if loss == "poisson":
        size = -size  # its loss is exp(z) itself
    Z = np.array([[size, -size / 2], [-size, size / 3]])
    Z = np.minimum(Z, 0) if loss == "poisson" else Z
    y = np.array([[0.0, 1.0], [1.0, 0.0]])
    params = [(backend.array(np.eye(2)), backend.array(np.zeros(2)))]
    steps = trace(params, backend.array(Z), backend.array(y), loss=loss)
    # Each wrong by about its logit; the gradient saturates at the target's distance.
    if loss == "softmax_cross_entropy":
        assert_close(backend.numpy(steps.loss), [1.5 * size, 4 / 3 * size])
        assert_close(backend.numpy(steps.D[1]), [[1, -1], [-1, 1]], 1e-6)
    elif loss == "binary_cross_entropy":
        assert_close(backend.numpy(steps.loss), [1.5 * size, 4 / 3 * size], 1e-6)
        assert_close(backend.numpy(steps.D[1]), [[1, -1], [-1, 1]], 1e-5)
    else:
        assert_close(backend.numpy(steps.D[1]), np.exp(Z) - y)
    assert np.isfinite(backend.numpy(steps.loss)).all()


def test_relu_at_its_kink(backend):
    """The derivative of relu at 0 is 0 by convention, also at -0, as in torch."""
    params = [
        (backend.array(np.eye(3)), backend.array(np.zeros(3))),
        (backend.array(np.ones((1, 3))), backend.array(np.zeros(1))),
    ]
    X, y = backend.array(np.array([[0.0, -0.0, 1e-300]])), backend.array(np.full((1, 1), 5.0))
    steps = trace(params, X, y, activation="relu")
    assert_close(backend.numpy(steps.D[1]), [[0.0, 0.0, -10.0]])


@pytest.mark.parametrize("name", [None, "torch", "jax"])
@pytest.mark.parametrize(
    "layout",
    [read_only, np.asfortranarray, lambda A: A[::-1].copy()[::-1], lambda A: A.repeat(2, 0)[::2]],
    ids=["read-only", "Fortran order", "negative stride", "every second row"],
)
def test_layout_of_the_arrays(layout, name):
    """Code that takes an array's memory for its rows reads the wrong numbers, or cannot write."""
    if name is not None:
        pytest.importorskip(name)
    problem = make_problem(weighted=True)
    got = call(problem.map(layout), backend=name)
    assert_grads_close(got.grads, call(problem).grads)


def test_the_callers_arrays_are_not_damaged(backend):
    """Work done in place, or on views of what was passed, changes the caller's data."""
    problem = make_problem(activation="relu", weighted=True)
    placed = problem.map(backend.array)
    call(placed)
    trace(placed.params, placed.X, placed.y, **placed.options)
    check_grads(placed.params, placed.X, placed.y, **placed.options)
    forward(placed.params, placed.X, activation="relu")
    np.testing.assert_equal(placed.map(backend.numpy), problem)


def test_integers_are_not_truncated(backend):
    """Integer inputs, or parameters, must not make integer results."""
    W, b = np.array([[1, 2]]), np.array([0])
    X, y = np.array([[1, 1], [2, 0]]), np.array([[1], [1]])
    expected = [[[2.0 * (2 * 1 + 1 * 2) / 2, 2.0 * 2 / 2]], [2.0 * (2 + 1) / 2]]
    params = [(backend.array(W), backend.array(b))]
    half = [(backend.array(W / 2), backend.array(b / 2))]
    _, grads = compute_grads(params, backend.array(X), backend.array(y))
    assert_grads_close([[backend.numpy(A) for A in grads[0]]], [expected])
    _, grads = compute_grads(half, backend.array(X), backend.array(y))
    assert_close(backend.numpy(grads[0].b), [0.5])


def test_labels_and_one_hot_rows_agree(backend):
    """Floats where indices belong, and an index past the last class, are errors, not data."""
    problem = make_problem(loss="softmax_cross_entropy").map(backend.array)
    labels = backend.numpy(problem.y)
    one_hot = problem._replace(y=backend.array(np.eye(4)[labels]))
    for got, expected in zip(
        arrays_of(call(one_hot).grads), arrays_of(call(problem).grads), strict=True
    ):
        assert_close(backend.numpy(got), backend.numpy(expected))
    with pytest.raises(TypeError, match="class indices must be integers"):
        call(problem._replace(y=backend.array(labels * 1.0)))
    for label in (4, -1):
        with pytest.raises(ValueError, match=rf"class indices from 0 to 3, got {label} at \[2\]"):
            call(problem._replace(y=backend.array(np.where(np.arange(7) == 2, label, labels))))


@pytest.mark.parametrize("order", ["C", "F"])
def test_flattened_gradients_match_flattened_parameters(order):
    """W flattened by rows and its gradient by columns pair every entry with another's."""
    problem = make_problem(sizes=(3, 4, 2))
    (W, b), *others = problem.params
    W = np.asarray(W, order=order)

    def loss(flat):
        params = [(flat.reshape(W.shape), b), *others]
        return compute_grads(params, problem.X, problem.y, **problem.options).loss

    grads = compute_grads([(W, b), *others], problem.X, problem.y, **problem.options).grads
    assert_close(grads[0].W.ravel(), central_differences(loss, W.ravel(), 1e-6), 1e-7)


def test_rows_of_a_weight_are_outputs():
    """Taken as (in, out), a square W fits as well, and every number is wrong."""
    W, b, X = np.array([[1.0, 2.0], [3.0, 4.0]]), np.array([10.0, 20.0]), np.array([[1.0, 0.0]])
    assert_close(forward([(W, b)], X), [[11.0, 23.0]])
    assert_close(
        compute_grads([(W, b)], X, np.zeros((1, 2))).grads[0].W, [[22.0, 0.0], [46.0, 0.0]]
    )
    with pytest.raises(ValueError, match=r"would fit transposed; pass W\.T"):
        forward([(np.ones((2, 3)), np.ones(3))], X)


def test_results_are_not_views_of_a_workspace(backend):
    """A buffer that is used again changes results the caller still holds."""
    first, second = (make_problem(seed=seed, weighted=True).map(backend.array) for seed in (1, 2))
    loss, grads = call(first)
    H = forward(first.params, first.X)
    held = [backend.numpy(A) for A in (loss, H, *arrays_of(grads))]
    call(second)
    forward(second.params, second.X)
    np.testing.assert_equal([backend.numpy(A) for A in (loss, H, *arrays_of(grads))], held)


def test_gelu_is_the_one_that_is_named():
    """gelu by erf and by tanh differ from the fourth digit on: the name says which it is."""
    torch = pytest.importorskip("torch")
    z = np.linspace(-3, 3, 31)[:, None]
    identity = [(np.ones((1, 1)), np.zeros(1))]
    got = forward(identity, z, activation=["gelu_tanh"])
    gelu = torch.nn.functional.gelu
    assert_close(got, gelu(torch.tensor(z), approximate="tanh").numpy())
    assert np.abs(got - gelu(torch.tensor(z)).numpy()).max() > 1e-4
    with pytest.raises(ValueError, match=r"unknown activation 'gelu'; known: .*gelu_tanh"):
        forward(identity, z, activation=["gelu"])


def test_rows_of_class_weights_that_do_not_sum_to_1(backend):
    """p - y is the gradient for rows that sum to 1; for others it is (sum of y) p - y."""
    Z, y = np.array([[0.3, -1.2, 2.0]]), np.array([[0.5, 0.0, 2.0]])
    p = np.exp(Z) / np.exp(Z).sum()
    params = [(backend.array(np.eye(3)), backend.array(np.zeros(3)))]
    steps = trace(params, backend.array(Z), backend.array(y), loss="softmax_cross_entropy")
    assert_close(backend.numpy(steps.D[1]), 2.5 * p - y)
    assert_close(backend.numpy(steps.loss), -(y * np.log(p)).sum(axis=1))


def test_dtypes_libraries_and_devices_are_not_mixed(backend):
    """A silent cast or copy loses digits, or time, and hides where the data went astray."""
    params, X, y, _ = make_problem(sizes=(3, 2)).map(backend.array)
    narrow = backend.array(backend.numpy(X).astype(np.float32))
    with pytest.raises(TypeError, match=r"X has dtype .*float32, the parameters float64"):
        compute_grads(params, narrow, y)
    if backend.name != "numpy":
        with pytest.raises(TypeError, match="pass arrays of one library"):
            compute_grads(params, X, backend.numpy(y))
    if backend.name == "torch":
        with pytest.raises(ValueError, match="y on meta: move all arrays to one device"):
            compute_grads(params, X, y.to("meta"))


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_float32_stays_float32(backend, loss):
    """A float32 array times or over one np.float64 becomes float64, and so does all behind it."""
    problem = make_problem(loss=loss, dtype=np.float32, weighted=True).map(backend.array)
    weight = [np.float64(w) for w in range(7)]
    for options in ({}, {"sample_weight": weight}, {"reduction": "sum", "sample_weight": None}):
        value, grads = call(problem, **options)
        assert all("float32" in str(A.dtype) for A in (value, *arrays_of(grads)))
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    pairs = arrays_of(steps.grads)
    assert all(
        "float32" in str(A.dtype) for A in (*steps.Z, *steps.H, *steps.D, steps.loss, *pairs)
    )


def test_two_threads_at_once(backend):
    """State shared between calls mixes their numbers when they run side by side."""
    sizes = (8, 32, 16, 4)
    problems = [make_problem(sizes, 200, seed=seed).map(backend.array) for seed in (1, 2)]
    alone = [[backend.numpy(A) for A in arrays_of(call(problem).grads)] for problem in problems]
    barrier = Barrier(2)

    def repeat(problem):
        barrier.wait()
        return [[backend.numpy(A) for A in arrays_of(call(problem).grads)] for _ in range(5)]

    with ThreadPoolExecutor(2) as pool:
        for expected, together in zip(alone, pool.map(repeat, problems), strict=True):
            for grads in together:
                np.testing.assert_equal(grads, expected)


def test_the_same_arrays_in_two_threads():
    """Threads that share parameters read them only."""
    params = init_params([8, 32, 4], rng=0)
    X, y = np.ones((100, 8)), np.ones((100, 4))
    expected = compute_grads(params, X, y)
    with ThreadPoolExecutor(2) as pool:
        for got in pool.map(lambda _: compute_grads(params, X, y), range(20)):
            np.testing.assert_equal(got, expected)

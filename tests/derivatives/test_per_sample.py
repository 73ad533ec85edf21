"""Gradients of single samples: against torch.func, JAX, complex steps, and against each other.

The formed gradients are compared with other libraries; norms and clipped sums, which never form
them, with what the formed ones give.
"""

import numpy as np
import oracles
import pytest
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    assert_close,
    assert_grads_close,
    complex_step_grads,
    make_problem,
    peak_bytes,
    problems,
)

from mlp_backprop import Layer, backprop, check_grads, compute_grads
from mlp_backprop.derivatives.per_sample import (
    clipped_grads,
    per_sample_grad_norms,
    per_sample_grads,
)
from mlp_backprop.edge import backends
from mlp_backprop.engines import choice, numpy_tiles
from mlp_backprop.engines.schedule import make_schedule
from mlp_backprop.maths import row_blocks, samples
from mlp_backprop.types import flat

SHAPES = [(3, 2), (1, 1), (2, 1, 3), (4, 1), (3, 5, 2, 4), (1, 6, 1), (5, 3, 4, 2, 3)]
FUNCTIONS = {
    "grads": per_sample_grads,
    "norms": per_sample_grad_norms,
    "clipped": lambda *args, **options: clipped_grads(
        *args, max_norm=1.0, reduction="sum", **options
    ),
}


@pytest.fixture
def small_blocks(monkeypatch):
    """A few rows in a block, and fewer in the last; so in NumPy's tiles."""

    def make(*args):
        return make_schedule(*args)._replace(tile_rows=3)

    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(numpy_tiles, "make_schedule", make)


@pytest.fixture
def derivation(monkeypatch):
    """No tiles for NumPy either."""
    monkeypatch.setattr(choice, "is_for_numpy", lambda spec: False)


def run(function, problem, **options):
    return function(problem.params, problem.X, problem.y, **problem.options | options)


def row(problem, i):
    """The problem of one sample."""
    weight = problem.options["sample_weight"]
    cut = slice(i, i + 1)
    options = problem.options | {"sample_weight": None if weight is None else weight[cut]}
    return problem._replace(X=problem.X[cut], y=problem.y[cut], options=options)


def rows_of(grads):
    """One gradient per sample, as lists of (W, b)."""
    return [[(W[i], b[i]) for W, b in grads] for i in range(len(grads[0].b))]


def norms_of(grads):
    """Norms of formed gradients, per sample and layer (n, L), in float64."""
    layers = [[np.asarray(A, float).reshape(len(A), -1) for A in layer] for layer in grads]
    return np.stack([np.linalg.norm(np.hstack(layer), axis=1) for layer in layers], axis=1)


def clipped_rows(grads, max_norm):
    """Formed gradients, each clipped."""
    norms = np.linalg.norm(norms_of(grads), axis=1)
    c = np.minimum(1, max_norm / np.where(norms == 0, 1, norms))
    return [[(c * np.asarray(A, float).T).T for A in layer] for layer in grads]


def assert_sums_of(rows, got, tolerance, divisor=1):
    """Sums of gradients, off by no more than the tolerance of what was added: sums may cancel."""
    for layer, row_layer in zip(got, rows, strict=True):
        for A, parts in zip(layer, row_layer, strict=True):
            error = np.max(np.abs(np.asarray(A, float) - parts.sum(axis=0) / divisor))
            size = np.max(np.abs(parts).sum(axis=0)) / divisor
            assert error <= tolerance * size, f"{error:.3g} off, of {size:.3g}"


def middling(problem):
    """A max_norm that clips about half of the samples."""
    return float(np.median(run(per_sample_grad_norms, problem)))


# Against other ways to the formed gradients ------------------------------------------------------


def by_torch_func(problem):
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("mlp_backprop.checks.torch_reference", exc_type=ImportError)
    params, X, y, _ = problem.map(torch.tensor)
    weight = problem.options["sample_weight"]
    weight = np.ones(len(problem.X), problem.X.dtype) if weight is None else weight

    def loss(params, x, y, w):
        options = {"names": problem.names, "loss": problem.options["loss"]}
        return w * reference.sample_losses(params, x[None], y[None], **options)[0]

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))
    return grads(params, X, y, torch.tensor(weight))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_grads_against_torch_func(activation, loss):
    for _, problem in problems(SHAPES, activation, loss):
        assert_grads_close(run(per_sample_grads, problem), by_torch_func(problem))
        single = problem.astype(np.float32)
        expected = by_torch_func(single.astype(np.float64))
        assert_grads_close(run(per_sample_grads, single), expected, 2e-5)


@pytest.mark.parametrize("loss", LOSSES)
def test_grads_against_jax(loss):
    jax = pytest.importorskip("jax")
    problem = make_problem(activation=["sigmoid", "tanh", "identity"], loss=loss)
    one_hot = problem._replace(y=np.eye(4)[problem.y]) if problem.y.ndim == 1 else problem

    def naive(params, x, y):
        single = one_hot._replace(X=x[None], y=y[None])
        return oracles.naive_loss(jax.numpy, params, single, "sum")

    params, X, y, _ = one_hot.map(jax.numpy.asarray)
    expected = jax.jit(jax.vmap(jax.grad(naive), in_axes=(None, 0, 0)))(params, X, y)
    assert_grads_close(run(per_sample_grads, problem), expected)


@pytest.mark.parametrize("class_rows", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_grads_against_complex_steps(loss, class_rows):
    problem = make_problem(
        activation=["softplus", "elu", "identity"], loss=loss, weighted=True, class_rows=class_rows
    )
    for i, got in enumerate(rows_of(run(per_sample_grads, problem))):
        assert_grads_close(got, complex_step_grads(row(problem, i), "sum"))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_check_grads_checks_a_row(activation, loss):
    problem = make_problem((2, 3, 2), 3, activation=activation, loss=loss, weighted=True)
    for i, got in enumerate(rows_of(run(per_sample_grads, problem))):
        one = row(problem, i)
        run(check_grads, one, reduction="sum", grads=got)
        wrong = [(1.001 * W, b) for W, b in got]
        if np.any(got[0][0]):
            with pytest.raises(AssertionError, match="relative error"):
                run(check_grads, one, reduction="sum", grads=wrong)


# Against each other ------------------------------------------------------------------------------


def assert_family_agrees(problem, tolerance=1e-12):
    """Sums, norms and clipped sums are those of the formed gradients."""
    grads = run(per_sample_grads, problem)
    whole = run(compute_grads, problem, reduction="sum")
    assert_sums_of(clipped_rows(grads, np.inf), whole.grads, tolerance)
    assert_close(run(per_sample_grad_norms, problem, per_layer=True), norms_of(grads), tolerance)
    norms = np.linalg.norm(norms_of(grads), axis=1)
    assert_close(run(per_sample_grad_norms, problem), norms, tolerance)
    largest = norms.max() or 1.0  # a single class has a gradient of zero
    for max_norm in (np.median(norms) or 1.0, largest / 1e3, 1e3 * largest, np.inf):
        rows = clipped_rows(grads, max_norm)
        got = run(clipped_grads, problem, max_norm=max_norm, reduction="sum")
        assert_close(got.loss, whole.loss, tolerance)
        assert_sums_of(rows, got.grads, tolerance)
        mean, weight = run(clipped_grads, problem, max_norm=max_norm), sum_of_weights(problem)
        assert_close(mean.loss, got.loss / weight, tolerance)
        assert_sums_of(rows, mean.grads, tolerance, weight)


def sum_of_weights(problem):
    weight = problem.options["sample_weight"]
    return len(problem.X) if weight is None else weight.sum()


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_family_agrees(activation, loss):
    """The formed gradients come from the derivation, all else from NumPy's tiles."""
    for _, problem in problems(SHAPES, activation, loss, n=(7, 2, 12)):
        assert_family_agrees(problem)
        assert_family_agrees(problem.astype(np.float32), 2e-5)


@pytest.mark.parametrize("n", [1, 2, 23])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_rows(loss, n, small_blocks):
    problem = make_problem(n=n, loss=loss, weighted=n > 1)
    assert_family_agrees(problem)


@pytest.mark.parametrize("n", [1, 23])
@pytest.mark.parametrize("loss", LOSSES)
def test_blocks_of_rows_by_the_derivation(loss, n, small_blocks, derivation):
    problem = make_problem((20, 5, 1, 3), n, loss=loss, weighted=n > 1)
    assert_family_agrees(problem)


@pytest.mark.parametrize("n", [1, 23])
def test_tiles_that_do_not_copy_a_wide_input(n, small_blocks):
    assert_family_agrees(make_problem((70, 5, 1), n, activation="relu"))


def test_a_block_is_swept_once(monkeypatch, derivation):
    """The clipped sum takes one forward and one backward pass."""
    calls = []

    def counted(name, function):
        return lambda *args: (calls.append(name), function(*args))[1]

    for name in ("forward", "backward"):
        monkeypatch.setattr(backprop, name, counted(name, getattr(backprop, name)))
    run(clipped_grads, make_problem(), max_norm=0.1)
    assert calls == ["forward", "backward"]


def test_every_row_is_clipped_by_its_own_norm():
    problem = make_problem(weighted=True, n=12)
    max_norm = middling(problem)
    norms = run(per_sample_grad_norms, problem)
    for i in range(12):
        got = run(clipped_grads, row(problem, i), max_norm=max_norm, reduction="sum").grads
        norm = np.sqrt(sum((A**2).sum() for A in flat(got)))
        assert_close(norm, min(norms[i], max_norm))
    assert (norms < max_norm).any()
    assert (norms > max_norm).any()


def test_weights_multiply_before_clipping():
    """A weight of 2 doubles a norm; as the same row twice, each is clipped by itself."""
    problem = make_problem(n=3)
    norms = run(per_sample_grad_norms, problem)
    doubled = run(per_sample_grad_norms, problem, sample_weight=np.full(3, 2.0))
    assert_close(doubled, 2 * norms)
    max_norm = norms.min() / 2
    once = run(clipped_grads, problem, max_norm=max_norm, reduction="sum").grads
    weighted = {"sample_weight": np.array([0.0, 2.0, 7.0])}
    got = run(clipped_grads, problem, max_norm=max_norm, reduction="sum", **weighted).grads
    last = problem._replace(X=problem.X[1:], y=problem.y[1:])
    expected = run(clipped_grads, last, max_norm=max_norm, reduction="sum").grads
    assert_grads_close(got, expected)
    with pytest.raises(AssertionError):
        assert_grads_close(got, once, 1e-3)


# Mutants -----------------------------------------------------------------------------------------


def patched(name):
    """A mutant that replaces a function of samples.py by what is made from the right one."""

    def decorate(make):
        return lambda patch: patch.setattr(samples, name, make(getattr(samples, name)))

    return decorate


def wrong_factors(change):
    """A mutant whose sweeps give other factors."""

    def make(right):
        def sweep(spec, *args):
            values, factors = right(spec, *args)
            return values, iter(change(list(factors)))

        return sweep

    return patched("sweep")(make)


@patched("squared_norms")
def bias_left_out_of_norms(right):
    return lambda spec, factors: [
        (D**2).sum(axis=1) * (H_below**2).sum(axis=1) for D, H_below in factors
    ]


@patched("squared_norms")
def norms_added(right):
    def squared_norms(spec, factors):
        squares = right(spec, factors)
        return [sum(np.sqrt(square) for square in squares) ** 2, *(0 * n for n in squares[1:])]

    return squared_norms


@patched("squared_norms")
def norms_off(right):
    return lambda spec, factors: [1.001 * n for n in right(spec, factors)]


@patched("clipped_sums")
def clipped_layer_by_layer(right):
    def clipped_sums(spec, factors, max_norm):
        return [right(spec, [pair], max_norm)[0] for pair in factors][::-1]

    return clipped_sums


@patched("clipped_sums")
def clipped_after_the_sum(right):
    def clipped_sums(spec, factors, max_norm):
        grads = right(spec, factors, np.inf)
        norm = np.sqrt(sum((A**2).sum() for A in flat(grads)))
        c = min(1, max_norm / norm)
        return [Layer(c * W, c * b) for W, b in grads]

    return clipped_sums


def clipped_by(change):
    """A mutant that sums change(D, H_below, c) of every layer, with c = max_norm / norm."""

    @patched("clipped_sums")
    def mutant(right):
        def clipped_sums(spec, factors, max_norm):
            factors = list(factors)
            norms = np.sqrt(sum(samples.squared_norms(spec, factors)))[:, None]
            c = np.where(norms > 0, max_norm / norms, 1)
            return right(spec, [change(D, H_below, c) for D, H_below in factors], np.inf)

        return clipped_sums

    return mutant


MUTANTS = {
    "bias left out of the norms": bias_left_out_of_norms,
    "norms of layers added, not their squares": norms_added,
    "squared norms wrong by 0.1 %": norms_off,
    "clipped layer by layer": clipped_layer_by_layer,
    "clipped after the sum": clipped_after_the_sum,
    "every row scaled to max_norm": clipped_by(lambda D, H, c: (c * D, H)),
    "clipped twice": clipped_by(lambda D, H, c: (np.fmin(c, 1) * D, np.fmin(c, 1) * H)),
    "layers in reverse": wrong_factors(lambda factors: factors[::-1]),
    "rows of the layer below reversed": wrong_factors(
        lambda factors: [(D, H_below[::-1]) for D, H_below in factors]
    ),
    "factors exchanged": wrong_factors(lambda factors: [(H, D) for D, H in factors]),
    "deltas wrong by 0.1 %": wrong_factors(lambda factors: [(1.001 * D, H) for D, H in factors]),
    "mean inside": wrong_factors(lambda factors: [(D / len(D), H) for D, H in factors]),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_caught(mutant, monkeypatch, nothing_seen, derivation):
    # Square layers, so that everything keeps its shape.
    problem = make_problem((3, 3, 3, 3), weighted=True)
    expected = [[np.array(A) for A in layer] for layer in run(per_sample_grads, problem)]

    def assert_right():
        assert_grads_close(run(per_sample_grads, problem), expected, 1e-4)
        assert_family_agrees(problem, 1e-4)

    assert_right()
    MUTANTS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match=" off, of "):
        assert_right()


# Libraries, dtypes and rows ----------------------------------------------------------------------


def arrays_of(result):
    """All arrays that any of the functions returns."""
    if hasattr(result, "grads"):
        return [result.loss, *flat(result.grads)]
    return flat(result) if isinstance(result, list) else [result]


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_every_library_agrees_with_numpy(loss, backend, small_blocks):
    problem = make_problem(activation="silu", loss=loss, weighted=True)
    placed = problem.map(backend.array)
    for function in (*FUNCTIONS.values(), layer_norms):
        expected, got = arrays_of(run(function, problem)), arrays_of(run(function, placed))
        for A, B in zip(got, expected, strict=True):
            assert_close(backend.numpy(A), B)


def layer_norms(*args, **options):
    return per_sample_grad_norms(*args, per_layer=True, **options)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_are_like_the_parameters(dtype, backend):
    problem = make_problem(dtype=dtype, weighted=True).map(backend.array)
    W = problem.params[0][0]
    xp = backends.namespace_of(W)
    grads, norms, clipped = (run(function, problem) for function in FUNCTIONS.values())
    assert type(grads) is list
    for layer, clipped_layer, (W, b) in zip(grads, clipped.grads, problem.params, strict=True):
        assert type(layer) is type(clipped_layer) is Layer
        assert [A.shape for A in layer] == [(7, *W.shape), (7, *b.shape)]
        assert [A.shape for A in clipped_layer] == [W.shape, b.shape]
    assert norms.shape == (7,)
    assert run(layer_norms, problem).shape == (7, 3)
    assert clipped.loss.shape == ()
    for A in (*arrays_of(grads), *arrays_of(norms), *arrays_of(clipped)):
        assert backends.namespace_of(A) is xp
        assert A.dtype == W.dtype
        assert backends.device_of(xp, A) == backends.device_of(xp, W)


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_half_precision_beyond_its_range(name):
    """Losses of 90 000, and sums of 1 000 times 100: more than the 65 504 of float16."""
    if name == "torch":
        pytest.importorskip("torch")
    params = [(np.ones((1, 1), np.float16), np.zeros(1, np.float16))]
    X, y = np.ones((1000, 1), np.float16), np.full((1000, 1), 301, np.float16)
    loss, grads = clipped_grads(params, X, y, max_norm=100.0, backend=name)
    assert float(loss) == 90_000
    assert abs(float(grads[0].b[0]) + 100 / np.sqrt(2)) < 0.1
    assert grads[0].b.dtype == params[0][1].dtype or name == "torch"


@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("numpy", "float16", 5e-3), ("torch", "bfloat16", 3e-2), ("jax", "float16", 5e-3)],
)
def test_half_precision(name, dtype, tolerance):
    """Squares and sums are formed in float32: 300² is more than float16 holds."""
    pytest.importorskip(name)
    xp = backends.namespace(name)
    problem = make_problem(n=50)
    problem = problem._replace(y=300 * problem.y)
    halved = problem.map(lambda A: xp.astype(xp.asarray(A), getattr(xp, dtype)))
    exact = halved.map(lambda A: backends.to_numpy(xp, A).astype(float))
    norms = run(per_sample_grad_norms, halved)
    assert norms.dtype == xp.float32
    assert_close(backends.to_numpy(xp, norms), run(per_sample_grad_norms, exact), tolerance)
    max_norm = middling(exact)
    got = run(clipped_grads, halved, max_norm=max_norm)
    expected = run(clipped_grads, exact, max_norm=max_norm)
    assert got.loss.dtype == xp.float32
    for layer, reference in zip(got.grads, expected.grads, strict=True):
        for A, B in zip(layer, reference, strict=True):
            assert A.dtype == getattr(xp, dtype)
            assert_close(backends.to_numpy(xp, A), B, tolerance)
    for A in flat(run(per_sample_grads, halved)):
        assert A.dtype == getattr(xp, dtype)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss, backend):
    problem = make_problem(n=0, loss=loss, weighted=True)
    placed = problem.map(backend.array)
    for layer, (W, b) in zip(run(per_sample_grads, placed), problem.params, strict=True):
        assert [A.shape for A in layer] == [(0, *W.shape), (0, *b.shape)]
    assert run(per_sample_grad_norms, placed).shape == (0,)
    assert run(layer_norms, placed).shape == (0, 3)
    got = run(clipped_grads, placed, max_norm=1, reduction="sum")
    assert backend.numpy(got.loss) == 0
    for layer, (W, b) in zip(got.grads, problem.params, strict=True):
        assert_array_equal(backend.numpy(layer.W), np.zeros_like(W))
        assert_array_equal(backend.numpy(layer.b), np.zeros_like(b))
    with pytest.raises(ValueError, match="a mean over none"):
        run(clipped_grads, placed, max_norm=1)


@pytest.mark.parametrize("place", ["X", "y"])
def test_nan_stays_in_its_row(place, backend):
    problem = make_problem(n=5)
    broken = problem._replace(**{place: getattr(problem, place).copy()})
    getattr(broken, place)[2, 0] = np.nan
    others = np.arange(5) != 2
    expected, got = run(per_sample_grads, problem), run(per_sample_grads, broken.map(backend.array))
    for A, B in zip(flat(got), flat(expected), strict=True):
        A = backend.numpy(A)
        assert_close(A[others], B[others])
        assert np.isnan(A[2]).any()
    norms = backend.numpy(run(per_sample_grad_norms, broken.map(backend.array)))
    assert_close(norms[others], run(per_sample_grad_norms, problem)[others])
    assert np.isnan(norms[2])
    # A sum shows it.
    grads = run(clipped_grads, broken.map(backend.array), max_norm=1.0).grads
    assert all(np.isnan(backend.numpy(b)).any() for _, b in grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_of_any_layout_are_read_and_never_written(name):
    problem = make_problem(weighted=True, n=6)
    expected = run(FUNCTIONS[name], problem)

    def awkward(A):
        A = np.repeat(A, 2, axis=0)[::-2][::-1] if A.ndim == 1 else np.asfortranarray(A)
        A.flags.writeable = False
        return A

    got = arrays_of(run(FUNCTIONS[name], problem.map(awkward)))
    for A, B in zip(got, arrays_of(expected), strict=True):
        assert_close(A, B, 1e-14)
        assert A.flags.c_contiguous


def test_results_are_the_callers_own():
    problem = make_problem((3, 2), activation="identity")
    kept = problem.map(np.copy)
    grads = run(per_sample_grads, problem)
    for A in flat(grads):
        A[...] = 7
    for A, B in zip(flat(problem.params), flat(kept.params), strict=True):
        assert_array_equal(A, B)
    assert_array_equal(problem.X, kept.X)
    assert not np.may_share_memory(grads[0].W, grads[0].b)


def test_tensors_that_require_grad_give_results_that_do_not():
    torch = pytest.importorskip("torch")
    leaves = make_problem().map(lambda A: torch.tensor(A, requires_grad=True))
    for function in FUNCTIONS.values():
        assert not any(A.requires_grad for A in arrays_of(run(function, leaves)))


# Values at the edges -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01), ("elu", 1.0)]
)
def test_at_a_kink_the_derivative_is_that_from_the_left(activation, slope, backend):
    problem = make_problem((2, 1, 1), 1, activation=activation)
    (W, b), last = problem.params
    problem = problem._replace(params=[(W, 0 * b), last], X=0 * problem.X)
    R = last[1] - problem.y[0]
    placed = problem.map(backend.array)
    grads = run(per_sample_grads, placed)
    assert_close(backend.numpy(grads[0].b), slope * 2 * R[None] * last[0])
    norms = backend.numpy(run(per_sample_grad_norms, placed))
    assert_close(norms, [2 * abs(R[0]) * np.hypot(1, slope * last[0][0, 0])])


def test_at_the_kink_of_the_loss_the_gradient_is_zero(backend):
    problem = make_problem((3, 2), 4, loss="absolute_error")
    y = problem.X @ problem.params[0][0].T + problem.params[0][1]
    placed = problem._replace(X=np.zeros((4, 3)), y=0 * y + problem.params[0][1])
    placed = placed.map(backend.array)
    assert not backend.numpy(run(per_sample_grad_norms, placed)).any()
    # 0 / 0 is no factor: rows of norm 0 keep theirs.
    grads = run(clipped_grads, placed, max_norm=1.0).grads
    assert all(not backend.numpy(A).any() for A in flat(grads))


@pytest.mark.parametrize("max_norm", [1e-300, 1e300, np.inf, np.float32(2.0), np.int64(3), 3])
def test_any_positive_number_is_a_max_norm(max_norm, backend):
    problem = make_problem(dtype=np.float32)
    rows = clipped_rows(run(per_sample_grads, problem.astype(np.float64)), float(max_norm))
    got = run(clipped_grads, problem.map(backend.array), max_norm=max_norm, reduction="sum")
    grads = [[backend.numpy(A) for A in layer] for layer in got.grads]
    if max_norm == 1e-300:  # 0 in float32
        assert not any(A.any() for A in flat(grads))
    else:
        assert_sums_of(rows, grads, 1e-5)


def test_norms_beyond_the_range_of_squares(backend):
    """1e25 is a float32, its square is not: the norm is inf, and the clipped row counts as 0."""
    params = [(np.ones((1, 1), np.float32), np.zeros(1, np.float32))]
    problem = oracles.Problem(
        params,
        X=np.zeros((2, 1), np.float32),
        y=np.array([[-1e25], [-1.0]], np.float32),
        options={"activation": "identity", "loss": "squared_error", "sample_weight": None},
    ).map(backend.array)
    assert_array_equal(backend.numpy(run(per_sample_grad_norms, problem)), [np.inf, 2.0])
    for max_norm, expected in ((1.0, 1.0), (np.inf, 2e25)):
        grads = run(clipped_grads, problem, max_norm=max_norm, reduction="sum").grads
        assert_close(backend.numpy(grads[0].b), [expected], 1e-6)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_norm", ["1", None, True, [1.0], np.ones(1), 1j])
def test_a_max_norm_that_is_no_number(max_norm):
    with pytest.raises(TypeError, match="max_norm must be a number, got "):
        run(clipped_grads, make_problem(), max_norm=max_norm)


@pytest.mark.parametrize("max_norm", [0, -1.0, -np.inf, np.nan, np.float32(-2)])
def test_a_max_norm_that_is_not_positive(max_norm):
    with pytest.raises(ValueError, match="max_norm must be positive"):
        run(clipped_grads, make_problem(), max_norm=max_norm)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_refused_as_by_compute_grads(name, backend):
    function = FUNCTIONS[name]
    params, X, y, options = make_problem((3, 4, 1)).map(backend.array)
    for wrong, message in (
        ({"y": y[:, 0]}, r"pass y\[:, None\]"),
        ({"X": X[:, :2]}, "X has 2 columns"),
        ({"sample_weight": y}, "sample_weight must have shape"),
        ({"loss": "squared"}, "did you mean 'squared_error'"),
        ({"activation": ["tanh"]}, "activation names 1 layers"),
        ({"loss": "binary_cross_entropy", "y": y + 2}, "probabilities from 0 to 1"),
        ({"params": params[::-1]}, "layer 2"),
    ):
        arguments = {"params": params, "X": X, "y": y, **options} | wrong
        args = [arguments.pop(name) for name in ("params", "X", "y")]
        with pytest.raises(ValueError, match=message):
            function(*args, **arguments)


def test_the_two_that_sum_nothing_take_no_reduction():
    for function in (per_sample_grads, per_sample_grad_norms):
        with pytest.raises(TypeError, match="reduction"):
            run(function, make_problem(), reduction="mean")


# Memory ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["norms", "clipped"])
def test_memory_does_not_grow_with_the_rows(name):
    """Beyond the norms themselves, it is that of one block."""
    sizes = (8, 32, 32, 1)

    def peak(n):
        problem = make_problem(sizes, n)
        kept = 8 * n if name == "norms" else 0
        return peak_bytes(lambda: run(FUNCTIONS[name], problem)) - 2 * kept

    peak(10)
    one_block = peak(60_000)
    assert peak(160_000) < 1.5 * one_block  # the last one is shorter
    formed = 60_000 * 8 * sum(A.size for A in flat(make_problem(sizes).params))
    assert one_block < min(formed / 10, 3 * row_blocks.BLOCK_BYTES)

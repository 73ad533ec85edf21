"""Compiled derivatives by inputs, and gradients through them: the derivation's answers."""

from functools import partial

import numpy as np
import oracles
import pytest
from oracles import assert_bits

pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import backprop
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.derivatives.inputs import (
    input_hessian_diag,
    input_hessian_entries,
    jacobian,
    laplacian,
)
from mlp_backprop.derivatives.residuals import residual_grads, sobolev_grads
from mlp_backprop.edge.validation import network
from mlp_backprop.engines import choice, threads
from mlp_backprop.engines.compiled import jet_grads, jets
from mlp_backprop.losses import LOSSES

TOLERANCE = {np.float64: 1e-11, np.float32: 2e-5}
SMOOTH = [name for name, row in ACTIVATIONS.items() if row.d3f is not None]
ROWS = [0, 1, 2, 7, 257, 1000]
SIZES = [
    (3, 2),
    (2, 3),
    (1, 1),
    (1, 1, 1),
    (2, 10, 5, 1),
    (7, 1, 13, 1, 6),
    (4, 5, 6, 7, 3, 2, 9),
    (8, 16, 8),
    (9, 17, 7, 8),
    (17, 8, 3),
    (3, 64, 64, 1),
]


@pytest.fixture(params=TOLERANCE)
def dtype(request):
    return request.param


def every_pair(width):
    return [(j, k) for j in range(width) for k in range(width)][-40:]


def of_outputs(width):
    """Functions of params and X alone, for so many inputs."""
    return {
        "jacobian": jacobian,
        "laplacian": laplacian,
        "laplacian of one": partial(laplacian, inputs=[width - 1]),
        "laplacian of none": partial(laplacian, inputs=[]),
        "input_hessian_diag": input_hessian_diag,
        "input_hessian_entries": partial(input_hessian_entries, pairs=every_pair(width)),
        "no entries": partial(input_hessian_entries, pairs=[]),
    }


NAMES = list(of_outputs(1))


def run(name, problem, **options):
    f = of_outputs(problem.X.shape[1])[name]
    return f(problem.params, problem.X, activation=problem.options["activation"], **options)


@pytest.fixture
def compiled(monkeypatch):
    """Call f(..., backend="numba") where the derivation is out of reach."""

    def refuse(*args):
        raise AssertionError("the derivation ran")

    def call(f, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(backprop, "forward", refuse)
            return f(*args, backend="numba", **options)

    return call


@pytest.fixture
def assert_right(compiled, dtype):
    """Compiled in dtype against the derivation in float64."""

    def check(name, problem):
        problem = problem.astype(dtype)
        got = compiled(run, name, problem)
        expected = run(name, problem.astype(np.float64))
        assert got.dtype == dtype
        oracles.assert_close(got, expected, TOLERANCE[dtype])

    return check


# Of outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation, name, assert_right):
    assert_right(name, oracles.make_problem((3, 5, 2, 4), activation=activation))
    last = ["tanh", "silu", activation]
    assert_right(name, oracles.make_problem((4, 5, 2, 3), activation=last))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", ROWS)
def test_any_number_of_rows(n, name, assert_right):
    assert_right(name, oracles.make_problem((5, 9, 6, 3), n))
    assert_right(name, oracles.make_problem((3, 9, 6, 5), n))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("sizes", SIZES)
def test_any_depth_and_widths(sizes, name, assert_right):
    assert_right(name, oracles.make_problem(sizes, 70))


@pytest.mark.parametrize("sizes", [(64, 64, 64, 1), (100, 20, 7), (7, 20, 100)])
def test_wide_jacobians(sizes, assert_right):
    assert_right("jacobian", oracles.make_problem(sizes, 300))


@pytest.mark.parametrize("n_columns", [1, 7, 8, 9, 16, 17])
def test_groups_of_directions(n_columns, assert_right, monkeypatch):
    problem = oracles.make_problem((n_columns, 6, 20), 9)
    for name in NAMES:
        assert_right(name, problem)
    monkeypatch.setattr(jets, "MOST_TANGENTS", 1)
    monkeypatch.setattr(jets, "MOST_PAIRS", 1)
    for name in NAMES:
        assert_right(name, problem)


def test_pairs_in_any_order_and_more_than_once(compiled, dtype):
    problem = oracles.make_problem((6, 5, 2), 9, dtype=dtype)
    pairs = [(5, 0), (0, 5), (2, 2), (2, 2), (1, 3), (4, 1), (3, 1)]
    f = partial(input_hessian_entries, pairs=pairs)
    got = compiled(f, problem.params, problem.X, activation="tanh")
    whole = f(problem.params, problem.X, activation="tanh")
    oracles.assert_close(got, whole, TOLERANCE[dtype])
    assert_bits(got[:, :, 2], got[:, :, 3])


@pytest.mark.parametrize("name", [name for name in NAMES if "none" not in name])  # which is 0
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_stays_in_its_row(value, name, compiled, dtype):
    problem = oracles.make_problem((3, 9, 5, 4), 300, activation="softplus", dtype=dtype)
    expected = compiled(run, name, problem)
    problem.X[7, 1] = value
    got = compiled(run, name, problem)
    others = np.arange(300) != 7
    assert_bits(got[others], expected[others])
    with np.errstate(all="ignore"):
        oracle = run(name, problem)[7]
    assert_bits(np.isfinite(got[7]), np.isfinite(oracle))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, name, compiled, dtype):
    problem = oracles.make_problem((9, 8, 10), 300, dtype=dtype)
    changed = problem.map(change)
    before = changed.X.copy()
    assert_bits(compiled(run, name, changed), compiled(run, name, problem))
    assert_bits(changed.X, before)


@pytest.mark.parametrize("name", NAMES)
def test_rows_know_nothing_of_one_another(name, compiled, dtype):
    problem = oracles.make_problem((3, 20, 8, 2), 60_000, activation="silu", dtype=dtype)
    whole = compiled(run, name, problem)
    some = problem._replace(X=problem.X[::601])
    oracles.assert_close(compiled(run, name, some), whole[::601], TOLERANCE[dtype])


def test_nets_that_are_not_covered_take_the_derivation():
    wide = oracles.make_problem((2, 260, 1))
    for name in NAMES:
        expected = run(name, wide)
        assert_bits(run(name, wide, backend="numba"), expected)


def test_without_the_backend_named_nothing_is_compiled(monkeypatch):
    problem = oracles.make_problem()
    monkeypatch.setattr(jets, "run", None)
    monkeypatch.setattr(jet_grads, "run", None)
    for name in NAMES:
        run(name, problem)
    sobolev(problem)
    residual(problem)


# Gradients through them --------------------------------------------------------------------------


def slopes(problem):
    shape = len(problem.X), len(problem.params[-1][1]), problem.X.shape[1]
    return np.random.default_rng(1).normal(size=shape).astype(problem.X.dtype)


def sobolev(problem, dy=None, **options):
    dy = slopes(problem) if dy is None else dy
    data = problem.params, problem.X, problem.y, dy
    return sobolev_grads(*data, slope_weight=0.7, **problem.options, **options)


def equation(X, Y, dY, lap):
    """Everything occurs, nonlinearly: a residual per output."""
    each = np.broadcast_to(np.eye(Y.shape[1], dtype=Y.dtype), (*Y.shape, Y.shape[1]))
    r = lap * Y + Y + np.sum(dY * dY, axis=2)
    return r, (
        each * (1 + lap)[:, :, None],
        2 * each[..., None] * dY[:, :, None],
        each * Y[:, None],
    )


def without_laplacian(X, Y, dY, lap):
    r, (r_Y, r_dY, _) = equation(X, Y, dY, 0 * lap)
    return r, (r_Y, r_dY, None)


def residual(problem, f=equation, **options):
    kept = {name: problem.options[name] for name in ("activation", "sample_weight")}
    return residual_grads(problem.params, problem.X, f, **kept, **options)


GRADS = {
    "sobolev": sobolev,
    "residual": residual,
    "without Laplacian": partial(residual, f=without_laplacian),
    "Laplacian of one": partial(residual, inputs=[0]),
    "Laplacian of none": partial(residual, inputs=[]),
}


@pytest.fixture
def assert_grads_right(compiled, dtype):
    def check(name, problem):
        problem = problem.astype(dtype)
        got = compiled(GRADS[name], problem)
        expected = GRADS[name](problem.astype(np.float64))
        assert {A.dtype for layer in got.grads for A in layer} == {np.dtype(dtype)}
        oracles.assert_result_close(got, expected, 4 * TOLERANCE[dtype])

    return check


@pytest.mark.parametrize("name", GRADS)
@pytest.mark.parametrize("activation", SMOOTH)
def test_gradients_of_every_smooth_activation(activation, name, assert_grads_right):
    for weighted in (False, True):
        problem = oracles.make_problem((3, 5, 2), activation=activation, weighted=weighted)
        assert_grads_right(name, problem)
    last = ["tanh", "silu", activation]
    assert_grads_right(name, oracles.make_problem((2, 5, 2, 3), activation=last))


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "elu"])
def test_slopes_of_activations_with_kinks(activation, assert_grads_right):
    for sizes in ((3, 5, 2), (2, 5, 3)):
        assert_grads_right("sobolev", oracles.make_problem(sizes, activation=activation))


@pytest.mark.parametrize("loss", LOSSES)
def test_slopes_beside_every_loss(loss, assert_grads_right):
    for sizes in ((4, 5, 3), (2, 5, 3)):
        assert_grads_right("sobolev", oracles.make_problem(sizes, loss=loss, weighted=True))
    if loss == "softmax_cross_entropy":
        assert_grads_right("sobolev", oracles.make_problem(loss=loss, class_rows=True))


@pytest.mark.parametrize("name", GRADS)
@pytest.mark.parametrize("n", ROWS[1:])
def test_gradients_of_any_number_of_rows(n, name, assert_grads_right):
    assert_grads_right(name, oracles.make_problem((3, 9, 6, 2), n, weighted=n > 2))


@pytest.mark.parametrize("name", GRADS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_of_any_depth_and_widths(sizes, name, assert_grads_right):
    assert_grads_right(name, oracles.make_problem(sizes, 70))


@pytest.mark.parametrize("name", GRADS)
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_gradients_with_any_strides(change, name, compiled, dtype):
    problem = oracles.make_problem((3, 8, 2), 300, dtype=dtype, weighted=True)
    expected, got = (compiled(GRADS[name], p) for p in (problem, problem.map(change)))
    assert_bits(got, expected)
    if name == "sobolev":
        assert_bits(compiled(sobolev, problem, dy=change(slopes(problem))), expected)


@pytest.mark.parametrize("name", GRADS)
def test_gradients_over_no_rows(name, compiled, dtype):
    problem = oracles.make_problem((3, 4, 2), 0, dtype=dtype)
    got = compiled(GRADS[name], problem, reduction="sum")
    assert got.loss == 0
    assert not any(np.any(A) for layer in got.grads for A in layer)


def test_float32_sums_over_many_rows_are_exact():
    problem = oracles.make_problem((2, 10, 1), 100_000, dtype=np.float32)
    expected = sobolev(problem.astype(np.float64))
    oracles.assert_result_close(sobolev(problem, backend="numba"), expected, 1e-6)


def test_more_directions_than_a_tile_has_room_for_take_the_derivation(monkeypatch):
    problem = oracles.make_problem((3, 4, 2))
    spec = network(problem.params, problem.X).spec
    assert choice.compiled_jet_grads(spec, "numba", 3) is jet_grads
    monkeypatch.setattr(jet_grads, "TILE_BYTES", 1 << 12)
    assert choice.compiled_jet_grads(spec, "numba", 3) is None
    oracles.assert_result_close(sobolev(problem, backend="numba"), sobolev(problem))


# Threads -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*NAMES, *GRADS])
def test_the_number_of_threads_changes_no_bit(name, dtype, monkeypatch):
    problem = oracles.make_problem((3, 20, 8, 2), 60_000, dtype=dtype)
    f = GRADS.get(name) or partial(run, name)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv(threads.VARIABLE, n_threads)
        results.append(f(problem, backend="numba"))
    for result in results[1:]:
        assert_bits(result, results[0])

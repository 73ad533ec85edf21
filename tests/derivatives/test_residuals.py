"""Losses of slopes and Laplacians: against torch autograd, differences, and each other."""

from functools import partial

import numpy as np
import oracles
import pytest
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    assert_close,
    assert_grads_close,
    assert_result_close,
    make_problem,
    peak_bytes,
    problems,
)

from mlp_backprop import compute_grads, forward
from mlp_backprop.activations import ACTIVATIONS as ROWS
from mlp_backprop.derivatives.inputs import input_hessian_diag, jacobian, laplacian
from mlp_backprop.derivatives.residuals import residual_grads, sobolev_grads
from mlp_backprop.edge import backends
from mlp_backprop.engines import threads
from mlp_backprop.maths import jets, row_blocks

# torch.func itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

SMOOTH = [name for name, row in ROWS.items() if row.d3f is not None]

# Fewer outputs than inputs, and more: the two ways of the slopes.
SHAPES = [(3, 2), (2, 3), (1, 1), (1, 6, 1), (3, 5, 2), (2, 4, 3, 5)]


def slopes(problem, seed=1):
    """Targets for dY/dX, in the problem's library and dtype."""
    shape = len(problem.X), problem.params[-1][1].shape[0], problem.X.shape[1]
    return np.random.default_rng(seed).normal(size=shape).astype(problem.X.dtype)


def run_sobolev(problem, dy, **options):
    return sobolev_grads(problem.params, problem.X, problem.y, dy, **problem.options | options)


def run_residual(problem, residual, **options):
    kept = {name: problem.options[name] for name in ("activation", "sample_weight")}
    return residual_grads(problem.params, problem.X, residual, **kept | options)


def nonlinear(X, Y, dY, lap):
    """Two residuals in which everything occurs, on any library; f''' and weights cannot hide."""
    xp = backends.namespace_of(X)
    ones, zeros = xp.ones_like(Y), xp.zeros_like(Y)
    slope, total = dY[:, :, 0], xp.sum(lap, axis=1)
    sine, cosine = xp.sin(X[:, :1]), Y * slope
    r = xp.stack([xp.sum(sine * Y * Y + cosine, axis=1), total * total + Y[:, 0]], axis=1)
    first = xp.concat([ones[:, :1], zeros[:, 1:]], axis=1)
    r_Y = xp.stack([2 * sine * Y + slope, first], axis=1)
    rest = xp.zeros_like(dY[:, :, 1:])
    by_slope = xp.concat([Y[:, :, None], rest], axis=2)
    r_dY = xp.stack([by_slope, xp.zeros_like(dY)], axis=1)
    r_lap = xp.stack([zeros, 2 * total[:, None] * ones], axis=1)
    return r, (r_Y, r_dY, r_lap)


def by_torch(problem, loss_of, reduction="mean"):
    """Loss and gradients; `loss_of` takes torch, X, Y, dY, Hessians and gives values (n,)."""
    torch = pytest.importorskip("torch")
    from mlp_backprop.checks import torch_reference

    leaves = [tuple(torch.tensor(A, requires_grad=True) for A in layer) for layer in problem.params]
    X = torch.tensor(problem.X)

    def outputs(x):
        return torch_reference.forward(leaves, x[None, :], problem.names)[0]

    derivatives = [outputs, torch.func.jacrev(outputs), torch.func.hessian(outputs)]
    values = loss_of(torch, X, *(torch.func.vmap(f)(X) for f in derivatives))
    weight = problem.options["sample_weight"]
    weight = torch.ones(len(X)) if weight is None else torch.tensor(weight)
    total = (weight * values).sum() / (weight.sum() if reduction == "mean" else 1)
    grads = torch.autograd.grad(total, [A for layer in leaves for A in layer], allow_unused=True)
    filled = [
        np.zeros(tuple(A.shape)) if g is None else g.numpy()
        for g, A in zip(grads, [A for layer in leaves for A in layer], strict=True)
    ]
    return total.detach().numpy(), list(zip(filled[::2], filled[1::2], strict=True))


def torch_sobolev(problem, dy, weight):
    from mlp_backprop.checks import torch_reference

    def loss_of(torch, X, Y, dY, H):
        values = torch_reference.LOSSES[problem.options["loss"]](Y, torch.tensor(problem.y))
        values = values if values.ndim == 1 else values.sum(dim=1)
        return values + weight * ((dY - torch.tensor(dy)) ** 2).sum(dim=(1, 2))

    return loss_of


def torch_residual(columns):
    def loss_of(torch, X, Y, dY, H):
        lap = sum((H[:, :, k, k] for k in columns), torch.zeros_like(Y))
        first = (torch.sin(X[:, :1]) * Y**2 + Y * dY[:, :, 0]).sum(dim=1)
        second = lap.sum(dim=1) ** 2 + Y[:, 0]
        return first**2 + second**2

    return loss_of


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sobolev_against_torch(activation, loss):
    for seed, problem in problems(SHAPES, activation, loss, n=(7, 2, 3)):
        dy, reduction = slopes(problem), ("mean", "sum")[seed % 2]
        got = run_sobolev(problem, dy, slope_weight=0.3, reduction=reduction)
        expected = by_torch(problem, torch_sobolev(problem, dy, 0.3), reduction)
        assert_result_close(got, expected, 1e-10)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("activation", SMOOTH)
def test_residual_against_torch(activation, reduction, weighted):
    for seed, sizes in enumerate(SHAPES):
        # The output layer has the activation too, every other time.
        names = [activation] * (len(sizes) - 1) if seed % 2 else activation
        problem = make_problem(sizes, activation=names, weighted=weighted, seed=seed)
        for inputs in (None, [sizes[0] - 1]):
            got = run_residual(problem, nonlinear, reduction=reduction, inputs=inputs)
            columns = range(sizes[0]) if inputs is None else inputs
            assert_result_close(got, by_torch(problem, torch_residual(columns), reduction), 1e-10)


def test_residual_against_jax():
    jax = pytest.importorskip("jax")
    problem = make_problem((2, 4, 3, 2), activation=["tanh", "gelu_tanh", "softplus"])

    def value(params):
        def outputs(x):
            for (W, b), name in zip(params, problem.names, strict=True):
                x = ACTIVATIONS[name](jax.numpy, W @ x + b)
            return x

        X = jax.numpy.asarray(problem.X)
        Y, dY, H = (jax.vmap(f)(X) for f in (outputs, jax.jacfwd(outputs), jax.hessian(outputs)))
        r, _ = nonlinear(X, Y, dY, jax.numpy.trace(H, axis1=2, axis2=3))
        return (r**2).sum(axis=1).mean()

    params = [tuple(map(jax.numpy.asarray, layer)) for layer in problem.params]
    assert_result_close(
        run_residual(problem, nonlinear), jax.jit(jax.value_and_grad(value))(params), 1e-10
    )


@pytest.mark.parametrize("activation", SMOOTH)
def test_against_differences(activation):
    problem = make_problem((2, 3, 2), 3, activation=activation, weighted=True)
    dy = slopes(problem)
    for run in (partial(run_sobolev, dy=dy), partial(run_residual, residual=nonlinear)):
        grads = run(problem).grads
        for l, which in np.ndindex(2, 2):

            def loss(A, l=l, which=which, run=run):
                params = [list(layer) for layer in problem.params]
                params[l][which] = A
                return run(problem._replace(params=params)).loss

            expected = oracles.central_differences(loss, problem.params[l][which], 1e-5)
            assert_close(grads[l][which], expected, 1e-7)


def test_the_losses_are_those_of_the_derivatives():
    problem = make_problem(activation="silu")
    args, options = (problem.params, problem.X), {"activation": "silu"}
    dy = slopes(problem)
    plain = compute_grads(*args, problem.y, **options).loss
    error = ((jacobian(*args, **options) - dy) ** 2).sum() / 7
    assert_close(run_sobolev(problem, dy, slope_weight=2.0).loss, plain + 2 * error, 1e-14)

    def kept(*given):
        for array, expected in zip(given, expected_arguments, strict=True):
            assert_close(array, expected, 1e-14)
        return nonlinear(*given)

    D = input_hessian_diag(*args, **options)
    expected_arguments = (
        problem.X,
        forward(*args, **options),
        jacobian(*args, **options),
        D[:, :, 0] + D[:, :, 2],
    )
    r, _ = nonlinear(*expected_arguments)
    got = run_residual(problem, kept, inputs=[0, 2], reduction="sum")
    assert_close(got.loss, (r**2).sum(), 1e-14)


# Invariants --------------------------------------------------------------------------------------


def test_without_weight_sobolev_is_the_loss_alone():
    problem = make_problem(weighted=True, loss="poisson")
    expected = compute_grads(problem.params, problem.X, problem.y, **problem.options)
    assert_result_close(run_sobolev(problem, slopes(problem), slope_weight=0), expected, 1e-13)


def test_the_targets_themselves_leave_the_loss_alone():
    problem = make_problem((3, 4, 2))
    J = jacobian(problem.params, problem.X, activation="tanh")
    expected = compute_grads(problem.params, problem.X, problem.y, **problem.options)
    assert_result_close(run_sobolev(problem, J), expected, 1e-13)


@pytest.mark.parametrize("sizes", [(3, 5, 2), (2, 4, 3)])
def test_residuals_can_say_what_sobolev_says(sizes):
    problem = make_problem(sizes, weighted=True)
    dy = slopes(problem)
    n, n_out, n_in = dy.shape
    m = n_out * n_in

    def misfit(X, Y, dY, lap):
        values = np.concatenate([Y - problem.y, np.reshape(dY - dy, (n, m))], axis=1)
        r_Y = np.concatenate([np.eye(n_out), np.zeros((m, n_out))])
        r_dY = np.concatenate([np.zeros((n_out, m)), np.eye(m)]).reshape(-1, n_out, n_in)
        spread = [np.broadcast_to(A, (n, *A.shape)) for A in (r_Y, r_dY)]
        return values, (*spread, None)

    assert_result_close(run_residual(problem, misfit), run_sobolev(problem, dy), 1e-13)


def test_the_way_with_fewer_tangents_is_taken(monkeypatch):
    right, widths = jets.grad_sums, []

    def grad_sums(spec, params, Z, H, tape, *arrays):
        widths.append(tape[0].Ht.shape[0])
        return right(spec, params, Z, H, tape, *arrays)

    monkeypatch.setattr(jets, "grad_sums", grad_sums)
    for sizes in ((5, 4, 2), (2, 4, 5), (3, 3)):
        problem = make_problem(sizes)
        run_sobolev(problem, slopes(problem))
    assert widths == [2, 2, 3]


def test_nothing_stands_for_zeros():
    problem = make_problem((2, 4, 3))

    def zeroed(which, value):
        def residual(X, Y, dY, lap):
            r, partials = nonlinear(X, Y, dY, lap)
            return r, [value(p) if i in which else p for i, p in enumerate(partials)]

        return residual

    for which in ({0}, {1}, {2}, {0, 1, 2}):
        got = run_residual(problem, zeroed(which, lambda p: None))
        expected = run_residual(problem, zeroed(which, np.zeros_like))
        assert_close(got.loss, expected.loss, 1e-14)
        assert_grads_close(got.grads, expected.grads, 1e-13)


def test_weight_two_equals_the_row_twice():
    problem = make_problem()
    counts = np.array([1, 2, 0, 3, 1, 1, 2])
    dy = slopes(problem)
    repeated = problem._replace(
        X=np.repeat(problem.X, counts, 0), y=np.repeat(problem.y, counts, 0)
    )
    options = {"sample_weight": counts.astype(float)}
    got = run_sobolev(problem, dy, **options)
    assert_result_close(got, run_sobolev(repeated, np.repeat(dy, counts, 0)), 1e-13)
    got = run_residual(problem, nonlinear, **options)
    assert_result_close(got, run_residual(repeated, nonlinear), 1e-13)


@pytest.mark.parametrize("rows_per_block", [1, 3])
@pytest.mark.parametrize("sizes", [(3, 5, 2), (2, 4, 3)])
def test_blocks_add_up(sizes, rows_per_block, monkeypatch):
    problem = make_problem(sizes, weighted=True)
    dy = slopes(problem)
    calls = []

    def counted(*arguments):
        calls.append(len(arguments[0]))
        return nonlinear(*arguments)

    expected = run_sobolev(problem, dy), run_residual(problem, counted)
    numbers = 8 * sum(sizes)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", rows_per_block * (2 + 2 * min(sizes)) * numbers)
    assert_result_close(run_sobolev(problem, dy), expected[0], 1e-13)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", rows_per_block * (4 + 2 * sizes[0]) * numbers)
    assert_result_close(run_residual(problem, counted), expected[1], 1e-13)
    assert calls == [7, 7]  # once, whatever the blocks


# Libraries and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [(3, 5, 2), (2, 4, 3)])
def test_every_library_agrees_with_numpy(sizes, backend):
    problem = make_problem(sizes, activation="gelu_tanh", weighted=True)
    dy = slopes(problem)
    placed = problem.map(backend.array)
    results = [
        (run_sobolev(placed, backend.array(dy)), run_sobolev(problem, dy)),
        (run_residual(placed, nonlinear), run_residual(problem, nonlinear)),
        (run_residual(placed, nonlinear, inputs=[1]), run_residual(problem, nonlinear, inputs=[1])),
    ]
    for got, expected in results:
        grads = [map(backend.numpy, layer) for layer in got.grads]
        assert_result_close((backend.numpy(got.loss), grads), expected, 1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_are_like_the_parameters(dtype, backend):
    problem = make_problem((2, 4, 3), dtype=dtype, weighted=True)
    dy = backend.array(slopes(problem))
    placed = problem.map(backend.array)
    for result in (run_sobolev(placed, dy), run_residual(placed, nonlinear)):
        assert result._fields == ("loss", "grads")
        assert result.loss.shape == ()
        assert result.loss.dtype == placed.X.dtype
        for grad, layer in zip(result.grads, placed.params, strict=True):
            for A, B in zip(grad, layer, strict=True):
                assert type(A) is type(B)
                assert (A.shape, A.dtype) == (B.shape, B.dtype)


@pytest.mark.parametrize("activation", SMOOTH)
def test_float32_is_near_float64(activation):
    problem = make_problem((2, 4, 3), activation=activation, dtype=np.float32)
    dy, wide = slopes(problem), problem.astype(np.float64)
    expected = run_sobolev(wide, dy.astype(np.float64))
    assert_result_close(run_sobolev(problem, dy), expected, 1e-5)
    expected = run_residual(wide, nonlinear)
    assert_result_close(run_residual(problem, nonlinear), expected, 2e-5)


def test_half_precision_sums_in_float32():
    # Sums of 20 000 leave the range of float16, 65 504.
    problem = make_problem((2, 4, 3), 20_000, dtype=np.float16)
    dy, wide = slopes(problem) + np.float16(16), problem.astype(np.float64)
    got, expected = run_sobolev(problem, dy), run_sobolev(wide, dy.astype(float))
    assert got.loss.dtype == np.float32
    assert got.grads[0].W.dtype == np.float16
    assert_result_close(got, expected, 1e-2)
    expected = run_residual(wide, nonlinear)
    assert_result_close(run_residual(problem, nonlinear), expected, 2e-2)


def test_a_named_backend_takes_numpy_arrays():
    torch = pytest.importorskip("torch")
    problem = make_problem((2, 4, 3), weighted=True)
    dy = slopes(problem)
    got = run_sobolev(problem, dy, backend="torch")
    assert isinstance(got.loss, torch.Tensor)
    assert_result_close(got, run_sobolev(problem, dy), 1e-10)
    got = run_residual(problem, nonlinear, backend="torch")  # called with tensors
    assert_result_close(got, run_residual(problem, nonlinear), 1e-10)


def test_lists_do():
    params = [([[2.0]], [1.0])]
    result = sobolev_grads(params, [[3]], [[5]], [[[1]]], slope_weight=2)
    assert float(result.loss) == 4 + 2
    assert_grads_close(result.grads, [(np.array([[4.0 * 3 + 4]]), np.array([4.0]))])


# Edges -------------------------------------------------------------------------------------------


def test_no_rows_give_a_sum_of_zero(backend):
    problem = make_problem((2, 4, 3), n=0)
    dy = backend.array(slopes(problem))
    placed = problem.map(backend.array)
    results = (
        run_sobolev(placed, dy, reduction="sum"),
        run_residual(placed, nonlinear, reduction="sum"),
    )
    for result in results:
        assert backend.numpy(result.loss) == 0
        for grad, layer in zip(result.grads, problem.params, strict=True):
            for A, B in zip(grad, layer, strict=True):
                assert_array_equal(backend.numpy(A), np.zeros_like(B))


def test_no_array_of_the_caller_is_written_to():
    problem = make_problem((2, 4, 3), weighted=True)
    dy = slopes(problem)

    def awkward(A):
        A = np.repeat(np.asfortranarray(A[::-1]), 2, axis=0)[::-2]
        A.flags.writeable = False
        return A

    got = run_sobolev(problem.map(awkward), awkward(dy))
    assert_result_close(got, run_sobolev(problem, dy), 1e-13)
    got = run_residual(problem.map(awkward), nonlinear)
    assert_result_close(got, run_residual(problem, nonlinear), 1e-13)


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu"])
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_slopes_at_a_kink_take_the_value_from_the_left(name, sizes):
    # One layer at z = 0: Y = 0, dY/dX = f'(0) W, and f''(0) is only elu's.
    W, b, X = np.ones(sizes[::-1]), np.zeros(sizes[1]), np.zeros((1, sizes[0]))
    slope, second = {"relu": (0, 0), "leaky_relu": (0.01, 0), "elu": (1, 1)}[name]
    problem = oracles.Problem(
        [(W, b)], X, np.zeros((1, sizes[1])), {"activation": [name], "sample_weight": None}
    )
    got = run_sobolev(problem, np.zeros((1, *W.shape)))
    assert_close(got.loss, 2 * slope**2)
    expected = 2 * slope * slope * W, 2 * slope * second * (W * W).sum(axis=1)
    assert_array_equal(got.grads[0].W, expected[0])
    assert_array_equal(got.grads[0].b, expected[1])


def test_overflow_is_silent_but_for_the_residuals_own():
    problem = make_problem((2, 4, 3))
    X = problem.X.copy()
    X[2, 0] = np.inf
    spoilt = problem._replace(X=X)
    assert np.isnan(run_sobolev(spoilt, slopes(problem)).grads[0].W).any()
    with np.errstate(all="ignore"):
        assert np.isnan(run_residual(spoilt, nonlinear).loss)
    with pytest.raises(RuntimeWarning, match="invalid value"):
        run_residual(spoilt, nonlinear)  # sin(inf)


def test_memory_is_that_of_a_block(monkeypatch):
    n = 8_000
    monkeypatch.setenv(threads.VARIABLE, "1")  # each has one
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", row_blocks.BLOCK_BYTES // 5)
    problem = make_problem((3, 64, 64, 1), n)
    dy = slopes(problem)

    def oscillator(X, Y, dY, lap):
        one = np.ones((n, 1, 1))
        return lap + Y, (one, None, one)

    for run in (partial(run_sobolev, dy=dy), partial(run_residual, residual=oscillator)):
        peak = peak_bytes(lambda run=run: run(problem))
        assert peak < 30 * 8 * n + 4 * row_blocks.BLOCK_BYTES < 2 * 64 * 8 * n


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "elu"])
def test_activations_with_a_kink_are_refused(name):
    problem = make_problem((2, 4, 3), activation=["tanh", name])
    with pytest.raises(ValueError, match=f"'{name}' has a kink, .* choose one of identity, sig"):
        run_residual(problem, nonlinear)


@pytest.mark.parametrize(
    ("weight", "error"),
    [(-1.0, ValueError), (np.nan, ValueError), (np.inf, ValueError), ("1", TypeError)],
)
def test_a_bad_weight_is_refused(weight, error):
    problem = make_problem()
    with pytest.raises(error, match="slope_weight must be"):
        run_sobolev(problem, slopes(problem), slope_weight=weight)


def test_bad_slopes_are_refused():
    problem = make_problem()
    dy = slopes(problem)
    with pytest.raises(ValueError, match=r"dy must have shape \(7, 4, 3\), got \(7, 3, 4\)"):
        run_sobolev(problem, np.swapaxes(dy, 1, 2))
    with pytest.raises(ValueError, match=r"dy must have shape \(7, 4, 3\), got \(7, 12\)"):
        run_sobolev(problem, dy.reshape(7, 12))
    with pytest.raises(TypeError, match="dy has dtype float32"):
        run_sobolev(problem, dy.astype(np.float32))
    with pytest.raises(TypeError, match="X is a numpy array, dy a torch array"):
        run_sobolev(problem, pytest.importorskip("torch").tensor(dy))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda r, p: r, TypeError, r"must return \(r, \(r_Y, r_dY, r_lap\)\), got numpy.ndarray"),
        (lambda r, p: (r, p[:2]), TypeError, "must return .* got tuple"),
        (lambda r, p: (r, None), TypeError, "must return .* got tuple"),
        (lambda r, p: (r[:, 0], p), ValueError, r"r of the residual must have shape \(7, m\)"),
        (lambda r, p: (r[:3], p), ValueError, r"r of the residual must have shape \(7, m\)"),
        (lambda r, p: (r, (p[0][:, 0], *p[1:])), ValueError, r"r_Y must have shape \(7, 2, 4\)"),
        (lambda r, p: (r, (p[0], p[0], p[2])), ValueError, r"r_dY must have shape \(7, 2, 4, 3\)"),
        (lambda r, p: (r, (*p[:2], p[2][:1])), ValueError, r"r_lap must have shape \(7, 2, 4\)"),
        (lambda r, p: (r.astype("f4"), p), TypeError, "r has dtype float32"),
    ],
)
def test_what_a_residual_may_not_return(change, error, message):
    def residual(*arguments):
        return change(*nonlinear(*arguments))

    with pytest.raises(error, match=message):
        run_residual(make_problem(), residual)


def test_bad_arguments_are_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match="X has no column 3"):
        run_residual(problem, nonlinear, inputs=[3])
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        run_residual(problem, nonlinear, sample_weight=np.ones(3))
    with pytest.raises(ValueError, match="unknown reduction"):
        run_residual(problem, nonlinear, reduction="median")
    with pytest.raises(ValueError, match="a mean over none"):
        run_residual(make_problem(n=0), nonlinear)
    with pytest.raises(TypeError, match="residual must be a function, got str"):
        run_residual(problem, "y'' + y")


# Mutants -----------------------------------------------------------------------------------------


def wrong_row(monkeypatch, part):
    row = ROWS["tanh"]
    right = getattr(row, part)
    wrong = row._replace(**{part: lambda xp, Z, H: 1.001 * right(xp, Z, H)})
    monkeypatch.setitem(ROWS, "tanh", wrong)


def changed_argument(monkeypatch, **changes):
    """jets.grad_sums with some of its arguments changed."""
    right = jets.grad_sums

    def grad_sums(spec, params, Z, H, tape, G, Gt, Gs=None, c=None):
        given = {"tape": tape, "G": G, "Gt": Gt, "Gs": Gs, "c": c}
        given |= {name: change(given[name]) for name, change in changes.items()}
        return right(spec, params, Z, H, **given)

    monkeypatch.setattr(jets, "grad_sums", grad_sums)


def first_column_twice(monkeypatch):
    changed_argument(monkeypatch, c=lambda c: np.array([2.0, 0, 1])[:, None, None])


def directions_left_out(monkeypatch):
    right = jets.summed_product
    monkeypatch.setattr(jets, "summed_product", lambda spec, A, B: 0 * right(spec, A, B))


def broadcast_rows_not_summed(monkeypatch):
    right = jets.summed_product

    def summed_product(spec, A, B):
        is_shared = B.ndim == 3 and B.shape[1] == 1
        return right(spec, A[:, :1] if is_shared else A, B)

    monkeypatch.setattr(jets, "summed_product", summed_product)


def zeroed(part):
    return lambda tape: [
        level
        if getattr(level, part) is None
        else level._replace(**{part: 0 * getattr(level, part)})
        for level in tape
    ]


MUTANTS = {
    "f' wrong by 0.1 %": partial(wrong_row, part="df"),
    "f'' wrong by 0.1 %": partial(wrong_row, part="d2f"),
    "f''' wrong by 0.1 %": partial(wrong_row, part="d3f"),
    "no dE/dH": partial(changed_argument, G=np.zeros_like),
    "no dE/dHt": partial(changed_argument, Gt=np.zeros_like),
    "dE/dHs wrong by 0.1 %": partial(
        changed_argument, Gs=lambda Gs: None if Gs is None else 1.001 * Gs
    ),
    "no Zt in (I5) and (I6)": partial(changed_argument, tape=zeroed("Zt")),
    "no Zs in (I5)": partial(changed_argument, tape=zeroed("Zs")),
    "no Ht in (I8)": partial(changed_argument, tape=zeroed("Ht")),
    "no Hs in (I8)": partial(changed_argument, tape=zeroed("Hs")),
    "a column counted twice": first_column_twice,
    "no directions in (I8)": directions_left_out,
    "a shared direction counted once": broadcast_rows_not_summed,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch, nothing_seen):
    problem = make_problem((3, 3, 3, 3), activation=["tanh", "tanh", "tanh"], weighted=True)
    expected = by_torch(problem, torch_residual(range(3)))
    assert_result_close(run_residual(problem, nonlinear), expected, 1e-10)
    MUTANTS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match="off, of"):
        assert_result_close(run_residual(problem, nonlinear), expected, 1e-5)


# Use ---------------------------------------------------------------------------------------------


def test_laplacian_and_residual_agree_on_the_columns():
    problem = make_problem((3, 4, 1), activation="tanh")

    def harmonic(X, Y, dY, lap):
        return lap, (None, None, np.ones((7, 1, 1)))

    for inputs in (None, [0], [1, 2]):
        lap = laplacian(problem.params, problem.X, activation="tanh", inputs=inputs)
        got = run_residual(problem, harmonic, inputs=inputs, reduction="sum")
        assert_close(got.loss, (lap**2).sum(), 1e-14)

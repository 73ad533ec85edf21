"""Derivatives with respect to inputs: against torch.func, differences, and each other."""

import re
from functools import partial
from pathlib import Path

import numpy as np
import oracles
import pytest
from derivation import change_backward
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    assert_close,
    complex_steps,
    make_problem,
    naive_loss,
    peak_bytes,
)

from mlp_backprop import compute_grads, trace
from mlp_backprop.activations import ACTIVATIONS as ROWS
from mlp_backprop.derivatives.inputs import (
    input_grads,
    input_hessian_diag,
    input_hessian_entries,
    jacobian,
    laplacian,
)
from mlp_backprop.edge import backends
from mlp_backprop.engines import threads
from mlp_backprop.maths import jets, row_blocks

# torch.func itself uses what torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

# Fewer outputs than inputs, and more: the two ways of the Jacobian.
SHAPES = [(3, 2), (2, 3), (1, 1), (1, 6, 1), (3, 5, 2), (2, 4, 3, 5)]
PAIRS = [(0, 1), (1, 0), (2, 2), (0, 2)]

# Each is a function of params and X alone.
OF_OUTPUTS = {
    "jacobian": jacobian,
    "input_hessian_diag": input_hessian_diag,
    "laplacian": laplacian,
    "laplacian of some": partial(laplacian, inputs=[2, 0]),
    "input_hessian_entries": partial(input_hessian_entries, pairs=PAIRS),
}


@pytest.fixture(params=OF_OUTPUTS)
def of_outputs(request):
    return OF_OUTPUTS[request.param]


@pytest.fixture
def ragged_blocks(monkeypatch):
    """Blocks of one row, whatever a row takes."""
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)


def run(f, problem, **options):
    return f(problem.params, problem.X, activation=problem.options["activation"], **options)


def run_grads(problem, **options):
    return input_grads(problem.params, problem.X, problem.y, **problem.options | options)


def by_torch(derivative, problem):
    """torch.func.jacrev or hessian of the outputs, row by row; or both."""
    torch = pytest.importorskip("torch")
    from mlp_backprop.checks import torch_reference

    params = [tuple(map(torch.tensor, layer)) for layer in problem.params]

    def outputs(x):
        return torch_reference.forward(params, x[None, :], problem.names)[0]

    return torch.func.vmap(getattr(torch.func, derivative)(outputs))(
        torch.tensor(problem.X)
    ).numpy()


def naive_output(problem, i, o, X):
    """One output of one row, from the textbook formulas."""
    H = X[i : i + 1]
    for (W, b), name in zip(problem.params, problem.names, strict=True):
        H = ACTIVATIONS[name](np, H @ W.T + b)
    return H[0, o]


# Values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_against_torch(activation, sizes):
    # The output layer has the activation too.
    problem = make_problem(sizes, activation=[activation] * (len(sizes) - 1), seed=len(sizes))
    H = by_torch("hessian", problem)
    n_in = sizes[0]
    pairs = [(n_in - 1, 0), (0, 0), (0, n_in - 1)]
    diagonal = np.einsum("nokk->nok", H)
    assert_close(run(jacobian, problem), by_torch("jacrev", problem), 1e-12)
    assert_close(run(input_hessian_diag, problem), diagonal, 1e-12)
    assert_close(run(laplacian, problem), diagonal.sum(axis=2), 1e-12)
    assert_close(run(laplacian, problem, inputs=[n_in - 1]), diagonal[:, :, -1], 1e-12)
    entries = np.stack([H[:, :, j, k] for j, k in pairs], axis=2)
    assert_close(run(input_hessian_entries, problem, pairs=pairs), entries, 1e-12)


@pytest.mark.parametrize("sizes", SHAPES)
def test_jacobian_by_the_parameters_against_torch(sizes):
    torch = pytest.importorskip("torch")
    from mlp_backprop.checks import torch_reference

    problem = make_problem(sizes, activation="gelu_tanh")
    params = [tuple(map(torch.tensor, layer)) for layer in problem.params]

    def outputs(params, x):
        return torch_reference.forward(params, x[None, :], problem.names)[0]

    expected = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(
        params, torch.tensor(problem.X)
    )
    oracles.assert_grads_close(run(jacobian, problem, wrt="params"), expected, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_outputs_against_differences(activation):
    problem = make_problem((3, 4, 2), 2, activation=activation)
    J, H = run(jacobian, problem), run(input_hessian_diag, problem)
    for i, o in np.ndindex(2, 2):
        expected = complex_steps(partial(naive_output, problem, i, o), problem.X)
        assert_close(J[i, o], expected[i])
        for k in range(3):

            def slope(X, i=i, o=o, k=k):
                return run(jacobian, problem._replace(X=X))[i, o, k]

            changes = oracles.central_differences(slope, problem.X, 1e-5)
            assert abs(H[i, o, k] - changes[i, k]) < 1e-8


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_against_complex_steps(activation, loss, weighted, reduction):
    problem = make_problem((3, 4, 2), 3, activation=activation, loss=loss, weighted=weighted)

    def value(X):
        return naive_loss(np, problem.params, problem, reduction, X)

    expected = complex_steps(value, problem.X)
    assert_close(run_grads(problem, reduction=reduction), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_against_torch(loss):
    torch = pytest.importorskip("torch")
    from mlp_backprop.checks import torch_reference

    problem = make_problem(activation="silu", loss=loss)
    X = torch.tensor(problem.X, requires_grad=True)
    params = [tuple(map(torch.tensor, layer)) for layer in problem.params]
    values = torch_reference.sample_losses(params, X, torch.tensor(problem.y), problem.names, loss)
    values.mean().backward()
    assert_close(run_grads(problem), X.grad, 1e-12)


@pytest.mark.parametrize("class_rows", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_is_that_of_the_trace(loss, class_rows):
    problem = make_problem(loss=loss, weighted=True, class_rows=class_rows)
    D = trace(problem.params, problem.X, problem.y, **problem.options).D
    assert_close(run_grads(problem, reduction="sum"), D[0], 1e-14)


# Invariants --------------------------------------------------------------------------------------


def test_they_agree_with_each_other():
    problem = make_problem(activation="gelu_tanh")
    J, D, L = (run(f, problem) for f in (jacobian, input_hessian_diag, laplacian))
    entries = run(input_hessian_entries, problem, pairs=[(0, 0), (0, 1), (1, 0), (1, 1), (2, 2)])
    assert_close(L, D.sum(axis=2), 1e-13)
    assert_close(entries[:, :, [0, 3, 4]], D, 1e-13)
    assert_array_equal(entries[:, :, 1], entries[:, :, 2])
    assert_close(run(laplacian, problem, inputs=[0, 2]), D[:, :, 0] + D[:, :, 2], 1e-13)
    # The gradient of a loss is the Jacobian, transposed, times the loss's own.
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    G = 2 * (steps.H[-1] - problem.y)
    assert_close(run_grads(problem, reduction="sum"), np.einsum("no,nok->nk", G, J), 1e-13)


@pytest.mark.parametrize(("sizes", "other"), [((3, 4, 2), "levels"), ((2, 4, 3), "input_jacobian")])
def test_the_way_with_fewer_sweeps_is_taken(sizes, other, monkeypatch):
    problem = make_problem(sizes)
    expected = by_torch("jacrev", problem)
    monkeypatch.setattr(jets, other, None)
    assert_close(run(jacobian, problem), expected, 1e-12)


def test_jacobian_by_the_parameters_gives_the_gradient():
    problem = make_problem(activation=["tanh", "silu", "sigmoid"])
    steps = trace(problem.params, problem.X, problem.y, **problem.options)
    G = 2 * (steps.H[-1] - problem.y)
    grads = [
        (np.einsum("no,noij->ij", G, W), np.einsum("no,noi->i", G, b))
        for W, b in run(jacobian, problem, wrt="params")
    ]
    oracles.assert_grads_close(grads, steps.grads, 1e-13)


def test_a_linear_net_has_the_product_of_its_weights():
    problem = make_problem(activation="identity")
    product = np.linalg.multi_dot([W for W, _ in problem.params[::-1]])
    assert_close(run(jacobian, problem), np.broadcast_to(product, (7, 4, 3)), 1e-14)
    assert_array_equal(run(input_hessian_diag, problem), np.zeros((7, 4, 3)))
    assert_array_equal(run(laplacian, problem), np.zeros((7, 4)))


def test_blocks_of_rows_are_joined(of_outputs, ragged_blocks, monkeypatch):
    problem = make_problem()
    one_by_one = run(of_outputs, problem)
    monkeypatch.undo()
    assert_close(one_by_one, run(of_outputs, problem), 1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows_per_block", [1, 3])
def test_blocks_of_the_gradient_are_joined(reduction, rows_per_block, monkeypatch):
    problem = make_problem(weighted=True, loss="softmax_cross_entropy")
    expected = run_grads(problem, reduction=reduction)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", rows_per_block * 2 * (3 + 5 + 2 + 4) * 8)
    cuts = list(row_blocks.row_blocks(np, np.zeros((7, 3)), 2 * (3 + 5 + 2 + 4)))
    assert [cut.stop - cut.start for cut in cuts] == {1: [1] * 7, 3: [3, 3, 1]}[rows_per_block]
    assert_close(run_grads(problem, reduction=reduction), expected, 1e-14)


# Libraries and dtypes ----------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["gelu_tanh", "elu"])
def test_every_library_agrees_with_numpy(of_outputs, activation, backend):
    problem = make_problem(activation=activation)
    got = run(of_outputs, problem.map(backend.array))
    assert_close(backend.numpy(got), run(of_outputs, problem))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradient_on_every_library(loss, weighted, backend):
    problem = make_problem(loss=loss, weighted=weighted)
    assert_close(backend.numpy(run_grads(problem.map(backend.array))), run_grads(problem))


def test_jacobian_by_the_parameters_on_every_library(backend):
    problem = make_problem()
    got = run(jacobian, problem.map(backend.array), wrt="params")
    host = [map(backend.numpy, layer) for layer in got]
    oracles.assert_grads_close(host, run(jacobian, problem, wrt="params"))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_are_like_the_parameters(dtype, of_outputs, backend):
    problem = make_problem(dtype=dtype, weighted=True).map(backend.array)
    W = problem.params[0][0]
    for result in (run(of_outputs, problem), run_grads(problem)):
        assert type(result) is type(W)
        assert result.dtype == W.dtype
        xp = backends.namespace_of(W)
        assert backends.device_of(xp, result) == backends.device_of(xp, W)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_is_near_float64(activation, of_outputs):
    problem = make_problem(activation=activation, dtype=np.float32)
    expected = run(of_outputs, problem.astype(np.float64))
    assert_close(run(of_outputs, problem), expected, 1e-5)
    exact = run_grads(problem.astype(np.float64))
    assert_close(run_grads(problem), exact, 1e-5)


def test_half_precision(of_outputs):
    problem = make_problem(dtype=np.float16, weighted=True)
    for f in (partial(run, of_outputs), run_grads):
        got = f(problem)
        assert got.dtype == np.float16
        assert_close(got, f(problem.astype(np.float64)), 2e-2)


def test_tensors_that_require_grad_give_results_that_do_not(of_outputs):
    torch = pytest.importorskip("torch")
    leaves = make_problem().map(lambda A: torch.tensor(A, requires_grad=True))
    assert not run(of_outputs, leaves).requires_grad
    assert not run_grads(leaves).requires_grad


# Edges -------------------------------------------------------------------------------------------


def test_no_rows(backend):
    problem = make_problem(n=0).map(backend.array)
    assert tuple(run(jacobian, problem).shape) == (0, 4, 3)
    assert tuple(run(input_hessian_diag, problem).shape) == (0, 4, 3)
    assert tuple(run(laplacian, problem).shape) == (0, 4)
    assert tuple(run(input_hessian_entries, problem, pairs=PAIRS).shape) == (0, 4, 4)
    assert tuple(run_grads(problem, reduction="sum").shape) == (0, 3)
    assert tuple(run(jacobian, problem, wrt="params")[0].W.shape) == (0, 4, 5, 3)


def test_no_pairs(backend):
    problem = make_problem().map(backend.array)
    assert tuple(run(input_hessian_entries, problem, pairs=[]).shape) == (7, 4, 0)


def test_no_columns_have_a_laplacian_of_zero(backend):
    problem = make_problem().map(backend.array)
    assert_array_equal(backend.numpy(run(laplacian, problem, inputs=[])), np.zeros((7, 4)))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_stays_in_its_row(of_outputs, value):
    problem = make_problem(activation="tanh")
    X = problem.X.copy()
    X[2, 1] = value
    spoilt = problem._replace(X=X)
    others = [0, 1, 3, 4, 5, 6]
    assert_close(run(of_outputs, spoilt)[others], run(of_outputs, problem)[others], 1e-14)
    assert_close(run_grads(spoilt)[others], run_grads(problem)[others], 1e-14)
    if np.isnan(value):
        assert np.isnan(run(of_outputs, spoilt)[2]).all()
        assert np.isnan(run_grads(spoilt)[2]).all()


def test_read_only_and_strided_arrays(of_outputs):
    problem = make_problem()

    def awkward(A):
        A = np.repeat(np.asfortranarray(A[::-1]), 2, axis=0)[::-2]
        A.flags.writeable = False
        return A

    assert_close(run(of_outputs, problem.map(awkward)), run(of_outputs, problem), 1e-14)
    assert_close(run_grads(problem.map(awkward)), run_grads(problem), 1e-14)


def test_results_can_be_written_to(of_outputs):
    for sizes in ((3, 4), (3, 2), (3, 2, 4)):
        problem = make_problem(sizes)
        X = problem.X.copy()
        run(of_outputs, problem)[...] = 0
        run_grads(problem)[...] = 0
        assert_array_equal(problem.X, X)


# At the kink z = 0, for x > 0 on the right of it, for x < 0 on the left.
KINKS = {"relu": (0, 0), "leaky_relu": (0.01, 0), "elu": (1, 1)}


@pytest.mark.parametrize("name", KINKS)
def test_kinks_take_the_value_from_the_left(name):
    params, X = [(np.array([[1.0, -2.0]]), np.zeros(1))], np.zeros((1, 2))
    slope, second = KINKS[name]
    options = {"activation": [name]}
    assert_array_equal(jacobian(params, X, **options), slope * np.array([[[1, -2]]]))
    assert_array_equal(input_hessian_diag(params, X, **options), second * np.array([[[1, 4]]]))
    assert_array_equal(laplacian(params, X, **options), second * np.array([[5]]))
    entries = input_hessian_entries(params, X, [(0, 1)], **options)
    assert_array_equal(entries, second * np.array([[[-2]]]))
    got = input_grads(params, X, np.ones((1, 1)), **options)
    assert_array_equal(got, -2 * slope * np.array([[1, -2]]))


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_a_relu_net_has_no_second_derivative(name):
    problem = make_problem(activation=name)
    assert_array_equal(run(input_hessian_diag, problem), np.zeros((7, 4, 3)))


def test_memory_is_that_of_a_block(of_outputs, monkeypatch):
    n = 8_000
    monkeypatch.setenv(threads.VARIABLE, "1")  # each has one
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", row_blocks.BLOCK_BYTES // 5)
    problem = make_problem((3, 64, 64, 1), n)
    sizes = [run(of_outputs, problem).nbytes, run_grads(problem).nbytes]
    for f, size in zip((partial(run, of_outputs), run_grads), sizes, strict=True):
        peak = peak_bytes(lambda f=f: f(problem))
        assert peak < 2 * size + 3 * row_blocks.BLOCK_BYTES < n * 64 * 8


def test_nan_stays_in_its_row_of_the_jacobian_by_the_parameters():
    problem = make_problem()
    X = problem.X.copy()
    X[2, 1] = np.nan
    got = run(jacobian, problem._replace(X=X), wrt="params")
    others = [0, 1, 3, 4, 5, 6]
    for layer, expected in zip(got, run(jacobian, problem, wrt="params"), strict=True):
        for A, B in zip(layer, expected, strict=True):
            assert_close(A[others], B[others], 1e-14)
    assert np.isnan(got[0].W[2]).all()


# What is refused ---------------------------------------------------------------------------------

MASK = r"named by integers, got .*(True|False).*; of a mask, its flatnonzero"


@pytest.mark.parametrize(
    ("f", "options", "error", "message"),
    [
        (jacobian, {"wrt": "input"}, ValueError, "unknown wrt 'input'; .* did you mean 'inputs'"),
        (jacobian, {"wrt": None}, TypeError, "wrt must be a name"),
        (laplacian, {"inputs": [3]}, ValueError, "X has no column 3: they are 0 to 2"),
        (laplacian, {"inputs": [-1]}, ValueError, "X has no column -1"),
        (laplacian, {"inputs": [1, 1]}, ValueError, "inputs names a column twice"),
        (laplacian, {"inputs": [0.5]}, TypeError, "named by integers, got 0.5"),
        (laplacian, {"inputs": 1}, TypeError, "inputs must be a sequence of columns of X, got int"),
        (input_hessian_entries, {"pairs": [(0, 3)]}, ValueError, "X has no column 3"),
        (input_hessian_entries, {"pairs": [(0, 1.0)]}, TypeError, "named by integers, got 1.0"),
        (input_hessian_entries, {"pairs": [(0, 1, 2)]}, TypeError, r"got \(0, 1, 2\)"),
        (input_hessian_entries, {"pairs": (0, 1)}, TypeError, r"pairs \(j, k\) .* got 0"),
        (input_hessian_entries, {"pairs": 0}, TypeError, "pairs must hold pairs"),
        (input_hessian_entries, {"pairs": [(True, False)]}, TypeError, MASK),
        (input_hessian_entries, {"pairs": np.eye(2, dtype=bool)}, TypeError, MASK),
        (laplacian, {"inputs": [True, False]}, TypeError, MASK),
        (laplacian, {"inputs": np.array([False, True, True])}, TypeError, MASK),
    ],
)
def test_bad_options_are_refused(f, options, error, message):
    with pytest.raises(error, match=message):
        run(f, make_problem(), **options)


def test_a_mask_of_any_library_is_no_list_of_columns(backend):
    problem = make_problem().map(backend.array)
    with pytest.raises(TypeError, match="named by integers"):
        run(laplacian, problem, inputs=backend.array(np.array([True, False, True])))


def test_bad_arrays_are_refused(of_outputs):
    problem = make_problem()
    with pytest.raises(ValueError, match="X has 2 columns, W of layer 1 takes 3 inputs"):
        run(of_outputs, problem._replace(X=problem.X[:, :2]))
    with pytest.raises(ValueError, match="unknown activation"):
        of_outputs(problem.params, problem.X, activation="swish")
    with pytest.raises(TypeError, match="X has dtype float32"):
        run(of_outputs, problem._replace(X=problem.X.astype(np.float32)))


def test_bad_arrays_of_the_gradient_are_refused():
    problem = make_problem()
    with pytest.raises(ValueError, match="y must have shape"):
        run_grads(problem._replace(y=problem.y[:, :1]))
    with pytest.raises(ValueError, match="a mean over none"):
        run_grads(make_problem(n=0))
    with pytest.raises(ValueError, match="sample_weight must have shape"):
        run_grads(problem, sample_weight=np.ones(3))


# Mutants -----------------------------------------------------------------------------------------


def wrong_row(monkeypatch, **changes):
    """tanh with a derivative of its row changed by 0.1 %."""
    row = ROWS["tanh"]

    def changed(f):
        return lambda xp, Z, H: 1.001 * f(xp, Z, H)

    wrong = {name: changed(getattr(row, name)) for name in changes}
    monkeypatch.setitem(ROWS, "tanh", row._replace(**wrong))


def levels_without(monkeypatch, part):
    """(I4) without one of its two terms."""
    right = jets.levels

    def levels(spec, params, Z, H, V, q=None):
        if part == "bend":
            return right(spec, params, Z, H, V, q and (lambda Zt: 0 * q(Zt)))
        straight = [row._replace(df=lambda xp, Z, H: xp.ones_like(Z)) for row in spec.activations]
        return right(spec._replace(activations=straight), params, Z, H, V, q)

    monkeypatch.setattr(jets, "levels", levels)


def square_of_the_sum(monkeypatch):
    monkeypatch.setattr(jets, "laplacian_square", lambda xp, Zt, c=None: xp.sum(Zt, axis=0) ** 2)


def output_layer_left_out(monkeypatch):
    def change(spec, params):
        *hidden, _ = spec.activations
        return spec._replace(activations=(*hidden, ROWS["identity"])), params

    change_backward(monkeypatch, change)


MUTANTS = {
    "f' wrong by 0.1 %": partial(wrong_row, df=True),
    "f'' wrong by 0.1 %": partial(wrong_row, d2f=True),
    "no f''": partial(levels_without, part="bend"),
    "f' = 1": partial(levels_without, part="slope"),
    "the square of the sum": square_of_the_sum,
    "no output activation": output_layer_left_out,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_caught(mutant, monkeypatch, nothing_seen):
    problem = make_problem((3, 3, 3), activation=["tanh", "tanh"])
    expected = {
        "jacobian": by_torch("jacrev", problem),
        "laplacian": np.einsum("nokk->no", by_torch("hessian", problem)),
    }

    def assert_right():
        for name, array in expected.items():
            assert_close(run(OF_OUTPUTS[name], problem), array, 1e-4)

    assert_right()
    MUTANTS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match="off, of"):
        assert_right()


def test_the_gradient_with_respect_to_inputs_steps_downhill():
    problem = make_problem(loss="huber")
    before = compute_grads(problem.params, problem.X, problem.y, **problem.options).loss
    moved = problem.X - 1e-3 * run_grads(problem)
    assert compute_grads(problem.params, moved, problem.y, **problem.options).loss < before


def test_the_documentation_has_the_equations_of_the_code():
    equations = [line for line in jets.__doc__.splitlines() if re.search(r" \(I\d\)$", line)]
    assert len(equations) == 9
    page = Path(__file__).parents[2] / "docs/inputs.md"
    assert set(equations) <= set(page.read_text(encoding="utf-8").splitlines())

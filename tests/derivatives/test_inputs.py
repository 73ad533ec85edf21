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
each_of_outputs = pytest.mark.parametrize("of_outputs", OF_OUTPUTS.values(), ids=OF_OUTPUTS)


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


@each_of_outputs
def test_blocks_of_rows_are_joined(of_outputs, monkeypatch):
    problem = make_problem()
    expected = run(of_outputs, problem)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 1)  # one row, whatever it takes
    assert_close(run(of_outputs, problem), expected, 1e-14)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("rows_per_block", [1, 3])
def test_blocks_of_the_gradient_are_joined(reduction, rows_per_block, monkeypatch):
    problem = make_problem(weighted=True, loss="softmax_cross_entropy")
    expected = run_grads(problem, reduction=reduction)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", rows_per_block * 2 * (3 + 5 + 2 + 4) * 8)
    cuts = list(row_blocks.row_blocks(np, np.zeros((7, 3)), 2 * (3 + 5 + 2 + 4)))
    assert [cut.stop - cut.start for cut in cuts] == {1: [1] * 7, 3: [3, 3, 1]}[rows_per_block]
    assert_close(run_grads(problem, reduction=reduction), expected, 1e-14)


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

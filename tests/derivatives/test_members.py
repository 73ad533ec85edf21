"""Many nets in one call: each as alone, of NumPy's arrays to the bit; and what does not fit."""

from functools import partial

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import LOSSES, assert_close, make_problem

import mlp_backprop as package
from mlp_backprop import (
    Layer,
    Net,
    compute_grads,
    forward,
    init_params,
    per_sample_grad_norms,
    stack_params,
    unstack_params,
)
from mlp_backprop.engines import choice
from mlp_backprop.maths import row_blocks
from mlp_backprop.types import flat

E = 3
SIZES = (3, 5, 2)
CLASSES = "softmax_cross_entropy"


def members_of(loss="squared_error", n=7, weighted=False, own=False, dtype=np.float64, sizes=SIZES):
    """E problems, of the same data unless it is their own; weights are for all."""
    options = {"loss": CLASSES if loss == "labels" else loss, "class_rows": loss != "labels"}
    problems = [
        make_problem(sizes, n, weighted=weighted, dtype=dtype, seed=e, **options) for e in range(E)
    ]
    first = problems[0]
    return [
        (problem if own else problem._replace(X=first.X, y=first.y))._replace(options=first.options)
        for problem in problems
    ]


def stacked(problems, place=np.asarray):
    """All of them as one call: params, X, y and options."""
    first, own = problems[0], problems[1].X is not problems[0].X
    params = stack_params([problem.params for problem in problems])
    X, y = (
        np.stack([getattr(problem, name) for problem in problems]) if own else getattr(first, name)
        for name in ("X", "y")
    )
    weight = first.options["sample_weight"]
    options = first.options | {"sample_weight": weight if weight is None else place(weight)}
    return [Layer(place(W), place(b)) for W, b in params], place(X), place(y), options


def calls(options):
    """Each function that takes many nets, as one of params, X and y."""
    sums = options | {"reduction": "sum"}
    net = {name: options[name] for name in ("activation", "backend") if name in options}
    return {
        "compute_grads": partial(compute_grads, **sums),
        "forward": lambda params, X, y: forward(params, X, **net),
        "norms": partial(per_sample_grad_norms, **options),
        "norms by layer": partial(per_sample_grad_norms, per_layer=True, **options),
    }


def arrays_of(result):
    if not isinstance(result, list | tuple):
        return [result]
    return [array for part in result for array in arrays_of(part)]


def assert_members(result, alone):
    """Every array of a result has what those of the single calls have, one behind the other."""
    for together, *each in zip(arrays_of(result), *map(arrays_of, alone), strict=True):
        assert type(together) is np.ndarray
        assert_array_equal(together, np.stack(each), strict=True)


SHAPES = {"tiny": (SIZES, 7), "tiles": (SIZES, 900), "wide": ((20, 150, 120, 10), 40)}


@pytest.mark.parametrize("own", [False, True], ids=["shared data", "own data"])
@pytest.mark.parametrize("loss", [*LOSSES, "labels"])
@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_each_has_the_bits_of_its_own_call(engine, loss, own):
    if engine == "numba":
        pytest.importorskip("numba")
    for dtype in (np.float64, np.float32, np.float16):
        problems = members_of(loss, weighted=True, own=own, dtype=dtype)
        params, X, y, options = stacked(problems)
        for call in calls(options | {"backend": engine}).values():
            alone = [call(problem.params, problem.X, problem.y) for problem in problems]
            assert_members(call(params, X, y), alone)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_each_has_the_bits_of_its_own_call_in_every_tier(engine, shape):
    if engine == "numba":
        pytest.importorskip("numba")
    sizes, n = SHAPES[shape]
    problems = members_of(n=n, sizes=sizes, dtype=np.float32)
    params, X, y, options = stacked(problems)
    for call in calls(options | {"backend": engine}).values():
        alone = [call(problem.params, problem.X, problem.y) for problem in problems]
        assert_members(call(params, X, y), alone)


@pytest.mark.parametrize("own", [False, True], ids=["shared data", "own data"])
@pytest.mark.parametrize("loss", ["huber", CLASSES, "labels"])
def test_every_library_agrees(loss, own, backend, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 2000)  # several blocks of rows
    problems = members_of(loss, n=7, weighted=True, own=own)
    params, X, y, options = stacked(problems, backend.array)
    expected = calls(problems[0].options)
    for name, call in calls(options).items():
        result = call(params, X, y)
        assert {type(array) for array in arrays_of(result)} == {type(params[0].W)}
        alone = [expected[name](problem.params, problem.X, problem.y) for problem in problems]
        for together, *each in zip(arrays_of(result), *map(arrays_of, alone), strict=True):
            assert_close(backend.numpy(together), np.stack(each))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighted", [False, True])
def test_reductions(reduction, weighted):
    problems = members_of(weighted=weighted)
    params, X, y, options = stacked(problems)
    call = partial(compute_grads, reduction=reduction, **options)
    assert_members(call(params, X, y), [call(problem.params, X, y) for problem in problems])


def test_shared_inputs_with_targets_of_each_and_the_other_way():
    params, X = init_params(SIZES, 0, members=E), np.ones((4, 3))
    Y = np.arange(E * 8.0).reshape(E, 4, 2)
    for mine, targets in ((X, Y), (np.stack([X, 2 * X, 3 * X]), Y[0])):
        alone = [
            compute_grads(
                net,
                mine if mine.ndim == 2 else mine[e],
                targets if targets.ndim == 2 else targets[e],
            )
            for e, net in enumerate(unstack_params(params))
        ]
        assert_members(compute_grads(params, mine, targets), alone)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("n_members", [1, 2])
def test_few_rows_and_few_members(n, n_members, backend):
    params = init_params(SIZES, 0, members=n_members)
    layers = [Layer(*map(backend.array, layer)) for layer in params]
    X, y = backend.array(np.ones((n, 3))), backend.array(np.ones((n, 2)))
    loss, grads = compute_grads(layers, X, y, reduction="sum")
    assert tuple(loss.shape) == (n_members,)
    assert [tuple(A.shape) for A in flat(grads)] == [A.shape for A in flat(params)]
    assert bool((backend.numpy(loss) > 0).all()) == (n > 0)
    assert tuple(forward(layers, X).shape) == (n_members, n, 2)
    assert tuple(per_sample_grad_norms(layers, X, y).shape) == (n_members, n)


def test_lists_and_a_net_are_taken():
    net = Net([([[[1.0, 2.0]], [[3.0, 4.0]]], [[0.0], [1.0]])], "tanh")
    assert_array_equal(forward(net, [[1, 1]]), [[[3.0]], [[8.0]]])
    loss, grads = compute_grads(net, [[1, 1]], [[1]])
    assert_array_equal(loss, [4.0, 49.0])
    assert_array_equal(grads[0].b, [[4.0], [14.0]])


def test_results_share_nothing():
    """Neither with the pass, which is made anew, nor with each other or the parameters."""
    params, X, y, _ = stacked(members_of())
    first, second = (arrays_of(compute_grads(params, X, y)) for _ in range(2))
    arrays = [*first, *second, *flat(params)]
    for k, A in enumerate(arrays):
        assert not any(np.shares_memory(A, B) for B in arrays[:k])


def test_one_plan_is_for_all(monkeypatch):
    plans, plan = [], choice.plan
    monkeypatch.setattr(choice, "plan", lambda *args: plans.append(args) or plan(*args))
    params, X, y, _ = stacked(members_of())
    compute_grads(params, X, y)
    assert len(plans) == 1


@pytest.mark.parametrize("own", [False, True], ids=["shared data", "own data"])
def test_a_call_of_one_net_does_not_stand_for_many(own):
    """Calls like one before are known again by their shapes."""
    problems = members_of(own=own)
    params, X, y, options = stacked(problems)
    for call in calls(options).values():
        for _ in range(3):
            alone = [call(problem.params, problem.X, problem.y) for problem in problems]
            assert_members(call(params, X, y), alone)


# What does not fit -------------------------------------------------------------------------------

PARAMS = init_params(SIZES, 0, members=E)
X, Y = np.ones((7, 3)), np.ones((7, 2))
V = unstack_params(PARAMS)[0]

ONE_NET = {
    "trace": lambda f, p: f(p, X, Y),
    "prepare_grads": lambda f, p: f(p, n=7),
    "check_grads": lambda f, p: f(p, X, Y),
    "per_sample_grads": lambda f, p: f(p, X, Y),
    "clipped_grads": lambda f, p: f(p, X, Y, max_norm=1.0),
    "input_grads": lambda f, p: f(p, X, Y),
    "sobolev_grads": lambda f, p: f(p, X, Y, np.ones((7, 2, 3))),
    "residual_grads": lambda f, p: f(p, X, print, activation="tanh"),
    "hvp": lambda f, p: f(p, X, Y, V),
    "ggnvp": lambda f, p: f(p, X, Y, V),
    "fisher_vp": lambda f, p: f(p, X, Y, V),
    "hessian": lambda f, p: f(p, X, Y),
    "ggn": lambda f, p: f(p, X, Y),
    "linear_operator": lambda f, p: f("hessian", p, X, Y),
    "jacobian": lambda f, p: f(p, X),
    "input_hessian_diag": lambda f, p: f(p, X),
    "input_hessian_entries": lambda f, p: f(p, X, [(0, 1)]),
    "laplacian": lambda f, p: f(p, X),
    "jvp": lambda f, p: f(p, X, V),
    "vjp": lambda f, p: f(p, X, Y),
    "ntk": lambda f, p: f(p, X, X),
}


@pytest.mark.parametrize("name", ONE_NET)
def test_others_take_one_net_and_say_so(name):
    call = partial(ONE_NET[name], getattr(package, name))
    forward(PARAMS, X), compute_grads(PARAMS, X, np.stack([Y] * E))  # calls that were right
    message = r"one net, and W of layer 1 has shape \(3, 5, 3\), that of 3 nets: unstack_params"
    with pytest.raises(ValueError, match=message):
        call(PARAMS)


def test_a_prepared_call_takes_one_net():
    with pytest.raises(ValueError, match="takes one net"):
        package.prepare_grads(V, n=7)(PARAMS, X, Y)


LABELS = np.zeros(7, int)
REFUSED = {
    "X of others": (
        {"X": np.ones((2, 7, 3))},
        r"X must have shape \(n, 3\) for all nets, or 3 in front of it, since params are those of "
        r"3 nets; got \(2, 7, 3\)",
    ),
    "X too narrow": ({"X": np.ones((E, 7, 2))}, "X has 2 columns, W of layer 1 takes 3"),
    "X of four axes": ({"X": np.ones((1, E, 7, 3))}, "X must have two dimensions"),
    "y of others": (
        {"y": np.ones((2, 7, 2))},
        r"y must have shape \(7, 2\) for all nets, or 3 in front of it.*got \(2, 7, 2\)",
    ),
    "y too wide": ({"y": np.ones((E, 7, 3))}, r"y must have shape \(7, 2\).*got \(7, 3\)"),
    "y of other rows": ({"y": np.ones((6, 2))}, "X has 7 rows, y has 6"),
    "labels of others": (
        {"y": np.stack([LABELS] * 2), "loss": CLASSES},
        r"\(7, 2\) or \(7,\) for all nets, or 3 in front of it.*got \(2, 7\)",
    ),
    "labels out of range": (
        {"y": np.stack([LABELS, LABELS + (np.arange(7) == 4) * 2, LABELS]), "loss": CLASSES},
        r"class indices from 0 to 1, got 2 at \[1, 4\]",
    ),
    "shared labels out of range": (
        {"y": LABELS + (np.arange(7) == 4) * 2, "loss": CLASSES},
        r"class indices from 0 to 1, got 2 at \[4\]",
    ),
    "probabilities": (
        {"y": np.full((E, 7, 2), 2.0), "loss": "binary_cross_entropy"},
        r"probabilities from 0 to 1, got 2 at \[0, 0, 0\]",
    ),
    "weights of each": (
        {"sample_weight": np.ones((E, 7))},
        r"sample_weight must have shape \(7,\), got \(3, 7\)",
    ),
    "a layer of others": (
        {"params": [PARAMS[0], init_params(SIZES, 0, members=2)[1]]},
        "layer 2 needs W of shape",
    ),
    "a layer of one": ({"params": [PARAMS[0], V[1]]}, "layer 2 needs W of shape"),
    "b of one": ({"params": [(PARAMS[0].W, V[0].b), PARAMS[1]]}, "layer 1 needs W of shape"),
    "widths": (
        {"params": [PARAMS[0], init_params([4, 2], 0, members=E)[0]]},
        r"W of layer 2 has shape \(2, 4\), so layer 1 should have 4 outputs; it has 5",
    ),
    "no rows, a mean": ({"X": X[:0], "y": Y[:0]}, "a mean over none"),
    "precision": ({"precision": "tf32"}, "for float32 arrays under backend 'cupy'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    with pytest.raises(ValueError, match=REFUSED[name][1]):
        compute_grads(**{"params": PARAMS, "X": X, "y": Y} | REFUSED[name][0])


def test_targets_that_could_be_either_are_refused():
    """E nets of E rows and E classes: a table of integers."""
    params = init_params([3, 3], 0, members=3)
    X, y = np.ones((3, 3)), np.eye(3)
    weights = compute_grads(params, X, y, loss=CLASSES)
    for table in (y.astype(int), y.tolist()):
        with pytest.raises(ValueError, match=r"y of shape \(3, 3\) may be 3 nets' class indices"):
            compute_grads(params, X, table, loss=CLASSES)
    assert_array_equal(weights.loss, compute_grads(params, X, np.arange(3), loss=CLASSES).loss)


def test_floating_labels_are_refused():
    with pytest.raises(TypeError, match="class indices must be integers"):
        compute_grads(PARAMS, X, np.zeros((E, 7)), loss=CLASSES)

"""The table of losses: value, gradient and Hessian product against the naive formulas."""

import math

import numpy as np
import oracles
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from oracles import assert_close

from mlp_backprop.edge import backends
from mlp_backprop.losses import LOSSES

LOGITS = np.array([1e-9, 36, 88, 89, 709, 710, 1e9])
LOGITS = np.concatenate([-LOGITS[::-1], [0], LOGITS])
N, WIDTH = 4, 3


@pytest.fixture(params=[*LOSSES, "softmax_cross_entropy rows"])
def case(request):
    """A row, outputs, and targets of each kind the loss takes."""
    name, _, rows = request.param.partition(" ")
    rng = np.random.default_rng(1)
    Y = oracles.make_targets(rng, name, N, WIDTH, class_rows=bool(rows))
    return LOSSES[name], 2 * rng.normal(size=(N, WIDTH)), Y


def naive(row, Y, m=np):
    """The formula as a function of the outputs; class indices one-hot."""
    Y = np.eye(WIDTH)[Y] if Y.ndim == 1 else Y
    return lambda H: oracles.LOSSES[row.name](m, H, Y)


def value_and_grad(row, H, Y):
    """Of a row in NumPy; what NumPy could complain of, underflow apart, is an error."""
    with np.errstate(all="raise", under="ignore"):
        return row.value_and_grad(np, np.asarray(H, dtype=float), np.asarray(Y))


def test_the_oracles_cover_the_table():
    assert LOSSES.keys() == oracles.LOSSES.keys()
    assert all(row.name == name for name, row in LOSSES.items())
    assert {row.name for row in LOSSES.values() if row.takes_logits} == set(oracles.TAKE_LOGITS)


def test_value_and_gradient(case):
    row, H, Y = case
    values, G = value_and_grad(row, H, Y)
    formula = naive(row, Y)
    assert_close(values, formula(H))
    assert_close(G, oracles.complex_steps(lambda A: formula(A).sum(), H))


def test_hessian_product(case):
    row, H, Y = case
    V = np.random.default_rng(2).normal(size=H.shape)
    formula, step = naive(row, Y, oracles.MP), oracles.precise.mpf(10) ** -100
    V_exact = oracles.exact(V)

    def slope(A):
        change = formula(A + step * V_exact) - formula(A - step * V_exact)
        return change.sum() / (2 * step)

    assert_close(row.hessian_product(np, H, Y, V), oracles.exact_gradient(slope, H))


def test_products_of_several_vectors_at_once(case):
    row, H, Y = case
    V = np.random.default_rng(5).normal(size=(2, 3, *H.shape))
    for product in (row.hessian_product, row.fisher_product):
        each = [[product(np, H, Y, v) for v in group] for group in V]
        assert_array_equal(product(np, H, Y, V), each)


REAL = (np.arange(160_000) - 79_999.5) / 2000  # residuals, but 0: exp(-40) is below the tolerance
COUNTS = np.arange(400.0)


@pytest.mark.parametrize("name", LOSSES)
def test_fisher_product_is_the_mean_over_what_the_loss_predicts(name):
    row, rng = LOSSES[name], np.random.default_rng(6)
    h, v = rng.normal(size=(1, WIDTH)), rng.normal(size=(1, WIDTH))
    if name == "softmax_cross_entropy":
        draws = [np.eye(WIDTH)]  # the classes, with all outputs at once
    else:
        draws = {
            "poisson": [COUNTS[:, None]] * WIDTH,
            "binary_cross_entropy": [np.array([[0.0], [1.0]])] * WIDTH,
        }.get(name, [h[:, k : k + 1] - REAL[:, None] for k in range(WIDTH)])
    expected = np.zeros((1, WIDTH))
    for k, Y in enumerate(draws):
        own = slice(None) if len(draws) == 1 else slice(k, k + 1)
        values, G = row.value_and_grad(np, np.repeat(h[:, own], len(Y), axis=0), Y)
        if name == "poisson":  # the term of the count alone, which the loss leaves out
            values = values + np.array([math.lgamma(count + 1) for count in COUNTS])
        P = np.exp(-values) / np.exp(-values).sum()
        expected[:, own] = (P * (G @ v[0, own])) @ G
    y = np.zeros((1, WIDTH)) if row.targets != "class" else np.array([0])
    assert_close(row.fisher_product(np, h, y, v), expected, 1e-6)


def test_class_weights_of_any_sum_count_as_that_many_draws():
    row, rng = LOSSES["softmax_cross_entropy"], np.random.default_rng(7)
    H, V, Y = rng.normal(size=(N, WIDTH)), rng.normal(size=(N, WIDTH)), np.full((N, WIDTH), 0.5)
    one = row.fisher_product(np, H, np.zeros(N, int), V)
    assert_close(row.fisher_product(np, H, Y, V), WIDTH / 2 * one)


@pytest.mark.parametrize("name", LOSSES)
def test_relation_to_torch(name):
    # The table in the docstring of losses.py, with torch's own reduction="none".
    torch = pytest.importorskip("torch")
    criterion = {
        "squared_error": torch.nn.MSELoss(reduction="none"),
        "absolute_error": torch.nn.L1Loss(reduction="none"),
        "huber": torch.nn.HuberLoss(reduction="none", delta=1),
        "poisson": torch.nn.PoissonNLLLoss(log_input=True, full=False, reduction="none"),
        "binary_cross_entropy": torch.nn.BCEWithLogitsLoss(reduction="none"),
        "softmax_cross_entropy": torch.nn.CrossEntropyLoss(reduction="none"),
    }[name]
    rng = np.random.default_rng(3)
    H = 3 * rng.normal(size=(N, WIDTH))
    for class_rows in (False, True):
        Y = oracles.make_targets(rng, name, N, WIDTH, class_rows)
        h = torch.tensor(H, requires_grad=True)
        expected = criterion(h, torch.tensor(Y)).reshape(N, -1).sum(dim=1)
        expected.sum().backward()
        values, G = value_and_grad(LOSSES[name], H, Y)
        assert_close(values, expected.detach().numpy())
        assert_close(G, h.grad.numpy())


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("target", [0.0, 0.25, 1.0])
def test_binary_cross_entropy_of_extreme_logits(target, dtype):
    H = LOGITS.astype(dtype)[:, None]
    Y = np.full(H.shape, target, dtype)
    formula = oracles.LOSSES["binary_cross_entropy"]
    # 1 - s(h) is 0 to 600 digits beyond h = 1400: there the loss is the line it tends to.
    inner = np.abs(LOGITS) < 1e3
    expected = np.maximum(H[:, 0], 0).astype(float) - target * H[:, 0].astype(float)
    expected[inner] = formula(oracles.MP, oracles.exact(H[inner]), Y[inner].astype(float))
    with np.errstate(all="raise", under="ignore"):
        values, G = LOSSES["binary_cross_entropy"].value_and_grad(np, H, Y)
    float_ = np.finfo(dtype)
    assert values.dtype == G.dtype == dtype
    assert_allclose(values, expected, 4 * float_.eps, float_.tiny)
    sigmoid = oracles.exact_derivatives(lambda z: oracles.ACTIVATIONS["sigmoid"](oracles.MP, z), H)
    assert_allclose(G, sigmoid[0] - Y, 4 * float_.eps, float_.eps)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_softmax_cross_entropy_of_extreme_logits(dtype):
    H = np.stack([LOGITS, 0 * LOGITS], axis=1).astype(dtype)
    for label in (0, 1):
        with np.errstate(all="raise", under="ignore"):
            values, G = LOSSES["softmax_cross_entropy"].value_and_grad(
                np, H, np.full(len(H), label)
            )
        # Of two classes it is the binary cross entropy of the difference of their logits.
        binary = LOSSES["binary_cross_entropy"]
        with np.errstate(all="raise", under="ignore"):
            expected, G_first = binary.value_and_grad(
                np, H[:, :1], np.full((len(H), 1), 1 - label, dtype)
            )
        eps = np.finfo(dtype).eps
        assert values.dtype == G.dtype == dtype
        assert_allclose(values, expected, 4 * eps, eps)
        assert_allclose(G, np.concatenate([G_first, -G_first], axis=1), 4 * eps, eps)


@np.errstate(invalid="ignore")
def test_a_logit_of_minus_infinity_with_weight_zero_adds_nothing():
    row = LOSSES["softmax_cross_entropy"]
    for Y in (np.array([1]), np.array([[0.0, 0.5, 1.5]])):
        with_it = row.value_and_grad(np, np.array([[-np.inf, 0.3, -0.2]]), Y)
        without = row.value_and_grad(
            np, np.array([[0.3, -0.2]]), Y[:, 1:] if Y.ndim == 2 else Y - 1
        )
        assert_allclose(with_it[0], without[0], rtol=1e-15)
        assert_allclose(with_it[1][:, 1:], without[1], rtol=1e-15)
        assert with_it[1][0, 0] == 0


def test_rows_of_class_weights_scale_with_their_sum():
    row = LOSSES["softmax_cross_entropy"]
    rng = np.random.default_rng(4)
    H, Y = rng.normal(size=(N, WIDTH)), rng.uniform(0, 1, (N, WIDTH))
    values, G = value_and_grad(row, H, Y)
    P = np.exp(H) / np.exp(H).sum(axis=1, keepdims=True)
    assert_close(G, Y.sum(axis=1, keepdims=True) * P - Y)
    tripled = value_and_grad(row, H, 3 * Y)
    assert_close(tripled[0], 3 * values)
    assert_close(tripled[1], 3 * G)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", "uint64"])
def test_class_indices_of_any_integer_type(dtype):
    row = LOSSES["softmax_cross_entropy"]
    H, labels = np.random.default_rng(5).normal(size=(N, WIDTH)), np.arange(N) % WIDTH
    values, G = value_and_grad(row, H, labels.astype(dtype))
    rows = value_and_grad(row, H, np.eye(WIDTH)[labels])
    assert_array_equal(values, rows[0])
    assert_array_equal(G, rows[1])
    V = np.ones((N, 1)) * np.arange(WIDTH)
    assert_array_equal(
        row.hessian_product(np, H, labels.astype(dtype), V),
        row.hessian_product(np, H, np.eye(WIDTH)[labels], V),
    )


def test_huber_where_its_halves_meet():
    R = np.array([[-1 - 1e-9, -1.0, -1 + 1e-9, 0.0, 1 - 1e-9, 1.0, 1 + 1e-9]]).T
    values, G = value_and_grad(LOSSES["huber"], R, 0 * R)
    assert_allclose(values, np.where(abs(R) <= 1, R**2 / 2, abs(R) - 0.5)[:, 0], rtol=1e-15)
    assert_allclose(G, np.clip(R, -1, 1), rtol=1e-15)
    curvature = LOSSES["huber"].hessian_product(np, R, 0 * R, np.ones_like(R))
    assert_array_equal(curvature[:, 0], [0, 0, 1, 1, 1, 0, 0])


def test_absolute_error_has_derivative_zero_at_its_kink():
    values, G = value_and_grad(LOSSES["absolute_error"], [[2.0, -1.0]], [[2.0, -1.0]])
    assert_array_equal(values, [0])
    assert_array_equal(G, [[0, 0]])


def test_every_library_agrees_with_numpy(case, backend):
    row, H, Y = case
    V = np.random.default_rng(6).normal(size=H.shape)
    xp = backends.namespace_of(backend.array(H))
    arrays = [backend.array(A) for A in (H, Y, V)]
    products = row.hessian_product, row.fisher_product
    expected = [*row.value_and_grad(np, H, Y), *(f(np, H, Y, V) for f in products)]
    got = [*row.value_and_grad(xp, *arrays[:2]), *(f(xp, *arrays) for f in products)]
    for mine, theirs in zip(got, expected, strict=True):
        assert mine.dtype == arrays[0].dtype
        assert_close(backend.numpy(mine), theirs, 1e-14)

"""Vector products: against torch's matrices and differences, on every library, engine and cut."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import oracles
import pytest
from numpy.testing import assert_array_equal
from oracles import (
    ACTIVATIONS,
    LOSSES,
    TAKE_LOGITS,
    assert_close,
    assert_grads_close,
    make_problem,
    peak_bytes,
    problems,
)

from mlp_backprop import Layer, activations, compute_grads, forward, losses
from mlp_backprop.derivatives.products import fisher_vp, ggnvp, hvp, jvp, vjp
from mlp_backprop.engines import numpy_products
from mlp_backprop.maths import row_blocks, tangents
from mlp_backprop.nets.vectors import ravel_params, unravel_params

# Widths on both sides of that from which X is not copied; one output, and several.
SHAPES = [(3, 2), (1, 1), (2, 1, 3), (18, 4, 1), (3, 5, 2, 4), (1, 6, 1), (17, 3)]


def run(function, problem, v, **options):
    return function(problem.params, problem.X, problem.y, v, **problem.options | options)


def vector_like(problem, seed=1, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return [
        Layer(*(rng.normal(size=A.shape).astype(dtype) for A in layer)) for layer in problem.params
    ]


def outputs_of(problem):
    return np.random.default_rng(2).normal(size=(len(problem.X), len(problem.params[-1][1])))


def torch_matrices(problem, reduction):
    """J (n d_L, P), the Hessian and the Gauss-Newton matrix (P, P), by torch autograd."""
    torch = pytest.importorskip("torch")
    reference = pytest.importorskip("mlp_backprop.checks.torch_reference", exc_type=ImportError)
    X, y = torch.tensor(problem.X), torch.tensor(problem.y)
    weight = problem.options["sample_weight"]
    weight = torch.ones(len(X), dtype=X.dtype) if weight is None else torch.tensor(weight)
    weight = weight / weight.sum() if reduction == "mean" else weight
    row = reference.LOSSES[problem.options["loss"]]

    def outputs(x):
        return reference.forward(unravel_params_torch(x, problem.params), X, problem.names)

    def loss(H):
        values = row(H, y)
        return (weight * (values if values.ndim == 1 else values.sum(dim=1))).sum()

    x = torch.tensor(ravel_params(problem.params))
    functional = torch.autograd.functional
    J = functional.jacobian(outputs, x, vectorize=True).reshape(-1, len(x))
    A = functional.hessian(loss, outputs(x), vectorize=True).reshape(len(J), len(J))
    H = functional.hessian(lambda x: loss(outputs(x)), x, vectorize=True)
    return J.numpy(), H.numpy(), (J.T @ A @ J).numpy()


def unravel_params_torch(x, params):
    layers, end = [], 0
    for W, b in params:
        middle = end + W.size
        layers.append((x[end:middle].reshape(W.shape), x[middle : middle + b.size]))
        end = middle + b.size
    return layers


def assert_product(got, matrix, v, tolerance=1e-11):
    """Against the matrix times v; as small as the matrix is where the product cancels."""
    expected = matrix @ ravel_params(v).astype(float)
    size = np.max(np.abs(matrix), initial=0.0) * np.max(np.abs(ravel_params(v)))
    assert np.max(np.abs(ravel_params(got) - expected)) <= tolerance * size


# Against autograd and differences ----------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_against_torch(activation, loss):
    for seed, problem in problems(SHAPES, activation, loss):
        v, reduction = vector_like(problem), ("mean", "sum")[seed % 2]
        _, H, G = torch_matrices(problem, reduction)
        assert_product(run(hvp, problem, v, reduction=reduction), H, v)
        assert_product(run(ggnvp, problem, v, reduction=reduction), G, v)
        single = problem.astype(np.float32)
        got = run(hvp, single, vector_like(problem, dtype=np.float32), reduction=reduction)
        assert_product(got, H, v, 1e-4)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_jacobian_products_against_torch(activation):
    for seed, sizes in enumerate(SHAPES):
        problem = make_problem(sizes, activation=activation, seed=seed)
        v, u = vector_like(problem), outputs_of(problem)
        J = torch_matrices(problem, "sum")[0]
        net = {"activation": activation}
        Jv = jvp(problem.params, problem.X, v, **net)
        assert_close(Jv.reshape(-1), J @ ravel_params(v), 1e-11)
        JTu = vjp(problem.params, problem.X, u, **net)
        assert_close(ravel_params(JTu), J.T @ u.reshape(-1), 1e-11)


def test_against_torch_with_an_activation_after_the_last_layer():
    problem = make_problem((4, 3, 5, 2), activation=["silu", "tanh", "sigmoid"], weighted=True)
    v = vector_like(problem)
    _, H, G = torch_matrices(problem, "mean")
    assert_product(run(hvp, problem, v), H, v)
    assert_product(run(ggnvp, problem, v), G, v)


@pytest.mark.parametrize("loss", LOSSES)
def test_against_jax(loss):
    jax = pytest.importorskip("jax")
    problem = make_problem(activation=["sigmoid", "tanh", "identity"], loss=loss, weighted=True)
    v = vector_like(problem)

    @jax.jit
    def grads(params):
        return jax.grad(lambda p: oracles.naive_loss(jax.numpy, p, problem, "mean"))(params)

    params, along = ([tuple(map(jax.numpy.asarray, layer)) for layer in p] for p in (problem[0], v))
    expected = jax.jvp(grads, (params,), (along,))[1]
    assert_grads_close(run(hvp, problem, v), expected, 1e-10)


def moved(params, v, step):
    return [(W + step * V, b + step * c) for (W, b), (V, c) in zip(params, v, strict=True)]


def difference_of_grads(problem, v, step=1e-5):
    above, below = (
        compute_grads(moved(problem.params, v, t), problem.X, problem.y, **problem.options).grads
        for t in (step, -step)
    )
    return [
        ((A.W - B.W) / (2 * step), (A.b - B.b) / (2 * step))
        for A, B in zip(above, below, strict=True)
    ]


@pytest.mark.parametrize("class_rows", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_hessian_product_against_differences(loss, class_rows):
    names = ["gelu_tanh", "elu", "identity"]
    problem = make_problem(activation=names, loss=loss, class_rows=class_rows, weighted=True)
    v = vector_like(problem)
    assert_grads_close(run(hvp, problem, v), difference_of_grads(problem, v), 1e-7)


def test_jvp_against_differences():
    problem = make_problem(activation="silu")
    v, step = vector_like(problem), 1e-5
    above, below = (
        forward(moved(problem.params, v, t), problem.X, activation="silu") for t in (step, -step)
    )
    got = jvp(problem.params, problem.X, v, activation="silu")
    assert_close(got, (above - below) / (2 * step), 1e-8)


# The Fisher product ------------------------------------------------------------------------------


def test_fisher_is_the_mean_over_predicted_classes():
    problem = make_problem((3, 4, 3), loss="softmax_cross_entropy", weighted=True)
    v, options = vector_like(problem), {"activation": "tanh"}
    H = forward(problem.params, problem.X, **options)
    P = np.exp(H) / np.exp(H).sum(axis=1, keepdims=True)
    expected = 0.0
    for i, weight in enumerate(problem.options["sample_weight"]):
        for k, p in enumerate(P[i]):
            u = (P[i] - np.eye(3)[k])[None, :]
            g = ravel_params(vjp(problem.params, problem.X[i : i + 1], u, **options))
            expected = expected + weight * p * g * (g @ ravel_params(v))
    got = run(fisher_vp, problem, v, reduction="sum")
    assert_close(ravel_params(got), expected, 1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_fisher_equals_gauss_newton_but_for_two(loss):
    problem = make_problem(loss=loss, weighted=True)
    v = vector_like(problem)
    got = ravel_params(run(fisher_vp, problem, v))
    if loss in ("absolute_error", "huber"):
        scale = {"absolute_error": 1 / 2, "huber": 0.585178 / 2}[loss]
        squared = problem._replace(options=problem.options | {"loss": "squared_error"})
        assert_close(got, scale * ravel_params(run(ggnvp, squared, v)), 1e-5)
    else:
        assert_array_equal(got, ravel_params(run(ggnvp, problem, v)))


# Invariants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [hvp, ggnvp, fisher_vp])
def test_products_are_symmetric(product):
    problem = make_problem(activation="gelu_tanh", loss="softmax_cross_entropy", weighted=True)
    u, v = vector_like(problem, 1), vector_like(problem, 2)
    one = ravel_params(u) @ ravel_params(run(product, problem, v))
    other = ravel_params(v) @ ravel_params(run(product, problem, u))
    assert_close(one, other, 1e-13)


def test_jacobian_products_are_adjoint():
    problem = make_problem(activation="elu")
    v, u = vector_like(problem), outputs_of(problem)
    Jv = jvp(problem.params, problem.X, v, activation="elu")
    JTu = vjp(problem.params, problem.X, u, activation="elu")
    assert_close(np.sum(u * Jv), ravel_params(JTu) @ ravel_params(v), 1e-13)


@pytest.mark.parametrize("loss", ["squared_error", "huber", "poisson", "softmax_cross_entropy"])
def test_gauss_newton_is_the_hessian_of_a_linear_net(loss):
    problem = make_problem((3, 4), loss=loss, weighted=True)
    v = vector_like(problem)
    assert_grads_close(run(ggnvp, problem, v), run(hvp, problem, v), 1e-13)


@pytest.mark.parametrize("loss", LOSSES)
def test_gauss_newton_is_positive(loss):
    problem = make_problem(loss=loss, activation="relu")
    for seed in range(5):
        v = vector_like(problem, seed)
        assert ravel_params(v) @ ravel_params(run(ggnvp, problem, v)) >= 0


@pytest.mark.parametrize("product", [hvp, ggnvp, fisher_vp])
def test_blocks_of_rows_add_up(product):
    problem = make_problem(n=11, loss="poisson", weighted=True)
    v = vector_like(problem)
    parts = []
    for cut in (slice(0, 4), slice(4, 11)):
        weight = problem.options["sample_weight"][cut]
        part = problem._replace(
            X=problem.X[cut], y=problem.y[cut], options=problem.options | {"sample_weight": weight}
        )
        parts.append(run(product, part, v, reduction="sum"))
    assert_grads_close(
        row_blocks.added_layers(*parts), run(product, problem, v, reduction="sum"), 1e-13
    )


def test_jvp_of_the_gradient_is_the_gauss_newton_product():
    """Jᵀ (2 J v) for squared errors: the three products fit together."""
    problem = make_problem()
    v, net = vector_like(problem), {"activation": "tanh"}
    Jv = jvp(problem.params, problem.X, v, **net)
    expected = vjp(problem.params, problem.X, 2 * Jv, **net)
    assert_grads_close(run(ggnvp, problem, v, reduction="sum"), expected, 1e-13)


# Libraries, engines, cuts, dtypes ----------------------------------------------------------------


def on(backend, layers):
    return [Layer(*map(backend.array, layer)) for layer in layers]


def off(backend, layers):
    return [Layer(*map(backend.numpy, layer)) for layer in layers]


@pytest.mark.parametrize("small_blocks", [False, True])
@pytest.mark.parametrize("product", [hvp, ggnvp, fisher_vp])
@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_every_library_agrees_with_numpy(loss, product, small_blocks, backend, monkeypatch):
    problem = make_problem(activation="silu", loss=loss, weighted=True)
    v = vector_like(problem)
    expected = run(product, problem, v)
    if small_blocks:  # of two rows, three and one
        monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 2 * 10 * 11 * 8)
    got = run(product, problem.map(backend.array), on(backend, v))
    assert all(type(layer) is Layer for layer in got)
    assert_grads_close(off(backend, got), expected, 1e-12)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_on_every_library(activation, backend):
    problem = make_problem(activation=activation)
    v, u = vector_like(problem), outputs_of(problem)
    placed, net = problem.map(backend.array), {"activation": activation}
    got = run(hvp, placed, on(backend, v))
    assert_grads_close(off(backend, got), run(hvp, problem, v), 1e-12)
    got = jvp(placed.params, placed.X, on(backend, v), **net)
    assert_close(backend.numpy(got), jvp(problem.params, problem.X, v, **net), 1e-12)
    got = vjp(placed.params, placed.X, backend.array(u), **net)
    assert_grads_close(off(backend, got), vjp(problem.params, problem.X, u, **net), 1e-12)


def test_jacobian_products_in_small_blocks(backend, monkeypatch):
    problem = make_problem(n=5)
    v, u = vector_like(problem), outputs_of(problem)
    whole = jvp(problem.params, problem.X, v), vjp(problem.params, problem.X, u)
    monkeypatch.setattr(row_blocks, "BLOCK_BYTES", 2 * 10 * 11 * 8)
    X = backend.array(problem.X)
    params = on(backend, problem.params)
    assert_close(backend.numpy(jvp(params, X, on(backend, v))), whole[0], 1e-13)
    assert_grads_close(off(backend, vjp(params, X, backend.array(u))), whole[1], 1e-13)


@pytest.mark.parametrize("product", [hvp, ggnvp])
@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), (18, 4, 1)])
def test_tiles_and_threads_of_the_numpy_engine(sizes, product, monkeypatch):
    names = ["sigmoid"] * (len(sizes) - 2) + ["identity"]
    problem = make_problem(sizes, n=103, activation=names, weighted=True)
    v = vector_like(problem)
    whole = run(product, problem, v)
    for name in ("TILE_BYTES", "WIDE_TILE_BYTES"):
        monkeypatch.setattr(numpy_products, name, 7 * 4 * 8 * 10)
    monkeypatch.setattr(numpy_products, "LEAST_ROWS", 2)
    assert_grads_close(run(product, problem, v), whole, 1e-13)
    monkeypatch.setattr(numpy_products, "SHORT_PASS", 0.0)
    by_threads = []
    for n_threads in "134":
        monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", n_threads)
        by_threads.append(ravel_params(run(product, problem, v)))
        assert_array_equal(by_threads[-1], by_threads[0])
    assert_close(by_threads[0], ravel_params(whole), 1e-13)


@pytest.mark.parametrize("product", [hvp, ggnvp, fisher_vp])
def test_the_numpy_engine_is_the_derivation(product, monkeypatch):
    problem = make_problem(activation=["relu", "sigmoid", "tanh"], weighted=True)
    v = vector_like(problem)
    expected = run(product, problem, v)
    monkeypatch.setattr(numpy_products, "tiled_product_sums", tangents.product_sums)
    assert_grads_close(run(product, problem, v), expected, 1e-13)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_results_are_like_the_parameters(dtype, reduction, backend):
    problem = make_problem(dtype=dtype, weighted=True)
    v = on(backend, vector_like(problem, dtype=dtype))
    u = backend.array(outputs_of(problem).astype(dtype))
    placed = problem.map(backend.array)
    results = [run(product, placed, v, reduction=reduction) for product in (hvp, ggnvp, fisher_vp)]
    results.append(vjp(placed.params, placed.X, u))
    for result in results:
        assert type(result) is list
        for layer, like in zip(result, placed.params, strict=True):
            for A, B in zip(layer, like, strict=True):
                assert type(A) is type(B)
                assert (A.shape, A.dtype) == (B.shape, B.dtype)
    Jv = jvp(placed.params, placed.X, v)
    assert (type(Jv), Jv.dtype) == (type(u), u.dtype)
    assert tuple(Jv.shape) == (7, 4)


@pytest.mark.parametrize("product", [ggnvp, fisher_vp])
def test_half_precision_forms_the_loss_part_in_float32(product):
    """exp(12) is beyond float16, a thousandth of it, A V, is not; with a weight, and without."""
    half = np.float16
    params = [(np.full((1, 1), 12, half), np.zeros(1, half))]
    X, y, v = (
        np.ones((1, 1), half),
        np.ones((1, 1), half),
        [(np.zeros((1, 1), half), np.full(1, 0.001, half))],
    )
    expected = np.exp(12) * float(v[0][1][0])
    for weight in (None, np.full(1, 0.25, half)):
        got = product(params, X, y, v, loss="poisson", reduction="sum", sample_weight=weight)
        assert_close(got[0].b, np.array([expected * (1 if weight is None else 0.25)]), 2e-3)


def test_half_precision_sums_in_float32():
    torch = pytest.importorskip("torch")
    problem = make_problem((3, 4, 2), 30_000, dtype=np.float32)
    v = vector_like(problem, dtype=np.float32)
    half = problem.map(lambda A: torch.tensor(A).half())
    along = [Layer(*(torch.tensor(A).half() for A in layer)) for layer in v]
    for product in (hvp, ggnvp):
        got = run(product, half, along)
        assert all(A.dtype == torch.float16 for layer in got for A in layer)
        expected = run(product, problem, v)
        assert_grads_close([map(np.asarray, layer) for layer in got], expected, 2e-2)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss, weighted, backend):
    problem = make_problem(n=0, loss=loss, weighted=weighted)
    v = vector_like(problem)
    placed, along = problem.map(backend.array), on(backend, v)
    for product in (hvp, ggnvp, fisher_vp):
        for layer in off(backend, run(product, placed, along, reduction="sum")):
            assert not np.any(layer.W)
            assert not np.any(layer.b)
    assert backend.numpy(jvp(placed.params, placed.X, along)).shape == (0, 4)
    u = backend.array(np.zeros((0, 4)))
    assert not np.any(ravel_params(off(backend, vjp(placed.params, placed.X, u))))


def test_awkward_memory():
    problem = make_problem((3, 5, 2), n=9, weighted=True)
    v = vector_like(problem)
    expected = run(hvp, problem, v)

    def awkward(A):
        A = np.repeat(np.asfortranarray(A)[::-1], 2, axis=0)[::-2]
        A.flags.writeable = False
        return A

    got = run(hvp, problem.map(awkward), [Layer(*map(awkward, layer)) for layer in v])
    assert_grads_close(got, expected, 1e-14)


def test_lists_and_a_named_backend():
    torch = pytest.importorskip("torch")
    params, X, y, v = [([[2]], [1])], [[3]], [[5]], [([[1]], [0])]
    assert hvp(params, X, y, v)[0].W == 18
    problem = make_problem()
    v = vector_like(problem)
    got = run(hvp, problem, v, backend="torch")
    assert all(isinstance(A, torch.Tensor) for layer in got for A in layer)
    assert_grads_close(got, run(hvp, problem, v), 1e-12)


def test_results_are_the_callers_own():
    problem = make_problem(activation="sigmoid")
    v, w = vector_like(problem, 1), vector_like(problem, 2)
    first = run(hvp, problem, v)
    kept = ravel_params(first).copy()
    run(hvp, problem, w)
    assert_array_equal(ravel_params(first), kept)


def test_calls_from_many_threads_at_once():
    problems = [make_problem((2, 5, 3), n=50 + i, seed=i) for i in range(8)]
    expected = [run(hvp, p, vector_like(p)) for p in problems]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda p: run(hvp, p, vector_like(p)), problems * 10))
    for i, layers in enumerate(got):
        assert_array_equal(ravel_params(layers), ravel_params(expected[i % 8]))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", "1")
    problem = make_problem((2, 10, 5, 1), 200_000)
    v = vector_like(problem)
    for product in (hvp, ggnvp):
        peak = peak_bytes(lambda product=product: run(product, problem, v))
        assert peak < 3 * numpy_products.TILE_BYTES < problem.X[:, :1].nbytes * 10 / 2


# Kinks -------------------------------------------------------------------------------------------


def at_zero(name, bias=0.0):
    """A net whose hidden Z are all this number."""
    problem = make_problem((2, 3, 1), activation=name)
    (W, b), last = problem.params
    return problem._replace(params=[(0 * W, 0 * b + bias), last])


@pytest.mark.parametrize("name", ["relu", "leaky_relu"])
def test_at_the_kink_of_an_activation_as_torch(name):
    problem = at_zero(name)
    v = vector_like(problem)
    J, H, G = torch_matrices(problem, "mean")
    assert_product(run(hvp, problem, v), H, v)
    assert_product(run(ggnvp, problem, v), G, v)
    assert_close(
        jvp(problem.params, problem.X, v, activation=name).reshape(-1), J @ ravel_params(v)
    )


def test_at_the_kink_of_elu_the_second_derivative_is_that_from_the_left():
    problem = at_zero("elu")
    v = vector_like(problem)
    assert_grads_close(run(hvp, problem, v), run(hvp, at_zero("elu", -1e-9), v), 1e-8)
    right = ravel_params(run(hvp, at_zero("elu", 1e-9), v))
    assert np.max(np.abs(ravel_params(run(hvp, problem, v)) - right)) > 0.1


@pytest.mark.parametrize("loss", ["huber", "absolute_error"])
def test_at_the_kink_of_a_loss_the_second_derivative_is_zero(loss):
    # One weight, x = 1: r = w - y. Between the kinks huber'' is 1.
    for residual in (-1.0, 1.0, 0.0):
        args = [([[residual]], [0.0])], [[1.0]], [[0.0]], [([[1.0]], [0.0])]
        got = hvp(*args, loss=loss)[0].W
        assert got == (1.0 if loss == "huber" and residual == 0 else 0.0)


# Bad input ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("product", [hvp, ggnvp, fisher_vp])
def test_v_without_the_structure_of_params_is_refused(product):
    problem = make_problem((3, 5, 2))
    v = vector_like(problem)
    for wrong, error, message in [
        (v[:1], ValueError, "v must have the shapes of params"),
        ([(W.T, b) for W, b in v], ValueError, "v must have the shapes of params"),
        ([(W, b[:, None]) for W, b in v], ValueError, "v must have the shapes of params"),
        ([W for W, _ in v], TypeError, "layer 1 in v must be a pair"),
        (ravel_params(v), TypeError, "v must be a sequence"),
        ([(W.astype(np.float32), b) for W, b in v], TypeError, "W of layer 1 in v has dtype float"),
        ([(W + 0j, b) for W, b in v], TypeError, "W of layer 1 in v must hold real numbers"),
    ]:
        with pytest.raises(error, match=message):
            run(product, problem, wrong)
        with pytest.raises(error, match=message):
            jvp(problem.params, problem.X, wrong)


def test_u_of_another_shape_than_the_outputs_is_refused():
    problem = make_problem((3, 5, 2))
    for u in (np.zeros(7), np.zeros((7, 1)), np.zeros((2, 7)), np.zeros((6, 2)), np.zeros(())):
        with pytest.raises(ValueError, match=r"u must have the shape of the outputs, \(7, 2\)"):
            vjp(problem.params, problem.X, u)
    with pytest.raises(TypeError, match="u has dtype float32"):
        vjp(problem.params, problem.X, np.zeros((7, 2), np.float32))


def test_v_of_another_library_is_refused():
    torch = pytest.importorskip("torch")
    problem = make_problem((3, 2))
    v = [Layer(*map(torch.tensor, layer)) for layer in vector_like(problem)]
    with pytest.raises(TypeError, match="W of layer 1 in v a torch array"):
        run(hvp, problem, v)


def test_logits_with_an_output_activation_and_other_options_are_checked():
    for loss in TAKE_LOGITS:
        problem = make_problem(activation=["tanh"] * 3, loss=loss)
        with pytest.raises(ValueError, match="takes logits"):
            run(hvp, problem, vector_like(problem))
    problem = make_problem(n=0)
    with pytest.raises(ValueError, match="mean over none"):
        run(ggnvp, problem, vector_like(problem))


# Mutants -----------------------------------------------------------------------------------------

# Square layers, so that a transposed W keeps its shape.
MUTANT = {"activation": ("sigmoid", "silu", "tanh"), "weighted": True}


def wrong_second_derivative(monkeypatch, factor):
    row = activations.ACTIVATIONS["silu"]
    wrong = row._replace(d2f=lambda xp, Z, H: factor * row.d2f(xp, Z, H))
    monkeypatch.setitem(activations.ACTIVATIONS, "silu", wrong)


def wrong_loss_hessian(monkeypatch):
    row = losses.LOSSES["squared_error"]
    wrong = row._replace(hessian_product=lambda xp, H, Y, V: 2.002 * V)
    monkeypatch.setitem(losses.LOSSES, "squared_error", wrong)


def wrong_steps(monkeypatch, change):
    right = tangents.tangents
    monkeypatch.setattr(
        tangents,
        "tangents",
        lambda spec, params, v, X: map(change, right(spec, params, v, X)),
    )


def other_v_going_up(monkeypatch, change):
    right = tangents.tangents
    monkeypatch.setattr(
        tangents,
        "tangents",
        lambda spec, params, v, X: right(spec, params, [Layer(*change(*p)) for p in v], X),
    )


def without_weights(monkeypatch):
    right = tangents.at_outputs
    monkeypatch.setattr(
        tangents,
        "at_outputs",
        lambda spec, product, H, y, weight, V: right(spec, product, H, y, None, V),
    )


MUTANTS = {
    "f'' wrong by 0.1 %": lambda patch: wrong_second_derivative(patch, 1.001),
    "f'' dropped": lambda patch: wrong_second_derivative(patch, 0),
    "Hessian of the loss wrong by 0.1 %": wrong_loss_hessian,
    "H_{l-1} for dH_{l-1} in (V5)": lambda patch: wrong_steps(
        patch, lambda step: step._replace(dH_below=step.H_below)
    ),
    "dH_{l-1} dropped from (V5)": lambda patch: wrong_steps(
        patch, lambda step: step._replace(dH_below=0 * step.H_below)
    ),
    "dZ without f'": lambda patch: wrong_steps(patch, lambda step: step._replace(dZ=step.dH)),
    "c dropped": lambda patch: other_v_going_up(patch, lambda V, c: (V, 0 * c)),
    "V transposed": lambda patch: other_v_going_up(patch, lambda V, c: (V.T, c)),
    "weights left out of A": without_weights,
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_hessian_product_is_caught(mutant, monkeypatch, nothing_seen):
    problem = make_problem((3, 3, 3, 3), **MUTANT)
    v = vector_like(problem)
    expected = difference_of_grads(problem, v)
    monkeypatch.setattr(
        numpy_products, "tiled_product_sums", lambda *args: tangents.product_sums(*args)
    )
    assert_grads_close(run(hvp, problem, v), expected, 1e-7)
    MUTANTS[mutant](monkeypatch)
    nothing_seen()
    with pytest.raises(AssertionError, match="of layer"):
        assert_grads_close(run(hvp, problem, v), expected, 1e-4)


def test_unravel_is_the_inverse_that_these_tests_rely_on():
    problem = make_problem()
    x = ravel_params(problem.params)
    assert_grads_close(unravel_params(x, problem.params), problem.params, 0)

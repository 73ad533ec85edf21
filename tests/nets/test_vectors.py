"""Parameters as one vector, and back; SciPy's optimisers on them."""

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from oracles import make_problem

from mlp_backprop import Layer, compute_grads, forward, init_params
from mlp_backprop.derivatives.products import vjp
from mlp_backprop.nets.vectors import ravel_params, unravel_params


def test_the_order_is_weights_by_row_then_biases():
    params = [([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], [7.0, 8.0, 9.0]), ([[10, 11, 12]], [13])]
    assert_array_equal(ravel_params(params), np.arange(1.0, 14.0))


def test_the_order_is_that_of_torch():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    expected = torch.nn.utils.parameters_to_vector(model.parameters())
    got = ravel_params([(m.weight, m.bias) for m in model if hasattr(m, "weight")])
    assert torch.equal(got, expected.detach())


@pytest.mark.parametrize("in_front", [(), (4,), (2, 3), (0,), (0, 2)])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_there_and_back(dtype, in_front, backend):
    params = make_problem((3, 5, 2, 4)).params
    rng = np.random.default_rng(1)
    stacks = [
        [rng.normal(size=(*in_front, *A.shape)).astype(dtype) for A in layer] for layer in params
    ]
    x = ravel_params([tuple(map(backend.array, layer)) for layer in stacks])
    assert tuple(x.shape) == (*in_front, 3 * 5 + 5 + 5 * 2 + 2 + 2 * 4 + 4)
    back = unravel_params(x, params)
    assert type(back[0]) is Layer
    for layer, like in zip(back, stacks, strict=True):
        for A, B in zip(layer, like, strict=True):
            assert A.dtype == x.dtype
            assert_array_equal(backend.numpy(A), B)


def test_ravel_copies_and_unravel_does_not():
    params = init_params([2, 1])
    x = ravel_params(params)
    x[0] = 7.0
    assert params[0].W[0, 0] != 7.0
    unravel_params(x, params)[0].W[0, 1] = 8.0
    assert x[1] == 8.0


def test_transposed_and_strided_arrays_are_read_row_by_row():
    W = np.arange(6.0).reshape(2, 3)
    x = ravel_params([(np.asfortranarray(W), np.arange(4.0)[::2])])
    assert_array_equal(x, [0, 1, 2, 3, 4, 5, 0, 2])


def test_what_does_not_fit_is_refused():
    params = init_params([2, 3, 1])
    with pytest.raises(ValueError, match=r"x must have shape \(..., 13\), as many .* got \(12,\)"):
        unravel_params(np.zeros(12), params)
    with pytest.raises(ValueError, match=r"got \(\)"):
        unravel_params(np.zeros(()), params)
    with pytest.raises(TypeError, match="x must have a floating dtype"):
        unravel_params(np.zeros(13, int), params)
    with pytest.raises(TypeError, match="params must be a sequence"):
        unravel_params(np.zeros(13), np.zeros(13))
    W, b = params[0]
    for layers in ([(W, b[:2])], [(W, b[None])], [(W[None], b[None]), (W, b)], [(b, b[0])]):
        with pytest.raises(ValueError, match="needs W of shape"):
            ravel_params(layers)
    with pytest.raises(TypeError, match="float32"):
        ravel_params([(W, b.astype(np.float32))])


# SciPy -------------------------------------------------------------------------------------------


def test_minimize():
    optimize = pytest.importorskip("scipy.optimize")
    problem = make_problem((2, 4, 3), n=30)
    params, X, y = problem.params, problem.X, problem.y

    def fun(x):
        loss, grads = compute_grads(unravel_params(x, params), X, y, activation="tanh")
        return loss, ravel_params(grads)

    x0 = ravel_params(params)
    assert optimize.check_grad(lambda x: fun(x)[0], lambda x: fun(x)[1], x0) < 1e-6
    found = optimize.minimize(fun, x0, jac=True, options={"maxiter": 100})
    assert found.fun < fun(x0)[0] / 2


def test_least_squares():
    optimize = pytest.importorskip("scipy.optimize")
    params = init_params([1, 5, 1], rng=0)
    X = np.linspace(-2, 2, 40)[:, None]
    y = np.sin(2 * X)

    def fun(x):
        return (forward(unravel_params(x, params), X, activation="tanh") - y)[:, 0]

    def jac(x):
        net = unravel_params(x, params)
        rows = (vjp(net, X[i : i + 1], [[1.0]], activation="tanh") for i in range(len(X)))
        return np.stack([ravel_params(row) for row in rows])

    found = optimize.least_squares(fun, ravel_params(params), jac=jac)
    assert found.success
    assert np.max(np.abs(fun(found.x))) < 0.1

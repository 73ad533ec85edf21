"""What check_grads holds the other derivatives to: one row per public function.

Each function is called with the caller's own arrays, and its result, or a product of it with a
random direction, compared with central differences, in float64, of what it is the derivative of;
a few with the sums or norms of another row, where nothing is left to differentiate. Directions
have entries ±1 and ±1/2 times a power of 2, which every floating dtype holds exactly.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.derivatives import curvature, inputs, per_sample, products, residuals
from mlp_backprop.derivatives.gradients import compute_grads
from mlp_backprop.edge import backends
from mlp_backprop.edge.arguments import Argument, Location, dtype_name
from mlp_backprop.edge.validation import Problem
from mlp_backprop.nets.vectors import ravel_params
from mlp_backprop.types import Array, Layer, Namespace, Params

# A step across a kink (relu) makes a difference wrong; a smaller one need not cross it. The first
# is near the best for smooth functions, the cube root of the rounding unit.
STEPS = (6e-6, 6e-7, 6e-8)

MOST_ENTRIES = 8  # columns, or pairs of columns, of X that second derivatives are taken for

Pair = tuple[Array, Array]  # got, expected


class Case(NamedTuple):
    """A problem twice: as it was passed, and in float64 on the host."""

    params: Params
    X: Array
    y: Array
    options: dict[str, Any]  # activation, loss, sample_weight, backend
    placed: Problem
    host: Problem
    rng: np.random.Generator

    @property
    def net_options(self) -> dict[str, Any]:
        """Those of functions without a loss."""
        return {name: self.options[name] for name in ("activation", "backend")}

    @property
    def host_net_options(self) -> dict[str, Any]:
        """The same for calls on the host."""
        return {"activation": [row.name for row in self.host.spec.activations]}

    @property
    def host_options(self) -> dict[str, Any]:
        """All of them for calls on the host."""
        own = {"loss": self.host.spec.loss.name, "sample_weight": self.host.weight}
        return self.host_net_options | own

    def numpy(self, array: Array) -> Array:
        """A result on the host, in float64."""
        return backends.to_numpy(self.placed.spec.xp, array).astype(float)

    def numpy_layers(self, layers: list[Layer]) -> list[Layer]:
        return [Layer(self.numpy(W), self.numpy(b)) for W, b in layers]

    def ours(self, array: Array) -> Array:
        """An array from the host in the library and dtype of the problem."""
        xp, X = self.placed.spec.xp, self.placed.X
        home = Location(xp, backends.device_of(xp, X))
        return home.place(Argument("direction", array, np), dtype_name(self.placed.spec.dtype))

    def direction(self, shape: tuple[int, ...], scale: float = 1.0) -> Array:
        """A random one on the host."""
        exact = 2.0 ** np.round(np.log2(scale))
        return exact * self.rng.choice([-1.0, -0.5, 0.5, 1.0], shape)

    def params_direction(self) -> list[Layer]:
        """One that changes every Z about equally much."""
        return [
            Layer(self.direction(W.shape, 1 / W.shape[1] ** 0.5), self.direction(b.shape))
            for W, b in self.host.params
        ]

    def ours_layers(self, layers: list[Layer]) -> list[Layer]:
        return [Layer(self.ours(W), self.ours(b)) for W, b in layers]

    def moved(self, v: list[Layer], t: float) -> list[Layer]:
        """The parameters, t along v."""
        return [
            Layer(W + t * V, b + t * c) for (W, b), (V, c) in zip(self.host.params, v, strict=True)
        ]

    def outputs(self, params: list[Layer], X: Array) -> Array:
        return backprop.forward(self.host.spec, params, X)[1][-1]

    def losses(self, params: list[Layer], X: Array) -> Array:
        """Of every sample, times its weight."""
        return sample_losses(self.host._replace(params=params, X=X))


def sample_losses(host: Problem) -> Array:
    """Weighted loss per sample (n,)."""
    spec, params, X, y, weight = host
    _, H = backprop.forward(spec, params, X)
    return backprop.loss_and_output_grad(spec, H[-1], y, weight)[0]


def slope(got: Array, f: Callable[[float], Array]) -> Array:
    """f'(0) by differences; of several tries, entry by entry the one nearest to what was got.

    What was got itself, where it lies within the rounding errors of a difference.
    """
    here, tries = f(0.0), []
    for step in STEPS:
        above, below = f(step), f(-step)
        tries.append((above - below) / (2 * step))
    # On a kink the derivative is that of one side.
    tries += [(above - here) / step, (here - below) / step]
    errors = np.abs(np.stack(tries) - got)
    errors = np.where(np.isnan(errors), np.inf, errors)
    nearest = np.take_along_axis(np.stack(tries), np.argmin(errors, axis=0)[None], axis=0)[0]
    rounding = 8 * np.finfo(float).eps * np.max(np.abs(here), initial=0.0) / STEPS[0]
    return np.where(np.min(errors, axis=0) <= rounding, got, nearest)


def along(layers: list[Layer], v: list[Layer]) -> Array:
    """The product with a vector of the parameters' structure, over the trailing axes."""
    return ravel_params(layers) @ ravel_params(v)


def _per_sample_grads(case: Case) -> Iterator[Pair]:
    grads = per_sample.per_sample_grads(case.params, case.X, case.y, **case.options)
    v = case.params_direction()
    got = along(case.numpy_layers(grads), v)
    yield got, slope(got, lambda t: case.losses(case.moved(v, t), case.host.X))


def _host_rows(case: Case) -> Array:
    """The gradients of the samples, (n, P)."""
    _, params, X, y, _ = case.host
    return ravel_params(per_sample.per_sample_grads(params, X, y, **case.host_options))


def _per_sample_grad_norms(case: Case) -> Iterator[Pair]:
    got = case.numpy(per_sample.per_sample_grad_norms(case.params, case.X, case.y, **case.options))
    norms = np.linalg.norm(_host_rows(case), axis=1)
    # A norm whose square overflows is inf, and no error.
    as_it_should = np.isinf(got) & _overflow(case, norms)
    yield np.where(as_it_should, 0, got), np.where(as_it_should, 0, norms)


def _overflow(case: Case, norms: Array) -> Array:
    """Where the squares of norms leave the range of the dtype that they are summed in."""
    spec = case.placed.spec
    largest = float(spec.xp.finfo(backprop.accumulator_dtype(spec)).max)
    return norms > (1 - 1e-3) * np.sqrt(largest)


def _clipped_grads(case: Case) -> Iterator[Pair]:
    rows = _host_rows(case)
    norms = np.linalg.norm(rows, axis=1)
    max_norm = float(np.median(norms)) if len(norms) else 0.0
    max_norm = max_norm or 1.0
    _, grads = per_sample.clipped_grads(
        case.params, case.X, case.y, max_norm=max_norm, reduction="sum", **case.options
    )
    factors = np.minimum(1.0, max_norm / np.maximum(norms, max_norm))
    factors[_overflow(case, norms)] = 0
    yield ravel_params(case.numpy_layers(grads)), factors @ rows


def _input_grads(case: Case) -> Iterator[Pair]:
    dX = inputs.input_grads(case.params, case.X, case.y, reduction="sum", **case.options)
    U = case.direction(case.host.X.shape)
    got = np.sum(case.numpy(dX) * U, axis=1)
    yield got, slope(got, lambda t: case.losses(case.host.params, case.host.X + t * U))


def _jacobian(case: Case) -> Iterator[Pair]:
    params, X = case.host.params, case.host.X
    J = case.numpy(inputs.jacobian(case.params, case.X, **case.net_options))
    U, v = case.direction(X.shape), case.params_direction()
    got = np.einsum("noi,ni->no", J, U)
    yield got, slope(got, lambda t: case.outputs(params, X + t * U))
    layers = inputs.jacobian(case.params, case.X, wrt="params", **case.net_options)
    got = along(case.numpy_layers(layers), v)
    yield got, slope(got, lambda t: case.outputs(case.moved(v, t), X))


def _second(case: Case, got: Array, j: int, k: int) -> Array:
    """d²Y / dX_j dX_k (n, d_L), by differences of the Jacobian."""
    X = case.host.X
    e = np.eye(X.shape[1])[j]

    def column(t: float) -> Array:
        J: Array = inputs.jacobian(case.host.params, X + t * e, **case.host_net_options)
        return J[:, :, k]

    return slope(got, column)


def _some(case: Case, n_entries: int) -> list[int]:
    count = min(n_entries, MOST_ENTRIES)
    return [int(i) for i in case.rng.choice(n_entries, count, replace=False)]


def _input_hessian_diag(case: Case) -> Iterator[Pair]:
    diag = case.numpy(inputs.input_hessian_diag(case.params, case.X, **case.net_options))
    columns = _some(case, diag.shape[2])
    got = diag[:, :, columns]
    yield got, np.stack([_second(case, diag[:, :, k], k, k) for k in columns], axis=2)


def _input_hessian_entries(case: Case) -> Iterator[Pair]:
    n_in = case.host.X.shape[1]
    pairs = [(k // n_in, k % n_in) for k in _some(case, n_in * n_in)]
    got = inputs.input_hessian_entries(case.params, case.X, pairs, **case.net_options)
    got = case.numpy(got)
    expected = [_second(case, got[:, :, p], j, k) for p, (j, k) in enumerate(pairs)]
    yield got, np.stack(expected, axis=2)


def _laplacian(case: Case) -> Iterator[Pair]:
    params, X = case.host.params, case.host.X
    got = case.numpy(inputs.laplacian(case.params, case.X, **case.net_options))
    yield got, inputs.input_hessian_diag(params, X, **case.host_net_options).sum(axis=2)


def _sobolev_grads(case: Case) -> Iterator[Pair]:
    _, params, X, y, _ = case.host
    dy = case.direction((X.shape[0], params[-1].b.shape[0], X.shape[1]))
    fit = partial(residuals.sobolev_grads, slope_weight=0.5, reduction="sum")
    grads = fit(case.params, case.X, case.y, case.ours(dy), **case.options).grads

    def loss(params: list[Layer]) -> Array:
        return fit(params, X, y, dy, **case.host_options).loss

    yield _along_loss(case, grads, loss)


def _along_loss(case: Case, grads: list[Layer], loss: Callable[[list[Layer]], Array]) -> Pair:
    v = case.params_direction()
    got = along(case.numpy_layers(grads), v)
    return got, slope(got, lambda t: np.asarray(loss(case.moved(v, t))))


def _some_residual(xp: Namespace) -> residuals.Residual:
    """Σ_o y_o (y_o / 2 + Σ_k dy_o/dx_k + lap_o): no partial derivative of it is constant."""

    def residual(X: Array, Y: Array, dY: Array, lap: Array) -> Any:
        r_Y = Y + xp.sum(dY, axis=2) + lap
        r = xp.sum(Y * (r_Y - Y / 2), axis=1)
        r_dY = Y[:, None, :, None] + xp.zeros_like(dY)[:, None, :, :]
        return r[:, None], (r_Y[:, None, :], r_dY, Y[:, None, :])

    return residual


def _residual_grads(case: Case) -> Iterator[Pair]:
    weight = case.options["sample_weight"]
    _, grads = residuals.residual_grads(
        case.params,
        case.X,
        _some_residual(case.placed.spec.xp),
        reduction="sum",
        sample_weight=weight,
        **case.net_options,
    )

    def loss(params: list[Layer]) -> Array:
        options = case.host_net_options | {"sample_weight": case.host.weight, "reduction": "sum"}
        return residuals.residual_grads(params, case.host.X, _some_residual(np), **options).loss

    yield _along_loss(case, grads, loss)


def _jvp(case: Case) -> Iterator[Pair]:
    v = case.params_direction()
    got = case.numpy(products.jvp(case.params, case.X, case.ours_layers(v), **case.net_options))
    yield got, slope(got, lambda t: case.outputs(case.moved(v, t), case.host.X))


def _vjp(case: Case) -> Iterator[Pair]:
    u = case.direction((case.host.X.shape[0], case.host.params[-1].b.shape[0]))
    grads = products.vjp(case.params, case.X, case.ours(u), **case.net_options)
    yield _along_loss(case, grads, lambda params: np.sum(u * case.outputs(params, case.host.X)))


def _gradient_along(case: Case, got: Array, v: list[Layer]) -> Array:
    """The Hessian of the summed loss times v (P,), by differences of the gradient."""
    _, _, X, y, _ = case.host
    options = case.host_options | {"reduction": "sum"}
    return slope(
        got, lambda t: ravel_params(compute_grads(case.moved(v, t), X, y, **options).grads)
    )


def _vector_product(case: Case, function: Callable[..., list[Layer]]) -> tuple[Array, list[Layer]]:
    v = case.params_direction()
    product = function(
        case.params, case.X, case.y, case.ours_layers(v), reduction="sum", **case.options
    )
    return ravel_params(case.numpy_layers(product)), v


def _hvp(case: Case) -> Iterator[Pair]:
    got, v = _vector_product(case, products.hvp)
    yield got, _gradient_along(case, got, v)


def _through_outputs(case: Case, v: list[Layer], fisher: bool) -> Array:
    """Jᵀ A J v on the host; A by differences of dE/dH_L, or from the table for a Fisher matrix."""
    spec, params, X, y, weight = case.host
    H_L = case.outputs(params, X)
    dH = products.jvp(params, X, v, **case.host_net_options)
    if fisher:
        AdH = spec.loss.fisher_product(np, H_L, y, dH)
        AdH = AdH if weight is None else weight[:, None] * AdH
    else:
        expected = spec.loss.hessian_product(np, H_L, y, dH)
        expected = expected if weight is None else weight[:, None] * expected
        AdH = slope(
            expected,
            lambda t: backprop.loss_and_output_grad(spec, H_L + t * dH, y, weight)[1],
        )
    return ravel_params(products.vjp(params, X, AdH, **case.host_net_options))


def _ggnvp(case: Case) -> Iterator[Pair]:
    got, v = _vector_product(case, products.ggnvp)
    yield got, _through_outputs(case, v, fisher=False)


def _fisher_vp(case: Case) -> Iterator[Pair]:
    got, v = _vector_product(case, products.fisher_vp)
    yield got, _through_outputs(case, v, fisher=True)


def _matrix_product(case: Case, function: Callable[..., Array]) -> tuple[Array, list[Layer]]:
    v = case.params_direction()
    matrix = function(case.params, case.X, case.y, reduction="sum", **case.options)
    return case.numpy(matrix) @ ravel_params(v), v


def _hessian(case: Case) -> Iterator[Pair]:
    got, v = _matrix_product(case, curvature.hessian)
    yield got, _gradient_along(case, got, v)


def _ggn(case: Case) -> Iterator[Pair]:
    got, v = _matrix_product(case, curvature.ggn)
    yield got, _through_outputs(case, v, fisher=False)


def _ntk(case: Case) -> Iterator[Pair]:
    params, X = case.host.params, case.host.X
    got = case.numpy(curvature.ntk(case.params, case.X, case.X, **case.net_options))
    J = ravel_params(inputs.jacobian(params, X, wrt="params", **case.host_net_options))
    yield got, np.einsum("iap,jbp->iajb", J, J)


def error(got: Array, expected: Array) -> float:
    """The largest difference, over the largest entry."""
    size = max(np.max(np.abs(A), initial=0.0) for A in (got, expected))
    return float(np.max(np.abs(got - expected), initial=0.0) / (size or 1.0))


Check = Callable[[Case], Iterator[Pair]]

CHECKS: dict[str, Check] = {
    "per_sample_grads": _per_sample_grads,
    "per_sample_grad_norms": _per_sample_grad_norms,
    "clipped_grads": _clipped_grads,
    "input_grads": _input_grads,
    "jacobian": _jacobian,
    "input_hessian_diag": _input_hessian_diag,
    "input_hessian_entries": _input_hessian_entries,
    "laplacian": _laplacian,
    "sobolev_grads": _sobolev_grads,
    "residual_grads": _residual_grads,
    "jvp": _jvp,
    "vjp": _vjp,
    "hvp": _hvp,
    "ggnvp": _ggnvp,
    "fisher_vp": _fisher_vp,
    "hessian": _hessian,
    "ggn": _ggn,
    "ntk": _ntk,
}

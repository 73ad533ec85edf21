"""The gradient checker: central differences in float64, and torch autograd when asked.

The other derivatives are held to differences in checks/derivatives.py.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Unpack

import numpy as np

from mlp_backprop import backprop
from mlp_backprop.checks import derivatives
from mlp_backprop.checks.derivatives import CHECKS, STEPS, sample_losses
from mlp_backprop.derivatives.gradients import compute_grads
from mlp_backprop.edge import backends, validation
from mlp_backprop.edge.arguments import dtype_name, generator, read_params, table_row
from mlp_backprop.edge.calls import public
from mlp_backprop.types import Array, ArrayLike, Layer, LossOptions, Params, Reduction, flat

# From a problem on the host, entries and what was got: what it should have been at these entries.
Reference = Callable[[validation.Problem, list[Array], list[Array]], list[Array]]

# The error of a correct gradient stays under these, with a wide margin; a derivative that is
# wrong by a tenth of a percent does not.
TOLERANCES = {"float64": 1e-6, "float32": 2e-4, "float16": 2e-2, "bfloat16": 1e-1}


@public
def check_grads(
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    *,
    reduction: Reduction = "mean",
    grads: Params | None = None,
    against: str | Sequence[str] = "differences",
    also: str | Sequence[str] = (),
    tolerance: float | None = None,
    max_entries: int = 2000,
    rng: Any = 0,
    **options: Unpack[LossOptions],
) -> list[Layer]:
    """Compare the gradient with what it should be, and raise if it is not.

    Parameters
    ----------
    params, X, y, activation, loss, reduction, sample_weight, backend
        As for `compute_grads`. Arrays on a device are copied to the host for the comparison.
    grads : sequence of (W, b), optional
        Gradients to check, for someone who derived them by hand. None: those of
        `compute_grads` with the same arguments.
    against : str or sequence of str
        "differences": central differences of the loss in float64, the best of three steps, and
        at a kink the one-sided ones. "torch": torch autograd in float64.
    also : str or sequence of str
        Other functions to check on the same problem, "hvp" or ["jacobian", "laplacian"], say;
        "all" for every one that takes these activations. Each is compared with differences, along
        random directions, of what it is the derivative of.
    tolerance : float, optional
        Largest relative error allowed. None: by the parameters' dtype, 1e-6 for float64, 2e-4
        for float32, 0.02 for float16, 0.1 for bfloat16.
    max_entries : int
        Differences are taken for all entries up to this many parameters, above it for about as
        many, drawn from every array.
    rng : numpy.random.Generator, int or None
        Draws them, and directions, as for numpy.random.default_rng.

    Returns
    -------
    list of Layer
        Per W and b the largest relative error, a float: |got - expected| over the largest entry
        of the array. (An array far smaller than the largest of the gradient, or than the loss,
        is measured by a thousandth, or a ten-thousandth, of that: differences resolve no more.)

    Raises
    ------
    AssertionError
        An error above the tolerance; the message has the worst entry, or the other function.
    ValueError, TypeError, ImportError
        As for `compute_grads`; torch not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import check_grads, init_params
    >>> params = init_params([2, 3, 1], rng=0)
    >>> errors = check_grads(params, np.ones((4, 2)), np.zeros((4, 1)), also="hvp")
    >>> max(error for layer in errors for error in layer) < 1e-8
    True
    """
    problem = validation.problem(params, X, y, reduction=reduction, **options)
    if tolerance is None:
        tolerance = TOLERANCES[dtype_name(problem.spec.dtype)]
    if isinstance(max_entries, bool) or not isinstance(max_entries, int) or max_entries < 1:
        raise ValueError(f"max_entries must be an integer, 1 or more; got {max_entries!r}")
    rng, references, others = generator(rng), _references(against), _others(also, problem)
    if grads is None:
        grads = compute_grads(params, X, y, reduction=reduction, **options).grads
    got, host = _host_grads(grads, problem), _on_host(problem)
    entries = _draw_entries([g.size for g in got], max_entries, rng)
    value = abs(sample_losses(host).sum() / _divisor(host))
    errors = np.zeros(len(got))
    for reference in references:
        expected = reference(host, entries, got)
        errors = np.maximum(errors, _compare(got, expected, entries, value, tolerance))
    case = derivatives.Case(params, X, y, _all_of(options), problem, host, rng)
    for name, check in others.items():
        error = float(np.max([derivatives.error(*pair) for pair in check(case)]))
        if not error <= tolerance:  # nan is not below any tolerance
            raise AssertionError(f"{name}: relative error {error:.2g} above {tolerance:g}")
    return [Layer(float(W), float(b)) for W, b in errors.reshape(-1, 2)]


def _references(against: str | Sequence[str]) -> list[Reference]:
    """The rows of REFERENCES that are named."""
    names = [against] if isinstance(against, str) else list(against)
    if not names:
        raise ValueError(f"against names no reference; known: {', '.join(REFERENCES)}")
    return [table_row("reference", name, REFERENCES) for name in names]


def _all_of(options: LossOptions) -> dict[str, Any]:
    """Those that were not said too: None, which is what every function takes for them."""
    return dict.fromkeys(LossOptions.__annotations__) | dict(options)


def _others(also: str | Sequence[str], problem: validation.Problem) -> dict[str, derivatives.Check]:
    """The rows of CHECKS that are asked for."""
    if also == "all":
        smooth = all(row.d3f is not None for row in problem.spec.activations)
        return {k: check for k, check in CHECKS.items() if smooth or k != "residual_grads"}
    names = [also] if isinstance(also, str) else list(also)
    return {name: table_row("function", name, CHECKS) for name in names}


def _host_grads(grads: Params, problem: validation.Problem) -> list[Array]:
    """Gradients W_1, b_1, W_2, ... as float64 on the host, once they have the right shapes."""
    got = [
        backends.to_numpy(g.xp, g.array).astype(float) for g in flat(read_params(grads, "grads"))
    ]
    shapes, expected = [g.shape for g in got], [tuple(A.shape) for A in flat(problem.params)]
    if shapes != expected:
        raise ValueError(f"grads must have the shapes of the parameters, {expected}, got {shapes}")
    return got


def _on_host(problem: validation.Problem) -> validation.Problem:
    """The same problem in NumPy and float64, on copies that may be changed."""
    xp = problem.spec.xp

    def copy(array: Array) -> Array:
        is_labels = array is problem.y and array.ndim == 1
        return np.array(backends.to_numpy(xp, array), dtype=None if is_labels else float)

    return validation.Problem(
        spec=problem.spec._replace(xp=np, dtype=np.float64),
        params=[Layer(copy(W), copy(b)) for W, b in problem.params],
        X=copy(problem.X),
        y=copy(problem.y),
        weight=None if problem.weight is None else copy(problem.weight),
    )


def _divisor(host: validation.Problem) -> float:
    return float(backprop.divisor(host.spec, backprop.weight_sum(host.spec, host.X, host.weight)))


def _draw_entries(sizes: list[int], limit: int, rng: np.random.Generator) -> list[Array]:
    """Flat indices into each array: all, or a share of the limit and at least ten."""
    total = sum(sizes)
    if total <= limit:
        return [np.arange(size) for size in sizes]
    shares = [min(size, max(10, round(limit * size / total))) for size in sizes]
    return [
        rng.choice(size, share, replace=False) for size, share in zip(sizes, shares, strict=True)
    ]


def _by_differences(
    host: validation.Problem, entries: list[Array], got: list[Array]
) -> list[Array]:
    """Differences at the entries; of several tries, the one nearest to what was got."""
    divisor = _divisor(host)
    here = sample_losses(host)

    def tries(array: Array, index: int) -> Iterator[float]:
        kept = array.flat[index]
        for relative_step in STEPS:
            step = relative_step * max(1.0, abs(kept))
            array.flat[index] = kept + step
            above = sample_losses(host)
            array.flat[index] = kept - step
            below = sample_losses(host)
            array.flat[index] = kept
            # Subtracted sample by sample: the sum of the losses has lost the digits already.
            yield (above - below).sum() / (2 * step * divisor)
        # On a kink the derivative is that of one side.
        yield (above - here).sum() / (step * divisor)
        yield (here - below).sum() / (step * divisor)

    def nearest(array: Array, index: int, target: float) -> float:
        return min(tries(array, index), key=lambda value: abs(value - target))

    arrays = flat(host.params)
    return [
        np.array([nearest(A, i, g.flat[i]) for i in index])
        for A, index, g in zip(arrays, entries, got, strict=True)
    ]


def _by_torch(host: validation.Problem, entries: list[Array], got: list[Array]) -> list[Array]:
    """torch autograd at the entries."""
    backends.namespace("torch")
    from mlp_backprop.checks import torch_reference

    spec, params, X, y, weight = host
    names = [row.name for row in spec.activations]
    _, grads = torch_reference.loss_and_grads(
        params, X, y, weight, names=names, loss=spec.loss.name, reduction=spec.reduction
    )
    return [g.flat[index] for g, index in zip(flat(grads), entries, strict=True)]


REFERENCES = {"differences": _by_differences, "torch": _by_torch}


def _compare(
    got: list[Array], expected: list[Array], entries: list[Array], value: float, tolerance: float
) -> Array:
    """Largest relative error per array; AssertionError with the worst entry."""
    sizes = [max(_largest(g), _largest(e)) for g, e in zip(got, expected, strict=True)]
    floor = max(1e-3 * max(sizes), 1e-4 * value, np.finfo(float).tiny)
    worst = []
    for g, e, index, size in zip(got, expected, entries, sizes, strict=True):
        errors = np.abs(g.flat[index] - e) / max(size, floor)
        k = int(np.argmax(errors))
        worst.append((errors[k], g.shape, index[k], g.flat[index[k]], e[k]))
    errors = np.array([w[0] for w in worst])
    if not np.all(errors <= tolerance):  # nan is not below any tolerance
        k = int(np.argmax(errors))
        error, shape, index, mine, theirs = worst[k]
        place = [int(i) for i in np.unravel_index(index, shape)]
        raise AssertionError(
            f"gradient of {'Wb'[k % 2]} of layer {k // 2 + 1} at {place}: got {mine:.10g}, "
            f"expected {theirs:.10g}; relative error {error:.2g} above {tolerance:g}"
        )
    return errors


def _largest(array: Array) -> float:
    return float(np.max(np.abs(array), initial=0.0))

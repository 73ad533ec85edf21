"""What the answers should be: textbook formulas, ways to differentiate them, and `assert_*`.

The formulas are naive on purpose: no stable rearrangement, nothing of the package. Each takes the
namespace `m` of its argument, so that the same line serves three oracles:

    NumPy, complex    a gradient by complex steps, f(x + ih) = f(x) + ih f'(x): no subtraction, so
                      exact to rounding. Kinks choose their branch by the real part.
    MP, 600 digits    values and derivatives where float64 fails the naive formula
    jax.numpy         jax.grad

`make_problem` makes a net and data to try them on, `problems` one for each of several shapes;
`peak_bytes` says what memory a call takes.
"""

import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace
from typing import Any, NamedTuple

import mpmath
import numpy as np

# In 1 + exp(-709) there are 308 zeros before the digits that matter, and a second difference
# over steps of 1e-100 loses 200 more.
precise = mpmath.mp.clone()
precise.dps = 600
MP = SimpleNamespace(
    pi=precise.pi,
    where=np.where,
    **{name: np.frompyfunc(getattr(precise, name), 1, 1) for name in ("exp", "log", "tanh")},
)


def _sigmoid(m: Any, z: Any) -> Any:
    return 1 / (1 + m.exp(-z))


ACTIVATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "identity": lambda m, z: z,
    "sigmoid": _sigmoid,
    "tanh": lambda m, z: m.tanh(z),
    "relu": lambda m, z: m.where(z.real > 0, z, 0 * z),
    "leaky_relu": lambda m, z: m.where(z.real > 0, z, z / 100),
    "elu": lambda m, z: m.where(z.real > 0, z, m.exp(z) - 1),
    "softplus": lambda m, z: m.log(1 + m.exp(z)),
    "silu": lambda m, z: z * _sigmoid(m, z),
    "gelu_tanh": lambda m, z: z / 2 * (1 + m.tanh((z + 0.044715 * z**3) * (2 / m.pi) ** 0.5)),
}


def _huber(m: Any, r: Any) -> Any:
    size = m.where(r.real > 0, r, -r)
    return m.where(size.real <= 1, r**2 / 2, size - 0.5)


# Outputs h (n, d_L), targets y (n, d_L), class indices one-hot; per sample (n,).
LOSSES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "squared_error": lambda m, h, y: ((h - y) ** 2).sum(1),
    "absolute_error": lambda m, h, y: m.where((h - y).real > 0, h - y, y - h).sum(1),
    "huber": lambda m, h, y: _huber(m, h - y).sum(1),
    "poisson": lambda m, h, y: (m.exp(h) - y * h).sum(1),
    "binary_cross_entropy": lambda m, h, y: (
        -(y * m.log(_sigmoid(m, h)) + (1 - y) * m.log(1 - _sigmoid(m, h))).sum(1)
    ),
    "softmax_cross_entropy": lambda m, h, y: (
        -(y * m.log(m.exp(h) / m.exp(h).sum(1)[:, None])).sum(1)
    ),
}
TAKE_LOGITS = ("poisson", "binary_cross_entropy", "softmax_cross_entropy")


# Derivatives -------------------------------------------------------------------------------------


def central_differences(f: Callable[[np.ndarray], Any], A: np.ndarray, step: float) -> np.ndarray:
    """The gradient of a scalar function at A, entry by entry."""
    grad = np.empty(A.shape, dtype=A.dtype)
    for index in np.ndindex(A.shape):
        above, below = A.copy(), A.copy()
        above[index] += step
        below[index] -= step
        grad[index] = (f(above) - f(below)) / (2 * step)
    return grad


def complex_steps(f: Callable[[np.ndarray], Any], A: np.ndarray) -> np.ndarray:
    """The gradient of a scalar holomorphic function at real A, exact to rounding."""
    step = 1e-30
    grad = np.empty(A.shape)
    for index in np.ndindex(A.shape):
        moved = A.astype(complex)
        moved[index] += 1j * step
        grad[index] = f(moved).imag / step
    return grad


def exact(A: np.ndarray) -> np.ndarray:
    """The same numbers, to 600 digits."""
    return np.frompyfunc(lambda x: precise.mpf(float(x)), 1, 1)(A)


def exact_derivatives(f: Callable[[np.ndarray], np.ndarray], z: np.ndarray) -> list[np.ndarray]:
    """f, f', f'' and f''' of an elementwise function at z, to float64."""
    z, step = exact(z), precise.mpf(10) ** -100
    far_below, below, here, above, far_above = (f(z + k * step) for k in range(-2, 3))
    values = (
        here,
        (above - below) / (2 * step),
        (above - 2 * here + below) / step**2,
        (far_above - 2 * above + 2 * below - far_below) / (2 * step**3),
    )
    return [value.astype(float) for value in values]


def exact_gradient(f: Callable[[np.ndarray], Any], A: np.ndarray) -> np.ndarray:
    """The gradient of a scalar function at A, to float64."""
    return central_differences(f, exact(A), precise.mpf(10) ** -100).astype(float)


# Nets --------------------------------------------------------------------------------------------


class Problem(NamedTuple):
    """Arguments of compute_grads, in NumPy; `options` holds activation, loss and weights."""

    params: list[tuple[Any, Any]]
    X: Any
    y: Any
    options: dict[str, Any]

    def map(self, change: Callable[[Any], Any]) -> "Problem":
        """The same problem with every array changed: placed on a backend, cast, cut."""
        weight = self.options["sample_weight"]
        return Problem(
            params=[(change(W), change(b)) for W, b in self.params],
            X=change(self.X),
            y=change(self.y),
            options=self.options | {"sample_weight": None if weight is None else change(weight)},
        )

    def astype(self, dtype: Any) -> "Problem":
        """The same problem in another floating dtype; class indices stay integers."""
        return self.map(lambda A: A.astype(dtype) if A.dtype.kind == "f" else A)

    @property
    def names(self) -> list[str]:
        """One activation per layer."""
        activation = self.options["activation"]
        hidden = [activation] * (len(self.params) - 1)
        return [*hidden, "identity"] if isinstance(activation, str) else list(activation)


def make_problem(
    sizes: tuple[int, ...] = (3, 5, 2, 4),
    n: int = 7,
    *,
    activation: Any = "tanh",
    loss: str = "squared_error",
    dtype: Any = np.float64,
    weighted: bool = False,
    class_rows: bool = False,
    seed: int = 0,
) -> Problem:
    """A random net and data; weights hold a zero, rows of class weights do not sum to 1."""
    rng = np.random.default_rng(seed)
    params = [
        (rng.normal(size=(n_out, n_in)) / np.sqrt(n_in), rng.normal(size=n_out) / 2)
        for n_in, n_out in pairwise(sizes)
    ]
    weight = rng.uniform(0.5, 2, n) * (np.arange(n) != 1) if weighted else None
    problem = Problem(
        params,
        X=rng.normal(size=(n, sizes[0])),
        y=make_targets(rng, loss, n, sizes[-1], class_rows),
        options={"activation": activation, "loss": loss, "sample_weight": weight},
    )
    return problem.astype(dtype)


# What every compiled pass is tried on: arguments of make_problem.
PROBLEMS: list[dict[str, Any]] = [
    *(
        {"activation": activation, "loss": loss, "weighted": weighted, "n": 9}
        for activation in ACTIVATIONS
        for loss in LOSSES
        for weighted in (False, True)
    ),
    *({"activation": ["tanh", "silu", output], "loss": "huber"} for output in ACTIVATIONS),
    {"loss": "softmax_cross_entropy", "class_rows": True, "n": 300},
    *(
        {"sizes": (5, 9, 6, 3), "n": n, "loss": "softmax_cross_entropy", "weighted": n > 2}
        for n in (1, 2, 7, 255, 256, 257, 1000)
    ),
]


def problems(
    shapes: Sequence[tuple[int, ...]], activation: str, loss: str, n: Sequence[int] = (7, 2, 1)
) -> Iterator[tuple[int, Problem]]:
    """(seed, problem) for every shape: numbers of rows by turns, every second one with weights."""
    for seed, sizes in enumerate(shapes):
        kind: Any = {"activation": activation, "loss": loss, "weighted": seed % 2 == 0}
        yield seed, make_problem(sizes, n[seed % len(n)], **kind, seed=seed)


def make_targets(
    rng: np.random.Generator, loss: str, n: int, width: int, class_rows: bool = False
) -> np.ndarray:
    if loss == "softmax_cross_entropy":
        return rng.uniform(0, 2, (n, width)) if class_rows else rng.integers(0, width, n)
    if loss == "binary_cross_entropy":
        return np.clip(rng.uniform(-0.3, 1.3, (n, width)), 0, 1)
    return rng.poisson(2.0, (n, width)) * 1.0 if loss == "poisson" else rng.normal(size=(n, width))


def naive_loss(
    m: Any, params: Any, problem: Problem, reduction: str, X: np.ndarray | None = None
) -> Any:
    """The loss of the problem's data under these parameters, from the formulas above."""
    _, _, y, options = problem
    H = problem.X if X is None else X
    for (W, b), name in zip(params, problem.names, strict=True):
        H = ACTIVATIONS[name](m, H @ W.T + b)
    Y = np.eye(H.shape[1])[y] if y.ndim == 1 else y
    weight = np.ones(len(y)) if options["sample_weight"] is None else options["sample_weight"]
    total = (weight * LOSSES[options["loss"]](m, H, Y)).sum()
    return total / weight.sum() if reduction == "mean" else total


def complex_step_grads(problem: Problem, reduction: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The gradient of every parameter; nothing of the package takes part."""
    params = problem.params

    def gradient(l: int, which: int) -> np.ndarray:
        def loss(A: np.ndarray) -> Any:
            layer = [*params[l]]
            layer[which] = A
            return naive_loss(np, [*params[:l], layer, *params[l + 1 :]], problem, reduction)

        return complex_steps(loss, params[l][which])

    return [(gradient(l, 0), gradient(l, 1)) for l in range(len(params))]


# The same numbers, as they may lie in memory ------------------------------------------------------


def backwards(A: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(A[::-1])[::-1]


def strided(A: np.ndarray) -> np.ndarray:
    wide = np.zeros(tuple(3 * size for size in A.shape), A.dtype)
    view = wide[tuple(slice(None, None, 3) for _ in A.shape)]
    view[...] = A
    return view


def read_only(A: np.ndarray) -> np.ndarray:
    A = A.copy()
    A.flags.writeable = False
    return A


def unaligned(A: np.ndarray) -> np.ndarray:
    buffer = np.empty(A.nbytes + 1, np.uint8)[1:].view(A.dtype).reshape(A.shape)
    buffer[...] = A
    return buffer


ANY_ARRAYS = (np.asfortranarray, backwards, strided, read_only, unaligned)


# Memory ------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], Any]) -> int:
    """What Python and NumPy hold at most while a call runs, beyond what they held before."""
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()  # of whoever has traced before
        before, _ = tracemalloc.get_traced_memory()
        result = call()
        _, peak = tracemalloc.get_traced_memory()
        del result  # counts too
        return peak - before
    finally:
        tracemalloc.stop()


# Assertions --------------------------------------------------------------------------------------


def assert_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Equal shapes, and no entry off by more than `tolerance` of the largest expected one."""
    got, expected = np.asarray(got, dtype=float), np.asarray(expected, dtype=float)
    assert got.shape == expected.shape
    size = np.max(np.abs(expected), initial=0.0)
    error = np.max(np.abs(got - expected), initial=0.0)
    assert error <= tolerance * size, f"{error:.3g} off, of {size:.3g} (tolerance {tolerance:g})"


def assert_bits(got: Any, expected: Any) -> None:
    """The same numbers to the last bit: of arrays, of layers, of results."""
    if isinstance(expected, (list, tuple)):
        assert len(got) == len(expected)
        for A, B in zip(got, expected, strict=True):
            assert_bits(A, B)
    else:
        np.testing.assert_array_equal(got, expected, strict=True)


def assert_grads_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """Every W and b close, each relative to its own largest entry."""
    assert len(got) == len(expected)
    for l, (layer, reference) in enumerate(zip(got, expected, strict=True), 1):
        for name, A, B in zip("Wb", layer, reference, strict=True):
            try:
                assert_close(A, B, tolerance)
            except AssertionError as error:
                raise AssertionError(f"{name} of layer {l}: {error}") from None


def assert_result_close(got: Any, expected: Any, tolerance: float = 1e-12) -> None:
    """A loss and its gradients."""
    assert_close(got[0], expected[0], tolerance)
    assert_grads_close(got[1], expected[1], tolerance)

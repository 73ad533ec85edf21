"""The assignment this package starts from, as a program: gradients by hand beside other ones.

Three comparisons, returned as plain data for whoever prints them:

    assignment   a 2-10-5-1 net on one sample                             torch autograd
    published    the net behind the assignment's printed tables           those tables
    digits       a 64-32-16-10 net on scikit-learn's handwritten digits   torch autograd

Without torch its place is taken by central differences; without scikit-learn the digits are left
out. `missing` then says so. The only file that imports scikit-learn.
"""

import json
import math
from collections.abc import Iterator
from importlib import resources
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.checks.checking import TOLERANCES as DIFFERENCE_TOLERANCES
from mlp_backprop.checks.checking import check_grads
from mlp_backprop.derivatives.gradients import Trace, compute_grads, trace
from mlp_backprop.edge import backends
from mlp_backprop.nets.initial import init_params
from mlp_backprop.types import Array, Layer, LossName

TORCH_TOLERANCES = {"float32": 1e-6, "float64": 1e-12}

# Printed numbers are rounded to 5e-8; the tables by hand differ from PyTorch's by 1e-7 in places.
PRINTED_TOLERANCES = {"pytorch": 1e-7, "by_hand": 1.5e-7}


class Example(NamedTuple):
    """A net with sigmoid hidden layers, and its data."""

    name: str
    dtype: str
    params: list[Layer]
    X: Array
    y: Array
    loss: LossName


class Worked(NamedTuple):
    """An example with every array of one pass."""

    example: Example
    trace: Trace


class Table(NamedTuple):
    """One array of the gradient; the reference is None where only its error is known."""

    name: str
    reference: Array | None
    computed: Array
    difference: float


class Comparison(NamedTuple):
    """A gradient beside its reference, one table for every W and b."""

    example: str
    reference: str
    dtype: str
    measure: str
    tolerance: float
    difference: float
    passed: bool
    tables: list[Table]


class Verification(NamedTuple):
    """Everything `verify` found out."""

    seed: int
    passed: bool
    assignment: list[Worked]
    comparisons: list[Comparison]
    missing: dict[str, str]


def verify(seed: int = 0) -> Verification:
    """Compare the gradients of this package with torch's and with the published ones.

    Parameters
    ----------
    seed : int
        Draws the parameters of the nets and the sample of the assignment.

    Returns
    -------
    Verification
        Named tuple (seed, passed, assignment, comparisons, missing); `missing` maps the name of
        a library that is not installed to a line for the user.

    Examples
    --------
    >>> from mlp_backprop.programs.verification import verify
    >>> verify(seed=3).passed
    True
    """
    missing = {}
    compare = by_torch
    try:
        backends.namespace("torch")
    except ImportError as error:
        compare = by_differences
        missing["torch"] = f"{error}; central differences take its place"
    small = [assignment(seed, dtype) for dtype in TORCH_TOLERANCES]
    try:
        real = [digits(seed, dtype) for dtype in TORCH_TOLERANCES]
    except ImportError as error:
        real = []
        missing["scikit-learn"] = (
            f"the handwritten digits need scikit-learn ({error}): pip install 'mlp-backprop[cli]'"
        )
    comparisons = [*map(compare, small), *by_printed_tables(), *map(compare, real)]
    return Verification(
        seed=seed,
        passed=all(comparison.passed for comparison in comparisons),
        assignment=[Worked(e, trace(e.params, e.X, e.y, loss=e.loss)) for e in small],
        comparisons=comparisons,
        missing=missing,
    )


def assignment(seed: int, dtype: str) -> Example:
    """The 2-10-5-1 net with x from U[0, 1]² and y = (x1² + x2²)/2."""
    rng = np.random.default_rng(seed)
    params = init_params([2, 10, 5, 1], rng, dtype=dtype)
    X = rng.random((1, 2)).astype(dtype)
    y = (X**2).sum(axis=1, keepdims=True) / 2
    return Example("assignment", dtype, params, X, y, "squared_error")


def digits(seed: int, dtype: str) -> Example:
    """A 64-32-16-10 net on 1797 images of 8 x 8 pixels, scaled from 0...16 to [0, 1]."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    params = init_params([64, 32, 16, 10], seed, dtype=dtype)
    X = (images / 16).astype(dtype)
    return Example("digits", dtype, params, X, labels, "softmax_cross_entropy")


def published() -> tuple[Example, dict[str, list[Layer]]]:
    """A net that has the published gradients, and the tables as printed."""
    file = resources.files("mlp_backprop.programs") / "data" / "bs6207.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    printed = {name: _read_tables(content[name]) for name in PRINTED_TOLERANCES}
    return reconstruct(printed["pytorch"]), printed


def _read_tables(tables: dict[str, list[Any]]) -> list[Layer]:
    return [Layer(np.array(tables[f"dLdw{l}"]), np.array(tables[f"dLdb{l}"])) for l in (1, 2, 3)]


def reconstruct(grads: list[Layer]) -> Example:
    """A three-layer net and a sample that have these gradients of (h3 - y)².

    For one sample the gradients are D_l = db_l and dW_l = db_lᵀ H_{l-1}, an outer product, so
    H_{l-1} = db_l dW_l / |db_l|². Then D_3 = 2 (h3 - y) gives h3, and D_{l-1} = (D_l W_l) ∘
    H_{l-1} (1 - H_{l-1}) is solved by the least W_l, again an outer product. Biases make up for
    what W_l H_{l-1} lacks to Z_l; in the first layer they make up for all of it, W_1 = 0.
    """
    D1, D2, D3 = (db for _, db in grads)
    x, h1, h2 = (D @ dW / (D @ D) for dW, D in grads)
    y = (x**2).sum(keepdims=True) / 2
    h3 = y + D3 / 2
    W3 = np.outer(D3, D2 / (h2 * (1 - h2))) / (D3 @ D3)
    W2 = np.outer(D2, D1 / (h1 * (1 - h1))) / (D2 @ D2)
    params = [
        Layer(np.zeros_like(grads[0].W), _logit(h1)),
        Layer(W2, _logit(h2) - W2 @ h1),
        Layer(W3, h3 - W3 @ h2),
    ]
    return Example("published", "float64", params, x[None, :], y[None, :], "squared_error")


def _logit(h: Array) -> Array:
    return np.log(h / (1 - h))


def by_printed_tables() -> list[Comparison]:
    """The reconstructed net against the tables by PyTorch, and against those by hand."""
    example, printed = published()
    references = {"pytorch": "tables by PyTorch", "by_hand": "tables by hand"}
    return [
        _by_values(example, references[name], tolerance, printed[name])
        for name, tolerance in PRINTED_TOLERANCES.items()
    ]


def by_torch(example: Example) -> Comparison:
    """Against torch autograd, in the dtype of the example."""
    from mlp_backprop.checks import torch_reference

    _, grads = torch_reference.loss_and_grads(
        example.params,
        example.X,
        example.y,
        None,
        names=["sigmoid"] * (len(example.params) - 1) + ["identity"],
        loss=example.loss,
        reduction="mean",
    )
    return _by_values(example, "PyTorch autograd", TORCH_TOLERANCES[example.dtype], grads)


def by_differences(example: Example) -> Comparison:
    """Against central differences in float64, relative to the largest entry of each array."""
    grads = _grads(example)
    try:
        errors = check_grads(
            example.params,
            example.X,
            example.y,
            loss=example.loss,
            grads=grads,
            tolerance=math.inf,
            max_entries=200,
        )
    except AssertionError:  # nan alone is above an infinite tolerance
        errors = [Layer(math.nan, math.nan)] * len(grads)
    tables = [
        Table(name, None, computed, error) for name, computed, error in _side_by_side(grads, errors)
    ]
    tolerance = DIFFERENCE_TOLERANCES[example.dtype]
    return _comparison(example, "central differences", "relative", tolerance, tables)


def _by_values(
    example: Example, reference: str, tolerance: float, expected: list[Layer]
) -> Comparison:
    tables = [
        Table(name, theirs, ours, float(np.max(np.abs(ours - theirs))))
        for name, ours, theirs in _side_by_side(_grads(example), expected)
    ]
    return _comparison(example, reference, "absolute", tolerance, tables)


def _comparison(
    example: Example, reference: str, measure: str, tolerance: float, tables: list[Table]
) -> Comparison:
    # NumPy's max, because Python's may overlook a nan, and nan is within no tolerance.
    largest = float(np.max([table.difference for table in tables]))
    return Comparison(
        example=example.name,
        reference=reference,
        dtype=example.dtype,
        measure=measure,
        tolerance=tolerance,
        difference=largest,
        passed=largest <= tolerance,
        tables=tables,
    )


def _grads(example: Example) -> list[Layer]:
    return compute_grads(example.params, example.X, example.y, loss=example.loss).grads


def _side_by_side(grads: list[Layer], others: list[Layer]) -> Iterator[tuple[str, Array, Any]]:
    """("dE/dW1", its gradient, what the others have in that place), and so on."""
    for l, (ours, theirs) in enumerate(zip(grads, others, strict=True), 1):
        yield f"dE/dW{l}", ours.W, theirs.W
        yield f"dE/db{l}", ours.b, theirs.b

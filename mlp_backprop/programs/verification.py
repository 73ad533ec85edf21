"""The assignment this package starts from, as a program: gradients by hand beside other ones.

Three comparisons, returned as plain data for whoever prints them:

    assignment   a 2-10-5-1 net on one sample                             torch autograd
    published    the net behind the assignment's printed tables           those tables
    digits       a 64-32-16-10 net on scikit-learn's handwritten digits   torch autograd

Without torch its place is taken by central differences; without scikit-learn the digits are left
out. `missing` then says so. Where a backend is named, it computes all three in every precision that
it has, and NumPy in float64 stands beside them too.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.checks.checking import TOLERANCES as DIFFERENCE_TOLERANCES
from mlp_backprop.checks.checking import check_grads
from mlp_backprop.derivatives.gradients import Trace, compute_grads, trace
from mlp_backprop.edge import backends
from mlp_backprop.edge.backends import BACKENDS, BackendStatus
from mlp_backprop.edge.rules import PRECISIONS
from mlp_backprop.programs import examples
from mlp_backprop.programs.examples import Example
from mlp_backprop.types import Array, Layer

TORCH_TOLERANCES = {"float32": 1e-6, "float64": 1e-12}

# By precision, and relative to the largest entry of each array. Factors that are rounded, and
# nothing else, come to 1.5e-3 in tf32 and 1.6e-2 in bfloat16 on these nets.
BACKEND_TOLERANCES = {
    "float32": 2e-5,
    "float32_exact": 2e-5,
    "tf32": 5e-3,
    "bfloat16": 5e-2,
    "float64": 1e-12,
}

# Printed numbers are rounded to 5e-8; the tables by hand differ from PyTorch's by 1e-7 in places.
PRINTED = {"pytorch": ("tables by PyTorch", 1e-7), "by_hand": ("tables by hand", 1.5e-7)}


class Way(NamedTuple):
    """How gradients are computed: one of PRECISIONS means float32, the other one is "float64"."""

    backend: str | None
    precision: str

    @property
    def dtype(self) -> str:
        return "float64" if self.precision == "float64" else "float32"


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
    """A gradient beside its reference, one table for every W and b.

    `measure` is "absolute", or "relative" to the largest entry of each array.
    """

    example: str
    reference: str
    dtype: str
    precision: str
    measure: str
    tolerance: float
    difference: float
    passed: bool
    tables: list[Table]


class Verification(NamedTuple):
    """Everything `verify` found out; `backend` is None where none was named."""

    seed: int
    backend: BackendStatus | None
    passed: bool
    assignment: list[Worked]
    comparisons: list[Comparison]
    missing: dict[str, str]


Compare = Callable[[Example, Way], Comparison]


def verify(seed: int = 0, backend: str | None = None) -> Verification:
    """Compare the gradients of this package with torch's and with the published ones.

    Parameters
    ----------
    seed : int
        Draws the parameters of the nets and the sample of the assignment.
    backend : str, optional
        Computes the gradients, as for `compute_grads`, in all its precisions; they are compared
        with NumPy's in float64 as well.

    Returns
    -------
    Verification
        Named tuple (seed, backend, passed, assignment, comparisons, missing); `missing` maps the
        name of a library that is not installed to a line for the user.

    Raises
    ------
    ImportError
        A backend that is not installed, or CuPy without a device.

    Examples
    --------
    >>> from mlp_backprop.programs.verification import verify
    >>> verify(seed=3).passed
    True
    """
    status = None
    if backend is not None:
        backends.namespace(backend)
        status = backends.status(BACKENDS[backend])
    missing: dict[str, str] = {}
    compares = _compares(backend, missing)
    ways = [Way(backend, precision) for precision in precisions(backend)]
    comparisons = [
        *_compared(lambda dtype: examples.assignment(seed, dtype), ways, compares),
        *by_printed_tables(Way(backend, "float64")),
    ]
    if backend is not None:
        net, _ = examples.published()
        comparisons += _compared(net.astype, ways, [by_float64])
    try:
        comparisons += _compared(lambda dtype: examples.digits(seed, dtype), ways, compares)
    except ImportError as error:
        missing["scikit-learn"] = (
            f"the handwritten digits need scikit-learn ({error}): pip install 'mlp-backprop[cli]'"
        )
    small = [examples.assignment(seed, dtype) for dtype in TORCH_TOLERANCES]
    return Verification(
        seed=seed,
        backend=status,
        passed=all(comparison.passed for comparison in comparisons),
        assignment=[Worked(e, trace(e.params, e.X, e.y, loss=e.loss)) for e in small],
        comparisons=comparisons,
        missing=missing,
    )


def precisions(backend: str | None) -> list[str]:
    """Those of the products of float32 that a backend has, and float64."""
    return [*(PRECISIONS if backend == "cupy" else ["float32"]), "float64"]


def _compares(backend: str | None, missing: dict[str, str]) -> list[Compare]:
    """What stands beside the gradients; `missing` is told why torch does not."""
    others: list[Compare] = [] if backend is None else [by_float64]
    try:
        backends.namespace("torch")
    except ImportError as error:
        instead = "NumPy in float64 is left" if others else "central differences take its place"
        missing["torch"] = f"{error}; {instead}"
        return others or [by_differences]
    return [by_torch, *others]


def _compared(
    make: Callable[[str], Example], ways: list[Way], compares: list[Compare]
) -> list[Comparison]:
    """An example, made for the dtype of each way, beside everything it is compared with."""
    return [compare(make(way.dtype), way) for way in ways for compare in compares]


def by_printed_tables(way: Way) -> list[Comparison]:
    """The reconstructed net against the tables by PyTorch, and against those by hand."""
    example, printed = examples.published()
    return [
        _by_values(example, way, name, "absolute", tolerance, printed[key])
        for key, (name, tolerance) in PRINTED.items()
    ]


def by_torch(example: Example, way: Way) -> Comparison:
    """Against torch autograd, on the CPU and in the dtype of the example."""
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
    if way.backend is None:
        measure, tolerance = "absolute", TORCH_TOLERANCES[way.precision]
    else:
        measure, tolerance = "relative", BACKEND_TOLERANCES[way.precision]
    return _by_values(example, way, "PyTorch autograd", measure, tolerance, grads)


def by_float64(example: Example, way: Way) -> Comparison:
    """Against NumPy, from the same numbers in float64."""
    grads = _grads(example.astype("float64"), Way("numpy", "float64"))
    tolerance = BACKEND_TOLERANCES[way.precision]
    return _by_values(example, way, "NumPy float64", "relative", tolerance, grads)


def by_differences(example: Example, way: Way) -> Comparison:
    """Against central differences in float64, relative to the largest entry of each array."""
    grads = _grads(example, way)
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
    return _comparison(example, way, "central differences", "relative", tolerance, tables)


def _by_values(
    example: Example,
    way: Way,
    reference: str,
    measure: str,
    tolerance: float,
    expected: list[Layer],
) -> Comparison:
    tables = [
        Table(name, theirs, ours, _difference(ours, theirs, measure))
        for name, ours, theirs in _side_by_side(_grads(example, way), expected)
    ]
    return _comparison(example, way, reference, measure, tolerance, tables)


def _difference(ours: Array, theirs: Array, measure: str) -> float:
    """The largest; nan where there is a nan in either."""
    largest = float(np.max(np.abs(ours - theirs)))
    if measure == "absolute" or largest == 0:
        return largest
    return largest / float(np.max(np.abs(theirs)))


def _comparison(
    example: Example,
    way: Way,
    reference: str,
    measure: str,
    tolerance: float,
    tables: list[Table],
) -> Comparison:
    # NumPy's max, because Python's may overlook a nan, and nan is within no tolerance.
    largest = float(np.max([table.difference for table in tables]))
    return Comparison(
        example=example.name,
        reference=reference,
        dtype=example.dtype,
        precision=way.precision,
        measure=measure,
        tolerance=tolerance,
        difference=largest,
        passed=largest <= tolerance,
        tables=tables,
    )


def _grads(example: Example, way: Way) -> list[Layer]:
    """The gradients that are checked, as NumPy arrays."""
    options: dict[str, Any] = {"loss": example.loss, "backend": way.backend}
    if way.precision != way.dtype:
        options["precision"] = way.precision
    _, grads = compute_grads(example.params, example.X, example.y, **options)
    return [Layer(_on_host(W), _on_host(b)) for W, b in grads]


def _on_host(array: Array) -> Array:
    return backends.to_numpy(backends.namespace_of(array), array)


def _side_by_side(grads: list[Layer], others: list[Layer]) -> Iterator[tuple[str, Array, Any]]:
    """("dE/dW1", its gradient, what the others have in that place), and so on."""
    for l, (ours, theirs) in enumerate(zip(grads, others, strict=True), 1):
        yield f"dE/dW{l}", ours.W, theirs.W
        yield f"dE/db{l}", ours.b, theirs.b

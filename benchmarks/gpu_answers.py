"""One net for each tier of the CUDA engine, in every precision, against float64 on the host.

    python benchmarks/gpu_answers.py --json FILE

Each cell asks a prepared call for loss and gradients: are they right, are they the same bits the
second time, is the loss nan where a label is out of range, and does an infinity in X make that
infinite or nan which it does in float64, and nothing else? The file is written after each cell.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from bench_gpu import make_task, reference, require
from gpu_cells import Cell
from gpu_contenders import checked, on_host

from mlp_backprop import prepare_grads
from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import Answer, Task
from mlp_backprop.bench.problems import Problem
from mlp_backprop.types import flat

NETS = tuple(
    Problem(sizes, "tanh", "softmax_cross_entropy")
    for sizes in ((2, 10, 5, 3), (64, 64, 10), (200, 130, 10))
)

# Of the largest entry of each array. Operands so rounded, and nothing else, come to 7e-4 in tf32
# and 9e-3 in bfloat16 on these nets.
TOLERANCES = {"float32": 2e-5, "float32_exact": 2e-5, "tf32": 3e-3, "bfloat16": 3e-2}

ROWS = (1, 33, 40_001)

CELLS = [Cell(net, n, precision) for net in NETS for precision in TOLERANCES for n in ROWS]

# For a task and a precision: the tier, and a pass planned there, to be called with X and y.
Plan = Callable[[Task, str], tuple[str, Callable[[Any, Any], tuple[Any, Any]]]]


def examine(cell: Cell, place: Callable[[np.ndarray], Any], plan: Plan) -> dict[str, Any]:
    """What is wrong in a cell: `problems` is empty where nothing is."""
    host, device = (make_task(cell, put) for put in (np.asarray, place))
    tier, run = plan(device, cell.precision)
    most = TOLERANCES[cell.precision]

    def answer(X: np.ndarray = host.X, y: np.ndarray = host.y) -> Answer:
        loss, grads = run(place(X), place(y))
        return Answer(float(on_host(loss)), [on_host(A) for A in flat(grads)])

    expected, first = reference(host), answer()
    error, problems = grid.largest_error(first, expected), []
    if not error <= most:
        problems.append(f"off by {error:.2g} of the largest entry; {most:g} is allowed")
    if bits(first) != bits(answer()):
        problems.append("the second call gave other bits")
    for label in (-1, cell.problem.sizes[-1]):
        y = host.y.copy()
        y[cell.n // 2] = label
        if not np.isnan(answer(y=y).loss):
            problems.append(f"label {label} is out of range, and the loss is not nan")
    X = host.X.copy()
    X[0, 0] = np.inf
    with np.errstate(invalid="ignore"):
        expected = reference(host._replace(X=X))
    if not agree(answer(X=X), expected, most):
        problems.append("an infinity in X: not the numbers, infinities and nan of float64")
    return {**identity(cell), "tier": tier, "error": error, "problems": problems}


def identity(cell: Cell) -> dict[str, Any]:
    return {"net": cell.problem.name, "n": cell.n, "precision": cell.precision}


def arrays(answer: Answer) -> list[np.ndarray]:
    return [np.asarray(answer.loss), *answer.grads]


def bits(answer: Answer) -> list[bytes]:
    return [A.tobytes() for A in arrays(answer)]


def agree(got: Answer, expected: Answer, most: float) -> bool:
    """Whether what is finite is close to what is expected to be so, and all else is not finite."""
    for A, B in zip(arrays(got), arrays(expected), strict=True):
        finite = np.isfinite(B)
        largest = np.max(np.abs(B[finite]), initial=0.0)
        if not np.array_equal(np.isfinite(A), finite):
            return False
        if not np.all(np.abs(A - B)[finite] <= most * largest):
            return False
    return True


def prepared(task: Task, precision: str) -> tuple[str, Callable[[Any, Any], tuple[Any, Any]]]:
    """The package's own call, on the arrays' device."""
    options: dict[str, Any] = {"activation": task.names, "loss": task.loss, "precision": precision}
    grad_fn = prepare_grads(task.params, n=len(task.X), **options)
    return tier_of(task, precision), lambda X, y: grad_fn(task.params, X, y)


def tier_of(task: Task, precision: str) -> str:
    """The one that the CuPy engine takes here, which depends on the card too."""
    from mlp_backprop.engines.cuda import engine

    spec, _ = checked(task)
    run = engine.prepare_here(spec, len(task.X), precision)
    return str(run.__module__).rpartition(".")[2]


def examine_all(
    cells: list[Cell], place: Callable[[np.ndarray], Any], plan: Plan, path: Path
) -> list[dict[str, Any]]:
    """Every cell, whatever happens in those before."""
    records: list[dict[str, Any]] = []
    for cell in cells:
        print(cell, flush=True)
        try:
            record = examine(cell, place, plan)
        except Exception as error:  # the trouble of one cell is not that of the others
            problem = f"{type(error).__name__}: {error}"
            record = {**identity(cell), "tier": None, "error": None, "problems": [problem]}
        records.append(record)
        bench_results.save({"cells": records}, path)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="write the results here")
    options = parser.parse_args()
    require(["cupy", "array_api_compat"])
    import cupy

    records = examine_all(CELLS, cupy.asarray, prepared, options.json)
    sys.exit(any(record["problems"] for record in records))


if __name__ == "__main__":
    main()

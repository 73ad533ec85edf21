"""The grid of mlp_backprop.bench.grid as pytest-benchmark sees it: a group per cell.

    pytest benchmarks/bench_gradients.py --benchmark-only -k "2-10-5-1-n1024 and float32"

Every answer is checked before it is timed. Contenders run one after the other here: for a ratio,
use `mlp-backprop bench`, which times them in turns.
"""

from functools import cache, lru_cache

import pytest

from mlp_backprop.bench import grid
from mlp_backprop.bench import results as bench_results
from mlp_backprop.bench.contenders import CONTENDERS

surroundings = cache(bench_results.surroundings)


def name(cell):
    """As `-k` can select it: 2-10-5-1-n1024-float32."""
    return f"{cell.problem.name}-n{cell.n}-{cell.dtype}"


@lru_cache(maxsize=1)
def task_and_reference(cell):
    task = grid.make_task(cell)
    return task, grid.reference(task)


@pytest.mark.filterwarnings("default")  # those of the contenders are not ours to judge
@pytest.mark.parametrize("contender", CONTENDERS.values(), ids=CONTENDERS)
@pytest.mark.parametrize("cell", grid.cells("default"), ids=name)
def test_gradients(benchmark, cell, contender):
    task, expected = task_and_reference(cell)
    try:
        ready, facts = grid.prepare(contender, task, expected, grid.tolerance(cell))
    except (ImportError, ValueError) as reason:
        pytest.skip(str(reason))
    benchmark.group = str(cell)
    benchmark.extra_info.update(facts, **surroundings())
    grid.settle()
    with ready.around():
        benchmark(ready.call)

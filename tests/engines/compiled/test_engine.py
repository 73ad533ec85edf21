"""The compiled engine: the derivation's answers, whatever the arrays, whatever the threads."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path

import numpy as np
import oracles
import pytest
from derivation import checked
from oracles import assert_bits

numba = pytest.importorskip("numba", reason="the compiled engine needs numba")

from mlp_backprop import backprop  # noqa: E402
from mlp_backprop.activations import ACTIVATIONS  # noqa: E402
from mlp_backprop.engines import numpy_tiles  # noqa: E402
from mlp_backprop.engines.compiled import engine as numba_engine  # noqa: E402
from mlp_backprop.engines.compiled import formulas, kernels, parts, schedule, tiles, vectors  # noqa: E402
from mlp_backprop.losses import LOSSES  # noqa: E402

FLOATS = (np.float64, np.float32)
MAKERS = [(make, make.__code__.co_varnames) for make, _ in parts.PARTS.values()]
TOLERANCE = {np.float64: 1e-12, np.float32: 1e-5}
WIDE = (40, 260, 3)


@pytest.fixture(params=FLOATS)
def dtype(request):
    return request.param


def engine(problem, n=None):
    spec, *arrays = checked(problem)
    run = numba_engine.prepare(spec, len(arrays[1]) if n is None else n)
    return run.sums(*arrays)


def flat(sums):
    """All sums in one vector."""
    return np.concatenate(
        [[sums.loss, sums.weight], *(A.ravel() for layer in sums.grads for A in layer)]
    )


def assert_equals_derivation(problem, dtype):
    """The engine in dtype against the derivation in float64, array by array."""
    spec, *arrays = checked(problem.astype(dtype).astype(np.float64))
    expected = backprop.loss_and_grad_sums(spec, *arrays)
    got = engine(problem.astype(dtype))
    oracles.assert_close(got.loss, expected.loss, TOLERANCE[dtype])
    oracles.assert_close(got.weight, expected.weight, TOLERANCE[dtype])
    oracles.assert_grads_close(got.grads, expected.grads, TOLERANCE[dtype])


# The same answers --------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", oracles.PROBLEMS, ids=str)
def test_every_kind_of_problem(problem, dtype):
    assert_equals_derivation(oracles.make_problem(**problem), dtype)


@pytest.mark.parametrize(
    "sizes",
    [
        (3, 2),
        (1, 1),
        (1, 1, 1),
        (2, 10, 5, 1),
        (8, 32, 32, 1),
        (64, 64, 64, 1),
        (7, 1, 13, 1, 6),
        (4, 5, 6, 7, 3, 2, 9),
    ],
)
def test_any_depth_and_widths(sizes, dtype):
    assert_equals_derivation(oracles.make_problem(sizes, 300, weighted=True), dtype)


@pytest.mark.parametrize("size", [-1e9, -710, -89, -36, -1e-9, 0, 1e-9, 36, 88, 709, 710, 1e9])
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_logits(loss, size, dtype):
    problem = oracles.make_problem((3, 4), 1, loss=loss)._replace(X=np.array([[size, -size, 1.0]]))
    spec, *arrays = checked(problem.astype(dtype))
    with np.errstate(all="ignore"):
        expected = flat(backprop.loss_and_grad_sums(spec, *arrays))
    # The rounding of a logit near 710 counts as often in its exponential.
    rtol = 2000 * np.finfo(dtype).eps
    np.testing.assert_allclose(flat(engine(problem.astype(dtype))), expected, rtol, rtol)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("sizes", [(3, 5, 2, 4), WIDE])
def test_inf_and_nan_pass_as_in_the_derivation(sizes, activation, loss, value):
    problem = oracles.make_problem(sizes, activation=activation, loss=loss)
    problem.X[2, 1] = value
    spec, *arrays = checked(problem)
    with np.errstate(all="ignore"):
        expected = flat(backprop.loss_and_grad_sums(spec, *arrays))
        got = flat(engine(problem))
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-12)


def test_float32_sums_over_many_rows_are_exact():
    problem = oracles.make_problem((2, 10, 5, 1), 100_000, activation="sigmoid").astype(np.float32)
    spec, *arrays = checked(problem.astype(np.float64))
    expected, got = backprop.loss_and_grad_sums(spec, *arrays), engine(problem)
    assert all(A.dtype == np.float64 for layer in got.grads for A in layer)
    oracles.assert_grads_close(got.grads, expected.grads, 5e-7)


# Wide nets ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy", "poisson"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_in_wide_nets(activation, loss, dtype):
    for weighted in (False, True):
        problem = oracles.make_problem(
            WIDE, activation=activation, loss=loss, weighted=weighted, n=9
        )
        assert_equals_derivation(problem, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_wide_outputs_and_mixed(activation, dtype):
    problem = oracles.make_problem((3, 20, 260), activation=["silu", activation], loss="huber")
    assert_equals_derivation(problem, dtype)


@pytest.mark.parametrize(
    "sizes", [(784, 128, 64, 10), (257, 1), (1, 257), (257, 1, 1), (2, 260, 1, 66), (70, 40, 270)]
)
def test_wide_nets_of_any_shape(sizes, dtype):
    assert_equals_derivation(
        oracles.make_problem(sizes, 300, activation="gelu_tanh", weighted=True), dtype
    )


@pytest.mark.parametrize(("tiles", "more"), [(0, 1), (1, -1), (1, 0), (1, 1), (3, 7)])
def test_wide_nets_with_rows_around_the_borders_of_tiles(tiles, more, dtype):
    spec = checked(oracles.make_problem(WIDE, dtype=dtype)).spec
    n = tiles * numba_engine.prepare(spec, 10**9).schedule.tile_rows + more
    assert_equals_derivation(oracles.make_problem(WIDE, n, activation="softplus"), dtype)


def test_every_activation_is_in_place_in_wide_nets(dtype):
    assert numba_engine.compiled_in_place(np.dtype(dtype)).keys() == ACTIVATIONS.keys()
    problem = oracles.make_problem(WIDE, activation="gelu_tanh", dtype=dtype)
    run = numba_engine.prepare(checked(problem).spec, 7)
    assert None not in run.rows
    assert None in numpy_tiles.prepare(checked(problem).spec, 7).rows


def test_the_next_run_of_a_wide_net_knows_nothing_of_the_last(dtype):
    first, second = (
        oracles.make_problem(WIDE, 50, activation="elu", dtype=dtype, seed=seed) for seed in (0, 1)
    )
    spec, *arrays = checked(first)
    run = numba_engine.prepare(spec, 50)
    expected = flat(run.sums(*arrays))
    assert_bits(flat(run.sums(*checked(second)[1:])), flat(engine(second)))
    assert_bits(flat(run.sums(*arrays)), expected)


# Any arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
@pytest.mark.parametrize("change", oracles.ANY_ARRAYS)
def test_any_strides_and_read_only(change, loss, dtype):
    problem = oracles.make_problem(n=300, loss=loss, weighted=True).astype(dtype)
    expected = flat(engine(problem))
    changed = problem.map(change)
    spec, *arrays = checked(changed)
    before = [A.copy() for A in (changed.X, changed.y)]
    assert_bits(flat(numba_engine.prepare(spec, 300).sums(*arrays)), expected)
    assert_bits(changed.X, before[0])
    assert_bits(changed.y, before[1])


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_classes_of_any_integer_type(integer):
    problem = oracles.make_problem(n=300, loss="softmax_cross_entropy")
    assert_bits(flat(engine(problem._replace(y=problem.y.astype(integer)))), flat(engine(problem)))


@pytest.mark.parametrize("n", [7, 100_000])
@pytest.mark.parametrize("wrong", [-1, 4, 2**40, -(2**63)])
def test_a_class_out_of_range_is_refused(wrong, n):
    problem = oracles.make_problem(n=n, loss="softmax_cross_entropy")
    spec, params, X, y, weight = checked(problem)
    y[n - 2] = wrong
    run = numba_engine.prepare(spec, n)
    with pytest.raises(ValueError, match="y must hold class indices from 0 to 3"):
        run.sums(params, X, y, weight)
    y[n - 2] = 0
    assert np.isfinite(run.sums(params, X, y, weight).loss)


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rows(loss, dtype):
    sums = engine(oracles.make_problem(n=0, loss=loss, dtype=dtype), n=5)
    assert_bits(flat(sums), np.zeros_like(flat(sums)))


# The plan ----------------------------------------------------------------------------------------


def test_fewer_rows_than_planned_and_results_of_ones_own():
    large, small = oracles.make_problem(n=600), oracles.make_problem(n=5, seed=1)
    spec, *arrays = checked(large)
    run = numba_engine.prepare(spec, 600)
    first = run.sums(*arrays)
    kept = flat(first).copy()
    assert_bits(flat(run.sums(*checked(small)[1:])), flat(engine(small)))
    assert_bits(flat(first), kept)


def test_half_precision_is_not_covered():
    for sizes in ((2, 3, 1), WIDE):
        spec = checked(oracles.make_problem(sizes, dtype=np.float16)).spec
        assert numba_engine.prepare(spec, 7) is None


def test_where_wide_begins():
    for width, engine_class in (
        (numba_engine.WIDEST, numba_engine.NarrowRun),
        (numba_engine.WIDEST + 1, numpy_tiles.TiledRun),
    ):
        run = numba_engine.prepare(checked(oracles.make_problem((2, width, 1))).spec, 7)
        assert isinstance(run, engine_class)


NARROW = (3, 20, 8, 2)


@pytest.mark.parametrize(
    ("sizes", "n"), [(NARROW, 1), (NARROW, 1000), (NARROW, 60_000), (WIDE, 1), (WIDE, 20_000)]
)
def test_the_number_of_threads_changes_no_bit(sizes, n, dtype, monkeypatch):
    problem = oracles.make_problem(sizes, n, activation="silu", dtype=dtype, weighted=True)
    results = []
    for n_threads in ("1", "2", "3"):
        monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", n_threads)
        results.append(flat(engine(problem)))
    assert_bits(results[1], results[0])
    assert_bits(results[2], results[0])


def test_long_work_is_cut_and_short_work_is_not():
    run = numba_engine.prepare(checked(oracles.make_problem()).spec, 7)
    assert run.chunks(0) == (1, 0)
    assert run.chunks(1000) == (1, 1000)
    for n in (1_000_000, 1_000_001, 10_000_000):
        n_chunks, n_rows = run.chunks(n)
        assert 1 < n_chunks <= schedule.MOST_CHUNKS
        assert n_rows % run.layout.tile_rows == 0
        assert (n_chunks - 1) * n_rows < n <= n_chunks * n_rows


@pytest.mark.parametrize("loss", ["squared_error", "softmax_cross_entropy"])
def test_memory_does_not_grow_with_the_rows(loss, monkeypatch):
    monkeypatch.setenv("MLP_BACKPROP_NUM_THREADS", "2")

    def peak(n):
        problem = oracles.make_problem((2, 10, 5, 3), n, loss=loss)
        spec, *arrays = checked(problem)
        run = numba_engine.prepare(spec, n)
        run.sums(*arrays)  # what is compiled now is not again
        return oracles.peak_bytes(lambda: run.sums(*arrays))

    assert peak(400_000) < peak(100_000) + 100_000


def test_two_threads_with_a_plan_each():
    problems = [oracles.make_problem((3, 20, 8, 2), 50_000, seed=seed) for seed in (0, 1)]
    expected = [flat(engine(problem)) for problem in problems]
    got = [None, None]

    def work(k):
        spec, *arrays = checked(problems[k])
        run = numba_engine.prepare(spec, 50_000)
        got[k] = [flat(run.sums(*arrays)) for _ in range(5)]

    workers = [threading.Thread(target=work, args=(k,)) for k in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for k in (0, 1):
        for result in got[k]:
            assert_bits(result, expected[k])


@pytest.mark.parametrize("source", [formulas, kernels, tiles, vectors])
def test_each_source_is_a_part_of_the_key_in_the_cache(source, tmp_path, monkeypatch):
    before = parts.version_of_sources.__wrapped__()
    assert parts.version_of_sources.__wrapped__() == before
    for file in Path(parts.__file__).parent.glob("*.py"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    monkeypatch.setattr(parts, "__file__", str(tmp_path / "parts.py"))
    assert parts.version_of_sources.__wrapped__() == before
    with (tmp_path / Path(source.__file__).name).open("ab") as changed:
        changed.write(b"#")
    assert parts.version_of_sources.__wrapped__() != before


@pytest.mark.parametrize(
    "make",
    [
        *(partial(make, k=0) if "k" in arguments else make for make, arguments in MAKERS),
        partial(kernels.over_tiles, real=np.float32),
        partial(kernels._tile, real=np.float32, name="add_tile"),
        partial(kernels.results_pass, real=np.float32),
        kernels.place,
        kernels.activate,
    ],
)
def test_what_is_compiled_holds_the_version_of_its_sources(make):
    # Numba's key has the values that a function takes from around it.
    held = [cell.cell_contents for cell in make(123456789).__closure__]
    assert 123456789 in held


@pytest.mark.parametrize(("seconds", "is_terminal"), [(1.9, True), (2.1, False), (2.1, True)])
def test_whoever_waits_at_a_terminal_is_told_once_why(seconds, is_terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    patience = parts._Patience()
    patience.say_once()
    patience.seconds = seconds
    for _ in range(3):
        patience.say_once()
    expected = "mlp_backprop compiles for this processor, once ...\n"
    assert capsys.readouterr().err == (expected if seconds > 2 and is_terminal else "")


MODULE = """
from numba import types
from mlp_backprop.engines.compiled import parts

SIGNATURE = types.boolean(types.intp)

def make(sources):
    def is_positive(n):
        _ = sources
        return n > 0
    return is_positive
"""


def test_what_threads_call_is_not_taken_for_what_python_calls(tmp_path):
    (tmp_path / "made.py").write_text(MODULE)
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    for asks in ("assert parts.work(make, SIGNATURE)", "assert parts.entry(make, SIGNATURE)(3)"):
        program = f"from made import *; {asks}"
        subprocess.run([sys.executable, "-c", program], check=True, env=environment)


def test_the_layouts_of_many_nets_are_not_all_kept():
    for width in range(1, 1000):
        numba_engine.record((1, width), np.dtype(np.float64))
    assert numba_engine.record.cache_info().currsize < 500
    net = (3, 2, 1)
    assert numba_engine.record(net, np.dtype(np.float64)).names == ("W1", "b1", "W2", "b2")

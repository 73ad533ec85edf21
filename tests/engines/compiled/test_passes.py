"""Plans of compiled passes: kept by shapes, one call at a time, and never an array of anybody."""

import gc
import threading
import weakref

import numpy as np
import oracles
import pytest

pytest.importorskip("numba", reason="compiled passes need numba")

from mlp_backprop import hvp, jacobian, per_sample_grad_norms, residual_grads
from mlp_backprop.engines import memory
from mlp_backprop.engines.compiled import passes
from mlp_backprop.types import Layer, flat

SIZES = (3, 5, 4, 2)


@pytest.fixture(autouse=True)
def nothing_kept():
    passes._kept.by_use.clear()


def problem(n=7, seed=0):
    made = oracles.make_problem(SIZES, n, seed=seed, activation="tanh")
    return made.params, made.X, made.y


def norms(params, X, y):
    return per_sample_grad_norms(params, X, y, activation="tanh", backend="numba")


def test_a_plan_serves_the_next_call_of_its_shapes():
    first, second = problem(), problem(seed=1)
    expected = [norms(*data).copy() for data in (first, second)]
    [plan] = passes._kept.by_use.values()
    assert np.array_equal(norms(*first), expected[0])
    assert [*passes._kept.by_use.values()] == [plan]
    passes._kept.by_use.clear()
    assert np.array_equal(norms(*second), expected[1])


def test_results_are_the_callers_to_keep():
    params, X, y = problem()
    v = [Layer(np.ones_like(W), np.ones_like(b)) for W, b in params]
    first = hvp(params, X, y, v, activation="tanh", backend="numba")
    copies = [A.copy() for A in flat(first)]
    hvp(params, 2 * X, y, v, activation="tanh", backend="numba")
    for A, copy in zip(flat(first), copies, strict=True):
        assert np.array_equal(A, copy)


def test_no_array_of_the_callers_is_kept_alive():
    params, X, y = problem()
    params, X, y = [Layer(W.copy(), b.copy()) for W, b in params], X.copy(), y.copy()
    v = [Layer(np.ones_like(W), np.ones_like(b)) for W, b in params]
    results = [norms(params, X, y), jacobian(params, X, activation="tanh", backend="numba")]
    results += flat(hvp(params, X, y, v, activation="tanh", backend="numba"))
    watched = [weakref.ref(A) for A in (X, y, *flat(params), *flat(v), *results)]
    del params, X, y, v, results
    gc.collect()
    assert not any(A() is not None for A in watched)


def test_what_one_call_asked_for_is_not_written_for_the_next():
    """Outputs and slopes go to arrays that may be gone by then."""
    params, X, _ = problem()

    def residual(X, Y, dY, lap):
        return Y, (np.broadcast_to(np.eye(2), (len(X), 2, 2)), None, None)

    residual_grads(params, X, residual, activation="tanh", backend="numba")
    jacobian(params, X, activation="tanh", backend="numba")
    for plan in passes._kept.by_use.values():
        for name in ("outputs", "slopes", "second", "out"):
            assert plan.job.record[name][0] == 0


def test_a_failed_call_leaves_no_plan_behind():
    made = oracles.make_problem(SIZES, 7, loss="softmax_cross_entropy")
    options = {"loss": "softmax_cross_entropy", "backend": "numba"}
    expected = per_sample_grad_norms(made.params, made.X, made.y, **options)
    wrong = made.y.copy()
    wrong[3] = 9
    with pytest.raises(ValueError, match="class indices"):
        per_sample_grad_norms(made.params, made.X, wrong, **options)
    assert np.array_equal(per_sample_grad_norms(made.params, made.X, made.y, **options), expected)


def test_few_plans_are_kept_and_no_large_ones(monkeypatch):
    for n in range(1, 40):
        norms(*problem(n))
    assert len(passes._kept.by_use) <= memory.Kept.MOST
    passes._kept.by_use.clear()
    monkeypatch.setattr(passes, "MOST_SUMS", 10)
    params, X, y = problem()
    hvp(params, X, y, params, activation="tanh", backend="numba")
    assert not passes._kept.by_use


def test_every_thread_has_its_own():
    data = [problem(seed=seed) for seed in range(4)]
    expected = [norms(*each) for each in data]
    got = [None] * 4

    def work(k):
        got[k] = [norms(*data[k]) for _ in range(50)]

    workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for results, right in zip(got, expected, strict=True):
        assert all(np.array_equal(result, right) for result in results)

"""The benchmark of compiled derivatives: its answers, and what it makes of its timings."""

import numpy as np
import pytest


@pytest.fixture
def bench_family(programs):
    import bench_family

    return bench_family


def record(kind, net, dtype, **ratios):
    timings = {name: {"ratio": ratio} for name, ratio in ratios.items()}
    return {"case": f"{kind}, {net}, n = 8", "dtype": dtype, "timings": timings}


def test_the_mean_is_geometric_and_the_faster_peer_counts(bench_family):
    peers = [{"torch.func": 2.0, "JAX": 9.0}, {"torch.func": 50.0, "JAX": 8.0}]
    records = [record("hvp", net, "float32", **p) for net, p in zip("ab", peers, strict=True)]
    [row] = bench_family.reached([*records, record("none", "a", "float32")])
    assert row["reached"] == "4.00x"
    assert row["worst cell"] == "2.00x, a float32"


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of torch itself
def test_all_contenders_of_a_small_net_agree(bench_family):
    pytest.importorskip("jax")
    pytest.importorskip("torch")
    pytest.importorskip("numba")
    rng = np.random.default_rng(0)
    params = bench_family.init_params([3, 4, 2], rng)
    v = [bench_family.Layer(W + 1, b - 1) for W, b in params]
    task = bench_family.Task(params, v, rng.random((5, 3)), rng.random((5, 2)))
    for kind in bench_family.GOALS:
        case = bench_family.make_case(kind, kind, "float64", task)
        for contender in case.contenders:
            got = contender.read(contender.build()())
            assert bench_family.compare.largest_error(got, case.expected) < 1e-10

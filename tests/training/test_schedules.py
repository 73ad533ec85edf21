"""Schedules: torch's learning rates as arrays."""

import numpy as np
import pytest

from mlp_backprop import schedules


def torch_rates(steps, make):
    """The rates of a torch scheduler, step by step."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = make(torch.optim.lr_scheduler, optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if len(rates) < steps:
            scheduler.step()
    return rates


def assert_same(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)
    assert ours.dtype == np.float64


@pytest.mark.parametrize("steps", [1, 2, 10, 1000])
@pytest.mark.parametrize("final", [0.0, 0.01, 0.3])
def test_cosine(steps, final):
    theirs = torch_rates(steps, lambda torch, o: torch.CosineAnnealingLR(o, steps, eta_min=final))
    assert_same(schedules.cosine(0.3, steps, final=final), theirs)


@pytest.mark.parametrize("warmup", [1, 4, 10])
def test_cosine_after_a_warm_up(warmup):
    rates = schedules.cosine(0.3, 10, warmup=warmup, final=0.1)
    assert_same(rates[:warmup], 0.3 * np.arange(1, warmup + 1) / (warmup + 1))
    assert_same(rates[warmup:], schedules.cosine(0.3, 10 - warmup, final=0.1))


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 100, 1001])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pct_start": 0.6, "div_factor": 10.0, "final_div_factor": 100.0},
        {"pct_start": 0.0},
        {"pct_start": 0.9},
    ],
)
def test_one_cycle(steps, options):
    theirs = torch_rates(steps, lambda torch, o: torch.OneCycleLR(o, 0.3, steps, **options))
    assert_same(schedules.one_cycle(0.3, steps, **options), theirs)


def test_one_cycle_from_the_top():
    """Where torch divides by 0, as the top is at the first step; and without a way down."""
    rates = schedules.one_cycle(0.3, 2, pct_start=0.5, final_div_factor=10.0)
    assert_same(rates, [0.3, 0.3 / 250])
    rates = schedules.one_cycle(0.3, 5, pct_start=1.0)
    assert_same(rates[[0, 2, 4]], [0.3 / 25, (0.3 / 25 + 0.3) / 2, 0.3])


@pytest.mark.parametrize("gamma", [0.9, 1.0, 1.1])
def test_exponential(gamma):
    theirs = torch_rates(50, lambda torch, o: torch.ExponentialLR(o, gamma))
    assert_same(schedules.exponential(0.3, 50, gamma=gamma), theirs)


@pytest.mark.parametrize("step_size", [1, 3, 50, 80])
@pytest.mark.parametrize("gamma", [None, 0.5])
def test_step(step_size, gamma):
    options = {} if gamma is None else {"gamma": gamma}
    theirs = torch_rates(50, lambda torch, o: torch.StepLR(o, step_size, **options))
    assert_same(schedules.step(0.3, 50, step_size=step_size, **options), theirs)


ALL = [
    schedules.constant,
    lambda rate, steps: schedules.cosine(rate, steps, warmup=min(2, steps), final=0.01),
    schedules.one_cycle,
    lambda rate, steps: schedules.exponential(rate, steps, gamma=0.9),
    lambda rate, steps: schedules.step(rate, steps, step_size=2),
]


@pytest.mark.parametrize("schedule", ALL)
def test_a_rate_for_each_member(schedule):
    rates = [0.1, 0.0, 2.0]
    for given in (rates, tuple(rates), np.array(rates), np.array(rates, "float32")):
        of_all = schedule(given, 9)
        assert of_all.shape == (3, 9)
        for e in range(3):
            np.testing.assert_array_equal(of_all[e], schedule(float(given[e]), 9))


@pytest.mark.parametrize("schedule", ALL)
@pytest.mark.parametrize("rate", [1, np.float32(0.5), np.int64(2), 0.0])
def test_an_array_of_its_own(schedule, rate):
    for steps in (0, 1, np.int64(5)):
        rates = schedule(rate, steps)
        assert rates.shape == (steps,)
        assert rates.dtype == np.float64
        assert rates.flags.writeable
        assert np.all(rates >= 0)


def test_by_name():
    assert list(schedules.SCHEDULES) == ["constant", "cosine", "one_cycle"]
    for name, schedule in schedules.SCHEDULES.items():
        assert schedule is getattr(schedules, name)
        assert schedule(0.1, 5).shape == (5,)


@pytest.mark.parametrize(
    ("name", "arguments", "options", "message"),
    [
        ("constant", (-0.1, 3), {}, "learning_rate must be finite and not negative, got -0.1"),
        ("constant", (np.nan, 3), {}, "learning_rate must be finite and not negative, got nan"),
        ("constant", ([0.1, np.inf], 3), {}, "learning_rate must be finite .*, got inf"),
        ("constant", ("fast", 3), {}, "learning_rate must be a number, got str"),
        ("constant", (None, 3), {}, "learning_rate must be a number, got NoneType"),
        ("constant", (np.ones((2, 2)), 3), {}, "learning_rate must be a number, got numpy.ndarray"),
        ("constant", (0.1, -1), {}, "steps must be 0 or more, got -1"),
        ("constant", (0.1, 2.0), {}, "steps must be an integer, got 2.0"),
        ("constant", (0.1, True), {}, "steps must be an integer, got True"),
        ("cosine", (0.1, 3), {"warmup": 4}, "warmup must be steps or fewer, 3, got 4"),
        ("cosine", (0.1, 3), {"warmup": -1}, "warmup must be 0 or more, got -1"),
        ("cosine", (0.1, 3), {"warmup": 0.5}, "warmup must be an integer, got 0.5"),
        ("cosine", (0.1, 3), {"final": -1}, "final must be finite and not negative, got -1"),
        ("one_cycle", (0.1, 3), {"pct_start": 30}, r"pct_start must be in \[0, 1\], got 30"),
        ("one_cycle", (0.1, 3), {"div_factor": 0}, "div_factor must be finite and positive"),
        ("one_cycle", (0.1, 3), {"final_div_factor": -1}, "final_div_factor must be finite"),
        ("exponential", (0.1, 3), {"gamma": 0}, "gamma must be finite and positive, got 0"),
        ("step", (0.1, 3), {"step_size": 0}, "step_size must be 1 or more, got 0"),
        ("step", (0.1, 3), {"step_size": 2, "gamma": "a"}, "gamma must be a number, got str"),
    ],
)
def test_what_makes_no_schedule_is_refused(name, arguments, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(schedules, name)(*arguments, **options)

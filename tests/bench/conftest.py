"""The programs of benchmarks/, for the tests of what runs on a card."""

from types import SimpleNamespace

import pytest

RATES = {"float32": 50e12, "tf32": 400e12, "bfloat16": 800e12}  # of a made-up card


@pytest.fixture
def programs() -> SimpleNamespace:
    """The files of benchmarks/, which are programs beside each other and no package."""
    import bench_gpu
    import check_gpu
    import gpu_answers
    import gpu_card
    import gpu_cells
    import gpu_contenders
    import gpu_expected
    import gpu_floors
    import gpu_steps

    return SimpleNamespace(
        answers=gpu_answers,
        bench=bench_gpu,
        card=gpu_card,
        cells=gpu_cells,
        check=check_gpu,
        contenders=gpu_contenders,
        expected=gpu_expected,
        floors=gpu_floors,
        steps=gpu_steps,
        limits=gpu_floors.Limits(rates=RATES, bandwidth=4e12, special=4e12),
    )

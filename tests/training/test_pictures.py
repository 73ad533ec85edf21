"""Pictures: what is drawn is what the history says, drawn without a screen."""

import sys
from io import BytesIO

import numpy as np
import pytest

from mlp_backprop import History, Net, TrainResult, plot_history


def made(loss, validation_loss=None, best_epoch=0):
    loss = np.asarray(loss, dtype=float)
    none = np.full_like(loss, np.nan)
    validation = none if validation_loss is None else np.asarray(validation_loss, dtype=float)
    history = History(loss, validation, none, none, none)
    return TrainResult(Net([]), history, best_epoch, "finished", {})


@pytest.fixture
def axes():
    """Of a figure that belongs to no window."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib is not installed")
    return figure.Figure().subplots()


@pytest.fixture
def pyplot():
    matplotlib = pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    yield pyplot
    pyplot.close("all")


def lines(axes):
    return [(line.get_label(), *map(list, line.get_data())) for line in axes.get_lines()]


def words(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_losses_and_the_best_epoch(axes):
    result = made([4, 2, 1, 0.5], [5, 3, 2, 2.5], best_epoch=2)
    assert plot_history(result, axes) is axes
    assert lines(axes) == [
        ("training", [0, 1, 2, 3], [4, 2, 1, 0.5]),
        ("validation", [0, 1, 2, 3], [5, 3, 2, 2.5]),
        ("best: epoch 2", [2], [2]),
    ]
    assert words(axes) == ["training", "validation", "best: epoch 2"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert axes.get_yscale() == "log"
    axes.figure.savefig(BytesIO())


def test_without_validation_no_epoch_is_marked(axes):
    plot_history(made([4, 2, 1], best_epoch=2), axes)
    assert lines(axes) == [("training", [0, 1, 2], [4, 2, 1])]
    assert words(axes) == ["training"]


def test_members_have_lines_of_their_own(axes):
    loss = [[4, 5, 6], [3, 4, 5]]
    result = made(loss, [[9, 8, 7], [8, 9, 6]], best_epoch=np.array([1, 0, 1]))
    plot_history(result, axes)
    drawn = lines(axes)
    assert [values for _, _, values in drawn[:3]] == [[4, 3], [5, 4], [6, 5]]
    assert [values for _, _, values in drawn[3:6]] == [[9, 8], [8, 9], [7, 6]]
    assert drawn[6:] == [("best epochs", [1, 0, 1], [8, 8, 6])]
    assert words(axes) == ["training", "validation", "best epochs"]


@pytest.mark.parametrize(
    ("loss", "validation", "scale"),
    [
        ([2, 1, 0], None, "linear"),
        ([2, 1, 0.1], [3, -1, 1], "linear"),
        ([2, np.nan, np.inf], [3, 1, np.nan], "log"),
    ],
)
def test_the_scale_is_logarithmic_where_it_can_be(axes, loss, validation, scale):
    plot_history(made(loss, validation), axes)
    assert axes.get_yscale() == scale
    axes.figure.savefig(BytesIO())


def test_a_figure_of_its_own(pyplot):
    first, second = (plot_history(made([2, 1])) for _ in range(2))
    assert first.figure is not second.figure
    assert pyplot.gcf() is second.figure


def test_a_missing_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"needs matplotlib.*pip install 'mlp-backprop\[plot\]'"):
        plot_history(made([2, 1]))

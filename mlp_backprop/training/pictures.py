"""Pictures of training runs; matplotlib is imported when it is to make a figure.

Colours are those of M. Okabe and K. Ito, "Color universal design" (2008), which colour-blind
readers can tell apart; the lines differ in their strokes as well.
"""

from typing import Any

import numpy as np

from mlp_backprop.training.results import TrainResult
from mlp_backprop.types import Array

TRAINING = {"color": "#0072B2", "linestyle": "-"}
VALIDATION = {"color": "#D55E00", "linestyle": "--"}


def plot_history(result: TrainResult, ax: Any = None) -> Any:
    """Draw the losses of a run, epoch by epoch, with the best epoch marked.

    Parameters
    ----------
    result : TrainResult
        Of one net, or of members, each of which has lines of its own.
    ax : matplotlib Axes, optional
        Where to draw. None: in a new figure of pyplot.

    Returns
    -------
    matplotlib Axes
        With a logarithmic scale of losses, unless one is 0 or below. Epoch 0 is before the first
        step. Without validation the training loss stands alone, and no epoch is marked.

    Raises
    ------
    ImportError
        matplotlib not installed.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import init_params, plot_history, train
    >>> X = np.linspace(-1, 1, 50)[:, None]
    >>> axes = plot_history(train(init_params([1, 5, 1], rng=0), X, np.sin(X), epochs=10))
    >>> axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()
    ('epoch', 'loss', 'log')
    """
    axes = _new_axes() if ax is None else ax
    losses, validation = _columns(result.history.loss), _columns(result.history.validation_loss)
    _draw(axes, losses, "training", TRAINING)
    drawn = [losses]
    if not np.isnan(validation).all():
        _draw(axes, validation, "validation", VALIDATION)
        drawn.append(validation)
        best = np.atleast_1d(result.best_epoch)
        at_best = validation[best, np.arange(len(best))]
        label = f"best: epoch {best[0]}" if len(best) == 1 else "best epochs"
        axes.plot(best, at_best, label=label, color="black", marker="o", linestyle="")
    values = np.concatenate(drawn)
    if (values[np.isfinite(values)] > 0).all():
        axes.set_yscale("log")
    axes.set(xlabel="epoch", ylabel="loss")
    axes.legend()
    return axes


def _new_axes() -> Any:
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"plot_history needs matplotlib ({error}): pip install 'mlp-backprop[plot]'"
        ) from error
    return pyplot.subplots(layout="constrained")[1]


def _columns(values: Array) -> Array:
    """One for each member, (epochs + 1, E)."""
    return np.reshape(values, (len(values), -1))


def _draw(axes: Any, values: Array, label: str, style: dict[str, str]) -> None:
    """A line for each member, the first of which has the label."""
    labels = [label] + ["_"] * (values.shape[1] - 1)
    alpha = 1.0 if values.shape[1] == 1 else 0.5
    axes.plot(np.arange(len(values)), values, label=labels, linewidth=1.5, alpha=alpha, **style)

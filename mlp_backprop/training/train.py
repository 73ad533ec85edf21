"""`train`: check everything, choose who takes the steps, and go on until it is over."""

import math
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from mlp_backprop.edge import backends, numbers
from mlp_backprop.edge.arguments import type_name
from mlp_backprop.engines import choice
from mlp_backprop.maths.runs import (
    DIVERGED,
    HISTORY,
    INTERRUPTED,
    RUNNING,
    STOPPED,
    State,
    Task,
)
from mlp_backprop.nets.vectors import layers_like, unravel
from mlp_backprop.training import checked, lbfgs, reference, states
from mlp_backprop.training.checked import Data
from mlp_backprop.training.progress import Show, shown
from mlp_backprop.training.results import STATUSES, EpochInfo, TrainResult, history_of
from mlp_backprop.types import (
    ActivationNames,
    Array,
    ArrayLike,
    BackendName,
    LossName,
    Net,
    Params,
    Precision,
)

SLICE = 0.1  # seconds after which a run comes back, for Ctrl-C, progress, and a new look at speed


def train(
    net_or_params: Params,
    X: ArrayLike,
    y: ArrayLike,
    *,
    activation: ActivationNames | None = None,
    loss: LossName | None = None,
    sample_weight: ArrayLike | None = None,
    optimizer: Any = "adam",
    learning_rate: Any = None,
    epochs: int = 100,
    batch_size: int = 32,
    shuffle: bool = True,
    seed: int | Sequence[int] = 0,
    validation: Any = None,
    patience: int | None = None,
    weight_average: str | None = None,
    max_grad_norm: float | None = None,
    max_sample_norm: float | None = None,
    layer_scale: Sequence[Any] | None = None,
    rows: Sequence[ArrayLike] | None = None,
    allow_nan: bool = False,
    callback: Callable[[EpochInfo], bool | None] | None = None,
    progress: bool = False,
    resume: dict[str, Any] | None = None,
    backend: BackendName | None = None,
    precision: Precision = "float32",
) -> TrainResult:
    """Train a net, or many: a whole run in one call.

    Parameters
    ----------
    net_or_params : sequence of (W, b), or Net
        Where training begins; never changed. With an axis of E members in front of every W and b
        (`stack_params`, `init_params(..., members=E)`) all members are trained.
    X, y, activation, loss, backend, precision
        As for `compute_grads`. Members may have rows of their own: X (E, n, d_0) and y
        (E, n, d_L), or (E, n) for classes. backend="numba" runs the epochs of nets up to 256 wide
        in compiled code.
    sample_weight : array (n,), optional
        The gradient of a batch is Σ w_i dE_i over its rows, divided by how many they are and by
        the mean weight of the whole training set: a row's weight does not depend on the company it
        keeps in a batch. (scikit-learn divides by the sum of each batch's weights.)
    optimizer : str or row of `optimizers`
        "sgd", "adam", "adamw", "rmsprop", "adagrad", "rprop" with torch's defaults, or a row with
        other ones, `optimizers.Adam(betas=(0.9, 0.99))`. "lbfgs" is SciPy's L-BFGS, an iteration
        an epoch. "rprop" and "lbfgs" take all rows in each step, whatever `batch_size` is.
    learning_rate : float, array, str or None
        One number; one for each step since the run began, as `schedules` make them; or the name of
        a schedule, which begins at torch's default rate for the optimizer. None: that rate. For
        members also (E,) or (E, steps).
    epochs : int
        How often all rows are visited; with `resume`, how often more.
    batch_size : int
        Rows of a step. The last batch of an epoch has what is left, and counts by its rows.
    shuffle : bool
        Whether epoch k = 0, 1, ... visits the rows in the order that
        `numpy.random.Generator(numpy.random.Philox(key=[seed, k])).permutation(n)` draws, on every
        backend, or as they lie.
    seed : int, or sequence of E
        For the order of the rows and for a fraction of `validation`.
    validation : (X, y), (X, y, sample_weight), float or None
        Rows by whose mean loss the net is judged after each epoch, or which fraction of the
        training rows to keep for that: drawn by the seed, of each class the same share.
    patience : int or None
        End after so many epochs without a better validation loss.
    weight_average : {"ema", "swa"} or None
        Judge and return an average of the parameters: over steps, with weights that decay by 0.999
        (sooner at first), or over the ends of the last quarter of the epochs.
    max_grad_norm, max_sample_norm : float or None
        Scale the gradient of a step, or that of each row (times its weight over the mean weight),
        down to this norm.
    layer_scale : sequence of factors, or of pairs for W and b, one for each layer
        By which the learning rate is multiplied there.
    rows : array of int; for members a sequence of E arrays
        The numbers of the rows to train on: folds, or bootstrap samples.
    allow_nan : bool
        Whether X and y may hold nan or inf.
    callback : callable, optional
        Called after every epoch with an EpochInfo (epoch, loss, validation_loss, learning_rate,
        grad_norm, seconds, net); if it returns True, the run ends.
    progress : bool
        Show on stderr how far the run is.
    resume : dict or None
        The `state` of an earlier result: go on from there. The state wins over the net passed, and
        a schedule covers the whole run. 10 epochs and 10 more give the bits of 20, "lbfgs" and
        "swa" apart: the one begins anew, the other averages the last quarter of each call.

    Returns
    -------
    TrainResult
        Named tuple. `net`: a Net, the best by validation, else the last. `history`: loss,
        validation_loss, learning_rate, grad_norm and seconds, arrays with a row per epoch, the
        first of them before the first step; with members (epochs + 1, E). `best_epoch`.
        `status`: "finished", "stopped early", "interrupted" (by Ctrl-C, with all that was reached)
        or "diverged". `state`: plain data, for `resume`.

    Raises
    ------
    TypeError, ValueError, ImportError
        As `compute_grads`, and for options that do not fit, before the first step. A loss or
        gradient that is no longer finite is none: it ends the run before that step, with a
        RuntimeWarning that names it.

    Notes
    -----
    Scale: a loss is the mean over an epoch's rows as they are visited, as `compute_grads` gives
    it with reduction="mean". Every optimizer has the formulas of torch.optim. The same call gives
    the same bits, for any number of threads; a member has those of its run alone on NumPy and
    Numba. Ends of batches, losses and gradients of other backends agree to rounding.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import init_params, train
    >>> X = np.random.default_rng(0).random((1000, 2))
    >>> y = (X**2).sum(axis=1, keepdims=True) / 2
    >>> result = train(init_params([2, 10, 5, 1], rng=0), X, y, learning_rate=0.01, epochs=50)
    >>> result.status, bool(result.history.loss[-1] < 0.01)
    ('finished', True)
    """
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be a function of an EpochInfo, got {type_name(callback)}")
    data = checked.data_of(
        net_or_params, X, y, sample_weight, activation, loss, backend, precision, allow_nan
    )
    seeds = checked.seeds_of(seed, data)
    split = checked.split_of(validation, data, checked.rows_of(rows, data), seeds, backend)
    row = checked.optimizer_row(optimizer)
    checked.check_fits(
        row,
        learning_rate=learning_rate,
        layer_scale=layer_scale,
        max_grad_norm=max_grad_norm,
        max_sample_norm=max_sample_norm,
        weight_average=weight_average,
    )
    task = Task(
        spec=data.spec,
        X=data.X,
        y=data.y,
        weight=data.weight,
        n_members=data.n_members,
        optimizer=row,
        rates=np.empty(0),
        scale=checked.scale_of(layer_scale, data),
        epochs=numbers.whole("epochs", epochs),
        batch_size=checked.batch_size_of(batch_size, row, data),
        shuffle=bool(shuffle),
        seeds=seeds,
        rows=split.rows,
        validation=split.validation,
        validation_rows=split.validation_rows,
        patience=checked.patience_of(patience, validation),
        average=checked.average_of(weight_average),
        max_grad_norm=checked.limit("max_grad_norm", max_grad_norm),
        max_sample_norm=checked.limit("max_sample_norm", max_sample_norm),
    )
    if resume is not None:
        states.check_resumable(resume, task)
        task = task._replace(epochs=task.epochs + states.epochs_of(resume))
    task = task._replace(rates=checked.rates_of(learning_rate, task, data))
    with backends.callers_stream([X], backend):
        if resume is None:
            state = states.begun(task, data.vector, backend)
        else:
            state = states.resumed(task, resume)
        told = callback and partial(_told, callback, task, state, data)
        with shown(progress, task.epochs) as show:
            between = partial(_between, state, show, told)
            _run(task, state, between, told is not None, backend, precision)
    _warn_of_divergence(task, state)
    return _result(task, state, data)


def _run(
    task: Task,
    state: State,
    between: Callable[[], bool],
    whole_epochs: bool,
    backend: BackendName | None,
    precision: str,
) -> None:
    """By L-BFGS, in compiled code, or by the reference."""
    if task.optimizer.name == "lbfgs":
        _drive(lbfgs.Runner(task, state, backend, precision, between), state)
        return
    runner = choice.training(task, state, backend)
    runner = runner or reference.Runner(task, state, backend, precision)
    _drive(runner, state, between, whole_epochs)


def _drive(
    runner: Any,
    state: State,
    between: Callable[[], bool] = lambda: False,
    whole_epochs: bool = False,
) -> None:
    """Go on until no member is left, somebody says stop, or Ctrl-C."""
    try:
        while (state.status == RUNNING).any():
            runner.advance(SLICE, whole_epoch=whole_epochs)
            if between():
                state.status[state.status == RUNNING] = STOPPED
    except KeyboardInterrupt:
        state.status[state.status == RUNNING] = INTERRUPTED


def _between(state: State, show: Show, told: Callable[[], bool] | None) -> bool:
    """Show how far all have come; whether to stop here."""
    epoch = _last_epoch(state)
    losses = (state.loss[epoch], state.validation_loss[epoch])
    show(epoch, *(float(np.nanmean(A)) if np.isfinite(A).any() else math.nan for A in losses))
    return told is not None and told()


def _last_epoch(state: State) -> int:
    """The one that has ended last, of all members."""
    return int(np.flatnonzero(np.isfinite(state.seconds).any(axis=1))[-1])


def _told(
    callback: Callable[[EpochInfo], bool | None], task: Task, state: State, data: Data
) -> bool:
    """What the callback says of the epoch that has just ended."""
    epoch = _last_epoch(state)
    row = [getattr(state, name)[epoch] for name in HISTORY]
    loss, judged, rate, norm, seconds = (float(A[0]) if data.is_one else A.copy() for A in row)
    net = _net(data, state.average if task.average else state.vector)
    return bool(callback(EpochInfo(epoch, loss, judged, rate, norm, seconds, net)))


def _net(data: Data, vector: Array) -> Net:
    """A net with arrays of its own, in memory of its own."""
    xp = data.spec.xp
    own = xp.asarray(vector[0, ...] if data.is_one else vector, copy=True)
    activation, loss = data.names
    return Net(unravel(xp, own, layers_like(data.spec.sizes)), activation, loss)


def _warn_of_divergence(task: Task, state: State) -> None:
    for e in np.flatnonzero(state.status == DIVERGED):
        epoch, k = divmod(int(state.step[e]), task.steps_per_epoch(int(e)))
        member = "" if task.n_members == 1 else f" of member {e}"
        warnings.warn(
            f"the loss or its gradient{member} was no longer finite in epoch {epoch + 1}, step "
            f"{k + 1}: the net before that step is kept; a smaller learning_rate, max_grad_norm, "
            "or scaled data may help",
            RuntimeWarning,
            stacklevel=3,
        )


def _result(task: Task, state: State, data: Data) -> TrainResult:
    best = state.best if task.validation else state.average if task.average else state.vector
    done = states.epochs_done(task, state)
    best_epoch = state.best_epoch if task.validation else done
    status = tuple(STATUSES[k] for k in state.status)
    return TrainResult(
        net=_net(data, best),
        history=history_of(state, int(done.max()) + 1, data.is_one),
        best_epoch=int(best_epoch[0]) if data.is_one else best_epoch.copy(),
        status=status[0] if data.is_one else status,
        state=states.kept(task, state),
    )

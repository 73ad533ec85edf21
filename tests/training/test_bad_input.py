"""What `train` refuses, before the first step, and what it says to do."""

import sys

import numpy as np
import pytest

from mlp_backprop import Net, init_params, train

X = np.random.default_rng(0).random((20, 3))
Y = X[:, :1]
PARAMS = init_params([3, 4, 1], rng=0)
CLASSES = Net(init_params([3, 4, 2], rng=0), "tanh", "softmax_cross_entropy")


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "batch_size must be 1 or more, got 0"),
        ({"batch_size": -3}, ValueError, "batch_size must be 1 or more, got -3"),
        ({"batch_size": 2.5}, TypeError, "batch_size must be an integer"),
        ({"epochs": -1}, ValueError, "epochs must be 0 or more, got -1"),
        ({"learning_rate": -0.1}, ValueError, "not negative"),
        ({"learning_rate": np.nan}, ValueError, "finite"),
        ({"learning_rate": np.ones(7)}, ValueError, "7 entries, the whole run 100 steps"),
        ({"learning_rate": np.ones((2, 200))}, ValueError, "one rate for each step; got shape"),
        ({"learning_rate": "cosin"}, ValueError, "did you mean 'cosine'"),
        ({"optimizer": "adamm"}, ValueError, "did you mean 'adam'"),
        ({"optimizer": "nadam"}, ValueError, "known: .*sgd.*lbfgs"),
        ({"optimizer": 3}, TypeError, r"row of mlp_backprop.optimizers such as Adam\(\), got int"),
        ({"optimizer": "lbfgs", "learning_rate": 0.1}, ValueError, "takes no learning_rate"),
        ({"validation": 1.0}, ValueError, "between 0 and 1, got 1"),
        ({"validation": 0.0}, ValueError, "between 0 and 1, got 0"),
        ({"validation": 0.001}, ValueError, "of 20 rows leaves none for validation"),
        ({"validation": 0.999}, ValueError, "leaves none for training"),
        ({"validation": (X[:, :2], Y)}, ValueError, "validation: X has 2 columns"),
        ({"validation": (X, Y[:5])}, ValueError, "validation: y must have shape"),
        ({"validation": "0.1"}, TypeError, "fraction of the rows; got str"),
        ({"patience": 3}, ValueError, "pass validation="),
        ({"patience": 0, "validation": 0.2}, ValueError, "patience must be 1 or more"),
        ({"weight_average": "emma"}, ValueError, "did you mean 'ema'"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm must be finite and positive"),
        ({"max_sample_norm": -1}, ValueError, "max_sample_norm must be finite and positive"),
        ({"layer_scale": [1.0]}, ValueError, "for each of 2 layers"),
        ({"layer_scale": [1.0, -1.0]}, ValueError, "layer_scale of layer 2 must not be negative"),
        ({"rows": [0, 20]}, ValueError, "rows must name rows from 0 to 19, got 20"),
        ({"rows": [-1]}, ValueError, "got -1"),
        ({"rows": []}, (ValueError, TypeError), "rows"),
        ({"rows": [True, False]}, TypeError, "flatnonzero"),
        ({"seed": [1, 2]}, ValueError, "2 entries for one net"),
        ({"seed": -1}, ValueError, "seed must be 0 or more"),
        ({"seed": "a"}, TypeError, "seed"),
        ({"seed": 2**64}, ValueError, r"seed must be below 2\*\*64"),
        ({"resume": 3}, TypeError, "resume=result.state"),
        ({"sample_weight": np.zeros(20)}, ValueError, "all zero"),
        ({"sample_weight": np.ones(3)}, ValueError, r"shape \(20,\)"),
        ({"backend": "nunba"}, ValueError, "did you mean 'numba'"),
        ({"callback": 3}, TypeError, "callback must be a function"),
    ],
)
def test_options_that_do_not_fit(options, error, match):
    with pytest.raises(error, match=match):
        train(PARAMS, X, Y, **options)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["X", "y"])
def test_rows_without_a_number_are_named(name, bad):
    data = {"X": X.copy(), "y": Y.copy()}
    data[name][13, -1] = bad
    with pytest.raises(ValueError, match=f"{name} holds nan or inf, first in row 13"):
        train(PARAMS, **data)
    with pytest.warns(RuntimeWarning, match="no longer finite"):
        result = train(PARAMS, **data, allow_nan=True, batch_size=5, epochs=1)
    assert result.status == "diverged"


def test_labels_out_of_range():
    y = np.arange(20) % 2
    y[4] = 2
    with pytest.raises(ValueError, match=r"class indices from 0 to 1, got 2 at \[4\]"):
        train(CLASSES, X, y)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"seed": 1}, "whose seed is 0, this call has 1"),
        ({"optimizer": "sgd"}, "whose optimizer is Adam.*this call has SGD"),
        ({"batch_size": 7}, "whose batch_size is 20, this call has 7"),
        ({"net_or_params": init_params([3, 5, 1], rng=0)}, "whose widths is 3-4-1"),
        ({"X": X[:9], "y": Y[:9]}, "whose rows of data is 20, this call has 9"),
        ({"activation": "relu"}, "whose activation is sigmoid identity"),
    ],
)
def test_resume_from_another_run(options, match):
    arguments = {"net_or_params": PARAMS, "X": X, "y": Y, "epochs": 1}
    state = train(**arguments).state
    with pytest.raises(ValueError, match=match):
        train(**(arguments | options), resume=state)


def test_batches_larger_than_the_data_are_all_of_it():
    one, other = (train(PARAMS, X, Y, epochs=3, batch_size=size) for size in (20, 1000))
    assert (one.history.loss == other.history.loss).all()


def test_no_epochs_give_the_net_back():
    result = train(PARAMS, X, Y, epochs=0)
    assert (result.net.params[0].W == PARAMS[0].W).all()
    assert (result.status, result.best_epoch, len(result.history.loss)) == ("finished", 0, 1)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"'lbfgs' needs scipy .*mlp-backprop\[scipy\]"):
        train(PARAMS, X, Y, optimizer="lbfgs")

"""What stands around every public function: signatures that help() can show, keywords, quiet."""

import inspect
import warnings

import numpy as np
import pytest

import mlp_backprop
from mlp_backprop import compute_grads, hvp, jacobian

OF_A_NET = {"activation", "backend"}
OF_NONE = {"backends", "plot_history", *("ravel_params", "stack_params")}
OF_NONE |= {"unravel_params", "unstack_params", *("optimizers", "schedules")}  # two are modules
FUNCTIONS = [name for name in mlp_backprop.__all__ if name[0].islower() and name not in OF_NONE]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_keyword_has_a_name(name):
    parameters = inspect.signature(getattr(mlp_backprop, name)).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    assert kinds <= {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    if name != "init_params":
        assert parameters.keys() >= OF_A_NET


def test_defaults_are_shown():
    assert str(inspect.signature(hvp)) == (
        "(params, X, y, v, *, activation=None, backend=None, loss=None, sample_weight=None, "
        "reduction='mean')"
    )


@pytest.mark.parametrize("function", [hvp, jacobian, compute_grads])
def test_an_unknown_keyword_is_refused_by_the_function_that_was_called(function):
    message = rf"{function.__name__}\(\) has no argument 'los': \(params"
    with pytest.raises(TypeError, match=message):
        function([], [], los="huber")


def test_inf_and_nan_are_results_and_no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss, _ = compute_grads([([[1e308]], [0.0])], [[1e308]], [[0.0]])
    assert np.isinf(loss)

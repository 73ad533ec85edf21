"""The derivation's answers to the problems of oracles.py, which every engine is held to."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from oracles import Problem

from mlp_backprop import LossAndGrads, backprop
from mlp_backprop.edge import validation


def specification(problem: Problem, dtype: Any = np.float32) -> backprop.Spec:
    """What an engine plans for, whatever X and y hold."""
    params, *_, options = problem.astype(dtype)
    return validation.specification(params, options["activation"], options["loss"], "sum", None)


def checked(problem: Problem, reduction: str = "sum") -> validation.Problem:
    """The arguments as the derivation takes them: spec, params, X, y, weight."""
    options = problem.options | {"reduction": reduction, "backend": None}
    return validation.problem(problem.params, problem.X, problem.y, **options)


def by_derivation(problem: Problem, reduction: str = "sum") -> LossAndGrads:
    """Loss and gradients, in the dtype of the problem."""
    spec, *arrays = checked(problem, reduction)
    return backprop.reduced(spec, backprop.loss_and_grad_sums(spec, *arrays))


def change_backward(monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    """A mutant: the backward sweep is that of change(spec, params)."""
    right = backprop.backward
    monkeypatch.setattr(
        backprop, "backward", lambda spec, params, *rest: right(*change(spec, params), *rest)
    )

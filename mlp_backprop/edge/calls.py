"""What every public function has around it: the stream of its arguments, and no warnings."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import numpy as np

from mlp_backprop.edge import backends

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# inf and nan in the data are results like any other (IEEE 754): NumPy need not warn of them.
quietly = np.errstate(all="ignore")


def public(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a public function quietly, and where torch runs if CuPy is to use torch's memory."""
    return on_stream_of_arguments(quietly(function))


def on_stream_of_arguments(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The stream alone, for a function that calls the caller's own, whose warnings are his."""

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        backend: Any = options.get("backend")
        with backends.callers_stream((*args, *options.values()), backend):
            return function(*args, **options)

    return call

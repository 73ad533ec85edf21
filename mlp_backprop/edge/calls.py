"""What every public function has around it: the stream of its arguments, and no warnings."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar, get_args

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
    signature = spelled_out(function)
    names = frozenset(signature.parameters)

    @wraps(function)
    def call(*args: Arguments.args, **options: Arguments.kwargs) -> Result:
        if not names.issuperset(options):
            unknown = next(name for name in options if name not in names)
            raise TypeError(f"{function.__name__}() has no argument {unknown!r}: {signature}")
        if options.get("backend") != "cupy":
            return function(*args, **options)
        with backends.callers_stream((*args, *options.values()), "cupy"):
            return function(*args, **options)

    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def spelled_out(function: Callable[..., Any]) -> inspect.Signature:
    """Its signature for help() and completion: each keyword of **options by name, types left out.

    A type checker reads the source; spelled out, the types of arrays would take half a page.
    """
    signature = inspect.signature(function)
    parameters = list(signature.parameters.values())
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        (options,) = get_args(parameters.pop().annotation)
        defaults = {"reduction": "mean"}  # all others: None
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults.get(name))
            for name in options.__annotations__
        ]
    untyped = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    return inspect.Signature(untyped)

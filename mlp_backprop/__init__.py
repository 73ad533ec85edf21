"""Exact derivatives of multilayer perceptrons, in explicit matrix form.

The derivation is in backprop.py; the table of contents is here:

    compute_grads    loss and gradient of every weight and bias
    prepare_grads    the same for many calls of the same shapes
    forward          outputs of the net
    trace            every Z, H and delta of one pass
    init_params      initial parameters
    check_grads      the gradient against central differences, and torch
    backends         which array libraries are usable here
    Layer            the pair (W, b)
"""

from mlp_backprop.checking import check_grads
from mlp_backprop.gradients import compute_grads, forward, trace
from mlp_backprop.namespaces import backends
from mlp_backprop.parameters import init_params
from mlp_backprop.prepared import prepare_grads
from mlp_backprop.types import Layer

__all__ = [
    "Layer",
    "backends",
    "check_grads",
    "compute_grads",
    "forward",
    "init_params",
    "prepare_grads",
    "trace",
]

__version__ = "0.1.0"

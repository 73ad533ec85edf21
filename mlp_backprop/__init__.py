"""Exact derivatives of multilayer perceptrons, in explicit matrix form.

The derivation is in backprop.py; the table of contents is here:

    compute_grads           loss and gradient of every weight and bias
    prepare_grads           the same for many calls of the same shapes
    forward                 outputs of the net
    trace                   every Z, H and delta of one pass
    init_params             initial parameters
    check_grads             the gradient, and all below, against central differences
    backends                which array libraries are usable here
    Layer, Net              the pair (W, b); parameters with their activation and loss

    per_sample_grads        the gradient of every single sample
    per_sample_grad_norms   their norms, without forming them
    clipped_grads           their sum, each clipped to a norm

    input_grads             gradient of the loss by the inputs
    jacobian                outputs by inputs, or by parameters
    input_hessian_diag      second derivatives of the outputs by each input
    input_hessian_entries   chosen second derivatives
    laplacian               their sum over the inputs
    sobolev_grads           gradient of a loss with targets for slopes too
    residual_grads          gradient of a differential equation's residual

    jvp, vjp                a vector times the Jacobian, and its transpose
    hvp, ggnvp, fisher_vp   Hessian, Gauss-Newton and Fisher matrix times a vector
    hessian, ggn            the matrices themselves
    linear_operator         any of them as a SciPy LinearOperator
    ntk                     the neural tangent kernel
    ravel_params            parameters as one vector
    unravel_params          and back

    train                   a whole training run, of one net or many
    optimizers              Adam and others, for loops of one's own
    schedules               learning rates, one for each step, as arrays
    plot_history            the losses of a run, drawn

    stack_params            parameters of many nets as one, for many nets in one call
    unstack_params          and back
    ensemble_forward        mean and standard deviation of what they predict

Everything that is public can be imported from here, the types of results and arguments too; the
rooms below are internal.
"""

from mlp_backprop.checks.checking import check_grads
from mlp_backprop.derivatives.curvature import ggn, hessian, linear_operator, ntk
from mlp_backprop.derivatives.gradients import Trace, compute_grads, forward, trace
from mlp_backprop.derivatives.inputs import (
    input_grads,
    input_hessian_diag,
    input_hessian_entries,
    jacobian,
    laplacian,
)
from mlp_backprop.derivatives.per_sample import (
    clipped_grads,
    per_sample_grad_norms,
    per_sample_grads,
)
from mlp_backprop.derivatives.prepared import PreparedGrads, prepare_grads
from mlp_backprop.derivatives.products import fisher_vp, ggnvp, hvp, jvp, vjp
from mlp_backprop.derivatives.residuals import residual_grads, sobolev_grads
from mlp_backprop.edge.backends import BackendStatus, backends
from mlp_backprop.engines.memory import keep_freed_memory
from mlp_backprop.nets.initial import init_params
from mlp_backprop.nets.members import stack_params, unstack_params
from mlp_backprop.nets.vectors import ravel_params, unravel_params
from mlp_backprop.training import optimizers, schedules
from mlp_backprop.training.ensembles import MeanAndStd, ensemble_forward
from mlp_backprop.training.pictures import plot_history
from mlp_backprop.training.results import EpochInfo, History, TrainResult
from mlp_backprop.training.train import train
from mlp_backprop.types import Layer, LossAndGrads, Net, Params

__all__ = [
    "BackendStatus",
    "EpochInfo",
    "History",
    "Layer",
    "LossAndGrads",
    "MeanAndStd",
    "Net",
    "Params",
    "PreparedGrads",
    "Trace",
    "TrainResult",
    "backends",
    "check_grads",
    "clipped_grads",
    "compute_grads",
    "ensemble_forward",
    "fisher_vp",
    "forward",
    "ggn",
    "ggnvp",
    "hessian",
    "hvp",
    "init_params",
    "input_grads",
    "input_hessian_diag",
    "input_hessian_entries",
    "jacobian",
    "jvp",
    "laplacian",
    "linear_operator",
    "ntk",
    "optimizers",
    "per_sample_grad_norms",
    "per_sample_grads",
    "plot_history",
    "prepare_grads",
    "ravel_params",
    "residual_grads",
    "schedules",
    "sobolev_grads",
    "stack_params",
    "trace",
    "train",
    "unravel_params",
    "unstack_params",
    "vjp",
]

__version__ = "0.1.0"

keep_freed_memory()

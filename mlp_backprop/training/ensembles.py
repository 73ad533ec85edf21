"""What many nets say together: the mean over members, and how far they are apart."""

from typing import NamedTuple

from mlp_backprop.backprop import accumulator_dtype
from mlp_backprop.edge import validation
from mlp_backprop.edge.calls import public
from mlp_backprop.edge.rules import ABSENT
from mlp_backprop.engines import members
from mlp_backprop.types import ActivationNames, Array, ArrayLike, BackendName, LossName, Params


class MeanAndStd(NamedTuple):
    """Over the members of an ensemble: mean and standard deviation of what they predict."""

    mean: Array
    std: Array


@public
def ensemble_forward(
    params: Params,
    X: ArrayLike,
    *,
    activation: ActivationNames | None = None,
    loss: LossName | None = None,
    backend: BackendName | None = None,
) -> MeanAndStd:
    """Compute mean and standard deviation of what many nets predict.

    Parameters
    ----------
    params : sequence of (W, b), or Net
        Of E nets: W (E, d_l, d_{l-1}) and b (E, d_l) per layer, as `stack_params` and
        `init_params(..., members=E)` give them.
    X : array (n, d_0) for all, or (E, n, d_0)
    activation, backend
        As for `compute_grads`.
    loss : str, optional
        The loss that the nets were fitted with. Of those that take logits, what is averaged are
        the means that the logits stand for: probabilities, sigmoid or softmax of the logits, and
        for "poisson" rates, exp of the logits. None: the Net's own, or "squared_error".

    Returns
    -------
    mean, std : arrays (n, d_L)
        Over the members; std is divided by E, so it is 0 for one member.

    Raises
    ------
    TypeError, ValueError, ImportError
        As for `forward`; parameters of one net.

    Notes
    -----
    Averaged probabilities of classes sum to 1. Their spread is what the nets do not agree about,
    one part of the uncertainty: B. Lakshminarayanan, A. Pritzel, C. Blundell, "Simple and scalable
    predictive uncertainty estimation using deep ensembles", NeurIPS 2017.

    Examples
    --------
    Three nets without hidden layers, of slopes 1, 2 and 3:

    >>> from mlp_backprop import ensemble_forward
    >>> mean, std = ensemble_forward([([[[1.0]], [[2.0]], [[3.0]]], [[0.0]] * 3)], [[10.0]])
    >>> mean, std
    (array([[20.]]), array([[8.16496581]]))
    """
    net = validation.problem(params, X, ABSENT, activation, loss, "sum", backend=backend, many=True)
    if not net.is_many:
        raise ValueError(
            "ensemble_forward takes the parameters of many nets, W of shape (E, d_l, d_{l-1}), and "
            "params are those of one: stack_params([...]) makes one list of several nets"
        )
    spec, layers, X, *_ = net
    xp, link = spec.xp, spec.loss.link
    H = xp.astype(members.outputs(spec, layers, X, backend), accumulator_dtype(spec), copy=False)
    P = H if link is None else link(xp, H)
    return MeanAndStd(
        *(xp.astype(A, spec.dtype, copy=False) for A in (xp.mean(P, axis=0), xp.std(P, axis=0)))
    )

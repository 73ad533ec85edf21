"""The public functions on a whole net: check the arguments, plan a pass, run it."""

from typing import NamedTuple

from mlp_backprop import backprop
from mlp_backprop.edge import kinds, validation
from mlp_backprop.edge.calls import public
from mlp_backprop.engines import choice, members
from mlp_backprop.types import (
    ActivationNames,
    Array,
    ArrayLike,
    BackendName,
    Layer,
    LossAndGrads,
    LossName,
    Net,
    Params,
    Precision,
    Reduction,
)


class Trace(NamedTuple):
    """Every array of one pass; lists are indexed by the layer, 0 for the input.

    Z[l], H[l] and D[l] = dE/dZ_l have shape (n, d_l), with Z[0] = H[0] = X and D[0] = dE/dX.
    `loss` has one value per sample, (n,); `grads[l - 1]` belongs to layer l. D and grads belong
    to E, the sum of `loss`.
    """

    Z: list[Array]
    H: list[Array]
    D: list[Array]
    loss: Array
    grads: list[Layer]


@public
def compute_grads(
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    *,
    activation: ActivationNames | None = None,
    loss: LossName | None = None,
    reduction: Reduction = "mean",
    sample_weight: ArrayLike | None = None,
    backend: BackendName | None = None,
    precision: Precision = "float32",
) -> LossAndGrads:
    """Compute a loss and its exact gradient with respect to every weight and bias.

    Parameters
    ----------
    params : sequence of (W, b), or Net
        One pair per layer; W has shape (d_l, d_{l-1}), as in torch's nn.Linear, b has (d_l,).
        Their floating dtype is the one everything is computed in. A Net brings its activation
        and its loss along. Many nets in one call, E members, have one more axis in front:
        W (E, d_l, d_{l-1}) and b (E, d_l), see `stack_params`.
    X : array (n, d_0)
        Inputs, one row per sample. Same dtype as the parameters; integers, booleans and lists
        are converted. Of many nets these are for all; (E, n, d_0) gives each its own.
    y : array
        Targets (n, d_L), of the same dtype. For "binary_cross_entropy" values in [0, 1]. For
        "softmax_cross_entropy" class indices (n,), integers, or weights per class (n, d_L),
        not negative, which need not sum to 1. Of many nets for all, or with E in front.
    activation : str or sequence of str, optional
        "identity", "sigmoid", "tanh", "relu", "leaky_relu", "elu", "softplus", "silu" or
        "gelu_tanh". One name is for every hidden layer, before an identity output; a sequence
        names all L layers. None: the Net's own, or "sigmoid".
    loss : str, optional
        "squared_error" (without a factor 1/2), "absolute_error", "huber", "poisson",
        "binary_cross_entropy" or "softmax_cross_entropy", summed over the outputs of a sample.
        The last three take logits. None: the Net's own, or "squared_error".
    reduction : {"mean", "sum"}
        "sum" over the samples, each times its weight, or that sum divided by the sum of the
        weights.
    sample_weight : array (n,), optional
        Weights, not negative, for all of many nets. None: all 1.
    backend : {"numpy", "cupy", "torch", "jax"}, optional
        None: the library of the arrays. A name takes NumPy arrays as well, which are copied to
        that library; the results stay there. "torch" means tensors as arrays: nothing is
        recorded by autograd, and nothing returned requires a gradient. "cupy" takes torch tensors
        on a GPU too, without a copy, and works on torch's current stream.
    precision : {"float32", "float32_exact", "tf32", "bfloat16"}
        How "cupy" multiplies matrices of float32; sums are in float32. "float32": on tensor cores
        where that is as accurate as float32: the whole gradient off by less than 2e-6, in
        emulation. "float32_exact": in float32 arithmetic. "tf32" and "bfloat16": with factors
        rounded to 11 and 8 bits. docs/gpu.md has more of the errors seen in emulation; none has
        been measured on a card yet.

    Returns
    -------
    loss : scalar of the array library, or array (E,) of many nets
        In the parameters' dtype; float32 for half precision, whose range a sum may leave.
    grads : list of Layer
        (W, b) per layer, with the shapes, dtype and library of the parameters.

    Raises
    ------
    TypeError
        Arrays of different libraries or dtypes; anything that does not hold real numbers; arrays
        inside grad, jvp or vmap of torch.func or JAX.
    ValueError
        Shapes that do not fit, unknown names, values out of range, different devices.
    ImportError
        A backend that is not installed, or CuPy without a device.

    Notes
    -----
    Scale: with reduction="mean" the loss equals torch's per-sample loss, summed over outputs and
    averaged over samples. torch's own reduction="mean" divides all but cross entropy over classes
    by n d_L.

    Of many nets with NumPy arrays, each has the bits of its own call; other libraries compute all
    at once, by the derivation, and agree to rounding.

    The gradients are equations (1) to (3) of docs/derivation.md; Rumelhart, Hinton and Williams,
    "Learning representations by back-propagating errors", Nature 323 (1986).

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import compute_grads, init_params
    >>> params = init_params([2, 10, 5, 1], rng=0)
    >>> X = np.array([[0.3, 0.8], [0.6, 0.1]])
    >>> y = (X**2).sum(axis=1, keepdims=True) / 2
    >>> loss, grads = compute_grads(params, X, y)
    >>> [grad.W.shape for grad in grads]
    [(10, 2), (5, 10), (1, 5)]
    """
    names = activation, loss, reduction, backend, precision
    known = kinds.seen.find(kinds.of_call(params, X, y, sample_weight, *names))
    if known is not None:
        own = params.params if isinstance(params, Net) else params
        return choice.repeated(known, own, X, y, sample_weight, backend)
    problem = validation.problem(
        *(params, X, y, activation, loss, reduction, sample_weight, backend),
        precision=precision,
        many=True,
    )
    if problem.is_many:
        return members.loss_and_grads(*problem, backend)
    run = choice.plan(problem.spec, problem.X.shape[0], backend, precision)
    return run(*problem[1:])


@public
def forward(
    params: Params,
    X: ArrayLike,
    *,
    activation: ActivationNames | None = None,
    backend: BackendName | None = None,
) -> Array:
    """Compute the outputs of the last layer, after its activation.

    Parameters
    ----------
    params, X, activation, backend
        As for `compute_grads`.

    Returns
    -------
    array (n, d_L), or (E, n, d_L) of many nets
        H_L: logits under an identity output, the default.

    Examples
    --------
    >>> from mlp_backprop import forward
    >>> forward([([[1.0, 2.0]], [0.5])], [[3.0, 4.0]])
    array([[11.5]])
    """
    net = validation.network(params, X, activation, backend, many=True)
    return members.outputs(net.spec, net.params, net.X, backend)


@public
def trace(
    params: Params,
    X: ArrayLike,
    y: ArrayLike,
    *,
    activation: ActivationNames | None = None,
    loss: LossName | None = None,
    sample_weight: ArrayLike | None = None,
    backend: BackendName | None = None,
) -> Trace:
    """Compute a loss and its gradient and keep everything in between, to look at.

    Parameters
    ----------
    params, X, y, activation, loss, sample_weight, backend
        As for `compute_grads`. There is no `reduction`: deltas and gradients are those of the
        sum over samples, as in the derivation.

    Returns
    -------
    Trace
        Named tuple (Z, H, D, loss, grads), lists indexed by the layer.

    Examples
    --------
    A single neuron with one input, by hand: z = 2 * 3 + 1 = 7, loss (7 - 5)² = 4, delta 2 * 2.

    >>> from mlp_backprop import trace
    >>> steps = trace([([[2.0]], [1.0])], X=[[3.0]], y=[[5.0]])
    >>> steps.Z[1], steps.loss, steps.D[1], steps.grads[0].W
    (array([[7.]]), array([4.]), array([[4.]]), array([[12.]]))
    """
    problem = validation.problem(params, X, y, activation, loss, "sum", sample_weight, backend)
    with choice.undisturbed(problem.spec, problem.X.shape[0]):
        return _trace(problem)


def _trace(problem: validation.Problem) -> Trace:
    spec, layers, X, y, weight = problem
    Z, H = backprop.forward(spec, layers, X)
    values, G = backprop.loss_and_output_grad(spec, H[-1], y, weight)
    deltas = dict(backprop.backward(spec, layers, Z, H, G))
    D = [deltas[1] @ layers[0].W, *(deltas[l] for l in range(1, len(Z)))]
    sums = [backprop.layer_grad_sums(spec, D[l], H[l - 1]) for l in range(1, len(Z))]
    grads = backprop.reduced(spec, backprop.Sums(spec.xp.sum(values), 1.0, sums)).grads
    return Trace(Z, H, D, values, grads)

"""What a type checker accepts of a caller and what it refuses; `make lint` checks it with mypy.

A line that is marked as an error and is none is an error itself. Nothing here is run.
"""

import numpy as np

from mlp_backprop import (
    Layer,
    LossAndGrads,
    Net,
    Params,
    PreparedGrads,
    compute_grads,
    forward,
    hvp,
    init_params,
    jacobian,
    linear_operator,
    optimizers,
    prepare_grads,
    schedules,
    stack_params,
    trace,
    unstack_params,
)


def typed_calls() -> None:
    layers = init_params([2, 10, 5, 1], rng=0)
    params: Params = layers
    X, y = np.ones((4, 2)), np.zeros((4, 1))
    names = ["tanh", "relu", "identity"]

    # Arrays, lists, integers; one name, names, a Net.
    result: LossAndGrads = compute_grads(params, X, y, activation="tanh", loss="huber")
    compute_grads([([[1.0, 2.0]], [3.0])], [[4, 5]], [[6]], activation=names, reduction="sum")
    compute_grads([[np.ones((1, 2)), np.ones(1)]], [np.ones(2), np.ones(2)], y)
    compute_grads(Net(layers, names, "poisson"), X, y, sample_weight=[1.0, 2.0, 0.5, 1.0])
    compute_grads(params, X, y, backend="cupy", precision="tf32")
    forward(Net([Layer(np.ones((1, 2)), np.ones(1))], ("sigmoid",)), X)
    trace(params, X, y).D.reverse()
    grad_fn: PreparedGrads = prepare_grads(params, n=4)
    hvp(params, X, y, grad_fn(params, X, y, out=result.grads).grads)
    nets: list[list[Layer]] = unstack_params(stack_params([layers, layers]))
    net: Net = stack_params([Net(nets[0]), Net(nets[1], "relu")])
    net._replace(params=unstack_params(net)[0].params)

    # Optimizers: layers stay layers, a Net a Net.
    optimizer = optimizers.Adam(betas=(0.9, 0.99))
    state: optimizers.OptimizerState = optimizer.init(params)
    layers, state = optimizer.update(layers, result.grads, state, schedules.cosine(0.1, 3)[0])
    net, state = optimizer.update(Net(layers, "tanh"), result.grads, state, [0.1, 0.2])
    compute_grads(net._replace(params=layers), X, y)

    optimizer.update(layers, result.grads, state, "cosine")  # type: ignore[arg-type]
    optimizers.SGD(momentum="much")  # type: ignore[arg-type]
    schedules.step(0.1, 10)  # type: ignore[call-arg]
    compute_grads(params, X, y, activation="nope")  # type: ignore[arg-type]
    compute_grads(params, X, y, loss="mse")  # type: ignore[arg-type]
    compute_grads(params, X, y, reduction="none")  # type: ignore[arg-type]
    compute_grads(params, X, y, backend="tensorflow")  # type: ignore[arg-type]
    compute_grads(params, X, y, precision="float64")  # type: ignore[arg-type]
    compute_grads(params, 3, y)  # type: ignore[arg-type]
    compute_grads(params, "X", y)  # type: ignore[arg-type]
    compute_grads(params, X, None)  # type: ignore[arg-type]
    compute_grads(0.5, X, y)  # type: ignore[arg-type]
    compute_grads(np.ones(3), X, y)  # type: ignore[arg-type]
    Net(layers, "nope")  # type: ignore[arg-type]
    jacobian(params, X, wrt="outputs")  # type: ignore[arg-type]
    linear_operator("gauss", params, X, y)  # type: ignore[arg-type]

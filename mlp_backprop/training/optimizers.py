"""Optimizers for loops of one's own, and by name for `train`: maths/optimizers.py in public.

    from mlp_backprop import optimizers

    optimizer = optimizers.Adam(betas=(0.9, 0.99))
    state = optimizer.init(params)
    params, state = optimizer.update(params, grads, state, learning_rate)

Each has torch's names, defaults and formulas. Both calls are pure: they never change what they are
given, and the state is plain data. What every optimizer takes and returns stands at `Optimizer`.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple, overload

import numpy as np

from mlp_backprop.edge import numbers
from mlp_backprop.edge.arguments import Location, type_name
from mlp_backprop.edge.calls import quietly
from mlp_backprop.maths import optimizers as rows
from mlp_backprop.nets.vectors import ravel, unravel
from mlp_backprop.training.arguments import of_one_net, read_layers, read_rate
from mlp_backprop.types import Array, ArrayLike, Layer, Net, Pairs, Params

__all__ = [
    "OPTIMIZERS",
    "SGD",
    "Adagrad",
    "Adam",
    "AdamW",
    "Optimizer",
    "OptimizerState",
    "RMSprop",
    "Rprop",
]


class OptimizerState(NamedTuple):
    """What an optimizer carries from step to step: plain data.

    How many steps were taken, and arrays (..., P) in the order of `ravel_params`: as many as the
    optimizer needs, in the library, dtype and place of the parameters.
    """

    step: int
    slots: tuple[Array, ...]


# What each option may be; whatever is not named here is a truth value.
_RANGES = {
    "alpha": numbers.FRACTION,
    "betas": numbers.BELOW_ONE,
    "eps": numbers.POSITIVE,
    "etas": numbers.POSITIVE,
    "initial_accumulator_value": numbers.NOT_NEGATIVE,
    "lr_decay": numbers.NOT_NEGATIVE,
    "momentum": numbers.NOT_NEGATIVE,
    "step_sizes": numbers.POSITIVE,
    "weight_decay": numbers.NOT_NEGATIVE,
}


def _option(name: str, value: object) -> Any:
    """The value of an option, once it is seen to be one that it may have."""
    if name == "nesterov":
        if not isinstance(value, bool | np.bool):
            raise TypeError(f"nesterov must be True or False, got {value!r}")
        return bool(value)
    read_option = numbers.pair if name in ("betas", "etas", "step_sizes") else numbers.real
    return read_option(name, value, _RANGES[name])


class Optimizer(rows.Optimizer):
    """What all optimizers do with parameters; made by `Adam()` and the others.

    `name` is theirs in OPTIMIZERS, `learning_rate` torch's default, and `n_slots` how many arrays
    of the parameters' size a state holds. Parameters may have members in front, E nets in one:
    W (E, d_l, d_{l-1}), b (E, d_l).
    """

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]  # every row is a dataclass
            value = _option(field.name, getattr(self, field.name))
            object.__setattr__(self, field.name, value)

    @quietly
    def init(self, params: Params) -> OptimizerState:
        """Begin: the state before the first step.

        Parameters
        ----------
        params : sequence of (W, b), or Net
            As for `compute_grads`.

        Returns
        -------
        OptimizerState
            (0, slots).
        """
        home, layers, _ = read_layers(params, params)
        return OptimizerState(0, self._first_slots(home, layers, self.learning_rate))

    @overload  # a Net is a tuple, and so a sequence; it is looked for first
    def update(  # type: ignore[overload-overlap]
        self,
        params: Net,
        grads: Params,
        state: OptimizerState,
        learning_rate: float | ArrayLike | None = None,
    ) -> tuple[Net, OptimizerState]: ...

    @overload
    def update(
        self,
        params: Pairs,
        grads: Params,
        state: OptimizerState,
        learning_rate: float | ArrayLike | None = None,
    ) -> tuple[list[Layer], OptimizerState]: ...

    @quietly
    def update(
        self,
        params: Params,
        grads: Params,
        state: OptimizerState,
        learning_rate: float | ArrayLike | None = None,
    ) -> tuple[Net | list[Layer], OptimizerState]:
        """Take one step.

        Parameters
        ----------
        params : sequence of (W, b), or Net
            As for `compute_grads`.
        grads : sequence of (W, b)
            The gradient, of the same shapes, dtype and library.
        state : OptimizerState
            From `init`, or from the step before.
        learning_rate : number, array () or array (E,), optional
            The last is one for each member. None: torch's default for this optimizer.

        Returns
        -------
        params : list of Layer, or Net
            New arrays; a Net if one came.
        state : OptimizerState
            To be passed to the next step.

        Raises
        ------
        TypeError, ValueError
            Gradients or a state of other parameters, a state of another optimizer; a learning rate
            that is negative or not finite.
        """
        home, layers, grad_layers = read_layers(params, grads)
        rate = self.learning_rate if learning_rate is None else learning_rate
        rate = read_rate(rate, home, layers)
        p, g = ravel(home.xp, layers), ravel(home.xp, grad_layers)
        self._check_state(state, p)
        t = state.step + 1
        p, slots = self.step(home.xp, t, p, g, self._slots(home, layers, state, rate), rate)
        moved = unravel(home.xp, p, of_one_net(layers))
        result = params._replace(params=moved) if isinstance(params, Net) else moved
        return result, OptimizerState(t, slots)

    def _first_slots(self, home: Location, layers: list[Layer], rate: Any) -> tuple[Array, ...]:
        return self.first_slots(home.xp, ravel(home.xp, layers), rate)

    def _slots(
        self, home: Location, layers: list[Layer], state: OptimizerState, rate: Any
    ) -> tuple[Array, ...]:
        """Those that the next step begins with."""
        return state.slots

    def _check_state(self, state: object, p: Array) -> None:
        if not isinstance(state, OptimizerState):
            raise TypeError(
                f"state must be an OptimizerState, got {type_name(state)}: begin with "
                "state = optimizer.init(params)"
            )
        kinds_of_slots = [(tuple(slot.shape), slot.dtype) for slot in state.slots]
        if kinds_of_slots != [(tuple(p.shape), p.dtype)] * self.n_slots:
            raise ValueError(
                f"state is not one of {self} for these parameters, {self.n_slots} arrays "
                f"{tuple(p.shape)} of {p.dtype}: begin with state = optimizer.init(params)"
            )


@dataclass(frozen=True)
class SGD(Optimizer, rows.SGD):
    """Gradient descent, with momentum if it is not 0: torch.optim.SGD, without dampening.

    Parameters
    ----------
    momentum : float, not negative
        The share of the last step that is taken again.
    nesterov : bool
        Look ahead by the momentum; it must not be 0 then.
    weight_decay : float, not negative
        What is added to the gradient, times the parameters.

    Examples
    --------
    >>> from mlp_backprop import optimizers
    >>> optimizer = optimizers.SGD()
    >>> params, grads = [([[1.0]], [2.0])], [([[1.0]], [0.0])]
    >>> state = optimizer.init(params)
    >>> params, state = optimizer.update(params, grads, state, learning_rate=0.25)
    >>> params, state
    ([Layer(W=array([[0.75]]), b=array([2.]))], OptimizerState(step=1, slots=()))
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov=True needs a momentum, 0.9 for instance; got momentum=0")


@dataclass(frozen=True)
class Adam(Optimizer, rows.Adam):
    """Steps of about the learning rate, whatever the scale of the gradient: torch.optim.Adam.

    Parameters
    ----------
    betas : (float, float), in [0, 1)
        The shares that the means of gradients and of their squares keep from step to step.
    eps : float, positive
        What is added to the root of the mean square. In float16, 1e-8 is 0: take 1e-4 there.
    weight_decay : float, not negative
        What is added to the gradient, times the parameters.

    Examples
    --------
    >>> import numpy as np
    >>> from mlp_backprop import compute_grads, init_params, optimizers
    >>> X = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    >>> y = (X**2).sum(axis=1, keepdims=True) / 2
    >>> params = init_params([2, 10, 5, 1], rng=0)
    >>> optimizer = optimizers.Adam()
    >>> state = optimizer.init(params)
    >>> for _ in range(500):
    ...     loss, grads = compute_grads(params, X, y)
    ...     params, state = optimizer.update(params, grads, state, learning_rate=0.01)
    >>> bool(loss < 0.01)
    True
    """


@dataclass(frozen=True)
class AdamW(Optimizer, rows.AdamW):
    """Adam whose decay of weights does not go through the gradient: torch.optim.AdamW.

    Parameters
    ----------
    betas, eps
        As for `Adam`.
    weight_decay : float, not negative
        Each step takes the learning rate times it from the parameters.
    """


@dataclass(frozen=True)
class RMSprop(Optimizer, rows.RMSprop):
    """The gradient over the root of a mean of its squares: torch.optim.RMSprop, not centered.

    Parameters
    ----------
    alpha : float, in [0, 1]
        The share that the mean keeps from step to step.
    eps : float, positive
        What is added to the root. In float16, 1e-8 is 0: take 1e-4 there.
    weight_decay, momentum : float, not negative
        As for `SGD`.
    """


@dataclass(frozen=True)
class Adagrad(Optimizer, rows.Adagrad):
    """The gradient over the root of the sum of all its squares: torch.optim.Adagrad.

    Parameters
    ----------
    lr_decay : float, not negative
        The learning rate of step t is divided by 1 + (t - 1) lr_decay.
    weight_decay : float, not negative
        As for `SGD`.
    initial_accumulator_value : float, not negative
        Where the sum begins.
    eps : float, positive
        What is added to the root.
    """


@dataclass(frozen=True)
class Rprop(Optimizer, rows.Rprop):
    """Steps by the sign of the gradient, for full batches: torch.optim.Rprop.

    Each parameter has a size of step of its own, which begins at the learning rate of the first
    update; later ones are not looked at.

    Parameters
    ----------
    etas : (float, float)
        What the size is multiplied with where the gradient has turned, below 1, and elsewhere,
        above 1.
    step_sizes : (float, float)
        The smallest and the largest size.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"etas must be one below 1 and one above 1, got {self.etas}")
        if not self.step_sizes[0] <= self.step_sizes[1]:
            raise ValueError(
                f"step_sizes must be the smallest and the largest, got {self.step_sizes}"
            )

    def _slots(
        self, home: Location, layers: list[Layer], state: OptimizerState, rate: Any
    ) -> tuple[Array, ...]:
        return state.slots if state.step else self._first_slots(home, layers, rate)


OPTIMIZERS: dict[str, Optimizer] = {
    row.name: row for row in (SGD(), Adam(), AdamW(), RMSprop(), Adagrad(), Rprop())
}

"""The table of optimizers: each row moves parameters by a gradient, as torch.optim does.

Given parameters θ, the gradient g, the learning rate α and t = 1, 2, ..., the number of the step:

    sgd       b = μ b + g,   θ = θ − α b                 nesterov: θ = θ − α (g + μ b)          (O1)
    adam      m = m + (1 − β₁) (g − m),   v = β₂ v + (1 − β₂) g²
              α_t = α sqrt(1 − β₂ᵗ) / (1 − β₁ᵗ),   ε_t = ε sqrt(1 − β₂ᵗ)
              θ = θ − α_t m / (sqrt(v) + ε_t)                                                   (O2)
    adamw     θ = θ − α λ θ, then as adam                                                       (O3)
    rmsprop   v = ρ v + (1 − ρ) g²,   b = μ b + g / (sqrt(v) + ε),   θ = θ − α b                (O4)
    adagrad   s = s + g²,   θ = θ − α / (1 + (t − 1) η) g / (sqrt(s) + ε)                       (O5)
    rprop     Δ = η⁺ Δ where g g' > 0, η⁻ Δ where g g' < 0, clipped;  g = 0 where g g' < 0;
              θ = θ − Δ sign(g),   g' = g                                                       (O6)

All but adamw and rprop take g + λ θ for g, λ being weight_decay. What a row carries from step to
step, b, m and v, s, or g' and Δ, are its slots, arrays like θ. A step is elementwise and makes new
arrays of the dtype of θ, of any shape: a vector, or vectors of several nets with a rate for each.

(O1) B. Polyak, "Some methods of speeding up the convergence of iteration methods" (1964);
I. Sutskever, J. Martens, G. Dahl, G. Hinton, "On the importance of initialization and momentum in
deep learning", ICML 2013, for Nesterov's. (O2) D. Kingma, J. Ba, "Adam: a method for stochastic
optimization", ICLR 2015, in the order of operations at the end of its section 2.
(O3) I. Loshchilov, F. Hutter, "Decoupled weight decay regularization", ICLR 2019. (O4) T. Tieleman,
G. Hinton, lecture 6.5 of "Neural networks for machine learning" (2012). (O5) J. Duchi, E. Hazan,
Y. Singer, "Adaptive subgradient methods for online learning and stochastic optimization", JMLR 12
(2011). (O6) M. Riedmiller, H. Braun, "A direct adaptive method for faster backpropagation learning:
the RPROP algorithm", ICNN 1993. Names and defaults are those of torch.optim.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from mlp_backprop.types import Array, Namespace

Slots = tuple[Array, ...]
Rate = Any  # a number, or an array that is broadcast to the parameters


class Optimizer:
    """What the rows have in common: two slots that begin at 0, unless a row says otherwise."""

    name: ClassVar[str]
    learning_rate: ClassVar[float]  # torch's default

    @property
    def n_slots(self) -> int:
        return 2

    def first_slots(self, xp: Namespace, p: Array, rate: Rate) -> Slots:
        """The slots before the first step from p."""
        return tuple(xp.zeros_like(p) for _ in range(self.n_slots))

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        """Parameters and slots after step t = 1, 2, ..."""
        raise NotImplementedError


@dataclass(frozen=True)
class SGD(Optimizer):
    """(O1)."""

    name = "sgd"
    learning_rate = 1e-3
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @property
    def n_slots(self) -> int:
        return 1 if self.momentum else 0

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        g = decayed(p, g, self.weight_decay)
        if self.momentum:
            (b,) = slots
            b = self.momentum * b + g
            slots = (b,)
            g = g + self.momentum * b if self.nesterov else b
        return p - like(xp, rate, p) * g, slots


@dataclass(frozen=True)
class Adam(Optimizer):
    """(O2)."""

    name = "adam"
    learning_rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        return self.moved(xp, t, p, decayed(p, g, self.weight_decay), slots, rate)

    def moved(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        """Without any decay."""
        (m, v), (beta1, beta2) = slots, self.betas
        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * (g * g)
        root = (1 - beta2**t) ** 0.5
        rate_t = like(xp, rate * (root / (1 - beta1**t)), p)
        return p - rate_t * (m / (xp.sqrt(v) + like(xp, self.eps * root, p))), (m, v)


@dataclass(frozen=True)
class AdamW(Adam):
    """(O3)."""

    name = "adamw"
    weight_decay: float = 1e-2

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        p = like(xp, 1 - rate * self.weight_decay, p) * p
        return self.moved(xp, t, p, g, slots, rate)


@dataclass(frozen=True)
class RMSprop(Optimizer):
    """(O4)."""

    name = "rmsprop"
    learning_rate = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0

    @property
    def n_slots(self) -> int:
        return 2 if self.momentum else 1

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        g = decayed(p, g, self.weight_decay)
        v = self.alpha * slots[0] + (1 - self.alpha) * (g * g)
        b = g / (xp.sqrt(v) + self.eps)
        if self.momentum:
            b = self.momentum * slots[1] + b
        return p - like(xp, rate, p) * b, (v, b)[: self.n_slots]


@dataclass(frozen=True)
class Adagrad(Optimizer):
    """(O5)."""

    name = "adagrad"
    learning_rate = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10

    @property
    def n_slots(self) -> int:
        return 1

    def first_slots(self, xp: Namespace, p: Array, rate: Rate) -> Slots:
        return (xp.full_like(p, self.initial_accumulator_value),)

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        g = decayed(p, g, self.weight_decay)
        s = slots[0] + g * g
        rate_t = like(xp, rate / (1 + (t - 1) * self.lr_decay), p)
        return p - rate_t * (g / (xp.sqrt(s) + self.eps)), (s,)


@dataclass(frozen=True)
class Rprop(Optimizer):
    """(O6). The learning rate is the first Δ of all, and not used again."""

    name = "rprop"
    learning_rate = 1e-2
    etas: tuple[float, float] = (0.5, 1.2)
    step_sizes: tuple[float, float] = (1e-6, 50.0)

    def first_slots(self, xp: Namespace, p: Array, rate: Rate) -> Slots:
        return xp.zeros_like(p), xp.zeros_like(p) + like(xp, rate, p)

    def step(
        self, xp: Namespace, t: Any, p: Array, g: Array, slots: Slots, rate: Rate
    ) -> tuple[Array, Slots]:
        before, size = slots
        turn = g * before
        smaller, larger = self.etas
        size = xp.where(turn > 0, larger * size, xp.where(turn < 0, smaller * size, size))
        size = xp.clip(size, *self.step_sizes)
        g = xp.where(turn < 0, xp.zeros_like(g), g)
        return p - size * xp.sign(g), (g, size)


def decayed(p: Array, g: Array, weight_decay: float) -> Array:
    """The gradient with that of λ/2 |θ|²."""
    return g + weight_decay * p if weight_decay else g


def like(xp: Namespace, value: Any, p: Array) -> Any:
    """A number as Python's own, an array in the dtype of p: neither widens what p is."""
    return float(value) if isinstance(value, int | float) else xp.astype(value, p.dtype, copy=False)

"""What bench_training.py trains, on which rows, and how: the same for every contender."""

from functools import cached_property
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop import init_params, optimizers
from mlp_backprop.types import Array, Layer

LEARNING_RATE, EPS = 1e-3, 1e-8  # of Adam, in all rows


class Task:
    """A net, or stacked members of one, with its rows as NumPy arrays, trained by Adam.

    The loss of a row is summed over outputs, that of a batch is the mean over its rows.
    """

    def __init__(
        self,
        layers: list[Layer],
        X: Array,
        y: Array,
        activation: str,
        loss: str,
        batch_size: int,
        shuffle: bool = True,
        eps: float = EPS,
    ) -> None:
        self.layers, self.X, self.y = layers, X, y
        self.activation, self.loss = activation, loss
        self.batch_size, self.shuffle, self.eps = batch_size, shuffle, eps
        self._orders: list[Array] = []

    @property
    def n_members(self) -> int:
        """0 for a single net, whose arrays have no axis of members."""
        W = self.layers[0].W
        return len(W) if W.ndim == 3 else 0

    @property
    def members(self) -> list[list[Layer]]:
        """Each net by itself."""
        if not self.n_members:
            return [self.layers]
        return [[Layer(W[e], b[e]) for W, b in self.layers] for e in range(self.n_members)]

    @property
    def sizes(self) -> tuple[int, ...]:
        return (self.X.shape[1], *(b.shape[-1] for _, b in self.layers))

    @property
    def is_full(self) -> bool:
        """Whether a batch has all rows."""
        return self.batch_size >= len(self.X)

    @property
    def steps_per_epoch(self) -> int:
        return -(-len(self.X) // self.batch_size)

    @property
    def options(self) -> dict[str, Any]:
        """Of `train`."""
        return {
            "activation": self.activation,
            "loss": self.loss,
            "batch_size": self.batch_size,
            "optimizer": optimizers.Adam(eps=self.eps),
            "learning_rate": LEARNING_RATE,
            "shuffle": self.shuffle,
        }

    @cached_property
    def batches(self) -> list[slice]:
        """Places in the order of an epoch."""
        starts = range(0, len(self.X), self.batch_size)
        return [slice(start, start + self.batch_size) for start in starts]

    def orders(self, epochs: int) -> list[Array]:
        """The rows of each epoch as `train` takes them; drawn once, for who must be given them."""
        n = len(self.X)
        for epoch in range(len(self._orders), epochs):
            drawn = np.random.Generator(np.random.Philox(key=[0, epoch])).permutation(n)
            self._orders.append(drawn if self.shuffle else np.arange(n))
        return self._orders[:epochs]

    def epoch_means(self, losses: Array) -> Array:
        """Of each epoch, of losses (steps, ...) of batches."""
        n_rows = [len(range(*batch.indices(len(self.X)))) for batch in self.batches]
        by_epoch = np.reshape(losses, (-1, self.steps_per_epoch, *np.shape(losses)[1:]))
        return np.moveaxis(by_epoch, 1, -1) @ (np.array(n_rows) / len(self.X))

    def astype(self, dtype: str) -> "Task":
        """The same numbers, rounded where they have to be."""
        layers = [Layer(W.astype(dtype), b.astype(dtype)) for W, b in self.layers]
        y = self.y if self.y.dtype.kind == "i" else self.y.astype(dtype)
        how = self.activation, self.loss, self.batch_size, self.shuffle, self.eps
        return Task(layers, self.X.astype(dtype), y, *how)

    def comparable(self) -> "Task":
        """With rows as they lie, and an eps that counts for nothing wherever it is added."""
        how = self.activation, self.loss, self.batch_size
        return Task(self.layers, self.X, self.y, *how, shuffle=False, eps=1e-30)


def flat(layers: Any) -> Array:
    """(P,), or (E, P) of members: W_1 row by row, b_1, W_2, ..., in float64."""
    arrays = [np.asarray(A, dtype=float) for A in chain.from_iterable(layers)]
    lead = arrays[1].shape[:-1]
    return np.concatenate([A.reshape(*lead, -1) for A in arrays], axis=-1)


class Net(NamedTuple):
    """A row of the table: a net, its data, its batches, and how much of it is measured."""

    name: str
    sizes: tuple[int, ...]
    n: int
    batch_size: int
    contenders: tuple[str, ...]
    activation: str = "sigmoid"
    loss: str = "squared_error"
    n_members: int = 0
    epochs: int = 0  # of a sample of ours; 0: as many as fill the time

    def task(self, dtype: str = "float32") -> Task:
        """Inputs in [0, 1], as pixels are, and torch's initial parameters; always the same.

        All are numbers of float32, so that they are the same in float64.
        """
        rng = np.random.default_rng(0)
        layers = init_params(self.sizes, rng, members=self.n_members or None)
        X, y = self._rows(rng)
        task = Task(layers, X, y, self.activation, self.loss, min(self.batch_size, self.n))
        return task.astype("float32").astype(dtype)

    def _rows(self, rng: np.random.Generator) -> tuple[Array, Array]:
        if self.activation == "tanh":
            X = rng.normal(size=(self.n, 4))
            return X, exponentials(X)
        X = rng.random((self.n, self.sizes[0]))
        if self.loss == "softmax_cross_entropy":
            return X, rng.integers(self.sizes[-1], size=self.n)
        return X, np.sum(X**2, axis=1, keepdims=True) / self.sizes[0]


def exponentials(X: Array) -> Array:
    """exp(A) of matrices (2, 2), each given and returned as a row.

    With m = trace A / 2 and A = m I + B, B² = q I: exp(A) = e^m (cosh √q I + sinh √q / √q B).
    """
    m = (X[:, :1] + X[:, 3:]) / 2
    identity = np.array([[1.0, 0.0, 0.0, 1.0]])
    B = X - m * identity
    root = np.sqrt(B[:, :1] ** 2 + B[:, 1:2] * B[:, 2:3] + 0j)
    root = np.where(root == 0, 1e-20, root)
    return (np.exp(m) * (np.cosh(root) * identity + np.sinh(root) / root * B)).real


TORCH = ("torch", "torch_1", "torch_fused", "torch_fused_1")
SINGLE = ("numba", "reference", *TORCH, "jax", "sklearn")

NETS = (
    Net("2-10-5-1, batch 32", (2, 10, 5, 1), 2000, 32, SINGLE),
    Net("8-32-32-1, batch 32", (8, 32, 32, 1), 2000, 32, SINGLE),
    Net("64-64-64-1, batch 32", (64, 64, 64, 1), 2000, 32, SINGLE),
    Net("64-64-64-1, batch 200", (64, 64, 64, 1), 2000, 200, SINGLE),
    Net(
        "784-128-64-10, batch 128",
        *((784, 128, 64, 10), 8192, 128, SINGLE),
        *("relu", "softmax_cross_entropy"),
    ),
    Net(
        "4-32-16-4, all 10 000 rows",
        *((4, 32, 16, 4), 10_000, 10_000, ("numba", "reference", *TORCH, "jax"), "tanh"),
        epochs=1000,
    ),
    Net(
        "100 of 8-32-32-1, batch 64",
        *((8, 32, 32, 1), 2000, 64, ("numba", "alone", "vmap", "vmap_1", "jax")),
        n_members=100,
        epochs=20,
    ),
)

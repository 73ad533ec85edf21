"""The words used in type hints, and the types of nets, parameters, gradients and results."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, TypedDict

# An array of any library, and that library's Array API namespace: there is no common base class.
Array = Any
Namespace = Any
DType = Any


class ArrayObject(Protocol):
    """What every library's arrays have."""

    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> Any: ...
    def __getitem__(self, key: Any, /) -> Any: ...


class TableLike(Protocol):
    """What NumPy can make an array of: a DataFrame, for instance."""

    def __array__(self) -> Any: ...


# What is taken where an array is: nested lists too, up to the three axes of slopes.
Row: TypeAlias = Sequence[float] | ArrayObject
ArrayLike: TypeAlias = (
    ArrayObject | TableLike | Sequence[Row] | Sequence[float] | Sequence[Sequence[Row]]
)

# The names of the tables' rows; tests hold them to the tables.
ActivationName = Literal[
    "identity",
    "sigmoid",
    "tanh",
    "relu",
    "leaky_relu",
    "elu",
    "softplus",
    "silu",
    "gelu_tanh",
]
# A list of names need not be known to be of these; one string must be.
ActivationNames: TypeAlias = ActivationName | Sequence[ActivationName] | list[str] | tuple[str, ...]
LossName = Literal[
    "squared_error",
    "absolute_error",
    "huber",
    "poisson",
    "binary_cross_entropy",
    "softmax_cross_entropy",
]
Reduction = Literal["mean", "sum"]
Precision = Literal["float32", "float32_exact", "tf32", "bfloat16"]
BackendName = Literal["numpy", "numba", "cupy", "torch", "jax"]


class NetOptions(TypedDict, total=False):
    """What functions of a net take besides parameters and inputs, as `compute_grads` does."""

    activation: ActivationNames | None
    backend: BackendName | None


class LossOptions(NetOptions, total=False):
    """The same for functions of a loss."""

    loss: LossName | None
    sample_weight: ArrayLike | None


class SumOptions(LossOptions, total=False):
    """And for those that sum over samples."""

    reduction: Reduction


class Layer(NamedTuple):
    """Weights and biases of one layer, or their gradients: a plain pair with names.

    W has shape (d_l, d_{l-1}), one row per output, as in torch's nn.Linear; b has shape (d_l,).
    Wherever parameters are taken, a plain tuple (W, b) does as well.

    >>> import numpy as np
    >>> layer = Layer(W=np.ones((3, 2)), b=np.zeros(3))
    >>> W, b = layer
    >>> W.shape, b.shape
    ((3, 2), (3,))
    """

    W: Array
    b: Array


# The parameters as everything inside takes them, and as callers may pass them.
Layers = list[Layer]
Pairs: TypeAlias = Sequence[tuple[ArrayLike, ArrayLike]] | Sequence[Sequence[ArrayLike]]


class Net(NamedTuple):
    """Parameters with what belongs to them: plain data, taken wherever `params` is.

    `activation` and `loss` need not be said again then; saying something else is an error.
    Functions that have no loss do not ask for it. `net._replace(params=...)` is a changed copy.

    >>> import numpy as np
    >>> net = Net([(np.ones((10, 2)), np.zeros(10)), (np.ones((1, 10)), np.zeros(1))], "relu")
    >>> print(net)
    Net 2-10-1: relu, squared_error, float64, 41 parameters
    """

    params: Pairs
    activation: ActivationNames = "sigmoid"
    loss: LossName = "squared_error"

    def __str__(self) -> str:
        weights: list[Any] = [W for W, _ in self.params]
        members = ""
        if weights and _n_axes(weights[0]) == 3:
            members, weights = f", {len(weights[0])} members", [W[0] for W in weights]
        sizes = [len(weights[0][0]), *map(len, weights)] if weights else []
        names = [self.activation] if isinstance(self.activation, str) else self.activation
        dtype = str(getattr(weights[0], "dtype", "lists")).rpartition(".")[2] if weights else ""
        return (
            f"Net {'-'.join(map(str, sizes))}: {' '.join(names)}, {self.loss}, {dtype}, "
            f"{n_params(sizes)} parameters{members}"
        )


def _n_axes(W: Any) -> int:
    """Those of an array, or how deep lists lie in each other."""
    if hasattr(W, "shape"):
        return len(W.shape)
    return 1 + _n_axes(W[0]) if isinstance(W, list | tuple) and W else 0


Params: TypeAlias = Net | Pairs


class LossAndGrads(NamedTuple):
    """The value of a loss, and its gradient with respect to every W and b."""

    loss: Array
    grads: list[Layer]


def n_params(sizes: Sequence[int]) -> int:
    """How many weights and biases a net of these widths has."""
    return sum(n_out * (n_in + 1) for n_in, n_out in pairwise(sizes))


def flat(layers: Iterable[tuple[Any, Any]]) -> list[Any]:
    """W_1, b_1, W_2, b_2, ... in one list."""
    return [part for layer in layers for part in layer]

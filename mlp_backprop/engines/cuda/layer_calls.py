"""What a pass over a wide net is given and leaves, as addresses: all that a graph of it depends on.

cuda/layers.py runs the pass.
"""

from itertools import pairwise
from typing import NamedTuple

from mlp_backprop.engines.cuda import cublaslt
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.engines.cuda.layer_shapes import ITEM_BYTES, Arithmetic, Shapes
from mlp_backprop.types import Array, Layer, Layers, flat


class Inputs(NamedTuple):
    """The arguments of a run as kernels and products take them: aligned, y under its own kind."""

    params: Layers
    X: Array
    targets: Array | None
    labels: Array | None
    weight: Array | None

    def arrays(self) -> list[Array]:
        data = (self.X, self.targets, self.labels, self.weight)
        return [*flat(self.params), *(array for array in data if array is not None)]


def make_inputs(real: str, arguments: Arguments) -> Inputs:
    """Copies are made only of what does not lie as it should."""
    params, X, y, weight, mean = arguments[:5]
    if weight is not None:
        weight = _plain(_summing_to_one(weight, real) if mean else weight, real)
    return Inputs(
        params=[Layer(_plain(W, real), _plain(b, real)) for W, b in params],
        X=_plain(X, real),
        targets=_plain(y, real) if y.ndim == 2 else None,
        labels=_plain(y, "int64") if y.ndim == 1 else None,
        weight=weight,
    )


def _plain(array: Array, dtype: str) -> Array:
    """C-contiguous, and at a multiple of the alignment."""
    import cupy

    array = cupy.ascontiguousarray(array, dtype)
    return array if array.data.ptr % cublaslt.ALIGNMENT == 0 else array.copy()


def _summing_to_one(weight: Array, dtype: str) -> Array:
    """The weights over their sum, formed in float64: so each of them is rounded only once."""
    import cupy

    return cupy.divide(weight, weight.sum(dtype="float64"), out=cupy.empty(weight.shape, dtype))


class LayerResults:
    """Loss and gradients, views of one new array; of `out`, if it is given, the dE/dW_l."""

    def __init__(self, s: Shapes, real: str, out: Layers | None) -> None:
        import cupy

        self.array = cupy.empty(s.n_results if out is None else s.loss_offset + 1, real)

        def view(shape: tuple[int, ...], start: int) -> Array:
            return cupy.ndarray(shape, real, self.array.data + start * ITEM_BYTES[real])

        self.loss = view((), s.loss_offset)
        b = [view((size,), at) for size, at in zip(s.sizes[1:], s.bias_offsets, strict=True)]
        if out is None:
            widths = pairwise(s.sizes)
            places = zip(widths, s.grad_offsets, strict=True)
            W = [view((n_out, n_in), at) for (n_in, n_out), at in places]
        else:
            W = [W for W, _ in out]
        self.grads = list(map(Layer, W, b))


def takes_products(out: Layers, inputs: Inputs) -> bool:
    """Whether dE/dW_l can be written to `out` while all that the pass reads is still needed."""
    read = [_span(array) for array in inputs.arrays()]
    return all(
        start % cublaslt.ALIGNMENT == 0
        and not any(start < last and first < end for first, last in read)
        for start, end in (_span(W) for W, _ in out)
    )


def _span(array: Array) -> tuple[int, int]:
    start = array.data.ptr
    return start, start + array.nbytes


class Call(NamedTuple):
    """All that a pass depends on besides its plan: addresses of what it reads and writes."""

    n: int
    divisor: int  # of the sums
    W: tuple[int, ...]  # from l = 1, as b and dW
    b: tuple[int, ...]
    data: tuple[int, ...]  # X, targets, labels and weights; 0 stands for none
    dW: tuple[int, ...]
    sums: int  # dE/db_l and the loss
    stored_X: int = 0  # X as products read it, where it is converted beforehand


def make_call(inputs: Inputs, results: LayerResults, mean: bool) -> Call:
    """The addresses of these arrays. Weights, where there are any, have been divided already."""
    params, *data = inputs
    n = inputs.X.shape[0]
    return Call(
        n=n,
        divisor=n if mean and inputs.weight is None else 1,
        W=tuple([W.data.ptr for W, _ in params]),
        b=tuple([b.data.ptr for _, b in params]),
        data=tuple([0 if array is None else array.data.ptr for array in data]),
        dW=tuple([W.data.ptr for W, _ in results.grads]),
        sums=results.array.data.ptr,
    )


def row_bytes(s: Shapes, types: Arithmetic) -> tuple[int, ...]:
    """Of each array in the data of a call."""
    real = ITEM_BYTES[types.real]
    return s.sizes[0] * real, s.sizes[-1] * real, ITEM_BYTES["int64"], real

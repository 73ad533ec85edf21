"""What a card could do at best: its limits, the work of a cell, and the floor that follows.

    floor = max(bytes / bandwidth, operations / rate, special / special rate)

Bytes are those that any method moves at least once: X, y and the weights in, gradients out.
Operations are those of the products of (1), (3) and the forward pass, two per multiplication with
its addition; special are the exponentials and reciprocals of the activations. Bandwidth and rates
are measured on the card, in the same run; the special functions have a unit of their own, of
which the clock is known.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

# Of one activation, or of one output of a softmax, forward: sigmoid is 1 / (1 + exp(-z)).
SPECIAL = {"identity": 0, "relu": 0, "sigmoid": 2, "tanh": 2, "softmax": 1}

SPECIAL_PER_CLOCK = 16  # per multiprocessor, compute capability 8.0 to 12.0 (programming guide)


class Limits(NamedTuple):
    """Of the card: bytes, operations by precision and special functions per second."""

    bandwidth: float
    rates: dict[str, float]
    special: float


class Work(NamedTuple):
    """Of one loss and gradient, over n rows."""

    bytes: int
    operations: int
    special: int
    fills_tiles: bool  # those of tensor cores, of 16 by 16, are not mostly padding


def work(sizes: tuple[int, ...], activation: str, loss: str, n: int, precision: str) -> Work:
    """What has to be done; class labels are int64, the gradients float32."""
    itemsize = 2 if precision == "bfloat16" else 4
    is_classes = loss == "softmax_cross_entropy"
    targets = 8 if is_classes else itemsize * sizes[-1]
    products = [n_in * n_out for n_in, n_out in pairwise(sizes)]
    n_params = sum(products) + sum(sizes[1:])
    special = SPECIAL[activation] * sum(sizes[1:-1])
    special += SPECIAL["softmax"] * sizes[-1] if is_classes else 0
    return Work(
        bytes=n * (itemsize * sizes[0] + targets) + n_params * (itemsize + 4),
        operations=2 * n * (3 * sum(products) - products[0]),
        special=n * special,
        fills_tiles=min(sizes[:-1]) >= 16,
    )


def floor(needed: Work, limits: Limits, precision: str) -> float:
    """Seconds that no method can be under."""
    rate = limits.rates[precision]
    if precision == "float32" and needed.fills_tiles:
        rate = max(rate, limits.rates["bfloat16"] / 3)  # one product as three of half precision
    return max(
        needed.bytes / limits.bandwidth,
        needed.operations / rate,
        needed.special / limits.special,
    )


def measured_limits(seconds_of: Callable[[Callable[[], Any]], float]) -> Limits:
    """Of the current card, by a large copy and torch's large products; seconds_of(call) times."""
    import cupy

    source = cupy.zeros(2**28, cupy.float32)
    target = cupy.empty_like(source)
    copy = seconds_of(lambda: cupy.copyto(target, source))
    card = cupy.cuda.Device().attributes
    clock = card["MultiProcessorCount"] * card["ClockRate"] * 1e3
    return Limits(2 * source.nbytes / copy, _rates(seconds_of), SPECIAL_PER_CLOCK * clock)


def _rates(seconds_of: Callable[[Callable[[], Any]], float], size: int = 8192) -> dict[str, float]:
    import torch
    from gpu_contenders import torch_precision

    rates = {}
    for precision in ("float32", "tf32", "bfloat16"):
        dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
        A = torch.rand(size, size, device="cuda", dtype=dtype)
        out = torch.empty_like(A)
        with torch_precision(precision):
            seconds = seconds_of(lambda A=A, out=out: torch.matmul(A, A, out=out))
        rates[precision] = 2 * size**3 / seconds
    return rates

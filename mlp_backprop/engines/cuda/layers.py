"""Tier 3 of the CuPy engine, wide nets: layer by layer, products by cuBLASLt, all else in kernels.

A chunk of rows runs, in the letters of backprop.py and with the kernels of cuda/elements.cu,

    H_l  = H_{l-1} W_lᵀ                                product   for l = 1, ..., L - 1
    H_l  = f_l(H_l + b_l); Z_l kept if f' asks         activate
    D_L  = H_{L-1} W_Lᵀ                                product
    D_L  = dE/dZ_L where Z_L = D_L + b_L; loss; (2)    output
    dE/dW_l += D_lᵀ H_{l-1}                            product   for l = L, ..., 1
    D_{l-1}  = D_l W_l                                 product   where l > 1
    D_{l-1}  = D_{l-1} ∘ f'_{l-1}(Z_{l-1}); (2)        delta     where l > 1

Products are planned once per shape, and all that is summed over rows in kernels, each dE/db_l and
the loss, is summed in a fixed order and at last by sum_partials: a result repeats to the last bit.

A mean needs no division of its own: over n rows, products dE/dW_l are scaled by 1/n, and
sum_partials divides; with weights, the kernels are given weights whose sum is 1.
"""

from collections import OrderedDict
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.cuda import build, cublaslt
from mlp_backprop.engines.cuda.arrays import Arguments
from mlp_backprop.engines.cuda.build import Specialisation
from mlp_backprop.engines.cuda.cublaslt import Matrix, Product
from mlp_backprop.engines.cuda.launches import Launches, recorded
from mlp_backprop.engines.cuda.layer_calls import (
    Call,
    LayerResults,
    make_call,
    make_inputs,
    row_bytes,
    takes_products,
)
from mlp_backprop.engines.cuda.layer_shapes import (
    ITEM_BYTES,
    LANES,
    SLAB,
    Arithmetic,
    Shapes,
    arithmetic,
    ceil_div,
    chunk_rows,
    shapes,
)
from mlp_backprop.types import Array, Layer, LossAndGrads, flat

WARPS = 16  # of a block in elements.cu
KERNELS = ("activate", "output", "delta", "sum_partials", "to_stored")
MAX_REGISTERS = 64

MOST_GRAPHS = 16  # that a plan keeps; a loop needs one or two, as its results change places

C_NAMES = {"bfloat16": "bfloat16", "float32": "float", "float64": "double"}


def specialise(spec: Spec, precision: str) -> list[Specialisation] | None:
    """The kernels for each layer; None for a dtype in which they do not compute."""
    types = arithmetic(spec, precision)
    if types is None:
        return None
    common = (
        ("LOSS", spec.loss.name.upper()),
        ("REAL", C_NAMES[types.real]),
        ("STORED", C_NAMES[types.stored]),
    )
    names = [row.name.upper() for row in spec.activations]
    return [
        Specialisation("elements.cu", KERNELS, (("ACTIVATION", name), *common), MAX_REGISTERS)
        for name in names
    ]


class LayerSteps(NamedTuple):
    """What layer l does with so many rows: its products, and how its kernels are launched."""

    forward: Product  # H_{l-1} W_lᵀ
    grad: Product  # D_lᵀ H_{l-1}
    below: Product | None  # D_l W_l; none for layer 1
    grid: tuple[int, int]
    extent: tuple[int, int, int]  # rows, width and stride of H_l and D_l


def layer_steps(shapes: Shapes, types: Arithmetic, rows: int, device: int) -> list[LayerSteps]:
    """The steps of every layer. D_l lies as H_l does."""
    product = partial(cublaslt.product, device, compute=types.compute)
    H = [
        Matrix(rows, size, stride, types.stored)
        for size, stride in zip(shapes.sizes, shapes.strides, strict=True)
    ]
    steps = []
    for l, (below, above) in enumerate(pairwise(H), 1):
        n_out, n_in = above.columns, below.columns
        W = Matrix(n_out, n_in, shapes.weight_strides[l - 1], types.stored)
        dW = Matrix(n_out, n_in, n_in, types.real)
        is_output = l == len(H) - 1
        steps.append(
            LayerSteps(
                forward=product(below, W, above, transpose_B=True),
                grad=product(above, below, dW, transpose_A=True),
                below=product(above, W, below) if l > 1 else None,
                grid=(shapes.loss_blocks, slabs(rows)) if is_output else grid(rows, n_out),
                extent=(rows, n_out, above.stride),
            )
        )
    return steps


def grid(rows: int, width: int) -> tuple[int, int]:
    """A block for each slab of LANES columns."""
    return ceil_div(width, LANES), slabs(rows)


def slabs(rows: int) -> int:
    return ceil_div(rows, SLAB)


def prepare(spec: Spec, n: int, precision: str) -> "LayerRun | None":
    """A pass over up to n rows, on the current device and stream; None if not covered."""
    types, specialisations = arithmetic(spec, precision), specialise(spec, precision)
    if types is None or specialisations is None:
        return None
    modules = [build.module(specialisation) for specialisation in specialisations]
    try:
        return LayerRun(spec, n, types, modules)
    except cublaslt.Unsupported:
        return None


class Buffers:
    """Addresses of what is the plan's own; 0 stands for none.

    The matrices of a chunk, H_l, Z_l and D_l indexed by the layer; converted W_l; partials; and a
    workspace.
    """

    def __init__(self, s: Shapes, types: Arithmetic, rows: int) -> None:
        import cupy

        self.arrays: list[Array] = []  # they keep the memory

        def empty(*shape: int, dtype: str) -> int:
            self.arrays.append(cupy.empty(shape, dtype))
            address: int = self.arrays[-1].data.ptr
            return address

        stored = partial(empty, dtype="uint16" if types.stored == "bfloat16" else types.stored)
        self.H = [stored(rows, stride) for stride in s.strides[1:-1]]
        self.H.insert(0, stored(rows, s.strides[0]) if types.converts else 0)
        self.Z = [
            stored(rows, stride) if keeps else 0
            for stride, keeps in zip(s.strides, s.keeps_Z, strict=True)
        ]
        # D_l and D_{l-1} are there together, never a third.
        pair = [stored(rows, max(s.strides[1:])) for _ in range(2)]
        self.D = [pair[l % 2] for l in range(len(s.sizes))]
        self.W = [
            stored(n_out, stride)
            for n_out, stride in zip(s.sizes[1:], s.weight_strides, strict=True)
            if types.converts
        ]
        self.workspace = empty(cublaslt.WORKSPACE_BYTES, dtype="uint8")
        self.partials = empty(slabs(rows), s.n_partials, dtype="float64")
        item = ITEM_BYTES["float64"]
        self.bias_partials = [self.partials + at * item for at in s.bias_offsets]


class LayerRun:
    """A plan: kernels, products, buffers.

    Nothing in it refers back to it, so that its memory is free as soon as it is dropped.
    """

    def __init__(self, spec: Spec, n: int, types: Arithmetic, modules: list[Any]) -> None:
        import cupy

        device = cupy.cuda.Device()
        free_bytes = device.mem_info[0] + cupy.get_default_memory_pool().free_bytes()
        self.types, self.device = types, device.id
        self.shapes = shapes(spec, types)
        self.rows = chunk_rows(self.shapes, n, device.attributes["L2CacheSize"], free_bytes)
        self.kernels = [{name: m.get_function(name) for name in KERNELS} for m in modules]
        self.row_bytes = row_bytes(self.shapes, types)
        self.steps: dict[int, list[LayerSteps]] = {}
        self._steps_for(max(1, min(n, self.rows)))
        self.buffers = Buffers(self.shapes, types, self.rows)
        self.graphs: OrderedDict[Call, Any] = OrderedDict()  # the last used is the last

    def _steps_for(self, rows: int) -> list[LayerSteps]:
        """There are full chunks and a shorter last one; one length of the latter is kept."""
        if rows not in self.steps:
            if len(self.steps) > 1:
                self.steps.popitem()
            self.steps[rows] = layer_steps(self.shapes, self.types, rows, self.device)
        return self.steps[rows]

    def __call__(self, arguments: Arguments) -> LossAndGrads:
        """The seam of the CuPy engine's tiers; arrays of `out` may be among those that are read."""
        n, real, out = arguments.X.shape[0], self.types.real, arguments.out
        inputs = make_inputs(real, arguments)
        at_once = out is not None and n > 0 and takes_products(out, inputs)
        results = LayerResults(self.shapes, real, out if at_once else None)
        if n == 0:
            results.array.data.memset_async(0, results.array.nbytes)
        else:
            self._run(make_call(inputs, results, arguments.mean))
        if out is None:
            return LossAndGrads(results.loss, results.grads)
        for grad, target in zip(flat(results.grads), flat(out), strict=True):
            if grad is not target:
                target.data.copy_from_device_async(grad.data, grad.nbytes)
        return LossAndGrads(results.loss, [Layer(W, b) for W, b in out])

    def bound(self, arguments: Arguments) -> Launches | None:
        """A pass to be done again and again; None where inputs are converted.

        The same arrays have been passed before, so that all it launches is loaded.
        """
        params, X, y, weight, mean = arguments[:5]
        inputs = make_inputs(self.types.real, arguments)
        given = {id(A) for A in (*flat(params), X, y, weight)}
        if X.shape[0] == 0 or not all(id(A) in given for A in inputs.arrays()):
            return None
        results = LayerResults(self.shapes, self.types.real, None)
        call, reads = make_call(inputs, results, mean), inputs.arrays()
        if self.types.converts and arguments.constant_X:
            reads.append(self._stored(X))
            call = call._replace(stored_X=reads[-1].data.ptr)
        return Launches(
            partial(self._enqueue, call), reads, LossAndGrads(results.loss, results.grads)
        )

    def _stored(self, X: Array) -> Array:
        """All of X as products read it."""
        import cupy

        (n, width), stride = X.shape, self.shapes.strides[0]
        stored = cupy.empty((n, stride), "uint16")
        for first in range(0, n, self.rows):
            given, kept = (A.data.ptr + first * (A.nbytes // n) for A in (X, stored))
            self._convert(given, kept, min(self.rows, n - first), width, stride)
        return stored

    def _run(self, call: Call) -> None:
        """Enqueue a pass, from the second time on as a graph.

        In a loop, memory comes back to the same addresses, and a call is all that a pass depends
        on. A graph waits for a second time because recording takes as long as several launches of
        the pass, which a call that never comes again would pay for nothing, and because loading a
        kernel at its first launch cannot be recorded.
        """
        if call not in self.graphs:
            self._enqueue(call)
            self.graphs[call] = None
            if len(self.graphs) > MOST_GRAPHS:
                self.graphs.popitem(last=False)
            return
        self.graphs.move_to_end(call)
        if self.graphs[call] is None:
            self.graphs[call] = recorded(partial(self._enqueue, call))
        self.graphs[call].launch()

    def _enqueue(self, call: Call) -> None:
        """The launches of a pass, on the current stream."""
        import cupy

        s, buffers, W = self.shapes, self.buffers, call.W
        stream = cupy.cuda.get_current_stream().ptr
        if self.types.converts:
            W = tuple(buffers.W)
            for l, (given, stored) in enumerate(zip(call.W, W, strict=True), 1):
                self._convert(given, stored, s.sizes[l], s.sizes[l - 1], s.weight_strides[l - 1])
        for first in range(0, call.n, self.rows):
            self._chunk(call, W, first, min(self.rows, call.n - first), stream)
        partials = (buffers.partials, slabs(min(self.rows, call.n)), s.n_partials, s.loss_offset)
        blocks = (ceil_div(s.loss_offset, LANES) + 1, 1)
        self._launch(1, "sum_partials", blocks, *partials, float(call.divisor), call.sums)

    def _chunk(self, call: Call, W: tuple[int, ...], first: int, n: int, stream: int) -> None:
        """Forward and backward over n rows, whose sums are added to those of the rows before."""
        s, L, buffers = self.shapes, len(W), self.buffers
        steps, H, Z, D = self._steps_for(n), buffers.H, buffers.Z, buffers.D
        X, *y_and_weight = (
            at and at + first * size for at, size in zip(call.data, self.row_bytes, strict=True)
        )
        if call.stored_X:
            H = [call.stored_X + first * s.strides[0] * ITEM_BYTES[self.types.stored], *H[1:]]
        elif self.types.converts:
            self._convert(X, H[0], n, s.sizes[0], s.strides[0])
        else:
            H = [X, *H[1:]]
        place: dict[str, Any] = {"workspace": buffers.workspace, "stream": stream}
        sums = (s.n_partials, first > 0)
        for l, step in enumerate(steps[:-1], 1):
            step.forward(H[l - 1], W[l - 1], H[l], **place)
            activate = (H[l], Z[l], call.b[l - 1], *step.extent)
            self._launch(l, "activate", step.grid, *activate)
        step = steps[-1]
        step.forward(H[L - 1], W[L - 1], D[L], **place)
        output = (D[L], call.b[-1], *y_and_weight, *step.extent, buffers.bias_partials[-1], *sums)
        self._launch(L, "output", step.grid, *output)
        for l in range(L, 0, -1):
            step, scale = steps[l - 1], 1 / call.divisor
            step.grad(D[l], H[l - 1], call.dW[l - 1], scale=scale, accumulate=first > 0, **place)
            if step.below is None:
                return
            step.below(D[l], W[l - 1], D[l - 1], **place)
            step, l_sums = steps[l - 2], buffers.bias_partials[l - 2]
            delta = (D[l - 1], H[l - 1], Z[l - 1], *step.extent, l_sums, *sums)
            self._launch(l - 1, "delta", step.grid, *delta)

    def _convert(self, given: int, stored: int, rows: int, width: int, stride: int) -> None:
        self._launch(1, "to_stored", grid(rows, width), given, stored, rows, width, stride)

    def _launch(self, l: int, kernel: str, grid: tuple[int, int], *arguments: int | float) -> None:
        """Run a kernel of layer l. CuPy passes an int, and so an address, in eight bytes."""
        self.kernels[l - 1][kernel](grid, (LANES, WARPS), arguments)

"""Tier 4 of the CuPy engine, wide nets: layer by layer, products by cuBLASLt, all else in kernels.

A chunk of rows runs, in the letters of backprop.py and with the kernels of cuda/elements.cu,

    H_l  = H_{l-1} W_lᵀ                              product   for l = 1, ..., L
    H_l  = f_l(H_l + b_l); Z_l kept if f' asks       activate
    D_L  = dE/dH_L, and the loss                     loss
    D_l  = D_l ∘ f'_l(Z_l), and its column sums (2)  delta     for l = L, ..., 1
    dE/dW_l += D_lᵀ H_{l-1}                          product
    D_{l-1}  = D_l W_l, where l > 1                  product

Products are planned once per shape, and all that is summed over rows in kernels, each dE/db_l and
the loss, is summed in a fixed order: a result repeats to the last bit. A small pass that is asked
for again becomes a CUDA graph.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

from mlp_backprop.backprop import Run, Spec, Sums, weight_sum
from mlp_backprop.engines import cublaslt, cuda_build
from mlp_backprop.engines.cublaslt import Matrix, Product
from mlp_backprop.engines.cuda_build import Specialisation
from mlp_backprop.engines.cuda_layer_shapes import (
    SLAB,
    Arithmetic,
    Shapes,
    arithmetic,
    ceil_div,
    chunk_rows,
    shapes,
)
from mlp_backprop.types import Array, Layer, flat

LANES, WARPS = 32, 16  # threads of a block in elements.cu
KERNELS = ("activate", "delta", "loss", "sum_partials", "to_stored")
MAX_REGISTERS = 64

# Inputs of up to this size are copied into a graph in less time than Python takes to launch the
# kernels one by one.
GRAPH_BYTES = 16 << 20

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


class LayerProducts(NamedTuple):
    """The products of layer l."""

    forward: Product  # H_{l-1} W_lᵀ
    grad: Product  # D_lᵀ H_{l-1}
    below: Product | None  # D_l W_l; none for layer 1


def layer_products(
    shapes: Shapes, types: Arithmetic, rows: int, device: int
) -> list[LayerProducts]:
    """The products of every layer for so many rows. D_l lies as H_l does."""
    product = partial(cublaslt.product, device, compute=types.compute)
    H = [
        Matrix(rows, size, stride, types.stored)
        for size, stride in zip(shapes.sizes, shapes.strides, strict=True)
    ]
    products = []
    for l, (below, above) in enumerate(pairwise(H), 1):
        n_out, n_in = above.columns, below.columns
        W = Matrix(n_out, n_in, shapes.weight_strides[l - 1], types.stored)
        dW = Matrix(n_out, n_in, n_in, types.real)
        products.append(
            LayerProducts(
                forward=product(below, W, above, transpose_B=True),
                grad=product(above, below, dW, transpose_A=True),
                below=product(above, W, below) if l > 1 else None,
            )
        )
    return products


def plan(spec: Spec, n: int, precision: str) -> Run | None:
    """A pass over up to n rows on the current device and stream; None for what it does not cover.

    Its sums are arrays of the plan's, until the next run.
    """
    types, specialisations = arithmetic(spec, precision), specialise(spec, precision)
    if types is None or specialisations is None:
        return None
    modules = [cuda_build.module(specialisation) for specialisation in specialisations]
    try:
        return LayerPass(spec, n, types, modules)
    except cublaslt.Unsupported:
        return None


class Inputs(NamedTuple):
    """The arguments of a run as kernels and products take them: aligned, y under its own kind."""

    params: list[Layer]
    X: Array
    targets: Array | None
    labels: Array | None
    weight: Array | None

    def arrays(self) -> list[Array]:
        data = (self.X, self.targets, self.labels, self.weight)
        return [*flat(self.params), *(array for array in data if array is not None)]


def make_inputs(real: str, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Inputs:
    """Copies are made only of what does not lie as it should."""
    return Inputs(
        params=[Layer(_plain(W, real), _plain(b, real)) for W, b in params],
        X=_plain(X, real),
        targets=_plain(y, real) if y.ndim == 2 else None,
        labels=_plain(y, "int64") if y.ndim == 1 else None,
        weight=None if weight is None else _plain(weight, real),
    )


def _plain(array: Array, dtype: str) -> Array:
    """C-contiguous, and at a multiple of the alignment."""
    import cupy

    array = cupy.ascontiguousarray(array, dtype)
    return array if array.data.ptr % cublaslt.ALIGNMENT == 0 else array.copy()


class Buffers:
    """The matrices of a chunk, H_l, Z_l and D_l indexed by the layer, and converted weights."""

    def __init__(self, s: Shapes, types: Arithmetic, rows: int) -> None:
        import cupy

        stored = "uint16" if types.stored == "bfloat16" else types.stored
        empty = partial(cupy.empty, dtype=stored)
        self.H = [empty((rows, stride)) for stride in s.strides[1:]]
        self.H.insert(0, empty((rows, s.strides[0])) if types.converts else None)
        self.Z = [
            empty((rows, stride)) if keeps else None
            for stride, keeps in zip(s.strides, s.keeps_Z, strict=True)
        ]
        # D_l and D_{l-1} are there together, never a third.
        pair = [empty((rows, max(s.strides[1:]))) for _ in range(2)]
        self.D = [pair[l % 2] for l in range(len(s.sizes))]
        self.W = [
            empty((n_out, stride))
            for n_out, stride in zip(s.sizes[1:], s.weight_strides, strict=True)
            if types.converts
        ]


class Results:
    """What a pass leaves: one flat array with the gradients and the loss as views of it."""

    def __init__(self, s: Shapes, types: Arithmetic, slabs: int) -> None:
        import cupy

        self.flat = cupy.empty(s.sums_offset + s.n_sums, types.real)
        self.sums = self.flat[s.sums_offset :]
        self.loss = self.sums[-1:].reshape(())
        self.grads = [
            Layer(
                W=self.flat[start : start + n_in * n_out].reshape(n_out, n_in),
                b=self.sums[first : first + n_out],
            )
            for start, first, (n_in, n_out) in zip(
                s.grad_offsets, s.bias_offsets, pairwise(s.sizes), strict=True
            )
        ]
        self.partials = cupy.empty((slabs, s.n_sums), "float64")
        self.bias_partials = [self.partials.reshape(-1)[first:] for first in s.bias_offsets]


class LayerPass:
    """A plan: kernels, products, buffers.

    Nothing in it refers back to it, so that its memory is free as soon as it is dropped.
    """

    def __init__(self, spec: Spec, n: int, types: Arithmetic, modules: list[Any]) -> None:
        import cupy

        device = cupy.cuda.Device()
        free_bytes = device.mem_info[0] + cupy.get_default_memory_pool().free_bytes()
        self.spec, self.types, self.device = spec, types, device.id
        self.shapes = shapes(spec, types)
        self.rows = chunk_rows(self.shapes, n, device.attributes["L2CacheSize"], free_bytes)
        self.kernels = [{name: m.get_function(name) for name in KERNELS} for m in modules]
        self.products: dict[int, list[LayerProducts]] = {}
        self._products_for(max(1, min(n, self.rows)))

        self.buffers = Buffers(self.shapes, types, self.rows)
        self.results = Results(self.shapes, types, ceil_div(self.rows, SLAB))
        self.workspace = cupy.empty(cublaslt.WORKSPACE_BYTES, "uint8")
        self.last_kind: tuple[Any, ...] | None = None
        self.graph: Graph | None = None

    def _products_for(self, rows: int) -> list[LayerProducts]:
        """There are full chunks and a shorter last one; one length of the latter is kept."""
        if rows not in self.products:
            if len(self.products) > 1:
                self.products.popitem()
            self.products[rows] = layer_products(self.shapes, self.types, rows, self.device)
        return self.products[rows]

    def __call__(self, params: list[Layer], X: Array, y: Array, weight: Array | None) -> Sums:
        """Loss, weights and gradients, summed over the rows of X."""
        inputs = make_inputs(self.types.real, params, X, y, weight)
        arrays = inputs.arrays()
        kind = (*(array.shape for array in arrays), y.ndim)
        if kind != self.last_kind:
            self.last_kind, self.graph = kind, None
            self._enqueue(inputs)
        elif sum(array.nbytes for array in arrays) > GRAPH_BYTES:
            self._enqueue(inputs)
        else:
            self.graph = self.graph or Graph(self._enqueue, inputs)
            self.graph.replay(inputs)
        return Sums(self.results.loss, weight_sum(self.spec, X, weight), self.results.grads)

    def _enqueue(self, inputs: Inputs) -> None:
        """The whole pass, on the current stream."""
        n, n_sums, results = inputs.X.shape[0], self.shapes.n_sums, self.results
        if n == 0:
            results.flat.data.memset_async(0, results.flat.nbytes)
            return
        slabs = ceil_div(min(n, self.rows), SLAB)
        results.partials.data.memset_async(0, slabs * n_sums * results.partials.itemsize)
        W = [W for W, _ in inputs.params]
        if self.types.converts:
            for given, stored in zip(W, self.buffers.W, strict=True):
                self._convert(given, stored)
            W = self.buffers.W
        for start in range(0, n, self.rows):
            self._chunk(inputs, W, slice(start, min(start + self.rows, n)))
        grid = _grid(1, n_sums)
        self._launch(1, "sum_partials", grid, results.partials, slabs, n_sums, results.sums)

    def _chunk(self, inputs: Inputs, W: list[Array], rows: slice) -> None:
        """Forward and backward over some rows, whose sums are added to those of the rows before."""
        n, L, s, results = rows.stop - rows.start, len(W), self.shapes, self.results
        products, H, Z, D = self._products_for(n), [*self.buffers.H], self.buffers.Z, self.buffers.D
        extents = [(n, size, stride) for size, stride in zip(s.sizes, s.strides, strict=True)]
        X, *y_and_weight = (None if array is None else array[rows] for array in inputs[1:])
        if self.types.converts:
            self._convert(X, H[0])
        else:
            H[0] = X
        for l, (_, b) in enumerate(inputs.params, 1):
            self._multiply(products[l - 1].forward, H[l - 1], W[l - 1], H[l])
            self._launch(l, "activate", _grid(n, s.sizes[l]), H[l], Z[l], b, *extents[l])
        loss = (H[L], *y_and_weight, D[L], *extents[L], results.partials, s.n_sums)
        self._launch(L, "loss", _grid(n, 1), *loss)
        for l in range(L, 0, -1):
            delta = (D[l], H[l], Z[l], *extents[l], results.bias_partials[l - 1], s.n_sums)
            self._launch(l, "delta", _grid(n, s.sizes[l]), *delta)
            _, grad, below = products[l - 1]
            dW = results.grads[l - 1].W
            self._multiply(grad, D[l], H[l - 1], dW, accumulate=rows.start > 0)
            if below is not None:
                self._multiply(below, D[l], W[l - 1], D[l - 1])

    def _convert(self, given: Array, stored: Array) -> None:
        rows, width = given.shape
        extent = (rows, width, stored.shape[1])
        self._launch(1, "to_stored", _grid(rows, width), given, stored, *extent)

    def _multiply(
        self, product: Product, A: Array, B: Array, C: Array, accumulate: bool = False
    ) -> None:
        import cupy

        product(
            *(array.data.ptr for array in (A, B, C)),
            accumulate=accumulate,
            workspace=self.workspace.data.ptr,
            stream=cupy.cuda.get_current_stream().ptr,
        )

    def _launch(self, l: int, kernel: str, grid: tuple[int, int], *arguments: Any) -> None:
        """Run a kernel of layer l. CuPy passes numbers as long long, and None as a null pointer."""
        self.kernels[l - 1][kernel](grid, (LANES, WARPS), arguments)


def _grid(rows: int, width: int) -> tuple[int, int]:
    return ceil_div(width, LANES), ceil_div(rows, SLAB)


class Graph:
    """A pass recorded over inputs of its own, to which those of a replay are copied.

    The pass must have run before: compiling, loading and planning cannot be recorded.
    """

    def __init__(self, enqueue: Callable[[Inputs], None], inputs: Inputs) -> None:
        import cupy

        params, *data = inputs
        self.inputs = Inputs(
            [Layer(W.copy(), b.copy()) for W, b in params],
            *(None if array is None else array.copy() for array in data),
        )
        with cupy.cuda.Stream(non_blocking=True) as stream:
            stream.begin_capture()
            enqueue(self.inputs)
            self.graph = stream.end_capture()

    def replay(self, inputs: Inputs) -> None:
        """Enqueue the pass over these inputs on the current stream."""
        import cupy

        for array, given in zip(self.inputs.arrays(), inputs.arrays(), strict=True):
            array.data.copy_from_device_async(given.data, given.nbytes)
        self.graph.launch(cupy.cuda.get_current_stream())

"""All that a compiled pass is told: one record of numbers and addresses, a job."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from numba import carray, from_dtype, types
from numba.extending import intrinsic

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.layout import Layout
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.rows import ACTIVATIONS, LOSSES
from mlp_backprop.engines.compiled.vectors import pointer
from mlp_backprop.types import Array, DType, Layers, flat, n_params

FIELDS = (
    # The caller's arrays: addresses, 0 for what is absent, and strides in bytes
    *("n", "X", "X_row", "X_column", "y", "y_row", "y_column"),
    *("labels", "label_step", "weight", "weight_step"),
    # What a pass of jets.py writes for every row of X: H_L, its tangents, its second derivatives
    *("outputs", "slopes", "second", "n_second"),
    # Tables of its directions and of groups of them, rows of the tile for one group; parts
    *("columns", "pairs", "groups", "n_groups", "block_rows", "jet"),
    # What one of jet_grads.py reads: K directions V_k, what is summed of their squares, and the
    # derivatives of a loss by outputs, slopes and second derivatives; strides in bytes; parts
    *("K", "S", "c", "V", "V_k", "V_row", "V_column"),
    *("GY", "GY_row", "GY_column", "Gt", "Gt_k", "Gt_row", "Gt_column"),
    *("Gs", "Gs_row", "Gs_column", "jet_up", "jet_down"),
    # The net: a layer_table; and addresses of parts
    *("layers", "n_layers", "product", "dots", "loss"),
    # A vector of second_order.py, as the net; a part
    *("vector", "output_product"),
    # What a pass does with a tile; parts with f'' and more, one for each layer
    *("tile", "higher"),
    # How the rows are cut into chunks
    *("n_chunks", "chunk_rows"),
    # Whether a label was seen that is no class
    "unknown",
    # A workspace per worker, and what is where in it
    *("workspaces", "workspace_bytes", *Layout._fields),
    # Arrays to look for anew: a table of where their addresses stand, and where they shall stand
    *("places", "n_places"),
    # Sums of every chunk in float64: of the gradients, as the parameters lie, losses and weights.
    # Then the same of all chunks, divided, in the net's dtype
    *("sums", "n_sums", "results", "is_mean"),
    # What a pass writes for each row of X: where, and how many numbers, or a table of addresses;
    # and a number that it needs, in float64
    *("out", "out_columns", "factor"),
    # Rows of numbers for per_output.py, each of out_columns
    *("records", "n_records"),
)
NO_LABELS = np.empty(0, np.int64)
W_PLACE = 6  # in a row of the layer_table

JOB = np.dtype([(name, np.int64) for name in FIELDS])
PLACE = {name: k for k, name in enumerate(FIELDS)}


class Job:
    """A record, its address, and the arrays that it points to."""

    def __init__(self, **fields: int | Array) -> None:
        self.record = np.zeros(1, JOB)
        self._numbers = self.record.view(np.int64)  # a field by its name takes three times as long
        self.address: int = self.record.ctypes.data
        self.kept: dict[str, Array] = {}
        self.set(**fields)

    def set(self, **fields: int | Array) -> None:
        """Numbers by name, and arrays by their addresses."""
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                self.kept[name] = value
                value = value.ctypes.data
            self._numbers[PLACE[name]] = value

    def forget(self, names: Iterable[str]) -> None:
        """As if these had never been set: no array is kept alive, nor its address."""
        for name in names:
            self.kept.pop(name, None)
            self._numbers[PLACE[name]] = 0

    def follow(self, params: Layers, **arrays: Array) -> None:
        """Let `find_arrays` look where these lie by then, should one be resized in place."""
        layers = self.kept["layers"]
        cells = [layers[l, k : k + 1] for l in range(len(layers)) for k in (W_PLACE, W_PLACE + 1)]
        cells += [self.record[name] for name in arrays]
        followed = [*flat(params), *arrays.values()]
        places = [
            (address_of_data(A), cell.ctypes.data) for A, cell in zip(followed, cells, strict=True)
        ]
        self.set(places=np.array(places), n_places=len(places))
        self.kept |= {"followed": followed}


def job_of(spec: Spec, params: Layers, layout: Layout, **fields: int | Array) -> Job:
    """What every pass is told: the net, where in a workspace things are, and more by name."""
    names = [row.name for row in spec.activations]
    part = partial(address, spec.dtype)
    return Job(
        layers=layer_table(params, names, spec.dtype),
        n_layers=len(names),
        product=part("product"),
        dots=part("dots"),
        loss=part("loss", LOSSES.index(spec.loss.name)) if spec.loss else 0,
        is_mean=spec.reduction == "mean",
        workspace_bytes=layout.size * spec.dtype.itemsize,
        n_sums=n_params(spec.sizes) + 2,
        **layout._asdict(),
        **fields,
    )


def higher(spec: Spec, name: str) -> Array:
    """Where the parts are that give every layer f_l and more derivatives of it."""
    numbers = [ACTIVATIONS.index(row.name) for row in spec.activations]
    return np.array([address(spec.dtype, name, k) for k in numbers], np.int64)


def as_compiled(A: Array) -> Array:
    """The array if compiled code can read it as it lies, else a copy."""
    flags = A.flags
    return A if flags.c_contiguous and flags.aligned else np.require(A, requirements=("C", "A"))


def labels_of(y: Array) -> Array:
    """Labels as compiled code reads them, or none."""
    return y.astype(np.int64, copy=False) if y.ndim == 1 else NO_LABELS


def address_of_data(A: Array) -> int:
    """Where NumPy's object keeps the address of its numbers: behind what every object has."""
    return id(A) + object.__basicsize__


def layer_table(params: Layers, names: list[str], dtype: DType) -> Array:
    """A row per layer: address of f_l, d_{l-1}, d_l, row of H_l, of D_l, and of its parameters.

    That is, their place in W_1, b_1, W_2, ... one after the other, and where W_l and b_l are.
    """
    sizes = [params[0].W.shape[1], *(len(b) for _, b in params)]
    table, h, d, place = [], sizes[0], sum(sizes), 0
    for name, (W, b), (n_in, n_out) in zip(names, params, pairwise(sizes), strict=True):
        f = address(dtype, "activation", ACTIVATIONS.index(name))
        table.append((f, n_in, n_out, h, d, place, W.ctypes.data, b.ctypes.data))
        h, d, place = h + n_out, d + n_out, place + (n_in + 1) * n_out
    return np.array(table, np.int64)


def reader(dtype: np.dtype[Any]) -> Any:
    """A compiled function that gives the record of such fields at an address."""
    record = types.CPointer(from_dtype(dtype))

    @intrinsic
    def pointer_to(typing_context, address):
        def instructions(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(record))

        return record(types.intp), instructions

    @compiled
    def record_at(address):
        return carray(pointer_to(address), 1)[0]

    return record_at


job_at = reader(JOB)


@compiled
def layers_of(job):
    return carray(pointer(np.int64, job.layers), (job.n_layers, 8))

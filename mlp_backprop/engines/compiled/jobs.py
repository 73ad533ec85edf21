"""All that a compiled pass is told: one record of numbers and addresses, a job."""

from functools import lru_cache, partial
from itertools import pairwise

import numpy as np
from numba import carray, from_dtype, types
from numba.extending import intrinsic

from mlp_backprop.backprop import Spec
from mlp_backprop.engines.compiled.formulas import compiled
from mlp_backprop.engines.compiled.layout import Layout
from mlp_backprop.engines.compiled.parts import address
from mlp_backprop.engines.compiled.rows import ACTIVATIONS, LOSSES
from mlp_backprop.engines.compiled.vectors import pointer
from mlp_backprop.types import Array, DType, Layer, flat, n_params

FIELDS = (
    # The caller's arrays: addresses, 0 for what is absent, and strides in bytes
    *("n", "X", "X_row", "X_column", "y", "y_row", "y_column"),
    *("labels", "label_step", "weight", "weight_step"),
    # The net: a layer_table; and addresses of parts
    *("layers", "n_layers", "product", "dots", "loss"),
    # How the rows are cut into chunks
    *("n_chunks", "chunk_rows"),
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
)
NO_LABELS = np.empty(0, np.int64)
W_PLACE = 6  # in a row of the layer_table

JOB = np.dtype([(name, np.int64) for name in FIELDS])
_record = from_dtype(JOB)


class Job:
    """A record, its address, and the arrays that it points to."""

    def __init__(self, record: Array, **fields: int | Array) -> None:
        self.record = record.copy().view(JOB)
        self.address: int = self.record.ctypes.data
        self._kept: dict[str, Array] = {}
        self.set(**fields)

    def set(self, **fields: int | Array) -> None:
        """Numbers by name, and arrays by their addresses."""
        for name, value in fields.items():
            if isinstance(value, np.ndarray):
                self._kept[name] = value
                value = value.ctypes.data
            self.record[name] = value

    def follow(self, params: list[Layer], **arrays: Array) -> None:
        """Let `find_arrays` look where these lie by then, should one be resized in place."""
        layers = self._kept["layers"]
        cells = [layers[l, k : k + 1] for l in range(len(layers)) for k in (W_PLACE, W_PLACE + 1)]
        cells += [self.record[name] for name in arrays]
        followed = [*flat(params), *arrays.values()]
        places = [
            (_address_of_data(A), cell.ctypes.data) for A, cell in zip(followed, cells, strict=True)
        ]
        self.set(places=np.array(places), n_places=len(places))
        self._kept |= {"followed": followed}


def job_of(spec: Spec, params: list[Layer], layout: Layout, **fields: int | Array) -> Job:
    """What every pass is told: the net, where in a workspace things are, and more by name."""
    names = tuple(row.name for row in spec.activations)
    return Job(
        _without_arrays(spec, layout), layers=layer_table(params, names, spec.dtype), **fields
    )


@lru_cache(maxsize=128)  # as all that is kept of nets
def _without_arrays(spec: Spec, layout: Layout) -> Array:
    """All of a record that is known before the arrays are, as numbers: those are copied sooner."""
    part = partial(address, spec.dtype)
    record = np.zeros(1, JOB)
    known = {
        "n_layers": len(spec.activations),
        "product": part("product"),
        "dots": part("dots"),
        "loss": part("loss", LOSSES.index(spec.loss.name)) if spec.loss else 0,
        "is_mean": spec.reduction == "mean",
        "workspace_bytes": layout.size * spec.dtype.itemsize,
        "n_sums": n_params(spec.sizes) + 2,
        **layout._asdict(),
    }
    for name, value in known.items():
        record[name] = value
    return record.view(np.int64)


def as_compiled(A: Array) -> Array:
    """The array if compiled code can read it as it lies, else a copy."""
    flags = A.flags
    return A if flags.c_contiguous and flags.aligned else np.require(A, requirements=("C", "A"))


def labels_of(y: Array) -> Array:
    """Labels as compiled code reads them, or none."""
    return y.astype(np.int64, copy=False) if y.ndim == 1 else NO_LABELS


def _address_of_data(A: Array) -> int:
    """Where NumPy's object keeps the address of its numbers: behind what every object has."""
    return id(A) + object.__basicsize__


def layer_table(params: list[Layer], names: tuple[str, ...], dtype: DType) -> Array:
    """A row per layer: address of f_l, d_{l-1}, d_l, row of H_l, of D_l, and of its parameters.

    That is, their place in W_1, b_1, W_2, ... one after the other, and where W_l and b_l are.
    """
    table = _layer_rows((params[0].W.shape[1], *(len(b) for _, b in params)), names, dtype).copy()
    table[:, W_PLACE:] = [(W.ctypes.data, b.ctypes.data) for W, b in params]
    return table


@lru_cache(maxsize=128)
def _layer_rows(sizes: tuple[int, ...], names: tuple[str, ...], dtype: DType) -> Array:
    """The table before it is known where parameters are."""
    rows, h, d, place = [], sizes[0], sum(sizes), 0
    for name, (n_in, n_out) in zip(names, pairwise(sizes), strict=True):
        f = address(dtype, "activation", ACTIVATIONS.index(name))
        rows.append((f, n_in, n_out, h, d, place, 0, 0))
        h, d, place = h + n_out, d + n_out, place + (n_in + 1) * n_out
    return np.array(rows, np.int64)


@intrinsic
def _record_at(typing_context, address):
    result = types.CPointer(_record)

    def instructions(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(result))

    return result(types.intp), instructions


@compiled
def job_at(address):
    return carray(_record_at(address), 1)[0]


@compiled
def layers_of(job):
    return carray(pointer(np.int64, job.layers), (job.n_layers, 8))

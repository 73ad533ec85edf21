"""Arguments as they are passed: what each is, which library and dtype they share, where they go.

Here an array is read, compared with the others and, once everything is known to fit, placed:
converted to the parameters' dtype, or uploaded. A list or an integer has no floating dtype of its
own and takes the parameters'; another floating dtype is refused, since casting silently would
hide a mistake or lose digits.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import Any, NamedTuple, TypeVar

import numpy as np

from mlp_backprop.edge import backends
from mlp_backprop.types import Array, DType, Layer, Namespace, Net, flat

Row = TypeVar("Row")

FLOATING = {name: name for name in ("float64", "float32", "float16", "bfloat16")}


class Argument(NamedTuple):
    """One array as it was passed. A list is `untyped`: it has no dtype or library of its own."""

    name: str
    array: Array
    xp: Namespace
    untyped: bool = False

    @property
    def is_floating(self) -> bool:
        if self.xp is np:
            return bool(self.array.dtype.kind == "f")
        return bool(self.xp.isdtype(self.array.dtype, "real floating"))


def table_row(what: str, name: object, table: Mapping[str, Row]) -> Row:
    """The row of a table, or an error that lists the names and guesses the one meant."""
    if not isinstance(name, str):
        raise TypeError(f"{what} must be a name (str), got {type_name(name)}")
    if name not in table:
        begun = [row for row in table if name and row.startswith(name.lower())]
        guess = begun or difflib.get_close_matches(name.lower(), list(table), n=1)
        hint = f"; did you mean {guess[0]!r}?" if guess else ""
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(table)}{hint}")
    return table[name]


def read(name: str, value: object) -> Argument:
    """What an argument is, and of which library; lists become NumPy arrays."""
    if type(value) is np.ndarray and value.dtype.char in "fd" and value.dtype.isnative:
        return Argument(name, value, np)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} is a masked array, whose mask would be lost: fill it first")
    xp = backends.namespace_of(value)
    untyped = xp is None and isinstance(value, list | tuple | range | float | int)
    if xp is None or xp is np:
        return _read_numpy(name, value, untyped)
    transform = backends.transform_of(value)
    if transform not in (None, backends.JIT):
        raise TypeError(
            f"{name} is inside {transform}, which does not see through this package: call it "
            "outside; hvp, jacobian, per_sample_grads and others are the derivatives one needs"
        )
    array = backends.as_plain(value)
    if backends.is_sparse(array):
        raise TypeError(f"{name} is sparse: pass {name}.to_dense()")
    if xp.isdtype(array.dtype, "bool"):
        array = xp.astype(array, xp.uint8)
    if not xp.isdtype(array.dtype, ("real floating", "integral")):
        raise _not_real(name, "float64, float32, float16, bfloat16", dtype_name(array.dtype))
    return Argument(name, array, xp)


def _read_numpy(name: str, value: object, untyped: bool) -> Argument:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be read as an array; rows of a list must be numbers, "
            f"and equally many in each ({error})"
        ) from error
    if array.dtype.char not in "?bBhHiIlLqQefd":
        came = f"{array.dtype} (from a {type(value).__name__}){_way_to_numbers(name, value)}"
        raise _not_real(name, "float64, float32, float16", came)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return Argument(name, array, np, untyped)


def _way_to_numbers(name: str, value: Any) -> str:
    """What to do about a sparse matrix, or a table with a column that holds no numbers."""
    if hasattr(value, "toarray"):
        return f": pass {_letter(name)}.toarray()"
    if not hasattr(value, "columns"):
        return ""
    for column in value.columns:
        for item in np.asarray(value[column], object):
            if item is None or type(item).__name__ == "NAType" or item != item:
                return f": column {column!r} holds {item!r}; fill what is missing, or drop its rows"
            if not isinstance(item, Real | np.bool):
                return f": column {column!r} holds {item!r}; leave it out, or make numbers of it"
    return f": its columns are of several kinds; pass {_letter(name)}.astype('float64')"


def _not_real(name: str, floating: str, dtype: str) -> TypeError:
    return TypeError(
        f"{name} must hold real numbers ({floating}, integers or booleans), got dtype {dtype}"
    )


def read_params(params: Any, name: str = "params") -> list[Layer]:
    """The layers, as arguments named by layer."""
    of = "" if name == "params" else f" in {name}"
    if isinstance(params, Net):
        params = params.params
    if not isinstance(params, Sequence) or isinstance(params, str):
        raise TypeError(
            f"{name} must be a sequence of (W, b) pairs, one per layer, "
            f"got {type_name(params)}" + _module_hint(params)
        )
    if len(params) == 0:
        raise ValueError(f"{name} is empty: a net needs at least one layer (W, b)")
    layers = []
    for l, pair in enumerate(params, 1):
        if not isinstance(pair, Sequence) or len(pair) != 2:
            raise TypeError(
                f"layer {l}{of} must be a pair (W, b), got {type_name(pair)}"
                + (f" of length {len(pair)}" if isinstance(pair, Sequence) else "")
                + (f"; of W, b, W, b, ... in one list: {_PAIRS}" if hasattr(pair, "shape") else "")
            )
        W, b = pair
        if W is None or b is None:
            missing = "W" if W is None else "b"
            raise TypeError(f"layer {l}{of} has no {missing}: pass zeros for none")
        layers.append(Layer(read(f"W of layer {l}{of}", W), read(f"b of layer {l}{of}", b)))
    return layers


_PAIRS = "list(zip(flat[::2], flat[1::2]))"


def _module_hint(params: object) -> str:
    if hasattr(params, "parameters"):
        return "; from torch: [(m.weight, m.bias) for m in model if hasattr(m, 'weight')]"
    return ""


def type_name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")


class Location(NamedTuple):
    """The library and device on which everything is computed."""

    xp: Namespace
    device: Any

    def place(self, argument: Argument, dtype: str | None) -> Array:
        """The argument here, in the dtype of that name; None keeps integers as they are."""
        array = argument.array
        if argument.xp is not self.xp:
            array = self._upload(array, dtype)
        if dtype is None or dtype_name(array.dtype) == dtype:
            return array
        return self.xp.astype(array, getattr(self.xp, dtype))

    def place_params(self, layers: list[Layer], dtype: str) -> list[Layer]:
        return [Layer(self.place(W, dtype), self.place(b, dtype)) for W, b in layers]

    def _upload(self, array: Array, dtype: str | None) -> Array:
        # torch takes neither negative strides nor read-only arrays; a dtype that NumPy lacks
        # (bfloat16) is reached by way of float32.
        host_dtype = np.int64 if dtype is None else getattr(np, dtype, np.float32)
        host = np.asarray(array, dtype=host_dtype)
        if not (host.flags.c_contiguous and host.flags.writeable and min(host.strides) >= 0):
            host = host.copy(order="C")
        return self.xp.asarray(host, device=self.device)


def named_home(backend: object) -> Location:
    """A backend's own library, on the device it takes by default."""
    row = table_row("backend", backend, backends.BACKENDS)
    return Location(backends.namespace(row.name), None)


def common_home(arguments: list[Argument], backend: str | None) -> Location:
    strong = [a for a in arguments if not a.untyped]
    xp = _named_namespace(strong, backend) if backend is not None else _inferred_namespace(strong)
    if xp is np:
        return Location(np, None)
    devices = {a.name: backends.device_of(xp, a.array) for a in strong if a.xp is xp}
    if not devices:
        return Location(xp, None)
    _check_one_device(devices)
    return Location(xp, next((device for device in devices.values() if device is not None), None))


def _inferred_namespace(strong: list[Argument]) -> Namespace:
    first, *others = strong or [Argument("", None, np)]
    _check_one_library(first, others)
    return first.xp


def _check_one_library(first: Argument, others: list[Argument]) -> None:
    for other in others:
        if other.xp is not first.xp:
            mine, theirs = (backends.library_name(a.xp) for a in (first, other))
            raise TypeError(
                f"{first.name} is a {mine} array, {other.name} a {theirs} array: "
                "pass arrays of one library, or name a backend to which NumPy arrays are copied"
            )


def _named_namespace(strong: list[Argument], backend: object) -> Namespace:
    row = table_row("backend", backend, backends.BACKENDS)
    xp = backends.namespace(row.name)
    _check_own_or_numpy(xp, row.name, strong)
    return xp


def _check_own_or_numpy(xp: Namespace, backend: str, strong: list[Argument]) -> None:
    for argument in strong:
        if argument.xp is not xp and argument.xp is not np:
            library = backends.library_name(argument.xp)
            known = backends.BACKENDS.get(library)
            hint = (
                f"; convert it: {known.copy.format(array=_letter(argument.name))}" if known else ""
            )
            raise TypeError(
                f"{argument.name} is a {library} array, and backend={backend!r} takes NumPy "
                f"arrays and its own: nothing is copied from a device silently{hint}"
            )


def check_at_home(home: Location, arguments: list[Argument], backend: str | None) -> None:
    """Of arrays that come beside others, which are there: of that library, on that device."""
    strong = [a for a in arguments if not a.untyped]
    if backend is None:
        _check_one_library(Argument("X", None, home.xp), strong)
    else:
        _check_own_or_numpy(home.xp, backend, strong)
    devices = {a.name: backends.device_of(home.xp, a.array) for a in strong if a.xp is home.xp}
    _check_one_device({"X": home.device} | devices)


def _check_one_device(devices: dict[str, Any]) -> None:
    # Inside jax.jit an array is nowhere yet.
    first, *others = [name for name in devices if devices[name] is not None] or devices
    for other in others:
        if devices[other] != devices[first]:
            raise ValueError(
                f"{first} is on {devices[first]}, {other} on {devices[other]}: "
                "move all arrays to one device first"
            )


def dtype_name(dtype: DType) -> str:
    """'float32' for numpy.dtype('float32'), torch.float32 and so on."""
    return (
        _numpy_dtype_name(dtype) if isinstance(dtype, np.dtype) else str(dtype).rpartition(".")[2]
    )


@cache  # NumPy makes the name anew each time, in as long as the rest of a check takes
def _numpy_dtype_name(dtype: np.dtype[Any]) -> str:
    return dtype.name


def common_dtype(layers: list[Layer], home: Location) -> str:
    """The floating dtype of the parameters; float64 if they are all lists or integers."""
    floating = [a for a in flat(layers) if a.is_floating and not a.untyped]
    first = floating[0] if floating else Argument("", np.zeros(0), np)
    dtype = dtype_name(first.array.dtype)
    for other in floating:
        if dtype_name(other.array.dtype) != dtype:
            raise _mixed_dtypes(other, dtype, first.name)
    return check_dtype_of(home, dtype)


def check_dtype_of(home: Location, dtype: DType) -> str:
    """The name of a floating dtype, if the library has it and computes in it."""
    name = getattr(dtype, "__name__", None) or dtype_name(dtype)
    table_row("dtype", name, FLOATING)
    if not hasattr(home.xp, name):
        raise TypeError(f"{backends.library_name(home.xp)} has no {name}")
    if name == "float64" and backends.float64_is_off(home.xp):
        raise TypeError(
            "float64 (what lists and integers count as) would silently become float32 in JAX: "
            'switch it on, jax.config.update("jax_enable_x64", True), or pass float32 arrays'
        )
    return name


def check_same_dtype(
    data: list[Argument], dtype: str, layers: Iterable[tuple[Argument, Argument]] = ()
) -> None:
    """Floating data must have the parameters' dtype; integers and lists are converted."""
    for argument in data:
        if argument.is_floating and not argument.untyped:
            if dtype_name(argument.array.dtype) != dtype:
                raise _mixed_dtypes(argument, dtype, *_odd_ones(data, flat(layers)))


def _odd_ones(data: list[Argument], params: list[Argument]) -> tuple[str, str]:
    """What the parameters are in a sentence, and what to do if they alone are of their dtype."""
    theirs = {dtype_name(a.array.dtype) for a in data if a.is_floating and not a.untyped}
    owner, fix = "the parameters", ""
    if params and not any(a.is_floating and not a.untyped for a in params):
        owner = "the parameters, lists or integers that count as"
    if params and len(theirs) == 1:
        (dtype,) = theirs
        fix = f"; or have parameters of {dtype}, init_params(..., dtype={dtype!r})"
    return owner, fix


def _mixed_dtypes(argument: Argument, dtype: str, owner: str, fix: str = "") -> TypeError:
    row = backends.BACKENDS.get(backends.library_name(argument.xp))
    cast = row.cast if row else "xp.astype({array}, xp.{dtype})"
    return TypeError(
        f"{argument.name} has dtype {dtype_name(argument.array.dtype)}, {owner} {dtype}: "
        f"cast it, {cast.format(array=_letter(argument.name), dtype=dtype)}{fix}"
    )


def _letter(name: str) -> str:
    """Its name in code: 'W' for 'W of layer 1'."""
    return name.partition(" ")[0]


def generator(rng: object) -> np.random.Generator:
    """numpy.random.default_rng, which says of a word that it is no entropy."""
    try:
        return np.random.default_rng(rng)  # type: ignore[arg-type]
    except TypeError as error:
        raise TypeError(
            f"rng must be a numpy.random.Generator, an integer or None, got {rng!r}"
        ) from error

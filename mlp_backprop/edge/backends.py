"""From a backend's name, or from the arrays themselves, to a namespace.

The list of backends stands here and nowhere else. An optional library is imported when its name
is asked for; arrays that come in have imported theirs already. NumPy 2 is its own Array API
namespace; for other libraries array-api-compat finds or completes theirs.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from mlp_backprop.types import Array, Namespace


class Backend(NamedTuple):
    """One row: how a library is called, installed and left again."""

    name: str
    module: str  # what provides the namespace
    extra: str  # of this package, which installs it
    cast: str  # how a user casts one of its arrays to another dtype
    copy: str  # how a user copies one of its arrays to NumPy
    to_numpy: Callable[[Array], Array]  # the same for us, half precision included
    devices: Callable[[Any], list[str]]


def _cuda_devices(cupy: Any) -> list[str]:
    cuda = cupy.cuda.runtime
    names = (cuda.getDeviceProperties(i)["name"] for i in range(cuda.getDeviceCount()))
    return [name.decode() for name in names]


def _torch_devices(torch: Any) -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return ["cpu", *cuda]


def _torch_to_numpy(tensor: Any) -> Array:
    # NumPy has no bfloat16.
    tensor = tensor.float() if tensor.dtype.itemsize == 2 else tensor
    return tensor.numpy(force=True)


_ASTYPE = "{array}.astype('{dtype}')"

_NUMPY = Backend(
    name="numpy",
    module="numpy",
    extra="",
    cast=_ASTYPE,
    copy="{array}",
    to_numpy=np.asarray,
    devices=lambda module: ["cpu"],
)

BACKENDS = {
    row.name: row
    for row in (
        _NUMPY,
        _NUMPY._replace(name="numba", extra="numba"),  # the same arrays, with a compiled engine
        Backend(
            name="cupy",
            module="array_api_compat.cupy",
            extra="cuda12 or cuda13",
            cast=_ASTYPE,
            copy="cupy.asnumpy({array})",
            to_numpy=lambda array: array.get(),
            devices=_cuda_devices,
        ),
        Backend(
            name="torch",
            module="array_api_compat.torch",
            extra="torch",
            cast="{array}.to(torch.{dtype})",
            copy="{array}.numpy(force=True)",
            to_numpy=_torch_to_numpy,
            devices=_torch_devices,
        ),
        Backend(
            name="jax",
            module="jax.numpy",
            extra="jax",
            cast=_ASTYPE,
            copy="numpy.asarray({array})",
            to_numpy=np.asarray,
            devices=lambda jax: [str(device) for device in jax.devices()],
        ),
    )
}


class BackendStatus(NamedTuple):
    """Whether a backend can be used here; if not, why not."""

    name: str
    usable: bool
    version: str | None
    devices: list[str]
    reason: str | None


def backends() -> list[BackendStatus]:
    """Tell which backends are usable here, and why the others are not.

    Imports every backend's library that is installed, which can take seconds.

    Returns
    -------
    list of BackendStatus
        Named tuples (name, usable, version, devices, reason); `reason` is None where usable.

    Examples
    --------
    >>> backends()[0].name, backends()[0].usable
    ('numpy', True)
    """
    return [status(row) for row in BACKENDS.values()]


def status(row: Backend) -> BackendStatus:
    """That of one backend; imports its library."""
    try:
        namespace(row.name)
    except ImportError as error:
        return BackendStatus(row.name, False, None, [], str(error))
    library = importlib.import_module(row.name)
    return BackendStatus(row.name, True, library.__version__, row.devices(library), None)


def namespace(name: str) -> Namespace:
    """The namespace of a backend in BACKENDS; ImportError with the extra to install."""
    if name == "numpy":
        return np
    row = BACKENDS[name]
    try:
        library = importlib.import_module(name)
        xp = importlib.import_module(row.module)
    except ImportError as error:
        extras = " or ".join(f"pip install 'mlp-backprop[{e}]'" for e in row.extra.split(" or "))
        raise ImportError(f"backend {name!r} needs {name} ({error}): {extras}") from error
    if name == "cupy":
        _require_cuda_device(library)
    return xp


def namespace_called(module: str) -> Namespace:
    """The namespace of any library, by the name that it has itself: in a pickle, for example."""
    return importlib.import_module(module)


def _require_cuda_device(cupy: Any) -> None:
    try:
        found, detail = cupy.cuda.runtime.getDeviceCount() > 0, "the device count is 0"
    except cupy.cuda.runtime.CUDARuntimeError as error:
        found, detail = False, str(error)
    if not found:
        raise ImportError(
            f"backend 'cupy' needs a CUDA device, and CuPy sees none here ({detail}); "
            "use backend='numpy', or a machine with an NVIDIA driver"
        )


def namespace_of(array: object) -> Namespace | None:
    """The Array API namespace of an array, None for what is not an array of any such library."""
    if isinstance(array, np.ndarray | np.generic):
        return np
    # A list or a table has no namespace: array-api-compat is not loaded for it.
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        return None
    import array_api_compat

    if not array_api_compat.is_array_api_obj(array):
        return None
    return array_api_compat.array_namespace(array)


def library_name(xp: Namespace) -> str:
    """'torch' for array_api_compat.torch, 'jax' for jax.numpy, and so on."""
    return str(xp.__name__).removeprefix("array_api_compat.").partition(".")[0]


def device_of(xp: Namespace, array: Array) -> Any:
    """Where an array lives; None for NumPy, which has one place."""
    if xp is np:
        return None
    import array_api_compat

    return array_api_compat.device(array)


def to_numpy(xp: Namespace, array: Array) -> Array:
    """A copy on the host, asked for by name: check_grads and the programs use it."""
    row = BACKENDS.get(library_name(xp))
    return row.to_numpy(array) if row else np.asarray(array)


def as_plain(array: Array) -> Array:
    """The same numbers as an array to compute with.

    torch tensors are detached from any graph; torch has hardly an operation for unsigned integers
    of more than a byte, so those become int64.
    """
    if not hasattr(array, "detach"):
        return array
    array = array.detach()
    return array.long() if str(array.dtype) in _BARE_INTEGERS else array


JIT = "jax.jit"


def transform_of(array: object) -> str | None:
    """The transform of functions inside which this is no array yet, but stands for one."""
    if hasattr(array, "detach"):
        functorch = importlib.import_module("torch")._C._functorch
        inside = functorch.is_functorch_wrapped_tensor(array)
        return "torch.func.grad, jvp or vmap" if inside else None
    if not any(base.__name__ == "Tracer" for base in type(array).__mro__):
        return None
    return JIT if type(array).__name__ == "DynamicJaxprTracer" else "jax.grad, jvp or vmap"


_BARE_INTEGERS = {"torch.uint16", "torch.uint32", "torch.uint64"}


def borrowed(array: Array, backend: str | None) -> Array:
    """A torch tensor on a GPU as a CuPy array on the same memory, where backend="cupy" is named."""
    if backend != "cupy" or not _is_on_cuda(array):
        return array
    return importlib.import_module("cupy").from_dlpack(array)


def callers_stream(
    arguments: Iterable[object], backend: str | None
) -> AbstractContextManager[None]:
    """torch's current stream while CuPy works on torch's memory; else all stays as it is.

    torch takes everything on its own stream to come in order, so that a tensor may be freed or
    written to as soon as the call is back.
    """
    tensor = next(filter(_is_on_cuda, arguments), None) if backend == "cupy" else None
    return _AS_IT_IS if tensor is None else _torch_stream(tensor)


_AS_IT_IS = nullcontext()


def _is_on_cuda(array: object) -> bool:
    """Whether it is a torch tensor there."""
    return bool(getattr(array, "is_cuda", False))


@contextmanager
def _torch_stream(tensor: Array) -> Iterator[None]:
    cuda = importlib.import_module("cupy").cuda
    pointer = importlib.import_module("torch").cuda.current_stream(tensor.device).cuda_stream
    handle = SimpleNamespace(__cuda_stream__=lambda: (0, pointer))  # torch's own from 2.10 on
    with cuda.Device(tensor.device.index), cuda.Stream.from_external(handle):
        yield


def is_sparse(array: Array) -> bool:
    """Whether a torch tensor is of a sparse layout."""
    return str(getattr(array, "layout", "")).startswith("torch.sparse")


def float64_is_off(xp: Namespace) -> bool:
    """True where float64 would silently become float32: JAX without its x64 switch."""
    return library_name(xp) == "jax" and xp.zeros(0).dtype != xp.float64


def is_writeable(xp: Namespace, array: Array) -> bool:
    """Whether an array can be assigned to: JAX's never can."""
    if xp is np:
        return bool(array.flags.writeable)
    return library_name(xp) != "jax"


def share_memory(xp: Namespace, one: Array, other: Array) -> bool:
    """Whether what is written to one array may be found in the other."""
    if xp is not np:
        one, other = _outline(one), _outline(other)
    elif one.base is None and other.base is None:  # each has memory of its own: the usual case
        return one is other
    return bool(np.shares_memory(one, other))


def overlaps_itself(xp: Namespace, array: Array) -> bool:
    """Whether what is written to one number of an array may be found in another."""
    places = array if xp is np else _outline(array)
    if places.flags.forc:  # the usual case
        return False
    while places.ndim:
        # Rows lie alike: if any two overlap, so does the first with another.
        if np.shares_memory(places[:1], places[1:]):
            return True
        places = places[0, ...]
    return False


def _outline(array: Array) -> Array:
    """A NumPy array where that one lies, on whatever device: to be compared and never read."""
    if hasattr(array, "data_ptr"):  # torch's
        itemsize = array.element_size()
        pointer, strides = array.data_ptr(), tuple(itemsize * step for step in array.stride())
    elif hasattr(array, "__cuda_array_interface__"):
        itemsize, pointer, strides = array.itemsize, array.data.ptr, array.strides
    else:
        return np.from_dlpack(array)
    outline = {"shape": tuple(array.shape), "strides": strides, "typestr": f"|V{itemsize}"}
    interface = outline | {"data": (pointer, False), "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=interface))

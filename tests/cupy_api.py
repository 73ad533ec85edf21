"""What of CuPy the engine may use, as CuPy 14 has it: names and signatures.

test_cupy_real.py holds the engine's sources to this record, and the record to CuPy itself where
that is installed: it imports without a driver. Stand-ins are made by `library`, `StandIn` and
`instance`, which let them offer what is recorded and nothing else, and refuse every call that the
recorded signature would.
"""

import functools
import inspect
from types import SimpleNamespace

ALLOCATION = "shape, dtype=float, order='C'"
MODULE_OPTIONS = "options=(), backend='nvrtc', translate_cucomplex=False"

CALLS = {
    "RawModule": f"code=None, *, path=None, {MODULE_OPTIONS}, enable_cooperative_groups=False, "
    "name_expressions=None, jitify=None",
    "RawModule.get_function": "name",
    "RawKernel.__call__": "grid, block, args, **kwargs",
    "ascontiguousarray": "a, dtype=None",
    "cuda.Device": "device=None",
    "cuda.Device.__enter__": "",
    "cuda.Device.__exit__": "*args",
    "cuda.Graph.launch": "stream=None",
    "cuda.MemoryPointer.copy_from_device_async": "src, size, stream=None",
    "cuda.MemoryPointer.memset_async": "value, size, stream=None",
    "cuda.MemoryPool.free_all_blocks": "stream=None",
    "cuda.MemoryPool.free_bytes": "",
    "cuda.Stream": "null=False, non_blocking=False, ptds=False, priority=None",
    "cuda.Stream.__enter__": "",
    "cuda.Stream.__exit__": "*args",
    "cuda.Stream.begin_capture": "mode=None",
    "cuda.Stream.end_capture": "",
    "cuda.Stream.from_external": "obj",
    "cuda.get_current_stream": "device_id=-1",
    "cuda.memory.OutOfMemoryError": "size, total, limit=0",
    "cuda.runtime.CUDARuntimeError": "status",
    "cuda.runtime.driverGetVersion": "",
    "cuda.runtime.getDevice": "",
    "cuda.runtime.getDeviceCount": "",
    "cuda.runtime.getDeviceProperties": "device",
    "cuda.runtime.runtimeGetVersion": "",
    "divide": "x1, x2, /, out=None, *, casting='same_kind', dtype=None",
    "empty": ALLOCATION,
    "from_dlpack": "array, *, device=None, copy=None",
    "get_default_memory_pool": "",
    "ndarray": "shape, dtype=float, memptr=None, strides=None, order='C'",
    "ndarray.astype": "dtype, order='K', casting=None, subok=None, copy=True",
    "ndarray.copy": "order='C'",
    "ndarray.get": "stream=None, order='C', out=None, blocking=True",
    "ndarray.sum": "axis=None, dtype=None, out=None, keepdims=False",
    "zeros": ALLOCATION,
}

VALUES = {
    "RawKernel.max_dynamic_shared_size_bytes",
    "RawKernel.preferred_shared_memory_carveout",
    "__version__",
    "cuda.Device.attributes",
    "cuda.Device.compute_capability",
    "cuda.Device.id",
    "cuda.Device.mem_info",
    "cuda.MemoryPointer.__add__",
    "cuda.MemoryPointer.device_id",
    "cuda.MemoryPointer.ptr",
    "cuda.Stream.ptr",
    "ndarray.data",
    "ndarray.device",
}

# Keys of cuda.Device.attributes. The compute capability is none of them.
DEVICE_ATTRIBUTES = {
    "L2CacheSize",
    "MaxSharedMemoryPerBlockOptin",
    "MaxSharedMemoryPerMultiprocessor",
    "MultiProcessorCount",
}

# What calls give, where the engine asks that for something in turn.
RETURNS = {
    "RawModule.get_function": "RawKernel",
    "cuda.Stream.end_capture": "cuda.Graph",
    "cuda.Stream.from_external": "cuda.Stream",
    "cuda.get_current_stream": "cuda.Stream",
    "empty": "ndarray",
    "get_default_memory_pool": "cuda.MemoryPool",
    "zeros": "ndarray",
}


def signature(path):
    return inspect.signature(eval(f"lambda {CALLS[path]}: None"))


def attributes(**values):
    """As cuda.Device.attributes."""
    _check_recorded(DEVICE_ATTRIBUTES, *values)
    return values


def library(offers):
    """As the module cupy, with what `offers` has under each path."""
    _check_recorded({*CALLS, *VALUES}, *offers)
    root = SimpleNamespace()
    for path, offer in offers.items():
        *parents, name = path.split(".")
        place = root
        for parent in parents:
            if not hasattr(place, parent):
                setattr(place, parent, SimpleNamespace())
            place = getattr(place, parent)
        setattr(place, name, _called_as_recorded(path, offer))
    return root


class StandIn:
    """An object of CuPy's class `of`. Names that begin with _ are the test's."""

    def __init_subclass__(cls, of=None):
        cls._of = of or cls._of
        for name, member in [*vars(cls).items()]:
            path = f"{cls._of}.{name}"
            if path in CALLS:
                setattr(cls, name, _called_as_recorded(path, member, n_bound=1))
            elif not name.startswith("_"):
                _check_recorded(VALUES, path)

    def __setattr__(self, name, value):
        path = f"{self._of}.{name}"
        if not name.startswith("_"):
            _check_recorded({*CALLS, *VALUES}, path)
        super().__setattr__(name, _called_as_recorded(path, value))


def instance(of, **values):
    """An object of CuPy's class `of` that has these values and functions."""
    made = type("Instance", (StandIn,), {}, of=of)()
    for name, value in values.items():
        setattr(made, name, value)
    return made


def _check_recorded(recorded, *names):
    unknown = {*names} - {*recorded}
    assert not unknown, f"CuPy is not known to have {', '.join(sorted(unknown))}: see cupy_api.py"


def _called_as_recorded(path, function, n_bound=0):
    """The function, which refuses what the recorded signature does not take."""
    if path not in CALLS or isinstance(function, type):
        return function
    expected = signature(path)

    @functools.wraps(function)
    def call(*arguments, **options):
        expected.bind(*arguments[n_bound:], **options)
        return function(*arguments, **options)

    return call

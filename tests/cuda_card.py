"""CuPy on a CUDA card, for tests with the marker gpu: skipped only where there is no card."""

import ctypes
import importlib
import sys

import pytest

from mlp_backprop.edge import backends


def n_cards():
    """As the driver tells it, whatever libraries are installed; 0 where it cannot be asked."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def cupy_on_a_card():
    """CuPy. Beside a card, anything that is missing is an error, not a reason to skip."""
    if n_cards() == 0:
        pytest.skip("the driver, if there is one, sees no CUDA device")
    backends.namespace("cupy")
    return importlib.import_module("cupy")

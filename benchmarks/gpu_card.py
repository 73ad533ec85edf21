"""The card, its driver, the libraries, and the attributes that the CUDA engine plans by.

python benchmarks/gpu_card.py --json FILE
"""

import argparse
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bench_gpu import require

from mlp_backprop.bench import results as bench_results

# What decides how work is cut, and how fast the card could be.
ATTRIBUTES = (
    "MultiProcessorCount",
    "L2CacheSize",
    "MaxSharedMemoryPerBlockOptin",
    "MaxSharedMemoryPerMultiprocessor",
    "MaxRegistersPerMultiprocessor",
    "ClockRate",
)

LIBRARIES = ("array-api-compat", "numpy", "torch", "jax", "pytest", "pytest-xdist")


def facts() -> dict[str, Any]:
    """Of the current device; KeyError where CuPy has no attribute of a name."""
    import cupy

    device, runtime = cupy.cuda.Device(), cupy.cuda.runtime
    free, total = device.mem_info
    return {
        "card": runtime.getDeviceProperties(device.id)["name"].decode(),
        "devices": runtime.getDeviceCount(),
        "compute capability": device.compute_capability,
        "driver": driver(),
        "CUDA of the driver": runtime.driverGetVersion(),
        "CUDA of CuPy": runtime.runtimeGetVersion(),
        "NVRTC": ".".join(map(str, cupy.cuda.nvrtc.getVersion())),
        "memory": f"{free / 1e9:.1f} of {total / 1e9:.1f} GB free",
        **{name: device.attributes[name] for name in ATTRIBUTES},
        "Python": platform.python_version(),
        "cupy": cupy.__version__,
        **{name: version(name) for name in LIBRARIES},
    }


def driver() -> str:
    """As nvidia-smi tells it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "nvidia-smi is not there"
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    return done.stdout.partition("\n")[0] or "nvidia-smi does not tell"


def version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, help="write them here")
    options = parser.parse_args()
    require(["cupy", "array_api_compat"])
    bench_results.save(facts(), options.json)


if __name__ == "__main__":
    main()

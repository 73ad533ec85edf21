"""Memory as Linux counts it, for the benchmarks; elsewhere it is not known, and that is None."""

from collections.abc import Callable
from pathlib import Path

PROC = Path("/proc")


def available() -> int | None:
    """Bytes that new arrays may take on this machine."""
    return _entry("meminfo", "MemAvailable")


def installed() -> int | None:
    """Bytes of memory that this machine has."""
    return _entry("meminfo", "MemTotal")


def peak_above(action: Callable[[], object]) -> int | None:
    """Bytes by which this process grew, at the highest, while the action ran."""
    try:
        (PROC / "self/clear_refs").write_text("5")  # the highest is now the present
    except OSError:
        return None
    before = _entry("self/status", "VmRSS")
    action()
    peak = _entry("self/status", "VmHWM")
    return None if before is None or peak is None else max(0, peak - before)


def _entry(path: str, key: str) -> int | None:
    """A line such as `VmHWM:  1234 kB`, in bytes."""
    if not (PROC / path).exists():
        return None
    for line in (PROC / path).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    return None

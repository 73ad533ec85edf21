"""What `mlp-backprop info` prints: plain text, for a plain install is without rich."""

from textwrap import fill

from mlp_backprop.bench.environment import Environment

SLOW = 0.3  # seconds of importing a library that are worth a word


def text(result: Environment, width: int) -> str:
    """Versions, BLAS, CPUs and backends, in lines of up to so many columns."""
    threads = "" if result.blas.threads is None else f", {result.blas.threads} threads"
    lines = [
        *(f"{name} {version}" for name, version in result.versions.items()),
        f"BLAS {result.blas.name} {result.blas.version}{threads}",
        f"CPUs for this process: {result.cpus}; threads for a call: {result.threads}",
        "",
        *_backends(result, width),
    ]
    slow = {name: seconds for name, seconds in result.import_seconds.items() if seconds > SLOW}
    if slow:
        taken = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in slow.items())
        lines += ["", fill(f"Slow to import here: {taken}", width)]
    return "\n".join(lines) + "\n"


def _backends(result: Environment, width: int) -> list[str]:
    """A table: name, version, devices or why it is not usable."""
    rows = [("backend", "version", "devices, or why it is not usable")]
    for backend in result.backends:
        note = ", ".join(backend.devices) if backend.usable else str(backend.reason)
        rows.append((backend.name, backend.version or "-", note))
    first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
    indent = " " * (first + second + 4)
    return [
        fill(
            f"{name:{first}}  {version:{second}}  {note}",
            width,
            subsequent_indent=indent,
            break_on_hyphens=False,
        )
        for name, version, note in rows
    ]

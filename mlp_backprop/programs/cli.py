"""The program `mlp-backprop`, also `python -m mlp_backprop`: arguments in, exit status out.

What is computed is in verification.py, bench/environment.py and bench/grid.py; what is shown, in
info.py and screens.py. The latter is imported only to show something: all else works without rich.
"""

import argparse
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

import mlp_backprop
from mlp_backprop.bench.environment import environment
from mlp_backprop.edge.backends import BACKENDS
from mlp_backprop.programs import info
from mlp_backprop.programs.verification import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; `arguments` are the command line's unless given. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        status = int(COMMANDS[options.command](options))
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough, as `head` does
        # What is left in the buffer goes nowhere when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    return status


READER_GONE = 128 + 13  # as a shell reports a program that SIGPIPE has ended


def _info(options: argparse.Namespace) -> int:
    result = environment()
    if options.json:
        _print_json(result)
    else:
        sys.stdout.write(info.text(result, shutil.get_terminal_size().columns))
    return 0


def _verify(options: argparse.Namespace) -> int:
    show = _print_json if options.json else _report("; or --json").show_verification
    # JAX reads this when it is imported, later on: without it, it has no float64.
    os.environ.setdefault("JAX_ENABLE_X64", "1")
    try:
        result = verify(options.seed, options.backend)
    except ImportError as error:
        sys.exit(f"mlp-backprop: {error}")
    show(result)
    return 0 if result.passed else 1


def _bench(options: argparse.Namespace) -> int:
    """Measure, and show; the file and the charts are written as far as it came."""
    from mlp_backprop.bench.grid import main_grid

    report = _report("")
    draw = _charts() if options.plot else None
    if options.json is not None:
        try:  # a folder that is not there is found out before, not after
            options.json.touch()
        except OSError as error:
            sys.exit(f"mlp-backprop: {error}")
    with report.progress() as progress:
        results = main_grid(options.selection, path=options.json, progress=progress)
    if draw is not None:  # before a reader of the output can go away
        draw(results, options.plot)
    report.show_benchmarks(results)
    if not results["complete"]:
        sys.stderr.write("mlp-backprop: interrupted; what was measured is kept\n")
        return 130
    return 1 if any(cell["failed"] for cell in results["cells"]) else 0


COMMANDS = {"bench": _bench, "info": _info, "verify": _verify}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlp-backprop",
        description="Exact derivatives of multilayer perceptrons, in explicit matrix form.",
    )
    version = f"%(prog)s {mlp_backprop.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(title="commands", dest="command", metavar="command")

    summary = "compare the gradients with PyTorch's and with the published ones"
    command = commands.add_parser("verify", help=summary, description=summary)
    command.add_argument("--json", action="store_true", help="print JSON, every digit of it")
    command.add_argument(
        "--seed", type=_seed, default=0, metavar="N", help="draws nets and sample (default: 0)"
    )
    command.add_argument(
        "--backend",
        choices=list(BACKENDS),
        help="what computes the gradients, in all its precisions, beside NumPy in float64 too",
    )
    summary = "show versions, BLAS, CPUs and the backends usable here"
    command = commands.add_parser("info", help=summary, description=summary)
    command.add_argument("--json", action="store_true", help="print JSON")

    summary = "time the gradients against torch, JAX and others, answers checked first"
    command = commands.add_parser("bench", help=summary, description=summary)
    command.add_argument(
        "--selection",
        choices=("quick", "default", "full"),
        default="default",
        help="under a minute; under fifteen minutes (default); all of the grid",
    )
    command.add_argument("--json", type=Path, metavar="FILE", help="write the results here")
    command.add_argument("--plot", type=Path, metavar="FOLDER", help="draw the charts here")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is an integer, 0 or more; got {text!r}")
    return int(text)


def _report(otherwise: str) -> ModuleType:
    try:
        import mlp_backprop.programs.screens as report
    except ImportError as error:
        hint = f"pip install 'mlp-backprop[cli]'{otherwise}"
        sys.exit(f"mlp-backprop: needs rich ({error}): {hint}")
    return report


def _charts() -> Callable[[Any, Path], Any]:
    try:
        from mlp_backprop.bench.charts import draw
    except ImportError as error:
        sys.exit(
            f"mlp-backprop: --plot needs matplotlib ({error}): pip install 'mlp-backprop[bench]'"
        )
    return draw


def _print_json(result: Any) -> None:
    json.dump(_plain(result), sys.stdout, indent=1)
    sys.stdout.write("\n")


def _plain(value: Any) -> Any:
    """Named tuples as objects, arrays as lists; numbers keep every digit."""
    if hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value

"""The program `mlp-backprop`, also `python -m mlp_backprop`: arguments in, exit status out.

What is computed is in verification.py and environment.py, what is shown in report.py, which is
imported only to show something: --json works without rich.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

import mlp_backprop
from mlp_backprop.environment import environment
from mlp_backprop.verification import verify


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; `arguments` are the command line's unless given. Returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    show = _print_json if options.json else _rich_show()
    if options.command == "info":
        show(environment())
        return 0
    result = verify(options.seed)
    show(result)
    return 0 if result.passed else 1


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
    summary = "show versions, BLAS, CPUs and the backends usable here"
    command = commands.add_parser("info", help=summary, description=summary)
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a seed is an integer, 0 or more; got {text!r}")
    return int(text)


def _rich_show() -> Callable[[Any], None]:
    try:
        from mlp_backprop.report import show
    except ImportError as error:
        sys.exit(f"mlp-backprop: needs rich ({error}): pip install 'mlp-backprop[cli]'; or --json")
    return show


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

"""Whether the CUDA engine is right on this card, and how fast: six steps, under ten minutes.

    make check-gpu PYTHON=python3    or    python benchmarks/check_gpu.py [--steps NAME ...]

Nothing is installed. Each step is a process of its own, ended at its time limit; the next goes on
whatever has become of it. The JSON has a line for each step and is written after each; what a
step printed is in a file beside it. The exit code is 0 where all steps passed.
"""

import argparse
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_gpu import require
from gpu_steps import STEPS, Step, Verdict

from mlp_backprop.bench import results as bench_results

MOST_PROBLEMS = 10  # that are printed; the JSON has all
LOG_LINES = 8  # of a step that broke off

PASSED, FAILED, LEFT_OUT = "passed", "failed", "left out"


def run(step: Step, folder: Path) -> dict[str, Any]:
    """A step's line: whether it passed, and all that there is to know."""
    file, log = folder / f"{step.name}.results", folder / f"{step.name}.log"
    file.unlink(missing_ok=True)  # of a run before
    began = time.monotonic()
    ended = watched(step.command(file), log, step.seconds)
    seconds = time.monotonic() - began
    verdict = judged(step, file)
    problems = verdict.problems
    if ended is None:
        problems = [f"ended at its limit of {step.seconds:g} s", *problems]
    elif ended != 0 and (not problems or not file.exists()):
        problems = [f"exit code {ended}, as {log} says", *problems]
    state = FAILED if problems else LEFT_OUT if verdict.left_out else PASSED
    return {
        "step": step.name,
        "state": state,
        "seconds": round(seconds, 1),
        "limit": step.seconds,
        "problems": problems,
        "left_out": verdict.left_out,
        "lines": verdict.lines,
        "facts": verdict.facts,
    }


def watched(command: list[str], log: Path, seconds: float) -> int | None:
    """The exit code; None where the process, and all that it began, was killed at the limit."""
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:  # Ctrl-C comes here too
                os.killpg(process.pid, signal.SIGKILL)
                with suppress(subprocess.TimeoutExpired):  # it may hang in the driver
                    process.wait(10)


def judged(step: Step, file: Path) -> Verdict:
    """What the file says, as far as it was written."""
    if not file.exists():
        return Verdict([], ["it left no results"])
    try:
        return step.judge(file)
    except Exception as error:  # what a process left when it broke off can be anything
        return Verdict([], [f"its results cannot be read: {type(error).__name__}: {error}"])


def run_all(steps: Iterable[Step], path: Path) -> list[dict[str, Any]]:
    """Every step, whatever has become of those before; the file is written anew after each."""
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    began = datetime.now(UTC).isoformat(timespec="seconds")
    records: list[dict[str, Any]] = []
    for step in steps:
        print(wrapped(f"{step.name}: {step.says}, at most {step.seconds:g} s ..."), flush=True)
        records.append(run(step, folder))
        bench_results.save({"date": began, "steps": records}, path)
        print(report(records[-1], folder / f"{step.name}.log"), flush=True)
    return records


def report(record: dict[str, Any], log: Path) -> str:
    """A step for a terminal of 80 columns."""
    problems, texts = record["problems"], list(record["lines"])
    texts += [f"! {problem}" for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > MOST_PROBLEMS:
        texts.append(f"! and {len(problems) - MOST_PROBLEMS} more, in the JSON")
    if problems and not record["lines"]:
        texts += log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
    why = f" ({record['left_out']})" if record["left_out"] else ""
    lines = [wrapped(text, "    ") for text in texts]
    return "\n".join([*lines, f"  {record['state']}{why} after {record['seconds']:g} s"])


def wrapped(text: str, indent: str = "") -> str:
    return textwrap.fill(text, 80, initial_indent=indent, subsequent_indent=f"{indent}    ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--json", type=Path, default=Path("build/check-gpu.json"), help="write the results here"
    )
    parser.add_argument(
        "--steps", nargs="+", choices=list(STEPS), default=list(STEPS), help="only these"
    )
    options = parser.parse_args()
    require(["cupy", "array_api_compat"])
    records = run_all([STEPS[name] for name in options.steps], options.json)
    states = ", ".join(f"{record['step']} {record['state']}" for record in records)
    print(wrapped(states))
    print(f"results: {options.json}")
    sys.exit(any(record["state"] == FAILED for record in records))


if __name__ == "__main__":
    main()

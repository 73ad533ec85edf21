"""The steps of `make check-gpu`: a program each, its time limit, and how its results are judged."""

import os
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import gpu_answers
from gpu_expected import EXPECTED, compared

from mlp_backprop.bench import results as bench_results

HERE = Path(__file__).parent
TESTS = HERE.parent / "tests"


class Verdict(NamedTuple):
    """Lines to print, what is wrong, and what goes into the results besides."""

    lines: list[str]
    problems: list[str]
    facts: dict[str, Any] = {}  # noqa: RUF012 - nobody writes to it
    left_out: str = ""  # why nothing was done, where that is nobody's fault


class Step(NamedTuple):
    """A program that writes a file, and what to make of that file, finished or not."""

    name: str
    says: str
    seconds: float
    command: Callable[[Path], list[str]]
    judge: Callable[[Path], Verdict]


def program(name: str, *options: str) -> Callable[[Path], list[str]]:
    """A program of this folder, which writes to --json."""
    return lambda file: [sys.executable, str(HERE / name), *options, "--json", str(file)]


# The card and its answers ------------------------------------------------------------------------


def judge_card(file: Path) -> Verdict:
    facts = bench_results.load(file)
    return Verdict([f"{name}: {fact}" for name, fact in facts.items()], [], facts)


def judge_answers(file: Path) -> Verdict:
    cells = bench_results.load(file)["cells"]
    by_net: dict[tuple[str, str, str], list[str]] = {}
    problems = []
    for cell in cells:
        net, precision, error = cell["net"], cell["precision"], cell["error"]
        errors = by_net.setdefault((net, precision, str(cell["tier"])), [])
        errors.append("failed" if error is None else f"{error:.1e}")
        problems += [f"{net}, n = {cell['n']}, {precision}: {p}" for p in cell["problems"]]
    lines = [
        f"{net:<10} {precision:<13} {tier:<15} errors {', '.join(errors)}"
        for (net, precision, tier), errors in by_net.items()
    ]
    if len(cells) < len(gpu_answers.CELLS):
        problems.append(f"{len(cells)} of {len(gpu_answers.CELLS)} cells were come to")
    return Verdict(lines, problems, {"cells": cells})


# The tests on a card -----------------------------------------------------------------------------

WORKERS = 8  # at most: each has its own hold on the card's memory

# What a test may say when it is skipped. For any other reason it did not show what it is there for.
MAY_SKIP = ("there is one device", "a choice that CuPy has")
NO_SANITIZER = "compute-sanitizer is not installed"


def tests(marks: str, *options: str, parallel: bool) -> Callable[[Path], list[str]]:
    """pytest over the tests with these marks; in parallel where xdist is installed.

    Its log names each test as it ends, for a run that comes to its limit leaves nothing else.
    """
    several = parallel and find_spec("xdist") is not None
    workers = ["-n", str(min(WORKERS, os.cpu_count() or 1))] if several else []
    command = [sys.executable, "-m", "pytest", str(TESTS), "-v", "-W", "default", "-m", marks]
    return lambda file: [*command, *options, *workers, f"--junitxml={file}"]


def judge_tests(file: Path, may_skip: tuple[str, ...] = MAY_SKIP) -> Verdict:
    cases = list(ET.parse(file).iter("testcase"))
    failed = [case for case in cases if is_failure(case)]
    skipped = [(case, message(case, "skipped")) for case in cases]
    skipped = [(case, why) for case, why in skipped if why is not None]
    problems = [f"{identity(case)}: {reason(case)}" for case in failed]
    problems += [
        f"{identity(case)}: skipped: {why}" for case, why in skipped if why not in may_skip
    ]
    passed = len(cases) - len(failed) - len(skipped)
    if not cases:
        problems.append("no test was run")
    counts = {"passed": passed, "failed": len(failed), "skipped": len(skipped)}
    line = ", ".join(f"{count} {name}" for name, count in counts.items())
    return Verdict([line], problems, counts)


def is_failure(case: ET.Element) -> bool:
    return any(message(case, kind) is not None for kind in ("failure", "error"))


def message(case: ET.Element, kind: str) -> str | None:
    """What pytest says of a test that failed or was skipped; None for what did not happen."""
    found = case.find(kind)
    return None if found is None else found.get("message", "")


def reason(case: ET.Element) -> str:
    """The first line of the message; of a file that cannot be imported, the last of all."""
    kind = next(kind for kind in ("failure", "error") if message(case, kind) is not None)
    first = str(message(case, kind)).partition("\n")[0]
    last = case.findtext(kind, "").strip().rpartition("\n")[2]
    return last if first == "collection failure" else first


def identity(case: ET.Element) -> str:
    names = case.get("classname", "").rpartition(".")[2], case.get("name", "")
    return "::".join(filter(None, names))


def judge_sanitizer(file: Path) -> Verdict:
    verdict = judge_tests(file, (NO_SANITIZER,))
    if verdict.problems or verdict.facts["passed"]:
        return verdict
    return verdict._replace(left_out=NO_SANITIZER)


# Times -------------------------------------------------------------------------------------------


def judge_times(file: Path) -> Verdict:
    results = bench_results.load(file)
    lines, missing = compared(results["card"], results["cells"])
    return Verdict(lines, [f"not measured: {line}" for line in missing], results)


# The table ---------------------------------------------------------------------------------------

STEPS = {
    step.name: step
    for step in (
        Step("card", "the card, its driver and libraries", 30, program("gpu_card.py"), judge_card),
        Step(
            "answers",
            "each tier and precision against float64, twice; labels; an infinity",
            100,
            program("gpu_answers.py"),
            judge_answers,
        ),
        Step(
            "tests",
            "pytest -m 'gpu and not serial and not slow'",
            180,
            tests("gpu and not serial and not slow", parallel=True),
            judge_tests,
        ),
        Step(
            "serial",
            "pytest -m 'gpu and serial': waits, streams, torch, memory",
            80,
            tests("gpu and serial", parallel=False),
            judge_tests,
        ),
        Step(
            "times",
            "quick cells of bench_gpu, beside what was expected",
            100,
            program(
                "bench_gpu.py",
                "--contenders",
                "bound",
                "prepared",
                "torch",
                "--cells",
                *(row.pattern for row in EXPECTED),
            ),
            judge_times,
        ),
        Step(
            "sanitizer",
            "compute-sanitizer on two small nets",
            110,
            tests("gpu and slow", "-k", "2-10-5-3 or 64-64-10", parallel=True),
            judge_sanitizer,
        ),
    )
}

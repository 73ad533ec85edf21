"""`make check-gpu` without a card: what it makes of results, of programs that break off, of limits.

Each verdict is shown to be able to fail: a fault is planted, and told.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

TESTS = Path(__file__).parents[1]
# Verdicts ----------------------------------------------------------------------------------------


def written(tmp_path, content):
    file = tmp_path / "results"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def test_the_verdict_on_a_card(programs, tmp_path):
    facts = {"card": "NVIDIA H100", "MultiProcessorCount": 132}
    verdict = programs.steps.judge_card(written(tmp_path, facts))
    assert verdict == (["card: NVIDIA H100", "MultiProcessorCount: 132"], [], facts, "")


def answers_of(programs, **changes):
    answers = programs.answers
    record = {"tier": "tiny", "error": 1e-7, "problems": []}
    records = [{**answers.identity(cell), **record} for cell in answers.CELLS]
    records[5] |= changes
    return records


def test_the_verdict_on_answers(programs, tmp_path):
    judge = programs.steps.judge_answers
    verdict = judge(written(tmp_path, {"cells": answers_of(programs)}))
    assert verdict.problems == []
    assert verdict.lines[0] == (
        "2-10-5-3   float32       tiny            errors 1.0e-07, 1.0e-07, 1.0e-07"
    )
    assert len(verdict.lines) == 12
    bad = answers_of(programs, error=None, problems=["the second call gave other bits"])
    verdict = judge(written(tmp_path, {"cells": bad}))
    assert verdict.problems == [
        "2-10-5-3, n = 40001, float32_exact: the second call gave other bits"
    ]
    verdict = judge(written(tmp_path, {"cells": answers_of(programs)[:7]}))
    assert verdict.problems == ["7 of 36 cells were come to"]


PASSING = "def test_it(): pass"
FAILING = "def test_it(): assert 1 == 2, 'wrong'"
BROKEN = "import nothing_of_this_name"
SKIPPED = "import pytest\ndef test_it(): pytest.skip({!r})"


def junit(tmp_path, *sources):
    """What pytest itself writes for test files with these sources."""
    for k, source in enumerate(sources):
        (tmp_path / f"test_{k}.py").write_text(source)
    file = tmp_path / "results"
    command = [sys.executable, "-m", "pytest", "-q", "--rootdir", ".", f"--junitxml={file}"]
    subprocess.run([*command, "-c", os.devnull], cwd=tmp_path, capture_output=True)
    return file


@pytest.mark.parametrize(
    ("source", "problems"),
    [
        (PASSING, []),
        (FAILING, ["test_1::test_it: AssertionError: wrong"]),
        (SKIPPED.format("there is one device"), []),
        (SKIPPED.format("a choice that CuPy has"), []),
        (SKIPPED.format("torch is missing"), ["test_1::test_it: skipped: torch is missing"]),
        (SKIPPED.format("compute-sanitizer is not installed"), ["test_1::test_it: skipped: "]),
        (BROKEN, ["test_1: E   ModuleNotFoundError: No module named 'nothing_of_this_name'"]),
    ],
)
def test_the_verdict_on_tests(programs, tmp_path, source, problems):
    verdict = programs.steps.judge_tests(junit(tmp_path, PASSING, source))
    assert len(verdict.problems) == len(problems)
    for problem, begins in zip(verdict.problems, problems, strict=True):
        assert problem.startswith(begins)


def test_no_test_at_all_is_a_problem(programs, tmp_path):
    assert programs.steps.judge_tests(junit(tmp_path)).problems == ["no test was run"]


def test_without_the_sanitizer_its_step_is_left_out(programs, tmp_path):
    judge, why = programs.steps.judge_sanitizer, "compute-sanitizer is not installed"
    verdict = judge(junit(tmp_path, SKIPPED.format(why)))
    assert (verdict.problems, verdict.left_out) == ([], why)
    verdict = judge(junit(tmp_path, SKIPPED.format("there is one device")))
    assert verdict.problems
    verdict = judge(junit(tmp_path, FAILING))
    assert verdict.problems
    verdict = judge(junit(tmp_path, PASSING))
    assert (verdict.problems, verdict.left_out) == ([], "")


def test_the_reasons_to_skip_are_those_of_the_tests(programs):
    texts = "".join(file.read_text() for file in sorted(TESTS.rglob("test_*.py")))
    for why in (*programs.steps.MAY_SKIP, programs.steps.NO_SANITIZER):
        assert f'pytest.skip("{why}")' in texts


def test_every_test_on_a_card_belongs_to_one_step(programs, request):
    """By what the marks select in the file on the device alone."""
    selected = [
        collected(programs.steps.STEPS[name].command(Path("unused")))
        for name in ("tests", "serial", "sanitizer")
    ]
    plain, serial, slow = selected
    assert plain
    assert any("waits_for_nothing" in name for name in serial)
    assert {name.partition("[")[0] for name in slow} == {"test_the_sanitizer_finds_nothing"}
    assert len(slow) == 4
    assert not set(plain) & set(serial)
    everything = collected([sys.executable, "-m", "pytest", str(TESTS), "-v", "-m", "gpu"])
    rest = set(everything) - set(plain) - set(serial) - set(slow)
    assert {name.partition("[")[2] for name in rest} == {
        "200-130-10-memcheck]",
        "200-130-10-racecheck]",
    }


def collected(command):
    """The names of the tests that this pytest would run, in the file on the device."""
    command = [part for part in command if not part.startswith("--junitxml")]
    at = command.index(str(TESTS))
    command[at] = str(TESTS / "engines/cuda/test_device.py")
    if "-n" in command:
        command[command.index("-n") + 1] = "0"
    done = subprocess.run([*command, "--collect-only", "-qq"], capture_output=True, text=True)
    return [line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line]


def times_of(programs, **changes):
    """As bench_gpu writes them: each as expected but one."""
    return [
        {
            "net": row.net,
            "n": row.n,
            "precision": row.precision,
            "timings": {"bound": {"median": row.most}},
            "skipped": {},
        }
        | (changes if row.pattern == "64-64-64-1:10000000:bfloat16" else {})
        for row in programs.expected.EXPECTED
    ]


def test_the_verdict_on_times(programs, tmp_path):
    judge = programs.steps.judge_times
    results = {"card": "NVIDIA H100 80GB HBM3", "cells": times_of(programs)}
    verdict = judge(written(tmp_path, results))
    assert verdict.problems == []
    assert verdict.lines[0].startswith("expected by counting instructions, for an H100 (132 ")
    assert [line[-6:] for line in verdict.lines[1:]] == ["x 1.00"] * 7
    results["cells"] = times_of(programs, timings={}, skipped={"bound": "ArithmeticError: wrong"})
    assert judge(written(tmp_path, results)).problems == [
        "not measured: 64-64-64-1, n = 10000000, bfloat16: ArithmeticError: wrong"
    ]
    results["cells"] = results["cells"][:1]
    verdict = judge(written(tmp_path, results))
    assert len(verdict.problems) == 6
    assert verdict.problems[0].endswith("the run did not come to it")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (4.8e-3, "4.8 ms, expected 1.8-2.4: x 2.00"),
        (2.0e-3, "2 ms, expected 1.8-2.4: x 1.00"),
        (0.9e-3, "0.9 ms, expected 1.8-2.4: x 0.50"),
    ],
)
def test_a_time_is_told_beside_what_was_expected(programs, tmp_path, seconds, text):
    cells = times_of(programs, timings={"bound": {"median": seconds}})
    verdict = programs.steps.judge_times(written(tmp_path, {"card": "H100", "cells": cells}))
    assert f"64-64-64-1, n = 10000000, bfloat16: {text}" in verdict.lines
    assert verdict.problems == []


def test_on_another_card_it_is_said_whose_times_are_expected(programs):
    lines, _ = programs.expected.compared("NVIDIA H200", times_of(programs))
    assert lines[1] == "this card is another, NVIDIA H200"


def test_what_is_expected_is_measured(programs):
    for row in programs.expected.EXPECTED:
        (found,) = programs.cells.matching([row.pattern])
        assert (found.problem.name, *found[1:]) == row[:3]
    command = programs.steps.STEPS["times"].command(Path("a"))
    names = command[command.index("--contenders") + 1 : command.index("--cells")]
    assert programs.expected.OURS in names
    assert {*names} <= {*programs.contenders.QUICK}


# Running -----------------------------------------------------------------------------------------


def step(programs, name, code, seconds=60, judge=None):
    """A step that is a line of Python; `file` is where its results belong."""

    def command(file):
        head = f"from pathlib import Path; file = Path({str(file)!r}); "
        return [sys.executable, "-c", head + code]

    def say(file):
        return programs.steps.Verdict([file.read_text()], [])

    return programs.steps.Step(name, "made up " * 12, seconds, command, judge or say)


WRITES = "file.write_text('fine')"
CHILD = "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {!r}])".format(
    "import time; time.sleep(600)"
)
HANGS = f"{CHILD}; file.write_text(str(child.pid)); child.wait()"
CRASHES = "print('what came before'); import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


def test_each_step_goes_on_after_the_others(programs, tmp_path, capsys):
    def refuses(file):
        raise KeyError("median")

    def finds(file):
        return programs.steps.Verdict(["a line"], ["a wrong number"])

    def leaves_out(file):
        return programs.steps.Verdict([], [], left_out="there is no such tool")

    path = tmp_path / "check.json"
    steps = [
        step(programs, "crash", CRASHES),
        step(programs, "hang", HANGS, seconds=1),
        step(programs, "silent", "pass"),
        step(programs, "exit", WRITES + "; raise SystemExit(3)"),
        step(programs, "odd", WRITES, judge=refuses),
        step(programs, "wrong", WRITES, judge=finds),
        step(programs, "absent", WRITES, judge=leaves_out),
        step(programs, "good", WRITES),
    ]
    records = programs.check.run_all(steps, path)
    assert json.loads(path.read_text())["steps"] == records
    assert {record["step"]: record["state"] for record in records} == {
        **dict.fromkeys(["crash", "hang", "silent", "exit", "odd", "wrong"], "failed"),
        "absent": "left out",
        "good": "passed",
    }
    problems = {record["step"]: record["problems"] for record in records}
    assert problems["crash"][0].startswith("exit code -11, as ")
    assert problems["hang"][0] == "ended at its limit of 1 s"
    assert problems["silent"] == ["it left no results"]
    assert problems["exit"][0].startswith("exit code 3, as ")
    assert problems["odd"] == ["its results cannot be read: KeyError: 'median'"]
    assert problems["wrong"] == ["a wrong number"]
    printed = capsys.readouterr().out
    assert "what came before" in printed
    assert "left out (there is no such tool)" in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_the_file_is_written_after_each_step(programs, tmp_path):
    path = tmp_path / "check.json"

    def looks(file):
        found = json.loads(path.read_text())["steps"] if path.exists() else []
        return programs.steps.Verdict([str(len(found))], [])

    steps = [step(programs, name, WRITES, judge=looks) for name in "abc"]
    records = programs.check.run_all(steps, path)
    assert [record["lines"] for record in records] == [["0"], ["1"], ["2"]]


def test_results_of_an_earlier_run_do_not_count(programs, tmp_path):
    path = tmp_path / "check.json"
    programs.check.run_all([step(programs, "a", WRITES)], path)
    (record,) = programs.check.run_all([step(programs, "a", "pass")], path)
    assert record["problems"] == ["it left no results"]


@pytest.mark.skipif(sys.platform != "linux", reason="processes are read from /proc")
def test_a_process_and_its_children_are_killed_at_the_limit(programs, tmp_path, monkeypatch):
    class ToTheLimit(subprocess.Popen):
        """Time is up as soon as the child's number is written."""

        def wait(self, timeout=None):
            if timeout != 1234:
                return super().wait(timeout)
            file = tmp_path / "check" / "a.results"
            while not (file.exists() and file.read_text()):
                time.sleep(0.01)
            raise subprocess.TimeoutExpired("a", timeout)

    monkeypatch.setattr(subprocess, "Popen", ToTheLimit)
    steps = [step(programs, "a", HANGS, seconds=1234)]
    (record,) = programs.check.run_all(steps, tmp_path / "check.json")
    assert record["problems"] == ["ended at its limit of 1234 s"]
    (pid,) = record["lines"]
    patience = time.monotonic() + 60
    while is_running(pid) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not is_running(pid)


def is_running(pid):
    """Whether there is such a process; one that ended may wait for somebody to ask."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


def test_many_problems_are_told_in_short(programs, tmp_path):
    record = {"state": "failed", "seconds": 1.0, "left_out": "", "lines": ["a line"]}
    record["problems"] = [f"problem {k}" for k in range(25)]
    text = programs.check.report(record, tmp_path / "log")
    assert text.count("! problem") == programs.check.MOST_PROBLEMS == 10
    assert "! and 15 more, in the JSON" in text


def test_the_steps_and_their_limits(programs):
    steps = programs.steps.STEPS
    assert list(steps) == ["card", "answers", "tests", "serial", "times", "sanitizer"]
    assert sum(step.seconds for step in steps.values()) <= 600
    for name in ("card", "answers", "times"):
        _, script, *_ = steps[name].command(Path("a"))
        assert Path(script).exists()


@pytest.mark.parametrize(("code", "ends"), [(WRITES, 0), ("pass", 1)])
def test_the_exit_code(programs, monkeypatch, tmp_path, capsys, code, ends):
    made_up = {name: step(programs, name, WRITES) for name in ("card", "times")}
    made_up["answers"] = step(programs, "answers", code)
    monkeypatch.setattr(programs.check, "STEPS", made_up)
    monkeypatch.setattr(programs.check, "require", lambda modules: None)
    path = tmp_path / "new" / "check.json"
    monkeypatch.setattr(
        sys, "argv", ["check_gpu.py", "--json", str(path), "--steps", "card", "answers"]
    )
    with pytest.raises(SystemExit) as ended:
        programs.check.main()
    assert ended.value.code == ends
    assert [record["step"] for record in json.loads(path.read_text())["steps"]] == [
        "card",
        "answers",
    ]
    assert f"answers {'failed' if ends else 'passed'}" in capsys.readouterr().out


def test_without_a_device_it_says_so_in_one_line(programs, monkeypatch):
    class CUDARuntimeError(RuntimeError):
        pass

    runtime = SimpleNamespace(getDeviceCount=lambda: 0, CUDARuntimeError=CUDARuntimeError)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    monkeypatch.setitem(sys.modules, "array_api_compat", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "array_api_compat.cupy", SimpleNamespace())
    monkeypatch.setattr(sys, "argv", ["check_gpu.py"])
    with pytest.raises(SystemExit, match="CuPy sees none here") as ended:
        programs.check.main()
    assert "\n" not in ended.value.code

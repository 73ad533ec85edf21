"""The source distribution: all that its own tests need, which pass where it is unpacked."""

import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("mlp_backprop", "tests", "docs", "benchmarks", ".ci")
FILES = ("Makefile", "pyproject.toml", "constraints.txt", "README.md", "CHANGELOG.md")
BUILD = "import sys; from hatchling.build import build_sdist; print(build_sdist(sys.argv[1]))"


def test_the_sdist_holds_the_whole_checkout(tmp_path):
    pytest.importorskip("hatchling", reason="hatchling is not installed")
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    with tarfile.open(tmp_path / done.stdout.split()[-1]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    here = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    names = {path.relative_to(ROOT).as_posix() for path in here if "__pycache__" not in path.parts}
    assert len(names) > 100
    assert {*names, *FILES, "CITATION.cff", "CONTRIBUTING.md", "LICENSE"} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith("build/")]

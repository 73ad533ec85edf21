"""The documentation runs, and says what the code says.

Every block marked python in README.md and docs/ is run, those of one page in one namespace; a block
marked output holds what the python block before it prints.
"""

import contextlib
import io
import re
from pathlib import Path

import pytest

import mlp_backprop
from mlp_backprop import backprop, optimizers
from mlp_backprop.activations import ACTIVATIONS
from mlp_backprop.losses import LOSSES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
BLOCK = re.compile(r"^```(python|output)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DERIVATION = (ROOT / "docs/derivation.md").read_text(encoding="utf-8")


def run_blocks(page):
    names, printed = {"__name__": page.stem}, ""
    text = page.read_text(encoding="utf-8")
    for block in BLOCK.finditer(text):
        kind, content = block.groups()
        if kind == "output":
            assert printed == content
            continue
        # Blank lines in front, so that a traceback has the line numbers of the page.
        source = "\n" * text.count("\n", 0, block.start(2)) + content
        with contextlib.redirect_stdout(io.StringIO()) as stdout:
            exec(compile(source, str(page), "exec"), names)
        printed = stdout.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_run_and_print_what_the_page_shows(page):
    run_blocks(page)


@pytest.mark.parametrize("block", ["assert 1 > 2", "print(1)\n```\n```output\n2"])
def test_wrong_example_fails(tmp_path, block):
    page = tmp_path / "page.md"
    page.write_text(f"Text.\n\n```python\n{block}\n```\n")
    with pytest.raises(AssertionError):
        run_blocks(page)


def test_derivation_has_the_equations_of_the_code():
    equations = [line for line in backprop.__doc__.splitlines() if re.search(r" \(\d\)$", line)]
    assert len(equations) == 4
    for equation in equations:
        assert equation in DERIVATION.splitlines()


@pytest.mark.parametrize("name", [*ACTIVATIONS, *LOSSES])
def test_derivation_has_every_row_of_the_tables(name):
    assert f"| `{name}` |" in DERIVATION


@pytest.mark.parametrize("row", optimizers.OPTIMIZERS.values(), ids=lambda row: row.name)
def test_training_has_every_optimizer_with_its_defaults(row):
    page = (ROOT / "docs/training.md").read_text(encoding="utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(f"| `{type(row).__name__}` |"))
    _, _, options, rate, _ = line.split("|")
    assert eval(f"optimizers.{type(row).__name__}({options.strip(' `')})") == row
    assert float(rate.partition(",")[0]) == row.learning_rate


def test_version_and_date_are_the_same_everywhere():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    unreleased, newest, *_ = re.findall(r"^## (.*)$", changes, re.MULTILINE)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    fields = dict(re.findall(r'^([a-z-]+): "?([^"\n]*)"?$', citation, re.MULTILINE))
    assert unreleased == "Unreleased"
    assert newest == f"{mlp_backprop.__version__} - {fields['date-released']}"
    assert fields["version"] == mlp_backprop.__version__


def test_pictures_of_the_readme_are_those_that_every_reader_shows():
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert pictures
    for picture in pictures:
        assert picture.endswith(".png")
        assert (ROOT / picture).exists()

"""Exit codes and examples of the pages are those of the program."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from docs.examples import Example, examples, write_inputs
from tests.docs.pages import DOCS, PAGES, name
from tokenrec import errors
from tokenrec.cli import failures
from tokenrec.cli import main as cli

PAGE = (DOCS / "troubleshooting.md").read_text()
# Examples that read a run, or that are more than one command, are left to
# `python -m docs.examples --check`.
QUICK = [
    example
    for page in PAGES
    for example in examples(page.read_text(), page)
    if example.command.startswith("tokenrec")
    and "&&" not in example.command
    and not example.needs_run
]


def test_every_exit_code_has_its_line() -> None:
    codes = {
        value
        for module in (errors, cli, failures)
        for constant, value in vars(module).items()
        if constant.startswith("EXIT_")
    }
    assert codes == {0, 1, 2, 3, 4, 5, 74, 75, 130}
    table = re.findall(r"^\| (\d+) \| ", PAGE, re.MULTILINE)
    assert {int(code) for code in table} == codes


def test_most_examples_are_quick() -> None:
    assert len(QUICK) >= 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("examples")
    write_inputs(made)
    out = made / "data" / "synthetic"
    assert cli.main(["prepare", "synthetic", "--rows", "3000", "--out", str(out)]) == 0
    return made


@pytest.mark.parametrize("example", QUICK, ids=lambda e: f"{name(e.page)}: {e.command}")
def test_an_example_prints_what_its_page_says(
    example: Example,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    if "mesh" in example.command:
        pytest.skip("tests see eight devices, and the page one")
    cli.main(shlex.split(example.command.replace("\\\n", " "))[1:])
    out, err = capsys.readouterr()
    printed = f"{out}{err}".replace(f"{folder.resolve()}/", "").rstrip("\n")
    assert printed == example.printed

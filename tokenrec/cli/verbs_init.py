"""The verb `init`: a schema, splits and a config for the user's own log."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokenrec.cli.parser import Parser, add_verb
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verb; return its parser by its word."""
    parser = add_verb(
        verbs,
        "init",
        _init,
        "look at a log and propose a schema, splits and a config for it",
        "It reads a sample, writes schema.json and README.md with a reason for each "
        "column, and prints the commands that prepare, train and evaluate.",
    )
    parser.add_argument(
        "--log",
        type=local_path_argument,
        nargs="+",
        required=True,
        help="files with a row per impression or event, or folders or globs of them",
    )
    for table in ("users", "items"):
        parser.add_argument(
            f"--{table}",
            type=local_path_argument,
            help=f"file with a row per {table.removesuffix('s')}",
        )
    parser.add_argument(
        "--out", type=local_path_argument, required=True, help="folder to write to"
    )
    for key, what in (
        ("user", "users"),
        ("item", "items"),
        ("time", "times"),
    ):
        parser.add_argument(
            f"--{key}",
            metavar="COLUMN",
            default="",
            help=f"column of the {what} (default: found by name and values)",
        )
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        help="column of 1 and 0, a threshold such as 'liked: rating >= 4', a number such "
        "as 'seconds: real', or classes such as 'stars: classes'; repeat it for several "
        "tasks (default: found by name and values)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the schema at --out"
    )
    return {"init": parser}


def _init(args: argparse.Namespace) -> None:
    from tokenrec.data.schema_inference.proposal import Flags, propose
    from tokenrec.data.schema_inference.write import (
        REASONS_FILE,
        SCHEMA_FILE,
        commands,
        summary_lines,
        write_proposal,
    )

    flags = Flags(args.user, args.item, args.time, tuple(args.label))
    proposal = propose(args.log, args.users, args.items, flags)
    write_proposal(proposal, args.out, overwrite=args.overwrite)
    print("\n".join(summary_lines(proposal)))
    print(f"\n{args.out / SCHEMA_FILE}: written; {args.out / REASONS_FILE} has the")
    print("reason for each column, and where to look first. Next:\n")
    print("\n".join(commands(proposal, args.out)))

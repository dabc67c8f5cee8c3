"""Verbs that serve a trained run: export, score.

A verb imports what it calls when it runs: scoring needs no package of training.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import (
    add_run_data_flag,
    add_workdir_flag,
    checkpoint,
)
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {"export": _add_export(verbs), "score": _add_score(verbs)}


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name an artifact and how it reads requests."""
    parser.add_argument(
        "--model",
        type=local_path_argument,
        required=True,
        help="folder that `tokenrec export` wrote",
    )
    parser.add_argument(
        "--allow-missing",
        type=names,
        metavar="FEATURES",
        help="features whose columns requests may leave out, separated by commas; any "
        "other missing column is an error",
    )


def names(text: str) -> tuple[str, ...]:
    """Parse names, separated by commas.

    >>> names("week, hour")
    ('week', 'hour')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_export(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "export",
        _export,
        "write a run as an artifact that scores requests without the data set",
        "The artifact is compared with `tokenrec predict` before it appears.",
    )
    add_workdir_flag(parser, "folder of the run")
    parser.add_argument(
        "--out", type=local_path_argument, required=True, help="folder to make"
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="best",
        help="best, latest, or the step of a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--platforms",
        type=names,
        default="cpu,cuda,tpu",
        help="what the programs will run on, of cpu, cuda, rocm and tpu "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of a score from `tokenrec predict` (default: 1e-6, in "
        "bfloat16 0.02)",
    )
    add_run_data_flag(parser)
    return parser


def _export(args: argparse.Namespace) -> None:
    from tokenrec.serving.export import export_run

    manifest = export_run(
        args.workdir,
        args.out,
        checkpoint=args.checkpoint,
        platforms=args.platforms,
        data=args.data,
        tolerance=args.tolerance,
    )
    checked = manifest["checked"]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"{args.out}: step {manifest['step']:,}, {size / 1e6:,.1f} MB, digest "
        f"{manifest['digest'][:12]}; scores of {checked['requests']} requests of "
        f"{checked['split']} equal those of `tokenrec predict`"
    )


def _add_score(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs, "score", _score, "score a Parquet file of requests with an artifact"
    )
    add_model_flags(parser)
    parser.add_argument(
        "--requests",
        type=local_path_argument,
        required=True,
        help="Parquet file of requests, with nested columns as in the JSON request",
    )
    parser.add_argument(
        "--out", type=local_path_argument, required=True, help="Parquet file to write"
    )
    return parser


def _score(args: argparse.Namespace) -> None:
    from tokenrec.serving.score_file import score_file
    from tokenrec.serving.scorer import open_artifact

    scorer = open_artifact(args.model, allow_missing=args.allow_missing or ())
    rows = score_file(scorer, args.requests, args.out)
    print(f"{args.out}: {rows:,} rows")

"""Verbs that compare models: `study` and `report`.

A verb imports what it calls when it runs, so that the others need no JAX.
"""

from __future__ import annotations

import argparse
import importlib.util
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import whole_number
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError
from tokenrec.runtime.paths import local_path_argument, path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {"study": _add_study(verbs), "report": _add_report(verbs)}


def _add_study(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "study",
        _study,
        "compare models over learning rates and seeds",
        "It tunes the learning rate of each model, trains the best with several seeds, "
        "and tests the differences. It writes tables, and an HTML page if matplotlib "
        'is installed (pip install ".[report]").',
    )
    parser.add_argument(
        "--config",
        type=local_path_argument,
        required=True,
        help="study file, which is run, or the name of a shipped study",
    )
    parser.add_argument(
        "--out",
        type=local_path_argument,
        required=True,
        help="folder of the runs and tables; reuse the folder to resume",
    )
    parser.add_argument(
        "--data",
        type=path_argument,
        help="folder of the prepared data set; overrides data.path",
    )
    parser.add_argument(
        "--side-by-side",
        type=whole_number,
        default=1,
        help="runs that train at the same time (default: %(default)s)",
    )
    parser.add_argument(
        "--tables-only",
        action="store_true",
        help="start no run; write the tables and the page of the finished ones",
    )
    return parser


def _study(args: argparse.Namespace) -> None:
    from tokenrec.analysis.report import write_report
    from tokenrec.study.jobs import BudgetSpent
    from tokenrec.study.plan import load_study
    from tokenrec.study.runner import run_study

    if args.overrides:
        raise InputError(
            f"study takes no --config.{args.overrides[0]}; the study file sets the "
            "fields of its runs"
        )
    # The command that the page and study.json name: flags that do not change the results
    # are left out.
    data = f" --data={args.data}" if args.data else ""
    command = f"tokenrec study --config={args.config}{data} --out={args.out}"
    study = load_study(args.config)
    try:
        run_study(
            study,
            args.config.stem,
            args.out,
            args.data,
            command=command,
            side_by_side=max(1, args.side_by_side),
            tables_only=args.tables_only,
        )
    except BudgetSpent as spent:
        # The finished runs have tables: draw a page of them before the error ends it.
        if _has_matplotlib():
            try:
                print(write_report([args.out], args.out))
            except InputError as error:
                # Too little is finished for a page.
                raise InputError(f"{spent}; no page was drawn: {error}") from spent
        raise
    if _has_matplotlib():
        print(write_report([args.out], args.out))
    else:
        print(
            f"{args.out}: tables written; the page needs matplotlib: run "
            '`pip install ".[report]"` and '
            f"`tokenrec report --study {args.out} --out {args.out}`"
        )


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def _add_report(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "report",
        _report,
        "make an HTML page with figures from studies",
        'It needs matplotlib: pip install ".[report]".',
    )
    parser.add_argument(
        "--study",
        type=local_path_argument,
        action="append",
        required=True,
        help="folder of a study; repeat the flag for several",
    )
    parser.add_argument(
        "--out",
        type=local_path_argument,
        required=True,
        help="folder for report.html and figures/",
    )
    return parser


def _report(args: argparse.Namespace) -> None:
    from tokenrec.analysis.report import write_report

    print(write_report(args.study, args.out))

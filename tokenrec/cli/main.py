"""Train, evaluate, plan and serve recommendation transformers on JAX."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from importlib import metadata

from absl import flags as absl_flags

from tokenrec.cli import (
    verbs_data,
    verbs_init,
    verbs_launch,
    verbs_plan,
    verbs_run,
    verbs_serving,
    verbs_study,
)
from tokenrec.cli.failures import explain
from tokenrec.cli.parser import Parser
from tokenrec.config.overrides import split_overrides
from tokenrec.errors import EXIT_DONE, InputError

# Exit code of an uncaught exception in Python.
EXIT_FAULT = 1

_EPILOG = (
    "`tokenrec VERB --help` explains a verb. Exit codes: 0 done, 2 wrong input, "
    "3 out of memory, 4 training steps that are not finite, 5 hung, 74 a fault of the "
    "disk or network that may pass, 75 stopped by SIGTERM after saving, 130 stopped by "
    "Ctrl-C."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
      argv: words of the command line after `tokenrec`; None reads `sys.argv`.

    Returns:
      The exit code, one of `tokenrec.errors`. An unexpected exception is not caught, so
      that it keeps its traceback.
    """
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        code = _report(error)
        if code is None:
            raise
        return code


def build_parsers() -> tuple[Parser, dict[str, Parser]]:
    """Build the parser of the command line.

    Returns:
      The parser, and the parsers of the verbs by their words, such as "prepare amazon".
    """
    parser = Parser(
        prog="tokenrec", description=__doc__, epilog=_EPILOG, allow_abbrev=False
    )
    parser.add_argument(
        "--version",
        action="version",
        version=_version(),
        help="print the version and exit",
    )
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="verb", parser_class=Parser
    )
    parsers: dict[str, Parser] = {}
    for module in (
        verbs_init,
        verbs_data,
        verbs_run,
        verbs_serving,
        verbs_plan,
        verbs_launch,
        verbs_study,
    ):
        parsers |= module.add_verbs(verbs)
    return parser, parsers


def _report(error: BaseException) -> int | None:
    """Print a message for an error that a user can act on, and return the exit code.

    Any other error prints nothing and returns None.
    """
    explained = explain(error)
    if explained is None:
        return None
    message, code = explained
    print(f"tokenrec: {message}", file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    # 1. Overrides of config fields are not flags of argparse: their names are free.
    arguments, overrides = split_overrides(argv)
    parser, verbs = build_parsers()
    # 2. Name an unknown flag before argparse complains that a required one is missing.
    for name, verb in verbs.items():
        words = name.split()
        if arguments[: len(words)] == words:
            verb.refuse_unknown_flags(arguments[len(words) :])
    args = parser.parse_args(arguments)
    if overrides and "config" not in args:
        raise InputError(
            f"{args.verb} takes no --config.{overrides[0]}; it uses the config.json of "
            "the run"
        )
    args.overrides = overrides
    # 3. Grain reads absl flags, which argparse does not parse.
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()
    if "distributed" in args and args.distributed:
        _run_distributed(args)
    else:
        args.run(args)
    return EXIT_DONE


def _run_distributed(args: argparse.Namespace) -> None:
    """Run a verb together with the other processes.

    A process that fails exits at once: an orderly exit would wait for the others, which
    wait for it.
    """
    from tokenrec.runtime import distributed

    distributed.initialize(sigterm_stops_run=args.verb == "train")
    try:
        args.run(args)
    except BaseException as error:  # noqa: BLE001 - the process ends here
        code = _report(error)
        if code is None:
            traceback.print_exception(error)
        distributed.exit_immediately(EXIT_FAULT if code is None else code)


def _version() -> str:
    try:
        return metadata.version("tokenrec")
    except metadata.PackageNotFoundError:
        return "tokenrec, not installed"

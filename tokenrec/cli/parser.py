"""What the command line takes: the flags of each verb, and their types. What verbs do is `__main__.py`'s."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrec.config import MeshConfig
from tokenrec.config.load import shipped_configs
from tokenrec.data.source import SPLITS
from tokenrec.errors import InputError, suggest

if TYPE_CHECKING:
    from tokenrec.data.source import Source

LATEST_BEFORE = "latest-before"

_AXES = [field.name for field in dataclasses.fields(MeshConfig)]

type Run = Callable[[argparse.Namespace], None]
type MakeSource = Callable[[argparse.Namespace], Source]


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors that name the near word."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(
                action,
                f"'{value}' is not a choice{suggest(str(value), action.choices)}",
            )

    def refuse_unknown_flags(self, arguments: Iterable[str]) -> None:
        """Names an unknown flag before argparse can complain of a required one that it was meant to be."""
        known = [option for action in self._actions for option in action.option_strings]
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(
                    f"unknown flag {flag}{suggest(flag.partition('.')[0], known)}"
                )


def build_parser(
    description: str, runs: Mapping[str, Run], sources: Mapping[str, MakeSource]
) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and the parser of each verb by the words that lead to it.

    Args:
      runs: what each verb does, by its name; `args.run` of parsed arguments.
      sources: of `prepare`, by their names; `args.make_source`.
    """
    parser = Parser(prog="tokenrec", description=description, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(
        dest="verb", required=True, metavar="verb", parser_class=Parser
    )
    parsers: dict[str, Parser] = {}

    def add(name: str, help: str) -> Parser:
        parsers[name] = verbs.add_parser(
            name, help=help, description=help, allow_abbrev=False
        )
        parsers[name].set_defaults(run=runs[name])
        return parsers[name]

    prepare = verbs.add_parser(
        "prepare", help="raw log to prepared data set", allow_abbrev=False
    )
    prepare.set_defaults(run=runs["prepare"])
    parsers |= _add_sources(prepare, sources)
    train = add("train", "trains, or resumes, a run")
    _add_config(train)
    train.add_argument(
        "--workdir",
        type=Path,
        required=True,
        help="folder of the run: config, checkpoints, logs",
    )
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_distributed(train)
    evaluate = add("evaluate", "metrics of a run on a prepared split")
    _add_run(evaluate)
    evaluate.add_argument("--json", type=Path, help="file for the metrics")
    evaluate.add_argument(
        "--baselines", action="store_true", help="also score the data set's baselines"
    )
    evaluate.add_argument(
        "--samples",
        type=_natural,
        default=0,
        help="a fixed sample of so many requests; 0 takes all",
    )
    predict = add("predict", "scores of a prepared split to Parquet")
    _add_run(predict)
    predict.add_argument(
        "--out", type=Path, required=True, help="Parquet file to write"
    )
    _add_replay(add("replay", "one step of a run again: where a bad number came from"))
    _add_semantic_ids(add("semantic-ids", "semantic ids of a data set's items"))
    describe = add(
        "describe", "parameters, token layout, windows, needed rows, FLOPs of a config"
    )
    _add_config(describe)
    describe.add_argument("--json", type=Path, help="file for the figures")
    _add_compile(
        add(
            "compile",
            "the train step compiled for a pod that need not be there: memory, roofline",
        )
    )
    study = add(
        "study",
        "models against each other: a grid of runs, the best learning rates over seeds, how sure",
    )
    study.add_argument(
        "--config",
        type=Path,
        required=True,
        help="study file, which is run, or a shipped one's name",
    )
    study.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder of the runs and tables; the same one goes on",
    )
    study.add_argument(
        "--data", type=Path, help="folder of the prepared data set; overrides data.path"
    )
    study.add_argument(
        "--side-by-side", type=_natural, default=1, help="runs at a time"
    )
    study.add_argument(
        "--tables-only",
        action="store_true",
        help="begin no run: tables and page of those that are done",
    )
    _add_launch(
        add("launch", "a training job on Cloud TPUs: GKE manifests or a TPU VM script")
    )
    report = add(
        "report", "results of studies as one HTML page with figures (extra `report`)"
    )
    report.add_argument(
        "--study",
        type=Path,
        action="append",
        required=True,
        help="folder of a study; may be repeated",
    )
    report.add_argument(
        "--out", type=Path, required=True, help="folder for report.html and figures/"
    )
    return parser, parsers


def _add_sources(
    prepare: argparse.ArgumentParser, made: Mapping[str, MakeSource]
) -> dict[str, Parser]:
    sources = prepare.add_subparsers(
        dest="source", required=True, metavar="source", parser_class=Parser
    )
    parsers: dict[str, Parser] = {}

    def add(name: str, help: str) -> Parser:
        parser = sources.add_parser(
            name, help=help, description=help, allow_abbrev=False
        )
        parser.set_defaults(make_source=made[name])
        parser.add_argument(
            "--out", type=Path, required=True, help="folder of the prepared data set"
        )
        parser.add_argument(
            "--chunk-events",
            type=_natural,
            help="rows of a user that are stored together",
        )
        parser.add_argument(
            "--overlap",
            type=_natural,
            help="history rows that a continued chunk repeats",
        )
        parser.add_argument(
            "--overwrite", action="store_true", help="replace the data set at --out"
        )
        parser.add_argument(
            "--beam",
            action="store_true",
            help="run on Apache Beam (extra `beam`; docs/beam.md)",
        )
        parser.add_argument(
            "--beam-options",
            help="options of Beam in one word: --beam-options='--runner=FlinkRunner'",
        )
        parser.add_argument(
            "--beam-work",
            help="folder or bucket for temporary files that all workers of Beam see",
        )
        parsers[f"prepare {name}"] = parser
        return parser

    kuairand = add("kuairand", "KuaiRand-Pure, -1K or -27K, official files")
    kuairand.add_argument(
        "--root", type=Path, required=True, help="folder of the official files"
    )
    kuairand.add_argument(
        "--download",
        choices=("pure", "1k", "27k"),
        help="first fetch this variant into --root",
    )
    kuairand.add_argument(
        "--valid-from",
        type=_day,
        required=True,
        help="first day of the valid split, YYYY-MM-DD",
    )
    kuairand.add_argument(
        "--test-from",
        type=_day,
        required=True,
        help="first day of the test split, YYYY-MM-DD",
    )
    journey = add("complete_journey", "84.51 Complete Journey (extra `demo`)")
    journey.add_argument(
        "--root",
        type=Path,
        help="folder of its parquet files; default: the installed package",
    )
    amazon = add(
        "amazon", "Amazon review sequences, leave-one-out, the files of S3-Rec"
    )
    amazon.add_argument(
        "--root",
        type=Path,
        required=True,
        help="folder of NAME.txt and NAME_item2attributes.json",
    )
    amazon.add_argument("--name", required=True, help="of the data set, such as Beauty")
    amazon.add_argument(
        "--held-out",
        type=int,
        default=2,
        help="last items of a user that are not train: 2 (default), valid and test, or 1, test alone",
    )
    synthetic = add("synthetic", "a deterministic log with a known best AUC")
    synthetic.add_argument("--rows", type=_natural, required=True)
    synthetic.add_argument(
        "--static-rank",
        type=_natural,
        help="also static fields that so many profiles decide",
    )
    synthetic.add_argument(
        "--static-weight", type=float, help="of a profile in the labels; default 1"
    )
    delimited = add("delimited", "your own log as CSV or Parquet (docs/data.md)")
    delimited.add_argument(
        "--schema", type=Path, required=True, help="JSON file: features, tasks, columns"
    )
    delimited.add_argument(
        "--log",
        type=Path,
        nargs="+",
        required=True,
        help="files of a row per impression or event, in any order",
    )
    delimited.add_argument("--users", type=Path, help="one row per user")
    delimited.add_argument("--items", type=Path, help="one row per item")
    delimited.add_argument(
        "--valid-from", required=True, help="ISO date or time (UTC), or milliseconds"
    )
    delimited.add_argument(
        "--test-from", help="likewise; without it there is no test split"
    )
    return parsers


def _add_semantic_ids(parser: argparse.ArgumentParser) -> None:
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
        type=_natural,
        default=4,
        help="quantised levels; one more splits equals; default 4",
    )
    parser.add_argument(
        "--codes", type=_natural, default=256, help="codes of each level; default 256"
    )
    parser.add_argument(
        "--method",
        choices=("rq_kmeans", "rq_vae"),
        default="rq_kmeans",
        help="of quantisation; default rq_kmeans",
    )
    parser.add_argument(
        "--vectors",
        choices=("cooccurrence", "text", "both"),
        default="cooccurrence",
        help="of items: cooccurrence (default) in the train split works for every data set, text needs item features "
        "with strings as values and the extra `text`",
    )
    parser.add_argument(
        "--seed", type=_natural, default=0, help="of all draws; default 0"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the semantic ids at --out"
    )


def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--topology",
        required=True,
        help="of each slice, such as v5e:16x16 or v5p:8x8x8",
    )
    parser.add_argument(
        "--slices",
        type=_natural,
        default=1,
        help="so many, joined by the data-centre network",
    )
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--mesh",
        type=_mesh,
        help="data=..,fsdp=..,tensor=.. instead of the config's mesh",
    )
    shapes.add_argument(
        "--sweep",
        action="store_true",
        help="rank all meshes by formula and compile the best five",
    )
    parser.add_argument(
        "--json", type=Path, help="file for the figures; a list with --sweep"
    )


def _add_launch(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--topology", required=True, help="of each slice, such as v5p:8x8x8"
    )
    parser.add_argument(
        "--slices",
        type=_natural,
        default=1,
        help="equal slices that train together; default 1",
    )
    parser.add_argument(
        "--target",
        choices=("gke", "tpu-vm"),
        required=True,
        help="service that runs the job",
    )
    parser.add_argument(
        "--name",
        help="of the job, and of its folder in the bucket; default: that of the config",
    )
    parser.add_argument(
        "--image",
        help="container image, HOST/PATH/NAME:TAG; launch/Dockerfile makes one",
    )
    parser.add_argument(
        "--bucket",
        help="Cloud Storage bucket: data/ holds data sets, runs/ gets checkpoints and logs",
    )
    parser.add_argument(
        "--service-account",
        help="that may use the bucket: name in GKE, e-mail for TPU VMs",
    )
    parser.add_argument("--namespace", help="of Kubernetes; default 'default'")
    parser.add_argument("--project", help="of Google Cloud, for TPU VMs")
    parser.add_argument("--zone", help="of the TPU VMs")
    parser.add_argument(
        "--spot", action="store_true", help="Spot capacity, which may be taken away"
    )
    parser.add_argument(
        "--max-restarts", type=_natural, default=10, help="after a crash; default 10"
    )
    parser.add_argument(
        "--grace-seconds",
        type=_natural,
        default=300,
        help="from the signal to stop to the end; default 300",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print it, and start nothing"
    )
    parser.add_argument(
        "--skip-compile",
        action="store_true",
        help="do not compile it first: this was done already",
    )


def _add_replay(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workdir",
        type=Path,
        required=True,
        help="folder of the run, in which nothing is written",
    )
    parser.add_argument(
        "--step",
        type=_natural,
        required=True,
        help="number of the step, as messages and logs name it",
    )
    parser.add_argument(
        "--checkpoint",
        type=_earlier,
        default=LATEST_BEFORE,
        help=f"{LATEST_BEFORE} (default), start, or the step of a checkpoint; the steps from there on run first",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the prepared data set; default: that of the run",
    )
    parser.add_argument(
        "--mesh",
        type=_mesh,
        help="data=4,fsdp=2 instead of the run's; numbers then agree up to the order of sums",
    )
    parser.add_argument("--json", type=Path, help="file for the report")


def _add_config(parser: argparse.ArgumentParser) -> None:
    shipped = ", ".join(shipped_configs())
    parser.add_argument(
        "--config",
        required=True,
        help=f"Python file, which is run; a run's config.json; or one of {shipped}; --config.FIELD=VALUE sets a field",
    )
    parser.add_argument(
        "--data", help="folder of the prepared data set; overrides data.path"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument(
        "--checkpoint",
        type=_checkpoint,
        default="best",
        help="best, latest or a step; default best",
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="folder of the prepared data set; default: that of the run",
    )
    _add_distributed(parser)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="join the other processes of a pod or cluster, each started with this same command",
    )


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def _mesh(text: str) -> MeshConfig:
    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = (word.strip() for word in part.partition("="))
        if axis not in _AXES or axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise argparse.ArgumentTypeError(
                f"'{part}' is not AXIS=SIZE; write data=4,fsdp=8,tensor=1"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not a day; write YYYY-MM-DD"
        ) from None


def _checkpoint(text: str) -> str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither best, latest nor a step")
    return text


def _earlier(text: str) -> str:
    if text not in (LATEST_BEFORE, "start") and not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither {LATEST_BEFORE}, start nor a step"
        )
    return text


def _version() -> str:
    try:
        return metadata.version("tokenrec")
    except metadata.PackageNotFoundError:
        return "tokenrec, not installed"

"""The command line: `tokenrec VERB`, each verb a thin call."""

from __future__ import annotations

import argparse
import contextlib
import errno
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags as absl_flags

from tokenrec.config import Config, MeshConfig
from tokenrec.data.source import SPLITS
from tokenrec.errors import (
    EXIT_BAD_STEPS,
    EXIT_DONE,
    EXIT_INPUT,
    EXIT_MEMORY,
    InputError,
    NonFiniteError,
    suggest,
)
from tokenrec.flags import load_config, shipped_configs, split_overrides
from tokenrec.json_file import write_json

if TYPE_CHECKING:
    from tokenrec.data.source import Source

EXIT_FAULT = 1  # an unexpected exception, as Python has it
EXIT_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports

# Faults of the user's disk or paths, not of tokenrec.
_PLACE_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EISDIR,
)


class _Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are InputErrors that name the near word."""

    def error(self, message: str) -> Any:
        raise InputError(f"{message}; see `{self.prog} --help`")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"'{value}' is not a choice{suggest(str(value), action.choices)}")

    def refuse_unknown_flags(self, arguments: Iterable[str]) -> None:
        """Names an unknown flag before argparse can complain of a required one that it was meant to be."""
        known = [option for action in self._actions for option in action.option_strings]
        for argument in arguments:
            flag = argument.partition("=")[0]
            if flag.startswith("--") and flag not in known:
                self.error(f"unknown flag {flag}{suggest(flag.partition('.')[0], known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb and returns the exit code of `tokenrec.errors`; an unexpected exception keeps its traceback."""
    try:
        return _run(list(sys.argv[1:] if argv is None else argv))
    except BaseException as error:
        code = _explain(error)
        if code is None:
            raise
        return code


def _explain(error: BaseException) -> int | None:
    """Says what a user can act on, and returns the exit code; None, in silence, for anything else."""
    match error:
        case InputError():
            message, code = str(error), EXIT_INPUT
        case NonFiniteError():
            message, code = str(error), EXIT_BAD_STEPS
        case MemoryError():
            message, code = f"out of memory: {error}", EXIT_MEMORY
        case OSError() if error.errno in _PLACE_ERRORS:
            message, code = str(error), EXIT_INPUT
        case RuntimeError() if "RESOURCE_EXHAUSTED" in str(error):
            # jax.errors.JaxRuntimeError, which the verbs without JAX need not import.
            message, code = f"out of device memory: {error}", EXIT_MEMORY
        case KeyboardInterrupt():
            message, code = "interrupted", EXIT_INTERRUPTED
        case _:
            return None
    print(f"tokenrec: {message}", file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser, verbs = _build_parser()
    for name, verb in verbs.items():
        words = name.split()
        if arguments[: len(words)] == words:
            verb.refuse_unknown_flags(arguments[len(words) :])
    args = parser.parse_args(arguments)
    if overrides and "config" not in args:
        raise InputError(f"tokenrec {args.verb} takes no --config.{overrides[0]}; the run's own config.json decides")
    args.overrides = overrides
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which argparse leaves alone.
    if "distributed" in args and args.distributed:
        _run_with_others(args)
    else:
        args.run(args)
    return EXIT_DONE


def _run_with_others(args: argparse.Namespace) -> None:
    from tokenrec import processes

    processes.join()
    try:
        args.run(args)
    except BaseException as error:  # noqa: BLE001 - the process ends
        code = _explain(error)
        if code is None:
            traceback.print_exception(error)
        processes.abandon(EXIT_FAULT if code is None else code)


def _build_parser() -> tuple[_Parser, dict[str, _Parser]]:
    """The parser, and the parser of each verb by the words that lead to it."""
    parser = _Parser(prog="tokenrec", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=_version())
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb", parser_class=_Parser)
    parsers: dict[str, _Parser] = {}

    def add(name: str, run: Callable[[argparse.Namespace], None], help: str) -> _Parser:
        parsers[name] = verbs.add_parser(name, help=help, description=help, allow_abbrev=False)
        parsers[name].set_defaults(run=run)
        return parsers[name]

    parsers |= _add_prepare(verbs.add_parser("prepare", help="raw log to prepared data set", allow_abbrev=False))
    train = add("train", _train, "trains, or resumes, a run")
    _add_config(train)
    train.add_argument("--workdir", type=Path, required=True, help="folder of the run: config, checkpoints, logs")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    _add_distributed(train)
    evaluate = add("evaluate", _evaluate, "metrics of a run on a prepared split")
    _add_run(evaluate)
    evaluate.add_argument("--json", type=Path, help="file for the metrics")
    evaluate.add_argument("--baselines", action="store_true", help="also score the data set's baselines")
    evaluate.add_argument("--samples", type=_natural, default=0, help="a fixed sample of so many requests; 0 takes all")
    predict = add("predict", _predict, "scores of a prepared split to Parquet")
    _add_run(predict)
    predict.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    _add_semantic_ids(add("semantic-ids", _semantic_ids, "semantic ids of a data set's items"))
    describe = add("describe", _describe, "parameters, token layout, windows, needed rows, FLOPs of a config")
    _add_config(describe)
    describe.add_argument("--json", type=Path, help="file for the figures")
    _add_compile(add("compile", _compile, "the train step compiled for a pod that need not be there: memory, roofline"))
    _add_launch(add("launch", _launch, "a training job on Cloud TPUs: GKE manifests or a TPU VM script"))
    return parser, parsers


def _add_prepare(prepare: argparse.ArgumentParser) -> dict[str, _Parser]:
    sources = prepare.add_subparsers(dest="source", required=True, metavar="source", parser_class=_Parser)
    parsers: dict[str, _Parser] = {}

    def add(name: str, source: Callable[[argparse.Namespace], Source], help: str) -> _Parser:
        parser = sources.add_parser(name, help=help, description=help, allow_abbrev=False)
        parser.set_defaults(run=_prepare, make_source=source)
        parser.add_argument("--out", type=Path, required=True, help="folder of the prepared data set")
        parser.add_argument("--chunk-events", type=_natural, help="rows of a user that are stored together")
        parser.add_argument("--overlap", type=_natural, help="history rows that a continued chunk repeats")
        parser.add_argument("--overwrite", action="store_true", help="replace the data set at --out")
        parser.add_argument("--beam", action="store_true", help="run on Apache Beam (extra `beam`; docs/beam.md)")
        parser.add_argument("--beam-options", help="options of Beam in one word: --beam-options='--runner=FlinkRunner'")
        parser.add_argument("--beam-work", help="folder or bucket for temporary files that all workers of Beam see")
        parsers[f"prepare {name}"] = parser
        return parser

    kuairand = add("kuairand", _kuairand, "KuaiRand-Pure, -1K or -27K, official files")
    kuairand.add_argument("--root", type=Path, required=True, help="folder of the official files")
    kuairand.add_argument("--download", choices=("pure", "1k", "27k"), help="first fetch this variant into --root")
    kuairand.add_argument("--valid-from", type=_day, required=True, help="first day of the valid split, YYYY-MM-DD")
    kuairand.add_argument("--test-from", type=_day, required=True, help="first day of the test split, YYYY-MM-DD")
    journey = add("complete_journey", _complete_journey, "84.51 Complete Journey (extra `demo`)")
    journey.add_argument("--root", type=Path, help="folder of its parquet files; default: the installed package")
    amazon = add("amazon", _amazon, "Amazon review sequences, leave-one-out, the files of S3-Rec")
    amazon.add_argument("--root", type=Path, required=True, help="folder of NAME.txt and NAME_item2attributes.json")
    amazon.add_argument("--name", required=True, help="of the data set, such as Beauty")
    amazon.add_argument(
        "--held-out",
        type=int,
        default=2,
        help="last items of a user that are not train: 2 (default), valid and test, or 1, test alone",
    )
    synthetic = add("synthetic", _synthetic, "a deterministic log with a known best AUC")
    synthetic.add_argument("--rows", type=_natural, required=True)
    delimited = add("delimited", _delimited, "your own log as CSV or Parquet (docs/data.md)")
    delimited.add_argument("--schema", type=Path, required=True, help="JSON file: features, tasks, columns")
    delimited.add_argument(
        "--log", type=Path, nargs="+", required=True, help="files of a row per impression or event, in any order"
    )
    delimited.add_argument("--users", type=Path, help="one row per user")
    delimited.add_argument("--items", type=Path, help="one row per item")
    delimited.add_argument("--valid-from", required=True, help="ISO date or time (UTC), or milliseconds")
    delimited.add_argument("--test-from", help="likewise; without it there is no test split")
    return parsers


def _add_semantic_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, help="folder of the prepared data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for semantic_ids.parquet and report.json")
    parser.add_argument(
        "--levels", type=_natural, default=4, help="quantised levels; one more splits equals; default 4"
    )
    parser.add_argument("--codes", type=_natural, default=256, help="codes of each level; default 256")
    parser.add_argument(
        "--method", choices=("rq_kmeans", "rq_vae"), default="rq_kmeans", help="of quantisation; default rq_kmeans"
    )
    parser.add_argument(
        "--vectors",
        choices=("cooccurrence", "text", "both"),
        default="cooccurrence",
        help="of items: cooccurrence (default) in the train split works for every data set, text needs item features "
        "with strings as values and the extra `text`",
    )
    parser.add_argument("--seed", type=_natural, default=0, help="of all draws; default 0")
    parser.add_argument("--overwrite", action="store_true", help="replace the semantic ids at --out")


def _add_compile(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--topology", required=True, help="of each slice, such as v5e:16x16 or v5p:8x8x8")
    parser.add_argument("--slices", type=_natural, default=1, help="so many, joined by the data-centre network")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument("--mesh", type=_mesh, help="data=..,fsdp=..,tensor=.. instead of the config's mesh")
    shapes.add_argument("--sweep", action="store_true", help="rank all meshes by formula and compile the best five")
    parser.add_argument("--json", type=Path, help="file for the figures; a list with --sweep")


def _add_launch(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument("--topology", required=True, help="of each slice, such as v5p:8x8x8")
    parser.add_argument("--slices", type=_natural, default=1, help="equal slices that train together; default 1")
    parser.add_argument("--target", choices=("gke", "tpu-vm"), required=True, help="service that runs the job")
    parser.add_argument("--name", help="of the job, and of its folder in the bucket; default: that of the config")
    parser.add_argument("--image", help="container image, HOST/PATH/NAME:TAG; launch/Dockerfile makes one")
    parser.add_argument("--bucket", help="Cloud Storage bucket: data/ holds data sets, runs/ gets checkpoints and logs")
    parser.add_argument("--service-account", help="that may use the bucket: name in GKE, e-mail for TPU VMs")
    parser.add_argument("--namespace", help="of Kubernetes; default 'default'")
    parser.add_argument("--project", help="of Google Cloud, for TPU VMs")
    parser.add_argument("--zone", help="of the TPU VMs")
    parser.add_argument("--spot", action="store_true", help="Spot capacity, which may be taken away")
    parser.add_argument("--max-restarts", type=_natural, default=10, help="after a crash; default 10")
    parser.add_argument(
        "--grace-seconds", type=_natural, default=300, help="from the signal to stop to the end; default 300"
    )
    parser.add_argument("--dry-run", action="store_true", help="print it, and start nothing")
    parser.add_argument("--skip-compile", action="store_true", help="do not compile it first: this was done already")


def _add_config(parser: argparse.ArgumentParser) -> None:
    shipped = ", ".join(shipped_configs())
    parser.add_argument(
        "--config", required=True, help=f"Python file or one of {shipped}; --config.FIELD=VALUE overrides a field"
    )
    parser.add_argument("--data", help="folder of the prepared data set; overrides data.path")


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--split", choices=SPLITS, required=True)
    parser.add_argument("--checkpoint", type=_checkpoint, default="best", help="best, latest or a step; default best")
    parser.add_argument("--data", type=Path, help="folder of the prepared data set; default: that of the run")

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
        if axis not in ("data", "fsdp", "tensor") or axis in sizes or not re.fullmatch(r"-?\d+", size):
            raise argparse.ArgumentTypeError(f"'{part}' is not AXIS=SIZE; write data=4,fsdp=8,tensor=1")
        sizes[axis] = int(size)
    return MeshConfig(**sizes)


def _day(text: str) -> str:
    try:
        return date.fromisoformat(text).isoformat()
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a day; write YYYY-MM-DD") from None


def _checkpoint(text: str) -> str:
    if text not in ("best", "latest") and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is neither best, latest nor a step")
    return text


def _version() -> str:
    try:
        return metadata.version("tokenrec")
    except metadata.PackageNotFoundError:
        return "tokenrec, not installed"


def _config(args: argparse.Namespace) -> Config:
    config = load_config(args.config, args.overrides)
    if args.data:
        config.data.path = args.data
    return config


def _prepare(args: argparse.Namespace) -> None:
    options = {"chunk_events": args.chunk_events, "overlap": args.overlap}
    given = {name: value for name, value in options.items() if value is not None}
    if args.beam:
        from tokenrec.data.beam.prepare import prepare_with_beam

        beam = {"work": args.beam_work, "arguments": shlex.split(args.beam_options or "")}
        prepared = prepare_with_beam(args.make_source(args), args.out, overwrite=args.overwrite, **given, **beam)
    else:
        from tokenrec.data.prepare import prepare

        for flag, value in (("--beam-options", args.beam_options), ("--beam-work", args.beam_work)):
            if value is not None:
                raise InputError(f"{flag}={value} is for Apache Beam; add --beam, or leave it out")
        prepared = prepare(args.make_source(args), args.out, overwrite=args.overwrite, **given)
    print(f"{args.out}: " + ", ".join(f"{name} {count:,}" for name, count in prepared.counts.items()))


def _kuairand(args: argparse.Namespace) -> Source:
    from tokenrec.data import kuairand

    root = kuairand.fetch(args.download, args.root) if args.download else args.root
    return kuairand.KuaiRandSource(root, args.valid_from, args.test_from)


def _complete_journey(args: argparse.Namespace) -> Source:
    from tokenrec.data.complete_journey import CompleteJourneySource

    return CompleteJourneySource(args.root)


def _amazon(args: argparse.Namespace) -> Source:
    from tokenrec.data.amazon import AmazonSource

    return AmazonSource(args.root, args.name, held_out=args.held_out)


def _synthetic(args: argparse.Namespace) -> Source:
    from tokenrec.data.synthetic import SyntheticSource

    return SyntheticSource(args.rows)


def _delimited(args: argparse.Namespace) -> Source:
    from tokenrec.data.delimited import DelimitedSource

    return DelimitedSource(args.schema, args.log, args.users, args.items, args.valid_from, args.test_from)


def _in_all_processes(args: argparse.Namespace) -> contextlib.AbstractContextManager[None]:
    if not args.distributed:
        return contextlib.nullcontext()
    from tokenrec.processes import all_or_none

    return all_or_none()


def _train(args: argparse.Namespace) -> None:
    with _in_all_processes(args):
        config = _config(args)
    from tokenrec.logbook import format_table, result_rows
    from tokenrec.processes import is_first
    from tokenrec.train import train

    summary = train(config, args.workdir, progress=not args.quiet)
    if not is_first():
        return
    print(f"{args.workdir}: step {summary['step']}, best step {summary['best_step']}")
    if summary["evaluation"]:
        print(format_table(result_rows({config.train.eval_split: summary["evaluation"]})))


def _evaluate(args: argparse.Namespace) -> None:
    from tokenrec.evaluate import evaluate_run
    from tokenrec.logbook import format_table, result_rows
    from tokenrec.processes import is_first

    result = evaluate_run(
        args.workdir, args.split, args.checkpoint, args.data, baselines=args.baselines, limit=args.samples
    )
    if not is_first():
        return
    if args.json:
        write_json(args.json, result)
    print(f"{args.workdir}: {result['split']} at step {result['step']} ({result['checkpoint']})")
    print(format_table(result_rows({"this run": result, **result.get("baselines", {})})))


def _predict(args: argparse.Namespace) -> None:
    from tokenrec.predict import predict_run
    from tokenrec.processes import is_first

    rows = predict_run(args.workdir, args.split, args.checkpoint, args.data, args.out)
    if is_first():
        print(f"{args.out}: {rows:,} rows")


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
    print(f"{args.out}: {report['items']:,} items, codes {sizes}; {alike:,} items needed the last level")


def _describe(args: argparse.Namespace) -> None:
    config = _config(args)
    from tokenrec.describe import describe, to_text
    from tokenrec.planned import known_schema

    schema, origin = known_schema(config)
    description = describe(config, schema)
    if args.json:
        write_json(args.json, description)
    print(origin)
    print(to_text(description))


def _compile(args: argparse.Namespace) -> None:
    config = _config(args)
    from tokenrec.compile import compile_config
    from tokenrec.pod_report import sweep_text, to_text
    from tokenrec.sweep import compile_best

    if args.sweep:
        found = compile_best(config, args.topology, args.slices, say=lambda line: print(line, file=sys.stderr))
    else:
        found = [compile_config(config, args.topology, args.slices, args.mesh)]
    if args.json:
        write_json(args.json, found if args.sweep else found[0])
    print(sweep_text(found) if args.sweep else to_text(found[0]))
    if not any(result["fits"] for result in found):
        raise MemoryError(f"the step does not fit {found[0]['device_kind']}; see the largest arrays above")


def _launch(args: argparse.Namespace) -> None:
    config = _config(args)
    from tokenrec.launch.job import plan_job
    from tokenrec.launch.start import check_fits, find_tool, render, start

    job = plan_job(
        config,
        source=args.config,
        overrides=tuple(args.overrides),
        topology=args.topology,
        slices=args.slices,
        name=args.name,
        image=args.image,
        bucket=args.bucket,
        max_restarts=args.max_restarts,
        grace_seconds=args.grace_seconds,
        spot=args.spot,
    )
    text = render(
        job,
        args.target,
        service_account=args.service_account,
        namespace=args.namespace,
        project=args.project,
        zone=args.zone,
    )
    tool = None if args.dry_run else find_tool(args.target)
    if not args.skip_compile:
        print(check_fits(config, args.topology, args.slices), file=sys.stderr)
    if tool is None:
        print(text, end="")
    else:
        start(text, Path(job.name), args.target, tool)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `tokenrec VERB`, each verb a thin call."""

from __future__ import annotations

import argparse
import contextlib
import errno
import shlex
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags as absl_flags

from tokenrec.cli.parser import Parser, build_parser
from tokenrec.config import Config
from tokenrec.config.load import load_config, split_overrides
from tokenrec.errors import (
    EXIT_BAD_STEPS,
    EXIT_DONE,
    EXIT_INPUT,
    EXIT_MEMORY,
    EXIT_PREEMPTED,
    InputError,
    NonFiniteError,
    Stopped,
)
from tokenrec.runtime.files import write_json

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
        case Stopped():
            message, code = (
                str(error),
                EXIT_PREEMPTED if error.signal == signal.SIGTERM else EXIT_INTERRUPTED,
            )
        case KeyboardInterrupt():
            message, code = "interrupted", EXIT_INTERRUPTED
        case _:
            return None
    print(f"tokenrec: {message}", file=sys.stderr)
    return code


def _run(argv: list[str]) -> int:
    arguments, overrides = split_overrides(argv)
    parser, verbs = _parsers()
    for name, verb in verbs.items():
        words = name.split()
        if arguments[: len(words)] == words:
            verb.refuse_unknown_flags(arguments[len(words) :])
    args = parser.parse_args(arguments)
    if overrides and "config" not in args:
        raise InputError(
            f"tokenrec {args.verb} takes no --config.{overrides[0]}; the run's own config.json decides"
        )
    args.overrides = overrides
    if not absl_flags.FLAGS.is_parsed():
        absl_flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which argparse leaves alone.
    if "distributed" in args and args.distributed:
        _run_with_others(args)
    else:
        args.run(args)
    return EXIT_DONE


def _run_with_others(args: argparse.Namespace) -> None:
    from tokenrec.runtime import distributed

    distributed.initialize(sigterm_stops_run=args.run is _train)
    try:
        args.run(args)
    except BaseException as error:  # noqa: BLE001 - the process ends
        code = _explain(error)
        if code is None:
            traceback.print_exception(error)
        distributed.exit_immediately(EXIT_FAULT if code is None else code)


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

        beam = {
            "work": args.beam_work,
            "arguments": shlex.split(args.beam_options or ""),
        }
        prepared = prepare_with_beam(
            args.make_source(args), args.out, overwrite=args.overwrite, **given, **beam
        )
    else:
        from tokenrec.data.preparation.prepare import prepare

        for flag, value in (
            ("--beam-options", args.beam_options),
            ("--beam-work", args.beam_work),
        ):
            if value is not None:
                raise InputError(
                    f"{flag}={value} is for Apache Beam; add --beam, or leave it out"
                )
        prepared = prepare(
            args.make_source(args), args.out, overwrite=args.overwrite, **given
        )
    print(
        f"{args.out}: "
        + ", ".join(f"{name} {count:,}" for name, count in prepared.counts.items())
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
                f"--static-weight={args.static_weight} is of profiles; say how many with --static-rank"
            )
        return SyntheticSource(args.rows)
    weight = 1.0 if args.static_weight is None else args.static_weight
    return ProfilesSource(args.rows, args.static_rank, static_weight=weight)


def _delimited(args: argparse.Namespace) -> Source:
    from tokenrec.data.sources.delimited import DelimitedSource

    return DelimitedSource(
        args.schema, args.log, args.users, args.items, args.valid_from, args.test_from
    )


def _in_all_processes(
    args: argparse.Namespace,
) -> contextlib.AbstractContextManager[None]:
    if not args.distributed:
        return contextlib.nullcontext()
    from tokenrec.runtime.distributed import raise_on_all_processes

    return raise_on_all_processes()


def _train(args: argparse.Namespace) -> None:
    with _in_all_processes(args):
        config = _config(args)
    from tokenrec.runtime.distributed import is_first_process
    from tokenrec.runtime.result_table import format_table, result_rows
    from tokenrec.train import train

    summary = train(config, args.workdir, progress=not args.quiet)
    if not is_first_process():
        return
    print(f"{args.workdir}: step {summary['step']}, best step {summary['best_step']}")
    if summary["evaluation"]:
        print(
            format_table(result_rows({config.train.eval_split: summary["evaluation"]}))
        )


def _evaluate(args: argparse.Namespace) -> None:
    from tokenrec.evaluation.evaluate import evaluate_run
    from tokenrec.runtime.distributed import is_first_process
    from tokenrec.runtime.result_table import format_table, result_rows

    result = evaluate_run(
        args.workdir,
        args.split,
        args.checkpoint,
        args.data,
        baselines=args.baselines,
        limit=args.samples,
    )
    if not is_first_process():
        return
    if args.json:
        write_json(args.json, result)
    print(
        f"{args.workdir}: {result['split']} at step {result['step']} ({result['checkpoint']})"
    )
    print(
        format_table(result_rows({"this run": result, **result.get("baselines", {})}))
    )


def _predict(args: argparse.Namespace) -> None:
    from tokenrec.evaluation.predict import predict_run
    from tokenrec.runtime.distributed import is_first_process

    rows = predict_run(args.workdir, args.split, args.checkpoint, args.data, args.out)
    if is_first_process():
        print(f"{args.out}: {rows:,} rows")


def _replay(args: argparse.Namespace) -> None:
    from tokenrec.debug.replay import replay_run
    from tokenrec.debug.report import to_text

    def say(line: str) -> None:
        print(line, file=sys.stderr)

    report = replay_run(
        args.workdir, args.step, args.checkpoint, args.data, args.mesh, log=say
    )
    if args.json:
        write_json(args.json, report)
    print(to_text(report))


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
        f"{args.out}: {report['items']:,} items, codes {sizes}; {alike:,} items needed the last level"
    )


def _describe(args: argparse.Namespace) -> None:
    config = _config(args)
    from tokenrec.planner.describe import describe, to_text
    from tokenrec.planner.planned_schema import resolve_schema

    schema, origin = resolve_schema(config)
    description = describe(config, schema)
    if args.json:
        write_json(args.json, description)
    print(origin)
    print(to_text(description))


def _compile(args: argparse.Namespace) -> None:
    config = _config(args)
    from tokenrec.planner.compile import compile_config
    from tokenrec.planner.report import sweep_text, to_text
    from tokenrec.planner.sweep import compile_best

    if args.sweep:
        found = compile_best(
            config,
            args.topology,
            args.slices,
            say=lambda line: print(line, file=sys.stderr),
        )
    else:
        found = [compile_config(config, args.topology, args.slices, args.mesh)]
    if args.json:
        write_json(args.json, found if args.sweep else found[0])
    print(sweep_text(found) if args.sweep else to_text(found[0]))
    if not any(result["fits"] for result in found):
        raise MemoryError(
            f"the step does not fit {found[0]['device_kind']}; see the largest arrays above"
        )


def _study(args: argparse.Namespace) -> None:
    from tokenrec.analysis.figure_style import require_matplotlib
    from tokenrec.analysis.report import write_report
    from tokenrec.study.jobs import BudgetSpent
    from tokenrec.study.plan import load_study
    from tokenrec.study.runner import run_study

    if args.overrides:
        raise InputError(
            f"tokenrec study takes no --config.{args.overrides[0]}; the study's file sets the fields"
        )
    require_matplotlib()  # before hours of training that the report would end
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
        try:
            print(write_report([args.out], args.out))
        except InputError as error:  # too little is done for a page
            raise InputError(f"{spent}; no page was drawn: {error}") from spent
        raise
    print(write_report([args.out], args.out))


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


def _report(args: argparse.Namespace) -> None:
    from tokenrec.analysis.report import write_report

    print(write_report(args.study, args.out))


_SOURCES = {
    "kuairand": _kuairand,
    "complete_journey": _complete_journey,
    "amazon": _amazon,
    "synthetic": _synthetic,
    "delimited": _delimited,
}
_RUNS = {
    "prepare": _prepare,
    "train": _train,
    "evaluate": _evaluate,
    "predict": _predict,
    "replay": _replay,
    "semantic-ids": _semantic_ids,
    "describe": _describe,
    "compile": _compile,
    "study": _study,
    "launch": _launch,
    "report": _report,
}


def _parsers() -> tuple[Parser, dict[str, Parser]]:
    return build_parser(__doc__ or "", _RUNS, _SOURCES)

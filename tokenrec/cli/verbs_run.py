"""Verbs that train a run or use a trained one: train, evaluate, predict, replay.

A verb imports what it calls when it runs, so that the others need no JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrec.cli.arguments import (
    add_config_flags,
    add_distributed_flag,
    add_run_data_flag,
    add_run_flags,
    add_workdir_flag,
    config_from_flags,
    mesh,
    whole_number,
)
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.runtime.files import write_json
from tokenrec.runtime.limits import raise_open_file_limit
from tokenrec.runtime.paths import path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers

_LATEST_BEFORE = "latest-before"


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {
        "train": _add_train(verbs),
        "evaluate": _add_evaluate(verbs),
        "predict": _add_predict(verbs),
        "replay": _add_replay(verbs),
    }


def _add_train(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "train",
        _train,
        "train a run, or resume it from its latest checkpoint",
        "SIGTERM and Ctrl-C save a checkpoint first; rerun the command to resume.",
    )
    add_config_flags(parser)
    add_workdir_flag(
        parser, "folder of the run: config, checkpoints, logs; reuse it to resume"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")
    add_distributed_flag(parser)
    return parser


def _train(args: argparse.Namespace) -> None:
    # A process may see another file than the others: without an error on all of them,
    # they would wait for the one that stopped.
    with _errors_on_all_processes(args):
        raise_open_file_limit()
        config = config_from_flags(args)
    from tokenrec.analysis.watch import make_state_logger
    from tokenrec.runtime.distributed import is_first_process
    from tokenrec.train_loop import train

    summary = train(
        config,
        args.workdir,
        progress=not args.quiet,
        make_state_logger=make_state_logger,
    )
    if is_first_process():
        print(_training_result(summary, args.workdir, config.train.eval_split))


def _training_result(summary: Mapping[str, Any], workdir: Path, split: str) -> str:
    """Say how far training came, with a table of the metrics of the best checkpoint.

    Without an evaluation of the best step the table shows the last one, and says so.
    """
    from tokenrec.runtime.result_table import format_results

    step, best_step = summary["step"], summary["best_step"]
    best, last = summary.get("best_evaluation"), summary["evaluation"]
    lines = [f"{workdir}: trained to step {step:,}"]
    # A run without evaluations, or with none whose metric is defined, has no best step.
    if best_step is not None and best_step >= 0:
        lines.append(f"best checkpoint: step {best_step:,}")
    if best:
        lines[-1] += f"; its metrics on {split}:"
        lines.append(format_results({split: best}, "split"))
    elif last:
        lines.append(f"last evaluation: step {step:,}; its metrics on {split}:")
        lines.append(format_results({split: last}, "split"))
    return "\n".join(lines)


def _errors_on_all_processes(
    args: argparse.Namespace,
) -> contextlib.AbstractContextManager[None]:
    """With --distributed, an InputError on one process is raised on all."""
    if not args.distributed:
        return contextlib.nullcontext()
    from tokenrec.runtime.distributed import raise_on_all_processes

    return raise_on_all_processes()


def _add_evaluate(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs, "evaluate", _evaluate, "compute the metrics of a run on a split"
    )
    add_run_flags(parser)
    parser.add_argument(
        "--json", type=path_argument, help="write the metrics to this file"
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also score the baselines of the data set on the same impressions",
    )
    parser.add_argument(
        "--samples",
        type=whole_number,
        default=0,
        help="number of requests to score, spread evenly over the split; 0 scores all "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--freeze-at",
        metavar="TIME",
        help="also evaluate with histories and statistics of the past that end at this "
        "time: ISO date or time (UTC unless it names a zone), milliseconds, or 'split', "
        "the first scored row",
    )
    parser.add_argument(
        "--request-ndcg",
        type=whole_number,
        metavar="K",
        help="also compute NDCG at this many places within requests (default: "
        "data.request_ndcg of the run)",
    )
    return parser


def _evaluate(args: argparse.Namespace) -> None:
    from tokenrec.evaluation.evaluate import evaluate_run
    from tokenrec.runtime.distributed import is_first_process
    from tokenrec.runtime.result_table import format_results

    result = evaluate_run(
        args.workdir,
        args.split,
        args.checkpoint,
        args.data,
        baselines=args.baselines,
        limit=args.samples,
        freeze_at=args.freeze_at,
        request_ndcg=args.request_ndcg,
    )
    if not is_first_process():
        return
    if args.json:
        write_json(args.json, result)
    print(
        f"{args.workdir}: {result['split']} at step {result['step']} "
        f"({result['checkpoint']})"
    )
    reports = {"this run": result, **result.get("baselines", {})}
    print(format_results(reports))


def _add_predict(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "predict",
        _predict,
        "write scores, or the best items of each request, to Parquet",
    )
    add_run_flags(parser)
    parser.add_argument(
        "--out", type=path_argument, required=True, help="Parquet file to write"
    )
    parser.add_argument(
        "--freeze-at",
        metavar="TIME",
        help="score with histories and statistics of the past that end at this time, as "
        "evaluate --freeze-at",
    )
    return parser


def _predict(args: argparse.Namespace) -> None:
    from tokenrec.evaluation.predict import predict_run
    from tokenrec.runtime.distributed import is_first_process

    rows = predict_run(
        args.workdir,
        args.split,
        args.checkpoint,
        args.data,
        args.out,
        freeze_at=args.freeze_at,
    )
    if is_first_process():
        print(f"{args.out}: {rows:,} rows")


def _add_replay(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "replay",
        _replay,
        "repeat one training step to find where a NaN came from",
        "It names the first value that is not finite, and the log rows and features of "
        "the samples that have one. The folder of the run is not changed.",
    )
    add_workdir_flag(parser, "folder of the run")
    parser.add_argument(
        "--step",
        type=whole_number,
        required=True,
        help="step to repeat, by its number in messages and logs",
    )
    parser.add_argument(
        "--checkpoint",
        type=_earlier_checkpoint,
        default=_LATEST_BEFORE,
        help=f"checkpoint to begin from: {_LATEST_BEFORE}, start, or a step; the steps "
        "from there to --step run first (default: %(default)s)",
    )
    add_run_data_flag(parser)
    parser.add_argument(
        "--mesh",
        type=mesh,
        help="mesh to use instead of the run's, such as data=4,fsdp=2; another mesh "
        "sums in another order, so numbers differ by rounding",
    )
    parser.add_argument(
        "--json", type=path_argument, help="write the report to this file"
    )
    return parser


def _earlier_checkpoint(text: str) -> str:
    if text not in (_LATEST_BEFORE, "start") and not text.isdecimal():
        raise argparse.ArgumentTypeError(
            f"'{text}' is neither {_LATEST_BEFORE}, start nor a step"
        )
    return text


def _replay(args: argparse.Namespace) -> None:
    from tokenrec.debug.replay import replay_run
    from tokenrec.debug.report import to_text

    report = replay_run(
        args.workdir,
        args.step,
        args.checkpoint,
        args.data,
        args.mesh,
        log=lambda line: print(line, file=sys.stderr),
    )
    if args.json:
        write_json(args.json, report)
    print(to_text(report))

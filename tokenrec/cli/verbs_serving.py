"""Verbs that serve a trained run: export, score, serve.

A verb imports what it calls when it runs: scoring needs no package of training.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrec.cli.arguments import (
    add_run_data_flag,
    add_workdir_flag,
    checkpoint,
    whole_number,
)
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verbs of this module; return their parsers by the words of the verb."""
    return {
        "export": _add_export(verbs),
        "score": _add_score(verbs),
        "serve": _add_serve(verbs),
    }


def add_model_flags(
    parser: argparse.ArgumentParser, text: str = "folder that `tokenrec export` wrote"
) -> None:
    """Add the flags that name an artifact and how it reads requests."""
    parser.add_argument(
        "--model",
        type=local_path_argument,
        required=True,
        help=text,
    )
    parser.add_argument(
        "--allow-missing",
        type=names,
        metavar="FEATURES",
        help="features whose columns requests may leave out, separated by commas; any "
        "other missing column is an error",
    )


def names(text: str) -> tuple[str, ...]:
    """Parse names, separated by commas.

    >>> names("week, hour")
    ('week', 'hour')
    """
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _add_export(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "export",
        _export,
        "write a run as an artifact that answers requests without the data set",
        "The artifact is compared with `tokenrec predict` before it appears. Of a run "
        "with a language model, --format hf writes the model as a Hugging Face "
        "checkpoint instead.",
    )
    add_workdir_flag(parser, "folder of the run")
    parser.add_argument(
        "--out", type=local_path_argument, required=True, help="folder to make"
    )
    parser.add_argument(
        "--checkpoint",
        type=checkpoint,
        default="best",
        help="best, latest, or the step of a checkpoint (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        choices=("artifact", "hf"),
        default="artifact",
        help="artifact: programs and weights for `tokenrec score` and `serve`; hf: "
        "safetensors, config.json and tokenizer of a language model, makers beside them "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="--format hf: type of the weights (default: that of each tensor of "
        "model.pretrained)",
    )
    parser.add_argument(
        "--platforms",
        type=names,
        help="what the programs will run on, of cpu, cuda, rocm and tpu "
        "(default: cpu,cuda,tpu)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="largest difference of a score from `tokenrec predict` (default: 1e-6, in "
        "bfloat16 0.02)",
    )
    parser.add_argument(
        "--max-k",
        type=whole_number,
        help="retrieval: the most items of an answer (default: 100, or head.top_k if "
        "that is more; with semantic ids head.beams)",
    )
    add_run_data_flag(parser)
    return parser


def _export(args: argparse.Namespace) -> None:
    if args.format == "hf":
        _refuse(args, "hf", "platforms", "tolerance", "max_k")
        _export_language_model(args)
        return
    _refuse(args, "artifact", "dtype")
    from tokenrec.serving.export.run import export_run

    manifest = export_run(
        args.workdir,
        args.out,
        checkpoint=args.checkpoint,
        platforms=args.platforms or ("cpu", "cuda", "tpu"),
        data=args.data,
        tolerance=args.tolerance,
        max_k=args.max_k,
    )
    checked = manifest["checked"]
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    print(
        f"{args.out}: step {manifest['step']:,}, {size / 1e6:,.1f} MB, digest "
        f"{manifest['digest'][:12]}; {_answers(manifest)} of {checked['requests']} "
        f"requests of {checked['split']} equal those of `tokenrec predict`"
    )


def _refuse(args: argparse.Namespace, chosen: str, *flags: str) -> None:
    """Raise InputError if a flag is given that the format does not have."""
    for name in flags:
        if getattr(args, name) is not None:
            raise InputError(
                f"--{name.replace('_', '-')} has no effect with --format={chosen}; "
                "leave it out"
            )


def _export_language_model(args: argparse.Namespace) -> None:
    from tokenrec.language.export_run import export_language_model

    exported = export_language_model(
        args.workdir,
        args.out,
        checkpoint=args.checkpoint,
        data=args.data,
        dtype=args.dtype or "",
    )
    written, count = exported.checkpoint, len(exported.new_words)
    new = f", {count:,} of them new" if count else ""
    print(
        f"{args.out}: step {exported.step:,}, a language model of {written.weights:,} "
        f"weights and {written.vocabulary:,} words{new}; {exported.others:,} weights of "
        "makers, heads and tables in tokenrec.safetensors"
    )
    if written.left_out:
        print(f"left out: {', '.join(written.left_out)}")


def _answers(manifest: dict[str, Any]) -> str:
    if manifest["objective"] == "ranking":
        return "scores"
    swapped = manifest["checked"]["swapped"]
    note = f" (but for {swapped} ranks of equal scores)" if swapped else ""
    return f"items{note}"


def _add_score(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "score",
        _score,
        "score candidates or find items for a Parquet file of requests",
        "An artifact of a ranking run scores the candidates of each request; one of a "
        "retrieval run finds the best items.",
    )
    add_model_flags(parser)
    parser.add_argument(
        "--requests",
        type=local_path_argument,
        required=True,
        help="Parquet file of requests, with nested columns as in the JSON request",
    )
    parser.add_argument(
        "--out", type=local_path_argument, required=True, help="Parquet file to write"
    )
    return parser


def _score(args: argparse.Namespace) -> None:
    from tokenrec.serving.score_file import score_file
    from tokenrec.serving.scorer import open_artifact

    scorer = open_artifact(args.model, allow_missing=args.allow_missing or ())
    rows = score_file(scorer, args.requests, args.out)
    print(f"{args.out}: {rows:,} rows")


def _add_serve(verbs: VerbParsers) -> Parser:
    parser = add_verb(
        verbs,
        "serve",
        _serve,
        "score requests over HTTP with an exported run",
        "It checks the artifact, compiles every shape, scores the artifact's golden "
        "requests and then says that it is ready. SIGTERM finishes what is in flight.",
    )
    add_model_flags(
        parser,
        "folder that `tokenrec export` wrote, or a link to it; when the link leads to "
        "another artifact, that one is loaded and takes over",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; there is no TLS and no login (default: %(default)s)",
    )
    parser.add_argument(
        "--port",
        type=whole_number,
        default=8000,
        help="port to listen at; 0 takes a free one (default: %(default)s)",
    )
    _add_limits(parser)
    parser.add_argument(
        "--compile-cache",
        type=local_path_argument,
        help="folder of compiled programs, which a restart loads (default: "
        "tokenrec/serving in the user's cache folder)",
    )
    parser.add_argument(
        "--events-dir",
        type=local_path_argument,
        help="folder of the journals of /v1/events, which a restart reads (default: "
        "events are kept in memory alone)",
    )
    return parser


def _add_limits(parser: Parser) -> None:
    for flag, default, text in (
        ("--max-candidates", 2_000, "candidates of a request"),
        ("--max-history", 10_000, "events of the history of a request"),
        ("--max-batch", 16, "requests of one device call"),
        ("--queue", 256, "requests that wait; more are answered with 429"),
        ("--cache-mb", 512, "megabytes of prefixes of recent users; 0 keeps none"),
    ):
        parser.add_argument(
            flag,
            type=whole_number,
            default=default,
            help=f"{text} (default: %(default)s)",
        )


def _serve(args: argparse.Namespace) -> None:
    for flag in ("max_candidates", "max_batch", "queue"):
        if getattr(args, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} 0 serves nothing; raise it")
    with _compile_cache(args.compile_cache):
        # Imported late: uvicorn and orjson are of the extra `serving`.
        try:
            from tokenrec.serving.server.run import ServerOptions, serve
        except ModuleNotFoundError as error:
            raise InputError(
                f"tokenrec serve needs the package {error.name}; install the extra "
                "serving: `pip install '.[serving]'`"
            ) from error
        from tokenrec.serving.request import Limits
        from tokenrec.serving.server.batch_plan import BatchLimits
        from tokenrec.serving.server.limits import AppLimits
        from tokenrec.serving.server.load_model import ModelLoader

        limits = Limits(candidates=args.max_candidates, history=args.max_history)
        batch = BatchLimits(batch=args.max_batch, queue=args.queue)
        options = ServerOptions(
            args.model,
            args.host,
            args.port,
            cache_bytes=args.cache_mb << 20,
            batch=batch,
            limits=AppLimits(limits),
        )
        loader = ModelLoader(
            batch, limits, args.allow_missing or (), journals=args.events_dir
        )
        serve(options, loader)


@contextlib.contextmanager
def _compile_cache(folder: Path | None) -> Iterator[None]:
    """Keep compiled programs, so that a restart is ready in seconds."""
    # JAX only now: its import takes seconds, and wrong flags were told before.
    from tokenrec.runtime.compilation_cache import persistent_compilation_cache

    if folder is None:
        caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(caches) / "tokenrec" / "serving"
    with contextlib.suppress(OSError):
        folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    with persistent_compilation_cache(
        folder,
        True,
        every_program=True,
        remedy="name another folder with --compile-cache",
    ):
        yield

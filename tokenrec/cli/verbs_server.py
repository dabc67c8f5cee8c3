"""The verb `serve`: an HTTP server of an exported run."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenrec.cli.arguments import whole_number
from tokenrec.cli.parser import Parser, add_verb
from tokenrec.errors import InputError
from tokenrec.runtime.paths import local_path_argument

if TYPE_CHECKING:
    from tokenrec.cli.parser import VerbParsers


def add_verbs(verbs: VerbParsers) -> dict[str, Parser]:
    """Add the verb; return its parser by its word."""
    parser = add_verb(
        verbs,
        "serve",
        _serve,
        "score requests over HTTP with an exported run",
        "It checks the artifact, compiles every shape, scores the artifact's golden "
        "requests and then says that it is ready. SIGTERM finishes what is in flight.",
    )
    parser.add_argument(
        "--model",
        type=local_path_argument,
        required=True,
        help="folder of the artifact, or a link to it; when the link leads to another "
        "artifact, that one is loaded and takes over",
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
    parser.add_argument(
        "--allow-missing",
        metavar="FEATURE",
        action="append",
        default=[],
        help="feature that a request may leave out, which is null then; repeat it for "
        "several (default: a feature that is missing is an error)",
    )
    return {"serve": parser}


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
            from tokenrec.serving.server import ServerOptions, serve
        except ModuleNotFoundError as error:
            raise InputError(
                f"tokenrec serve needs the package {error.name}; install the extra "
                "serving: pip install 'tokenrec[serving]'"
            ) from error
        from tokenrec.serving.app_limits import AppLimits
        from tokenrec.serving.batch_plan import BatchLimits
        from tokenrec.serving.load_model import ModelLoader
        from tokenrec.serving.request import Limits

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
            batch, limits, tuple(args.allow_missing), journals=args.events_dir
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

"""Run the HTTP server: bind, load and warm the model, say ready, serve, drain."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn

from tokenrec.errors import InputError
from tokenrec.serving.server.app import App
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.batcher import Batcher
from tokenrec.serving.server.http_protocol import limited_protocol
from tokenrec.serving.server.limits import AppLimits
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.model_slot import ModelSlot, ServedModel, Watcher
from tokenrec.serving.server.prefix_store import PrefixStore

_BACKLOG = 512

# Time that a load gets to end at the end of the server.
_LOAD_SECONDS = 1.0


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How a server runs.

    Attributes:
      model: folder of an artifact, or a link to one; a link is watched.
      host: address to listen at.
      port: port to listen at; 0 takes a free one.
      cache_bytes: bytes of the prefixes that are kept.
      batch: limits of a device call and of the queue.
      limits: limits of requests.
      watch_seconds: time between two looks at where the link leads.
      drain_seconds: time in which requests in flight must finish at the end.
      head_seconds: time in which the headers of a request must arrive.
      idle_seconds: time after which an idle connection is closed.
      connections: connections at one time.
    """

    model: Path
    host: str = "127.0.0.1"
    port: int = 8000
    cache_bytes: int = 512 << 20
    batch: BatchLimits = dataclasses.field(default_factory=BatchLimits)
    limits: AppLimits = dataclasses.field(default_factory=AppLimits)
    watch_seconds: float = 1.0
    drain_seconds: int = 30
    head_seconds: float = 10.0
    idle_seconds: int = 75
    connections: int = 1_024


def serve(options: ServerOptions, load: Callable[[Path], ServedModel]) -> None:
    """Serve a model until SIGTERM or Ctrl-C; then finish what is in flight.

    Args:
      options: how to run.
      load: opens, warms and checks an artifact.

    Raises:
      InputError: the address cannot be bound, or the artifact cannot serve.
    """
    _log_to_stderr()
    with _ends_at_sigterm(), _bound(options.host, options.port) as listener:
        metrics = ServerMetrics()
        store: PrefixStore[Any] = PrefixStore(options.cache_bytes)
        slot = ModelSlot(options.model, load, store, metrics)
        batcher = Batcher(store, metrics, options.batch)
        app = App(slot, batcher, metrics, options.limits)
        watcher = Watcher(slot, options.watch_seconds, _settle_memory)
        _settle_memory()
        batcher.start()
        watcher.start()
        _Server(options, app, slot).run([listener])
        has_ended = watcher.close(_LOAD_SECONDS)
        batcher.close()
        app.close()
    if not has_ended:
        # A compiler that still works would crash in a process that ends in order.
        sys.stdout.flush()
        os._exit(0)


def _settle_memory() -> None:
    """Free the model that no longer serves, and let collections pass over what stays.

    A full collection would otherwise look at every object of JAX, again and again,
    while requests wait.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


class _Server(uvicorn.Server):
    """uvicorn, which says when it is ready and ends with exit code 0 on a signal."""

    def __init__(self, options: ServerOptions, app: App, slot: ModelSlot) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=limited_protocol(options.head_seconds, options.connections),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=options.idle_seconds,
                timeout_graceful_shutdown=options.drain_seconds,
            )
        )
        self._app, self._slot = app, slot

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        assert sockets is not None
        host, port = sockets[0].getsockname()[:2]
        model = self._slot.model
        print(
            f"tokenrec: {model.path.name} (digest {model.scorer.digest[:12]}) is ready "
            f"at http://{f'[{host}]' if ':' in host else host}:{port}",
            flush=True,
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        # uvicorn raises the signal again at the end, which would be the exit code.
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._app.is_draining = True
        super().handle_exit(sig, frame)


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """Bind before the model is loaded, which takes long, and listen after it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except (OSError, OverflowError) as error:
            reason = (
                os.strerror(error.errno)
                if isinstance(error, OSError) and error.errno
                else error
            )
            raise InputError(
                f"--host {host} --port {port}: {reason}; use another port, or an "
                "address of this machine"
            ) from None
        listener.set_inheritable(False)
        yield listener


@contextlib.contextmanager
def _ends_at_sigterm() -> Iterator[None]:
    """End with exit code 0 on SIGTERM while the model is loaded: nothing is in flight."""

    def end(number: int, frame: FrameType | None) -> None:
        sys.exit(0)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _log_to_stderr() -> None:
    """Log loads and internal errors; of requests nothing but what uvicorn calls errors."""
    logging.basicConfig(
        stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger("tokenrec.serving").setLevel(logging.INFO)
    # It warns of every malformed request, with which a client could fill the disk.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)

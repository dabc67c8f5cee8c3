"""Send events and requests to a server that may be killed on the way."""

from __future__ import annotations

import collections
import contextlib
import http.client
import json
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.serving_process import ServerProcess, served

_KIND = {"content-type": "application/json"}
_CONNECTIONS = 4
# The server may have read none, some or all of the events before it is killed.
_KILL_AFTER_SECONDS = 0.005


class Replayer:
    """A server, and what was sent to it.

    Args:
      model: folder of an artifact.
      flags: flags of the server.

    Attributes:
      counts: what became of the events, by the answers of the server.
      bodies: bodies of events that were sent.
      requests: requests that were scored.
      hits: those whose prefix was in the cache.
      kills: servers that were killed.
    """

    def __init__(self, model: Path, flags: Sequence[str]) -> None:
        self._model, self._flags = model, flags
        self._stack = contextlib.ExitStack()
        self._pool = ThreadPoolExecutor(_CONNECTIONS)
        self.counts: collections.Counter[str] = collections.Counter()
        self.bodies = self.requests = self.hits = self.kills = 0

    def __enter__(self) -> Replayer:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._stack.close()

    def send(
        self,
        events: Sequence[dict[str, Any]],
        requests: Sequence[dict[str, Any]],
        together: bool,
        kill: bool,
    ) -> list[dict[str, Any]]:
        """Send requests, then events, or both together.

        Args:
          events: bodies of events.
          requests: bodies of requests.
          together: requests are sent from several connections, during the events.
          kill: the server is killed while it reads the first events, which are sent
            again to the next one.

        Returns:
          The answers of the requests.
        """
        if not together:
            answers = [self._ask("/v1/score", body) for body in requests]
        else:
            waiting = [self._pool.submit(self._ask, "/v1/score", b) for b in requests]
            # A kill would fail the requests that are in flight.
            answers = [w.result() for w in waiting] if kill else []
        if kill:
            self._kill(events[0])
        for body in events:
            self.bodies += 1
            answer = self._ask("/v1/events", body)
            answer.pop("model")
            self.counts.update(answer)
        if together and not answers:
            answers = [w.result() for w in waiting]
        self.requests += len(answers)
        self.hits += sum(answer["cache"] == "hit" for answer in answers)
        for answer in answers:
            if answer["history"] != "live":
                raise RuntimeError(f"a history was not live: {answer}")
        return answers

    def _start(self) -> None:
        self._server: ServerProcess = self._stack.enter_context(
            served(self._model, *self._flags)
        )

    def _kill(self, body: dict[str, Any]) -> None:
        """End the server with SIGKILL while it gets events, and start another."""

        def send() -> None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._ask("/v1/events", body)

        sender = threading.Thread(target=send)
        sender.start()
        sender.join(_KILL_AFTER_SECONDS)
        self._server.process.kill()
        self._server.process.wait()
        sender.join()
        self.kills += 1
        self._start()

    def _ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(
            "127.0.0.1", self._server.port, timeout=600
        )
        with contextlib.closing(connection):
            connection.request("POST", path, json.dumps(body), _KIND)
            answer = connection.getresponse()
            text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"{path}: {answer.status}: {text[:500]!r}")
        value: dict[str, Any] = json.loads(text)
        return value

"""The server's endpoints, as an ASGI application.

    POST /v1/score     scores of the candidates of a request
    POST /v1/retrieve  the best items for a request
    POST /v1/events    new events for histories and counters
    GET  /v1/models    the model that serves, and how the newest load ended
    GET  /healthz      200 while the process works; restart it otherwise
    GET  /readyz       200 while it takes requests
    GET  /metrics      series for Prometheus

A request is parsed and encoded on the event loop, and answered by the thread of the
batcher. Long bodies, and requests for items, are parsed in another thread, so that
others do not wait for them.
"""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor, wait

from tokenrec.errors import InputError
from tokenrec.serving.server.arrow_body import parse_arrow
from tokenrec.serving.server.batch_plan import RETRIEVAL
from tokenrec.serving.server.batcher import Batcher, DeadlineError
from tokenrec.serving.server.http_answers import (
    check_type,
    error_response,
    json_response,
)
from tokenrec.serving.server.http_io import (
    ARROW,
    JSON,
    BodyReader,
    DisconnectedError,
    HttpError,
    Receive,
    Response,
    Scope,
    Send,
    header,
    respond,
)
from tokenrec.serving.server.limits import AppLimits
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.model_slot import ModelSlot, ServedModel
from tokenrec.serving.server.prometheus import CONTENT_TYPE
from tokenrec.serving.server.score_request import (
    RETRIEVE,
    SCORE,
    Prepared,
    Question,
    no_counters,
    parse_json,
)

_TIMEOUT_HEADER = b"x-timeout-ms"

# Threads that parse long bodies, and those of models with a live state.
_PARSERS = 2

# Endpoints whose time counts by stage.
_TIMED = ("/v1/score", "/v1/retrieve")

type Handler = Callable[[Scope, Receive], Awaitable[Response]]


class App:
    """ASGI application of a model.

    Args:
      slot: the model that serves.
      batcher: scores requests.
      metrics: series.
      limits: limits of requests.
    """

    def __init__(
        self,
        slot: ModelSlot,
        batcher: Batcher,
        metrics: ServerMetrics,
        limits: AppLimits,
    ) -> None:
        self._slot, self._batcher = slot, batcher
        self._metrics, self._limits = metrics, limits
        self._reader = BodyReader(
            limits.body_bytes, limits.total_body_bytes, limits.body_seconds
        )
        self._pool = _started_pool(_PARSERS)
        self._routes: dict[str, tuple[str, Handler]] = {
            "/v1/score": ("POST", functools.partial(self._answer, SCORE)),
            "/v1/retrieve": ("POST", functools.partial(self._answer, RETRIEVE)),
            "/v1/events": ("POST", self._add_events),
            "/v1/models": ("GET", self._list_models),
            "/healthz": ("GET", self._report_health),
            "/readyz": ("GET", self._report_readiness),
            "/metrics": ("GET", self._report_metrics),
        }
        self.is_draining = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        begin = time.perf_counter()
        path = scope["path"]
        try:
            response = await self._dispatch(path, scope, receive)
        except DisconnectedError:
            self._metrics.requests.add(1, self._label(path), "499")
            return
        except Exception as error:  # noqa: BLE001 - an error is an answer
            response = error_response(error)
        sent = time.perf_counter()
        await respond(send, response)
        self._metrics.requests.add(1, self._label(path), str(response.status))
        if path in _TIMED:
            end = time.perf_counter()
            self._metrics.seconds.observe(end - sent, "respond")
            self._metrics.seconds.observe(end - begin, "total")

    def close(self) -> None:
        """End the threads that parse."""
        self._pool.shutdown()

    def _label(self, path: str) -> str:
        # Any other path would be a series of its own.
        return path if path in self._routes else "other"

    async def _dispatch(self, path: str, scope: Scope, receive: Receive) -> Response:
        if path not in self._routes:
            raise HttpError(
                404,
                "no_such_path",
                f"path: there is none of this name; use {', '.join(self._routes)}",
                {"connection": "close"},
            )
        method, handle = self._routes[path]
        if scope["method"] != method:
            raise HttpError(
                405,
                "wrong_method",
                f"method: {path} does not take {scope['method']}; use {method}",
                {"allow": method, "connection": "close"},
            )
        return await handle(scope, receive)

    async def _answer(
        self, question: Question, scope: Scope, receive: Receive
    ) -> Response:
        deadline = time.monotonic() + self._timeout(scope)
        begin = time.perf_counter()
        kind = check_type(scope, *question.types)
        # The model of this request until its answer, whatever is loaded meanwhile.
        model = self._slot.model
        question.check_model(model)
        async with self._reader.read(scope, receive) as body:
            self._observe("read", begin)
            prepared = await self._prepare(question, body, kind, model)
        name = (model.name, prepared.user, prepared.encoded.prefix_key)
        future = self._batcher.submit(model.scorer, prepared.encoded, name, deadline)
        try:
            async with asyncio.timeout(deadline - time.monotonic()):
                found, was_held = await asyncio.wrap_future(future)
        except TimeoutError:
            raise DeadlineError("the deadline passed before the answer") from None
        return Response(question.answer(prepared, found, was_held, model))

    async def _prepare(
        self, question: Question, body: bytearray, kind: str, model: ServedModel
    ) -> Prepared:
        is_short = len(body) <= self._limits.inline_bytes
        # The state may wait for the disk, where it keeps events.
        if not (question.is_quick and is_short) or model.live is not None:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(
                self._pool, self._prepare_now, question, body, kind, model
            )
        return self._prepare_now(question, body, kind, model)

    def _prepare_now(
        self, question: Question, body: bytearray, kind: str, model: ServedModel
    ) -> Prepared:
        begin = time.perf_counter()
        value = (
            parse_arrow(body, self._limits.request)
            if kind == ARROW
            else parse_json(body)
        )
        self._observe("parse", begin)
        begin = time.perf_counter()
        prepared = question.prepare(value, model, self._limits.request)
        self._observe("encode", begin)
        unknown = prepared.encoded.unknown
        self._metrics.observe_encoded(
            prepared.candidates,
            prepared.encoded.events,
            unknown.missing,
            unknown.values,
            unknown.items,
        )
        return prepared

    async def _add_events(self, scope: Scope, receive: Receive) -> Response:
        check_type(scope, JSON)
        if self._slot.model.live is None:
            raise no_counters("events")
        async with self._reader.read(scope, receive) as body:
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._pool, self._add_events_now, body)

    def _add_events_now(self, body: bytearray) -> Response:
        value = parse_json(body)
        if not isinstance(value, dict) or set(value) != {"events"}:
            raise HttpError(
                400,
                "bad_request",
                "events: the body is not {'events': {COLUMN: [...]}}; send that",
            )
        # The model of now: the journal of one that was replaced is closed.
        model = self._slot.model
        try:
            if model.live is None:
                raise no_counters("events")
            received = model.live.receive(value["events"])
        except ValueError as error:
            if isinstance(error, InputError) or model is self._slot.model:
                raise
            raise HttpError(
                503,
                "replaced",
                "events: the model was replaced at this moment; send them again",
                {"retry-after": "1"},
            ) from None
        self._metrics.events.add(received.applied)
        counts = dict(zip(received._fields, received, strict=True))
        return json_response({"model": model.scorer.digest, **counts})

    async def _list_models(self, scope: Scope, receive: Receive) -> Response:
        model, load = self._slot.model, self._slot.last_load
        scorer = model.scorer
        if scorer.objective == RETRIEVAL:
            what = {"head": scorer.head, "max_k": scorer.max_k}
        else:
            what = {"tasks": list(scorer.tasks), "outputs": list(scorer.outputs)}
        serving = {
            "digest": scorer.digest,
            "name": model.path.name,
            "objective": scorer.objective,
            **what,
            "ready_ms": model.ready_ms,
            # What is sent after a swap: the events since then.
            "events_until_ms": None if model.live is None else model.live.last_time_ms,
        }
        last = {
            "name": load.name,
            "outcome": load.outcome,
            "error": load.error,
            "time_ms": load.time_ms,
        }
        return json_response({"models": [serving], "last_load": last})

    async def _report_health(self, scope: Scope, receive: Receive) -> Response:
        stuck = self._batcher.stuck_seconds()
        if stuck > self._limits.stuck_seconds:
            raise HttpError(
                503,
                "stuck",
                f"device: its call has run for {stuck:.0f} s; restart the server",
            )
        return json_response({"status": "ok"})

    async def _report_readiness(self, scope: Scope, receive: Receive) -> Response:
        if self.is_draining:
            raise HttpError(503, "draining", "server: it is stopping; use another one")
        health = await self._report_health(scope, receive)
        return json_response({"status": "ready"}) if health.status == 200 else health

    async def _report_metrics(self, scope: Scope, receive: Receive) -> Response:
        model = self._slot.model
        page = self._metrics.exposition(
            model.scorer.digest,
            self._batcher.waiting(),
            model.compiles_since_ready(),
            self._batcher.store.counts(),
        )
        return Response(page, content_type=CONTENT_TYPE)

    def _timeout(self, scope: Scope) -> float:
        """Return the seconds that the caller waits for its answer."""
        most = self._limits.answer_seconds
        value = header(scope, _TIMEOUT_HEADER)
        if value is None:
            return most
        if not value.isdigit() or not 0 < int(value[:10]) <= most * 1_000:
            raise HttpError(
                400,
                "bad_request",
                f"X-Timeout-Ms: is not a number from 1 to {most * 1_000:.0f}; send "
                "the milliseconds that you wait",
                {"connection": "close"},
            )
        return int(value) / 1_000

    def _observe(self, stage: str, begin: float) -> None:
        self._metrics.seconds.observe(time.perf_counter() - begin, stage)


def _started_pool(threads: int) -> ThreadPoolExecutor:
    """Return a pool whose threads run already.

    A pool starts them with its first tasks, and these fail where a limit of memory or of
    processes allows no further thread.
    """
    pool = ThreadPoolExecutor(threads, thread_name_prefix="parse")
    together = threading.Barrier(threads)
    wait([pool.submit(together.wait) for _ in range(threads)])
    return pool

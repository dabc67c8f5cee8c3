"""The endpoints: right scores, clear errors, limits, and two models that never mix."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import json
import logging
import os
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.serving.server.arithmetic_scorer import (
    NOT_A_NUMBER,
    POISON,
    ArithmeticScorer,
)
from tests.serving.server.asgi import Answer, call, until
from tests.serving.server.request_bodies import body_of, request_of
from tests.serving.server.test_arrow_body import stream_of
from tests.serving.server.test_model_slot import load, point, write_artifact
from tokenrec.serving.request import BadRequest, Limits, Request
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.batcher import Batcher
from tokenrec.serving.server.http_io import BodyReader, HttpError
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.model_slot import ModelSlot
from tokenrec.serving.server.prefix_store import PrefixStore

pytest.importorskip("orjson", reason="needs the extra serving")

from tokenrec.serving.server import score_request
from tokenrec.serving.server.app import App
from tokenrec.serving.server.limits import AppLimits

BATCH = BatchLimits(batch=8, rows=512, candidates=64, queue=5)
LIMITS = AppLimits(request=Limits(candidates=100, history=50), body_bytes=100_000)


class Served(NamedTuple):
    app: App
    slot: ModelSlot
    batcher: Batcher
    metrics: ServerMetrics

    @property
    def scorer(self) -> ArithmeticScorer:
        return self.slot.model.scorer


@contextlib.contextmanager
def served(
    link: Path, limits: AppLimits = LIMITS, batch: BatchLimits = BATCH
) -> Iterator[Served]:
    metrics, store = ServerMetrics(), PrefixStore[Any](1 << 20)
    slot = ModelSlot(link, load, store, metrics)
    batcher = Batcher(store, metrics, batch)
    app = App(slot, batcher, metrics, limits)
    batcher.start()
    yield Served(app, slot, batcher, metrics)
    batcher.close()
    app.close()


@pytest.fixture
def link(tmp_path: Path) -> Path:
    one = tmp_path / "current"
    one.symlink_to(write_artifact(tmp_path / "first", 1.0))
    return one


@pytest.fixture
def server(link: Path) -> Iterator[Served]:
    with served(link) as one:
        yield one


def ask(server: Served, path: str, *args: Any, **options: Any) -> Answer:
    return asyncio.run(call(server.app, path, *args, **options))


def scores_of(answer: Answer) -> np.ndarray:
    assert answer.status == 200, answer.body
    found = answer.json["scores"]
    assert list(found) == ["click", "buy"]
    return np.stack([found["click"], found["buy"]], 1).astype(np.float32)


def test_scores_survive_json_bit_for_bit(server: Served) -> None:
    for seed in range(20):
        answer = ask(server, "/v1/score", body_of(seed))
        expected = server.scorer.expected(request_of(seed))
        np.testing.assert_array_equal(scores_of(answer), expected)
        assert answer.json["model"] == server.scorer.digest
        assert answer.headers["content-type"] == "application/json"


def test_a_request_in_arrow_has_the_answer_of_json(server: Served) -> None:
    kind = {"content-type": "application/vnd.apache.arrow.stream"}
    for seed in range(5):
        parts = [stream_of(body_of(seed))]
        answer = ask(server, "/v1/score", parts=parts, headers=kind)
        expected = server.scorer.expected(request_of(seed))
        np.testing.assert_array_equal(scores_of(answer), expected)
        assert answer.headers["content-type"] == "application/json"
    wrong = ask(server, "/v1/score", parts=[parts[0][:-600]], headers=kind)
    assert (wrong.status, wrong.error[0]) == (400, "bad_arrow")
    packed = [stream_of(body_of(1), compression="zstd")]
    refused = ask(server, "/v1/score", parts=packed, headers=kind)
    assert (refused.status, refused.error[0]) == (415, "wrong_type")
    missing = [stream_of(body_of(1) | {"time_ms": "now"})]
    said = ask(server, "/v1/score", parts=missing, headers=kind)
    assert (said.status, said.error[0]) == (400, "bad_request")
    assert "time_ms: 'now' is not an int64" in said.error[1]
    # The other endpoints take JSON alone.
    assert ask(server, "/v1/events", parts=parts, headers=kind).status == 415


def test_the_answer_tells_of_the_cache_and_of_what_is_unknown(server: Served) -> None:
    body = body_of(3)
    body["candidates"]["item_id"] = [5, 70_000, 6]
    del body["context"]
    first, second = (ask(server, "/v1/score", body).json for _ in range(2))
    assert (first["cache"], second["cache"]) == ("miss", "hit")
    assert first["scores"] == second["scores"]
    assert first["unknown"] == {
        "items": [1],
        "history_items": 0,
        "values": {},
        "missing": {"hour": 1},
    }
    assert first["history"] == "request"
    page = ask(server, "/metrics").body.decode()
    series = "tokenrec_feature_values_total"
    assert f'{series}{{feature="item_id",kind="unknown"}} 2\n' in page
    assert f'{series}{{feature="hour",kind="missing"}} 2\n' in page
    assert "tokenrec_prefix_hits_total 1\n" in page
    assert 'tokenrec_requests_total{path="/v1/score",status="200"} 2\n' in page
    assert 'tokenrec_stage_seconds_count{stage="total"} 2\n' in page
    for stage in ("read", "parse", "encode", "queue", "prefill", "extend", "respond"):
        assert f'tokenrec_stage_seconds_count{{stage="{stage}"}}' in page


def test_many_requests_at_once_each_get_their_own_scores(server: Served) -> None:
    async def ask_all() -> list[Answer]:
        return await asyncio.gather(
            *(call(server.app, "/v1/score", body_of(seed)) for seed in range(5))
        )

    for _ in range(10):
        for seed, answer in enumerate(asyncio.run(ask_all())):
            np.testing.assert_array_equal(
                scores_of(answer), server.scorer.expected(request_of(seed))
            )


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"time_ms": "now"}, 400, "time_ms: 'now' is not an int64; send whole"),
        ({"user": {"age": None}}, 400, "user.age: None is no number; send a number"),
        ({"candidates": {"item_id": [1] * 101}}, 400, "more than the limit of 100"),
        ({"candidates": {}}, 400, "candidates: the column 'item_id' is missing"),
        ({"prices": []}, 400, "request: no field 'prices'"),
        ({"model": "abc"}, 400, "model: is not a digest of 8 or more characters"),
        ({"model": "a" * 20}, 409, "does not serve, and '"),
        ({"context": {"x": [[1]]}}, 400, "is a list within a list"),
    ],
)
def test_a_wrong_request_is_told_what_to_change(
    server: Served, change: Mapping[str, Any], status: int, words: str
) -> None:
    answer = ask(server, "/v1/score", body_of(1) | dict(change))
    assert answer.status == status
    assert words in answer.error[1]
    assert "; " in answer.error[1]


def test_a_request_may_name_the_model_that_serves(server: Served) -> None:
    body = body_of(1) | {"model": server.scorer.digest[:8]}
    assert ask(server, "/v1/score", body).status == 200


@pytest.mark.parametrize(
    ("options", "status", "kind"),
    [
        ({"parts": [b"{"]}, 400, "bad_json"),
        ({"parts": [b"\xff\xfe"]}, 400, "bad_json"),
        ({"parts": [b""]}, 400, "bad_json"),
        ({"parts": [b"[" * 100_000]}, 400, "bad_json"),
        ({"parts": [b'{"a":' * 10_000]}, 400, "bad_json"),
        ({"parts": [b" " * 60_000] * 2}, 413, "too_long"),
        ({"body": {}, "headers": {"content-length": "999999999"}}, 413, "too_long"),
        ({"body": {}, "headers": {"content-type": "text/plain"}}, 415, "wrong_type"),
        ({"body": {}, "headers": {"content-encoding": "gzip"}}, 415, "wrong_type"),
        ({"body": {}, "headers": {"x-timeout-ms": "soon"}}, 400, "bad_request"),
        ({"body": {}, "headers": {"x-timeout-ms": "0"}}, 400, "bad_request"),
        ({"body": {}, "headers": {"x-timeout-ms": "9" * 5_000}}, 400, "bad_request"),
        ({"method": "DELETE"}, 405, "wrong_method"),
    ],
)
def test_a_body_that_is_no_request_is_refused(
    server: Served, options: dict[str, Any], status: int, kind: str
) -> None:
    answer = ask(server, "/v1/score", **options)
    assert (answer.status, answer.error[0]) == (status, kind)
    assert ask(server, "/v1/score", body_of(1)).status == 200


def test_other_paths_share_a_series(server: Served) -> None:
    for path in ("/", "/v1/score/", "/../etc/passwd", "/v1/" + "x" * 500):
        answer = ask(server, path)
        assert (answer.status, answer.error[0]) == (404, "no_such_path")
    page = ask(server, "/metrics").body.decode()
    assert 'tokenrec_requests_total{path="other",status="404"} 4\n' in page


def test_a_long_body_is_parsed_too(link: Path) -> None:
    limits = dataclasses.replace(LIMITS, inline_bytes=100)
    with served(link, limits) as server:
        answer = ask(server, "/v1/score", body_of(8))
        expected = server.scorer.expected(request_of(8))
        np.testing.assert_array_equal(scores_of(answer), expected)


def test_no_request_needs_a_thread_of_its_own(
    link: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    limits = dataclasses.replace(LIMITS, inline_bytes=100)
    with served(link, limits) as server, monkeypatch.context() as patch:
        # As under a limit of memory, or of processes.
        patch.setattr(threading.Thread, "start", refuse)
        answer = ask(server, "/v1/score", body_of(2, 90))
        np.testing.assert_array_equal(
            scores_of(answer), server.scorer.expected(request_of(2, 90))
        )


def test_a_request_without_memory_is_503(
    server: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(batch: Any) -> Any:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(server.scorer, "extend", refuse)
        answer = ask(server, "/v1/score", body_of(1))
    assert answer.status == 503
    assert answer.json["error"]["kind"] == "memory"
    assert answer.headers["retry-after"] == "10"
    # A line and no traceback: these come in thousands.
    assert "Traceback" not in caplog.text
    assert ask(server, "/v1/score", body_of(1)).status == 200


def test_a_parser_without_memory_does_not_blame_the_body(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(body: bytes) -> Any:
        text = "Not enough memory to allocate buffer for parsing"
        raise score_request.orjson.JSONDecodeError(text, "", 0)

    monkeypatch.setattr(score_request.orjson, "loads", refuse)
    answer = ask(server, "/v1/score", body_of(1))
    assert answer.status == 503
    assert answer.json["error"]["kind"] == "memory"


def test_a_body_is_parsed_only_if_there_is_memory_for_its_values(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[int] = []

    def refuse(size: int, dtype: Any) -> Any:
        wanted.append(size)
        raise MemoryError

    body = json.dumps(body_of(1)).encode()
    with monkeypatch.context() as patch:
        patch.setattr(score_request.np, "empty", refuse)
        with pytest.raises(MemoryError):
            score_request.parse_json(body)
    assert wanted[0] >= 42 * len(body)
    assert score_request.parse_json(body) == body_of(1)


@pytest.mark.parametrize("item", [POISON, NOT_A_NUMBER])
def test_a_failure_on_the_device_is_an_error_without_values(
    server: Served, item: int, caplog: pytest.LogCaptureFixture
) -> None:
    body = body_of(1)
    body["candidates"] = {"item_id": [1, item]}
    with caplog.at_level(logging.DEBUG):
        answer = ask(server, "/v1/score", body)
    assert (answer.status, answer.error[0]) == (500, "internal")
    # Neither the log nor the answer quotes the request.
    assert "PoisonError" in caplog.text or "ScoreError" in caplog.text
    assert str(item) not in caplog.text
    assert str(item) not in answer.error[1]
    assert ask(server, "/v1/score", body_of(1)).status == 200


def test_a_full_queue_is_429_and_a_deadline_504(server: Served) -> None:
    async def overload() -> list[Answer]:
        server.scorer.gate.clear()
        first = asyncio.create_task(call(server.app, "/v1/score", body_of(0)))
        await until(lambda: server.scorer.entered.acquire(blocking=False))
        timeout = {"x-timeout-ms": "200"}
        waiting = [
            asyncio.create_task(call(server.app, "/v1/score", body_of(seed), timeout))
            for seed in range(1, 8)
        ]
        late = await asyncio.gather(*waiting)
        server.scorer.gate.set()
        return [await first, *late]

    answers = asyncio.run(overload())
    assert [answer.status for answer in answers] == [200] + [504] * 5 + [429] * 2
    assert answers[1].error[0] == "deadline"
    assert answers[-1].error[0] == "queue_full"
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert ask(server, "/v1/score", body_of(0)).status == 200
    # Those that nobody waited for were not scored.
    assert [what for what, _ in server.scorer.calls].count("extend") <= 2


def test_a_request_in_flight_ends_on_the_model_that_it_began_with(
    server: Served, link: Path, tmp_path: Path
) -> None:
    async def swap_under_load() -> tuple[list[Answer], list[Answer]]:
        old.gate.clear()
        before = [asyncio.create_task(call(server.app, "/v1/score", body_of(0)))]
        await until(lambda: old.entered.acquire(blocking=False))
        # The device is busy with the first one, and these wait.
        before += [
            asyncio.create_task(call(server.app, "/v1/score", body_of(seed)))
            for seed in range(1, 4)
        ]
        await until(lambda: server.batcher.waiting() == 3)
        point(link, write_artifact(tmp_path / "second", 2.0))
        assert server.slot.check()
        after = [
            asyncio.create_task(call(server.app, "/v1/score", body_of(seed)))
            for seed in range(2)
        ]
        await asyncio.sleep(0.01)
        old.gate.set()
        return list(await asyncio.gather(*before)), list(await asyncio.gather(*after))

    old: ArithmeticScorer = server.scorer
    before, after = asyncio.run(swap_under_load())
    new = server.scorer
    assert new.weight == 2.0
    for scorer, answers in ((old, before), (new, after)):
        for seed, answer in enumerate(answers):
            assert answer.json["model"] == scorer.digest
            np.testing.assert_array_equal(
                scores_of(answer), scorer.expected(request_of(seed))
            )


def test_late_prefixes_of_a_first_load_are_not_taken_for_those_of_a_second(
    server: Served, link: Path, tmp_path: Path
) -> None:
    async def swap_there_and_back() -> Answer:
        first.gate.clear()
        late = asyncio.create_task(call(server.app, "/v1/score", body_of(0)))
        await until(lambda: first.entered.acquire(blocking=False))
        point(link, write_artifact(tmp_path / "second", 2.0))
        assert server.slot.check()
        first.gate.set()
        # Its prefix is stored now, though its model no longer serves.
        return await late

    first = server.scorer
    assert asyncio.run(swap_there_and_back()).status == 200
    point(link, tmp_path / "first")
    assert server.slot.check()
    assert server.scorer.digest == first.digest
    answer = ask(server, "/v1/score", body_of(0))
    assert answer.json["cache"] == "miss"
    np.testing.assert_array_equal(scores_of(answer), first.expected(request_of(0)))


def test_models_tells_of_the_one_that_serves_and_of_a_load_that_failed(
    server: Served, link: Path, tmp_path: Path
) -> None:
    listed = ask(server, "/v1/models").json
    assert listed["models"][0]["digest"] == server.scorer.digest
    assert listed["models"][0]["tasks"] == ["click", "buy"]
    assert listed["last_load"]["outcome"] == "ok"
    point(link, write_artifact(tmp_path / "broken", -1.0))
    assert server.slot.check()
    listed = ask(server, "/v1/models").json
    assert listed["models"][0]["name"] == "first"
    assert listed["last_load"]["name"] == "broken"
    assert "is negative" in listed["last_load"]["error"]
    page = ask(server, "/metrics").body.decode()
    assert 'tokenrec_model_loads_total{outcome="failed"} 1\n' in page
    assert ask(server, "/v1/score", body_of(1)).status == 200


def test_health_and_readiness(link: Path) -> None:
    limits = dataclasses.replace(LIMITS, stuck_seconds=0.0)
    with served(link, limits) as server:
        assert ask(server, "/healthz").json == {"status": "ok"}
        assert ask(server, "/readyz").json == {"status": "ready"}
        server.scorer.gate.clear()
        answer = server.batcher.submit(
            server.scorer,
            server.scorer.encode(request_of(1)),
            ("", "", b""),
            float("inf"),
        )
        assert server.scorer.entered.acquire(timeout=60)
        time.sleep(0.001)
        assert ask(server, "/healthz").error[0] == "stuck"
        assert ask(server, "/readyz").status == 503
        server.scorer.gate.set()
        answer.result(60)
        server.app.is_draining = True
        assert ask(server, "/readyz").error[0] == "draining"


def test_a_caller_that_leaves_costs_nothing(server: Served) -> None:
    answer = ask(server, "/v1/score", parts=[b"{"], disconnects=True)
    assert answer.status == 0
    assert server.metrics.requests.value("/v1/score", "499") == 1
    assert not server.scorer.calls


def test_a_slow_body_is_408(link: Path) -> None:
    limits = dataclasses.replace(LIMITS, body_seconds=0.01)

    async def trickle() -> Answer:
        # The second part never comes.
        never = [b'{"user": ', b""]
        app = server.app

        async def slow(scope: Any, receive: Any, send: Any) -> None:
            async def one_part() -> Any:
                message = await receive()
                if not message["body"]:
                    await asyncio.sleep(60)
                return message

            await app(scope, one_part, send)

        return await call(slow, "/v1/score", parts=never)

    with served(link, limits) as server:
        answer = asyncio.run(trickle())
        assert (answer.status, answer.error[0]) == (408, "slow_body")
        assert answer.headers["connection"] == "close"


def test_bodies_that_are_read_at_once_share_a_limit() -> None:
    reader = BodyReader(limit=100, total=150, seconds=10)
    scope = {"headers": []}

    async def read_nested() -> None:
        async def receive() -> Any:
            return {"type": "http.request", "body": b"x" * 80, "more_body": False}

        async with reader.read(scope, receive):
            with pytest.raises(HttpError, match="the limit is 150") as refused:
                async with reader.read(scope, receive):
                    raise AssertionError
            assert refused.value.status == 503
        # What was read is no longer held.
        async with reader.read(scope, receive) as body:
            assert len(body) == 80

    asyncio.run(read_nested())


class Received(NamedTuple):
    applied: int
    repeated: int


class Live:
    """A state that knows one history."""

    last_time_ms = 8
    history: Mapping[str, list[int]] = {"time_ms": [7, 8], "item_id": [1, 2]}

    def complete(self, request: Request) -> Request:
        return dataclasses.replace(request, history=dict(self.history))

    def receive(self, columns: Any) -> Received:
        if "full" in columns:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if "event_id" not in columns:
            raise BadRequest("events: no column 'event_id'; send one")
        return Received(len(columns["event_id"]), 2)


def test_a_request_may_ask_for_the_history_that_the_server_keeps(
    server: Served,
) -> None:
    live = ask(server, "/v1/score", body_of(4) | {"history": "live"})
    assert (live.status, live.error[0]) == (409, "no_counters")
    model = dataclasses.replace(server.slot.model, live=Live())
    server.slot.model = model
    body = body_of(4) | {"history": "live"}
    completed = dataclasses.replace(request_of(4), history=dict(Live.history))
    live = ask(server, "/v1/score", body)
    assert live.json["history"] == "live"
    np.testing.assert_array_equal(scores_of(live), server.scorer.expected(completed))
    # Without a history, or with an empty one, the user is new: it is never guessed.
    empty = dataclasses.replace(request_of(4), history={})
    for change in ({}, {"history": {}}):
        new_user = {name: v for name, v in body.items() if name != "history"} | change
        new = ask(server, "/v1/score", new_user)
        assert new.json["history"] == "request"
        np.testing.assert_array_equal(scores_of(new), server.scorer.expected(empty))


def test_events_for_a_model_that_was_just_replaced_are_asked_for_again(
    server: Served, link: Path, tmp_path: Path
) -> None:
    class Replaced(Live):
        is_closed = False

        def close(self) -> None:
            self.is_closed = True

        def receive(self, columns: Any) -> Received:
            point(link, write_artifact(tmp_path / "second", 2.0))
            assert server.slot.check()
            assert self.is_closed
            raise ValueError("I/O operation on closed file.")

    server.slot.model = dataclasses.replace(server.slot.model, live=Replaced())
    answer = ask(server, "/v1/events", {"events": {"event_id": ["a"]}})
    assert (answer.status, answer.error[0]) == (503, "replaced")
    assert answer.headers["retry-after"] == "1"


def test_events_are_counted_or_refused(server: Served) -> None:
    events = {"events": {"event_id": ["a", "b", "c"]}}
    assert ask(server, "/v1/events", events).error[0] == "no_counters"
    server.slot.model = dataclasses.replace(server.slot.model, live=Live())
    answer = ask(server, "/v1/events", events)
    assert answer.json == {
        "model": server.scorer.digest,
        "applied": 3,
        "repeated": 2,
    }
    assert server.metrics.events.value() == 3
    assert ask(server, "/v1/models").json["models"][0]["events_until_ms"] == 8
    assert "no column 'event_id'" in ask(server, "/v1/events", {"events": {}}).error[1]
    assert ask(server, "/v1/events", []).status == 400
    full = ask(server, "/v1/events", {"events": {"full": []}})
    assert (full.status, full.error[0]) == (503, "storage")


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["item_id", "time_ms", "user_id"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["item_id", "time_ms", "age", "user_id", "hour", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(
    max_examples=150,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.sampled_from(
            ["user", "time_ms", "history", "context", "candidates", "model", "y"]
        ),
        JSON_VALUES,
        max_size=7,
    )
)
def test_hostile_json_is_refused_or_scored(
    server: Served, changes: dict[str, Any]
) -> None:
    text = json.dumps(body_of(2) | changes)
    answer = ask(server, "/v1/score", parts=[text.encode()])
    assert answer.status in (200, 400, 409)
    if answer.status != 200:
        assert "; " in answer.error[1]

"""`/v1/retrieve`: right items, whoever shares the batch, and clear refusals."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("orjson", reason="needs the extra serving")

from tests.serving.server.arithmetic_retriever import (
    NO_NUMBER_HOUR,
    ArithmeticRetriever,
    Retrieved,
)
from tests.serving.server.arithmetic_scorer import POISON, ArithmeticScorer
from tests.serving.server.asgi import Answer, call, until
from tests.serving.server.request_bodies import (
    body_of,
    request_of,
    retrieval_body_of,
    retrieval_of,
)
from tests.serving.server.test_app import JSON_VALUES, Served, ask, scores_of, served
from tests.serving.server.test_model_slot import point, write_artifact
from tokenrec.serving.request import Request
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.batcher import Batcher, QueueFullError, ScoreError
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.prefix_store import PrefixStore

NEVER = float("inf")


@pytest.fixture
def link(tmp_path: Path) -> Path:
    one = tmp_path / "current"
    one.symlink_to(write_artifact(tmp_path / "items", 1.0, "retrieval"))
    return one


@pytest.fixture
def server(link: Path) -> Iterator[Served]:
    with served(link) as one:
        yield one


def retriever_of(server: Served) -> ArithmeticRetriever:
    scorer: Any = server.scorer
    assert isinstance(scorer, ArithmeticRetriever)
    return scorer


def check_items(answer: Answer, expected: Retrieved) -> None:
    assert answer.status == 200, answer.body
    assert answer.json["items"] == expected.items
    found = np.array(answer.json["scores"], np.float32)
    np.testing.assert_array_equal(found, expected.scores)


def test_the_items_are_those_of_the_model_in_its_order(server: Served) -> None:
    for seed in range(20):
        answer = ask(server, "/v1/retrieve", retrieval_body_of(seed))
        check_items(answer, retriever_of(server).expected(retrieval_of(seed)))
        assert answer.json["model"] == server.scorer.digest
        assert set(answer.json) == {
            *("model", "items", "scores", "unknown", "history", "cache")
        }


def test_requests_of_any_k_and_filter_share_a_batch() -> None:
    retriever = ArithmeticRetriever()
    batcher = Batcher(PrefixStore(1 << 20), ServerMetrics(), BatchLimits(batch=8))
    encoded = [retriever.encode(retrieval_of(seed)) for seed in range(20)]
    answers = [
        batcher.submit(retriever, one, (retriever.digest, "", one.prefix_key), NEVER)
        for one in encoded
    ]
    batcher.start()
    for seed, answer in enumerate(answers):
        found, _ = answer.result(60)
        expected = retriever.expected(retrieval_of(seed))
        assert found.items == expected.items
        np.testing.assert_array_equal(found.scores, expected.scores)
    batcher.close()
    sizes = [len(ks) for what, ks in retriever.calls if what == "retrieve"]
    assert sizes == [8, 8, 4]
    assert batcher.metrics.items.value() == sum(
        len(a.result()[0].items) for a in answers
    )
    assert batcher.metrics.candidates.value("request") == 20
    assert batcher.waiting() == 0


def test_a_user_who_asks_again_has_a_prefix_whatever_is_left_out(
    server: Served,
) -> None:
    body = retrieval_body_of(2)
    first = ask(server, "/v1/retrieve", body).json
    again = ask(server, "/v1/retrieve", body | {"k": 3, "exclude": first["items"][:2]})
    assert (first["cache"], again.json["cache"]) == ("miss", "hit")
    assert again.json["items"] == first["items"][2:5]
    page = ask(server, "/metrics").body.decode()
    assert "tokenrec_retrieved_items_total" in page
    for stage in ("parse", "encode", "queue", "prefill", "retrieve", "total"):
        assert f'tokenrec_stage_seconds_count{{stage="{stage}"}}' in page
    assert 'tokenrec_requests_total{path="/v1/retrieve",status="200"} 2\n' in page


def test_fewer_items_than_k_where_fewer_are_allowed(server: Served) -> None:
    body = retrieval_body_of(2) | {"filter": {"parity": [0]}, "k": 10}
    body["exclude"] = list(range(500, 554, 2))
    answer = ask(server, "/v1/retrieve", body)
    assert sorted(answer.json["items"]) == [554, 556, 558]
    body["exclude"] = list(range(500, 560, 2))
    none = ask(server, "/v1/retrieve", body)
    assert (none.status, none.json["items"], none.json["scores"]) == (200, [], [])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"k": 21}, "k: 21 is more than 20; send at most that"),
        ({"k": 0}, "k: 0 is no integer of at least 1"),
        ({"drop_seen": 1}, "drop_seen: 1 is not true or false"),
        ({"exclude": 3}, "exclude: 3 is not a list"),
        ({"exclude": [1] * 51}, "exclude: has 51 values, more than the limit of 50"),
        ({"filter": {"brand": ["x"]}}, "filter.brand: is no feature of items"),
        ({"filter": {"parity": {"min": 3, "max": 2}}}, "no item could match"),
        ({"candidates": {"item_id": [1]}}, "request: no field 'candidates'"),
        ({"history": "live"}, "the artifact has no counters"),
        ({"model": "a" * 20}, "does not serve, and '"),
    ],
)
def test_a_wrong_request_is_told_what_to_change(
    server: Served, change: Mapping[str, Any], words: str
) -> None:
    answer = ask(server, "/v1/retrieve", retrieval_body_of(0) | dict(change))
    assert answer.status in (400, 409)
    assert words in answer.error[1]
    assert "; " in answer.error[1]


def test_a_model_of_the_other_kind_is_409(server: Served, tmp_path: Path) -> None:
    wrong = ask(server, "/v1/score", body_of(1))
    assert (wrong.status, wrong.error[0]) == (409, "other_objective")
    assert "use /v1/retrieve, or a server of a ranking artifact" in wrong.error[1]
    with served(write_artifact(tmp_path / "scores", 1.0)) as scores:
        wrong = ask(scores, "/v1/retrieve", retrieval_body_of(1))
        assert (wrong.status, wrong.error[0]) == (409, "other_objective")
        assert "use /v1/score, or a server of a retrieval artifact" in wrong.error[1]
        # Nothing of the body was read.
        assert wrong.headers["connection"] == "close"


def test_models_tells_head_and_longest_answer(server: Served) -> None:
    (model,) = ask(server, "/v1/models").json["models"]
    assert (model["objective"], model["head"], model["max_k"]) == (
        *("retrieval", "next_item"),
        20,
    )
    assert "tasks" not in model


def test_a_swap_to_the_other_kind_ends_requests_in_flight_on_theirs(
    server: Served, link: Path, tmp_path: Path
) -> None:
    async def swap_under_load() -> tuple[list[Answer], list[Answer]]:
        old.gate.clear()
        bodies = [retrieval_body_of(seed) for seed in range(4)]
        before = [asyncio.create_task(call(server.app, "/v1/retrieve", bodies[0]))]
        await until(lambda: old.entered.acquire(blocking=False))
        before += [
            asyncio.create_task(call(server.app, "/v1/retrieve", body))
            for body in bodies[1:]
        ]
        await until(lambda: server.batcher.waiting() == 3)
        point(link, write_artifact(tmp_path / "scores", 2.0))
        assert server.slot.check()
        after = [
            asyncio.create_task(call(server.app, "/v1/score", body_of(1))),
            asyncio.create_task(call(server.app, "/v1/retrieve", bodies[1])),
        ]
        await asyncio.sleep(0.01)
        old.gate.set()
        return list(await asyncio.gather(*before)), list(await asyncio.gather(*after))

    old = retriever_of(server)
    before, (scored, refused) = asyncio.run(swap_under_load())
    for seed, answer in enumerate(before):
        check_items(answer, old.expected(retrieval_of(seed)))
    expected = ArithmeticScorer(2.0).expected(request_of(1))
    np.testing.assert_array_equal(scores_of(scored), expected)
    assert (refused.status, refused.error[0]) == (409, "other_objective")


def test_a_request_that_fails_does_not_fail_its_batch_mates(server: Served) -> None:
    async def ask_all() -> list[Answer]:
        retriever = retriever_of(server)
        retriever.gate.clear()
        bad = {"user": {"age": POISON}}, {"context": {"hour": NO_NUMBER_HOUR}}
        changes: list[dict[str, Any]] = [{}, *bad, {}]
        bodies = [
            retrieval_body_of(seed) | change for seed, change in enumerate(changes)
        ]
        # The device has the first alone, whichever the parsers finish first.
        asked = [asyncio.create_task(call(server.app, "/v1/retrieve", bodies[0]))]
        await until(lambda: retriever.entered.acquire(blocking=False))
        asked += [
            asyncio.create_task(call(server.app, "/v1/retrieve", body))
            for body in bodies[1:]
        ]
        await until(lambda: server.batcher.waiting() == 3)
        retriever.gate.set()
        return list(await asyncio.gather(*asked))

    answers = asyncio.run(ask_all())
    assert [answer.status for answer in answers] == [200, 500, 500, 200]
    for seed in (0, 3):
        check_items(answers[seed], retriever_of(server).expected(retrieval_of(seed)))


def test_more_items_than_asked_for_are_an_error() -> None:
    class TooMany(ArithmeticRetriever):
        def _find(self, prefix: float, one: Any) -> Retrieved:
            return super()._find(prefix, dataclasses.replace(one, k=one.k + 1))

    retriever = TooMany()
    batcher = Batcher(PrefixStore(0), ServerMetrics(), BatchLimits())
    answer = batcher.submit(
        retriever, retriever.encode(retrieval_of(0)), ("", "", b""), NEVER
    )
    batcher.start()
    with pytest.raises(ScoreError, match=r"\d+ items and \d+ scores for k="):
        answer.result(60)
    batcher.close()


def test_masks_of_requests_that_wait_are_bounded() -> None:
    retriever = ArithmeticRetriever()
    # A mask is of 60 bytes.
    limits = BatchLimits(mask_bytes=130)
    batcher = Batcher(PrefixStore(0), ServerMetrics(), limits)
    masked, free = (retriever.encode(retrieval_of(seed)) for seed in (5, 0))
    assert masked.allowed is not None
    assert free.allowed is None
    answers = [batcher.submit(retriever, masked, ("", "", b""), NEVER) for _ in "ab"]
    with pytest.raises(QueueFullError):
        batcher.submit(retriever, masked, ("", "", b""), NEVER)
    answers.append(batcher.submit(retriever, free, ("", "", b"f"), NEVER))
    # One that nobody waits for makes room.
    assert answers[0].cancel()
    answers.append(batcher.submit(retriever, masked, ("", "", b""), NEVER))
    batcher.start()
    for answer in answers[1:]:
        assert answer.result(60)[0].items
    # All have left, and their masks with them.
    last = [batcher.submit(retriever, masked, ("", "", b""), NEVER) for _ in "a"]
    assert last[0].result(60)
    batcher.close()


def test_a_request_cancelled_while_room_is_made_stays_counted() -> None:
    class SlowToTell(Future[Any]):
        """Not cancelled when it is asked first, and cancelled from then on."""

        asked = 0

        def cancelled(self) -> bool:
            self.asked += 1
            return self.asked > 1

    retriever = ArithmeticRetriever()
    batcher = Batcher(PrefixStore(0), ServerMetrics(), BatchLimits(queue=1))
    one = retriever.encode(retrieval_of(0))
    batcher.submit(retriever, one, ("", "", b""), NEVER)
    batcher._queue[0].job.future = SlowToTell()
    with pytest.raises(QueueFullError):
        batcher.submit(retriever, one, ("", "", b""), NEVER)
    assert batcher.waiting() == len(batcher._queue) == 1


class Live:
    """A state that knows one history."""

    last_time_ms = 8

    def complete(self, request: Request) -> Request:
        history = {"time_ms": [7, 8], "item_id": [501, 502]}
        return dataclasses.replace(request, history=history)


def test_a_request_may_ask_for_the_history_that_the_server_keeps(
    server: Served,
) -> None:
    server.slot.model = dataclasses.replace(server.slot.model, live=Live())
    body = retrieval_body_of(4) | {"history": "live", "drop_seen": True}
    answer = ask(server, "/v1/retrieve", body)
    wanted = retrieval_of(4)
    wanted = dataclasses.replace(
        wanted, request=Live().complete(wanted.request), drop_seen=True
    )
    check_items(answer, retriever_of(server).expected(wanted))
    assert answer.json["history"] == "live"


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.dictionaries(
        st.sampled_from(
            ["user", "history", "context", "k", "drop_seen", "exclude", "filter", "y"]
        ),
        JSON_VALUES,
        max_size=4,
    )
)
def test_hostile_json_is_refused_or_answered(
    server: Served, changes: dict[str, Any]
) -> None:
    text = json.dumps(retrieval_body_of(2) | changes)
    answer = ask(server, "/v1/retrieve", parts=[text.encode()])
    assert answer.status in (200, 400, 409)
    if answer.status != 200:
        assert "; " in answer.error[1]

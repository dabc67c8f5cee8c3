"""The batcher answers every request with its own scores, whatever it shares a batch with."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.server.arithmetic_scorer import (
    NOT_A_NUMBER,
    POISON,
    ArithmeticScorer,
    Encoded,
    PoisonError,
    Prefix,
)
from tests.serving.server.request_bodies import request_of
from tokenrec.serving.request import Request
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.batcher import (
    Batcher,
    DeadlineError,
    QueueFullError,
    ScoreError,
)
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.prefix_store import PrefixStore

LIMITS = BatchLimits(batch=4, rows=256, candidates=64, queue=100)
NEVER = float("inf")
type Answer = Future[tuple[np.ndarray, bool]]


class Clock:
    """A clock that a test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def made(
    limits: BatchLimits = LIMITS, clock: Clock | None = None, capacity: int = 1 << 20
) -> Batcher:
    return Batcher(
        PrefixStore(capacity),
        ServerMetrics(),
        limits,
        clock or time.monotonic,
    )


@pytest.fixture
def batcher() -> Iterator[Batcher]:
    one = made()
    one.start()
    yield one
    one.close()


def submit(
    batcher: Batcher,
    scorer: ArithmeticScorer,
    request: Request,
    deadline: float = NEVER,
) -> Answer:
    encoded = scorer.encode(request)
    name = (scorer.digest, str(request.user["user_id"]), encoded.prefix_key)
    return batcher.submit(scorer, encoded, name, deadline)


def with_item(request: Request, item: int) -> Request:
    return dataclasses.replace(request, candidates={"item_id": [1, item]})


def scores(answer: Answer) -> np.ndarray:
    return answer.result(60)[0]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_every_request_of_a_batch_gets_its_own_scores(
    batcher: Batcher, has_prefix: bool
) -> None:
    scorer = ArithmeticScorer(has_prefix=has_prefix)
    requests = [request_of(seed) for seed in range(40)]
    answers = [submit(batcher, scorer, request) for request in requests]
    for request, answer in zip(requests, answers, strict=True):
        np.testing.assert_array_equal(scores(answer), scorer.expected(request))


def test_a_batch_is_what_waits_when_the_device_is_free() -> None:
    batcher, scorer = made(), ArithmeticScorer(has_prefix=False)
    batcher.start()
    scorer.gate.clear()
    answers = [submit(batcher, scorer, request_of(0, 8))]
    # The device is busy with the first one, alone: it did not wait for company.
    assert scorer.entered.acquire(timeout=60)
    answers += [submit(batcher, scorer, request_of(seed, 8)) for seed in range(1, 7)]
    assert batcher.waiting() == 6
    scorer.gate.set()
    for answer in answers:
        answer.result(60)
    batcher.close()
    assert [sizes for _, sizes in scorer.calls] == [[8], [8] * 4, [8] * 2]
    assert batcher.metrics.batch_requests.sum() == 7


def test_a_known_prefix_is_not_computed_again(batcher: Batcher) -> None:
    scorer = ArithmeticScorer()
    request = request_of(1)
    assert submit(batcher, scorer, request).result(60)[1] is False
    other = dataclasses.replace(request, candidates={"item_id": [9, 8, 7]})
    answer = submit(batcher, scorer, other)
    np.testing.assert_array_equal(scores(answer), scorer.expected(other))
    assert answer.result()[1] is True
    assert [what for what, _ in scorer.calls] == ["prefill", "extend", "extend"]
    # One more event is another prefix.
    longer = dataclasses.replace(
        request, history={name: [1, *v] for name, v in request.history.items()}
    )
    answer = submit(batcher, scorer, longer)
    assert answer.result(60)[1] is False
    np.testing.assert_array_equal(scores(answer), scorer.expected(longer))


def test_requests_of_one_user_in_a_batch_share_the_prefix() -> None:
    batcher, scorer = made(), ArithmeticScorer()
    answers = [submit(batcher, scorer, request_of(3, 8)) for _ in range(3)]
    batcher.start()
    for answer in answers:
        np.testing.assert_array_equal(scores(answer), scorer.expected(request_of(3, 8)))
    batcher.close()
    assert scorer.calls == [("prefill", [8]), ("extend", [8, 8, 8])]


@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_long_list_is_cut_and_its_scores_are_those_of_the_whole(
    batcher: Batcher, has_prefix: bool
) -> None:
    scorer = ArithmeticScorer(has_prefix=has_prefix)
    request = request_of(5, 64 * 5 + 7)
    answer = submit(batcher, scorer, request)
    np.testing.assert_array_equal(scores(answer), scorer.expected(request))
    widths = [
        size for what, sizes in scorer.calls if what != "prefill" for size in sizes
    ]
    assert sorted(widths) == [7, 64, 64, 64, 64, 64]
    assert [what for what, _ in scorer.calls].count("prefill") == has_prefix


def test_padded_batches_stay_within_the_rows() -> None:
    batcher, scorer = made(), ArithmeticScorer(has_prefix=False)
    answers = [submit(batcher, scorer, request_of(seed, 60)) for seed in range(9)]
    answers += [submit(batcher, scorer, request_of(9, 300))]
    batcher.start()
    for answer in answers:
        answer.result(60)
    batcher.close()
    assert sum(sum(sizes) for _, sizes in scorer.calls) == 9 * 60 + 300
    assert all(len(sizes) * 64 <= LIMITS.rows for _, sizes in scorer.calls)


def test_a_short_list_does_not_wait_behind_all_slices_of_a_long_one() -> None:
    batcher, scorer = made(), ArithmeticScorer(has_prefix=False)
    long = submit(batcher, scorer, request_of(0, 64 * 12))
    short = submit(batcher, scorer, request_of(1, 3))
    longs = [submit(batcher, scorer, request_of(seed, 64)) for seed in (2, 3)]
    batcher.start()
    for answer in (long, short, *longs):
        answer.result(60)
    batcher.close()
    calls = [sizes for _, sizes in scorer.calls]
    # Lists of very different lengths do not share a batch: it would be padding.
    assert [3] in calls
    assert calls.index([3]) < len(calls) - 1


def test_a_request_that_fails_does_not_fail_its_batch_mates() -> None:
    batcher, scorer = made(), ArithmeticScorer()
    sound = [request_of(seed, 8) for seed in range(3)]
    bad = with_item(request_of(9, 8), POISON)
    answers = [submit(batcher, scorer, request) for request in sound[:2]]
    failing = submit(batcher, scorer, bad)
    answers.append(submit(batcher, scorer, sound[2]))
    batcher.start()
    with pytest.raises(PoisonError):
        failing.result(60)
    for request, answer in zip(sound, answers, strict=True):
        np.testing.assert_array_equal(scores(answer), scorer.expected(request))
    # The thread lives on.
    later = submit(batcher, scorer, sound[0])
    np.testing.assert_array_equal(scores(later), scorer.expected(sound[0]))
    batcher.close()
    assert batcher.metrics.batch_failures.value() == 2


@dataclasses.dataclass
class HungryScorer(ArithmeticScorer):
    """A scorer that has no memory for some calls."""

    error: Exception = dataclasses.field(default_factory=MemoryError)
    refused: int = 0

    def extend(self, batch: Sequence[tuple[Prefix, Encoded]]) -> list[np.ndarray]:
        if self.refused:
            self.refused -= 1
            raise self.error
        return super().extend(batch)


NO_MEMORY = [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory")]


@pytest.mark.parametrize("error", NO_MEMORY, ids=["Python", "XLA"])
def test_prefixes_make_room_where_there_is_no_memory(
    batcher: Batcher, error: Exception
) -> None:
    scorer = HungryScorer(error=error)
    for seed in range(3):
        submit(batcher, scorer, request_of(seed)).result(60)
    assert batcher.store.counts().entries == 3
    scorer.refused = 1
    request = request_of(7)
    scores, _ = submit(batcher, scorer, request).result(60)
    np.testing.assert_array_equal(scores, scorer.expected(request))
    counts = batcher.store.counts()
    assert counts.evictions == 4
    assert counts.entries == counts.nbytes == 0


@pytest.mark.parametrize("error", NO_MEMORY, ids=["Python", "XLA"])
def test_a_request_without_memory_fails_and_the_next_is_scored(
    batcher: Batcher, error: Exception
) -> None:
    scorer = HungryScorer(error=error, refused=2)
    request = request_of(7)
    with pytest.raises(MemoryError):
        submit(batcher, scorer, request).result(60)
    scores, _ = submit(batcher, scorer, request).result(60)
    np.testing.assert_array_equal(scores, scorer.expected(request))


def test_a_score_that_is_not_finite_is_an_error_and_no_score(batcher: Batcher) -> None:
    scorer = ArithmeticScorer()
    with pytest.raises(ScoreError, match="not finite"):
        submit(batcher, scorer, with_item(request_of(1), NOT_A_NUMBER)).result(60)


def test_a_lost_score_is_an_error(
    batcher: Batcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = ArithmeticScorer(has_prefix=False)
    plain = scorer.score
    monkeypatch.setattr(scorer, "score", lambda batch: [plain(batch)[0][:-1]])
    with pytest.raises(ScoreError, match="1 scores for 2 candidates"):
        submit(batcher, scorer, with_item(request_of(1), 5)).result(60)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    batcher = made(dataclasses.replace(LIMITS, queue=3))
    scorer = ArithmeticScorer()
    answers = [submit(batcher, scorer, request_of(seed)) for seed in range(3)]
    with pytest.raises(QueueFullError, match="3 requests wait") as refused:
        submit(batcher, scorer, request_of(4))
    assert refused.value.retry_after >= 1
    batcher.start()
    for answer in answers:
        answer.result(60)
    assert len(scores(submit(batcher, scorer, request_of(4)))) > 0
    batcher.close()
    with pytest.raises(QueueFullError):
        submit(batcher, scorer, request_of(5))


def test_cancelled_requests_leave_a_full_queue() -> None:
    batcher = made(dataclasses.replace(LIMITS, queue=3))
    scorer = ArithmeticScorer()
    answers = [submit(batcher, scorer, request_of(seed, 200)) for seed in range(3)]
    assert answers[1].cancel()
    answers.append(submit(batcher, scorer, request_of(3)))
    assert batcher.waiting() == 3
    with pytest.raises(QueueFullError):
        submit(batcher, scorer, request_of(4))
    batcher.start()
    for seed, size in ((0, 200), (2, 200), (3, None)):
        expected = scorer.expected(request_of(seed, size))
        np.testing.assert_array_equal(scores(answers[seed]), expected)
    batcher.close()
    assert batcher.waiting() == 0


def test_a_deadline_that_passed_costs_no_device_time() -> None:
    clock = Clock()
    batcher, scorer = made(clock=clock), ArithmeticScorer()
    late = submit(batcher, scorer, request_of(0), deadline=5.0)
    in_time = submit(batcher, scorer, request_of(1), deadline=50.0)
    clock.now = 6.0
    batcher.start()
    with pytest.raises(DeadlineError):
        late.result(60)
    np.testing.assert_array_equal(scores(in_time), scorer.expected(request_of(1)))
    batcher.close()
    assert len(scorer.calls) == 2


def test_a_request_that_was_cancelled_costs_no_device_time() -> None:
    batcher, scorer = made(), ArithmeticScorer()
    gone, stays = (submit(batcher, scorer, request_of(seed, 8)) for seed in (0, 1))
    assert gone.cancel()
    batcher.start()
    stays.result(60)
    batcher.close()
    assert scorer.calls == [("prefill", [8]), ("extend", [8])]
    assert batcher.waiting() == 0


def test_models_never_share_a_batch_or_a_prefix(batcher: Batcher) -> None:
    old, new = ArithmeticScorer(1.0), ArithmeticScorer(2.0)
    requests = [request_of(seed % 3) for seed in range(30)]
    pairs = [((old, new)[n % 2], request) for n, request in enumerate(requests)]
    answers = [submit(batcher, scorer, request) for scorer, request in pairs]
    for (scorer, request), answer in zip(pairs, answers, strict=True):
        np.testing.assert_array_equal(scores(answer), scorer.expected(request))


def test_closing_scores_what_waits() -> None:
    batcher, scorer = made(), ArithmeticScorer()
    answers = [submit(batcher, scorer, request_of(seed)) for seed in range(10)]
    batcher.start()
    batcher.close()
    assert all(answer.done() for answer in answers)
    for seed, answer in enumerate(answers):
        np.testing.assert_array_equal(scores(answer), scorer.expected(request_of(seed)))


def test_a_device_call_that_hangs_shows() -> None:
    clock = Clock()
    batcher, scorer = made(clock=clock), ArithmeticScorer()
    batcher.start()
    assert batcher.stuck_seconds() == 0.0
    scorer.gate.clear()
    answer = submit(batcher, scorer, request_of(0))
    assert scorer.entered.acquire(timeout=60)
    clock.now += 70.0
    assert batcher.stuck_seconds() == 70.0
    scorer.gate.set()
    answer.result(60)
    batcher.close()
    assert batcher.stuck_seconds() == float("inf")


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(1, 200), st.booleans()),
        min_size=1,
        max_size=25,
    ),
    st.integers(1, 8),
    st.sampled_from([8, 64, 512]),
    st.sampled_from([0, 3_000, 1 << 20]),
)
def test_no_mix_of_sizes_users_and_models_gives_a_wrong_score(
    drawn: list[tuple[int, int, bool]], batch: int, rows: int, capacity: int
) -> None:
    batcher = made(BatchLimits(batch, rows, 64, 100), capacity=capacity)
    models = ArithmeticScorer(1.0), ArithmeticScorer(2.0, has_prefix=False)
    pairs = [(models[new], request_of(user, size)) for user, size, new in drawn]
    answers: list[Answer] = []

    def send(start: int) -> None:
        answers.extend(submit(batcher, *pair) for pair in pairs[start:])

    send(len(pairs) // 2)
    batcher.start()
    sender = threading.Thread(target=send, args=(0,))
    sender.start()
    sender.join()
    batcher.close()
    order = [*pairs[len(pairs) // 2 :], *pairs]
    for (scorer, request), answer in zip(order, answers, strict=True):
        np.testing.assert_array_equal(scores(answer), scorer.expected(request))
    assert all(len(sizes) <= batch for model in models for _, sizes in model.calls)

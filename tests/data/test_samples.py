"""Requests and streams: compared with slow, literal code, and rule by rule by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest

from tests.data.logs import hand_log, random_log, shown
from tokenrec.config import DataConfig
from tokenrec.data.interaction_log import EVENT, LEARNED, SCORED, InteractionLog
from tokenrec.data.samples import Samples, Streams, cut_samples
from tokenrec.errors import InputError

BOTH = EVENT | SCORED | LEARNED
SEEDS = range(8)


def all_read(samples: Samples) -> list[int]:
    return [row for _, rows in shown(samples) for row in rows]


def chunk_rows(log: InteractionLog) -> list[list[int]]:
    return [list(range(a, b)) for a, b in itertools.pairwise(log.start)]


def earlier_events(
    log: InteractionLog, rows: list[int], row: int, freeze_at: float = math.inf
) -> list[int]:
    end = min(log.time[row], freeze_at)
    return [e for e in rows if log.flags[e] & EVENT and log.time[e] < end]


def slow_requests(
    log: InteractionLog,
    events: int,
    candidates: int,
    train: bool,
    freeze_at: float = math.inf,
) -> list[tuple[list[int], list[int]]]:
    samples = []
    for rows in chunk_rows(log):
        groups: dict[tuple[int, int, int], list[int]] = {}
        for row in rows:
            if log.flags[row] & SCORED and (not train or (log.labels[row] >= 0).any()):
                alone = row if log.request[row] < 0 else -1
                groups.setdefault(
                    (int(log.time[row]), int(log.request[row]), alone), []
                ).append(row)
        for key in sorted(groups):
            members = groups[key]
            history = earlier_events(log, rows, members[0], freeze_at)[-events:]
            samples += [
                (history, members[first : first + candidates])
                for first in range(0, len(members), candidates)
            ]
    return samples


def slow_streams(
    log: InteractionLog,
    events: int,
    overlap: int,
    train: bool,
    freeze_at: float = math.inf,
) -> list[tuple[list[int], list[int]]]:
    samples = []
    for rows in chunk_rows(log):
        run = [row for row in rows if log.flags[row] & EVENT]
        times = [log.time[row] for row in run]
        firsts = [
            i
            for i in range(len(run))
            if (i == 0 or times[i] != times[i - 1]) and times[i] < freeze_at
        ]
        if train:
            wanted = [
                i
                for i in range(len(run))
                if log.flags[run[i]] & LEARNED and (log.labels[run[i]] >= 0).any()
            ]
        else:
            wanted = [i for i in range(len(run)) if log.flags[run[i]] & SCORED]
        due = [i for i in wanted if i in firsts]
        last = due[-1] if due else -1
        while due:
            start = max(0, due[0] - overlap)
            stop = min(start + events, last + 1)
            samples.append((run[start:stop], [run[i] for i in due if i < stop]))
            due = [i for i in due if i >= stop]
        for i in wanted:
            if not train and i not in firsts:
                history = earlier_events(log, rows, run[i], freeze_at)
                samples.append(
                    ([*history[max(0, len(history) - events + 1) :], run[i]], [run[i]])
                )
    return sorted(samples, key=lambda sample: sample[1][0])


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("events", "candidates"), [(4, 1), (50, 3), (1, 2)])
def test_requests_equal_the_rules_read_literally(
    train: bool, events: int, candidates: int
) -> None:
    for seed in SEEDS:
        log = random_log(seed)
        samples = cut_samples(
            log, DataConfig(events=events, candidates=candidates), train=train
        )
        assert shown(samples) == slow_requests(log, events, candidates, train)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize(("events", "overlap"), [(1, 0), (6, 2), (6, 5), (50, 0)])
def test_streams_equal_the_rules_read_literally(
    train: bool, events: int, overlap: int
) -> None:
    for seed in SEEDS:
        log = random_log(seed, all_events=True)
        samples = cut_samples(
            log, DataConfig(paradigm="uc", events=events, overlap=overlap), train=train
        )
        assert shown(samples) == slow_streams(log, events, overlap, train)


@pytest.mark.parametrize("paradigm", ["nio", "uc"])
@pytest.mark.parametrize("freeze_at", [0, 1007, 1020, 10**6])
def test_frozen_histories_end_before_their_time(paradigm: str, freeze_at: int) -> None:
    uc = paradigm == "uc"
    config = DataConfig(
        paradigm=paradigm, events=6, overlap=2 * uc, candidates=1 if uc else 3
    )  # type: ignore[arg-type]
    for seed in SEEDS:
        log = random_log(seed, all_events=uc)
        samples = cut_samples(log, config, train=False, freeze_at=freeze_at)
        expected = (
            slow_streams(log, 6, 2, False, freeze_at)
            if uc
            else slow_requests(log, 6, 3, False, freeze_at)
        )
        assert shown(samples) == expected
        scored = np.flatnonzero(log.flags & SCORED).tolist()
        assert sorted(all_read(samples)) == scored


def test_streams_skip_rows_that_are_no_events() -> None:
    for seed in SEEDS:
        log = random_log(seed)
        log.flags[(log.flags & EVENT) == 0] = 0
        samples = cut_samples(
            log, DataConfig(paradigm="uc", events=5, overlap=2), train=False
        )
        assert shown(samples) == slow_streams(log, 5, 2, False)


@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_evaluation_reads_every_scored_row_once(paradigm: str) -> None:
    log = random_log(3, all_events=True)
    config = DataConfig(
        paradigm=paradigm, events=7, overlap=3 if paradigm == "uc" else 0
    )  # type: ignore[arg-type]
    assert (
        sorted(all_read(cut_samples(log, config, train=False)))
        == np.flatnonzero(log.flags & SCORED).tolist()
    )


def test_a_row_at_the_same_time_is_never_history() -> None:
    log = hand_log([1, 2, 2, 3], [BOTH] * 4)
    samples = cut_samples(log, DataConfig(events=9), train=True)
    assert shown(samples) == [([], [0]), ([0], [1]), ([0], [2]), ([0, 1, 2], [3])]


def test_a_row_at_the_time_of_another_users_last_row_starts_its_own_group() -> None:
    log = dataclasses.replace(
        hand_log([5, 5], [BOTH, BOTH]), start=np.array([0, 0, 1, 1, 2])
    )
    samples = cut_samples(log, DataConfig(paradigm="uc", events=4), train=True)
    assert shown(samples) == [([0], [0]), ([1], [1])]
    assert samples.chunk.tolist() == [1, 3]


def test_requests_hold_one_request_of_one_time_and_are_cut_at_candidates() -> None:
    log = hand_log([1, 1, 1, 1, 1, 1, 2], [SCORED] * 7, request=[8, 7, -1, 7, 7, -1, 7])
    samples = cut_samples(log, DataConfig(events=3, candidates=2), train=True)
    assert [read for _, read in shown(samples)] == [[2], [5], [1, 3], [4], [0], [6]]


def test_training_leaves_out_rows_without_a_known_label_and_evaluation_keeps_them() -> (
    None
):
    log = hand_log([1, 2, 3], [BOTH] * 3, labels=[1, -1, 0])
    for paradigm in ("nio", "uc"):
        config = DataConfig(paradigm=paradigm, events=3)  # type: ignore[arg-type]
        assert all_read(cut_samples(log, config, train=True)) == [0, 2]
        assert all_read(cut_samples(log, config, train=False)) == [0, 1, 2]


def test_uc_learns_from_unscored_events_with_a_label_and_nio_does_not() -> None:
    log = hand_log([1, 2], [EVENT | LEARNED, BOTH])
    streams = cut_samples(log, DataConfig(paradigm="uc", events=3), train=True)
    requests = cut_samples(log, DataConfig(events=3), train=True)
    assert shown(streams) == [([0, 1], [0, 1])]
    assert shown(requests) == [([0], [1])]


def test_a_continued_stream_has_the_overlap_as_history() -> None:
    for rows, last in ((10, [4, 5, 6, 7, 8, 9]), (7, [4, 5, 6])):
        log = hand_log(list(range(rows)), [BOTH] * rows)
        samples = cut_samples(
            log, DataConfig(paradigm="uc", events=6, overlap=2), train=True
        )
        assert shown(samples) == [
            ([0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5]),
            (last, last[2:]),
        ]


def test_a_sibling_is_evaluated_in_a_stream_without_its_siblings() -> None:
    log = hand_log([1, 2, 2, 3], [BOTH] * 4)
    samples = cut_samples(
        log, DataConfig(paradigm="uc", events=4, overlap=0), train=False
    )
    assert isinstance(samples, Streams)
    assert shown(samples) == [([0, 1, 2, 3], [0, 1, 3]), ([0, 2], [2])]


def test_uc_refuses_scored_rows_that_are_no_events() -> None:
    log = hand_log([1, 2], [BOTH, SCORED])
    with pytest.raises(
        InputError, match=r"1 scored rows are not events.*row 1.*data\.paradigm='nio'"
    ):
        cut_samples(log, DataConfig(paradigm="uc", events=4), train=True)


@pytest.mark.parametrize("paradigm", ["nio", "uc"])
def test_a_log_without_rows_has_no_samples(paradigm: str) -> None:
    log = dataclasses.replace(hand_log([], []), start=np.zeros(3, np.int64))
    config = DataConfig(paradigm=paradigm, events=4)  # type: ignore[arg-type]
    assert len(cut_samples(log, config, train=False).length) == 0

"""Counts of ids against a loop over the log rows, and batches with rare ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.batches import CONFIGS, evaluated, memory_data, take
from tests.data.logs import SCHEMA
from tokenrec.config import DataConfig, TokensConfig
from tokenrec.data import id_counts
from tokenrec.data.id_counts import (
    COUNTS_FILE,
    asks_for_counts,
    count_ids,
    load_counts,
    rare_ids,
    save_counts,
)
from tokenrec.data.interaction_log import LEARNED, SCORED
from tokenrec.data.schema import columns
from tokenrec.errors import InputError


@pytest.mark.parametrize("rows_at_once", [10**6, 70])
def test_counts_are_those_of_a_loop_over_scored_and_learned_rows(
    rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(id_counts, "_ROWS_AT_ONCE", rows_at_once)
    data = memory_data()
    log, items = data.logs["train"], data.catalogue.ids
    expected = {name: np.zeros(size, int) for name, size in SCHEMA.tables.items()}
    for chunk in range(log.num_chunks):
        for row in range(log.start[chunk], log.start[chunk + 1]):
            if not log.flags[row] & (SCORED | LEARNED):
                continue
            for group, ids in (
                ("user", log.user_ids[chunk]),
                ("catalogue", items[log.item[row]]),
                ("row", log.row_ids[row]),
                ("action", log.action_ids[row]),
            ):
                for name, (start, stop) in columns(SCHEMA.group(group)).ids.items():
                    for one in ids[start:stop]:
                        expected[name][one] += 1
    found = count_ids(data)
    assert found.keys() == expected.keys()
    for name, counts in expected.items():
        np.testing.assert_array_equal(found[name], counts)
    assert sum(counts.sum() for counts in expected.values()) > 1000


def test_an_id_is_rare_below_the_count_of_its_table_and_reserved_ids_never_are() -> (
    None
):
    counts = {"video": np.array([0, 0, 4, 5, 0]), "tab": np.array([9, 0, 1, 2])}
    config = TokensConfig(min_count=5, min_counts={"tab": 2})
    rare = rare_ids(counts, config)
    assert rare["video"].tolist() == [0, 1, 1, 3, 1]
    assert rare["tab"].tolist() == [0, 1, 1, 3]
    assert rare_ids(
        counts, TokensConfig(min_count=5, min_counts={"tab": 0})
    ).keys() == {"video"}
    assert rare_ids(counts, TokensConfig()) == {}
    assert not asks_for_counts(TokensConfig(min_counts={"tab": 0}))
    assert asks_for_counts(TokensConfig(min_counts={"tab": 2}))


def test_rare_ids_share_rows_of_their_own_by_a_hash() -> None:
    counts = {"video": np.array([0, 0, *([1, 7] * 3_000)]), "tab": np.array([9, 0, 1])}
    config = TokensConfig(min_count=5, rare_buckets=16)
    read = rare_ids(counts, config)["video"]
    is_rare = counts["video"] < 5
    is_rare[:2] = False
    # Other ids keep their rows; the shared ones are those of unknown and of rare ids.
    np.testing.assert_array_equal(read[~is_rare], np.flatnonzero(~is_rare))
    shared = np.flatnonzero(is_rare)[:15]
    rows, sizes = np.unique(read[is_rare], return_counts=True)
    assert rows.tolist() == [1, *shared]
    assert sizes.min() > 3_000 / 16 * 0.7
    assert sizes.max() < 3_000 / 16 * 1.3
    # The row of an id neither depends on other ids' counts nor on chance.
    again = rare_ids({"video": counts["video"] * 4}, config)["video"]
    np.testing.assert_array_equal(read, again)
    # A table with one rare id has two buckets at most.
    assert rare_ids(counts, config)["tab"].tolist() in ([0, 1, 1], [0, 1, 2])


@CONFIGS
def test_batches_hold_unknown_in_place_of_rare_ids_and_differ_in_nothing_else(
    config: DataConfig,
) -> None:
    plain, mapped = memory_data(), memory_data()
    video = np.arange(20)
    mapped.rare_ids = {
        "video": np.where(video % 3 == 2, np.where(video % 2, 1, 2), video),
        "age": np.where(np.arange(9) == 5, 1, np.arange(9)),
        "tab": np.where(np.arange(9) > 6, 1, np.arange(9)),
        "clicked": np.array([0, 1, 1, 3]),
    }
    changed = 0
    before = [*take(plain, config, 9), *evaluated(plain, config, "valid")]
    after = [*take(mapped, config, 9), *evaluated(mapped, config, "valid")]
    for old, new in zip(before, after, strict=True):
        for part, features in (
            ("user", SCHEMA.group("user")),
            ("state", SCHEMA.state),
            ("target", SCHEMA.state),
            ("action", SCHEMA.group("action")),
        ):
            if (signals := getattr(old.batch, part)) is None:
                continue
            expected = signals.ids.copy()
            for name, span in columns(features).ids.items():
                if name in mapped.rare_ids:
                    of_table = expected[..., slice(*span)]
                    of_table[:] = mapped.rare_ids[name][of_table]
            np.testing.assert_array_equal(getattr(new.batch, part).ids, expected)
            np.testing.assert_array_equal(getattr(new.batch, part).dense, signals.dense)
            changed += (expected != signals.ids).sum()
        np.testing.assert_array_equal(old.rows, new.rows)
        np.testing.assert_array_equal(old.batch.labels, new.batch.labels)
    assert changed > 100


def test_counts_are_kept_in_the_folder_of_the_run(tmp_path: Path) -> None:
    counts = count_ids(memory_data())
    save_counts(counts, tmp_path)
    found = load_counts(tmp_path, SCHEMA)
    assert found.keys() == counts.keys()
    for name in counts:
        np.testing.assert_array_equal(found[name], counts[name])
    save_counts(counts | {"video": counts["video"][:-1]}, tmp_path)
    with pytest.raises(InputError, match=r"counts \(19,\) of table 'video', which has"):
        load_counts(tmp_path, SCHEMA)
    (tmp_path / COUNTS_FILE).write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"id_counts.npz' cannot be read: .*restore"):
        load_counts(tmp_path, SCHEMA)

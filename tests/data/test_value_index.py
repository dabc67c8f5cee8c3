"""Codes of distinct values, in memory and spilled to files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenrec.data import memory_limit, spilled_values, value_order
from tokenrec.data.memory_limit import LEAST_BYTES, NO_LIMIT, MemoryLimit
from tokenrec.data.spilled_values import Hashes, SpilledValues, hash_values
from tokenrec.data.value_index import ValueIndex
from tokenrec.data.value_order import in_order
from tokenrec.errors import InputError

WORDS = st.text(max_size=6) | st.sampled_from(["", "a", "a\0", "é", "\U0001f600"])
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)
LISTS = (
    st.lists(st.none() | WORDS, max_size=30),
    st.lists(st.none() | NUMBERS, max_size=30),
)
BATCHES = st.one_of(*(st.lists(values, max_size=8) for values in LISTS))


class TinyLimit(MemoryLimit):
    """Spills whenever more than `most` values are in memory."""

    def __init__(self, folder: Path, most: int) -> None:
        super().__init__(LEAST_BYTES, folder)
        self.most = most
        self.spills = 0

    def watch(self, values: ValueIndex) -> None:
        self.index = values

    def enforce(self) -> None:
        if len(self.index._recent) > self.most:
            self.spills += 1
            self.index.spill()


def check_codes(index: ValueIndex, batches: list) -> None:
    """Each value has one code for good, in the order of first appearance."""
    kind = next((type(v) for b in batches for v in b if v is not None), int)
    arrow = pa.string() if kind is str else pa.int64()
    code_of: dict = {}
    for batch in batches:
        expected = [
            -1 if v is None else code_of.setdefault(v, len(code_of)) for v in batch
        ]
        assert index.codes(pa.array(batch, arrow), "column").tolist() == expected
        assert index.size == len(code_of)
    known = list(code_of)
    if known:
        assert index.find(pa.array(known, arrow)).tolist() == list(range(len(known)))
        absent = ["zzzzzzzz"] if kind is str else [7**20]
        assert index.find(pa.array(absent, arrow)).tolist() == [-1]
    assert index.values().tolist() == known
    # Listing them changes nothing.
    assert index.find(pa.array(known, arrow)).tolist() == list(range(len(known)))


@settings(deadline=None, max_examples=60)
@given(BATCHES)
def test_codes_in_memory(batches: list) -> None:
    check_codes(ValueIndex(), batches)


@settings(deadline=None, max_examples=60)
@given(BATCHES, st.integers(0, 9))
def test_codes_that_were_spilled_are_the_same(
    tmp_path_factory: pytest.TempPathFactory, batches: list, most: int
) -> None:
    limit = TinyLimit(tmp_path_factory.mktemp("values"), most)
    check_codes(ValueIndex(limit), batches)


def test_many_runs_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several ranges of hashes per merge, and blocks per spill.
    monkeypatch.setattr(spilled_values, "_AT_ONCE", 50)
    random = np.random.default_rng(1)
    for kind in (int, str):
        limit = TinyLimit(tmp_path / kind.__name__, 200)
        index = ValueIndex(limit)
        batches = [[kind(v) for v in random.integers(0, 5000, 300)] for _ in range(40)]
        check_codes(index, batches)
        assert limit.spills > 10
        sizes = [len(run.codes) for run in index._spilled._runs]
        assert sum(sizes) == index.size
        assert all(2 * b <= a for a, b in itertools.pairwise(sizes)), sizes


def test_values_that_share_half_of_a_hash_are_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashes(values: pa.Array) -> Hashes:
        true = hash_values(values)
        return Hashes(true.high % 3, true.low)

    monkeypatch.setattr(spilled_values, "hash_values", hashes)
    values = SpilledValues("string", MemoryLimit(LEAST_BYTES, tmp_path))
    words = [f"w{i}" for i in range(200)]
    values.append(pa.array(words[:150]))
    values.append(pa.array(words[150:]))
    assert values.find(pa.array([*words, "x"])).tolist() == [*range(200), -1]


def test_the_largest_spills_first_and_only_beyond_the_limit(tmp_path: Path) -> None:
    class Held:
        def __init__(self, memory_bytes: int) -> None:
            self.memory_bytes = memory_bytes
            self.spilled = False

        def spill(self) -> None:
            self.memory_bytes, self.spilled = 0, True

    limit = MemoryLimit(LEAST_BYTES, tmp_path)
    held = [Held(2**24), Held(2**26), Held(2**25)]
    for values in held:
        limit.watch(values)
    before = limit.block_rows
    assert sum(v.memory_bytes for v in held) > LEAST_BYTES * 3 / 8
    limit.enforce()
    assert [v.spilled for v in held] == [False, True, False]
    assert limit.block_rows >= before == memory_limit.BLOCK_ROWS
    gone = held.pop()
    gone.memory_bytes = 2**40
    del gone, values
    limit.enforce()
    assert [v.spilled for v in held] == [False, True]


@pytest.mark.parametrize("fallocate", [True, False])
def test_large_arrays_are_files_and_begin_as_zeros(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fallocate: bool
) -> None:
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    limit = MemoryLimit(LEAST_BYTES, tmp_path)
    large = limit.zeros((LEAST_BYTES // 64, 2), np.int8)
    assert isinstance(large, np.memmap)
    assert not large.any()
    large[-1] = 7
    assert large[-1].tolist() == [7, 7]
    assert not isinstance(limit.zeros((10, 0), np.float32), np.memmap)
    assert not isinstance(NO_LIMIT.zeros((LEAST_BYTES // 64, 2), np.int8), np.memmap)
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_a_full_disk_is_an_error_when_the_array_is_made(tmp_path: Path) -> None:
    # The first page that does not fit would end the process otherwise.
    limit = MemoryLimit(LEAST_BYTES, tmp_path)
    with pytest.raises(OSError, match=r"space|large"):
        limit.zeros((2**50,), np.int8)


def test_the_default_is_half_of_what_the_container_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_limit, "_CONTAINER_LIMITS", (tmp_path / "max",))
    whole = memory_limit.default_memory()
    (tmp_path / "max").write_text("max\n")
    assert memory_limit.default_memory() == whole
    (tmp_path / "max").write_text(f"{2**30}\n")
    assert memory_limit.default_memory() == min(2**29, whole)
    (tmp_path / "max").write_text("1000\n")
    assert memory_limit.default_memory() == LEAST_BYTES


def test_a_limit_below_the_least_is_refused() -> None:
    with pytest.raises(InputError, match="memory=1000 bytes is less than 256MiB"):
        MemoryLimit(1000)


@settings(deadline=None, max_examples=60)
@given(
    st.one_of(st.sets(WORDS, min_size=1), st.sets(NUMBERS, min_size=1)),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_ranges_sort_as_one(values: set, rows: int, random) -> None:
    shuffled = sorted(values)
    random.shuffle(shuffled)
    kind = pa.int64() if isinstance(shuffled[0], int) else pa.large_string()
    chosen = np.array([random.random() < 0.7 for _ in shuffled])

    class Sorted(MemoryLimit):
        sorted_rows = rows

    parts = list(in_order(pa.array(shuffled, kind), chosen, Sorted()))
    found = [shuffled[code] for part in parts for code in part.tolist()]
    assert found == sorted(v for v, c in zip(shuffled, chosen, strict=True) if c)
    if chosen.sum() > rows:
        assert len(parts) > 1


def test_ranges_are_of_about_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(value_order, "_AT_ONCE", 1000)
    values = pa.array(np.random.default_rng(0).permutation(20_000))

    class Sorted(MemoryLimit):
        sorted_rows = 2000

    parts = list(in_order(values, np.ones(20_000, bool), Sorted()))
    assert np.concatenate([values.to_numpy()[p] for p in parts]).tolist() == list(
        range(20_000)
    )
    assert max(len(part) for part in parts) < 2 * 2000

"""The prefix store stays within its bytes, keeps what was used last, and never mixes names."""

from __future__ import annotations

import dataclasses
import threading

from hypothesis import given
from hypothesis import strategies as st

from tokenrec.serving.server.prefix_store import PrefixName, PrefixStore

ENTRY = 1_024


@dataclasses.dataclass(frozen=True)
class Block:
    text: str
    nbytes: int


def name(user: str, digest: str = "a" * 8, key: bytes = b"k") -> PrefixName:
    return (digest, user, key)


def test_the_least_recently_used_prefix_goes_first() -> None:
    store: PrefixStore[Block] = PrefixStore(3 * (ENTRY + 100))
    for user in "abc":
        store.put(name(user), Block(user, 100))
    assert store.get(name("a")) == Block("a", 100)
    store.put(name("d"), Block("d", 100))
    assert store.get(name("b")) is None
    assert [store.get(name(user)) is not None for user in "acd"] == [True] * 3
    counts = store.counts()
    assert (counts.hits, counts.misses, counts.evictions) == (4, 1, 1)
    assert (counts.entries, counts.nbytes) == (3, 3 * (ENTRY + 100))


def test_artifact_user_and_history_each_keep_prefixes_apart() -> None:
    store: PrefixStore[Block] = PrefixStore(1 << 20)
    names = [
        ("a", "u", b"1"),
        ("b", "u", b"1"),
        ("a", "v", b"1"),
        ("a", "u", b"2"),
    ]
    for number, one in enumerate(names):
        store.put(one, Block(str(number), 1))
    assert [getattr(store.get(one), "text", None) for one in names] == list("0123")
    assert store.drop_model("a") == 3
    assert store.get(names[1]) is not None
    assert store.get(names[0]) is None


def test_a_prefix_larger_than_the_store_is_not_held_and_evicts_nothing() -> None:
    store: PrefixStore[Block] = PrefixStore(5_000)
    store.put(name("a"), Block("a", 100))
    store.put(name("b"), Block("b", 5_000))
    assert store.get(name("a")) is not None
    assert store.counts().refusals == 1
    # Nor does the smaller one that it replaces stay: it would be of another size.
    store.put(name("a"), Block("a", 5_000))
    assert store.get(name("a")) is None
    assert store.counts().nbytes == 0
    nothing: PrefixStore[Block] = PrefixStore(0)
    nothing.put(name("a"), Block("a", 0))
    assert nothing.counts().entries == 0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["get", "put"]),
            st.integers(0, 5),
            st.integers(0, 3_000),
        ),
        max_size=60,
    )
)
def test_a_store_holds_what_a_plain_list_of_uses_says(
    steps: list[tuple[str, int, int]],
) -> None:
    capacity = 6_000
    store: PrefixStore[Block] = PrefixStore(capacity)
    # The reference: (user, size) in the order of use, the most recent last.
    expected: list[tuple[int, int]] = []
    for action, user, size in steps:
        held = [entry for entry in expected if entry[0] == user]
        expected = [entry for entry in expected if entry[0] != user]
        if action == "get":
            found = store.get(name(str(user)))
            assert (found.nbytes if found else None) == (held[0][1] if held else None)
            expected += held
            continue
        store.put(name(str(user)), Block("", size))
        expected.append((user, size))
        while sum(size + ENTRY for _, size in expected) > capacity:
            expected.pop(0)
    counts = store.counts()
    assert counts.entries == len(expected)
    assert counts.nbytes == sum(size + ENTRY for _, size in expected) <= capacity


def test_threads_never_exceed_the_bytes_or_read_another_prefix() -> None:
    store: PrefixStore[Block] = PrefixStore(20 * ENTRY)
    wrong: list[str] = []

    def use(seed: int) -> None:
        for step in range(400):
            user = str((seed * 7 + step * 13) % 40)
            found = store.get(name(user))
            if found is None:
                store.put(name(user), Block(user, 64 + int(user)))
            elif found.text != user:
                wrong.append(user)
            if store.counts().nbytes > store.capacity:
                wrong.append("bytes")

    threads = [threading.Thread(target=use, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    counts = store.counts()
    assert counts.hits + counts.misses == 4 * 400

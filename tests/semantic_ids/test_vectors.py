"""Item vectors: pairs of train alone, items of one kind near each other, text."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.semantic_ids.shops import COLD, ITEMS, item_aisle, prepare_shop
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.errors import InputError
from tokenrec.semantic_ids import cooccurrence
from tokenrec.semantic_ids.cooccurrence import Pairs, cooccurrence_vectors, count_pairs
from tokenrec.semantic_ids.item_vectors import item_vectors
from tokenrec.semantic_ids.text_vectors import item_texts, text_vectors
from tokenrec.semantic_ids.train_events import TrainEvents, train_events
from tokenrec.semantic_ids.vectors import ItemVectors, nearest_rows

needs_text = pytest.mark.skipif(
    importlib.util.find_spec("wordllama") is None, reason="needs wordllama (extra text)"
)


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return open_dataset(prepare_shop(tmp_path_factory.mktemp("shop") / "set"))


def events_of(
    users: list[list[int]], times: list[list[int]] | None = None
) -> TrainEvents:
    times = times or [list(range(len(items))) for items in users]
    user = np.repeat(np.arange(len(users)), [len(items) for items in users])
    return TrainEvents(
        user,
        np.array([i for u in users for i in u], np.int32),
        np.array([t for u in times for t in u]),
    )


def dense(pairs: Pairs, items: int) -> np.ndarray:
    out = np.zeros((items, items))
    out[pairs.row, pairs.column] = pairs.value
    return out


def neighbours_agree(values: ItemVectors, aisle: np.ndarray, rows: np.ndarray) -> float:
    """Share of the three nearest items of each row that are of its aisle."""
    near = nearest_rows(values.values[rows], values.values, 4)
    return float(
        np.mean(
            [aisle[n[n != r][:3]] == aisle[r] for r, n in zip(rows, near, strict=True)]
        )
    )


def test_a_pair_counts_by_its_distance_within_one_user() -> None:
    counts = dense(count_pairs(events_of([[0, 1, 0, 2], [1, 2]]), 4, seed=0), 4)
    expected = np.zeros((4, 4))
    expected[0, 1] = 1 + 1
    expected[0, 2] = 1 / 3 + 1
    expected[1, 2] = 1 / 2 + 1
    # Measured 0: a few float64 sums. The default bound, 1e-7, is above any rounding.
    np.testing.assert_allclose(counts, expected + expected.T)


def test_a_pair_of_one_time_counts_one_wherever_it_lies() -> None:
    basket = events_of([[0, 1, 2, 3]], [[5, 5, 5, 5]])
    np.testing.assert_array_equal(
        dense(count_pairs(basket, 4, seed=0), 4), 1 - np.eye(4)
    )


def test_pairs_end_at_the_window() -> None:
    counts = dense(count_pairs(events_of([list(range(9))]), 9, seed=0), 9)
    distance = np.abs(np.arange(9)[:, None] - np.arange(9))
    np.testing.assert_array_equal(
        counts > 0, (distance > 0) & (distance <= cooccurrence.WINDOW)
    )


def test_events_are_those_of_train(shop: Dataset) -> None:
    events = train_events(shop)
    assert len(events.item) == shop.metadata.counts["events_train"] == 60 * 12
    np.testing.assert_array_equal(np.bincount(events.user), np.full(60, 12))
    aisles = item_aisle(shop.catalogue.item_id[events.item]).reshape(60, 12)
    assert (aisles == aisles[:, :1]).all()  # what follows in valid is of another aisle


@pytest.mark.parametrize("load_rows", [1, 40, 1 << 21])
def test_events_that_chunks_repeat_count_once(
    tmp_path: Path, shop: Dataset, load_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokenrec.semantic_ids.train_events.LOAD_ROWS", load_rows)
    cut = open_dataset(prepare_shop(tmp_path / "cut", chunk_events=5))
    assert cut.num_chunks("train") == 3 * shop.num_chunks("train")
    for one, other in zip(train_events(cut), train_events(shop), strict=True):
        np.testing.assert_array_equal(one, other)


def test_items_bought_together_are_near_and_cold_items_have_no_vector(
    shop: Dataset,
) -> None:
    items = len(shop.catalogue.item_id)
    result = cooccurrence_vectors(train_events(shop), items, seed=0)
    cold = np.arange(items) >= items - COLD
    np.testing.assert_array_equal(result.known, ~cold)
    np.testing.assert_array_equal(result.values[cold], 0)
    # Rounding of float32 to length 1: measured 1.2e-7, two units in the last place; the
    # bound leaves eight times as much for another processor.
    np.testing.assert_allclose(
        np.linalg.norm(result.values[~cold], axis=1), 1, atol=1e-6
    )
    assert (
        neighbours_agree(
            result, item_aisle(shop.catalogue.item_id), np.flatnonzero(~cold)
        )
        == 1
    )


def test_the_factors_are_those_of_the_dense_matrix(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cooccurrence, "SPARSE_BLOCK", 64)
    random = np.random.default_rng(0)
    events = events_of(random.integers(0, 40, (30, 15)).tolist())
    graph = cooccurrence.normalized_counts(count_pairs(events, 40, seed=0), 40)
    result = cooccurrence._factorize(graph, 40, 40, seed=0)
    values, rotation = np.linalg.eigh(dense(graph, 40))
    expected = (rotation * np.maximum(values, 0)) @ rotation.T
    # A subspace of full width is exact but for float32 rounding. Measured 2.2e-8; the
    # bound leaves forty times as much for another processor or LAPACK.
    np.testing.assert_allclose(result @ result.T, expected, atol=1e-6)


def test_lone_events_are_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r"no two items .* use --vectors text"):
        cooccurrence_vectors(events_of([[0], [1], [2, 2]]), 3, seed=0)


@needs_text
def test_items_of_like_words_are_near(shop: Dataset) -> None:
    result = text_vectors(shop)
    assert result.known.all()
    aisle = item_aisle(shop.catalogue.item_id)
    # Measured 1.0. Items with equal words tie, and rounding may order ties differently.
    assert neighbours_agree(result, aisle, np.arange(len(result.known))) > 0.9


@needs_text
def test_cold_items_take_the_place_of_their_neighbours_by_text(
    shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer than an aisle has warm items.
    monkeypatch.setattr("tokenrec.semantic_ids.item_vectors.NEIGHBOURS", 5)
    result = item_vectors(shop, train_events(shop), "both", seed=0)
    items = len(result.known)
    assert result.known.all()
    aisle = item_aisle(shop.catalogue.item_id)
    assert neighbours_agree(result, aisle, np.arange(items - COLD, items)) == 1
    warm = np.arange(items - COLD)
    halves = np.square(result.values[warm, : -text_vectors(shop).values.shape[1]]).sum(
        axis=1
    )
    # As above: measured 1.2e-7.
    np.testing.assert_allclose(halves, 0.5, atol=1e-6)


def test_texts_are_the_strings_of_an_item(shop: Dataset) -> None:
    texts = item_texts(shop, np.array([0, ITEMS + 1]))
    assert texts == ["fish | salmon | 0 oz", "paint | varnish | 1 oz"]


def test_titles_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    both = open_dataset(prepare_shop(tmp_path / "both", title="{word} no {number}"))
    rows = np.array([len(both.catalogue.item_id) - 1, 1])
    # The last item has no title.
    without = ["tea | tea | 3 oz", "fish | tuna | 1 oz"]
    assert item_texts(both, rows) == [without[0], f"{without[1]} | tuna no 1"]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert item_texts(both, rows) == without


def test_titles_that_repeat_other_features_are_left_out(
    tmp_path: Path, shop: Dataset
) -> None:
    repeated = open_dataset(
        prepare_shop(tmp_path / "repeated", title="{word} {aisle} {ounces} oz")
    )
    rows = np.arange(len(shop.catalogue.item_id))
    assert item_texts(repeated, rows) == item_texts(shop, rows)


@needs_text
def test_items_of_like_titles_are_near(tmp_path: Path) -> None:
    shop = open_dataset(
        prepare_shop(tmp_path / "set", text=False, title="{word} no {number}")
    )
    result = text_vectors(shop)
    items = len(shop.catalogue.item_id)
    # The last item has no title.
    np.testing.assert_array_equal(result.known, np.arange(items) < items - 1)
    aisle = item_aisle(shop.catalogue.item_id)
    # Measured 1.0.
    assert neighbours_agree(result, aisle, np.arange(items - 1)) > 0.9


def test_a_title_counts_where_it_says_more(tmp_path: Path) -> None:
    # Only items with an even number have a word that no other feature holds.
    titles = "{word} {aisle}{more}"
    mixed = open_dataset(prepare_shop(tmp_path / "mixed", title=titles))
    texts = item_texts(mixed, np.array([0, 1]))
    assert texts == ["fish | salmon | 0 oz | salmon fish new", "fish | tuna | 1 oz"]


def test_a_data_set_without_strings_has_no_text(tmp_path: Path) -> None:
    plain = open_dataset(prepare_shop(tmp_path / "plain", text=False))
    assert item_texts(plain, np.array([0])) == [""]
    with pytest.raises(
        InputError,
        match=r"no item feature .* has strings .* use --vectors cooccurrence",
    ):
        text_vectors(plain)


def test_text_without_wordllama_names_the_extra(
    shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        InputError,
        match=r'wordllama.* is not installed; run `pip install "\.\[text\]"`',
    ):
        text_vectors(shop)

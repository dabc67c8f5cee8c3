"""Tests of the synthetic log: the properties that other tests rely on."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from tokenrec.data.source import SPLITS
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.errors import InputError
from tokenrec.metrics.binary import auc

ROWS = 20_000


def table(source: SyntheticSource) -> pa.Table:
    return pa.Table.from_batches(list(source.rows()))


def column(rows: pa.Table, name: str, missing=-1) -> np.ndarray:
    return rows.column(name).fill_null(missing).to_numpy()


def times_by_user(rows: pa.Table) -> list[np.ndarray]:
    user, time = column(rows, "user_id"), column(rows, "time_ms")
    return [time[user == u] for u in np.unique(user)]


@pytest.mark.parametrize("requests", [1, 4])
def test_rows_do_not_depend_on_the_batch_size(requests):
    whole = table(SyntheticSource(1000, users=7, items=20, requests=requests))
    pieces = table(
        SyntheticSource(1000, users=7, items=20, requests=requests, batch_rows=13)
    )
    assert len(whole) == 1000
    assert pieces.combine_chunks() == whole.combine_chunks()


def test_rows_are_yielded_batch_by_batch():
    assert next(SyntheticSource(10**12, batch_rows=10).rows()).num_rows == 10


def test_a_seed_decides_every_draw():
    first, again, other = (
        table(SyntheticSource(2000, seed=seed)) for seed in (0, 0, 1)
    )
    assert first == again
    for name in ("item_id", "time_ms", "label_click", "reaction", "seconds", "place"):
        assert first.column(name) != other.column(name)


@pytest.mark.parametrize("requests", [1, 3])
def test_columns_are_those_of_the_schema(requests):
    source = SyntheticSource(100, requests=requests)
    keys = {"user_id", "item_id", "time_ms", "split", "event", "scored", "request"}
    labels = {f"label_{t.name}" for t in source.schema.tasks}
    features = {f.name for g in ("row", "action") for f in source.schema.group(g)}
    assert set(table(source).column_names) == keys | labels | features
    assert set(source.users().column_names) == {"user_id"} | {
        f.name for f in source.schema.group("user")
    }
    assert set(source.items().column_names) == {"item_id"} | {
        f.name for f in source.schema.group("catalogue")
    }


def test_every_kind_entity_and_group_is_there():
    features = SyntheticSource.schema.features
    assert {f.kind for f in features} == {
        "categorical",
        "multi_valued",
        "dense",
        "embedding",
        "semantic_id",
    }
    assert {f.group for f in features} == {"user", "catalogue", "row", "action"}
    assert any(f.per_row for f in features)


@pytest.mark.parametrize("requests", [1, 4])
def test_a_user_comes_in_the_order_of_time_with_a_few_ties(requests):
    rows = table(SyntheticSource(ROWS, requests=requests))
    if requests > 1:
        rows = rows.filter(rows.column("event"))
    steps = np.concatenate([np.diff(t) for t in times_by_user(rows)])
    assert (steps >= 0).all()
    assert 0.03 < (steps == 0).mean() < 0.1


@pytest.mark.parametrize("requests", [1, 4])
def test_no_scored_row_repeats_user_item_and_time(requests):
    rows = table(SyntheticSource(ROWS, users=20, items=10, requests=requests))
    keys = rows.filter(rows.column("scored")).select(["user_id", "item_id", "time_ms"])
    assert len(keys.group_by(keys.column_names).aggregate([])) == len(keys)


@pytest.mark.parametrize("requests", [1, 4])
def test_splits_are_by_time(requests):
    rows = table(SyntheticSource(ROWS, requests=requests))
    split, time = column(rows, "split"), column(rows, "time_ms")
    assert np.bincount(split) / len(split) == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    for earlier in range(len(SPLITS) - 1):
        assert time[split == earlier].max() < time[split == earlier + 1].min()


def test_labels_of_both_classes_are_known_for_most_rows():
    rows = table(SyntheticSource(ROWS))
    for name, share in (("label_click", 0.97), ("label_buy", 0.8)):
        label = column(rows, name)
        assert set(label) == {-1, 0, 1}
        assert (label >= 0).mean() == pytest.approx(share, abs=0.02)


def test_rows_of_a_request_share_user_and_time_and_are_no_events():
    rows = table(SyntheticSource(5000, requests=4))
    scored = rows.column("scored").to_numpy()
    assert (rows.column("event").to_numpy() == ~scored).all()
    request = column(rows, "request").reshape(-1, 5)
    assert (request == request[:, :1]).all()
    assert len(np.unique(request[:, 0])) == len(request)
    for name in ("user_id", "time_ms", "hour"):
        values = column(rows, name).reshape(-1, 5)
        assert (values == values[:, :1]).all()
    items = np.array(rows.column("item_id").to_pylist()).reshape(-1, 5)
    assert all(len(set(shown)) == 4 and bought in shown for *shown, bought in items)


def test_purchases_have_an_action_and_no_label_and_candidates_have_neither():
    rows = table(SyntheticSource(5000, requests=4))
    events, shown = (
        rows.filter(rows.column("event")),
        rows.filter(rows.column("scored")),
    )
    assert events.column("label_click").null_count == len(events)
    assert events.column("reaction").null_count == 0
    assert shown.column("reaction").null_count == len(shown)
    assert set(column(shown, "label_click")) == {-1, 0, 1}


def test_an_action_holds_the_click_of_its_own_row():
    rows = table(SyntheticSource(1000))
    assert (column(rows, "clicked") == column(rows, "label_click")).all()
    assert rows.column("clicked").null_count > 0


def test_the_last_user_and_item_have_no_features():
    source = SyntheticSource(ROWS, users=10, items=10)
    rows = table(source)
    assert (
        len(
            set(rows.column("user_id").to_pylist())
            - set(source.users().column("user_id").to_pylist())
        )
        == 1
    )
    assert (
        len(
            set(rows.column("item_id").to_pylist())
            - set(source.items().column("item_id").to_pylist())
        )
        == 1
    )


@pytest.mark.parametrize("requests", [1, 4])
def test_labels_are_drawn_with_the_true_probabilities(requests):
    source = SyntheticSource(60_000, requests=requests)
    index = np.arange(60_000)
    p, labels = source.probabilities(index), source.labels(index)
    for k in range(2):
        for value in np.unique(p[:, k].round(6)):
            drawn = labels[(p[:, k].round(6) == value) & (labels[:, k] >= 0), k]
            assert drawn.mean() == pytest.approx(
                value, abs=5 * 0.5 / np.sqrt(len(drawn))
            )


@pytest.mark.parametrize("requests", [1, 4])
def test_the_probability_is_a_function_of_static_fields_and_the_latest_earlier_event(
    requests,
):
    """Recompute the fields of each row from the rows and tables alone."""
    source = SyntheticSource(3000, users=9, items=30, requests=requests)
    segment = dict(
        zip(
            *source.users().select(["user_id", "segment"]).to_pydict().values(),
            strict=True,
        )
    )
    genre = dict(
        zip(
            *source.items().select(["item_id", "genre"]).to_pydict().values(),
            strict=True,
        )
    )
    probability = source.probabilities(np.arange(3000))
    rows = table(source).to_pylist()
    seen: dict[tuple, float] = {}
    for i, row in enumerate(rows):
        earlier = [
            e
            for e in rows[:i]
            if e["event"]
            and e["user_id"] == row["user_id"]
            and e["time_ms"] < row["time_ms"]
        ]
        latest = [e for e in earlier if e["time_ms"] == earlier[-1]["time_ms"]]
        one = (
            (genre.get(latest[0]["item_id"]), latest[0]["reaction"])
            if len(latest) == 1
            else (None, None)
        )
        key = (segment.get(row["user_id"]), genre.get(row["item_id"]), *one)
        assert seen.setdefault(key, probability[i, 0]) == probability[i, 0], key
    assert len(seen) > 100


def test_the_best_auc_needs_both_the_static_fields_and_the_history():
    source = SyntheticSource(ROWS)
    rows = table(source)
    best = source.best_auc("click")
    p = source.probabilities(np.arange(ROWS))[:, 0]
    label = column(rows, "label_click")
    kept = (label >= 0) & (column(rows, "split") == SPLITS.index("valid"))
    assert best == auc(label[kept], p[kept])
    assert best > 0.8
    assert source.best_auc("buy", "test") > 0.75

    def lookup(*names: str) -> float:
        """Compute the best AUC of these columns alone: that of each combination's mean."""
        codes = np.unique(
            np.stack([known[n] for n in names], -1), axis=0, return_inverse=True
        )[1].ravel()
        mean = np.bincount(codes, p) / np.bincount(codes)
        return auc(label[kept], mean[codes][kept])

    users, items = source.users().to_pydict(), source.items().to_pydict()
    segment = dict(zip(users["user_id"], users["segment"], strict=True))
    genre = dict(zip(items["item_id"], items["genre"], strict=True))
    known = {
        "segment": np.array(
            [segment.get(u, -1) for u in rows.column("user_id").to_pylist()]
        ),
        "genre": np.array(
            [genre.get(i, -1) for i in rows.column("item_id").to_pylist()]
        ),
        "place": column(rows, "place"),
        "hour": column(rows, "hour"),
    }
    for alone in known:
        assert lookup(alone) < 0.56
    assert 0.65 < lookup("segment", "genre") < best - 0.08


def test_an_impossible_size_and_an_unknown_task_are_named():
    with pytest.raises(InputError, match="rows=0 must be at least 1"):
        SyntheticSource(0)
    with pytest.raises(InputError, match="items=7 must be at least 8"):
        SyntheticSource(100, items=7, requests=4)
    with pytest.raises(InputError, match="'clik' is unknown; did you mean 'click'"):
        SyntheticSource(100).best_auc("clik")
    with pytest.raises(InputError, match="rows=1: split 'test' lacks a class"):
        SyntheticSource(1).best_auc(split="test")

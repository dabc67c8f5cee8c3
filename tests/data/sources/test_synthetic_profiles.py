"""Tests of the synthetic log with profiles: rank and weight of its static fields."""

from __future__ import annotations

import numpy as np
import pytest

from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.synthetic_profiles import ProfilesSource
from tokenrec.errors import InputError


def one_hot(source: ProfilesSource) -> np.ndarray:
    users = source.users()
    columns = [
        users.column(name).to_numpy()
        for name in users.column_names
        if name.startswith(("field_", "segment"))
    ]
    made = np.concatenate(
        [column[:, None] == np.unique(column) for column in columns], axis=1
    ).astype(float)
    return made - made.mean(axis=0)


@pytest.mark.parametrize("rank", [1, 2, 5, 16])
def test_static_fields_have_the_rank_asked_for(rank):
    source = ProfilesSource(100, rank, static_fields=9, users=300)
    assert (
        len([f for f in source.schema.group("user") if f.name.startswith("field_")])
        == 9
    )
    assert np.linalg.matrix_rank(one_hot(source)) == rank - 1


def test_labels_are_drawn_with_the_true_probabilities_and_follow_the_profile():
    source = ProfilesSource(60_000, 2, static_weight=2.0, users=50)
    index = np.arange(60_000)
    p, labels = source.probabilities(index)[:, 0], source.labels(index)[:, 0]
    kept = labels >= 0
    for value in np.unique(p.round(6)):
        drawn = labels[kept & (p.round(6) == value)]
        assert drawn.mean() == pytest.approx(value, abs=5 * 0.5 / np.sqrt(len(drawn)))
    field = source.users().column("field_0").to_numpy()  # of all users but the last
    of_row = np.append(field, -1)[index % 50]
    rates = [labels[kept & (of_row == value)].mean() for value in np.unique(field)]
    assert np.ptp(rates) > 0.4


def test_events_are_those_of_the_plain_log():
    plain, with_fields = SyntheticSource(500), ProfilesSource(500, 3)
    rows, same = next(plain.rows()), next(with_fields.rows())
    for name in ("user_id", "item_id", "time_ms", "split", "hour", "reaction"):
        assert rows.column(name) == same.column(name)


def test_a_weight_of_any_size_gives_probabilities():
    p = ProfilesSource(1_000, 2, static_weight=1_000.0, users=50).probabilities(
        np.arange(1_000)
    )
    assert set(p[:, 0].round(3)) >= {0.0, 1.0}


def test_sizes_that_make_no_profile_are_named():
    with pytest.raises(InputError, match="static_rank=0 must be at least 1"):
        ProfilesSource(100, 0)
    with pytest.raises(InputError, match="static_fields=0 must be at least 1"):
        ProfilesSource(100, 2, static_fields=0)
    with pytest.raises(InputError, match="static_weight=nan must be a finite number"):
        ProfilesSource(100, 2, static_weight=float("nan"))

"""The ceiling of a synthetic log: metrics of the probabilities of its labels."""

import dataclasses

import numpy as np
import pytest

from tokenrec.data.dataset import open_dataset
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.synthetic_profiles import ProfilesSource
from tokenrec.evaluation.baseline_reports import evaluate_baselines
from tokenrec.evaluation.boosted_trees import LIGHTGBM, has_lightgbm
from tokenrec.evaluation.ceiling import CEILING, known_probabilities
from tokenrec.metrics.binary import auc
from tokenrec.runtime.result_table import format_table, result_rows

TASKS = ("click", "buy")


@pytest.fixture(
    scope="module",
    params=[
        SyntheticSource(6000, users=60, items=40, seed=3, batch_rows=777),
        SyntheticSource(6000, users=50, items=40, requests=4),
    ],
    ids=["events", "requests"],
)
def made(request, tmp_path_factory):
    """A source and its prepared data set, in chunks that repeat events."""
    folder = tmp_path_factory.mktemp("ceiling") / "set"
    prepare(request.param, folder, chunk_events=40, overlap=8)
    return request.param, open_dataset(folder)


@pytest.mark.parametrize("split", ["valid", "test"])
def test_probabilities_of_a_prepared_log_are_those_of_its_source(made, split):
    source, dataset = made
    log = dataset.load(split)
    found = known_probabilities(dataset, split, log, TASKS)
    labels = log.labels[log.flags & SCORED > 0]
    assert found.shape == labels.shape
    for column, task in enumerate(TASKS):
        known = labels[:, column] >= 0
        # Exact: both are quotients of the same pair counts.
        assert auc(labels[known, column], found[known, column]) == source.best_auc(
            task, split
        )
    swapped = known_probabilities(dataset, split, log, TASKS[::-1])
    np.testing.assert_array_equal(swapped, found[:, ::-1])


def test_the_ceiling_is_a_row_beside_the_baselines_on_the_evaluated_rows(made):
    source, dataset = made
    log = dataset.load("valid")
    scored = np.flatnonzero(log.flags & SCORED)
    reports = evaluate_baselines(dataset, "valid", TASKS, scored)
    trees = [LIGHTGBM] if has_lightgbm() else []
    names = ["popularity", "item_rate", "repeat", "rates", *trees, CEILING]
    assert list(reports) == names
    click = reports[CEILING]["tasks"]["click"]
    # The few distinct probabilities stay distinct in float32, so that no pair changes.
    assert click["auc"] == source.best_auc("click", "valid")
    others = [report for name, report in reports.items() if name != CEILING]
    assert all(click["auc"] > other["tasks"]["click"]["auc"] for other in others)
    assert all(
        click["log_loss"] < other["tasks"]["click"]["log_loss"] for other in others
    )
    assert CEILING in format_table(result_rows(reports))
    some = evaluate_baselines(dataset, "valid", TASKS, scored[::3])
    assert some[CEILING]["tasks"]["click"]["examples"] < click["examples"]


def test_a_log_whose_probabilities_are_not_known_has_no_ceiling(made, tmp_path):
    _, dataset = made
    log = dataset.load("valid")
    # Labels that the source would not draw.
    other = dataclasses.replace(log, labels=np.ones_like(log.labels))
    assert known_probabilities(dataset, "valid", other, TASKS) is None
    # A split of other rows.
    assert known_probabilities(dataset, "test", log, TASKS) is None
    # Prepared before the parameters were stored, or from another source.
    metadata = dataset.metadata
    counts = {k: v for k, v in metadata.counts.items() if "generator" not in k}
    for change in ({"counts": counts}, {"source": "kuairand"}):
        dataset.metadata = dataclasses.replace(metadata, **change)
        assert known_probabilities(dataset, "valid", log, TASKS) is None
    dataset.metadata = metadata
    # Profiles change the probabilities, and are not among the stored parameters.
    prepare(ProfilesSource(2000, 3, users=40), tmp_path / "profiles")
    profiles = open_dataset(tmp_path / "profiles")
    log = profiles.load("valid")
    assert known_probabilities(profiles, "valid", log, TASKS) is None

"""A model is replaced whole or not at all, and a failure leaves the old one in place."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.serving.server.arithmetic_retriever import ArithmeticRetriever
from tests.serving.server.arithmetic_scorer import ArithmeticScorer, Artifact, Prefix
from tests.serving.server.request_bodies import body_of, request_of
from tokenrec.errors import InputError
from tokenrec.serving.golden import replay_golden
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.model_slot import ModelSlot, ServedModel, ready
from tokenrec.serving.server.prefix_store import PrefixStore


def write_artifact(folder: Path, weight: float, objective: str = "ranking") -> Path:
    """An artifact of the arithmetic scorer, or retriever: a weight."""
    folder.mkdir()
    (folder / "manifest.json").write_text(f"{objective} {weight!r}")
    return folder


def read_artifact(folder: Path) -> tuple[str, float]:
    """Objective and weight of an artifact."""
    objective, weight = (folder / "manifest.json").read_text().split()
    if float(weight) < 0:
        raise InputError(f"weight: {weight} is negative; export it again")
    return objective, float(weight)


def load(folder: Path) -> ServedModel:
    objective, weight = read_artifact(folder)
    kind = ArithmeticRetriever if objective == "retrieval" else ArithmeticScorer
    return ready(kind(weight), folder)


def point(link: Path, folder: Path) -> None:
    """Lead a link to another folder in one step."""
    fresh = link.with_name("fresh")
    fresh.symlink_to(folder)
    os.replace(fresh, link)


@pytest.fixture
def link(tmp_path: Path) -> Path:
    one = tmp_path / "current"
    one.symlink_to(write_artifact(tmp_path / "first", 1.0))
    return one


def slot_of(link: Path) -> tuple[ModelSlot, PrefixStore[Any], ServerMetrics]:
    store: PrefixStore[Any] = PrefixStore(1 << 20)
    metrics = ServerMetrics()
    return ModelSlot(link, load, store, metrics), store, metrics


def test_a_link_that_moves_swaps_the_model_and_drops_its_prefixes(
    link: Path, tmp_path: Path
) -> None:
    slot, store, metrics = slot_of(link)
    old = slot.model
    store.put((old.name, "u", b""), Prefix(old.scorer, 0.0))
    assert not slot.check()
    point(link, write_artifact(tmp_path / "second", 2.0))
    assert slot.check()
    assert (slot.model.scorer.weight, slot.model.path.name) == (2.0, "second")
    assert slot.last_load.outcome == "ok"
    assert store.counts().entries == 0
    assert not slot.check()
    assert metrics.swaps.value("ok") == 2
    # Who began with the old model still has it.
    assert old.scorer.weight == 1.0


def test_a_model_that_cannot_serve_leaves_the_old_one_and_is_reported_once(
    link: Path, tmp_path: Path
) -> None:
    slot, _, metrics = slot_of(link)
    point(link, write_artifact(tmp_path / "broken", -1.0))
    assert slot.check()
    assert slot.model.scorer.weight == 1.0
    assert (slot.last_load.name, slot.last_load.outcome) == ("broken", "failed")
    assert "weight: -1.0 is negative" in slot.last_load.error
    # It is not loaded again and again.
    assert not slot.check()
    assert metrics.swaps.value("failed") == 1
    # Its repair in place is another artifact.
    shutil.rmtree(tmp_path / "broken")
    write_artifact(tmp_path / "broken", 3.0)
    assert slot.check()
    assert slot.model.scorer.weight == 3.0
    assert slot.last_load.outcome == "ok"


def test_a_copy_of_the_model_that_serves_is_not_loaded(
    link: Path, tmp_path: Path
) -> None:
    slot, _, _ = slot_of(link)
    first = slot.model
    point(link, write_artifact(tmp_path / "broken", -1.0))
    assert slot.check()
    point(link, write_artifact(tmp_path / "copy", 1.0))
    assert not slot.check()
    assert slot.model is first
    assert (slot.last_load.name, slot.last_load.outcome) == ("copy", "ok")


def test_a_link_that_is_gone_for_a_moment_changes_nothing(link: Path) -> None:
    slot, _, metrics = slot_of(link)
    first = link.resolve()
    link.unlink()
    assert not slot.check()
    link.symlink_to(first)
    assert not slot.check()
    assert metrics.swaps.value("failed") == 0


def test_a_first_load_that_fails_raises(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="negative"):
        slot_of(write_artifact(tmp_path / "broken", -2.0))
    with pytest.raises(InputError, match=r"no manifest\.json in it; make an artifact"):
        slot_of(tmp_path / "missing")


def golden_of(scorer: ArithmeticScorer, count: int) -> list[tuple[Any, Any]]:
    return [
        (body_of(seed), scorer.expected(request_of(seed)).tolist())
        for seed in range(count)
    ]


@dataclasses.dataclass
class WithArtifact(ArithmeticScorer):
    artifact: Artifact = dataclasses.field(
        default_factory=lambda: Artifact(Path("model"), {}, [])
    )


@pytest.mark.parametrize("has_prefix", [True, False])
def test_golden_requests_are_scored_in_batches(has_prefix: bool) -> None:
    scorer = WithArtifact(has_prefix=has_prefix)
    assert replay_golden(scorer, golden_of(scorer, 7), 4, 1e-6) == 7
    assert [len(sizes) for _, sizes in scorer.calls if _ != "prefill"] == [4, 3]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (2e-6, "golden request 5: score_buy of candidate 0 is"),
        (float("nan"), "golden request 5: score_buy of candidate 0 is"),
    ],
)
def test_a_golden_score_that_differs_is_named(change: float, words: str) -> None:
    scorer = WithArtifact()
    golden = golden_of(scorer, 7)
    golden[5][1][0][1] += change
    with pytest.raises(InputError, match=words):
        replay_golden(scorer, golden, 4, 1e-6)
    golden[5][1][0][1] = float(scorer.expected(request_of(5))[0, 1]) + 5e-7
    assert replay_golden(scorer, golden, 4, 1e-6) == 7


def test_lost_golden_scores_and_none_at_all_are_errors() -> None:
    scorer = WithArtifact()
    golden = golden_of(scorer, 2)
    golden[1][1].append([0.0, 0.0])
    with pytest.raises(InputError, match=r"golden request 1: \("):
        replay_golden(scorer, golden, 4, 1e-6)
    with pytest.raises(InputError, match="no golden request"):
        replay_golden(scorer, [], 4, 1e-6)
    expected = scorer.expected(request_of(0))
    assert np.isfinite(expected).all()

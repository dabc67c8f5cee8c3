"""A live state completes requests with the bits of `prepare`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.live_replay import MINUTE, Replay, make_replay, replay
from tokenrec.serving.live_state import LiveState


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Replay:
    return make_replay(tmp_path_factory.mktemp("live"), seed=3)


def open_state(given: Replay, lateness: int = 5 * MINUTE) -> LiveState:
    return LiveState.open(given.folder / "counters", lateness_ms=lateness, clock=None)


def test_replay(given: Replay) -> None:
    state = open_state(given)
    assert replay(given, state, lateness=5 * MINUTE, seed=0) > 50

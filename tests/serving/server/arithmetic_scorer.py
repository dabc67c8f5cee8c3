"""A scorer that does real arithmetic on a request, in place of an exported model.

It has the interface of `tokenrec.serving.scorer.Scorer`. The score of a candidate depends on
the weights, the user, the whole history, the context and the candidate, so that a mix-up of
any two requests, prefixes, slices or models shows in a number.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.serving.request import BadRequest, Request

BATCHES = (1, 2, 4, 8)
CANDIDATES = (8, 16, 32, 64)


@dataclasses.dataclass(frozen=True)
class Unknown:
    items: int = 0
    history_items: int = 0
    values: dict[str, int] = dataclasses.field(default_factory=dict)
    missing: dict[str, int] = dataclasses.field(default_factory=dict)
    rows: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Encoded:
    user: float
    history: np.ndarray
    context: float
    items: np.ndarray
    unknown: Unknown = Unknown()

    @property
    def prefix_key(self) -> bytes:
        return hashlib.sha256(self.history.tobytes()).digest()

    @property
    def candidates(self) -> int:
        return len(self.items)

    @property
    def events(self) -> int:
        return len(self.history)

    def part(self, start: int, stop: int) -> Encoded:
        return dataclasses.replace(self, items=self.items[start:stop])


@dataclasses.dataclass(frozen=True)
class Prefix:
    owner: ArithmeticScorer
    value: float
    nbytes: int = 100


class PoisonError(RuntimeError):
    """What the device raises for a poisonous request."""


# An item that makes the device raise, and one whose score is not a number.
POISON, NOT_A_NUMBER = 666, 667


@dataclasses.dataclass
class ArithmeticScorer:
    """See the module.

    Attributes:
      weight: the weights; another model has another one.
      gate: every device call waits for it; a test closes it to let a queue form.
      calls: the device calls so far: what, and the number of candidates of each request.
    """

    weight: float = 1.0
    has_prefix: bool = True
    tasks: tuple[str, ...] = ("click", "buy")
    outputs: tuple[str, ...] = ("score_click", "score_buy")
    objective: str = "ranking"
    batch_buckets: tuple[int, ...] = BATCHES
    candidate_buckets: tuple[int, ...] = CANDIDATES
    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    entered: threading.Semaphore = dataclasses.field(
        default_factory=lambda: threading.Semaphore(0)
    )
    calls: list[tuple[str, list[int]]] = dataclasses.field(default_factory=list)
    compiles: int = 0

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self.weight).encode()).hexdigest()

    def encode(self, request: Request) -> Encoded:
        user = request.user.get("age")
        if not isinstance(user, int | float) or isinstance(user, bool):
            raise BadRequest(f"user.age: {user!r} is no number; send a number")
        items = request.candidates["item_id"]
        items = items.tolist() if isinstance(items, np.ndarray) else items
        if not all(type(item) is int for item in items):
            raise BadRequest("candidates.item_id: holds what is no integer; send ids")
        known = [0 <= item < 1_000 for item in items]
        context = request.context.get("hour", 0)
        return Encoded(
            float(user),
            np.asarray(request.history.get("time_ms", []), np.float64),
            float(context) if isinstance(context, int | float) else 0.0,
            np.asarray(items, np.float64),
            Unknown(
                items=known.count(False),
                missing={} if "hour" in request.context else {"hour": 1},
                rows=[place for place, one in enumerate(known) if not one],
            ),
        )

    def prefill(self, batch: Sequence[Encoded]) -> list[Prefix]:
        self._enter("prefill", batch)
        return [Prefix(self, self._prefix(one)) for one in batch]

    def extend(self, batch: Sequence[tuple[Prefix, Encoded]]) -> list[np.ndarray]:
        self._enter("extend", [one for _, one in batch])
        assert all(prefix.owner is self for prefix, _ in batch)
        return [self._scores(prefix.value, one) for prefix, one in batch]

    def score(self, batch: Sequence[Encoded]) -> list[np.ndarray]:
        self._enter("score", batch)
        return [self._scores(self._prefix(one), one) for one in batch]

    def warm(self, batches: Sequence[int], candidates: Sequence[int]) -> int:
        self.batch_buckets, self.candidate_buckets = tuple(batches), tuple(candidates)
        return len(batches) * len(candidates)

    def expected(self, request: Request) -> np.ndarray:
        """The scores of a request, computed alone."""
        one = self.encode(request)
        return self._scores(self._prefix(one), one)

    def _enter(self, what: str, batch: Sequence[Encoded]) -> None:
        self.calls.append((what, [one.candidates for one in batch]))
        self.entered.release()
        assert self.gate.wait(60)
        if any(POISON in one.items for one in batch):
            raise PoisonError(f"a value of the request: {POISON}")

    def _prefix(self, one: Encoded) -> float:
        powers = np.arange(1, len(one.history) + 1)
        return one.user + float(np.sum(np.sin(one.history) * powers))

    def _scores(self, prefix: float, one: Encoded) -> np.ndarray:
        logit = np.sin(self.weight * (prefix + one.context) + one.items)
        scores = np.stack([logit, np.cos(logit * one.items)], 1).astype(np.float32)
        scores[one.items == NOT_A_NUMBER] = np.nan
        return scores


@dataclasses.dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: dict[str, Any]
    golden_rows: list[tuple[dict[str, Any], list[list[float]]]]

    def golden(self) -> list[tuple[dict[str, Any], list[list[float]]]]:
        return self.golden_rows

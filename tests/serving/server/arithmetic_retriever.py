"""A retriever that does real arithmetic, in place of an exported model.

It has the interface of `tokenrec.serving.retriever.Retriever`. The score of an item depends
on the weights, the user, the whole history and the item, so that a mix-up of requests,
prefixes, masks or models shows.
"""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Sequence

import numpy as np

from tests.serving.server.arithmetic_scorer import BATCHES, POISON, PoisonError
from tokenrec.serving.encoded import Unknown
from tokenrec.serving.request import BadRequest
from tokenrec.serving.retrieval_request import Bounds, RetrievalRequest

ITEMS = np.arange(500, 560)
# A context that makes the device give a score that is not a number.
NO_NUMBER_HOUR = 99


@dataclasses.dataclass(frozen=True)
class Encoded:
    user: float
    history: np.ndarray
    hour: float
    k: int
    allowed: np.ndarray | None
    unknown: Unknown

    @property
    def prefix_key(self) -> bytes:
        return hashlib.sha256(self.history.tobytes()).digest()

    @property
    def events(self) -> int:
        return len(self.history)


@dataclasses.dataclass(frozen=True)
class Retrieved:
    items: list[int]
    scores: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prefix:
    owner: ArithmeticRetriever
    value: float
    nbytes: int = 100


@dataclasses.dataclass
class ArithmeticRetriever:
    """See the module.

    Attributes:
      weight: the weights; another model has another one.
      gate: every device call waits for it; a test closes it to let a queue form.
      calls: the device calls so far: what, and the `k` of each request.
    """

    weight: float = 1.0
    max_k: int = 20
    head: str = "next_item"
    objective: str = "retrieval"
    has_prefix: bool = True
    batch_buckets: tuple[int, ...] = BATCHES
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
        return hashlib.sha256(f"items {self.weight}".encode()).hexdigest()

    def encode(self, wanted: RetrievalRequest) -> Encoded:
        request = wanted.request
        age, hour = request.user.get("age"), request.context.get("hour", 0)
        if not isinstance(age, int | float) or not isinstance(hour, int | float):
            raise BadRequest("user.age, context.hour: are no numbers; send numbers")
        k = min(10, self.max_k) if wanted.k is None else wanted.k
        if k > self.max_k:
            raise BadRequest(f"k: {k} is more than {self.max_k}; send at most that")
        seen = request.history.get("item_id", [])
        return Encoded(
            float(age),
            np.asarray(seen, np.float64),
            float(hour),
            k,
            self._allowed(wanted, seen),
            Unknown(0, 0, (), {}, {}),
        )

    def prefill(self, batch: Sequence[Encoded]) -> list[Prefix]:
        self._enter("prefill", batch)
        return [Prefix(self, self._prefix(one)) for one in batch]

    def retrieve(self, batch: Sequence[tuple[Prefix, Encoded]]) -> list[Retrieved]:
        self._enter("retrieve", [one for _, one in batch])
        assert all(prefix.owner is self for prefix, _ in batch)
        return [self._find(prefix.value, one) for prefix, one in batch]

    def expected(self, wanted: RetrievalRequest) -> Retrieved:
        """The answer to a request, computed alone."""
        one = self.encode(wanted)
        return self._find(self._prefix(one), one)

    def _allowed(
        self, wanted: RetrievalRequest, seen: Sequence[int]
    ) -> np.ndarray | None:
        allowed = np.ones(len(ITEMS), bool)
        if wanted.drop_seen:
            allowed &= ~np.isin(ITEMS, list(seen))
        allowed &= ~np.isin(ITEMS, list(wanted.exclude))
        for name, condition in wanted.filter.items():
            if name != "parity" or isinstance(condition, Bounds):
                raise BadRequest(f"filter.{name}: is no feature of items; drop it")
            allowed &= np.isin(ITEMS % 2, condition)
        return None if allowed.all() else allowed

    def _enter(self, what: str, batch: Sequence[Encoded]) -> None:
        self.calls.append((what, [one.k for one in batch]))
        self.entered.release()
        assert self.gate.wait(60)
        if any(one.user == POISON for one in batch):
            raise PoisonError(f"a value of the request: {POISON}")

    def _prefix(self, one: Encoded) -> float:
        powers = np.arange(1, len(one.history) + 1)
        return one.user + float(np.sum(np.sin(one.history) * powers))

    def _find(self, prefix: float, one: Encoded) -> Retrieved:
        scores = np.sin(self.weight * (prefix + one.hour) + ITEMS).astype(np.float32)
        if one.hour == NO_NUMBER_HOUR:
            scores[:] = np.nan
        order = np.argsort(-scores, kind="stable")
        if one.allowed is not None:
            order = order[one.allowed[order]]
        order = order[: one.k]
        return Retrieved(ITEMS[order].tolist(), scores[order])

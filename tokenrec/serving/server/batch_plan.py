"""Which requests, and which slices of them, one device call takes."""

from __future__ import annotations

import dataclasses
from collections import deque
from concurrent.futures import Future
from typing import Any

import numpy as np

from tokenrec.serving.server.metrics import padded
from tokenrec.serving.server.prefix_store import PrefixName

# Objective of a model that finds items; others score candidates.
RETRIEVAL = "retrieval"

# All requests of a batch are padded to its longest candidate list. One that is more than
# this many times as long, or as short, waits for another batch.
_MAX_RATIO = 2

# Requests that are looked at for a batch, as a multiple of its size.
_LOOK_AHEAD = 8


@dataclasses.dataclass(frozen=True)
class BatchLimits:
    """The most that waits, and that one device call takes.

    Attributes:
      batch: requests, or slices of them, of a device call.
      rows: requests times candidates of a device call, both padded.
      candidates: candidates of a slice.
      queue: requests that wait; more are refused.
      mask_bytes: bytes of what the requests that wait say about every item
        (`EncodedRetrieval.allowed`); more are refused.
    """

    batch: int = 16
    rows: int = 4_096
    candidates: int = 512
    queue: int = 256
    mask_bytes: int = 256 << 20


@dataclasses.dataclass(eq=False)
class Job:
    """A request from its submission to its answer.

    Only the thread of the batcher changes it.

    Attributes:
      scorer: the scorer that encoded it.
      encoded: the request: C candidates to score, or items to find.
      name: name of its prefix.
      deadline: time of the clock after which nobody waits.
      submitted: time of the clock.
      future: receives the scores `[C, O]`, or what was found, and `was_held`.
      prefix: prefix of the request, once there is one.
      was_held: whether the prefix was in the store.
      is_over: whether the future has its answer.
    """

    scorer: Any
    encoded: Any
    name: PrefixName
    deadline: float
    submitted: float
    future: Future[tuple[Any, bool]] = dataclasses.field(default_factory=Future)
    prefix: Any = None
    was_held: bool = False
    is_over: bool = False
    _has_begun: bool = False
    _parts: dict[int, Any] = dataclasses.field(default_factory=dict)
    _missing: int = 0

    @property
    def finds_items(self) -> bool:
        """Whether it asks for items, and has no candidates."""
        return bool(self.scorer.objective == RETRIEVAL)

    @property
    def rows(self) -> int:
        """Candidates; 1 of a request for items."""
        return 1 if self.finds_items else int(self.encoded.candidates)

    @property
    def mask_bytes(self) -> int:
        """Bytes of what the request says about every item."""
        if not self.finds_items or self.encoded.allowed is None:
            return 0
        return int(self.encoded.allowed.nbytes)

    def begin(self) -> bool:
        """Mark the request as taken; return False if its caller has cancelled it."""
        if not self._has_begun:
            self._has_begun = True
            self._missing = self.rows
            self.is_over = not self.future.set_running_or_notify_cancel()
        return not self.is_over

    def finish(self, part: Slice, found: Any) -> None:
        """Keep the result of a slice; answer the request with those of the last one."""
        if self.is_over:
            return
        self._parts[part.start] = found
        self._missing -= part.rows
        if not self._missing:
            self.is_over = True
            parts = [self._parts[start] for start in sorted(self._parts)]
            whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
            self.future.set_result((whole, self.was_held))

    def fail(self, error: BaseException) -> None:
        """Answer the request with an error, once."""
        if not self.is_over:
            self.is_over = True
            self.future.set_exception(error)


@dataclasses.dataclass(frozen=True, eq=False)
class Slice:
    """Consecutive candidates of a request.

    Attributes:
      job: the request.
      encoded: the request with these candidates alone.
      start: position of the first of them.
      rows: number of them; 1 of a request for items.
      width: number of them, padded to a compiled size.
    """

    job: Job
    encoded: Any
    start: int
    rows: int
    width: int

    @property
    def is_first(self) -> bool:
        """Whether it holds the first candidate of its request."""
        return self.start == 0


def cut(job: Job, limits: BatchLimits) -> list[Slice]:
    """Cut a request into slices that a compiled program takes."""
    if job.finds_items:
        return [Slice(job, job.encoded, 0, 1, 1)]
    sizes = job.scorer.candidate_buckets
    most = min(limits.candidates, sizes[-1]) if sizes else limits.candidates
    count = job.rows
    if count <= most:
        return [Slice(job, job.encoded, 0, count, padded(count, sizes))]
    slices = []
    for start in range(0, count, most):
        rows = min(most, count - start)
        part = job.encoded.part(start, start + rows)
        slices.append(Slice(job, part, start, rows, padded(rows, sizes)))
    return slices


def take_batch(queue: deque[Slice], limits: BatchLimits) -> list[Slice]:
    """Remove the slices of the next batch from a queue that is not empty.

    The oldest slice is always among them, so none waits for ever. Younger ones join in
    their order if they belong to the same model, are of a similar length, and the padded
    batch stays within the limits.

    Args:
      queue: slices in the order of their arrival.
      limits: the most that a batch takes.
    """
    first = queue.popleft()
    batch, width, passed = [first], first.width, []
    sizes = first.job.scorer.batch_buckets
    most = min(limits.batch, sizes[-1]) if sizes else limits.batch
    for _ in range(min(len(queue), _LOOK_AHEAD * limits.batch)):
        if len(batch) == most:
            break
        one = queue.popleft()
        wider = max(width, one.width)
        fits = (
            one.job.scorer is first.job.scorer
            and one.width <= _MAX_RATIO * first.width
            and first.width <= _MAX_RATIO * one.width
            and padded(len(batch) + 1, sizes) * wider <= limits.rows
        )
        if fits:
            batch.append(one)
            width = wider
        else:
            passed.append(one)
    queue.extendleft(reversed(passed))
    return batch

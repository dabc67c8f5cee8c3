"""Answer the requests that wait in one device call, on one thread.

    submit -> queue -> [ look up prefixes -> prefill the missing -> extend ] -> future

Requests for items end with `retrieve` in place of `extend`.

The thread takes what waits at the moment when the device is free. It never waits for
more: a batch forms by itself while the device is busy, and an idle server answers a lone
request at once.

A long candidate list is cut into slices, which share the prefix. They queue like
requests, so that a short request waits for one device call and not for a whole list.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from tokenrec.serving.server.batch_plan import BatchLimits, Job, Slice, cut, take_batch
from tokenrec.serving.server.metrics import ServerMetrics
from tokenrec.serving.server.prefix_store import PrefixName, PrefixStore

_LOG = logging.getLogger("tokenrec.serving")

# Weight of the newest batch in the running mean of the seconds per slice.
_NEWEST = 0.1


class QueueFullError(Exception):
    """No room for a request.

    Attributes:
      retry_after: seconds after which there should be room again.
    """

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(
            f"{waiting} requests wait already; try again in {retry_after} s, or start "
            "another server"
        )
        self.retry_after = retry_after


class DeadlineError(TimeoutError):
    """A request whose deadline passed before it was scored."""


class ScoreError(RuntimeError):
    """The device gave an answer that is no score."""


class Batcher:
    """Queue of requests, and the thread that scores them.

    `submit` may be called from any thread.

    Args:
      store: prefixes of earlier requests.
      metrics: where stages and batches are counted.
      limits: the most that waits, and that one device call takes.
      clock: seconds that never go backwards.
    """

    def __init__(
        self,
        store: PrefixStore[Any],
        metrics: ServerMetrics,
        limits: BatchLimits,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.store, self.metrics, self.limits = store, metrics, limits
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[Slice] = deque()
        self._waiting = 0
        self._mask_bytes = 0
        self._closing = False
        self._busy_since: float | None = None
        self._seconds_per_slice = 0.0
        self._thread = threading.Thread(target=self._run, name="device", daemon=True)

    def start(self) -> None:
        """Start the thread; what was submitted before waits for it."""
        self._thread.start()

    def submit(
        self, scorer: Any, encoded: Any, name: PrefixName, deadline: float
    ) -> Future[tuple[Any, bool]]:
        """Queue a request.

        Args:
          scorer: `Scorer` or `Retriever` that encoded it, and that will answer it
            whatever model serves by then.
          encoded: the request: C candidates to score, or items to find.
          name: name of its prefix.
          deadline: time of the clock after which nobody waits for the answer.

        Returns:
          Scores `[C, O] float32`, or `Retrieved`; and whether the prefix was in the
          store. It raises DeadlineError if the deadline passed first, and what the
          scorer raised.

        Raises:
          QueueFullError: too many requests wait, or the batcher is closing.
        """
        job = Job(scorer, encoded, name, deadline, submitted=self._clock())
        slices = cut(job, self.limits)
        with self._changed:
            if not self._has_room(job):
                self._drop_cancelled()
            if self._closing or not self._has_room(job):
                raise QueueFullError(self._waiting, self._retry_after())
            self._queue.extend(slices)
            self._waiting += 1
            self._mask_bytes += job.mask_bytes
            self._changed.notify()
        return job.future

    def waiting(self) -> int:
        """Return the number of requests that wait."""
        return self._waiting

    def stuck_seconds(self) -> float:
        """Return for how long the current device call has run; infinite if none can."""
        if not self._thread.is_alive():
            return float("inf")
        since = self._busy_since
        return 0.0 if since is None else self._clock() - since

    def close(self) -> None:
        """Take no more requests, score those that wait, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def _has_room(self, job: Job) -> bool:
        masks = self._mask_bytes + job.mask_bytes
        # One alone may be larger than the limit.
        fits = not self._waiting or masks <= self.limits.mask_bytes
        return fits and self._waiting < self.limits.queue

    def _drop_cancelled(self) -> None:
        """Make room: requests that nobody waits for any more leave the queue."""
        queue, self._queue = self._queue, deque()
        cancelled: list[Slice] = []
        for one in queue:
            # Asked once: another thread may cancel it at this moment.
            is_over = one.job.future.cancelled()
            (cancelled if is_over else self._queue).append(one)
        self._leave(cancelled)

    def _leave(self, slices: Sequence[Slice]) -> list[Job]:
        """Count requests as no longer waiting, by their first slices; return them."""
        jobs = [s.job for s in slices if s.is_first]
        self._waiting -= len(jobs)
        self._mask_bytes -= sum(job.mask_bytes for job in jobs)
        return jobs

    def _retry_after(self) -> int:
        seconds = self._seconds_per_slice * len(self._queue)
        return max(1, min(60, round(seconds + 0.5)))

    def _run(self) -> None:
        while (batch := self._take()) is not None:
            started = self._busy_since = self._clock()
            if batch:
                self._score(batch)
                spent = (self._clock() - started) / len(batch)
                self._seconds_per_slice += _NEWEST * (spent - self._seconds_per_slice)
            self._busy_since = None

    def _take(self) -> list[Slice] | None:
        """Wait for requests; return the slices of a batch, or None at the end."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return None
                self._changed.wait()
            now = self._clock()
            batch = take_batch(self._queue, self.limits)
            begun = self._leave(batch)
        for job in begun:
            self.metrics.seconds.observe(now - job.submitted, "queue")
        return [s for s in batch if self._is_wanted(s.job, now)]

    def _is_wanted(self, job: Job, now: float) -> bool:
        """Whether somebody waits for the request; tells the one whose time is up."""
        if job.is_over:
            return False
        if not job.begin():
            # Cancelled: the caller closed the connection.
            return False
        if now > job.deadline:
            job.fail(DeadlineError("the deadline passed while the request waited"))
            return False
        return True

    def _score(self, batch: Sequence[Slice], may_clear: bool = True) -> None:
        try:
            parts = self._compute(batch)
        except Exception as error:  # noqa: BLE001 - a request must not end the thread
            self.metrics.batch_failures.add(1)
            if _is_out_of_memory(error):
                if may_clear:
                    # Prefixes can be computed again, and requests cannot wait.
                    _LOG.warning(
                        "no memory: %d prefixes were dropped", self.store.clear()
                    )
                    self._score(batch, may_clear=False)
                    return
                error = MemoryError()
            if len(batch) == 1:
                # Its text may hold values of the request, which are never logged.
                _LOG.error("a request failed on the device: %s", type(error).__name__)
                batch[0].job.fail(error)
                return
            # One of them may be at fault: its batch mates must not suffer.
            for one in batch:
                self._score([one], may_clear)
            return
        for one, part in zip(batch, parts, strict=True):
            one.job.finish(one, part)

    def _compute(self, batch: Sequence[Slice]) -> list[Any]:
        """Return the result of every slice: `[c, O] float32`, or `Retrieved`."""
        first = batch[0].job
        if first.scorer.has_prefix:
            self._find_prefixes(batch)
        begin = self._clock()
        if first.finds_items:
            found = first.scorer.retrieve([(s.job.prefix, s.encoded) for s in batch])
            self.metrics.seconds.observe(self._clock() - begin, "retrieve")
            self.metrics.observe_retrieval(
                [len(one.items) for one in found], first.scorer.batch_buckets
            )
            return list(_checked_items(found, [s.encoded.k for s in batch]))
        scorer = first.scorer
        if scorer.has_prefix:
            parts = scorer.extend([(s.job.prefix, s.encoded) for s in batch])
        else:
            parts = scorer.score([s.encoded for s in batch])
        self.metrics.seconds.observe(self._clock() - begin, "extend")
        sizes = [s.rows for s in batch]
        self.metrics.observe_batch(
            sizes, scorer.batch_buckets, scorer.candidate_buckets
        )
        return list(_checked(parts, sizes))

    def _find_prefixes(self, batch: Sequence[Slice]) -> None:
        """Give every request of the batch its prefix: held, or computed in one call."""
        missing: dict[PrefixName, list[Job]] = {}
        for job in {id(s.job): s.job for s in batch}.values():
            if job.prefix is not None:
                continue
            job.prefix = self.store.get(job.name)
            job.was_held = job.prefix is not None
            if job.prefix is None:
                # Two requests of one user share the computation.
                missing.setdefault(job.name, []).append(job)
        if not missing:
            return
        begin = self._clock()
        scorer = batch[0].job.scorer
        prefixes = scorer.prefill([jobs[0].encoded for jobs in missing.values()])
        self.metrics.seconds.observe(self._clock() - begin, "prefill")
        for (name, jobs), prefix in zip(missing.items(), prefixes, strict=True):
            self.store.put(name, prefix)
            for job in jobs:
                job.prefix = prefix


def _is_out_of_memory(error: Exception) -> bool:
    """Whether Python or the device had no memory; XLA says so in its text alone."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def _checked(parts: Sequence[np.ndarray], sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """Yield the scores of each slice; refuse what cannot be scores."""
    for part, size in zip(parts, sizes, strict=True):
        if len(part) != size:
            raise ScoreError(f"{len(part)} scores for {size} candidates")
        if not np.isfinite(part).all():
            raise ScoreError("a score is not finite")
        yield part


def _checked_items(found: Sequence[Any], most: Sequence[int]) -> Iterator[Any]:
    """Yield what was found for each request; refuse what cannot be an answer."""
    for one, k in zip(found, most, strict=True):
        if len(one.items) != len(one.scores) or len(one.items) > k:
            raise ScoreError(
                f"{len(one.items)} items and {len(one.scores)} scores for k={k}"
            )
        if not np.isfinite(one.scores).all():
            raise ScoreError("a score is not finite")
        yield one

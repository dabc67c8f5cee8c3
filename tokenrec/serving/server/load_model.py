"""Load an artifact to serve it: digests, compiled shapes, golden scores, live state."""

from __future__ import annotations

import dataclasses
import logging
import time
from pathlib import Path

from tokenrec.serving.golden import replay_golden
from tokenrec.serving.live.state import LiveState
from tokenrec.serving.request import Limits
from tokenrec.serving.retriever import Retriever
from tokenrec.serving.scorer import Scorer, open_artifact
from tokenrec.serving.server.batch_plan import BatchLimits
from tokenrec.serving.server.model_slot import ServedModel, ready

_LOG = logging.getLogger("tokenrec.serving")

# Sizes that candidate lists are padded to: at most half as many rows again, mostly less.
_CANDIDATES = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


@dataclasses.dataclass(frozen=True)
class ModelLoader:
    """Load artifacts in one way.

    Attributes:
      batch: limits of a device call.
      limits: limits of a request.
      allow_missing: features that a request need not have; they are null then.
      journals: folder of the journals of events, a file for each artifact; None keeps
        events in memory alone.
    """

    batch: BatchLimits
    limits: Limits
    allow_missing: tuple[str, ...] = ()
    journals: Path | None = None

    def __call__(self, folder: Path) -> ServedModel:
        """Open an artifact, compile every shape, and replay its golden requests.

        Raises:
          InputError: it is damaged, or scores what `tokenrec predict` did not.
        """
        begin = time.monotonic()
        scorer = open_artifact(folder, allow_missing=self.allow_missing)
        opened = time.monotonic()
        shapes = self._warm(scorer)
        warmed = time.monotonic()
        artifact = scorer.artifact
        count = replay_golden(
            scorer, artifact.golden(), self.batch.batch, artifact.manifest["tolerance"]
        )
        live = self._open_live(scorer)
        _LOG.info(
            "%s: files checked in %.1f s, %d shapes ready in %.1f s, %d golden requests "
            "scored in %.1f s",
            folder.name,
            opened - begin,
            shapes,
            warmed - opened,
            count,
            time.monotonic() - warmed,
        )
        return ready(scorer, folder, live)

    def _warm(self, scorer: Scorer | Retriever) -> int:
        """Compile every shape; return their number."""
        batches = batch_sizes(self.batch.batch)
        if isinstance(scorer, Retriever):
            return scorer.warm(batches)
        most = min(self.batch.candidates, self.limits.candidates)
        return scorer.warm(batches, candidate_sizes(most))

    def _open_live(self, scorer: Scorer | Retriever) -> LiveState | None:
        counters = scorer.artifact.counters
        if counters is None:
            return None
        if self.journals is None:
            return LiveState.open(counters)
        self.journals.mkdir(parents=True, exist_ok=True)
        # Events of a journal go on from the counters of one artifact.
        return LiveState.open(counters, self.journals / f"{scorer.digest}.journal")


def batch_sizes(most: int) -> tuple[int, ...]:
    """Return the compiled numbers of requests of a batch.

    >>> batch_sizes(12)
    (1, 2, 4, 8, 12)
    """
    sizes = []
    size = 1
    while size < most:
        sizes.append(size)
        size *= 2
    return (*sizes, most)


def candidate_sizes(most: int) -> tuple[int, ...]:
    """Return the compiled numbers of candidates of a request, or of a slice of one.

    >>> candidate_sizes(20)
    (8, 16, 24)
    """
    return tuple(
        size
        for before, size in zip((0, *_CANDIDATES), _CANDIDATES, strict=False)
        if before < most
    )

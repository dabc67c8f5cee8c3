"""Score the requests that an artifact carries, and compare with the scores it carries.

The scores are those of `tokenrec predict` when the artifact was exported. Another
version, processor or compiler that computes something else shows here, before a caller
sees a score of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.serving.request import Limits, parse_request

# What the artifact carries was scored when it was exported: no limit is meant for it.
_ANY = 1 << 60
_NO_LIMITS = Limits(_ANY, _ANY, _ANY, _ANY, _ANY)


def replay_golden(
    scorer: Any, golden: Iterable[tuple[Any, Any]], batch: int, tolerance: float
) -> int:
    """Score golden requests in batches, as the server does.

    Args:
      scorer: scorer of the artifact.
      golden: requests, as callers send them, and their scores `[C, O]`.
      batch: requests of a batch.
      tolerance: largest difference of a score; of a number that is larger than 1,
        relative.

    Returns:
      Number of requests.

    Raises:
      InputError: a score differs by more, or there is no request at all.
    """
    count = 0
    for rows in itertools.batched(golden, batch):
        encoded = [scorer.encode(parse_request(row, _NO_LIMITS)) for row, _ in rows]
        if scorer.has_prefix:
            prefixes = scorer.prefill(encoded)
            found = scorer.extend(list(zip(prefixes, encoded, strict=True)))
        else:
            found = scorer.score(encoded)
        for (_, scores), computed in zip(rows, found, strict=True):
            _compare(scorer, count, np.asarray(scores), computed, tolerance)
            count += 1
    if not count:
        raise InputError(
            f"artifact '{scorer.artifact.path}': holds no golden request to check its "
            "scores with; export the run again"
        )
    return count


def _compare(
    scorer: Any,
    number: int,
    expected: np.ndarray,
    computed: np.ndarray,
    tolerance: float,
) -> None:
    where = f"artifact '{scorer.artifact.path}': golden request {number}"
    remedy = "export the run again with the versions that serve it"
    if expected.shape != computed.shape:
        raise InputError(
            f"{where}: {computed.shape} scores, and the artifact has {expected.shape}; "
            f"{remedy}"
        )
    difference = np.abs(expected - computed) / np.maximum(1.0, np.abs(expected))
    # Written so that NaN fails.
    if not (difference <= tolerance).all():
        place = np.unravel_index(
            np.argmax(np.nan_to_num(difference, nan=np.inf)), difference.shape
        )
        raise InputError(
            f"{where}: {scorer.outputs[place[1]]} of candidate {place[0]} is "
            f"{computed[place]:.8f}, and {expected[place]:.8f} by `tokenrec predict`, "
            f"more than {tolerance:g} apart; {remedy}"
        )

"""Answer the requests that an artifact carries, and compare with what it carries.

The answers are those of `tokenrec predict` when the artifact was exported. Another
version, processor or compiler that computes something else shows here, before a caller
sees a score of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.serving.compare_items import find_difference
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.retrieval_request import parse_retrieval

# What the artifact carries was scored when it was exported: no limit is meant for it.
_ANY = 1 << 60
_NO_LIMITS = Limits(_ANY, _ANY, _ANY, _ANY, _ANY)
_REMEDY = "export the run again with the versions that serve it"


def replay_golden(
    scorer: Any, golden: Iterable[tuple[Any, Any]], batch: int, tolerance: float
) -> int:
    """Answer golden requests in batches, as the server does.

    Args:
      scorer: `Scorer` or `Retriever` of the artifact.
      golden: requests, as callers send them, and their answers (`Artifact.golden`).
      batch: requests of a batch.
      tolerance: largest difference of a score; of a number that is larger than 1,
        relative.

    Returns:
      Number of requests.

    Raises:
      InputError: an answer differs by more, or there is no request at all.
    """
    count = 0
    for rows in itertools.batched(golden, batch):
        if scorer.objective == "retrieval":
            _replay_items(scorer, count, rows, tolerance)
        else:
            _replay_scores(scorer, count, rows, tolerance)
        count += len(rows)
    if not count:
        raise InputError(
            f"artifact '{scorer.artifact.path}': holds no golden request to check its "
            "scores with; export the run again"
        )
    return count


def _replay_scores(
    scorer: Any, first: int, rows: Sequence[tuple[Any, Any]], tolerance: float
) -> None:
    encoded = [scorer.encode(parse_request(row, _NO_LIMITS)) for row, _ in rows]
    if scorer.has_prefix:
        prefixes = scorer.prefill(encoded)
        found = scorer.extend(list(zip(prefixes, encoded, strict=True)))
    else:
        found = scorer.score(encoded)
    for number, ((_, scores), computed) in enumerate(
        zip(rows, found, strict=True), first
    ):
        _compare(scorer, number, np.asarray(scores), computed, tolerance)


def _replay_items(
    retriever: Any, first: int, rows: Sequence[tuple[Any, Any]], tolerance: float
) -> None:
    """Compare the best items; more are asked for than are compared (compare_items.py)."""
    encoded = [
        retriever.encode(parse_retrieval({"k": retriever.max_k} | request, _NO_LIMITS))
        for request, _ in rows
    ]
    prefixes = retriever.prefill(encoded)
    found = retriever.retrieve(list(zip(prefixes, encoded, strict=True)))
    for number, ((_, wanted), answer) in enumerate(
        zip(rows, found, strict=True), first
    ):
        difference = find_difference(wanted, answer, tolerance)
        if difference is not None:
            raise InputError(
                f"artifact '{retriever.artifact.path}': golden request {number}: "
                f"{difference} as by `tokenrec predict`, within {tolerance:g}; {_REMEDY}"
            )


def _compare(
    scorer: Any,
    number: int,
    expected: np.ndarray,
    computed: np.ndarray,
    tolerance: float,
) -> None:
    where = f"artifact '{scorer.artifact.path}': golden request {number}"
    if expected.shape != computed.shape:
        raise InputError(
            f"{where}: {computed.shape} scores, and the artifact has {expected.shape}; "
            f"{_REMEDY}"
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
            f"more than {tolerance:g} apart; {_REMEDY}"
        )

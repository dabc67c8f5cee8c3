"""Check an artifact against `tokenrec predict`, and keep requests to check it again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.serving.artifact import GOLDEN_FILE
from tokenrec.serving.compare_items import count_swaps, find_difference
from tokenrec.serving.export.requests import PredictedItems, PredictedRequest
from tokenrec.serving.request import Limits, parse_request
from tokenrec.serving.retrieval_request import parse_retrieval
from tokenrec.serving.scorer import open_retriever, open_scorer

# Requests that an artifact keeps.
GOLDEN_REQUESTS = 64

type Predicted = PredictedRequest | PredictedItems


def check_answers(
    folder: Path, predicted: Sequence[Predicted], tolerance: float
) -> dict[str, int]:
    """Check the answers of an artifact against those of `predict`.

    Returns:
      What the manifest says of it: of a retrieval run `swapped`, the ranks that hold
      another item of equal score.

    Raises:
      InputError: an answer differs by more than the tolerance.
    """
    of_items = [one for one in predicted if isinstance(one, PredictedItems)]
    if of_items:
        return {"swapped": _check_items(folder, of_items, tolerance)}
    of_scores = [one for one in predicted if isinstance(one, PredictedRequest)]
    _check_scores(folder, of_scores, tolerance)
    return {}


def _check_scores(
    folder: Path, predicted: Sequence[PredictedRequest], tolerance: float
) -> None:
    """Check the scores of an artifact against those of `predict`.

    Raises:
      InputError: one differs by more than the tolerance.
    """
    scorer = open_scorer(folder, check=False)
    limits = _no_limits()
    requests = [
        scorer.encode(parse_request(json.loads(json.dumps(request)), limits))
        for request, _ in predicted
    ]
    scores = scorer.score(requests)
    for number, (found, (_, wanted)) in enumerate(zip(scores, predicted, strict=True)):
        difference = np.abs(found - wanted) / np.maximum(np.abs(wanted), 1)
        # Written so that NaN fails.
        if not (difference <= tolerance).all():
            raise InputError(
                f"--tolerance {tolerance:g}: request {number} of {len(predicted)} has a "
                f"score that differs by {np.nanmax(difference):.3g} from that of "
                "`tokenrec predict`; raise the tolerance if that is rounding, and "
                "otherwise report it"
            )


def _check_items(
    folder: Path, predicted: Sequence[PredictedItems], tolerance: float
) -> int:
    """Check the items of an artifact against those of `predict`.

    Returns:
      The number of ranks that hold another item of equal score.

    Raises:
      InputError: an answer differs by more than rounding.
    """
    retriever = open_retriever(folder, check=False)
    limits = _no_limits()
    requests = []
    for wanted in predicted:
        # Longer answers show where an item went.
        value = json.loads(json.dumps(wanted.request)) | {"k": retriever.max_k}
        requests.append(retriever.encode(parse_retrieval(value, limits)))
    prefixes = retriever.prefill(requests)
    answers = retriever.retrieve(list(zip(prefixes, requests, strict=True)))
    swapped = 0
    for number, (found, wanted) in enumerate(zip(answers, predicted, strict=True)):
        # A shorter answer than that of `predict` was asked for.
        count = min(len(wanted.items), retriever.max_k)
        expected = wanted.items[:count], wanted.scores[:count]
        difference = find_difference(expected, found, tolerance)
        if difference is not None:
            raise InputError(
                f"--tolerance {tolerance:g}: request {number} of {len(predicted)}: "
                f"{difference} as by `tokenrec predict`; raise the tolerance if that is "
                "rounding, and otherwise report it"
            )
        swapped += count_swaps(expected[0], found)
    return swapped


def write_golden(
    folder: Path, predicted: Sequence[Predicted], max_k: int | None = None
) -> None:
    """Keep some of the requests with the answers of `predict`, evenly spread.

    Args:
      folder: folder of the artifact.
      predicted: requests and answers.
      max_k: items of an answer that are kept; None for all.
    """
    count = min(GOLDEN_REQUESTS, len(predicted))
    chosen = [predicted[i * len(predicted) // count] for i in range(count)]
    lines = [json.dumps(_as_json(one, max_k), allow_nan=False) for one in chosen]
    (folder / GOLDEN_FILE).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _as_json(predicted: Predicted, max_k: int | None) -> dict[str, Any]:
    if isinstance(predicted, PredictedRequest):
        scores = predicted.predictions.tolist()
        return {"request": predicted.request, "scores": scores}
    return {
        "request": predicted.request,
        "items": predicted.items[:max_k],
        "scores": predicted.scores[:max_k].tolist(),
    }


def _no_limits() -> Limits:
    most = 1 << 31
    return Limits(most, most, most, most, most)

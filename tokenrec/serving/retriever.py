"""Answer requests for items with the programs of an artifact.

    retriever = open_artifact(path)
    encoded = retriever.encode(parse_retrieval(value, Limits()))
    (prefix,) = retriever.prefill([encoded])            # keep it for the next request
    (found,) = retriever.retrieve([(prefix, encoded)])  # items and scores, best first

Letters: B requests, V items, n items of an answer.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from tokenrec.serving.encoded import Arrays, Unknown
from tokenrec.serving.retrieval_request import ItemId


@dataclasses.dataclass(frozen=True)
class EncodedRetrieval:
    """A request for items as arrays.

    Attributes:
      prefix: what the prefix depends on: user, history and, if the prompt has one, the
        query. No batch dimension.
      prefix_key: digest of `prefix`; it depends neither on `k` nor on `allowed`.
      events: events of the history that the model reads.
      unknown: what the model does not know; it counts no candidate.
      k: length of the answer.
      allowed: `[V] bool`, items that the answer may hold; None for all.
    """

    prefix: Arrays
    prefix_key: bytes
    events: int
    unknown: Unknown
    k: int
    allowed: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """The answer to a request, best item first.

    Attributes:
      items: n original ids, n <= k: fewer where fewer items are allowed.
      scores: `[n] float32`. Next item: the score of the head. Semantic id: the
        log-probability of the item.
    """

    items: list[ItemId]
    scores: np.ndarray

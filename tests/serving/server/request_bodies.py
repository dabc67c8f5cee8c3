"""Random requests, and their JSON."""

from __future__ import annotations

from typing import Any

import numpy as np

from tokenrec.serving.request import Limits, Request, parse_request
from tokenrec.serving.retrieval_request import RetrievalRequest, parse_retrieval


def body_of(
    seed: int, candidates: int | None = None, events: int = 4
) -> dict[str, Any]:
    """A request as a caller sends it; another seed is another user, past and items."""
    random = np.random.default_rng(seed)
    count = candidates or int(random.integers(1, 20))
    times = np.sort(random.integers(0, 10_000, events)).tolist()
    return {
        "user": {"user_id": seed, "age": int(random.integers(10, 90))},
        "time_ms": 20_000,
        "history": {"time_ms": times, "item_id": times} if events else {},
        "context": {"hour": int(random.integers(24))},
        "candidates": {"item_id": random.integers(0, 600, count).tolist()},
    }


def request_of(seed: int, candidates: int | None = None, events: int = 4) -> Request:
    """The same, parsed."""
    return parse_request(body_of(seed, candidates, events), Limits())


def retrieval_body_of(seed: int, events: int = 4) -> dict[str, Any]:
    """A request for items; another seed asks for others, and leaves others out."""
    random = np.random.default_rng(seed)
    body = body_of(seed, 1, events)
    del body["candidates"]
    if events:
        body["history"]["item_id"] = random.integers(500, 560, events).tolist()
    body["k"] = int(random.integers(1, 20))
    if seed % 2:
        body["drop_seen"] = bool(seed % 4 == 1)
        body["exclude"] = random.integers(490, 560, seed % 30).tolist()
    if seed % 3 == 1:
        body["filter"] = {"parity": [seed % 2]}
    return body


def retrieval_of(seed: int, events: int = 4) -> RetrievalRequest:
    """The same, parsed."""
    return parse_retrieval(retrieval_body_of(seed, events), Limits())

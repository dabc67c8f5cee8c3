"""A declaration with statistics of every kind, and small logs for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tests.data.memory_source import MemorySource
from tests.data.past.reference import Row

DECLARED: dict[str, Any] = {
    "keys": [
        "item_id",
        {"key": "user_id", "means": "price", "horizons": ["1m", "2h", "last 3"]},
        {
            "key": ["user_id", "author"],
            "tasks": ["click"],
            "horizons": ["all", "2h", "last 5"],
        },
        {"key": ["tab", "city"], "parent": "city", "strength": 2.5, "means": "price"},
        {"key": ["tab", "tags"], "parent": [], "name": "topic", "tasks": []},
    ],
    "matches": [
        "item_id",
        {"of": "tags", "tasks": "like", "horizons": ["2h", "last 1", "last 5"]},
    ],
    "times": {
        "gap": True,
        "idle_after": "price",
        "unit": "m",
        "session": "30m",
    },
}
USERS = {"user_id": [0, 1, 2], "city": ["a", "b", None], "age": [1.0, 2.0, 3.0]}
ITEMS = {
    "item_id": [0, 1, 2, 3],
    "author": ["x", "y", "x", None],
    "duration": [1.0] * 4,
    "tags": [[1, 2], [2], [1, 2, 3], []],
}


def source(rows: Sequence[Row], batch_rows: int = 7) -> MemorySource:
    columns: dict[str, Any] = {name: [r[name] for r in rows] for name in rows[0]}
    for name in ("label_click", "label_like"):
        columns[name] = pa.array(columns[name], pa.int8())
    for name, kind in (("tab", pa.int64()), ("price", pa.float64())):
        columns[name] = pa.array(columns[name], kind)
    columns["split"] = pa.array([0] * len(rows), pa.int8())
    return MemorySource(columns, USERS, ITEMS, batch_rows=batch_rows)


def random_rows(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    time = np.sort(rng.integers(0, 3 * count, count)) * 40_000
    out = []
    for i in range(count):
        label = [None, 0, 1]
        out.append(
            {
                "user_id": int(rng.integers(4)),
                "item_id": int(rng.integers(5)),
                "time_ms": int(time[i]),
                "event": bool(rng.random() < 0.8),
                "scored": bool(rng.random() < 0.8),
                "label_click": label[rng.integers(3)],
                "label_like": label[rng.integers(3)],
                "tab": label[rng.integers(3)],
                "price": float(np.float32(rng.normal())),
            }
        )
    return out

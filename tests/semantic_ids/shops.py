"""A small shop as a prepared data set.

Users buy in one of three aisles, and the words of an item name its aisle.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

from tests.data.memory_source import MemorySource
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema

AISLES = {
    "fish": ("salmon", "tuna", "fish"),
    "paint": ("brush", "varnish", "paint"),
    "tea": ("green tea", "cup", "tea"),
}
ITEMS = 12  # of each aisle
COLD = 3  # items of the last aisle that no train row holds


def item_aisle(item_id: np.ndarray) -> np.ndarray:
    return np.asarray(item_id) % 100 // ITEMS


def prepare_shop(
    folder: Path,
    *,
    text: bool = True,
    title: str = "",
    seed: int = 0,
    chunk_events: int = 4096,
) -> Path:
    """Prepare items 100 to 135, and users who buy a dozen of one aisle in train.

    In valid they buy some items of the next aisle. With `title`, a format of `word`,
    `aisle`, `number`, `ounces` and `more`, which is not empty for even numbers, all items
    but the last have a title, a feature of kind text.
    """
    random = np.random.default_rng(seed)
    user, item, time, split = [], [], [], []
    for u in range(60):
        first = 100 + u % 3 * ITEMS
        warm = ITEMS - (COLD if u % 3 == 2 else 0)
        bought = first + random.integers(0, warm, 12)
        later = 100 + (u + 1) % 3 * ITEMS + random.integers(0, ITEMS, 4)
        user += [u] * 16
        item += [*bought.tolist(), *later.tolist()]
        time += list(range(16))
        split += [0] * 12 + [1] * 4
    ids = np.arange(100, 100 + 3 * ITEMS)
    names = [list(AISLES)[a] for a in item_aisle(ids)]
    features = [
        Feature("item_id", "categorical", "item"),
        Feature("size", "dense", "item"),
    ]
    items: dict[str, object] = {"item_id": ids, "size": np.ones(len(ids))}
    if text:
        features += [
            Feature("aisle", "categorical", "item"),
            Feature("words", "multi_valued", "item", length=2),
        ]
        items |= {
            "aisle": names,
            "words": [[AISLES[n][i % 3], f"{i % 4} oz"] for i, n in enumerate(names)],
        }
    if title:
        features.append(Feature("title", "text", "item", length=16, codes=300))
        titles = [
            title.format(
                word=AISLES[n][i % 3],
                aisle=n,
                number=i,
                ounces=i % 4,
                more="" if i % 2 else " new",
            )
            for i, n in enumerate(names)
        ]
        items["title"] = [*titles[:-1], None]
    rows = {
        "user_id": np.array(user),
        "item_id": np.array(item),
        "time_ms": np.array(time),
        "split": pa.array(split, pa.int8()),
        "scored": np.zeros(len(user), bool),
    }
    prepare(
        MemorySource(rows, item_columns=items, schema=Schema(tuple(features), ())),
        folder,
        chunk_events=chunk_events,
        overlap=3,
    )
    return folder

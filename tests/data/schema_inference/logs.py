"""Small logs with known columns, for tests of `tokenrec init`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

START = 1_640_995_200  # 2022-01-01 UTC, seconds
DAYS = 30


def clicks(rows: int = 900, users: int = 40, items: int = 30) -> dict[str, Any]:
    """Columns of a log of impressions: user, item, time, click and more."""
    random = np.random.default_rng(0)
    item = random.integers(0, items, rows)
    seconds = START + np.sort(random.integers(0, DAYS * 86_400, rows))
    click = (random.random(rows) < 0.2 + 0.5 * (item % 2)).astype(int)
    return {
        "uid": random.integers(0, users, rows),
        "sku": [f"s{i}" for i in item],
        "ts": seconds * 1000,
        "device": [["phone", "desk"][i] for i in random.integers(0, 2, rows)],
        "dwell": np.where(click, random.random(rows) * 60, random.random(rows)),
        "price": 1.5 + item * 0.75,
        "click": click,
        "row": np.arange(rows),
        "version": [1] * rows,
        "hour": seconds // 3600 % 24,
    }


def write_csv(path: Path, columns: dict[str, Any], delimiter: str = ",") -> Path:
    """Write columns as text; None is an empty field."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.csv.write_csv(
        pa.table({name: pa.array(values) for name, values in columns.items()}),
        path,
        pyarrow.csv.WriteOptions(delimiter=delimiter, quoting_style="needed"),
    )
    return path


def write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pyarrow.parquet.write_table(pa.table(columns), path)
    return path

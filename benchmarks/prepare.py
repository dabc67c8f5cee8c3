"""Measure peak memory and speed of `prepare` on generated logs of growing length.

    python benchmarks/prepare.py [--rows 1000000 4000000 16000000] [--out DIR]

The number of users, items and values is fixed, so that memory must not grow with the
log. Each length is prepared in a process of its own, whose peak resident memory the
kernel reports: `peak_mib`, and `peak_mib_before` for the process before it reads the
log. Seconds include the generation of the rows.

Writes prepare.json and prepare.md to `--out`, by default benchmarks/results. It takes
about five minutes on one core and 4 GB of disk for the longest log.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from report import write_result

from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance

USERS, ITEMS, AUTHORS, BATCH_ROWS = 20_000, 50_000, 5_000, 50_000


class GeneratedSource:
    """Log rows of random users and items.

    A row has 16 columns: ids, time, split, flags, request, 2 labels and 7 features.
    """

    provenance = Provenance("generated", "none", "", ())
    schema = Schema(
        (
            Feature("user_id", "categorical", "user"),
            Feature("age", "dense", "user"),
            Feature("author", "categorical", "item"),
            Feature("duration", "dense", "item", transform="log1p"),
            Feature("tab", "categorical", "context"),
            Feature("city", "categorical", "context"),
            Feature("session", "categorical", "context"),
            Feature("hour", "categorical", "context"),
            Feature("speed", "dense", "context"),
            Feature("watched", "dense", "action"),
            Feature("reaction", "categorical", "action"),
        ),
        (Task("click"), Task("like")),
    )

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def users(self) -> pa.Table:
        return pa.table(
            {"user_id": np.arange(USERS), "age": np.arange(USERS) % 70 + 10.0}
        )

    def items(self) -> pa.Table:
        items = np.arange(ITEMS)
        authors = pa.array([f"author {i}" for i in range(AUTHORS)])
        return pa.table(
            {
                "item_id": items,
                "author": authors.take(items % AUTHORS),
                "duration": items % 100 + 1.0,
            }
        )

    def rows(self) -> Iterator[pa.RecordBatch]:
        cities = pa.array([f"city {i}" for i in range(300)])
        for first in range(0, self._rows, BATCH_ROWS):
            count = min(BATCH_ROWS, self._rows - first)
            # Each batch has a generator of its own: nothing is kept between batches.
            random = np.random.default_rng(first)
            time_ms = random.integers(0, 10**10, count)
            columns: dict[str, Any] = {
                "user_id": random.integers(0, USERS, count),
                "item_id": random.integers(0, ITEMS, count),
                "time_ms": time_ms,
                "split": (time_ms >= 8 * 10**9).astype(np.int8)
                + (time_ms >= 9 * 10**9).astype(np.int8),
                "event": np.ones(count, bool),
                "scored": random.random(count) < 0.9,
                "request": np.full(count, -1),
                "label_click": random.integers(0, 2, count).astype(np.int8),
                "label_like": random.integers(-1, 2, count).astype(np.int8),
                "tab": random.integers(0, 15, count),
                "city": cities.take(pa.array(random.integers(0, len(cities), count))),
                "session": random.integers(0, 100_000, count),
                "hour": random.integers(0, 24, count),
                "speed": random.normal(size=count),
                "watched": random.random(count),
                "reaction": random.integers(0, 4, count),
            }
            yield pa.RecordBatch.from_pydict(columns)


def measure(rows: int) -> dict[str, float]:
    """Prepare a log of `rows` log rows in this process, and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        before = _peak_mib()
        cpu, wall = time.process_time(), time.perf_counter()
        metadata = prepare(GeneratedSource(rows), Path(folder) / "set")
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        size = sum(
            path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()
        )
    return {
        "rows": rows,
        "rows_kept": sum(
            metadata.counts[f"rows_{split}"] for split in ("train", "valid", "test")
        ),
        "peak_mib": round(_peak_mib(), 1),
        "peak_mib_before": round(before, 1),
        "seconds": round(wall, 2),
        "cpu_seconds": round(cpu, 2),
        "rows_per_second": round(rows / wall),
        "data_set_mib": round(size / 2**20, 1),
    }


def _peak_mib() -> float:
    # Linux reports kilobytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1_000_000, 4_000_000, 16_000_000]
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument(
        "--measure",
        type=int,
        help="measure one length in this process and print it as JSON",
    )
    arguments = parser.parse_args()
    if arguments.measure is not None:
        print(json.dumps(measure(arguments.measure)))
        return
    results = []
    for rows in arguments.rows:
        child = [sys.executable, __file__, "--measure", str(rows)]
        results.append(
            json.loads(
                subprocess.run(
                    child, check=True, stdout=subprocess.PIPE, text=True
                ).stdout
            )
        )
        print(results[-1], flush=True)
    write_result(
        arguments.out / "prepare",
        results,
        {
            "users": USERS,
            "items": ITEMS,
            "authors": AUTHORS,
            "sessions": 100_000,
            "columns": 16,
        },
        "python benchmarks/prepare.py --rows " + " ".join(map(str, arguments.rows)),
        title="Prepare: peak memory and speed at a fixed number of distinct ids",
        packages=("tokenrec", "numpy", "pyarrow", "array-record"),
    )


if __name__ == "__main__":
    main()

"""Measure `tokenrec prepare delimited` on a log of many rows and many string ids.

    python benchmarks/prepare_scale.py --work DIR [--rows 100000000] [--memory 2GiB]

The log is generated once below `--work`, CSV files of 10 million rows in the order of
time: user, item, time, tab, hour, two labels, share played. A user or an item is a
string of 14 characters without order; users are drawn uniformly from 17 per 100 rows,
items from 4 per 100, half of them by a power law. `prepare` runs as a process of its
own, which is watched:

- `anonymous_mib`: peak of its own memory, which no kernel can drop;
- `resident_mib`: peak with the pages of mapped files, which it can;
- `disk_mib`: peak of the folder of the data set with its temporary files.

Results are kept by rows, ids and memory in `prepare_scale.json` of `--out`: a run adds
its own. 100 million rows take about 20 minutes, 6 GB for the log and 13 GB beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
from report import kept_rows, write_result

FILE_ROWS, BLOCK_ROWS = 10_000_000, 1_000_000
USERS_PER_ROW, ITEMS_PER_ROW = 0.17, 0.04
FIRST_MS, DAYS = 1_650_000_000_000, 60
DAY_MS = 86_400_000
SCHEMA = {
    "features": [
        {"name": "user_id", "kind": "categorical", "entity": "user"},
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "tab", "kind": "categorical", "entity": "context"},
        {"name": "hour", "kind": "categorical", "entity": "context"},
        {"name": "share", "kind": "dense", "entity": "action"},
    ],
    "tasks": [{"name": "click"}, {"name": "like"}],
}
_HEX = np.frombuffer(b"0123456789abcdef", np.uint8)


def names(prefix: str, numbers: np.ndarray) -> pa.Array:
    """Strings of 14 characters, whose order is not that of `numbers: [n]`."""
    # The finaliser of SplitMix64 maps numbers to numbers one to one.
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ mixed >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ mixed >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    characters = np.empty((len(numbers), 14), np.uint8)
    characters[:, 0] = ord(prefix)
    for digit in range(13):
        nibble = mixed >> np.uint64(4 * digit) & np.uint64(15)
        characters[:, 13 - digit] = _HEX[nibble]
    fixed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(14), len(numbers), [None, pa.py_buffer(characters)]
    )
    return fixed.cast(pa.binary()).cast(pa.string())


def block(first: int, count: int, rows: int) -> pa.RecordBatch:
    """Log rows `first` to `first + count` of `rows`."""
    random = np.random.default_rng(first)
    users, items = int(rows * USERS_PER_ROW), int(rows * ITEMS_PER_ROW)
    item = random.integers(0, items, count)
    popular = random.random(count) < 0.5
    item[popular] = items * random.random(int(popular.sum())) ** 4
    at = FIRST_MS + (first + np.arange(count)) * (DAYS * DAY_MS) // rows
    return pa.RecordBatch.from_pydict(
        {
            "user_id": names("u", random.integers(0, users, count)),
            "item_id": names("i", item),
            "time_ms": at,
            "tab": names("t", random.integers(0, 15, count)),
            "hour": at // 3_600_000 % 24,
            "click": random.integers(0, 2, count),
            "like": (random.random(count) < 0.05).astype(np.int8),
            "share": random.random(count).round(3),
        }
    )


def generate(folder: Path, rows: int) -> None:
    """Write the log below `folder`; files that are there are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.json").write_text(json.dumps(SCHEMA))
    for number, first in enumerate(range(0, rows, FILE_ROWS)):
        path = folder / f"log_{number:03d}.csv"
        if path.exists():
            continue
        part = path.with_suffix(".part")
        end = min(first + FILE_ROWS, rows)
        writer = None
        for start in range(first, end, BLOCK_ROWS):
            batch = block(start, min(BLOCK_ROWS, end - start), rows)
            if writer is None:
                writer = pyarrow.csv.CSVWriter(part, batch.schema)
            writer.write_batch(batch)
        writer.close()
        part.rename(path)


def watch(command: list[str], folder: Path) -> dict[str, Any]:
    """Run a command; return its time, and the peaks of its memory and its folder."""
    begin = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    anonymous = resident = disk = 0
    while child.poll() is None:
        status = _status(child.pid)
        anonymous = max(anonymous, status.get("RssAnon", 0))
        resident = max(resident, status.get("VmHWM", 0))
        if int(time.perf_counter() - begin) % 5 == 0:
            disk = max(disk, _folder_bytes(folder))
        time.sleep(0.2)
    usage = os.times()
    if child.returncode:
        raise SystemExit(f"{command} ended with {child.returncode}")
    return {
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(usage.children_user + usage.children_system, 1),
        "anonymous_mib": round(anonymous / 1024),
        "resident_mib": round(resident / 1024),
        "disk_mib": round(disk / 2**20),
    }


def _status(pid: int) -> dict[str, int]:
    """Figures of a process in KiB, by name."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}  # it has ended between two looks
    pairs = (line.split(":") for line in lines if line.endswith(" kB"))
    return {name: int(value.split()[0]) for name, value in pairs}


def _folder_bytes(folder: Path) -> int:
    """Bytes on disk of the folders of the data set, the incomplete one too."""
    command = ["du", "-s", "--block-size=1", str(folder)]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(out.stdout.split()[0])


def measure(work: Path, rows: int, memory: str) -> dict[str, Any]:
    """Prepare the log of `rows` rows and return the figures."""
    log, out = work / f"log_{rows}", work / f"out_{rows}"
    generate(log, rows)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    cuts = [str(FIRST_MS + day * DAY_MS) for day in (DAYS - 10, DAYS - 5)]
    command = [
        *(sys.executable, "-m", "tokenrec", "prepare", "delimited"),
        *("--schema", str(log / "schema.json"), "--log", str(log / "*.csv")),
        *("--valid-from", cuts[0], "--test-from", cuts[1]),
        *("--out", str(out / "set"), "--memory", memory),
    ]
    figures = watch(command, out)
    counts = json.loads((out / "set" / "tokenrec.json").read_text())["counts"]
    size = _folder_bytes(out / "set")
    shutil.rmtree(out)
    return {
        "rows": rows,
        "ids": counts["users"] + counts["items"],
        "memory": memory,
        **figures,
        "rows_per_second": round(rows / figures["seconds"]),
        "rows_per_cpu_second": round(rows / figures["cpu_seconds"]),
        "log_mib": round(sum(p.stat().st_size for p in log.glob("*.csv")) / 2**20),
        "data_set_mib": round(size / 2**20),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--memory", default="2GiB")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    result = measure(arguments.work, arguments.rows, arguments.memory)
    print(result, flush=True)
    path = arguments.out / "prepare_scale.json"
    earlier = kept_rows(path)
    key = ("rows", "memory")
    kept = [r for r in earlier if [r[k] for k in key] != [result[k] for k in key]]
    write_result(
        arguments.out / "prepare_scale",
        sorted([*kept, result], key=lambda r: [r[k] for k in key]),
        {"file_rows": FILE_ROWS, "columns": 8},
        "python benchmarks/prepare_scale.py --work DIR --rows ROWS --memory MEMORY",
        title="Prepare: many rows with many string ids, in bounded memory",
        packages=("tokenrec", "numpy", "pyarrow", "array-record"),
    )


if __name__ == "__main__":
    main()

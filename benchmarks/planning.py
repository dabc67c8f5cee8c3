"""Measure how long a run opens a data set and plans its training split.

Planning counts the samples of each window, which the order of the batches depends on.
It is measured with the marks of the rows that `prepare` writes, and from the rows
themselves, as for a data set from before there were marks.

python benchmarks/planning.py                      # 10 million rows, made in a folder
python benchmarks/planning.py --rows 1000000 --folder DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from report import write_result

from tokenrec.config import DataConfig
from tokenrec.data import records
from tokenrec.data.dataset import Dataset, open_dataset
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.preparation.partition import ChunkRun, chunk_records
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.preparation.row_index import IndexWriter, index_chunks
from tokenrec.data.row_marks import MARKS
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.windows import Windows

CONFIGS = (
    DataConfig(),
    DataConfig(candidates=8),
    DataConfig(paradigm="uc", events=50, overlap=25),
)
USERS, ROWS = 500, 100_000  # of the log that is repeated


def make(folder: Path, rows: int) -> None:
    """Write a data set whose training split is that of a small one, many times over.

    Each repetition has users of its own.

    Args:
      folder: folder to make.
      rows: about the log rows of the training split.
    """
    prepare(SyntheticSource(ROWS, users=USERS, items=5000), folder)
    small = open_dataset(folder)
    start = np.concatenate([[0], np.cumsum(small.chunk_lengths("train"))])
    layout = records.row_dtype(small.metadata.schema)
    packed = records.user_dtype(small.metadata.schema)
    blocks = records.read_records(
        folder, "train", [small.num_chunks("train")], 0, small.num_chunks("train")
    )
    chunks = [records.decode(record) for block in blocks for record in block]
    run = ChunkRun(
        "train",
        np.frombuffer(b"".join(chunk.rows for chunk in chunks), layout),
        start,
        np.arange(len(chunks), dtype=np.int32),
    )
    features = np.frombuffer(b"".join(chunk.user for chunk in chunks), packed)
    metadata = small.metadata
    for path in (
        *folder.glob(f"{records.NAME}-*"),
        *folder.glob(f"{records.INDEX}/*"),
        *folder.glob(f"{MARKS}/*"),
    ):
        path.unlink()
    for name in (records.INDEX, MARKS):
        (folder / name).rmdir()
    writer, index = records.SplitWriter(folder, "train"), IndexWriter(folder)
    for repetition in range(-(-rows // int(start[-1]))):
        ids = repetition * len(chunks) + np.arange(len(chunks))
        for chunk in chunk_records(run, ids, features):
            writer.write(chunk)
        index.add("train", index_chunks(run, ids))
    writer.finish()
    digests = index.finish()
    shards = {"train": records.Shards(writer.shard_lengths, writer.num_bytes)}
    for name in ("dataset_info.json", "features.json", METADATA_FILE):
        (folder / name).unlink()
    metadata = dataclasses.replace(metadata, row_digests=digests)
    records.write_metadata(folder, shards, metadata)
    metadata.save(folder)


class _Unmarked(Dataset):
    """A data set that is read as if it had no marks."""

    def row_marks(self, split: str) -> None:
        return None


def measure(
    folder: Path, config: DataConfig, *, marked: bool, repeats: int
) -> dict[str, object]:
    """Open the data set and plan its training split, and take the medians."""
    opened, planned = [], []
    for _ in range(repeats):
        began = time.perf_counter()
        dataset = open_dataset(folder) if marked else _Unmarked(folder, ())
        middle = time.perf_counter()
        windows = Windows(dataset, config, "train", train=True)
        planned.append(time.perf_counter() - middle)
        opened.append(middle - began)
    return {
        "paradigm": config.paradigm,
        "candidates": config.candidates,
        "planned from": "marks" if marked else "rows",
        "rows": int(dataset.chunk_lengths("train").sum()),
        "samples": sum(plan.samples for plan in windows.plans),
        "open, s": statistics.median(opened),
        "plan, s": statistics.median(planned),
        "both, s": statistics.median(
            a + b for a, b in zip(opened, planned, strict=True)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, help="keep the data set here, or measure the one in it"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "planning"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = flags.folder or Path(temporary, "data")
        if not folder.exists():
            make(folder, flags.rows)
        rows = []
        for config in CONFIGS:
            for marked in (True, False):
                # From the rows it takes so long that one measurement is enough.
                repeats = flags.repeats if marked else 1
                rows.append(measure(folder, config, marked=marked, repeats=repeats))
                print(rows[-1], flush=True)
        shards = sum(path.stat().st_size for path in folder.glob(f"{records.NAME}-*"))
        marks = sum(path.stat().st_size for path in folder.glob(f"{MARKS}/*"))
    write_result(
        flags.out,
        rows,
        {
            "repeats": flags.repeats,
            "statistic": "median",
            "bytes of the shards": shards,
            "bytes of the marks": marks,
            "files": "in the page cache",
        },
        " ".join(["python", *sys.argv]),
        title="Opening a data set and planning its training split",
    )


if __name__ == "__main__":
    main()

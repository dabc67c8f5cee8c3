"""Measure the input pipeline on one core, in samples per second.

A pure NumPy gather of the same log rows in the same run is the yardstick: it does the
copying alone, without an order, masks, missing values or Grain.

python benchmarks/input.py                # a generated log, as large as KuaiRand-Pure
python benchmarks/input.py --data DIR     # a prepared data set
python benchmarks/input.py --config configs/kuairand_pure_uc.py --data DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from report import write_result

from tokenrec.config import DataConfig
from tokenrec.config.load import load_config
from tokenrec.data.batch import HostBatch
from tokenrec.data.dataset import open_dataset
from tokenrec.data.id_counts import RareIds
from tokenrec.data.interaction_log import (
    EVENT,
    LEARNED,
    SCORED,
    Catalogue,
    InteractionLog,
)
from tokenrec.data.metadata import Metadata
from tokenrec.data.pipeline import LogReader, train_batches
from tokenrec.data.schema import Feature, Schema, Task, columns

# Sizes of KuaiRand-Pure's training split.
USERS, ITEMS, ROWS_PER_USER = 26_469, 7_583, 21
# Group -> columns of `ids` and of `dense`.
WIDTHS = {"user": (26, 0), "catalogue": (8, 0), "row": (3, 8), "action": (7, 0)}
ENTITY = {"user": "user", "catalogue": "item", "row": "context", "action": "action"}


@dataclasses.dataclass
class Generated:
    """A log of random values with the columns of `WIDTHS` and six labels."""

    log: InteractionLog
    catalogue: Catalogue
    schema: Schema
    splits: tuple[str, ...] = ("train",)
    rare_ids: RareIds = dataclasses.field(default_factory=dict)

    @property
    def metadata(self) -> Metadata:
        return Metadata(self.schema, "generated", "", "", {}, {}, {}, {})

    def chunk_lengths(self, split: str) -> np.ndarray:
        return np.diff(self.log.start)

    def row_marks(self, split: str) -> None:
        return None

    def check_shards(self, split: str) -> None:
        """There are no files."""

    def load(
        self,
        split: str,
        start: int = 0,
        stop: int | None = None,
        *,
        frozen: bool = False,
    ) -> InteractionLog:
        if (start, stop) != (0, self.log.num_chunks):
            raise ValueError(
                f"the generated log is one window; chunks [{start}, {stop}) are a part "
                "of it"
            )
        return self.log


def generate(seed: int) -> Generated:
    """Generate a training split like KuaiRand-Pure's, a quarter of the rows scored."""
    random = np.random.default_rng(seed)
    sizes = np.minimum(random.geometric(1 / ROWS_PER_USER, USERS), 500)
    start = np.concatenate([[0], np.cumsum(sizes)])
    rows = int(start[-1])
    scored = random.random(rows) < 0.25
    counts = {"user": USERS, "catalogue": ITEMS, "row": rows, "action": rows}

    def ids(group: str) -> np.ndarray:
        return random.integers(
            1, 1000, (counts[group], WIDTHS[group][0]), dtype=np.int32
        )

    def dense(group: str) -> np.ndarray:
        return random.random((counts[group], WIDTHS[group][1]), dtype=np.float32)

    log = InteractionLog(
        start=start,
        user_id=np.arange(USERS),
        user_ids=ids("user"),
        user_dense=dense("user"),
        time=np.cumsum(random.integers(0, 50, rows)),
        item=random.integers(0, ITEMS, rows, dtype=np.int32),
        flags=np.where(scored, EVENT | SCORED | LEARNED, EVENT).astype(np.uint8),
        request=np.full(rows, -1),
        labels=random.integers(0, 2, (rows, 6), dtype=np.int8),
        row_ids=ids("row"),
        row_dense=dense("row"),
        action_ids=ids("action"),
        action_dense=dense("action"),
    )
    features = [
        Feature(f"{group}_{kind}_{i}", kind, ENTITY[group])  # type: ignore[arg-type]
        for group, widths in WIDTHS.items()
        for kind, width in zip(("categorical", "dense"), widths, strict=True)
        for i in range(width)
    ]
    schema = Schema(tuple(features), tuple(Task(f"label_{i}") for i in range(6)))
    return Generated(
        log, Catalogue(np.arange(ITEMS), ids("catalogue"), dense("catalogue")), schema
    )


@dataclasses.dataclass(frozen=True)
class Indices:
    """What the pure gather reads for one batch.

    Attributes:
      user: `[B]`, chunks.
      events: `[B, T]`, log rows.
      targets: `[B, C]`, log rows; None in UC.
    """

    user: np.ndarray
    events: np.ndarray
    targets: np.ndarray | None


def pure_gather(
    log: InteractionLog, catalogue: Catalogue, indices: Indices
) -> list[np.ndarray]:
    """Copy the features of one batch by NumPy indexing and concatenation."""
    arrays = [log.user_ids[indices.user], log.user_dense[indices.user]]
    for rows in (indices.events, indices.targets):
        if rows is not None:
            item = log.item[rows]
            arrays.append(
                np.concatenate([catalogue.ids[item], log.row_ids[rows]], axis=-1)
            )
            arrays.append(
                np.concatenate([catalogue.dense[item], log.row_dense[rows]], axis=-1)
            )
    arrays += [log.action_ids[indices.events], log.action_dense[indices.events]]
    arrays.append(
        log.labels[indices.events if indices.targets is None else indices.targets]
    )
    return arrays


def indices_of(log: InteractionLog, host_batch: HostBatch) -> Indices:
    """Find the log rows of a batch; padding takes some log row, as a gather must read.

    They need not be the right ones, only as many and as far apart in memory.
    """
    read = np.where(host_batch.rows >= 0, host_batch.rows, 0)
    last = read.max(axis=1)
    length = host_batch.batch.valid.shape[1]
    events = np.maximum(last[:, None] + np.arange(-length, 0), 0)
    chunk = np.searchsorted(log.start, last, side="right") - 1
    return Indices(chunk, events, None if host_batch.batch.target is None else read)


def rates(runs: Sequence[Callable[[], int]], repeats: int) -> list[float]:
    """Measure samples per second of each run, as the median of repeats.

    The runs take turns, so that a slow phase of the machine meets all of them.

    Args:
      runs: functions that return their number of samples.
      repeats: measurements of each run.
    """
    measured: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, rate in zip(runs, measured, strict=True):
            begin = time.perf_counter()
            samples = run()
            rate.append(samples / (time.perf_counter() - begin))
    return [statistics.median(rate) for rate in measured]


def measure(
    dataset: LogReader, config: DataConfig, steps: int, repeats: int
) -> dict[str, object]:
    """Measure both rates over the same steps.

    Opening the data set and the first batches are not timed.

    Args:
      dataset: a data set with a training split.
      config: `data` of a run's config.
      steps: batches of each repeat.
      repeats: measurements of each rate.
    """
    iterator = train_batches(dataset, config, steps=steps * (repeats + 1) + 1, seed=0)
    log = dataset.load("train", 0, len(dataset.chunk_lengths("train")))
    try:
        warm = [next(iterator) for _ in range(steps)]
        indices = [indices_of(log, host_batch) for host_batch in warm]

        def pipeline() -> int:
            return sum(next(iterator).rows.shape[0] for _ in range(steps))

        def gather() -> int:
            return sum(
                len(pure_gather(log, dataset.catalogue, batch)[0]) for batch in indices
            )

        through_grain, pure = rates((pipeline, gather), repeats)
    finally:
        iterator.close()
    widths = {
        group: columns(dataset.schema.group(group))  # type: ignore[arg-type]
        for group in WIDTHS
    }
    return {
        "paradigm": config.paradigm,
        "T": config.events,
        "C": config.candidates,
        "batch": config.batch_size,
        "pipeline, samples/s": through_grain,
        "pure NumPy, samples/s": pure,
        "ratio": through_grain / pure,
        "rows read/s": through_grain
        * float(
            np.mean([(host_batch.rows >= 0).sum(axis=1).mean() for host_batch in warm])
        ),
        "history rows that exist": float(
            np.mean([host_batch.batch.valid.mean() for host_batch in warm])
        ),
        "id + dense columns": " ".join(
            f"{name} {w.ids_width}+{w.dense_width}" for name, w in widths.items()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="prepared data set (default: a generated log)"
    )
    parser.add_argument(
        "--config",
        type=Path,
        help="take the data section of this config (default: NIO and UC, T = 50)",
    )
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--steps", type=int, default=200, help="batches of each repeat (default 200)"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "input"
    )
    flags = parser.parse_args()
    # One core, so that the figure does not depend on how many a machine has.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    configs = [DataConfig(events=50), DataConfig(paradigm="uc", events=50, overlap=25)]
    if flags.config:
        configs = [load_config(str(flags.config)).data]
    else:
        for config in configs:
            config.batch_size = flags.batch_size
    rows = []
    for config in configs:
        dataset: LogReader = (
            open_dataset(flags.data, config.exclude) if flags.data else generate(0)
        )
        rows.append(measure(dataset, config, flags.steps, flags.repeats))
        print(rows[-1])
    data = (
        flags.data.name
        if flags.data
        else f"generated: {USERS:,} users of about {ROWS_PER_USER} rows"
    )
    params = {
        "data": data,
        "steps": flags.steps,
        "repeats": flags.repeats,
        "statistic": "median",
    }
    write_result(
        flags.out,
        rows,
        params,
        " ".join(["python", *sys.argv]),
        title="Input pipeline on one core",
    )


if __name__ == "__main__":
    main()

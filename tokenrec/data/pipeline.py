"""Read a prepared data set as batches: the input pipeline of training and evaluation.

The path of a log row from disk to device:

1. **Shard.** A split is ArrayRecord files. A record is a *chunk*, a run of one user's
   log rows in the order of time (records.py, dataset.py).
2. **Window.** A run of whole chunks with about `data.window_rows` log rows is loaded
   into flat arrays, an `InteractionLog`. Two windows at most are in memory
   (windows.py).
3. **Sample.** The window is cut into requests (NIO) or streams (UC), which are index
   arrays into the log (samples.py).
4. **Bucket.** Each sample goes to the shortest stream length T that holds it
   (`stream_lengths`), so that little of a batch is padding.
5. **Order.** A seeded permutation deals the samples of a bucket into batches of B, and
   the batches of a window are shuffled (batch_order.py).
6. **Gather.** The features of the samples are copied from the log into the arrays of a
   batch, `[B, T, I] int32` and `[B, T, D] float32` and their kin (gather.py, batch.py).
7. **Prefetch.** Grain's threads gather a few steps ahead.
8. **Device.** Every process hands its samples to `tokenrec.sharding.to_devices`, which
   makes them one global array.

**Resuming needs no state.** The batch of step n is a function of (data, config, seed,
n). A checkpoint stores the step, and a resumed run passes it as `start`: nothing is
replayed, and no iterator is saved. The price is a count of the samples of each window
at the start, for which `prepare` keeps a few bytes of every log row (row_marks.py).

**The number of processes changes nothing.** Every process holds the same windows and
computes the same order of whole batches. It then gathers only the samples of its own
devices (`own`), so that a batch is the same on one process as on a hundred. Every
process must see all shards.

Shape letters are in batch.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import grain
import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.batch import HostBatch, ReadRows
from tokenrec.data.batch_order import TrainOrder
from tokenrec.data.batch_shapes import batch_shapes, stream_lengths, task_names
from tokenrec.data.windows import LogReader, OnProgress, Windows

__all__ = [
    "LogReader",
    "batch_shapes",
    "eval_batches",
    "steps_per_epoch",
    "stream_lengths",
    "task_names",
    "train_batches",
]

# Threads that gather (NumPy copies without the GIL), and batches that they keep ready.
READ_THREADS = 2
BATCHES_AHEAD = 4


def steps_per_epoch(dataset: LogReader, config: DataConfig) -> int:
    """Count the training batches of one epoch.

    Args:
      dataset: the prepared data set, without the excluded features.
      config: `data` of the run's config.
    """
    windows = Windows(dataset, config, "train", train=True)
    return TrainOrder(windows, seed=0).steps_per_epoch


def train_batches(
    dataset: LogReader,
    config: DataConfig,
    *,
    steps: int,
    seed: int,
    start: int = 0,
    own: np.ndarray | None = None,
    ages: bool = False,
    on_progress: OnProgress | None = None,
) -> grain.DatasetIterator[HostBatch]:
    """Yield the batches of the steps `start` to `steps - 1`.

    The iterator owns threads: close it after use.

    Args:
      dataset: the prepared data set, without the excluded features.
      config: `data` of the run's config.
      steps: length of the run; epochs follow one another, each in an order of its own.
      seed: seed of the order.
      start: the first step; a resumed run passes the step of its checkpoint.
      own: `[n] int64`, which samples of every batch this process gathers
        (`tokenrec.sharding.local_batch_indices`); None: all.
      ages: batches hold `Batch.ages`.
      on_progress: called with a description of each part of the planning, which comes
        before the first batch; what it raises ends it.

    Raises:
      InputError: no window has enough samples for a batch, the data set has no training
        split or no such task, or its chunks repeat fewer events than a history needs.
    """
    windows = Windows(
        dataset, config, "train", train=True, ages=ages, on_progress=on_progress
    )
    order = TrainOrder(windows, seed)
    batches = grain.MapDataset.range(start, steps).map(
        lambda step: order.batch(int(step), own)
    )
    options = grain.ReadOptions(
        num_threads=READ_THREADS, prefetch_buffer_size=BATCHES_AHEAD
    )
    return iter(batches.to_iter_dataset(options))


def eval_batches(
    dataset: LogReader,
    config: DataConfig,
    split: str,
    *,
    limit: int = 0,
    own: np.ndarray | None = None,
    ages: bool = False,
    freeze_at: int | None = None,
) -> Iterator[tuple[HostBatch, ReadRows]]:
    """Yield every sample of a split once, with the identities of the log rows read.

    The order is window by window, bucket by bucket, and then by position in the split.
    The last batch of a bucket is filled up with padding samples, whose `weight` is 0
    and whose `rows` are -1.

    Args:
      dataset: the prepared data set, without the excluded features.
      config: `data` of the run's config.
      split: name of the split.
      limit: above 0, only so many requests (NIO) or streams (UC), evenly spread over
        the split. A request is taken whole, with all of its candidates.
      own: `[n] int64`, which samples of every batch this process gathers
        (`tokenrec.sharding.local_batch_indices`); None: all.
      ages: batches hold `Batch.ages`.
      freeze_at: milliseconds; events from this time on enter no history (samples.py).

    Yields:
      The samples `own` of a batch, and the `ReadRows` of the whole batch.

    Raises:
      InputError: the data set has no such split or task, or its chunks repeat fewer
        events than a history needs.
    """
    # Not a generator itself, so that wrong input is an error at the call.
    windows = Windows(
        dataset, config, split, train=False, ages=ages, freeze_at=freeze_at
    )
    total = sum(plan.requests for plan in windows.plans)
    wanted = np.arange(total)
    if 0 < limit < total:
        wanted = np.arange(limit) * total // limit
    return _eval_batches(windows, wanted, own)


def _eval_batches(
    windows: Windows, wanted: np.ndarray, own: np.ndarray | None
) -> Iterator[tuple[HostBatch, ReadRows]]:
    """Yield the batches of `eval_batches`; `wanted: [n]` are ascending requests."""
    size = windows.config.eval_batch_size
    ends = np.cumsum([plan.requests for plan in windows.plans])
    for number, end in enumerate(ends):
        # 1. The wanted requests of this window, counted from its first one.
        begin = end - windows.plans[number].requests
        requests = wanted[slice(*np.searchsorted(wanted, (begin, end)))] - begin
        if not requests.size:
            continue
        # 2. Their samples: `opens` marks the first sample of each request.
        window = windows.load(number)
        request = np.cumsum(window.samples.opens) - 1
        chosen = np.flatnonzero(np.isin(request, requests))
        # 3. Batches of one stream length each.
        for bucket, length in enumerate(windows.lengths):
            members = chosen[window.bucket[chosen] == bucket]
            for start in range(0, len(members), size):
                part = members[start : start + size]
                batch = np.full(size, -1, np.int64)
                batch[: len(part)] = part
                local = batch if own is None else batch[own]
                yield (
                    windows.gather(number, local, length),
                    windows.identify(number, batch, length),
                )

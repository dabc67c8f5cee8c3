"""Decide which samples make up the training batch of a step.

The order is a function of (samples, config, seed, step) and of nothing else:

1. An *epoch* visits the windows of the split in a random order.
2. Within a window, samples are dealt to *buckets*, one for each stream length, and
   shuffled inside their bucket. What does not fill a batch of its bucket joins the
   bucket of the next longer streams, so that a window loses less than one batch an
   epoch.
3. The batches of all buckets of a window are shuffled together.

So the samples of step n follow from n alone: divide by the steps of an epoch, find the
window that the remainder falls into, and look up the batch in its shuffled order. No
state is carried from step to step, which is why resuming needs only the step.

Random numbers are drawn by Philox generators that are seeded with (seed, epoch,
stream). Stream 0 orders the windows of an epoch, and stream n + 1 deals window n. The
number of processes does not enter.
"""

from __future__ import annotations

import numpy as np

from tokenrec.data.batch import HostBatch
from tokenrec.data.two_slot_cache import TwoSlotCache
from tokenrec.data.windows import Windows
from tokenrec.errors import InputError


class TrainOrder:
    """The samples of every training step. Thread-safe.

    Args:
      windows: the windows of the training split.
      seed: seed of the order.

    Attributes:
      steps_per_epoch: full batches of an epoch.

    Raises:
      InputError: no window has enough samples for a batch.
    """

    def __init__(self, windows: Windows, seed: int) -> None:
        self._windows = windows
        self._size = windows.config.batch_size
        self._seed = seed % 2**64
        # Full batches of each window.
        self._batches = np.array([p.samples // self._size for p in windows.plans])
        self.steps_per_epoch = int(self._batches.sum())
        self._cache = TwoSlotCache(self._deal)
        if not self.steps_per_epoch:
            self._raise_no_batch()

    def batch(self, step: int, own: np.ndarray | None) -> HostBatch:
        """Gather the batch of a step.

        Args:
          step: number of the step, counted over all epochs.
          own: `[n] int64`, which samples of the batch to gather; None: all.
        """
        epoch, step = divmod(step, self.steps_per_epoch)
        # 1. Find the window: the visits of an epoch lie side by side, `ends` counts the
        #    steps up to the end of each.
        visits = self._random(epoch, 0).permutation(len(self._batches))
        ends = np.cumsum(self._batches[visits])
        visit = int(np.searchsorted(ends, step, side="right"))
        number = int(visits[visit])
        # 2. Find the batch in the window.
        buckets, samples = self._cache.get((epoch, number))
        index = step - int(ends[visit]) + len(buckets)
        # 3. Gather the samples of this process.
        chosen = samples[index] if own is None else samples[index][own]
        length = self._windows.lengths[buckets[index]]
        return self._windows.gather(number, chosen, length)

    def _deal(self, visit: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Deal the samples of a window into the batches of an epoch.

        Args:
          visit: (epoch, index of the window).

        Returns:
          buckets: `[n] int64`, bucket of each of the n batches.
          samples: `[n, B] int64`, samples of the window.
        """
        epoch, number = visit
        random = self._random(epoch, number + 1)
        bucket = self._windows.load(number).bucket
        left_over = np.empty(0, np.int64)
        buckets = []
        batches = []
        for index in range(len(self._windows.lengths)):
            members = np.concatenate([left_over, np.flatnonzero(bucket == index)])
            members = random.permutation(members)
            count = len(members) // self._size
            batches.append(members[: count * self._size].reshape(count, self._size))
            buckets.append(np.full(count, index))
            left_over = members[count * self._size :]
        order = random.permutation(sum(len(part) for part in buckets))
        return np.concatenate(buckets)[order], np.concatenate(batches)[order]

    def _random(self, epoch: int, stream: int) -> np.random.Generator:
        seeds = np.random.SeedSequence((self._seed, epoch, stream))
        return np.random.Generator(np.random.Philox(seeds))

    def _raise_no_batch(self) -> None:
        config = self._windows.config
        most = max(plan.samples for plan in self._windows.plans)
        raise InputError(
            f"data.batch_size={self._size} is more than the {most} training samples of "
            f"data.paradigm='{config.paradigm}' in a window of "
            f"data.window_rows={config.window_rows} rows; use a smaller batch_size, a "
            "larger window_rows, or tasks with more known labels"
        )

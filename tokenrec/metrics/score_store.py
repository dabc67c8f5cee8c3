"""`ScoreStore`: collect scores batch by batch, with metrics exact beyond memory.

The metrics are those of `metrics.binary.summarize` on all log rows together, bit for
bit: scores are not binned or sampled. Log rows beyond `memory_rows` move to unnamed
temporary files, and are sorted there through a memory map.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.errors import InputError
from tokenrec.metrics.binary import (
    check_scores,
    check_shapes,
    task_report,
    with_macro_means,
)
from tokenrec.metrics.exact_auc import gauc_of_sorted, sort_keys
from tokenrec.metrics.groups import group_codes


class ScoreStore:
    """Labels, probabilities and users of K tasks, collected batch by batch.

    A log row takes 8 + 5 K bytes. At most `memory_rows` of them are in memory; the
    others are in unnamed temporary files, which vanish with the store. Besides, memory
    grows only with the number of users (16 bytes each) and with the log rows of one
    user.

    Args:
      tasks: K names.
      memory_rows: log rows that are kept in memory.
      directory: folder of the temporary files; None is the system's.

    Attributes:
      tasks: K names.
      rows: log rows added so far.

    Raises:
      InputError: `memory_rows` is below 1.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        memory_rows: int = 4_000_000,
        directory: Path | None = None,
    ) -> None:
        if memory_rows < 1:
            raise InputError(f"memory_rows={memory_rows} must be at least 1")
        self.tasks = tuple(tasks)
        self.rows = 0
        self._memory_rows = memory_rows
        self._directory = directory
        self._dtype = np.dtype(
            [
                ("label", "i1", (len(tasks),)),
                ("score", "f4", (len(tasks),)),
                ("group", "i8"),
            ]
        )
        # Blocks in files, and blocks in memory that came after them.
        self._spilled: list[np.ndarray] = []
        self._fresh: list[np.ndarray] = []

    def append(
        self, labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray
    ) -> None:
        """Add log rows.

        Args:
          labels: `[N, K]`, 1, 0, or -1 where unknown.
          probabilities: `[N, K]`, kept as float32.
          users: `[N]`, integers or strings.

        Raises:
          InputError: shapes differ, a label is none of 1, 0, -1, or the probability of
            a known label is NaN.
        """
        labels = np.asarray(labels)
        probabilities = np.asarray(probabilities)
        users = np.asarray(users)
        check_shapes(labels, probabilities, users, self.tasks)
        # Checked here and not in `summarize`, so that a bad batch fails at once.
        known = labels != -1
        check_scores(labels[known], probabilities[known])
        block = np.empty(len(labels), self._dtype)
        block["label"] = labels
        block["score"] = probabilities
        block["group"] = group_codes(users)
        self._fresh.append(block)
        self.rows += len(block)
        in_memory = self.rows - sum(map(len, self._spilled))
        if in_memory >= self._memory_rows:
            spilled = self._file_array(in_memory, self._dtype)
            self._spilled.append(np.concatenate(self._fresh, out=spilled))
            self._fresh = []

    def merge(self, other: ScoreStore) -> None:
        """Add the log rows of another store of the same tasks."""
        if other.tasks != self.tasks:
            raise InputError(
                f"cannot merge scores of tasks {other.tasks} into {self.tasks}; "
                "give the same tasks"
            )
        for block in list(other.blocks()):
            self.append(*block)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield all log rows, block by block, in the form that `append` takes.

        Send the blocks to another process to merge the stores of several hosts.

        Yields:
          Labels `[n, K] int8`, probabilities `[n, K] float32`, users `[n] int64`.
        """
        for block in (*self._spilled, *self._fresh):
            yield block["label"], block["score"], block["group"]

    def summarize(self, *, calibration: bool = False) -> dict[str, Any]:
        """Compute the exact metrics of all log rows, as `metrics.binary.summarize`."""
        # A sort key needs dense group codes: the position among all distinct users.
        users = np.empty(0, np.int64)
        groups = (group for _, _, group in self.blocks())
        for batch in itertools.batched(groups, 1000):
            distinct = np.concatenate([np.unique(group) for group in batch])
            users = np.union1d(users, distinct)
        reports = {
            task: self._task_report(k, users, calibration)
            for k, task in enumerate(self.tasks)
        }
        return with_macro_means(reports)

    def _task_report(
        self, k: int, users: np.ndarray, calibration: bool
    ) -> dict[str, Any]:
        """Metrics of task k; `users: [U] int64` are all users, ascending."""
        # 1. Arrays of the right size, in memory or in files.
        negatives = self._array(self._count_labels(k, 0), np.float32)
        positives = self._array(self._count_labels(k, 1), np.float32)
        keys = self._array(len(negatives) + len(positives), np.uint64)
        # 2. Scores of each class, and the sort keys of GAUC.
        n = p = 0
        for label, score, group in self.blocks():
            known = label[:, k] != -1
            y, s = label[known, k], score[known, k]
            dense_codes = np.searchsorted(users, group[known])
            keys[n + p : n + p + len(y)] = sort_keys(dense_codes, s, y)
            low, high = s[y == 0], s[y == 1]
            negatives[n : n + len(low)] = low
            positives[p : p + len(high)] = high
            n, p = n + len(low), p + len(high)
        # 3. Sorted in place: a memory map is sorted in its file.
        for array in (negatives, positives, keys):
            array.sort()
        grouped_auc = gauc_of_sorted(keys, self._memory_rows)
        return task_report(positives, negatives, grouped_auc, calibration=calibration)

    def _count_labels(self, k: int, value: int) -> int:
        return sum(
            int(np.count_nonzero(label[:, k] == value)) for label, _, _ in self.blocks()
        )

    def _array(self, length: int, dtype: Any) -> np.ndarray:
        """Make an array, in memory if `memory_rows` allows, else in a file."""
        if length <= self._memory_rows:
            return np.empty(length, dtype)
        return self._file_array(length, dtype)

    def _file_array(self, length: int, dtype: Any) -> np.ndarray:
        """Make an array in an unnamed file, which is freed with the array."""
        size = length * np.dtype(dtype).itemsize
        can_reserve = hasattr(os, "posix_fallocate")
        with tempfile.TemporaryFile(dir=self._directory) as file:
            try:
                # A full disk must fail here: in a memory map it kills the process.
                if can_reserve:
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                where = self._directory or tempfile.gettempdir()
                raise InputError(
                    f"directory={where} has no room for {size} bytes of scores "
                    f"({error}); free some"
                ) from error
            return np.memmap(
                file, dtype, "r+" if can_reserve else "w+", shape=(length,)
            )

"""Exact metrics of binary predictions: AUC, GAUC, log loss, normalised entropy; `ScoreStore` for splits beyond memory.

Ties count one half, and no metric depends on the order of the rows. An undefined metric (no rows, or one class only) is
None. Metrics of ranked lists are in `ranking_metrics.py`.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.errors import InputError
from tokenrec.metrics.exact_auc import (
    auc_of_sorted,
    gauc_terms,
    group_stop,
    loss_of_sorted,
    sort_keys,
)


def auc(labels: np.ndarray, scores: np.ndarray) -> float | None:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, a tie counting one half.

    `labels: [N]` 0 or 1, `scores: [N]`, of any scale. O(N log N). None if either class is absent.

    Raises:
      InputError: shapes differ, a label is not 0 or 1, or a score is NaN.

    >>> auc(np.array([0, 1, 0, 1]), np.array([0.1, 0.4, 0.4, 0.8]))
    0.875
    >>> auc(np.array([1, 1]), np.array([0.1, 0.4])) is None
    True
    """
    return auc_of_sorted(*_classes(*_checked(labels, scores)))


def gauc(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> float | None:
    """Mean over groups of the AUC inside a group, weighted by the group's rows; groups of one class are left out.

    `labels: [N]` 0 or 1, `scores: [N]`, `groups: [N]` integers or strings (users). Source: Zhu et al., Optimized Cost
    per Click in Taobao Display Advertising, KDD 2017, with impressions as weights. None if no group has both classes.

    Raises:
      InputError: as `auc`, or `groups` are neither integers nor strings.

    >>> labels, scores = np.array([0, 1, 0, 1, 1]), np.array([0.1, 0.4, 0.9, 0.8, 0.3])
    >>> gauc(labels, scores, np.array(["ann", "ann", "bob", "bob", "cyd"]))
    0.5
    """
    labels, scores = _checked(labels, scores)
    if np.shape(groups) != labels.shape:
        raise InputError(
            f"groups have shape {np.shape(groups)}, labels {labels.shape}; give one group per label"
        )
    codes = _ids(groups).dictionary_encode().indices.to_numpy()
    order = (
        scores
        if scores.dtype == np.float32
        else np.unique(scores, return_inverse=True)[1].astype(np.uint32)
    )
    return _gauc_of_sorted(np.sort(sort_keys(codes, order, labels)))


def log_loss(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Mean of `-log p(label)` in nats, in float64, with p clipped to [1e-7, 1 - 1e-7]. None if there are no rows.

    `labels: [N]` 0 or 1, `probabilities: [N]` in [0, 1], float32 or float64.

    Raises:
      InputError: as `auc`, or a probability is outside [0, 1].

    >>> round(log_loss(np.array([1, 0]), np.array([0.5, 0.25])), 6)
    0.490415
    """
    labels, probabilities = _checked(labels, probabilities)
    return (
        loss_of_sorted(*_classes(labels, probabilities)) / len(labels)
        if len(labels)
        else None
    )


def normalized_entropy(labels: np.ndarray, probabilities: np.ndarray) -> float | None:
    """Log loss over the entropy of these labels' own base rate: below 1 is better than predicting the base rate.

    Source: He et al., Practical Lessons from Predicting Clicks on Ads at Facebook, ADKDD 2014. None for one class.

    >>> normalized_entropy(np.array([1, 0]), np.array([0.5, 0.5]))
    1.0
    """
    return _normalized(
        log_loss(labels, probabilities), int(np.count_nonzero(labels)), len(labels)
    )


def summarize(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray,
    tasks: Sequence[str],
) -> dict[str, Any]:
    """Metrics per task and their means over the tasks where they are defined, as plain Python values for JSON.

    `labels: [N, K] int8`, -1 where unknown (the row is left out of that task), `probabilities: [N, K] float32`,
    `users: [N]` integers or strings, `tasks`: K names.

    >>> result = summarize(np.array([[1], [0], [-1]]), np.array([[0.9], [0.1], [0.5]]), np.array([7, 7, 7]), ["click"])
    >>> result["macro_auc"], result["tasks"]["click"]["gauc"], result["tasks"]["click"]["examples"]
    (1.0, 1.0, 2)
    """
    labels, probabilities, users = (
        np.asarray(labels),
        np.asarray(probabilities),
        np.asarray(users),
    )
    _check_shapes(labels, probabilities, users, tasks)
    reports = {}
    for k, task in enumerate(tasks):
        known = labels[:, k] != -1
        y, p = _checked(labels[known, k], probabilities[known, k])
        reports[task] = _report(*_classes(y, p), gauc(y, p, users[known]))
    return _with_macro(reports)


def group_codes(ids: np.ndarray) -> np.ndarray:
    """`[N] int64` codes of user ids that are the same in every batch and on every host.

    Integers are their own code. A string's is its 64-bit BLAKE2b digest: any two of a million users share one with
    probability 3e-8, and would then count as one user.

    >>> group_codes(np.array([5, 3])).tolist()
    [5, 3]
    """
    array = _ids(ids)
    if pa.types.is_integer(array.type):
        return array.to_numpy().astype(np.int64)
    encoded = array.dictionary_encode()
    digests = [
        hashlib.blake2b(name.encode(), digest_size=8).digest()
        for name in encoded.dictionary.to_pylist()
    ]
    return np.frombuffer(b"".join(digests), "<i8")[encoded.indices.to_numpy()]


class ScoreStore:
    """Collects labels, probabilities and users batch by batch; `summarize` then equals that of all rows, bit for bit.

    A row takes 8 + 5 K bytes for K tasks. Beyond `memory_rows`, rows move to unnamed temporary files, which vanish with
    the store, and are sorted there through a memory map. Besides, memory grows only with the number of users (16 bytes
    each) and with the rows of one user. `directory` is where the temporary files lie; None leaves it to the system.
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
        self._row = np.dtype(
            [
                ("label", "i1", (len(tasks),)),
                ("score", "f4", (len(tasks),)),
                ("group", "i8"),
            ]
        )
        self._spilled: list[np.ndarray] = []
        self._fresh: list[np.ndarray] = []

    def append(
        self, labels: np.ndarray, probabilities: np.ndarray, users: np.ndarray
    ) -> None:
        """Adds rows. `labels: [N, K]` 1, 0 or -1, `probabilities: [N, K]`, kept as float32, `users: [N]` ids.

        Raises:
          InputError: shapes differ, a label is none of 1, 0, -1, or the probability of a known label is NaN.
        """
        labels, probabilities, users = (
            np.asarray(labels),
            np.asarray(probabilities),
            np.asarray(users),
        )
        _check_shapes(labels, probabilities, users, self.tasks)
        known = labels != -1
        _checked(labels[known], probabilities[known])
        block = np.empty(len(labels), self._row)
        block["label"], block["score"], block["group"] = (
            labels,
            probabilities,
            group_codes(users),
        )
        self._fresh.append(block)
        self.rows += len(block)
        waiting = self.rows - sum(map(len, self._spilled))
        if waiting >= self._memory_rows:
            self._spilled.append(
                np.concatenate(self._fresh, out=self._file_array(waiting, self._row))
            )
            self._fresh = []

    def merge(self, other: ScoreStore) -> None:
        """Adds the rows of another store of the same tasks."""
        if other.tasks != self.tasks:
            raise InputError(
                f"cannot merge scores of tasks {other.tasks} into {self.tasks}; give the same tasks"
            )
        for block in list(other.blocks()):
            self.append(*block)

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All rows, some at a time, as `append` takes them: `[n, K] int8`, `[n, K] float32`, `[n] int64`.

        Send these to another process to merge the stores of several hosts.
        """
        for block in (*self._spilled, *self._fresh):
            yield block["label"], block["score"], block["group"]

    def summarize(self) -> dict[str, Any]:
        """Exact metrics of all rows, in the form of `metrics.summarize`."""
        users = np.empty(0, np.int64)
        for waiting in itertools.batched(
            (group for _, _, group in self.blocks()), 1000
        ):
            users = np.union1d(
                users, np.concatenate([np.unique(group) for group in waiting])
            )
        return _with_macro(
            {task: self._task_report(k, users) for k, task in enumerate(self.tasks)}
        )

    def _task_report(self, k: int, users: np.ndarray) -> dict[str, float | int | None]:
        negatives, positives = (
            self._array(
                sum(
                    int(np.count_nonzero(label[:, k] == value))
                    for label, _, _ in self.blocks()
                ),
                np.float32,
            )
            for value in (0, 1)
        )
        keys = self._array(len(negatives) + len(positives), np.uint64)
        n = p = 0
        for label, score, group in self.blocks():
            known = label[:, k] != -1
            y, s = label[known, k], score[known, k]
            keys[n + p : n + p + len(y)] = sort_keys(
                np.searchsorted(users, group[known]), s, y
            )
            low, high = s[y == 0], s[y == 1]
            negatives[n : n + len(low)], positives[p : p + len(high)] = low, high
            n, p = n + len(low), p + len(high)
        for array in (negatives, positives, keys):
            array.sort()
        return _report(positives, negatives, _gauc_of_sorted(keys, self._memory_rows))

    def _array(self, length: int, dtype: Any) -> np.ndarray:
        return (
            np.empty(length, dtype)
            if length <= self._memory_rows
            else self._file_array(length, dtype)
        )

    def _file_array(self, length: int, dtype: Any) -> np.ndarray:
        """An array in an unnamed file, which is freed with the array."""
        size = length * np.dtype(dtype).itemsize
        with tempfile.TemporaryFile(dir=self._directory) as file:
            try:
                if hasattr(
                    os, "posix_fallocate"
                ):  # a full disk must fail here: in a memory map it kills the process
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                where = self._directory or tempfile.gettempdir()
                raise InputError(
                    f"directory={where} has no room for {size} bytes of scores ({error}); free some"
                ) from error
            return np.memmap(
                file,
                dtype,
                "r+" if hasattr(os, "posix_fallocate") else "w+",
                shape=(length,),
            )


def _classes(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted scores of the positives and of the negatives."""
    return np.sort(scores[labels == 1]), np.sort(scores[labels == 0])


def _gauc_of_sorted(keys: np.ndarray, block: int = 4_000_000) -> float | None:
    """GAUC from sorted keys, about `block` of them at a time."""
    parts, rows, start = [], 0, 0
    while start < len(keys):
        stop = group_stop(keys, start + block)
        terms, mixed_rows = gauc_terms(keys[start:stop])
        parts.append(terms)
        rows += mixed_rows
        start = stop
    # fsum rounds once, so that neither the order of the groups nor the blocks matter.
    return (
        math.fsum(itertools.chain.from_iterable(part.tolist() for part in parts)) / rows
        if rows
        else None
    )


def _normalized(loss: float | None, positives: int, examples: int) -> float | None:
    if loss is None or positives in (0, examples):
        return None
    rate = positives / examples
    return loss / -(rate * math.log(rate) + (1 - rate) * math.log1p(-rate))


def _report(
    positives: np.ndarray, negatives: np.ndarray, grouped: float | None
) -> dict[str, float | int | None]:
    """Metrics of one task from the sorted probabilities of each class."""
    examples = len(positives) + len(negatives)
    loss = loss_of_sorted(positives, negatives) / examples if examples else None
    return {
        "auc": auc_of_sorted(positives, negatives),
        "gauc": grouped,
        "log_loss": loss,
        "normalized_entropy": _normalized(loss, len(positives), examples),
        "positives": len(positives),
        "examples": examples,
    }


def _with_macro(reports: dict[str, dict[str, float | int | None]]) -> dict[str, Any]:
    macro = {}
    for name in ("auc", "gauc"):
        defined = [
            value for report in reports.values() if (value := report[name]) is not None
        ]
        macro[f"macro_{name}"] = math.fsum(defined) / len(defined) if defined else None
    return {**macro, "tasks": reports}


def _checked(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as vectors, scores as float32 or float64."""
    labels, scores = np.asarray(labels), np.asarray(scores)
    if labels.ndim != 1 or labels.shape != scores.shape:
        raise InputError(
            f"labels have shape {labels.shape}, scores {scores.shape}; give two equal vectors"
        )
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise InputError(
            f"labels hold {labels[wrong][0]}, which is neither 0 nor 1; leave unknown labels out"
        )
    if scores.dtype != np.float32:
        scores = scores.astype(np.float64)
    missing = np.isnan(scores)
    if missing.any():
        raise InputError(
            f"scores hold NaN at row {int(missing.argmax())}, which has no rank; look for it in the model"
        )
    return labels, scores


def _check_shapes(
    labels: np.ndarray,
    probabilities: np.ndarray,
    users: np.ndarray,
    tasks: Sequence[str],
) -> None:
    need = (len(users), len(tasks))
    for name, array in (("labels", labels), ("probabilities", probabilities)):
        if array.shape != need:
            raise InputError(
                f"{name} have shape {array.shape}; {need[0]} users and {need[1]} tasks need {need}"
            )


def _ids(ids: np.ndarray) -> pa.Array:
    """Integers or strings as an Arrow array without nulls."""
    try:
        array = pa.array(np.asarray(ids))
    except pa.ArrowException as error:
        raise InputError(
            f"groups cannot be read: {error}; give integers or strings"
        ) from error
    if array.null_count:
        raise InputError(
            f"groups hold {array.null_count} nulls; give each row its group"
        )
    if len(array) and not (
        pa.types.is_integer(array.type) or pa.types.is_string(array.type)
    ):
        raise InputError(f"groups are of type {array.type}; give integers or strings")
    return array

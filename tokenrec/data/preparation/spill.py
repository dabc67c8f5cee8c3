"""Rows grouped by user on disk, so that memory does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

FAN_OUT = 64
LEVELS = 6  # 64 ** 6 exceeds any int32 code


class Partitions:
    """Structured rows with an int32 field `user`; `add` them in any order, then read them back some users at a time.

    Up to `limit` rows stay in memory. Beyond that they go to `FAN_OUT` files by a digit of the user's code, and a file
    that is larger than `limit` is split again by the next digit. Rows of a user keep their order.
    """

    def __init__(
        self, folder: Path, dtype: np.dtype, limit: int, level: int = 0
    ) -> None:
        self._folder, self._dtype, self._limit, self._level = (
            folder,
            dtype,
            limit,
            level,
        )
        self._kept: list[np.ndarray] = []
        self._rows = 0
        self._counts = np.zeros(FAN_OUT, np.int64)
        self._spilled = False

    def add(self, rows: np.ndarray) -> None:
        self._rows += len(rows)
        if not self._spilled and self._rows <= self._limit:
            self._kept.append(rows)
            return
        if not self._spilled:
            self._folder.mkdir(parents=True)
            self._spilled = True
            for kept in self._kept:
                self._spill(kept)
            self._kept = []
        self._spill(rows)

    def read(self) -> Iterator[np.ndarray]:
        """Rows of some users at a time, all rows of each; files are removed as they are read. Can be called once."""
        if not self._spilled:
            if self._kept:
                kept, self._kept = np.concatenate(self._kept), []
                yield kept
            return
        for part in np.flatnonzero(self._counts):
            path = self._path(int(part))
            if (
                self._counts[part] <= self._limit
                or self._level + 1 == LEVELS
                or self._holds_one_user(path)
            ):
                rows = np.fromfile(path, self._dtype)
                path.unlink()
                yield rows
                continue
            finer = Partitions(
                path.with_suffix(""), self._dtype, self._limit, self._level + 1
            )
            for block in self._blocks(path):
                finer.add(block)
            path.unlink()
            yield from finer.read()

    def _spill(self, rows: np.ndarray) -> None:
        part = rows["user"] // FAN_OUT**self._level % FAN_OUT
        order = np.argsort(part, kind="stable")
        ordered = rows[order]
        counts = np.bincount(part, minlength=FAN_OUT)
        ends = np.cumsum(counts)
        for i in np.flatnonzero(counts):
            with self._path(int(i)).open("ab") as file:
                file.write(ordered[ends[i] - counts[i] : ends[i]].view(np.uint8).data)
        self._counts += counts

    def _blocks(self, path: Path) -> Iterator[np.ndarray]:
        with path.open("rb") as file:
            while data := file.read(self._limit * self._dtype.itemsize):
                yield np.frombuffer(data, self._dtype)

    def _holds_one_user(self, path: Path) -> bool:
        first = None
        for block in self._blocks(path):
            first = block["user"][0] if first is None else first
            if (block["user"] != first).any():
                return False
        return True

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:02d}.rows"

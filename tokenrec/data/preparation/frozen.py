"""Carry the frozen statistics of scored rows past the encoded rows, to their own files.

Few rows have them, so they are no columns of the encoded rows: a temporary file holds
them, and an encoded row their place in it. A split gets the file `frozen/SPLIT.npy`,
`[scored rows, F] float32` in the order of the split, NaN where missing. Shards do not
hold them, and only `evaluate --freeze-at` reads them (`tokenrec/data/frozen_rows.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.frozen_rows import FROZEN
from tokenrec.data.interaction_log import SCORED
from tokenrec.data.preparation.array_file import ArrayFile
from tokenrec.data.preparation.partition import ChunkRun
from tokenrec.data.source import FROZEN_COLUMN, FreezingSource, Source
from tokenrec.errors import InputError


class FrozenValues:
    """Frozen statistics in the order in which the log rows came, in a temporary file.

    Args:
      path: the file, made when it is needed.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows = 0
        self._width = 0

    def add(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, np.ndarray]:
        """Keep the statistics of log rows.

        Args:
          batch: log rows, perhaps with the column `FROZEN_COLUMN`.

        Returns:
          The batch without it, and `[n] int64`, places for `read`, 0 for none.
        """
        places = np.zeros(batch.num_rows, np.int64)
        if FROZEN_COLUMN not in batch.schema.names:
            return batch, places
        column = batch.column(FROZEN_COLUMN)
        batch = batch.drop_columns([FROZEN_COLUMN])
        given = column.is_valid().to_numpy(zero_copy_only=False)
        count = int(given.sum())
        if count:
            values = pc.list_flatten(column).to_numpy(zero_copy_only=False)
            self._width = len(values) // count
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab") as file:
                file.write(values.astype("<f4").tobytes())
            places[given] = self._rows + 1 + np.arange(count)
            self._rows += count
        return batch, places

    def read(self, places: np.ndarray) -> np.ndarray:
        """Statistics at `places: [n]`, none of them 0: `[n, F] float32`."""
        shape = self._rows, self._width
        values = np.memmap(self._path, "<f4", "r", shape=shape)
        return np.asarray(values[places - 1])


class FrozenWriter:
    """Write the frozen statistics of all splits, in the order of their rows.

    Args:
      folder: the prepared folder.
      values: those of the log.
    """

    def __init__(self, folder: Path, values: FrozenValues) -> None:
        self._folder = folder / FROZEN
        self._values = values
        self._files: dict[str, ArrayFile] = {}

    def add(self, run: ChunkRun) -> None:
        """Append those of the scored rows of a run of chunks."""
        places = run.frozen[(run.rows["flags"] & SCORED) != 0]
        # A log that declares none, and the split train, have no places.
        if not places.any():
            return
        if not places.all():
            raise InputError(
                f"rows(): column '{FROZEN_COLUMN}' is null in a scored row of "
                f"{run.split} and not in others; give it to all scored rows of the split"
            )
        values = self._values.read(places)
        if run.split not in self._files:
            self._folder.mkdir(exist_ok=True)
            path = self._folder / f"{run.split}.npy"
            self._files[run.split] = ArrayFile(path, values.dtype, values.shape[1:])
        self._files[run.split].append(values)

    def finish(self) -> None:
        """Complete the files."""
        for file in self._files.values():
            file.finish()

    def close(self) -> None:
        """Close the files that are open."""
        for file in self._files.values():
            file.close()


def describe_frozen(source: Source) -> dict[str, Any]:
    """What the metadata keeps of a source's frozen statistics, by option."""
    frozen = source.frozen() if isinstance(source, FreezingSource) else None
    if frozen is None:
        return {}
    times = {split: list(ends) for split, ends in frozen.times.items()}
    return {FROZEN: {"features": list(frozen.features), "times": times}}

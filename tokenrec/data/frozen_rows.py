"""Read scored rows with the statistics of the past as of the start of their split.

`prepare` keeps these beside the shards, in `frozen/SPLIT.npy`, and says in the options
of `tokenrec.json` which features they are, and of which times.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tokenrec.data.interaction_log import SCORED, InteractionLog
from tokenrec.data.schema import Schema, columns
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from tokenrec.data.dataset import Dataset
    from tokenrec.data.metadata import Metadata

# Folder of the files, and name of the option.
FROZEN = "frozen"
# Statistics that were declared, in the state of a data set from before frozen ones.
_DECLARATION = "past_declaration"


def frozen_names(metadata: Metadata, schema: Schema) -> list[str]:
    """Names of the features of a schema that have frozen values."""
    declared: Sequence[str] = metadata.options.get(FROZEN, {}).get("features", ())
    kept = {feature.name for feature in schema.group("row")}
    return [name for name in declared if name in kept]


def check_frozen_time(
    metadata: Metadata, schema: Schema, split: str, time: int, text: str
) -> None:
    """Check that the statistics of a data set can be frozen at a time.

    Args:
      metadata: of the data set.
      schema: its features without those that the run excludes.
      split: split that is evaluated.
      time: milliseconds.
      text: the time as it was given, for messages.

    Raises:
      InputError: they cannot.
    """
    names = frozen_names(metadata, schema)
    sources = metadata.state.get("source", ())
    if FROZEN not in metadata.options and _DECLARATION in sources:
        raise InputError(
            f"--freeze-at={text}: the data set has statistics of the past and was "
            "prepared without keeping them as of the start of each split, so that they "
            "would go on beyond that time; prepare it again, without --beam"
        )
    if not names:
        return
    times: dict[str, Any] = metadata.options[FROZEN]["times"]
    if split not in times:
        raise InputError(
            f"--freeze-at={text}: the data set keeps statistics of the past "
            f"({names[0]} and {len(names) - 1} more) as of the start of "
            f"{' and '.join(times) or 'no split'}, and not of '{split}'; evaluate one of "
            "these splits"
        )
    earliest, latest = times[split]
    if time > latest or (earliest is not None and time < earliest):
        raise InputError(
            f"--freeze-at={text} is {time} ms, but the data set keeps statistics of the "
            f"past ({names[0]} and {len(names) - 1} more) as of {latest} ms, the start "
            f"of split '{split}': use --freeze-at=split, or prepare the data set with a "
            f"split that begins then (--valid-from, --test-from)"
        )


class FrozenStatistics:
    """The frozen statistics of a split.

    Args:
      dataset: the prepared data set.
      split: the split.
    """

    def __init__(self, dataset: Dataset, split: str) -> None:
        self._names = frozen_names(dataset.metadata, dataset.schema)
        declared = dataset.metadata.options.get(FROZEN, {})
        self._places = [declared["features"].index(name) for name in self._names]
        place = columns(dataset.schema.group("row")).dense
        self._columns = [place[name][0] for name in self._names]
        if not self._names:
            return
        name = f"{FROZEN}/{split}.npy"
        self._values = dataset.read_array(name)
        # Scored rows before each chunk.
        lengths = dataset.chunk_lengths(split)
        marks = dataset.row_marks(split)
        assert marks is not None
        scored = np.concatenate([[0], np.cumsum((marks["bits"] & SCORED) != 0)])
        self._before = scored[np.concatenate([[0], np.cumsum(lengths)])]
        shape = int(scored[-1]), len(declared["features"])
        if self._values.shape != shape or self._values.dtype != np.float32:
            raise InputError(
                f"data: '{dataset.directory / name}' has the shape "
                f"{self._values.shape} of {self._values.dtype}, not {shape} of float32; "
                "prepare the data set again"
            )

    def put(self, log: InteractionLog, start: int) -> None:
        """Replace the statistics of scored rows by the frozen ones.

        Args:
          log: chunks of the split, whose `row_dense` is changed.
          start: the first of them.
        """
        if not self._names:
            return
        rows = np.flatnonzero(log.flags & SCORED)
        first = int(self._before[start])
        values = self._values[first : first + len(rows)][:, self._places]
        log.row_dense[np.ix_(rows, self._columns)] = values

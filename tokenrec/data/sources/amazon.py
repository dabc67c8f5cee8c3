"""Read Amazon reviews (2014), 5-core, for next-item prediction: leave-one-out.

The files are the sequences that S3-Rec was published with (K. Zhou et al., CIKM 2020,
arXiv 2008.07873), made from the reviews of J. McAuley et al. (SIGIR 2015). They are for
research use and may not be redistributed.

- `NAME.txt`: a line per user, `user item item ...`, in the order of time. All of it is
  used.
- `NAME_item2attributes.json` (optional): item to attribute ids (category, brand). At
  most `attributes` of an item are kept.

Ratings, review texts, prices and times are not part of these files. A user's last item
is test, the one before it valid, and all others train. For the last run of a config
whose settings are chosen, the one before it can be train too (`held_out=1`).

Without times, the n-th item of a user is placed n days after a start that all users
share: the order within a user is real; hours, gaps and the order between users are not.
An item is all that is known of a row, so no outcome of the row can be an input.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature, Schema
from tokenrec.data.source import SPLITS, Provenance
from tokenrec.errors import InputError
from tokenrec.runtime.files import RetryingFile, read_json

START_MS = 1_388_534_400_000  # 2014-01-01 UTC, arbitrary
DAY_MS = 86_400_000
ROWS_PER_BATCH = 250_000
LARGEST_ID = np.iinfo(np.int64).max


class AmazonSource:
    """Review sequences as a `Source`: all rows are events and scored, without a task.

    Every item of a sequence is in the catalogue. One that occurs in valid or test alone
    has the `item_id` that means unknown: it is cold. A user with no more than
    `held_out` items is train throughout, since nothing would be left to learn from.
    Items that repeat within a sequence stay.

    `provenance.counts` has `short_users`, users from whom nothing is held out, and
    `attributes_cut`, values beyond `attributes`.

    Args:
      root: folder of the files.
      name: name of the data, `Beauty` for `Beauty.txt`. Without
        `Beauty_item2attributes.json` there is no feature `attributes`; its length is
        the largest number of different attributes of an item.
      attributes: the most attributes kept of an item, in the order of the file. Eight
        keep all of Beauty, where an item has at most 6, and all but 31 values of 50,876
        of Toys and Games (16).
      held_out: last items of a user that are not train: 2, valid and test, or 1, test
        alone.

    Raises:
      InputError: a file is missing or does not hold what it should; names file and
        line.
    """

    def __init__(
        self, root: Path, name: str, attributes: int = 8, held_out: int = 2
    ) -> None:
        if attributes < 1:
            raise InputError(
                f"attributes={attributes} must be at least 1; remove the file of "
                "attributes to have none"
            )
        if held_out not in (1, 2):
            raise InputError(
                f"held_out={held_out} must be 2, valid and test, or 1, test alone"
            )
        root = Path(root)
        self._held_out = held_out
        self._path = _find_sequences(root, name)
        attribute_file = root / f"{name}_item2attributes.json"
        files = [self._path]
        features = [Feature("item_id", "categorical", "item")]
        sequence_lengths = np.diff(self._sequences.start)
        counts = {"short_users": int((sequence_lengths <= held_out).sum())}
        self._attributes: dict[int, list[int]] = {}
        if attribute_file.is_file():
            files.append(attribute_file)
            all_attributes = _read_attributes(attribute_file)
            longest = max(map(len, all_attributes.values()), default=0)
            # A multi-valued feature has room for one value at least.
            length = min(max(longest, 1), attributes)
            features.append(
                Feature("attributes", "multi_valued", "item", length=length)
            )
            counts["attributes_cut"] = sum(
                max(len(values) - length, 0) for values in all_attributes.values()
            )
            self._attributes = {
                item: values[:length] for item, values in all_attributes.items()
            }
        self.schema = Schema(tuple(features), ())
        self.provenance = Provenance(
            name=f"amazon {name}",
            licence="research use; do not redistribute",
            citation="J. McAuley et al., Image-Based Recommendations on Styles and "
            "Substitutes, SIGIR 2015; prepared by K. Zhou et al., S3-Rec, CIKM 2020",
            files=tuple(files),
            counts=counts,
        )

    def users(self) -> pa.Table:
        return pa.table({"user_id": self._sequences.user})

    def items(self) -> pa.Table:
        """Return the items of all sequences, with their attributes, null for none."""
        item = np.unique(self._sequences.item)
        columns: dict[str, Any] = {"item_id": item}
        if len(self.schema.features) > 1:
            values = [self._attributes.get(number) or None for number in item.tolist()]
            columns["attributes"] = pa.array(values, pa.list_(pa.int64()))
        return pa.table(columns)

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the rows, one user's sequence after another."""
        user = self._sequences.user
        start = self._sequences.start
        item = self._sequences.item
        length = np.diff(start)
        for first in range(0, len(item), ROWS_PER_BATCH):
            row = np.arange(first, min(first + ROWS_PER_BATCH, len(item)))
            # The user whose sequence holds the row.
            owner = np.searchsorted(start, row, side="right") - 1
            position = row - start[owner]
            remaining = start[owner + 1] - row
            # The last item (remaining 1) is test, however many are held out.
            split = np.where(
                remaining <= self._held_out,
                len(SPLITS) - remaining,
                SPLITS.index("train"),
            )
            # Train (0) for users who are too short.
            split *= length[owner] > self._held_out
            always = np.ones(len(row), bool)
            yield pa.RecordBatch.from_pydict(
                {
                    "user_id": user[owner],
                    "item_id": item[row],
                    "time_ms": START_MS + DAY_MS * position,
                    "split": split.astype(np.int8),
                    "event": always,
                    "scored": always,
                    "request": np.full(len(row), -1),
                }
            )

    @functools.cached_property
    def _sequences(self) -> Sequences:
        return read_sequences(self._path)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """Item sequences of all users, one after another; U users, E items.

    Attributes:
      user: `[U] int64`, original ids.
      item: `[E] int64`, original ids.
      start: `[U + 1] int64`, position in `item` of each user's first item.
    """

    user: np.ndarray
    item: np.ndarray
    start: np.ndarray


def read_sequences(path: Path) -> Sequences:
    """Read a file of lines `user item item ...`; blank lines are skipped.

    Raises:
      InputError: a line holds something else than whole numbers, no item, or the user
        of an earlier line; names file and line.
    """
    line_of_user: dict[int, int] = {}
    items: list[np.ndarray] = []
    with io.BufferedReader(RetryingFile(path)) as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            place = f"{path}, line {number}"
            # Fields are bytes: `isdigit` of a string accepts digits of other scripts.
            for field in fields:
                if not field.isdigit() or int(field) > LARGEST_ID:
                    value = field.decode(errors="replace")
                    raise InputError(
                        f"{place}: '{value}' is not an id; ids are whole numbers from "
                        "0 to 2^63 - 1; renumber it"
                    )
            user, *sequence = map(int, fields)
            if not sequence:
                raise InputError(
                    f"{place}: user {user} has no item; complete or remove the line"
                )
            if user in line_of_user:
                raise InputError(
                    f"{place}: user {user} has a sequence in line "
                    f"{line_of_user[user]}; join the two, or renumber the user"
                )
            line_of_user[user] = number
            items.append(np.array(sequence, np.int64))
    if not items:
        raise InputError(
            f"{path} holds no sequence; a line is `user item item ...`; check the file"
        )
    lengths = np.array([len(sequence) for sequence in items])
    return Sequences(
        np.fromiter(line_of_user, np.int64, len(line_of_user)),
        np.concatenate(items),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def _find_sequences(root: Path, name: str) -> Path:
    """Return the path of `name`'s sequences; without it, name those that are there."""
    path = root / f"{name}.txt"
    if not path.is_file():
        names = ", ".join(sorted(path.stem for path in root.glob("*.txt"))) or "none"
        raise InputError(
            f"name='{name}': '{root}' holds no {path.name}, a line `user item item "
            f"...` per user; name one of its data sets ({names}), or the folder that "
            "holds the files of S3-Rec"
        )
    return path


def _read_attributes(path: Path) -> dict[int, list[int]]:
    """Read the different attributes of each item, in the order of the file."""
    value = read_json(
        path, "attributes", "correct it, or remove it to have no attributes"
    )
    if not isinstance(value, dict):
        raise InputError(
            f"{path} holds a {type(value).__name__}; it must map items to lists, as in "
            '{"4": [1, 2]}; correct the file'
        )
    attributes_of_item: dict[int, list[int]] = {}
    for item, attributes in value.items():
        if not (item.isascii() and item.isdigit()):
            raise InputError(
                f"{path}: the item '{item}' is not a whole number, as in the "
                "sequences; renumber it"
            )
        # `isinstance(True, int)` holds, but a bool is no attribute.
        if not isinstance(attributes, list) or not all(
            type(attribute) is int for attribute in attributes
        ):
            raise InputError(
                f"{path}: item {item} has {attributes!r}; attributes are a list of "
                "whole numbers; correct it"
            )
        attributes_of_item[int(item)] = list(dict.fromkeys(attributes))
    return attributes_of_item

"""Amazon reviews (2014), 5-core, as the sequences that S3-Rec was published with: the next item, leave-one-out.

`NAME.txt` has a line per user, `user item item ...` in the order of time; `NAME_item2attributes.json` maps an item to
attribute ids (category, brand). A user's last item is test, the one before it valid, all others train; or, for the last
run of a config whose settings are chosen, the one before it is train too.

The files hold no times. The n-th item of a user stands n days after a start that all users share: the order within a
user is real, hours, gaps and the order between users are not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature, Schema
from tokenrec.data.source import SPLITS, Provenance
from tokenrec.errors import InputError
from tokenrec.runtime.files import read_json

START_MS = 1_388_534_400_000  # 2014-01-01 UTC, arbitrary
DAY_MS = 86_400_000
ROWS_PER_BATCH = 250_000
LARGEST_ID = np.iinfo(np.int64).max


class AmazonSource:
    """Review sequences as rows (data/source.py): each is an event and scored, and there is no task.

    Every item of a sequence is a row of the catalogue. One that occurs in valid or test alone has the `item_id` that
    means unknown: it is cold. A user with no more than `held_out` items is train throughout, since nothing would be
    left to learn from. Items that repeat within a sequence stay.

    `provenance.counts` has `short_users`, those from whom nothing is held out, and `attributes_cut`, values beyond
    `attributes`.

    Args:
      root: folder of the files.
      name: of the data, `Beauty` for `Beauty.txt`. Without `Beauty_item2attributes.json` there is no feature
        `attributes`; its length is the largest number of different attributes of an item.
      attributes: the most that are kept of an item, in the order of the file. Eight keep all of Beauty, where an item
        has at most 6, and all but 31 values of 50,876 of Toys and Games (16).
      held_out: last items of a user that are not train: 2, valid and test, or 1, test alone.

    Raises:
      InputError: a file is missing or does not hold what it should; names file and line.
    """

    def __init__(
        self, root: Path, name: str, attributes: int = 8, held_out: int = 2
    ) -> None:
        if attributes < 1:
            raise InputError(
                f"attributes={attributes} must be at least 1; remove the file of attributes to have none"
            )
        if held_out not in (1, 2):
            raise InputError(
                f"held_out={held_out} must be 2, valid and test, or 1, test alone"
            )
        root, self._held_out = Path(root), held_out
        self._path = root / f"{name}.txt"
        if not self._path.is_file():
            there = (
                ", ".join(sorted(path.stem for path in root.glob("*.txt"))) or "none"
            )
            raise InputError(
                f"name='{name}': '{root}' holds no {self._path.name}, a line `user item item ...` per user; name one "
                f"of its data sets ({there}), or the folder where S3-Rec's files lie"
            )
        described = root / f"{name}_item2attributes.json"
        files = (self._path, described) if described.is_file() else (self._path,)
        counts = {
            "short_users": int((np.diff(self._sequences.start) <= held_out).sum())
        }
        features = [Feature("item_id", "categorical", "item")]
        self._attributes: dict[int, list[int]] = {}
        if described in files:
            found = _read_attributes(described)
            longest = max(map(len, found.values()), default=0)
            length = min(max(longest, 1), attributes)
            features.append(
                Feature("attributes", "multi_valued", "item", length=length)
            )
            counts["attributes_cut"] = sum(
                max(len(values) - length, 0) for values in found.values()
            )
            self._attributes = {item: values[:length] for item, values in found.items()}
        self.schema = Schema(tuple(features), ())
        self.provenance = Provenance(
            name=f"amazon {name}",
            licence="research use; do not redistribute",
            citation="J. McAuley et al., Image-Based Recommendations on Styles and Substitutes, SIGIR 2015; prepared "
            "by K. Zhou et al., S3-Rec, CIKM 2020",
            files=files,
            counts=counts,
        )

    def users(self) -> pa.Table:
        return pa.table({"user_id": self._sequences.user})

    def items(self) -> pa.Table:
        """Every item of a sequence, with its attributes; null for an item that has none."""
        item = np.unique(self._sequences.item)
        columns: dict[str, Any] = {"item_id": item}
        if len(self.schema.features) > 1:
            values = [self._attributes.get(one) or None for one in item.tolist()]
            columns["attributes"] = pa.array(values, pa.list_(pa.int64()))
        return pa.table(columns)

    def rows(self) -> Iterator[pa.RecordBatch]:
        user, start, item = (
            self._sequences.user,
            self._sequences.start,
            self._sequences.item,
        )
        length = np.diff(start)
        for first in range(0, len(item), ROWS_PER_BATCH):
            row = np.arange(first, min(first + ROWS_PER_BATCH, len(item)))
            owner = np.searchsorted(start, row, side="right") - 1
            position, remaining = row - start[owner], start[owner + 1] - row
            # The last item is test, however many are held out.
            held_out = np.where(
                remaining <= self._held_out,
                len(SPLITS) - remaining,
                SPLITS.index("train"),
            )
            held_out *= length[owner] > self._held_out
            yes = np.ones(len(row), bool)
            yield pa.RecordBatch.from_pydict(
                {
                    "user_id": user[owner],
                    "item_id": item[row],
                    "time_ms": START_MS + DAY_MS * position,
                    "split": held_out.astype(np.int8),
                    "event": yes,
                    "scored": yes,
                    "request": np.full(len(row), -1),
                }
            )

    @functools.cached_property
    def _sequences(self) -> Sequences:
        return read_sequences(self._path)


@dataclasses.dataclass(frozen=True)
class Sequences:
    """`user: [U]`, `item: [E]` users one after another, `start: [U + 1]` the first item of each; all int64."""

    user: np.ndarray
    item: np.ndarray
    start: np.ndarray


def read_sequences(path: Path) -> Sequences:
    """Reads a file of lines `user item item ...`; blank lines are passed over.

    Raises:
      InputError: a line holds something else than whole numbers, no item, or a user of an earlier line.
    """
    line_of: dict[int, int] = {}
    items: list[np.ndarray] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if not fields:
                continue
            place = f"{path}, line {number}"
            for field in fields:
                if not field.isdigit() or int(field) > LARGEST_ID:
                    shown = field.decode(errors="replace")
                    raise InputError(
                        f"{place}: '{shown}' is not an id; ids are whole numbers from 0 to 2^63 - 1"
                    )
            user, *sequence = map(int, fields)
            if not sequence:
                raise InputError(
                    f"{place}: user {user} has no item; complete or remove the line"
                )
            if user in line_of:
                raise InputError(
                    f"{place}: user {user} has a sequence in line {line_of[user]}; join the two, or renumber the user"
                )
            line_of[user] = number
            items.append(np.array(sequence, np.int64))
    if not items:
        raise InputError(f"{path} holds no sequence; a line is `user item item ...`")
    lengths = np.array([len(sequence) for sequence in items])
    return Sequences(
        np.fromiter(line_of, np.int64, len(line_of)),
        np.concatenate(items),
        np.concatenate([[0], np.cumsum(lengths)]),
    )


def _read_attributes(path: Path) -> dict[int, list[int]]:
    """Item -> different attributes, in the order of the file."""
    value = read_json(
        path, "attributes", "correct it, or remove it to have no attributes"
    )
    if not isinstance(value, dict):
        raise InputError(
            f'{path} holds a {type(value).__name__}; it must map items to lists, {{"4": [1, 2]}}'
        )
    out: dict[int, list[int]] = {}
    for item, attributes in value.items():
        if not (item.isascii() and item.isdigit()):
            raise InputError(
                f"{path}: the item '{item}' is not a whole number, as in the sequences; renumber it"
            )
        if not isinstance(attributes, list) or not all(
            type(one) is int for one in attributes
        ):
            raise InputError(
                f"{path}: item {item} has {attributes!r}; attributes are a list of whole numbers"
            )
        out[int(item)] = list(dict.fromkeys(attributes))
    return out

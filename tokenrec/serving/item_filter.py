"""Which items a request for items allows, `[V] bool`, decided on the host.

    drop_seen    not those of the history, all of it, also of events the model does not read
    exclude      not these ids
    filter       those whose features have one of these values, or lie in this range

Features of items come from the artifact's catalogue. Letters: V items, I and D columns of
`ids` and `dense` (schema.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.data.schema import FIRST_KNOWN, Feature, columns
from tokenrec.errors import suggest
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.request import BadRequest, short_repr
from tokenrec.serving.retrieval_request import Bounds, Condition, RetrievalRequest
from tokenrec.serving.serving_data import ServedCatalogue, load_tables
from tokenrec.serving.vocabularies import ValueNumbers

_VALUES = ("categorical", "multi_valued")
# Values that are compared one by one, which takes 20 us each for 100,000 items.
_FEW = 16


class ItemFilter:
    """Decide which items requests allow. Any number of threads may use it.

    Args:
      artifact: an artifact of a retrieval run.
      catalogue: its items.

    Raises:
      InputError: a file of the artifact is damaged.
    """

    def __init__(self, artifact: Artifact, catalogue: ServedCatalogue) -> None:
        manifest = artifact.manifest
        features = artifact.schema.group("catalogue")
        self._items: int = manifest["items"]
        self._drop_seen: bool = manifest["drop_seen"]
        self._places = catalogue.places
        self._dense = catalogue.dense
        self._features = {f.name: f for f in features}
        self._spans = columns(features)
        # Not those that the model reads: values that are too rare share a row there.
        ids = artifact.read_array(manifest["filter_ids"])[: self._items]
        # `[length, V]` of each feature: a column of a wide matrix is slow to read.
        self._ids = {
            f.name: np.ascontiguousarray(ids[:, slice(*self._spans.ids[f.name])].T)
            for f in features
            if f.kind in _VALUES
        }
        self._tables: dict[str, ValueNumbers] = load_tables(
            artifact,
            {f.table_name for f in features if f.kind in _VALUES},
            shared=False,
        )

    def allowed(self, request: RetrievalRequest) -> np.ndarray | None:
        """The items that a request allows, `[V] bool`; None for all of them.

        Raises:
          BadRequest: a condition is on no feature that items have, or names a value
            that training has not seen.
        """
        conditions = [
            self._matches(name, condition) for name, condition in request.filter.items()
        ]
        left_out = self._rows(request.exclude, "exclude")
        history = request.request.history
        drop_seen = request.drop_seen
        if (self._drop_seen if drop_seen is None else drop_seen) and history:
            seen = self._rows(history["item_id"], "history.item_id")
            left_out = np.concatenate([left_out, seen])
        if not conditions and not len(left_out):
            return None
        allowed = np.ones(self._items, bool)
        for matches in conditions:
            allowed &= matches
        allowed[left_out] = False
        return allowed

    def _rows(self, ids: Sequence[Any] | np.ndarray, where: str) -> np.ndarray:
        """Catalogue rows of ids; an id that the catalogue lacks has none."""
        rows = self._places.find(ids, where)
        return rows[(rows >= 0) & (rows < self._items)]

    def _matches(self, name: str, condition: Condition) -> np.ndarray:
        """The items that meet a condition, `[V] bool`."""
        where = f"filter.{name}"
        f = self._features.get(name)
        if f is None:
            raise BadRequest(
                f"{where}: no feature that the model has once per item"
                f"{suggest(name, self._features)}"
            )
        if f.kind == "dense":
            return self._in_range(f, condition, where)
        if f.kind not in _VALUES:
            raise BadRequest(
                f"{where}: is a feature of the kind {f.kind}, which has no values to "
                "compare; filter by one that is categorical, multi_valued or dense"
            )
        if isinstance(condition, Bounds):
            raise BadRequest(
                f"{where}: has a range, and the feature is {f.kind}; send a list of values"
            )
        wanted = self._tables[f.table_name].find(condition, where)
        for value, number in zip(condition, wanted.tolist(), strict=True):
            if number < FIRST_KNOWN:
                raise BadRequest(
                    f"{where}: {short_repr(value)} is no value of the training data; "
                    "send values that it has"
                )
        matches = np.zeros(self._items, bool)
        for column in self._ids[name]:
            if len(wanted) > _FEW:
                matches |= np.isin(column, wanted)
                continue
            for number in wanted:
                matches |= column == number
        return matches

    def _in_range(self, f: Feature, condition: Condition, where: str) -> np.ndarray:
        if not isinstance(condition, Bounds):
            raise BadRequest(
                f"{where}: has a list of values, and the feature is a number; send "
                '{"min": ..., "max": ...}'
            )
        start, _ = self._spans.dense[f.name]
        numbers = self._dense[: self._items, start]
        low = -np.inf if condition.low is None else condition.low
        high = np.inf if condition.high is None else condition.high
        # Bounds are rounded as the numbers were. A number that is missing is NaN, which
        # is in no range.
        with np.errstate(over="ignore"):
            return (numbers >= np.float32(low)) & (numbers <= np.float32(high))

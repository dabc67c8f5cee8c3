"""Encode a request: columns of raw values to the arrays that the programs read.

    request.user                       features of the user
    request.history                    item, context and action of each event
    request.context, .candidates       item and context of each candidate

Features of an item that are stored once per item come from the artifact's catalogue, by
`item_id`. A value that training has not seen is id 1, a null id 0 or NaN, and a column
that is missing an error: read as nulls, it would change every score silently.

Letters: T events, C candidates, I and D columns of `ids` and `dense` (schema.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from tokenrec.data.schema import MISSING, Feature
from tokenrec.errors import suggest
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.encoded import Arrays, Encoded, Unknown
from tokenrec.serving.feature_values import FeatureGroup
from tokenrec.serving.request import BadRequest, Column, Request, Value
from tokenrec.serving.serving_data import load_catalogue, load_tables


class Encoder:
    """Encode requests for one artifact. Any number of threads may use it.

    Args:
      artifact: the artifact.
      allow_missing: features whose columns a request may leave out; they are read as
        null then.

    Raises:
      InputError: `allow_missing` names a feature that the model does not have, or a
        file of the artifact is damaged.
    """

    def __init__(self, artifact: Artifact, allow_missing: Sequence[str] = ()) -> None:
        schema = artifact.schema
        self._allowed = {schema.feature(name).name for name in allow_missing}
        self._events: int = artifact.manifest["events"]
        self._ages: bool = artifact.manifest["ages"]
        self._query: bool = artifact.manifest["query"]
        self._catalogue = load_catalogue(artifact)
        tables = load_tables(artifact)
        self._user = FeatureGroup(schema.group("user"), tables)
        self._items = FeatureGroup(schema.group("catalogue"), tables)
        self._row = FeatureGroup(schema.group("row"), tables)
        self._action = FeatureGroup(schema.group("action"), tables)
        self._state = FeatureGroup(schema.state, tables)
        row_features = self._row.features
        self._context = {f.name for f in row_features if f.entity == "context"}
        # Columns of the state that a query shows: the context.
        place = self._state.place
        self._context_ids = _mask(place.ids, self._context, place.ids_width)
        self._context_dense = _mask(place.dense, self._context, place.dense_width)
        ignored = set(artifact.manifest["ignored"])
        row, items = _names(self._row), _names(self._items) | {"item_id"}
        self._known = {
            "user": _names(self._user) | ignored | {"user_id"},
            "context": self._context | ignored,
            "candidates": row | items | ignored,
            "history": row | items | _names(self._action) | ignored | {"time_ms"},
        }

    def encode(self, request: Request) -> Encoded:
        """Encode a request.

        Raises:
          BadRequest: a column is missing or unknown, or a value does not fit its
            feature.
        """
        self._check_names(request)
        newest = _newest(request.history, self._events)
        count = len(newest["item_id"]) if newest else 0
        # 1. User and history, right-aligned.
        user = self._encode(self._user, _as_columns(request.user), "user", 1)
        events, event_items = self._encode_state(newest, {}, "history", count)
        action = self._encode(self._action, newest, "history", count)
        prefix: Arrays = {"user_ids": user[0][0], "user_dense": user[1][0]}
        for name, (ids, dense) in (("state", events), ("action", action)):
            prefix[f"{name}_ids"] = _right_align(ids, self._events, MISSING)
            prefix[f"{name}_dense"] = _right_align(dense, self._events, np.nan)
        prefix["valid"] = np.arange(self._events) >= self._events - count
        if self._ages:
            prefix["ages"] = self._event_ages(newest, request.time_ms, count)
        # 2. Candidates.
        candidates = request.candidate_count
        target, items = self._encode_state(
            request.candidates, request.context, "candidates", candidates
        )
        if self._query:
            # The first candidate's context is that of the request.
            first_ids, first_dense = target[0][:1], target[1][:1]
            prefix["query_ids"] = np.where(self._context_ids, first_ids, MISSING)
            prefix["query_dense"] = np.where(
                self._context_dense, first_dense, np.float32(np.nan)
            )
        return Encoded(
            prefix=prefix,
            target_ids=target[0],
            target_dense=target[1],
            prefix_key=_digest(prefix),
            events=count,
            unknown=self._unknown(user, events, action, target, event_items, items),
        )

    def blank(self) -> Encoded:
        """A request without user, history and context, and one unknown candidate."""
        events = self._events
        prefix: Arrays = {}
        lead: tuple[int, ...]
        for name, group, lead in (
            ("user", self._user, ()),
            ("state", self._state, (events,)),
            ("action", self._action, (events,)),
            ("query", self._state, (1,)),
        ):
            if name == "query" and not self._query:
                continue
            ids, dense = group.blank(*lead)
            prefix[f"{name}_ids"], prefix[f"{name}_dense"] = ids, dense
        prefix["valid"] = np.zeros(events, bool)
        if self._ages:
            prefix["ages"] = np.zeros(events, np.int32)
        target_ids, target_dense = self._state.blank(1)
        return Encoded(
            prefix=prefix,
            target_ids=target_ids,
            target_dense=target_dense,
            prefix_key=_digest(prefix),
            events=0,
            unknown=Unknown(1, 0, (0,), {}, {}),
        )

    def _encode_state(
        self,
        given: dict[str, Column],
        context: dict[str, Value],
        part: str,
        count: int,
    ) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Encode item and context of events or candidates.

        Args:
          given: columns of the part.
          context: values that all rows share.
          part: name of the part, for messages.
          count: number of rows.

        Returns:
          `[n, I]` and `[n, D]`, and the catalogue rows `[n]`, negative where an item is
          not known.
        """
        row = self._encode(self._row, given, part, count, context)
        if not count:
            return self._state.blank(0), np.empty(0, np.int64)
        items = self._catalogue.places.find(given["item_id"], f"{part}.item_id")
        item_ids, item_dense = self._catalogue.take(items)
        unknown = items < 0
        if unknown.any():
            # What the caller knows of a new item.
            self._items.encode(given, part, item_ids, item_dense, unknown)
        ids = np.concatenate([item_ids, row[0]], axis=1)
        dense = np.concatenate([item_dense, row[1]], axis=1)
        return (ids, dense), items

    def _encode(
        self,
        group: FeatureGroup,
        given: dict[str, Column],
        part: str,
        count: int,
        context: dict[str, Value] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode the columns of some features: `[n, I]` and `[n, D]`."""
        ids, dense = group.blank(count)
        if not count:
            return ids, dense
        found = dict(given)
        for f in group.features:
            if f.name in found:
                continue
            if context and f.name in context:
                found[f.name] = [context[f.name]] * count
            elif f.name not in self._allowed:
                raise BadRequest(self._missing(f, part))
        group.encode(found, part, ids, dense)
        return ids, dense

    def _missing(self, feature: Feature, part: str) -> str:
        where = part
        if part == "candidates" and feature.name in self._context:
            where = "context"
        return (
            f"{where}.{feature.name}: the column is missing, and the model was trained "
            "with it; send it, with null where a value is missing, or serve with "
            f"--allow-missing {feature.name}"
        )

    def _check_names(self, request: Request) -> None:
        for part, known in self._known.items():
            for name in getattr(request, part):
                if name not in known:
                    elsewhere = [p for p, names in self._known.items() if name in names]
                    hint = (
                        f"; send it in '{elsewhere[0]}'"
                        if elsewhere
                        else suggest(name, known)
                    )
                    raise BadRequest(
                        f"{part}: the model has no column {name!r} there{hint}"
                    )

    def _event_ages(
        self, newest: dict[str, Column], time_ms: int, count: int
    ) -> np.ndarray:
        """Whole seconds from each event to the request, `[T] int32`, as in gather.py."""
        ages = np.zeros(self._events, np.int32)
        if count:
            times = np.asarray(newest["time_ms"], np.int64) // 1000
            apart = time_ms // 1000 - times
            ages[-count:] = np.minimum(apart, np.iinfo(np.int32).max)
        return ages

    def _unknown(
        self,
        user: tuple[np.ndarray, np.ndarray],
        events: tuple[np.ndarray, np.ndarray],
        action: tuple[np.ndarray, np.ndarray],
        target: tuple[np.ndarray, np.ndarray],
        event_items: np.ndarray,
        items: np.ndarray,
    ) -> Unknown:
        values: dict[str, int] = {}
        missing: dict[str, int] = {}
        for group, (ids, dense) in (
            (self._user, user),
            (self._state, events),
            (self._action, action),
            (self._state, target),
        ):
            group.count(ids, dense, values, missing)
        return Unknown(
            items=int((items < 0).sum()),
            history_items=int((event_items < 0).sum()),
            rows=tuple(np.flatnonzero(items < 0).tolist()),
            values=values,
            missing=missing,
        )


def _names(group: FeatureGroup) -> set[str]:
    return {f.name for f in group.features}


def _mask(spans: dict[str, tuple[int, int]], names: set[str], width: int) -> np.ndarray:
    """Columns of some features, `[width] bool`."""
    mask = np.zeros(width, bool)
    for name, span in spans.items():
        mask[slice(*span)] = name in names
    return mask


def _as_columns(values: dict[str, Value]) -> dict[str, Any]:
    return {name: [value] for name, value in values.items()}


def _newest(history: dict[str, Column], events: int) -> dict[str, Column]:
    """The newest events of a history."""
    length = len(history["item_id"]) if history else 0
    if not length:
        return {}
    return {name: column[max(length - events, 0) :] for name, column in history.items()}


def _right_align(matrix: np.ndarray, length: int, blank: float) -> np.ndarray:
    """`[n, W]` to `[length, W]`, filled up at the top."""
    out = np.full((length, matrix.shape[1]), blank, matrix.dtype)
    if len(matrix):
        out[-len(matrix) :] = matrix
    return out


def _digest(arrays: Arrays) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()

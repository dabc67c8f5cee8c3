"""Encode what a request is besides its candidates: user, history and context.

    request.user       features of the user
    request.history    item, context and action of each event
    request.context    what all candidates share, or the query of a request for items

Features of an item that are stored once per item come from the artifact's catalogue, by
`item_id`. A value that training has not seen is id 1, a null id 0 or NaN, and a column
that is missing an error: read as nulls, it would change every score silently.

Letters: T events, n rows, I and D columns of `ids` and `dense` (schema.py).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenrec.data.schema import MISSING, Feature
from tokenrec.errors import suggest
from tokenrec.serving.artifact import Artifact
from tokenrec.serving.encoded import Arrays, Unknown
from tokenrec.serving.feature_values import FeatureGroup
from tokenrec.serving.request import BadRequest, Column, Request, Value
from tokenrec.serving.serving_data import load_catalogue, load_tables

type Matrices = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class EncodedPast:
    """User and history as arrays.

    Attributes:
      arrays: inputs of the model, events right-aligned; no batch dimension.
      items: `[n] int64`, catalogue rows of the n events that are read, negative where an
        item is not known.
      unknown: what the model does not know of them; it counts no candidate.
    """

    arrays: Arrays
    items: np.ndarray
    unknown: Unknown


class PrefixEncoder:
    """Encode the parts of requests for one artifact. Any number of threads may use it.

    Args:
      artifact: the artifact.
      allow_missing: features whose columns a request may leave out; they are read as
        null then.

    Attributes:
      events: T, the most events that are read.
      catalogue: the items.
      tables: ids of each table.
      state: columns of item and context.
      context: names of the features of the context.
      context_ids: `[I] bool`, columns of the context among those of `state`.
      context_dense: `[D] bool`, likewise.
      known: part of a request -> names of its columns.

    Raises:
      InputError: `allow_missing` names a feature that the model does not have, or a
        file of the artifact is damaged.
    """

    def __init__(self, artifact: Artifact, allow_missing: Sequence[str] = ()) -> None:
        schema = artifact.schema
        self._allowed = {schema.feature(name).name for name in allow_missing}
        self._ages: bool = artifact.manifest["ages"]
        self.events: int = artifact.manifest["events"]
        self.catalogue = load_catalogue(artifact)
        self.tables = load_tables(artifact)
        self._user = FeatureGroup(schema.group("user"), self.tables)
        self._items = FeatureGroup(schema.group("catalogue"), self.tables)
        self._row = FeatureGroup(schema.group("row"), self.tables)
        self._action = FeatureGroup(schema.group("action"), self.tables)
        self.state = FeatureGroup(schema.state, self.tables)
        self.context = {f.name for f in self._row.features if f.entity == "context"}
        place = self.state.place
        self.context_ids = _mask(place.ids, self.context, place.ids_width)
        self.context_dense = _mask(place.dense, self.context, place.dense_width)
        ignored = set(artifact.manifest["ignored"])
        row, items = _names(self._row), _names(self._items) | {"item_id"}
        self.known = {
            "user": _names(self._user) | ignored | {"user_id"},
            "context": self.context | ignored,
            "candidates": row | items | ignored,
            "history": row | items | _names(self._action) | ignored | {"time_ms"},
        }

    def past(self, request: Request) -> EncodedPast:
        """Encode user and history.

        Raises:
          BadRequest: a column is missing or unknown, or a value does not fit its
            feature.
        """
        self._check_names(request)
        newest = _newest(request.history, self.events)
        count = len(newest["item_id"]) if newest else 0
        user = self.columns(self._user, _as_columns(request.user), "user", 1)
        state, items = self.states(newest, {}, "history", count)
        action = self.columns(self._action, newest, "history", count)
        arrays: Arrays = {"user_ids": user[0][0], "user_dense": user[1][0]}
        for name, (ids, dense) in (("state", state), ("action", action)):
            arrays[f"{name}_ids"] = right_align(ids, self.events, MISSING)
            arrays[f"{name}_dense"] = right_align(dense, self.events, np.nan)
        arrays["valid"] = np.arange(self.events) >= self.events - count
        if self._ages:
            arrays["ages"] = self._event_ages(newest, request.time_ms, count)
        unknown = Unknown(0, int((items < 0).sum()), (), {}, {})
        for group, (ids, dense) in (
            (self._user, user),
            (self.state, state),
            (self._action, action),
        ):
            group.count(ids, dense, unknown.values, unknown.missing)
        return EncodedPast(arrays, items, unknown)

    def blank_past(self) -> Arrays:
        """Arrays of a request without user and history."""
        arrays: Arrays = {}
        lead: tuple[int, ...]
        for name, group, lead in (
            ("user", self._user, ()),
            ("state", self.state, (self.events,)),
            ("action", self._action, (self.events,)),
        ):
            arrays[f"{name}_ids"], arrays[f"{name}_dense"] = group.blank(*lead)
        arrays["valid"] = np.zeros(self.events, bool)
        if self._ages:
            arrays["ages"] = np.zeros(self.events, np.int32)
        return arrays

    def states(
        self,
        given: Mapping[str, Column],
        context: Mapping[str, Value],
        part: str,
        count: int,
    ) -> tuple[Matrices, np.ndarray]:
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
        row = self.columns(self._row, given, part, count, context)
        if not count:
            return self.state.blank(0), np.empty(0, np.int64)
        items = self.catalogue.places.find(given["item_id"], f"{part}.item_id")
        item_ids, item_dense = self.catalogue.take(items)
        unknown = items < 0
        if unknown.any():
            # What the caller knows of a new item.
            self._items.encode(given, part, item_ids, item_dense, unknown)
        ids = np.concatenate([item_ids, row[0]], axis=1)
        dense = np.concatenate([item_dense, row[1]], axis=1)
        return (ids, dense), items

    def columns(
        self,
        group: FeatureGroup,
        given: Mapping[str, Column],
        part: str,
        count: int,
        context: Mapping[str, Value] | None = None,
    ) -> Matrices:
        """Encode the columns of some features: `[n, I]` and `[n, D]`.

        Raises:
          BadRequest: a column is missing that may not be, or a value does not fit.
        """
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
        if part == "candidates" and feature.name in self.context:
            where = "context"
        return (
            f"{where}.{feature.name}: the column is missing, and the model was trained "
            "with it; send it, with null where a value is missing, or serve with "
            f"--allow-missing {feature.name}"
        )

    def _check_names(self, request: Request) -> None:
        for part, known in self.known.items():
            for name in getattr(request, part):
                if name not in known:
                    elsewhere = [p for p, names in self.known.items() if name in names]
                    hint = (
                        f"; send it in '{elsewhere[0]}'"
                        if elsewhere
                        else suggest(name, known)
                    )
                    raise BadRequest(
                        f"{part}: the model has no column {name!r} there{hint}"
                    )

    def _event_ages(
        self, newest: Mapping[str, Column], time_ms: int, count: int
    ) -> np.ndarray:
        """Whole seconds from each event to the request, `[T] int32`, as in gather.py."""
        ages = np.zeros(self.events, np.int32)
        if count:
            times = np.asarray(newest["time_ms"], np.int64) // 1000
            apart = time_ms // 1000 - times
            ages[-count:] = np.minimum(apart, np.iinfo(np.int32).max)
        return ages


def right_align(matrix: np.ndarray, length: int, blank: float) -> np.ndarray:
    """`[n, ...]` to `[length, ...]`, filled up at the top."""
    out = np.full((length, *matrix.shape[1:]), blank, matrix.dtype)
    if len(matrix):
        out[-len(matrix) :] = matrix
    return out


def digest_arrays(arrays: Arrays) -> bytes:
    """Digest of arrays by their names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()


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

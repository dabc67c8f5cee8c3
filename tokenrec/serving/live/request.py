"""The log rows that a request asks about, and the columns that it gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from tokenrec.data.schema import Feature
from tokenrec.errors import InputError
from tokenrec.serving.live.schema import LiveSchema, Row, to_arrow
from tokenrec.serving.request import BadRequest, Column, Request, Value


def candidate_rows(
    request: Request, schema: LiveSchema, needed: Sequence[Feature], any_item: Any
) -> list[Row]:
    """Make a log row of each candidate; of a request for items a single one.

    Args:
      request: the request.
      schema: columns of log rows.
      needed: features that the request has to give.
      any_item: id of an item, for the row of a request for items: what is computed of
        its context depends on no item.

    Raises:
      BadRequest: something is missing, there already, or has another type.
    """
    if request.history:
        raise BadRequest(
            "history: the state fills it in; leave it out, or send the computed columns "
            "yourself too and do not ask the state"
        )
    for part, names in (
        ("context", request.context.keys()),
        ("candidates", request.candidates.keys()),
    ):
        for name in sorted(names & set(schema.computed)):
            raise BadRequest(
                f"{part}.{name}: is computed from earlier events; leave it out"
            )
    if "user_id" not in request.user:
        raise BadRequest("user: the field 'user_id' is missing; send it")
    try:
        return _rows(request, schema, needed, any_item)
    except BadRequest:
        raise
    except InputError as error:
        raise BadRequest(str(error)) from error


def _rows(
    request: Request, schema: LiveSchema, needed: Sequence[Feature], any_item: Any
) -> list[Row]:
    items = request.candidates.get("item_id", [any_item])
    count = len(items)
    types = schema.arrow_schema(["user_id", "item_id"])
    columns: dict[str, list[Any]] = {
        "user_id": _ids([request.user["user_id"]], types, "user_id", "user") * count,
        "item_id": _ids(items, types, "item_id", "candidates"),
        "time_ms": [request.time_ms] * count,
        "event": [False] * count,
        "scored": [True] * count,
        "request": [-1] * count,
    }
    for feature in needed:
        columns[feature.name] = _feature(request, schema, feature)
    none = [None] * count
    return list(
        zip(*(columns.get(name, none) for name in schema.row_columns), strict=True)
    )


def _ids(values: Any, types: pa.Schema, name: str, part: str) -> list[Any]:
    where = f"{part}.{name}"
    ids: list[Any] = to_arrow(values, types.field(name).type, where).to_pylist()
    if None in ids:
        raise BadRequest(f"{where}: is null; send an id")
    return ids


def _feature(request: Request, schema: LiveSchema, feature: Feature) -> list[Any]:
    """Values of a feature, one for each candidate."""
    count = request.candidate_count or 1
    in_context = feature.entity == "context"
    part = "context" if in_context else "candidates"
    columns: Mapping[str, Any] = request.context if in_context else request.candidates
    where = f"{part}.{feature.name}"
    if not in_context and not request.candidates:
        return [None]
    if feature.name not in columns:
        raise BadRequest(
            f"{where}: is missing, and statistics of the past count by it; send it, null "
            "where it is missing"
        )
    values = columns[feature.name]
    if in_context:
        return schema.convert(feature, [values], where) * count
    return schema.convert(feature, values, where)


def computed_columns(
    request: Request, schema: LiveSchema, computed: np.ndarray
) -> tuple[dict[str, Value], dict[str, Column]]:
    """Add the computed columns to the context and the candidates of a request.

    Args:
      request: the request.
      schema: columns of log rows.
      computed: `[C, F] float32`, the computed features, NaN where missing; `[1, F]` of a
        request for items.
    """
    context, candidates = dict(request.context), dict(request.candidates)
    for name, values in zip(schema.computed, computed.T, strict=True):
        if schema.schema.feature(name).entity == "context":
            # The same for all candidates: no column of its key is of the item.
            context[name] = None if np.isnan(values[0]) else float(values[0])
        elif candidates:
            candidates[name] = values
    for name in schema.exclude:
        context.pop(name, None)
        candidates.pop(name, None)
    return context, candidates

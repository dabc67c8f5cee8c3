"""Add semantic ids as an item feature to a data set that was prepared without them.

`tokenrec semantic-ids` builds semantic ids from a prepared data set, so they cannot be
among its features. When a config names them (`data.semantic_ids`), the data set is
opened with one more feature, in memory only. Their file is in semantic_id_file.py.
"""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, Schema
from tokenrec.data.vocabulary import semantic_rows
from tokenrec.errors import InputError

SEMANTIC_ID = "semantic_id"


def with_semantic_id(schema: Schema, codes: np.ndarray) -> Schema:
    """Add the feature `semantic_id`, its table, its level sizes and its digest.

    Args:
      schema: schema of the data set.
      codes: `[N, L] int32`, codes of the catalogue's items, from 0.

    Raises:
      InputError: the schema has a feature of that name already.
    """
    if any(f.name == SEMANTIC_ID for f in schema.features):
        raise InputError(
            f"data.semantic_ids: the data set has a feature '{SEMANTIC_ID}' of its "
            "own; leave one out"
        )
    levels = tuple(int(code) + 1 for code in codes.max(axis=0))
    feature = Feature(
        SEMANTIC_ID, "semantic_id", "item", length=len(levels), codes=max(levels)
    )
    # Columns of a group are in the order of its features, so that the last feature has
    # the last columns: those on disk need not move.
    features = (*schema.features, feature)
    tables = schema.tables | {SEMANTIC_ID: semantic_rows(feature)}
    digest = hashlib.sha256(np.ascontiguousarray(codes, "<i4")).hexdigest()
    return dataclasses.replace(
        schema, features=features, tables=tables, levels=levels, codes_digest=digest
    )


def semantic_columns(codes: np.ndarray) -> np.ndarray:
    """Convert codes `[N, L] int32` to ids of the feature's table, of the same shape.

    A code of -1 is missing.

    Every level has table rows of its own: `id = 2 + level * width + code`, where width
    is the size of the largest code book.
    """
    width = int(codes.max()) + 1
    ids = FIRST_KNOWN + np.arange(codes.shape[1]) * width + codes
    return np.where(codes < 0, MISSING, ids).astype(np.int32)

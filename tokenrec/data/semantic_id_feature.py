"""Semantic ids as an item feature of a data set that was prepared without them."""

from __future__ import annotations

import dataclasses
import hashlib

import numpy as np

from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema
from tokenrec.data.vocabulary import semantic_rows
from tokenrec.errors import InputError

SEMANTIC_ID = "semantic_id"


def with_semantic_id(schema: Schema, codes: np.ndarray) -> Schema:
    """The schema with the feature `semantic_id`, last in the catalogue, the sizes of its levels and their digest.

    `codes: [N, L]` of the catalogue, from 0.

    Raises:
      InputError: the schema has a feature of that name already.
    """
    if any(f.name == SEMANTIC_ID for f in schema.features):
        raise InputError(
            f"data.semantic_ids: the data set has a feature '{SEMANTIC_ID}' of its own; leave one out"
        )
    levels = tuple(int(top) + 1 for top in codes.max(axis=0))
    feature = Feature(
        SEMANTIC_ID, "semantic_id", "item", length=len(levels), codes=max(levels)
    )
    # Columns of a group lie in the order of its features: last in the catalogue is last in the catalogue's columns.
    features = (*schema.features, feature)
    tables = schema.tables | {SEMANTIC_ID: semantic_rows(feature)}
    digest = hashlib.sha256(np.ascontiguousarray(codes, "<i4")).hexdigest()
    return dataclasses.replace(
        schema, features=features, tables=tables, levels=levels, codes_digest=digest
    )


def semantic_columns(codes: np.ndarray) -> np.ndarray:
    """`[N, L] int32`: codes as ids of the feature's table, in which every level has rows of its own."""
    width = int(codes.max()) + 1
    return (FIRST_KNOWN + np.arange(codes.shape[1]) * width + codes).astype(np.int32)

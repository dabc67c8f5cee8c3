"""Vectors of the catalogue, by original item id."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tokenrec.checkpoint.run_folder import OpenedRun
from tokenrec.data.schema import FIRST_KNOWN, columns
from tokenrec.errors import InputError
from tokenrec.models.heads import NextItemHead
from tokenrec.ops.tables.storage import to_storage_index
from tokenrec.sharding import to_host
from tokenrec.state import bind_params
from tokenrec.tokens.output_vectors import (
    CATALOGUE_PARTS,
    ITEM_ROWS,
    all_output_vectors,
)


def item_vectors(run: OpenedRun) -> pa.Table:
    """Collect the vector of each item; call it under the run's mesh.

    Retrieval of the next item: the output vectors, from the dense weights (full softmax)
    or from the row-wise tables (sampled softmax), `head.item_features` included. Other
    runs: the table rows of the item's id, which is the categorical item feature with a
    value of its own for every item.

    Returns:
      `item_id` and `vector: [V, d] float32`, in the order of the catalogue.

    Raises:
      InputError: no feature tells all items apart, so that there is no vector per item.
    """
    catalogue = run.dataset.catalogue
    head = run.model.config.head
    if run.model.config.data.objective == "retrieval" and head.retrieval == "next_item":
        vectors = output_vectors(run, len(catalogue.item_id))
    else:
        table, ids = _item_id_feature(run)
        vectors = _table_rows(run, table, ids)
    width = vectors.shape[1]
    flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1))
    return pa.table(
        {
            "item_id": pa.array(np.asarray(catalogue.item_id)),
            "vector": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )


def output_vectors(run: OpenedRun, count: int) -> np.ndarray:
    """Output vectors `[V, d]` of V = `count` items, of a head "next_item"."""
    head = bind_params(run.model, run.state.params).head
    assert isinstance(head, NextItemHead)
    if head.items is not None:
        return np.asarray(to_host(head.items[...]))
    embedder = run.model.embedder
    if embedder.item_ids is None:
        return _table_rows(run, ITEM_ROWS.name, np.arange(count))
    # Tables of `head.item_features` are never spread.
    name, stack = next(
        (name, stack)
        for name, stack in embedder.stacks.items()
        if ITEM_ROWS.name in stack.offsets
    )
    features = embedder.parts[CATALOGUE_PARTS[0]]
    vectors = all_output_vectors(
        run.state.tables[name], stack, features, embedder.item_ids, count
    )
    return np.asarray(to_host(vectors))


def _item_id_feature(run: OpenedRun) -> tuple[str, np.ndarray]:
    """Table and row ids, `[V]`, of the feature that tells all items apart."""
    features = run.model.schema.group("catalogue")
    spans = columns(features).ids
    for feature in features:
        if feature.kind != "categorical":
            continue
        start, _ = spans[feature.name]
        ids = np.asarray(run.dataset.catalogue.ids[:, start])
        # Items that the training days lack share the id for unknown values.
        known = ids[ids >= FIRST_KNOWN]
        if len(known) and len(np.unique(known)) == len(known):
            # The model reads shared rows for rare items (`tokens.min_count`).
            rare = run.dataset.rare_ids.get(feature.table_name)
            return feature.table_name, ids if rare is None else rare[ids]
    names = ", ".join(feature.name for feature in features)
    raise InputError(
        "the model has no vector per item: no categorical item feature has a value of "
        f"its own for every item (it reads {names}); train with the item's id among the "
        "features, or with data.objective=retrieval"
    )


def _table_rows(run: OpenedRun, table: str, ids: np.ndarray) -> np.ndarray:
    """Rows `[n, width]` of a table, wherever they are stored."""
    for name, stack in run.model.embedder.stacks.items():
        if table in stack.offsets:
            stored = np.asarray(to_host(run.state.tables[name]))
            # Packed lines of rows are the rows in another shape.
            stored = stored.reshape(-1, stack.width)
            rows = ids + stack.offsets[table]
            # Rows of a spread stack are dealt out over the devices in another order.
            return stored[to_storage_index(rows, len(stored)) if stack.spread else rows]
    raise InputError(f"table '{table}' is in no stack; it has no rows to return")

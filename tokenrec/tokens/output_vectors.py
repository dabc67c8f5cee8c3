"""Output vectors of items for a sampled softmax: a table row, and shared features.

The vector that a read-out is scored against is, for an item v with `head.item_features`
F, of which v has the known values v_f1 .. v_fn:

    e_v = E[v] + sum_{f in F} mean_k E_f[v_fk]

A rare item has few gradients of its own; through its brand and category it takes part
in those of similar items. E_f are tables of the width of the model, apart from those
that the token makers read.

The feature ids of all items are a constant of the compiled programs, V integers for
each value: negatives are drawn inside the step, where no input pipeline reaches.

Letters: V items, I integers of an item, d model width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config import Config
from tokenrec.data.schema import (
    FIRST_KNOWN,
    VALUE_KINDS,
    Feature,
    Schema,
    columns,
)
from tokenrec.errors import InputError, suggest
from tokenrec.ops.tables.lookup import Stack, expand_rows
from tokenrec.sharding import RULES

# The item table of a sampled softmax. It has a row for each item of the catalogue and,
# unlike the tables of features, no reserved ids.
ITEM_ROWS = Feature("catalogue_item", "categorical", "item")
# Parts of a batch that are looked up in this table.
NEGATIVES_PART = "negatives"
CATALOGUE_PARTS = ("items", "goals", NEGATIVES_PART)
# Tables of `head.item_features` have this before the name of the feature's own table.
PREFIX = "output_"


def output_features(schema: Schema, config: Config) -> tuple[Feature, ...]:
    """Describe what the output vector of an item is made of, `ITEM_ROWS` first.

    Args:
      schema: schema without the excluded features.
      config: config of a sampled softmax.

    Raises:
      InputError: `head.item_features` names no item feature with values, or the name
        of its table is taken.
    """
    features = [ITEM_ROWS]
    catalogue = {f.name: f for f in schema.group("catalogue") if f.kind in VALUE_KINDS}
    for name in config.head.item_features:
        if name not in catalogue:
            raise InputError(
                f"head.item_features names '{name}', which is no categorical or "
                f"multi-valued feature of items that the model reads"
                f"{suggest(name, catalogue)}"
            )
        feature = catalogue[name]
        output = Feature(
            PREFIX + name,
            feature.kind,
            "item",
            table=PREFIX + feature.table_name,
            length=feature.length,
        )
        if output.table_name in {*schema.tables, ITEM_ROWS.name}:
            raise InputError(
                f"head.item_features names '{name}', whose table would be "
                f"'{output.table_name}', a table of the data set; rename that feature"
            )
        features.append(output)
    return tuple(features)


def output_tables(schema: Schema, features: tuple[Feature, ...]) -> dict[str, int]:
    """Rows of the tables of `output_features`, by table name."""
    return {
        f.table_name: schema.items
        if f is ITEM_ROWS
        else schema.tables[f.table_name.removeprefix(PREFIX)]
        for f in features
    }


def select_item_ids(
    schema: Schema, features: tuple[Feature, ...], catalogue_ids: np.ndarray | None
) -> np.ndarray | None:
    """Select the ids of `head.item_features` from those of the catalogue.

    Args:
      schema: schema without the excluded features.
      features: of `output_features`.
      catalogue_ids: `Catalogue.ids`; None where nothing is looked up.

    Returns:
      `[V, I] int32`, in the order of `features`; None without `catalogue_ids` or
      without `head.item_features`.
    """
    if catalogue_ids is None or len(features) == 1:
        return None
    spans = columns(schema.group("catalogue")).ids
    selected = [
        catalogue_ids[: schema.items, slice(*spans[f.name.removeprefix(PREFIX)])]
        for f in features[1:]
    ]
    return np.concatenate(selected, axis=1)


def item_table_ids(items: jax.Array, item_ids: np.ndarray | None) -> jax.Array:
    """Ids of items in the columns of `output_features`.

    Args:
      items: `[...] int32`, catalogue rows; -1, which fills up, reads row 0, and the
        reader masks it.
      item_ids: of `select_item_ids`.

    Returns:
      `[..., 1 + I] int32`.
    """
    rows = jnp.maximum(items, 0)
    if item_ids is None:
        return rows[..., None]
    table = jax.sharding.reshard(_as_constant(item_ids), RULES(None, None))
    return jnp.concatenate([rows[..., None], expand_rows(table, rows)], axis=-1)


def output_vectors(
    values: dict[str, jax.Array], ids: dict[str, jax.Array]
) -> jax.Array:
    """Add up the output vectors of items, `[..., d]`.

    Args:
      values: table rows of each of `output_features`, `[..., length, d]`.
      ids: ids of the same, `[..., length]`.
    """
    vectors = values[ITEM_ROWS.name][..., 0, :]
    for name in values:
        if name == ITEM_ROWS.name:
            continue
        # The row of *unknown* stands for values that have nothing in common.
        known = (ids[name] >= FIRST_KNOWN)[..., None]
        total = jnp.sum(jnp.where(known, values[name], 0), axis=-2)
        vectors += total / jnp.maximum(jnp.sum(known, axis=-2), 1)
    return vectors


def all_output_vectors(
    table: jax.Array,
    stack: Stack,
    features: tuple[Feature, ...],
    item_ids: np.ndarray | None,
    items: int,
) -> jax.Array:
    """Output vectors of the whole catalogue, `[V, d]`.

    Args:
      table: `[rows, d]`, a stack that every device holds.
      stack: the stack with the tables of `features`.
      features: of `output_features`.
      item_ids: of `select_item_ids`.
      items: V.
    """
    if item_ids is None:
        first = stack.offsets[ITEM_ROWS.name]
        return table[first : first + items]
    rows = jnp.arange(items, dtype=jnp.int32)[:, None]
    ids = jnp.concatenate([rows, _as_constant(item_ids)], axis=1)
    spans = columns(features).ids
    ids_of = {f.name: ids[:, slice(*spans[f.name])] for f in features}
    values = {
        f.name: table[ids_of[f.name] + stack.offsets[f.table_name]] for f in features
    }
    return output_vectors(values, ids_of)


def _as_constant(item_ids: np.ndarray) -> jax.Array:
    """The ids as a constant that XLA does not compute with while it compiles."""
    return jax.lax.optimization_barrier(jnp.asarray(item_ids))

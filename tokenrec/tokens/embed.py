"""Embedding look-ups of a batch: packed feature columns to named feature values.

The pipeline packs the features of each part of a batch into two matrices, `ids` and
`dense` (`tokenrec.data.schema.columns`). All embedding tables of one width lie in one
array, a *stack* (`tokenrec.ops.tables.lookup`), so that a step reads its table rows
with one gather per stack, whatever the number of features:

    find       ids of all parts -> distinct table rows of each stack
    gather     distinct table rows -> their vectors; gradients are taken of these
    entities   vectors -> feature name -> values, for each part of the batch

Letters: B batch, T events, C candidates, u distinct rows of a stack, w width of a
stack."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config import Config
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.errors import InputError
from tokenrec.models.words import own_tables
from tokenrec.ops.tables.api import (
    UniqueRows,
    expand_rows,
    find_unique_rows,
    gather_rows,
    stored_shape,
)
from tokenrec.ops.tables.lookup import Stack, build_stacks
from tokenrec.tokens.feature_transforms import hashed_prefix_ids, table_widths
from tokenrec.tokens.makers import FeatureArrays
from tokenrec.tokens.output_vectors import (
    CATALOGUE_PARTS,
    item_table_ids,
    output_features,
    output_tables,
    select_item_ids,
)


def samples_items(config: Config) -> bool:
    """Whether the item vectors of the head are table rows, for a sampled softmax."""
    return (
        config.data.objective == "retrieval"
        and config.head.retrieval == "next_item"
        and config.head.negatives > 0
    )


class EntityFeatures(NamedTuple):
    """The features of one part of a batch.

    Attributes:
      values: feature name -> table rows `[..., length, w]`, or numbers `[..., length]`.
      ids: name of an integer feature -> `[..., length] int32`.
    """

    values: FeatureArrays
    ids: FeatureArrays


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Static plan of the embedding look-ups of a schema.

    Attributes:
      parts: part of a batch -> its features, in the order of its columns. Parts are
        "user", "state", "action" and "target", which shares the features of "state",
        and with a sampled softmax those of `CATALOGUE_PARTS`.
      tables: table name -> number of rows.
      stacks: stack name -> its tables.
      hashed: semantic ids are looked up by the hashes of their prefixes.
      item_ids: `[V, I] int32`, ids of `head.item_features`; None without such features,
        and in a plan that looks nothing up.
    """

    parts: dict[str, tuple[Feature, ...]]
    tables: dict[str, int]
    stacks: dict[str, Stack]
    hashed: bool
    item_ids: np.ndarray | None = None

    @staticmethod
    def build(
        schema: Schema, config: Config, catalogue_ids: np.ndarray | None = None
    ) -> Embedder:
        """Plan the look-ups of a config.

        Args:
          schema: schema without the excluded features.
          config: a validated config.
          catalogue_ids: `Catalogue.ids` of the data set; `head.item_features` are not
            looked up without it.

        Raises:
          InputError: `head.item_features` does not fit the schema or
            `tokens.replicate_rows`.
        """
        parts = {
            "user": schema.group("user"),
            "state": schema.state,
            "action": schema.group("action"),
        }
        tables = schema.tables
        own = own_tables(config)
        tables = {name: rows for name, rows in tables.items() if name not in own}
        widths = table_widths(schema.features, config.tokens)
        item_ids = None
        if samples_items(config):
            features = output_features(schema, config)
            item_tables = output_tables(schema, features)
            parts |= dict.fromkeys(CATALOGUE_PARTS, features)
            tables = tables | item_tables
            # Item vectors have the model's width: they are scored against read-outs.
            widths = widths | dict.fromkeys(item_tables, config.model.width)
            item_ids = select_item_ids(schema, features, catalogue_ids)
            if len(features) > 1:
                _check_replicated(item_tables, config.tokens.replicate_rows)
        return Embedder(
            parts=parts | {"target": schema.state},
            tables=tables,
            stacks=build_stacks(tables, widths, config.tokens.replicate_rows),
            hashed=config.tokens.semantic_id == "prefix",
            item_ids=item_ids,
        )

    def find(self, batch: Batch) -> dict[str, UniqueRows]:
        """Find the distinct rows of each stack that a batch reads.

        Returns:
          Stack name -> its distinct rows; `inverses` of these are by part of the batch.
        """
        # All parts together: a row that two parts read is gathered and updated once.
        return {
            name: find_unique_rows(stack, self.stack_rows(stack, batch))
            for name, stack in self.stacks.items()
        }

    def stack_rows(self, stack: Stack, batch: Batch) -> dict[str, jax.Array]:
        """Rows of a stack that a batch reads: part -> `[B, ..., columns of the stack]`."""
        rows_by_part = {}
        for part, signals in self._signals(batch):
            id_columns, offsets = self._stack_columns(part, stack)
            ids = self._table_ids(part, signals.ids)[..., id_columns]
            # A stack is several tables one after another; the offset is where a table
            # begins.
            rows_by_part[part] = ids + jnp.asarray(offsets, jnp.int32)
        return rows_by_part

    def gather(
        self, stored: dict[str, jax.Array], unique_rows: dict[str, UniqueRows]
    ) -> dict[str, jax.Array]:
        """Gather the vectors of distinct rows: stack name -> `[u, w]`.

        Args:
          stored: stack name -> its array, the tables of the train state.
          unique_rows: the result of `find`.

        Raises:
          InputError: an array of `stored` is missing, or of another shape or type than
            its stack. A gather would read other rows instead of failing.
        """
        for name, stack in self.stacks.items():
            _check_stored(stack, stored.get(name))
        return {
            name: gather_rows(stack, stored[name], unique_rows[name])
            for name, stack in self.stacks.items()
        }

    def entities(
        self,
        rows: dict[str, jax.Array],
        inverses: dict[str, dict[str, jax.Array]],
        batch: Batch,
    ) -> dict[str, EntityFeatures]:
        """Split the vectors and the packed columns of a batch into named features.

        Args:
          rows: stack name -> `[u, w]`, the result of `gather`.
          inverses: stack name -> part -> `[B, ..., columns of the stack]`, index into
            the distinct rows (`inverses` of this module).
          batch: the batch.

        Returns:
          Part of the batch -> its features.
        """
        entities = {}
        for part, signals in self._signals(batch):
            packed = columns(self.parts[part])
            values: FeatureArrays = {
                name: signals.dense[..., slice(*span)]
                for name, span in packed.dense.items()
            }
            ids: FeatureArrays = {
                name: signals.ids[..., slice(*span)]
                for name, span in packed.ids.items()
            }
            for name, stack in self.stacks.items():
                features = self._stack_features(part, stack)
                if not features:
                    continue
                # One expansion for all features of the stack, then slices by feature.
                vectors = expand_rows(stack, rows[name], inverses[name][part])
                start = 0
                for f in features:
                    values[f.name] = vectors[..., start : start + f.length, :]
                    start += f.length
            entities[part] = EntityFeatures(values, ids)
        return entities

    def look_up(
        self, stored: dict[str, jax.Array], batch: Batch
    ) -> dict[str, EntityFeatures]:
        """Look up all features of a batch at once, where no gradient of rows is needed.

        Args:
          stored: stack name -> its array, the tables of the train state.
          batch: the batch.

        Returns:
          Part of the batch -> its features.
        """
        unique_rows = self.find(batch)
        rows = self.gather(stored, unique_rows)
        return self.entities(rows, inverses(unique_rows), batch)

    def _stack_features(self, part: str, stack: Stack) -> list[Feature]:
        """Features of a part whose table lies in a stack."""
        return [
            f
            for f in self.parts[part]
            if f.is_integer and f.table_name in stack.offsets
        ]

    def _stack_columns(self, part: str, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
        """Plan the look-ups of a part in a stack.

        Returns:
          `[n]` columns of the part's `ids`, and `[n]` stack rows of their id 0.
        """
        spans = columns(self.parts[part]).ids
        features = self._stack_features(part, stack)
        # The empty array keeps the type where there is nothing to concatenate.
        empty = np.zeros(0, int)
        id_columns = [np.arange(*spans[f.name]) for f in features]
        offsets = [np.full(f.length, stack.offsets[f.table_name]) for f in features]
        return np.concatenate([*id_columns, empty]), np.concatenate([*offsets, empty])

    def _table_ids(self, part: str, ids: jax.Array) -> jax.Array:
        """Ids as they index tables: with `hashed`, semantic-id codes become hashes."""
        if not self.hashed:
            return ids
        # Other kinds keep their ids.
        for f in self.parts[part]:
            if f.kind == "semantic_id":
                start, stop = columns(self.parts[part]).ids[f.name]
                rows = self.tables[f.table_name]
                hashes = hashed_prefix_ids(ids[..., start:stop], rows)
                ids = ids.at[..., start:stop].set(hashes)
        return ids

    def _signals(self, batch: Batch) -> list[tuple[str, Signals]]:
        """The parts that a batch has, by name."""
        parts = [
            ("user", batch.user),
            ("state", batch.state),
            ("action", batch.action),
            ("target", batch.target),
        ]
        if CATALOGUE_PARTS[0] in self.parts:
            for name, items in zip(
                CATALOGUE_PARTS,
                (batch.items, batch.goals, batch.negatives),
                strict=True,
            ):
                if items is not None:
                    parts.append((name, self._catalogue_signals(items)))
        return [(name, signals) for name, signals in parts if signals is not None]

    def _catalogue_signals(self, items: jax.Array) -> Signals:
        """Catalogue rows `[...]` as the ids of `CATALOGUE_PARTS`, `[..., 1 + I]`."""
        if self.item_ids is None and len(self.parts[CATALOGUE_PARTS[0]]) > 1:
            raise InputError(
                "head.item_features are features of a catalogue, and the model was "
                "built without one; give build_model the data set's"
            )
        ids = item_table_ids(items, self.item_ids)
        return Signals(ids, jnp.zeros((*items.shape, 0)))


def inverses(unique_rows: dict[str, UniqueRows]) -> dict[str, dict[str, jax.Array]]:
    """Index of each id among the distinct rows, for `Embedder.entities`.

    Returns:
      Stack name -> part of the batch -> `[B, ..., columns of the stack]`.
    """
    return {name: of_stack.inverses for name, of_stack in unique_rows.items()}


def _check_stored(stack: Stack, array: jax.Array | None) -> None:
    """Raise InputError unless `array` is that of the stack."""
    rows, width = stored_shape(stack)
    if array is None:
        problem = f"stack '{stack.name}' float32[{rows},{width}] is missing"
    elif array.shape != (rows, width) or array.dtype != jnp.float32:
        given = f"{array.dtype}[{','.join(map(str, array.shape))}]"
        problem = (
            f"stack '{stack.name}' is {given}, and the model needs "
            f"float32[{rows},{width}]"
        )
    else:
        return
    raise InputError(
        f"{problem} for the tables {', '.join(stack.offsets)}: these tables belong to "
        "another config or data set; build the model with those of the run that they "
        "come from, or carry them over with train.warm_start"
    )


def _check_replicated(tables: dict[str, int], replicate_rows: int) -> None:
    """Raise InputError if a table of `head.item_features`, or of items, is spread."""
    name = max(tables, key=lambda table: tables[table])
    if tables[name] > replicate_rows:
        raise InputError(
            f"tokens.replicate_rows={replicate_rows} spreads the {tables[name]:,} rows "
            f"of '{name}' over the devices, and head.item_features need them on each; "
            f"raise it to {tables[name]}, or use head.item_features=()"
        )

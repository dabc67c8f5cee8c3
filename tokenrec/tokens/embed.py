"""From the packed columns of a batch to named feature values: which stack, which row, which columns."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config import Config
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.ops.tables.api import (
    UniqueRows,
    expand_rows,
    find_unique_rows,
    gather_rows,
)
from tokenrec.ops.tables.lookup import Stack, build_stacks
from tokenrec.tokens.makers import Values
from tokenrec.tokens.transforms import prefix_ids, table_widths

# The table of a sampled softmax: a row per item of the catalogue, and no reserved ids.
ITEM_ROWS = Feature("catalogue_item", "categorical", "item")
CATALOGUE_PARTS = ("items", "goals", "negatives")


def samples_items(config: Config) -> bool:
    """The item vectors are rows of a table, of which a step reads some."""
    return (
        config.data.objective == "retrieval"
        and config.head.retrieval == "next_item"
        and config.head.negatives > 0
    )


class Entity(NamedTuple):
    """Feature values and raw ids of one part of a batch, by feature name."""

    values: Values
    ids: Values


@dataclasses.dataclass(frozen=True)
class Embedder:
    """Static plan of all look-ups of a schema: one gather per stack and step.

    A batch part is "user", "state", "action" or "target"; target shares the features of state. A sampled softmax has
    its item vectors among the tables, and looks up "items", "goals" and "negatives", rows of the catalogue, there.
    """

    parts: dict[str, tuple[Feature, ...]]
    tables: dict[str, int]
    stacks: dict[str, Stack]
    hashed: bool

    @staticmethod
    def build(schema: Schema, config: Config) -> Embedder:
        parts = {
            "user": schema.group("user"),
            "state": schema.state,
            "action": schema.group("action"),
        }
        tables, widths = schema.tables, table_widths(schema.features, config.tokens)
        if samples_items(config):
            parts |= dict.fromkeys(CATALOGUE_PARTS, (ITEM_ROWS,))
            tables, widths = (
                tables | {ITEM_ROWS.name: schema.items},
                widths | {ITEM_ROWS.name: config.model.width},
            )
        stacks = build_stacks(tables, widths, config.tokens.replicate_rows)
        return Embedder(
            parts | {"target": schema.state},
            tables,
            stacks,
            config.tokens.semantic_id == "prefix",
        )

    def _columns(self, part: str, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
        """Columns of `ids` of a part that lie in a stack, and the stack row of id 0 for each."""
        place = columns(self.parts[part]).ids
        chosen = [
            f
            for f in self.parts[part]
            if f.is_integer and f.table_name in stack.offsets
        ]
        at = [np.arange(*place[f.name]) for f in chosen]
        offsets = [np.full(f.length, stack.offsets[f.table_name]) for f in chosen]
        return np.concatenate([*at, np.zeros(0, int)]), np.concatenate(
            [*offsets, np.zeros(0, int)]
        )

    def _table_ids(self, part: str, ids: jax.Array) -> jax.Array:
        if not self.hashed:
            return ids
        for f in self.parts[part]:
            if f.kind == "semantic_id":
                start, stop = columns(self.parts[part]).ids[f.name]
                ids = ids.at[..., start:stop].set(
                    prefix_ids(ids[..., start:stop], self.tables[f.table_name])
                )
        return ids

    def find(self, batch: Batch) -> dict[str, UniqueRows]:
        """Distinct rows of every stack that the batch reads; its inverses are by part."""
        found = {}
        for name, stack in self.stacks.items():
            rows = {}
            for part, signals in self._signals(batch):
                at, offsets = self._columns(part, stack)
                rows[part] = self._table_ids(part, signals.ids)[..., at] + jnp.asarray(
                    offsets, jnp.int32
                )
            found[name] = find_unique_rows(stack, rows)
        return found

    def gather(
        self, stored: dict[str, jax.Array], found: dict[str, UniqueRows]
    ) -> dict[str, jax.Array]:
        """The rows that were found in every stack."""
        return {name: gather_rows(stored[name], found[name]) for name in self.stacks}

    def entities(
        self,
        rows: dict[str, jax.Array],
        inverses: dict[str, dict[str, jax.Array]],
        batch: Batch,
    ) -> dict[str, Entity]:
        """Values of the batch's parts from the rows that `gather` returned, and the inverses of `find`."""
        entities = {}
        for part, signals in self._signals(batch):
            place = columns(self.parts[part])
            values: Values = {
                n: signals.dense[..., slice(*at)] for n, at in place.dense.items()
            }
            ids: Values = {
                n: signals.ids[..., slice(*at)] for n, at in place.ids.items()
            }
            for name, stack in self.stacks.items():
                at, _ = self._columns(part, stack)
                if not len(at):
                    continue
                inverse = inverses[name][part]
                read = expand_rows(stack, rows[name], inverse)
                start = 0
                for f in self.parts[part]:
                    if f.is_integer and f.table_name in stack.offsets:
                        values[f.name] = read[..., start : start + f.length, :]
                        start += f.length
            entities[part] = Entity(values, ids)
        return entities

    def look_up(self, stored: dict[str, jax.Array], batch: Batch) -> dict[str, Entity]:
        """Values of every part of the batch, for a pass that takes no gradient of the rows."""
        found = self.find(batch)
        return self.entities(self.gather(stored, found), inverses(found), batch)

    def _signals(self, batch: Batch) -> list[tuple[str, Signals]]:
        named = [
            ("user", batch.user),
            ("state", batch.state),
            ("action", batch.action),
            ("target", batch.target),
        ]
        if CATALOGUE_PARTS[0] in self.parts:
            catalogue = zip(
                CATALOGUE_PARTS,
                (batch.items, batch.goals, batch.negatives),
                strict=True,
            )
            named += [
                (name, _catalogue_rows(rows))
                for name, rows in catalogue
                if rows is not None
            ]
        return [(name, signals) for name, signals in named if signals is not None]


def inverses(found: dict[str, UniqueRows]) -> dict[str, dict[str, jax.Array]]:
    """By stack and part, `[B, ..., columns of the stack]`: which of the rows found each id is."""
    return {name: of.inverses for name, of in found.items()}


def _catalogue_rows(rows: jax.Array) -> Signals:
    """Rows of the catalogue as the ids of a feature; -1 reads some row, for the reader to drop."""
    return Signals(jnp.maximum(rows, 0)[..., None], jnp.zeros((*rows.shape, 0)))

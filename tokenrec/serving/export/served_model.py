"""The model of a run as its exported programs read it, and its weights as arguments.

Embedding tables are read by row, whole and in the order of their rows: nothing is
deduplicated or spread.

Letters: B requests, T events, I and D columns of `ids` and `dense` (schema.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.config.prompt import parse_prompt
from tokenrec.data.batch import Batch
from tokenrec.ops.tables.lookup import Stack
from tokenrec.ops.tables.storage import to_storage_index
from tokenrec.serving.export.batches import VALID, Arrays, signal_shapes
from tokenrec.state import ModelSpec, TrainState
from tokenrec.tokens.embed import Embedder, EntityFeatures
from tokenrec.tokens.output_vectors import CATALOGUE_PARTS

type Weights = dict[str, dict[str, Any]]


class Program(NamedTuple):
    """A function to export.

    Attributes:
      function: `(weights, inputs) -> outputs`, dicts of arrays.
      inputs: shapes and dtypes of the inputs for B and C as given.
    """

    function: Callable[[Weights, Arrays], Arrays]
    inputs: Callable[[Any, Any], Arrays]


def history_length(model: ModelSpec) -> int:
    """T, the events of a request that the programs read."""
    data = model.config.data
    # A candidate takes the place of the last event of a ranking stream.
    return data.events - (data.paradigm == "uc" and data.objective == "ranking")


def serving_model(model: ModelSpec) -> ModelSpec:
    """The model for one device: whole tables, and attention that any platform has.

    The output vectors of a sampled softmax are no tables of it: they are computed at
    export, once for all items. Alignment tasks are trained only: without them, a language
    model has no vectors that score its words.
    """
    config = dataclasses.replace(
        model.config,
        model=dataclasses.replace(model.config.model, attention="auto"),
        head=dataclasses.replace(model.config.head, alignment={}),
    )
    embedder = model.embedder
    of_items = embedder.parts.get(CATALOGUE_PARTS[0], ())
    dropped = {f.table_name for f in of_items}
    stacks = {
        name: _keep_tables(embedder, stack, dropped)
        for name, stack in embedder.stacks.items()
        if stack.offsets.keys() - dropped
    }
    parts = {
        name: features
        for name, features in embedder.parts.items()
        if name not in CATALOGUE_PARTS
    }
    embedder = dataclasses.replace(embedder, stacks=stacks, parts=parts, item_ids=None)
    return dataclasses.replace(model, config=config, embedder=embedder, alignment=None)


def _keep_tables(embedder: Embedder, stack: Stack, dropped: set[str]) -> Stack:
    """A stack without some tables, that is not spread."""
    offsets: dict[str, int] = {}
    rows = 0
    for table in stack.offsets:
        if table not in dropped:
            offsets[table] = rows
            rows += embedder.tables[table]
    return dataclasses.replace(stack, offsets=offsets, rows=rows, spread=False)


def served_weights(model: ModelSpec, state: TrainState) -> Weights:
    """Fetch the weights of a run as NumPy arrays, as `serving_model` reads them.

    Args:
      model: the model of the run.
      state: its state; tables that are spread lie in another order there.

    Returns:
      `{"params": by name, "tables": by stack}`.
    """
    tables = {}
    for name, served in serving_model(model).embedder.stacks.items():
        stack = model.embedder.stacks[name]
        # Packed lines of rows are the rows in another shape.
        stored = np.asarray(jax.device_get(state.tables[name])).reshape(-1, stack.width)
        if stack.spread:
            rows = np.arange(stack.rows)
            stored = stored[to_storage_index(rows, stack.stored_rows)]
        if served.offsets != stack.offsets:
            starts = [stack.offsets[table] for table in served.offsets]
            lengths = [model.embedder.tables[table] for table in served.offsets]
            stored = np.concatenate(
                [
                    stored[start : start + length]
                    for start, length in zip(starts, lengths, strict=True)
                ]
            )
        tables[name] = stored
    params = {
        name: np.asarray(jax.device_get(value)) for name, value in state.params.items()
    }
    return {"params": params, "tables": tables}


def weight_shapes(model: ModelSpec) -> Weights:
    """Shapes and dtypes of `served_weights` of a model of `serving_model`."""
    tables = {
        name: jax.ShapeDtypeStruct((stack.rows, stack.width), jnp.float32)
        for name, stack in model.embedder.stacks.items()
    }
    return {"params": model.param_shapes(), "tables": tables}


def reads_query(model: ModelSpec) -> bool:
    """Whether the prompt has the context of the request."""
    return any(segment.kind == "query" for segment in parse_prompt(model.config))


def request_shapes(model: ModelSpec, events: int, batch: Any, query: bool) -> Arrays:
    """Shapes of the user, the history of T events and, if the prompt has one, the query."""
    schema = model.schema
    inputs = (
        signal_shapes("user", schema.group("user"), (batch,))
        | signal_shapes("state", schema.state, (batch, events))
        | signal_shapes("action", schema.group("action"), (batch, events))
        | {VALID: jax.ShapeDtypeStruct((batch, events), jnp.bool_)}
    )
    if query:
        inputs |= signal_shapes("query", schema.state, (batch, 1))
    return inputs


def look_up(
    model: ModelSpec, weights: Weights, batch: Batch
) -> dict[str, EntityFeatures]:
    """Look up the features of a batch, row by row."""
    embedder = model.embedder
    rows = {
        name: embedder.stack_rows(stack, batch)
        for name, stack in embedder.stacks.items()
    }
    return embedder.entities(weights["tables"], rows, batch)

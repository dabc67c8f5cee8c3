"""Abstract inputs of a train step: model, state and batch, without any data."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.interaction_log import Catalogue
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.data.schema import FIRST_KNOWN, Schema, columns
from tokenrec.state import ModelSpec, TrainState, abstract_state, build_model


class PlannedInputs(NamedTuple):
    """Inputs from which a train step is compiled.

    Attributes:
      model: static half of the run.
      state: weights, tables and optimizer state as `jax.ShapeDtypeStruct`, with their
        shardings on the mesh.
      batch: the batch of the longest streams as `jax.ShapeDtypeStruct`, without
        shardings.
    """

    model: ModelSpec
    state: TrainState
    batch: Batch


def planned_inputs(
    config: Config,
    schema: Schema,
    mesh: Mesh,
    *,
    batch_size: int | None = None,
    updates: int = 1,
) -> PlannedInputs:
    """Build the abstract inputs of a config on a mesh; nothing is allocated.

    Args:
      config: a validated config; of several stream lengths, the longest is planned.
      schema: all features of the data set; `data.exclude` is applied here.
      mesh: mesh whose devices may be described only.
      batch_size: samples over all devices; None is `data.batch_size`.
      updates: as `ModelSpec.updates`.

    Returns:
      The model, its abstract state and the abstract batch.

    Raises:
      InputError: the config and the schema do not go together.
    """
    schema = schema.without(config.data.exclude)
    # How many steps a run and an epoch have changes no shape: with `optim.epochs` they
    # may not be known, and any will do.
    optim = config.optim
    steps = optim.steps or max(optim.warmup_steps, 1)
    config = dataclasses.replace(config, optim=dataclasses.replace(optim, steps=steps))
    model = build_model(
        config,
        schema,
        task_names(schema, config.data),
        epoch_steps=steps,
        updates=updates,
        catalogue=_planned_catalogue(config, schema),
    )
    batch = batch_shapes(
        schema,
        config.data,
        batch_size=config.data.batch_size if batch_size is None else batch_size,
        ages=reads_event_ages(config.model),
    )[config.data.events]
    # Shardings come from the mesh in use: an array has one size per device on every
    # mesh.
    with jax.set_mesh(mesh):
        state = abstract_state(model)
    return PlannedInputs(model, state, batch)


def _planned_catalogue(config: Config, schema: Schema) -> Catalogue | None:
    """A catalogue of the planned size, for the options of the head that read one."""
    if not (config.head.item_features or config.head.alignment):
        return None
    # It has no values yet: `head.item_features` are all missing.
    ids = np.zeros(
        (schema.items, columns(schema.group("catalogue")).ids_width), np.int32
    )
    if config.head.alignment:
        # Texts of their full length.
        ids[:] = FIRST_KNOWN
    return Catalogue(
        item_id=np.arange(schema.items),
        ids=ids,
        dense=np.zeros((schema.items, 0), np.float32),
        codes=np.zeros((schema.items, len(schema.levels)), np.int32),
    )

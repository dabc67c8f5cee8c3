"""Batches of the model, made inside a program from its inputs.

Letters: B requests, T events, C candidates.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import columns
from tokenrec.errors import InputError

type Arrays = dict[str, Any]

# Name of the input that says which events are real.
VALID = "valid"


def signal_shapes(
    name: str, features: Any, lead: tuple[Any, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the two matrices of an entity, with the dimensions `lead` in front."""
    place = columns(features)
    return {
        f"{name}_ids": jax.ShapeDtypeStruct((*lead, place.ids_width), jnp.int32),
        f"{name}_dense": jax.ShapeDtypeStruct((*lead, place.dense_width), jnp.float32),
    }


def signals_of(inputs: Arrays, name: str) -> Signals:
    """The matrices of an entity."""
    return Signals(inputs[f"{name}_ids"], inputs[f"{name}_dense"])


def batch_of(inputs: Arrays, target: Signals | None) -> Batch:
    """A batch of user and history, with these candidates or this query, if any."""
    valid = inputs[VALID]
    count = 0 if target is None else target.ids.shape[1]
    return Batch(
        user=signals_of(inputs, "user"),
        state=signals_of(inputs, "state"),
        action=signals_of(inputs, "action"),
        valid=valid,
        target=target,
        labels=None,
        # All candidates are real; what fills a batch is dropped by the caller.
        weight=jnp.ones((valid.shape[0], count), jnp.float32),
        ages=inputs.get("ages"),
    )


def targets_alone(target: Signals) -> Batch:
    """A batch that holds candidates and nothing else."""
    lead = target.ids.shape[:2]
    return Batch(
        user=None,  # type: ignore[arg-type]
        state=None,  # type: ignore[arg-type]
        action=None,  # type: ignore[arg-type]
        valid=jnp.ones((lead[0], 0), bool),
        target=target,
        labels=None,
        weight=jnp.ones(lead, jnp.float32),
    )


def as_stream(batch: Batch) -> Batch:
    """Append the only candidate to the history, as the newest event of a stream (UC)."""
    if batch.target is None or batch.target.ids.shape[1] != 1:
        raise InputError("a stream ends with one candidate")
    state = Signals(
        *(
            jnp.concatenate(pair, axis=1)
            for pair in zip(batch.state, batch.target, strict=True)
        )
    )
    # Nothing sees the action of the candidate, which is not known.
    ids, dense = batch.action
    action = Signals(
        jnp.pad(ids, ((0, 0), (0, 1), (0, 0))),
        jnp.pad(dense, ((0, 0), (0, 1), (0, 0)), constant_values=jnp.nan),
    )
    valid = jnp.pad(batch.valid, ((0, 0), (0, 1)), constant_values=True)
    ages = batch.ages
    return batch._replace(
        state=state,
        action=action,
        valid=valid,
        target=None,
        weight=valid.astype(jnp.float32),
        ages=None if ages is None else jnp.pad(ages, ((0, 0), (0, 1))),
    )

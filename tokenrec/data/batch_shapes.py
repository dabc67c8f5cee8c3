"""Derive tasks, stream lengths and batch shapes from a config, before any data is read.

The step is compiled for these shapes, and the pipeline yields no others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from tokenrec.config import DataConfig
from tokenrec.data.batch import Batch, Signals
from tokenrec.data.schema import Feature, Schema, columns
from tokenrec.errors import InputError, suggest


def task_names(schema: Schema, config: DataConfig) -> tuple[str, ...]:
    """Choose the tasks, in the order of the label columns of a batch.

    Returns:
      Ranking: the tasks of `config.tasks`, or all of the schema's if that is empty.
      Retrieval: the task of `config.positive`, or none.

    Raises:
      InputError: the data set has no such task, or none at all to rank by.
    """
    known = tuple(task.name for task in schema.tasks)
    if config.objective == "retrieval":
        if config.positive and config.positive not in known:
            raise InputError(
                f"data.positive: the data set has no task '{config.positive}'"
                f"{suggest(config.positive, known)}"
            )
        if config.positive and config.positive not in {
            task.name for task in schema.binary_tasks
        }:
            raise InputError(
                f"data.positive='{config.positive}' is no binary task, whose positive "
                "labels are the items to retrieve; name another, or leave it empty"
            )
        return (config.positive,) if config.positive else ()
    if not known:
        raise InputError(
            "data.objective='ranking', but the data set has no task, only events; use "
            "data.objective='retrieval'"
        )
    for name in config.tasks:
        if name not in known:
            raise InputError(
                f"data.tasks: the data set has no task '{name}'{suggest(name, known)}"
            )
    return tuple(config.tasks) or known


def target_columns(schema: Schema, tasks: Sequence[str]) -> list[int]:
    """Columns of `InteractionLog.targets` of the tasks of numbers, in their order."""
    real = [task.name for task in schema.real_tasks]
    return [real.index(name) for name in tasks if name in real]


def stream_lengths(config: DataConfig) -> tuple[int, ...]:
    """List the T of each bucket, shortest first.

    A history is padded to the shortest length that holds it. Each length is one more
    compilation of the step.
    """
    return tuple(sorted({*config.buckets, config.events}))


def batch_shapes(
    schema: Schema, config: DataConfig, *, batch_size: int, ages: bool = False
) -> dict[int, Batch]:
    """Describe the batches of every stream length.

    Args:
      schema: schema of the data set, without the excluded features.
      config: `data` of the run's config.
      batch_size: B.
      ages: batches hold `Batch.ages`.

    Returns:
      Stream length T -> `Batch` of `jax.ShapeDtypeStruct`, with the shapes of
      `tokenrec.data.batch`.

    Raises:
      InputError: the data set has no such task.
    """
    names = task_names(schema, config)
    targets = len(target_columns(schema, names))
    if config.objective == "retrieval":
        targets = 0
    return {
        length: _batch_shape(
            schema,
            config,
            (batch_size, length),
            tasks=len(names),
            targets=targets,
            ages=ages,
        )
        for length in stream_lengths(config)
    }


def _batch_shape(
    schema: Schema,
    config: DataConfig,
    positions: tuple[int, int],
    *,
    tasks: int,
    targets: int,
    ages: bool,
) -> Batch:
    """Describe a batch with histories of `positions = (B, T)`."""
    size, length = positions
    nio = config.paradigm == "nio"
    retrieval = config.objective == "retrieval"
    # A request of ranking reads each candidate; one of retrieval reads the end of the
    # history once. A stream reads every event.
    per_request = 1 if retrieval else config.candidates
    read_outs = per_request if nio else length
    # Read-outs, and goals of each.
    goals = (size, 1, config.candidates) if nio else (size, length, 1)
    return Batch(
        user=_signals(schema.group("user"), size),
        state=_signals(schema.state, size, length),
        action=_signals(schema.group("action"), size, length),
        valid=_array(np.bool_, size, length),
        target=_signals(schema.state, size, read_outs) if nio else None,
        labels=None if retrieval else _array(np.int8, size, read_outs, tasks),
        weight=_array(np.float32, size, read_outs),
        items=_array(np.int32, size, length) if retrieval else None,
        goals=_array(np.int32, *goals) if retrieval else None,
        codes=(
            _array(np.int32, *goals, len(schema.levels))
            if retrieval and schema.levels
            else None
        ),
        ages=_array(np.int32, size, length) if ages else None,
        targets=_array(np.float32, size, read_outs, targets) if targets else None,
    )


def _signals(features: Sequence[Feature], *axes: int) -> Signals:
    widths = columns(features)
    return Signals(
        _array(np.int32, *axes, widths.ids_width),
        _array(np.float32, *axes, widths.dense_width),
    )


def _array(dtype: type[np.generic], *shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

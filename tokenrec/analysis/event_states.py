"""States of events inside a trained model, layer by layer, and measurements of them.

The state of an event is the vector at its token (the state token, or the fused event
token) after a layer. `collapse_report` measures the states of every layer: effective
rank, singular values, and information on the labels (docs/methods.md section 5).

B streams, R events in a stream, K tasks, d model width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.analysis.information import CLUSTERS, cluster_information
from tokenrec.analysis.rank import LEAST_ROWS, effective_rank, singular_values
from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.config import Config
from tokenrec.data.batch import Batch, HostBatch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import eval_batches
from tokenrec.errors import InputError
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.stream_layout import batch_layout, candidate_mask
from tokenrec.sharding import make_run_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.layout import Layout

# Streams that are read by default. With one event each they hold LEAST_ROWS events.
STREAMS = 4096


class EventStates(NamedTuple):
    """States of n events of a run.

    Attributes:
      layers: "tokens" (the input of the first block), "layer_0", "layer_1" and so on
        (the outputs of the blocks) -> `[n, d] float32`.
      labels: task -> `[n] int8`, 1, 0, or -1 where unknown; empty for retrieval.
      step: training step of the checkpoint.
    """

    layers: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    step: int


def with_all_positions(model: ModelSpec) -> ModelSpec:
    """Return the model with every position computed in every layer.

    By default a layer computes only the positions that later layers need
    (`model.needed_rows`), and most events have no state in the top layers. The weights
    are the same.

    Raises:
      InputError: the backbone is not TokenFormer; others have no such layers.
    """
    kind = model.config.model.kind
    if kind != "tokenformer":
        raise InputError(
            f"model.kind='{kind}': event states exist for model.kind='tokenformer' "
            "only; measure a run of that kind"
        )
    all_needed = dataclasses.replace(model.config.model, needed_rows=False)
    config = dataclasses.replace(model.config, model=all_needed)
    return dataclasses.replace(model, config=config)


def event_positions(layout: Layout) -> np.ndarray:
    """Positions `[R]` of events in a stream: state tokens, or fused event tokens."""
    return layout.positions_of("state", "event")


def states_and_gates(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[list[jax.Array], list[jax.Array]]:
    """Compute the states and the gates of a batch at its events, without dropout.

    Jit it under the mesh of the state.

    Args:
      model: a model of `with_all_positions`.
      state: weights and tables.
      batch: B streams.

    Returns:
      The states, `[B, R, d] float32` for the tokens and for each block; and the gates,
      `[B, R] float32` for each block, the mean over the width. Without `model.gate` the
      second list is empty.
    """
    module = bind_params(model, state.params)
    backbone = module.backbone
    assert isinstance(backbone, TokenFormer)
    tokens, outputs = module.trace(
        model.embedder.look_up(state.tables, batch), batch, None
    )
    layout = batch_layout(model.config, model.schema, model.literals, batch)
    # `trace` returns the tokens before additive positions; blocks see them after.
    inputs, _ = backbone.prepare_inputs(
        tokens, layout, np.arange(layout.length), batch.valid, candidate_mask(batch)
    )
    positions = event_positions(layout)
    # The last output is the normalised read-out, not that of a block.
    states = [layer[:, positions] for layer in (inputs, *outputs[:-1])]
    # A gate is computed from the input of its block (docs/methods.md section 3), so the
    # last state, which no block reads, has none.
    gates = [
        jnp.mean(block.gate(block_input).astype(jnp.float32), axis=-1)
        for block, block_input in zip(backbone.layers(), states, strict=False)
        if block.gate is not None
    ]
    return [layer.astype(jnp.float32) for layer in states], gates


def real_events(model: ModelSpec, batch: Batch) -> np.ndarray:
    """Mark the events to measure: `[B, R] bool`, False for padding.

    Streams of UC repeat events of the chunk before as history. An event is measured
    once there, in the stream that scores it.
    """
    layout = batch_layout(model.config, model.schema, model.literals, batch)
    positions = event_positions(layout)
    valid = np.asarray(layout.valid(batch.valid, candidate_mask(batch)))[:, positions]
    if _scores_events(model.config):
        return valid & (np.asarray(batch.weight) > 0)
    return valid


def event_labels(model: ModelSpec, batch: Batch) -> np.ndarray:
    """Labels of the events of a batch: `[B, R, K] int8`.

    In UC these are the labels that the event's state predicts. In NIO all events of a
    stream have the labels of its first candidate.
    """
    labels = np.asarray(batch.labels)
    if _scores_events(model.config):
        return labels
    layout = batch_layout(model.config, model.schema, model.literals, batch)
    return np.repeat(labels[:, :1], len(event_positions(layout)), axis=1)


def _scores_events(config: Config) -> bool:
    return config.data.objective == "ranking" and config.data.paradigm == "uc"


def read_event_states(
    workdir: Path,
    split: str,
    *,
    checkpoint: str = "best",
    data: Path | None = None,
    rows: int = LEAST_ROWS,
    streams: int = STREAMS,
    seed: int = 0,
) -> EventStates:
    """Compute the states of a random sample of a split's events.

    Args:
      workdir: folder of the run.
      split: name of the split.
      checkpoint: "best", "latest" or a step.
      data: folder of the data set, if it is not where the run reads it.
      rows: number of events n.
      streams: streams that the events are drawn from, evenly spread over the split:
        requests (NIO) or chunks of a user's events (UC); 0 takes all.
      seed: seed of the sample.

    Raises:
      InputError: there is no such run or split, or the streams have fewer events.
    """
    config = load_run_config(workdir, data)
    mesh = make_run_mesh(config)
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
        model = with_all_positions(run.model)
        if rows < 1:
            raise InputError(f"--rows {rows}: draw at least one event state")

        # 1. Count the events of each batch and draw a sample of all. This pass over the
        # split reads data but runs no model.
        counts = [
            real_events(model, host.batch).sum()
            for host in _batches(run.dataset, config, split, streams)
        ]
        total = sum(counts)
        if total < rows:
            raise InputError(
                f"{streams or 'all'} streams of split '{split}' have {total} events, "
                f"but rows={rows} are asked for; read more streams, ask for fewer rows, "
                "or take a longer split"
            )
        generator = np.random.default_rng(seed)
        # Sorted, so that the sample of each batch is a slice of it.
        sample = np.sort(generator.choice(total, rows, replace=False))

        # 2. Compute the states of the batches that hold an event of the sample. Events
        # are numbered in the order of the batches.
        compute = jax.jit(functools.partial(states_and_gates, model))
        states: list[list[np.ndarray]] = []
        labels: list[np.ndarray] = []
        for first, count, host in zip(
            np.cumsum([0, *counts]),
            counts,
            _batches(run.dataset, config, split, streams),
            strict=False,
        ):
            in_batch = slice(*np.searchsorted(sample, (first, first + count)))
            indices = sample[in_batch] - first
            if not indices.size:
                continue
            real = real_events(model, host.batch)
            layers, _ = jax.device_get(compute(run.state, to_devices(host.batch, mesh)))
            states.append([layer[real][indices] for layer in layers])
            # Retrieval has no tasks.
            if model.tasks and host.batch.labels is not None:
                labels.append(event_labels(model, host.batch)[real][indices])

    # 3. Join the batches, layer by layer and task by task.
    of_layers = [np.concatenate(parts) for parts in zip(*states, strict=True)]
    names = layer_names(len(of_layers) - 1)
    of_tasks = {}
    if labels:
        columns = np.concatenate(labels).T
        of_tasks = {
            plan.task.name: column
            for plan, column in zip(model.task_plans, columns, strict=True)
            if plan.task.kind == "binary"
        }
    return EventStates(dict(zip(names, of_layers, strict=True)), of_tasks, run.step)


def layer_names(layers: int) -> list[str]:
    """Names of the tokens and of the outputs of `layers` blocks."""
    return ["tokens", *(f"layer_{number}" for number in range(layers))]


def _batches(
    dataset: Dataset, config: Config, split: str, streams: int
) -> Iterator[HostBatch]:
    # Without buckets all batches have one shape, and one compiled program suffices.
    one_shape = dataclasses.replace(config.data, buckets=())
    for host, _ in eval_batches(dataset, one_shape, split, limit=streams):
        yield host


def collapse_report(
    workdir: Path,
    split: str,
    *,
    clusters: Sequence[int] = CLUSTERS,
    seed: int = 0,
    **choice: Any,
) -> dict[str, Any]:
    """Measure rank, spectrum and information of a run's event states.

    Args:
      workdir: folder of the run.
      split: name of the split.
      clusters: numbers of clusters of the information on each task, which takes most of
        the time; empty for none.
      seed: seed of the sample, the clusters and the shuffles.
      choice: further arguments of `read_event_states`.

    Returns:
      A value for JSON: `{"step", "split", "rows", "layers": {layer: {"effective_rank",
      "spectrum", "information"}}}`. `spectrum` holds the singular values divided by the
      root of the number of states, so that their squares are variances. `information`
      is task -> number of clusters -> `Information`.

    Raises:
      InputError: as `read_event_states`; or there are fewer labels than clusters.
    """
    states = read_event_states(workdir, split, seed=seed, **choice)
    layers = {}
    for name, of_layer in states.layers.items():
        values = singular_values(of_layer)
        information = {}
        for task, labels in states.labels.items():
            by_count = cluster_information(
                of_layer, labels, seed=seed, clusters=clusters
            )
            information[task] = {
                str(count): estimate._asdict() for count, estimate in by_count.items()
            }
        layers[name] = {
            # The rank does not depend on the scale, so it is that of the spectrum too.
            "effective_rank": effective_rank(values),
            "spectrum": (values / np.sqrt(len(of_layer))).tolist(),
            "information": information if clusters else {},
        }
    return {
        "step": states.step,
        "split": split,
        "rows": len(of_layer),
        "layers": layers,
    }

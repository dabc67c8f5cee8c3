"""States of events inside a trained model, layer by layer, and what is measured of them (methods.md section 5)."""

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
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.layout import Layout

STREAMS = 4096


class EventStates(NamedTuple):
    """n rows that stand for an event. `layers`: "tokens", what enters the backbone, then "layer_0", ..., what leaves
    its blocks: `[n, d] float32`. `labels`: task -> `[n] int8`, -1 where unknown; none of retrieval.
    """

    layers: dict[str, np.ndarray]
    labels: dict[str, np.ndarray]
    step: int


def all_rows(model: ModelSpec) -> ModelSpec:
    """The model with every row computed in every layer; its weights are the same.

    Raises:
      InputError: the backbone is a rival's, which has no such layers.
    """
    kind = model.config.model.kind
    if kind != "tokenformer":
        raise InputError(
            f"model.kind='{kind}': event states are those of model.kind='tokenformer'; measure a run of that kind"
        )
    whole = dataclasses.replace(model.config.model, needed_rows=False)
    return dataclasses.replace(
        model, config=dataclasses.replace(model.config, model=whole)
    )


def event_rows(layout: Layout) -> np.ndarray:
    """`[R]` rows that stand for an event: its state, or the fused event."""
    return layout.positions_of("state", "event")


def states_and_gates(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What a pass without dropout holds at the event rows.

    States: of the tokens and of the output of each block, `[B, R, d] float32` each. Gates: mean over the width of each
    block's gate, which its input opens, `[B, R] float32` each; none without `model.gate`.

    Jit it under the mesh of the state. The model is one of `all_rows`.
    """
    module = bind_params(model, state.params)
    backbone = module.backbone
    assert isinstance(backbone, TokenFormer)
    tokens, outputs = module.trace(
        model.embedder.look_up(state.tables, batch), batch, None
    )
    layout = batch_layout(model.config, model.schema, model.literals, batch)
    entered, _ = backbone.prepare_inputs(
        tokens, layout, np.arange(layout.length), batch.valid, candidate_mask(batch)
    )
    rows = event_rows(layout)
    states = [layer[:, rows] for layer in (entered, *outputs[:-1])]
    gates = [
        jnp.mean(block.gate(read).astype(jnp.float32), axis=-1)
        for block, read in zip(backbone.layers(), states, strict=False)
        if block.gate is not None
    ]
    return [layer.astype(jnp.float32) for layer in states], gates


def real_events(model: ModelSpec, batch: Batch) -> np.ndarray:
    """`[B, R] bool`, event rows to be counted. Streams of UC repeat events as history; one that is read counts once."""
    layout = batch_layout(model.config, model.schema, model.literals, batch)
    valid = np.asarray(layout.valid(batch.valid, candidate_mask(batch)))[
        :, event_rows(layout)
    ]
    return (
        valid & (np.asarray(batch.weight) > 0) if _reads_events(model.config) else valid
    )


def event_labels(model: ModelSpec, batch: Batch) -> np.ndarray:
    """`[B, R, K] int8`: in UC what the row is to predict; in NIO the labels of the request, its first candidate's."""
    labels = np.asarray(batch.labels)
    if _reads_events(model.config):
        return labels
    rows = len(
        event_rows(batch_layout(model.config, model.schema, model.literals, batch))
    )
    return np.repeat(labels[:, :1], rows, axis=1)


def _reads_events(config: Config) -> bool:
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
    """Event states of a run on a split, drawn by `seed` from the event rows of `streams` evenly spread streams.

    Args:
      checkpoint: best, latest or a step.
      data: folder of the data set, if it is not where the run reads it.
      rows: n.
      streams: requests (NIO) or runs of a user's events (UC); 0 takes all.

    Raises:
      InputError: no run or split there, or the streams have fewer event rows.
    """
    config = load_run_config(workdir, data)
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
        model = all_rows(run.model)
        if rows < 1:
            raise InputError(f"--rows {rows}: draw at least one event state")
        counts = [
            real_events(model, host.batch).sum()
            for host in _batches(run.dataset, config, split, streams)
        ]
        if sum(counts) < rows:
            raise InputError(
                f"{streams or 'all'} streams of split '{split}' have {sum(counts)} event rows, and {rows} are asked "
                "for; read more streams, ask for fewer rows, or take a longer split"
            )
        drawn = np.sort(
            np.random.default_rng(seed).choice(sum(counts), rows, replace=False)
        )
        look = jax.jit(functools.partial(states_and_gates, model))
        kept: list[list[np.ndarray]] = []
        labels: list[np.ndarray] = []
        for first, count, host in zip(
            np.cumsum([0, *counts]),
            counts,
            _batches(run.dataset, config, split, streams),
            strict=False,
        ):
            mine = drawn[slice(*np.searchsorted(drawn, (first, first + count)))] - first
            if not mine.size:
                continue
            real = real_events(model, host.batch)
            made, _ = jax.device_get(look(run.state, to_devices(host.batch, mesh)))
            kept.append([layer[real][mine] for layer in made])
            if model.tasks and host.batch.labels is not None:
                labels.append(event_labels(model, host.batch)[real][mine])
    layers = [np.concatenate(parts) for parts in zip(*kept, strict=True)]
    of_tasks = (
        dict(zip(model.tasks, np.concatenate(labels).T, strict=True)) if labels else {}
    )
    return EventStates(
        dict(zip(layer_names(len(layers) - 1), layers, strict=True)), of_tasks, run.step
    )


def layer_names(layers: int) -> list[str]:
    """Names of the tokens and of the blocks' outputs."""
    return ["tokens", *(f"layer_{number}" for number in range(layers))]


def _batches(
    dataset: Dataset, config: Config, split: str, streams: int
) -> Iterator[HostBatch]:
    """One shape of batch, so that one program serves."""
    for host, _ in eval_batches(
        dataset, dataclasses.replace(config.data, buckets=()), split, limit=streams
    ):
        yield host


def collapse_report(
    workdir: Path,
    split: str,
    *,
    clusters: Sequence[int] = CLUSTERS,
    seed: int = 0,
    **choice: Any,
) -> dict[str, Any]:
    """Effective rank, spectrum and information of a run's event states: what can stand in a JSON file.

    Args:
      workdir, split, seed, choice: of `read_event_states`.
      clusters: K of the information on each task, which takes most of the time; empty for none.

    Returns:
      `{"step", "split", "rows", "layers": {layer: {"effective_rank", "spectrum", "information"}}}`; `spectrum` are the
      singular values by the root of the rows, so that their squares are variances; `information` is by task, then by
      number of clusters (information.py).

    Raises:
      InputError: as `read_event_states`; or there are fewer labels than clusters.
    """
    states = read_event_states(workdir, split, seed=seed, **choice)
    layers = {}
    for name, of_layer in states.layers.items():
        values = singular_values(of_layer)
        information = {
            task: {
                str(count): found._asdict()
                for count, found in cluster_information(
                    of_layer, labels, seed=seed, clusters=clusters
                ).items()
            }
            for task, labels in states.labels.items()
        }
        layers[name] = {
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

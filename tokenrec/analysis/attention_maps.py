"""Attention maps of a trained model, and how much attention falls on which part of a stream (methods.md section 5).

The weights are computed again from those of each block, plainly: `softmax(Q K^T / sqrt(h) + mask)` over all rows, as
`ops/dense.py` does it inside.

B streams, S rows, H heads.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.data.batch import Batch
from tokenrec.data.pipeline import eval_batches
from tokenrec.errors import InputError
from tokenrec.models.backbones.block import Block
from tokenrec.models.backbones.rope_attention import Stream
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.models.stream_layout import batch_layout, candidate_mask
from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import rms_normalize
from tokenrec.sharding import RULES, make_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.layout import ROLES, Layout

EVENT_ROLES = ("state", "action", "event")
# Events that lie this far back, and not as far as the next entry: 0 is the event itself, 1 the one before it.
DISTANCES = (0, 1, 2, 4, 8, 16, 32, 64)
LATER = "later events"


def batch_attention(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Attention of every layer on a batch, without dropout: `[B, H, S, S]` each, and `[B, S] bool`, rows that are real.

    Rows are those of `recommender.batch_layout`. Jit it, under the mesh of the state.

    Raises:
      InputError: the backbone is a rival's.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    if not isinstance(module.backbone, TokenFormer):
        raise InputError(
            f"model.kind='{model.config.model.kind}': attention maps are drawn of a run with model.kind='tokenformer'"
        )
    x, layout = module.make_stream(entities, batch)
    candidates = candidate_mask(batch)
    return stack_attention(
        module.backbone, x, layout, batch.valid, candidates
    ), layout.valid(batch.valid, candidates)


def stack_attention(
    backbone: TokenFormer,
    x: jax.Array,
    layout: Layout,
    events: jax.Array,
    candidates: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Attention weights `[B, H, S, S] float32` of each layer, softmax over the last axis; all rows are computed.

    Args:
      x: `[B, S, d]` tokens; layout: their order.
      events: `[B, T] bool` and candidates: `[B, C] bool` or None: which are real.
    """
    every, found = np.arange(layout.length), []
    x, stream = backbone.prepare_inputs(x, layout, every, events, candidates)
    for block in backbone.layers():
        found.append(block_attention(block, x, stream))
        x = block(x, every, every, stream, None)
    return tuple(found)


def block_attention(block: Block, x: jax.Array, stream: Stream) -> jax.Array:
    """Attention weights `[B, H, S, S] float32` of one block, whose input is `x: [B, S, d]`, the rows of `stream`."""
    attention, rows = block.attention, stream.positions
    normed = block.attention_norm(x)
    q = contract(
        "bsd,dhk->bshk",
        normed,
        attention.query[...],
        RULES("batch", None, "heads", None),
    )
    q = stream.rotate(rms_normalize(q) if attention.qk_norm else q, rows)
    k = attention.keys_values(normed, rows, stream).keys
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk",
        q * q.shape[-1] ** -0.5,
        k,
        preferred_element_type=jnp.float32,
    )
    pattern = stream.layout.pattern(rows, rows)
    visible = (
        jnp.asarray(pattern.visible(attention.window)) & stream.valid[:, None, None, :]
    )
    return jax.nn.softmax(
        jnp.where(visible | jnp.asarray(pattern.diagonal()), logits, MASKED), axis=-1
    )


class Maps(NamedTuple):
    """`weights: [B, H, S, S]` of each layer, the rows that they are about, which are real, and `[B]`, the
    first row of the log that each stream is to score.
    """

    weights: tuple[np.ndarray, ...]
    layout: Layout
    valid: np.ndarray
    rows: np.ndarray
    step: int


def run_maps(workdir: Path, data: Path | None, split: str, requests: int) -> Maps:
    """Maps of a run's newest checkpoint on requests (NIO) or streams (UC) that are spread evenly over a split.

    Raises:
      InputError: no run there, it does not rank, or its backbone is a rival's.
    """
    config = load_run_config(workdir, data)
    if config.data.objective != "ranking":
        raise InputError(
            f"workdir '{workdir}' holds a run that finds items; give one that ranks"
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = open_run(workdir, "latest", data)
        asked = dataclasses.replace(config.data, eval_batch_size=requests, buckets=())
        attend = jax.jit(functools.partial(batch_attention, run.model))
        found = []
        for host, _ in eval_batches(run.dataset, asked, split, limit=requests):
            weights, valid = jax.device_get(
                attend(run.state, to_devices(host.batch, mesh))
            )
            asks = (host.rows >= 0).any(axis=1)
            first = np.take_along_axis(
                host.rows, np.argmax(host.rows >= 0, axis=1)[:, None], axis=1
            )[asks, 0]
            found.append(
                (*(of_layer[asks] for of_layer in weights), valid[asks], first)
            )
            layout = batch_layout(
                run.model.config, run.model.schema, run.model.literals, host.batch
            )
    *weights, valid, rows = (np.concatenate(part) for part in zip(*found, strict=True))
    return Maps(tuple(weights), layout, valid, rows, run.step)


def attention_mass(
    weights: np.ndarray, layout: Layout, valid: np.ndarray
) -> dict[str, dict[str, np.ndarray]]:
    """Mean attention of one layer from each kind of row to each kind of row.

    Args:
      weights: `[B, H, S, S]` of a layer; valid: `[B, S] bool`, rows that are real. Others do not read.

    Returns:
      Reader -> seen -> `[H]`; what a reader sees adds up to 1. Readers are the roles of the layout, "event" standing
      for states and actions too. Seen are these roles, and events by how many events back they lie ("event 4-7"):
      from their own event in a history, and from the end of the history elsewhere, whose newest event is 1 back. With
      a bidirectional prefix there are "later events". Readers of which no row is real are left out.
    """
    roles = _row_roles(layout)
    kinds, of = _seen(layout, roles)
    held = np.stack(
        [np.where(of == kind, weights, 0).sum(axis=-1) for kind in range(len(kinds))],
        axis=-1,
    )
    found = {}
    for reader in dict.fromkeys(roles.tolist()):
        reads = valid & (roles == reader)
        if reads.any():
            mean = held.transpose(0, 2, 1, 3)[reads].mean(axis=0)
            found[reader] = {kind: mean[:, number] for number, kind in enumerate(kinds)}
    return found


def _row_roles(layout: Layout) -> np.ndarray:
    """`[S]` names of the roles."""
    names = [
        "event" if ROLES[role] in EVENT_ROLES else ROLES[role] for role in layout.roles
    ]
    return np.array(names)


def _seen(layout: Layout, roles: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names of what can be seen, and `[S, S]`, the number of the name for each reader and row."""
    past = roles == "event"
    # A code continues an event, and stands right behind it.
    place = np.where(
        past, layout.event, np.where(layout.event >= 0, layout.event + 1, layout.events)
    )
    back = place[:, None] - place[None, :]
    bands = [
        f"event {first}" if last == first + 1 else f"event {first}-{last - 1}"
        for first, last in itertools.pairwise(DISTANCES)
    ]
    bands += [f"event {DISTANCES[-1]}-"]
    kinds = [*dict.fromkeys(roles[~past].tolist()), *bands, LATER]
    band = kinds.index(bands[0]) + np.searchsorted(DISTANCES, back, side="right") - 1
    # Later events are hidden, and what no row sees needs no name, unless a prefix is read both ways.
    band = np.where(back < 0, kinds.index(LATER if layout.prefix else bands[0]), band)
    own = np.array(
        [
            0 if is_past else kinds.index(role)
            for role, is_past in zip(roles, past, strict=True)
        ]
    )
    numbers = np.where(past[None, :], band, own[None, :])
    used = np.unique(numbers)
    return [kinds[number] for number in used], np.searchsorted(used, numbers)

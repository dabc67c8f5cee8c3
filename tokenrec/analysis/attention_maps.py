"""Attention maps of a trained TokenFormer (docs/methods.md section 5).

The kernels of `tokenrec/ops/attention/` do not return attention weights. They are
computed again here from the weights of each block, in the plain form of
docs/methods.md section 3 and over all positions:

    A = softmax(RoPE(X_n W_q) RoPE(X_n W_k)^T / sqrt(h) + mask)        [B, H, S, S]

B streams, S positions of a stream, H heads, h width of a head, d model width.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.config.backbones import is_decoder
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
from tokenrec.sharding import RULES, make_run_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, bind_params
from tokenrec.tokens.layout import Layout


def batch_attention(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Compute the attention of every layer on a batch, without dropout.

    Jit it under the mesh of the state.

    Args:
      model: a model whose backbone is TokenFormer.
      state: weights and tables.
      batch: B streams.

    Returns:
      `[B, H, S, S] float32` for each layer, and `[B, S] bool`, False for padding. The
      positions are those of `batch_layout`.

    Raises:
      InputError: the backbone is not TokenFormer.
    """
    entities = model.embedder.look_up(state.tables, batch)
    module = bind_params(model, state.params)
    if not isinstance(module.backbone, TokenFormer) or is_decoder(model.config.model):
        raise InputError(
            f"model.kind='{model.config.model.kind}' has no attention maps; give a run "
            "with model.kind='tokenformer'"
        )
    x, layout = module.make_stream(entities, batch)
    candidates = candidate_mask(batch)
    maps = stack_attention(module.backbone, x, layout, batch.valid, candidates)
    return maps, layout.valid(batch.valid, candidates)


def stack_attention(
    backbone: TokenFormer,
    x: jax.Array,
    layout: Layout,
    events: jax.Array,
    candidates: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Compute the attention of every layer for given tokens.

    Args:
      backbone: the layers.
      x: `[B, S, d]`, tokens.
      layout: roles and order of the S tokens.
      events: `[B, T] bool`, False for padding.
      candidates: `[B, C] bool`, False for padding; None without candidates.

    Returns:
      `[B, H, S, S] float32` for each layer; the last axis (keys) sums to 1.
    """
    positions = np.arange(layout.length)
    maps = []
    x, stream = backbone.prepare_inputs(x, layout, positions, events, candidates)
    for block in backbone.layers():
        maps.append(block_attention(block, x, stream))
        x = block(x, positions, positions, stream, None)
    return tuple(maps)


def block_attention(block: Block, x: jax.Array, stream: Stream) -> jax.Array:
    """Compute the attention of one block.

    Args:
      block: the block.
      x: `[B, S, d]`, its input.
      stream: layout, RoPE and padding of the S tokens.

    Returns:
      `[B, H, S, S] float32`, queries by keys; the last axis sums to 1.
    """
    attention, positions = block.attention, stream.positions
    normed = block.attention_norm(x)
    q = contract(
        "bsd,dhk->bshk",
        normed,
        attention.query[...],
        RULES("batch", None, "heads", None),
    )
    q = stream.rotate(rms_normalize(q) if attention.qk_norm else q, positions)
    k = attention.keys_values(normed, positions, stream).keys
    logits = jnp.einsum(
        "bqhd,bkhd->bhqk",
        q * q.shape[-1] ** -0.5,
        k,
        preferred_element_type=jnp.float32,
    )
    pattern = stream.layout.pattern(positions, positions)
    visible = (
        jnp.asarray(pattern.visible(attention.window)) & stream.valid[:, None, None, :]
    )
    # Each position sees itself, padding included: a softmax over nothing is NaN.
    visible |= jnp.asarray(pattern.diagonal())
    return jax.nn.softmax(jnp.where(visible, logits, MASKED), axis=-1)


class AttentionMaps(NamedTuple):
    """Attention of a run on some streams of a split.

    Attributes:
      weights: `[B, H, S, S]` for each layer.
      layout: roles and order of the S positions.
      valid: `[B, S] bool`, False for padding.
      rows: `[B]`, row of the log of the first event that each stream scores.
      step: training step of the checkpoint.
    """

    weights: tuple[np.ndarray, ...]
    layout: Layout
    valid: np.ndarray
    rows: np.ndarray
    step: int


def run_maps(
    workdir: Path, data: Path | None, split: str, requests: int
) -> AttentionMaps:
    """Compute the maps of a run's newest checkpoint.

    Args:
      workdir: folder of the run.
      data: folder of the data set, if it is not where the run reads it.
      split: name of the split.
      requests: number of requests (NIO) or streams (UC), evenly spread over the split.

    Raises:
      InputError: there is no such run, it does not rank, or its backbone is not
        TokenFormer.
    """
    config = load_run_config(workdir, data)
    if config.data.objective != "ranking":
        raise InputError(
            f"workdir '{workdir}' holds a run with data.objective="
            f"'{config.data.objective}'; give one with data.objective='ranking'"
        )
    mesh = make_run_mesh(config)
    with jax.set_mesh(mesh):
        run = open_run(workdir, "latest", data)
        # Without buckets all streams have one length, so that the maps can be joined.
        one_shape = dataclasses.replace(
            config.data, eval_batch_size=requests, buckets=()
        )
        attend = jax.jit(functools.partial(batch_attention, run.model))
        parts = []
        for host, _ in eval_batches(run.dataset, one_shape, split, limit=requests):
            weights, valid = jax.device_get(
                attend(run.state, to_devices(host.batch, mesh))
            )
            # Streams that only fill up the batch score no row of the log.
            scores = host.rows >= 0
            real = scores.any(axis=1)
            first_scored = np.take_along_axis(
                host.rows, np.argmax(scores, axis=1)[:, None], axis=1
            )[real, 0]
            layers = [of_layer[real] for of_layer in weights]
            parts.append((*layers, valid[real], first_scored))
            layout = batch_layout(
                run.model.config, run.model.schema, run.model.literals, host.batch
            )
    *weights, valid, rows = (np.concatenate(part) for part in zip(*parts, strict=True))
    return AttentionMaps(tuple(weights), layout, valid, rows, run.step)

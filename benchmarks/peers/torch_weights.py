"""Copy the weights of our model into a PyTorch peer, so that both compute the same.

Importing this needs PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.peers.torch_din import TorchDIN
from benchmarks.peers.torch_features import Maker, PerField, Tokens
from benchmarks.peers.torch_tokenformer import TorchTokenFormer
from tokenrec.ops.tables.storage import to_storage_index

Weights = Mapping[str, torch.Tensor]


def copy_weights(
    model: TorchTokenFormer | TorchDIN,
    params: Mapping[str, Any],
    tables: Mapping[str, Any],
) -> None:
    """Copy our weights into a peer.

    Args:
      model: the peer.
      params: our dense weights by name, of layers that are not stacked
        (`model.scan=0`).
      tables: our stacks of tables.
    """
    ours = {name: torch.tensor(np.asarray(w)) for name, w in params.items()}
    with torch.no_grad():
        _copy_tables(model.tokens, tables)
        _copy_makers(model.tokens, ours)
        _copy_linear(model.head, ours, "head")
        if isinstance(model, TorchDIN):
            _copy_din(model, ours)
        else:
            _copy_blocks(model, ours)


def _copy_linear(layer: nn.Linear, ours: Weights, name: str) -> None:
    layer.weight.copy_(ours[f"{name}/kernel"].T)
    layer.bias.copy_(ours[f"{name}/bias"])


def _copy_side_by_side(layer: nn.Linear, ours: Weights, *names: str) -> None:
    """Copy bare kernels of the same input, one beside the other."""
    inputs = layer.in_features
    kernels = [ours[name].reshape(inputs, -1) for name in names]
    layer.weight.copy_(torch.cat(kernels, dim=1).T)


def _copy_tables(tokens: Tokens, tables: Mapping[str, Any]) -> None:
    """Copy the tables; both sides order them by name."""
    name = f"width_{tokens.tables.width}"
    short = np.asarray(tables[name])
    tokens.tables.short.weight.copy_(torch.tensor(short))
    if tokens.tables.long is not None:
        # Ours are stored in an order that spreads neighbours over devices.
        stored = np.asarray(tables[f"{name}_spread"])
        stored = stored.reshape(-1, tokens.tables.width)
        rows = np.arange(tokens.tables.long.num_embeddings)
        long = stored[to_storage_index(rows, len(stored))]
        tokens.tables.long.weight.copy_(torch.tensor(long))


def _copy_makers(tokens: Tokens, ours: Weights) -> None:
    user, state = tokens.user_features.order(), tokens.state_features.order()
    action = tokens.action_features.order()
    _copy_maker(tokens.user, ours, "user", user)
    if tokens.fused:
        event = np.concatenate([state, len(state) + action])
        _copy_maker(tokens.event, ours, "history/event", event)
        _copy_maker(tokens.target, ours, "target", state)
    else:
        _copy_maker(tokens.state, ours, "history/state", state)
        _copy_maker(tokens.action, ours, "history/action", action)


def _copy_maker(
    layer: Maker | PerField, ours: Weights, name: str, order: np.ndarray
) -> None:
    """Copy a maker; `order` says where each of our inputs is among the peer's."""
    if isinstance(layer, PerField):
        layer.kernel.copy_(ours[f"{name}/kernel"])
        layer.bias.copy_(ours[f"{name}/bias"])
        return
    layer.inner.weight[:, torch.tensor(order)] = ours[f"{name}/inner/kernel"].T
    layer.inner.bias.copy_(ours[f"{name}/inner/bias"])
    _copy_linear(layer.output, ours, f"{name}/output")
    if layer.scale is not None:
        layer.scale.copy_(ours[f"{name}/scale"])


def _copy_blocks(model: TorchTokenFormer, ours: Weights) -> None:
    model.separators.copy_(ours["separators"])
    model.norm.weight.copy_(ours["backbone/norm/scale"])
    for number, block in enumerate(model.blocks):
        name = f"backbone/blocks/{number}"
        block.attention_norm.weight.copy_(ours[f"{name}/attention_norm/scale"])
        block.ffn_norm.weight.copy_(ours[f"{name}/ffn_norm/scale"])
        projections = [f"{name}/attention/{p}" for p in ("query", "key", "value")]
        _copy_side_by_side(block.attention.qkv, ours, *projections)
        _copy_side_by_side(block.attention.output, ours, f"{name}/attention/output")
        _copy_side_by_side(block.gate_up, ours, f"{name}/ffn/gate", f"{name}/ffn/up")
        _copy_side_by_side(block.down, ours, f"{name}/ffn/down")
        if block.gate is not None:
            _copy_linear(block.gate, ours, f"{name}/gate")


def _copy_din(model: TorchDIN, ours: Weights) -> None:
    # Parts of the kernel: event, target, difference, product.
    kernel = ours["backbone/unit/kernel"]
    model.unit.weight.copy_(kernel.flatten(0, 1).T)
    model.unit.bias.copy_(ours["backbone/unit/bias"])
    model.unit_output.weight.copy_(ours["backbone/unit/output"][None])
    model.unit_output.bias.copy_(ours["backbone/unit/output_bias"][None])
    for number, layer in enumerate(model.hidden):
        _copy_linear(layer, ours, f"backbone/deep/hidden/{number}")
    _copy_linear(model.output, ours, "backbone/output")

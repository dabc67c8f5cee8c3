"""DIN in plain PyTorch, at the sizes of our `model.kind="din"`; NIO with fused events.

The activation unit weighs each event for the target from `[e, v, e - v, e * v]`, the
weighted sum, user and target enter an MLP. Importing this needs PyTorch.
"""

from __future__ import annotations

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.peers.torch_features import Tokens
from tokenrec.errors import InputError
from tokenrec.models.backbones.block import ffn_width
from tokenrec.models.backbones.din import UNITS
from tokenrec.state import ModelSpec


class TorchDIN(nn.Module):
    """Target attention over the events, then an MLP.

    Args:
      model: our DIN, whose config and schema it takes.

    Raises:
      InputError: streams are user-centric.
    """

    def __init__(self, model: ModelSpec):
        super().__init__()
        config = model.config.model
        if model.config.data.paradigm != "nio":
            raise InputError("the DIN peer scores candidates; use data.paradigm='nio'")
        width, inner = config.width, ffn_width(config)
        self.tokens = Tokens(model.config, model.schema)
        self.unit = nn.Linear(4 * width, UNITS)
        self.unit_output = nn.Linear(UNITS, 1)
        users = model.layout(model.config.data.events).positions_of("user")
        sizes = [(len(users) + 2) * width, *[inner] * config.layers]
        self.hidden = nn.ModuleList(
            nn.Linear(i, o) for i, o in itertools.pairwise(sizes)
        )
        self.output = nn.Linear(inner, width)
        self.head = nn.Linear(width, len(model.tasks))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute logits `[B, 1, tasks]`; every event is real, as in the benchmark."""
        parts = self.tokens(batch)
        events, target = parts["history"], parts["target"]
        beside = target.expand_as(events)
        pairs = torch.cat([events, beside, events - beside, events * beside], dim=-1)
        # [B, 1, T] times [B, T, d]: weights without a softmax.
        weights = self.unit_output(F.silu(self.unit(pairs))).transpose(1, 2)
        interest = weights @ events
        user = parts["user"].flatten(1)[:, None]
        x = torch.cat([user, interest, target], dim=-1)
        for layer in self.hidden:
            x = F.silu(layer(x))
        return self.head(self.output(x))

"""TokenFormer in plain PyTorch, the peer of our whole steps.

Soft tokens, pre-norm blocks with rotary positions, SwiGLU and the NLIR gate, full layers
below and sliding windows above. Without gate and windows it is the decoder of
`configs/lrm_1b.py`. It computes what our model does, from as many parameters; a test
copies our weights into it and compares.

Full causal layers use PyTorch's causal kernel. Other masks go to the same kernel as
booleans ("sdpa"), or to flex_attention with a block mask ("flex"), which must be
compiled. With `model.needed_rows` a layer computes only the tokens that a later layer
or the head reads. Importing this needs PyTorch.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.nn.attention.flex_attention import flex_attention as flex
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils.checkpoint import checkpoint

from benchmarks.peers.stream_plan import LayerPlan, as_slice, plan_stream
from benchmarks.peers.torch_features import Tokens
from tokenrec.config import ModelConfig
from tokenrec.models.backbones.block import ffn_width
from tokenrec.state import ModelSpec

AttentionKind = Literal["sdpa", "flex"]
EPSILON = 1e-6


def block_mask(plan: LayerPlan) -> BlockMask:
    """The visible pairs of a layer as a block mask of flex_attention."""
    query, key = torch.tensor(plan.query_index), torch.tensor(plan.key_index)
    query_static = torch.tensor(plan.query_static)
    # A full layer shows static keys too, and its window is wider than any distance.
    full = plan.window is None
    key_shown = torch.tensor(~plan.key_static | full)
    # Arrays, not numbers: layers of one shape then share a compiled program.
    window = torch.tensor(1 + plan.query_index.max() if full else plan.window)

    def see(
        batch: torch.Tensor, head: torch.Tensor, q: torch.Tensor, k: torch.Tensor
    ) -> torch.Tensor:
        distance = query[q] - key[k]
        shown = query_static[q] | key_shown[k]
        return (distance >= 0) & (distance < window) & shown

    return create_block_mask(
        see, None, None, len(query), len(key), device=str(query.device)
    )


class Rotation(nn.Module):
    """Rotary positions of some tokens: rotates entry pairs (n, n + h / 2)."""

    def __init__(self, positions: np.ndarray, head_width: int, base: float):
        super().__init__()
        frequencies = base ** (-torch.arange(0, head_width, 2) / head_width)
        angles = torch.tensor(positions)[:, None].float() * frequencies
        # [n, 1, h / 2]: the same for every head.
        self.register_buffer("cos", angles.cos()[:, None], persistent=False)
        self.register_buffer("sin", angles.sin()[:, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate `x: [B, n, H, h]`, in float32."""
        first, second = x.float().chunk(2, dim=-1)
        rotated = [
            first * self.cos - second * self.sin,
            second * self.cos + first * self.sin,
        ]
        return torch.cat(rotated, dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Multi-head attention with rotary positions.

    Args:
      config: `model` of the run's config.
      plan: positions and visible pairs of the layer.
      rope: `[K]`, rotary position of each input.
      kind: what serves masks other than the causal one.
    """

    def __init__(
        self,
        config: ModelConfig,
        plan: LayerPlan,
        rope: np.ndarray,
        kind: AttentionKind,
    ):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.mask_kind, self.qk_norm = plan.kind, config.qk_norm
        self.queries = None if plan.all_inputs else as_slice(plan.queries)
        # Rows of W_q, W_k and W_v, so that one product serves all three.
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        head_width = width // self.heads
        self.rotate_keys = Rotation(rope, head_width, config.rope_base)
        queries = rope[plan.queries]
        self.rotate_queries = Rotation(queries, head_width, config.rope_base)
        self.flex = kind == "flex" and self.mask_kind == "mask"
        self.blocks = block_mask(plan) if self.flex else None
        mask = torch.tensor(plan.mask()) if self.mask_kind == "mask" else None
        self.register_buffer("mask", None if self.flex else mask, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map normalised inputs `[B, K, d]` to `[B, Q, d]`."""
        width = x.shape[-1]
        if self.queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:
            q = F.linear(x[:, self.queries], self.qkv.weight[:width])
            k, v = F.linear(x, self.qkv.weight[width:]).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if self.qk_norm:
            q, k = (F.rms_norm(part, part.shape[-1:], eps=EPSILON) for part in (q, k))
        q = self.rotate_queries(q).to(v.dtype).transpose(1, 2)
        k = self.rotate_keys(k).to(v.dtype).transpose(1, 2)
        v = v.transpose(1, 2)
        if self.flex:
            if q.device.type == "cpu":
                # Compiled for a CPU by PyTorch 2.13, it misreads arrays that are not.
                q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
            attended = flex(q, k, v, block_mask=self.blocks)
        else:
            causal = self.mask_kind == "causal"
            attended = sdpa(q, k, v, attn_mask=self.mask, is_causal=causal)
        return self.output(attended.transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """Gated attention, then SwiGLU, each behind an RMSNorm."""

    def __init__(
        self,
        config: ModelConfig,
        plan: LayerPlan,
        rope: np.ndarray,
        kind: AttentionKind,
    ):
        super().__init__()
        width, self.inner = config.width, ffn_width(config)
        self.queries = None if plan.all_inputs else as_slice(plan.queries)
        self.attention_norm = nn.RMSNorm(width, eps=EPSILON)
        self.attention = Attention(config, plan, rope, kind)
        self.gate = nn.Linear(width, width) if config.gate else None
        self.ffn_norm = nn.RMSNorm(width, eps=EPSILON)
        # Gate and up-projection of SwiGLU in one product.
        self.gate_up = nn.Linear(width, 2 * self.inner, bias=False)
        self.down = nn.Linear(self.inner, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the inputs of the layer, `[B, K, d]`, to those of the next, `[B, Q, d]`."""
        branch = self.attention(self.attention_norm(x))
        if self.queries is not None:
            x = x[:, self.queries]
        if self.gate is not None:
            branch = torch.sigmoid(self.gate(x)) * branch
        x = x + branch
        gate, up = self.gate_up(self.ffn_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class TorchTokenFormer(nn.Module):
    """The recommender: tokens, blocks and one head per task.

    Args:
      model: our model, whose config, schema and layout it takes.
      attention: what serves masks other than the causal one.
      recompute: the backward pass computes each block again, to save memory.
    """

    def __init__(
        self,
        model: ModelSpec,
        *,
        attention: AttentionKind = "sdpa",
        recompute: bool = False,
    ):
        super().__init__()
        config = model.config.model
        self.recompute = recompute
        plan = plan_stream(model)
        self.inputs, self.readout = as_slice(plan.inputs[0]), as_slice(plan.readout)
        self.tokens = Tokens(model.config, model.schema)
        separators = 2 if self.tokens.fused else 1
        self.separators = nn.Parameter(
            torch.randn(separators, config.width) * config.width**-0.5
        )
        self.blocks = nn.ModuleList(
            Block(config, layer, plan.rope[inputs], attention)
            for layer, inputs in zip(plan.layers, plan.inputs, strict=False)
        )
        self.norm = nn.RMSNorm(config.width, eps=EPSILON)
        self.head = nn.Linear(config.width, len(model.tasks))

    def forward(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Compute logits `[B, R, tasks]` in float32."""
        parts = self.tokens(batch)
        size = parts["user"].shape[0]

        def separator(number: int) -> torch.Tensor:
            vector = self.separators[number : number + 1]
            return vector.to(parts["user"].dtype).expand(size, 1, -1)

        # user sep history, and in NIO sep target
        stream = [parts["user"], separator(0), parts["history"]]
        if "target" in parts:
            stream += [separator(1), parts["target"]]
        x = torch.cat(stream, dim=1)[:, self.inputs]
        for block in self.blocks:
            run = functools.partial(checkpoint, block, use_reentrant=False)
            x = run(x) if self.recompute else block(x)
        return self.head(self.norm(x[:, self.readout])).float()

"""The ways that PyTorch has of causal and sliding attention on a CPU; importing this needs PyTorch."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
import torch._dynamo
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # q, k, v [B, H, S, h] -> [B, H, S, h]

CAUSAL = "torch SDPA causal"
BAND = "torch SDPA, band mask"
CHUNKED = "torch SDPA, hand-chunked"
FLEX = "torch flex_attention, compiled"


def sdpa_causal() -> Attend:
    """Full causal attention by PyTorch's own kernel, which skips what lies above the diagonal."""
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_band(seq_len: int, window: int) -> Attend:
    """A window as a mask `[S, S]`, which the kernel adds to every logit."""
    rows = torch.arange(seq_len)
    apart = rows[:, None] - rows[None, :]
    mask = (apart >= 0) & (apart < window)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_chunked(window: int) -> Attend:
    """Blocks of `window` queries against their own block and the one before; the first block is plain causal.

    The mask has two dimensions, as with three PyTorch leaves its fused kernel for one that is several times slower.
    """
    query, key = torch.arange(window)[:, None] + window, torch.arange(2 * window)[None]
    see = (key <= query) & (query - key < window)
    mask = torch.zeros(see.shape).masked_fill(~see, float("-inf"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_dim = q.shape

        def blocks(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(batch * heads, -1, window, head_dim)

        def pairs(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([blocks(x)[:, :-1], blocks(x)[:, 1:]], dim=2)

        begin = scaled_dot_product_attention(
            *(x[:, :, :window] for x in (q, k, v)), is_causal=True
        )
        rest = scaled_dot_product_attention(
            blocks(q)[:, 1:], pairs(k), pairs(v), attn_mask=mask
        )
        return torch.cat([begin, rest.reshape(batch, heads, -1, head_dim)], dim=2)

    return attend


def flex(seq_len: int, window: int | None, *, fullgraph: bool = True) -> Attend:
    """flex_attention with a block mask, compiled for these shapes at the first call.

    `fullgraph` makes it an error, in place of a slow run, if PyTorch compiles only a part.
    """

    def see(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        causal = key <= query
        return causal if window is None else causal & (query - key < window)

    mask = create_block_mask(
        see, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len, device="cpu"
    )
    torch._dynamo.config.recompile_limit = (
        1000  # the default, 8, has room for eight lengths and windows
    )
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=fullgraph)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


@functools.cache
def flex_refusals() -> tuple[str, str]:
    """Why flex_attention does not run here, forward, and forward and backward; empty where it does.

    Tried once on a small shape, then PyTorch's compiler is reset: after a failure it runs every later call uncompiled.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        return (
            "torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ is installed",
        ) * 2
    reasons = []
    for run in (forward, forward_backward):
        inputs = tuple(
            torch.zeros(1, 1, 128, 16, requires_grad=run is forward_backward)
            for _ in range(4)
        )
        try:
            run(flex(128, 16, fullgraph=False), inputs)  # whose error names the cause
            reasons.append("")
        except (
            RuntimeError
        ) as error:  # NotImplementedError and what the compiler raises are kinds of it
            reasons.append(
                f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            )
        torch._dynamo.reset()
    return reasons[0], reasons[1]


def forward(
    attend: Attend, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """`(out,)`, without what a gradient would need."""
    with torch.no_grad():
        return (attend(*inputs[:3]),)


def forward_backward(
    attend: Attend, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """`(out, gradients of q, k and v)` for inputs `(q, k, v, gradient of out)`; the first three require gradients."""
    out = attend(*inputs[:3])
    return out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])


def ways(
    seq_len: int, window: int | None, mask_gib: float, *, backward: bool
) -> tuple[dict[str, Attend], dict[str, str]]:
    """What PyTorch can do for this length and window, by name, and why the rest is left out."""
    found: dict[str, Attend] = {}
    left_out: dict[str, str] = {}
    if window is None:
        found[CAUSAL] = sdpa_causal()
    else:
        if (gib := 4 * seq_len**2 / 2**30) <= mask_gib:
            found[BAND] = sdpa_band(seq_len, window)
        else:
            left_out[BAND] = (
                f"its mask takes {gib:.3g} GiB in float32, --mask-gib is {mask_gib:g}"
            )
        if seq_len % window == 0:
            found[CHUNKED] = sdpa_chunked(window)
        else:
            left_out[CHUNKED] = f"seq_len {seq_len} is not a multiple of the window"
    if reason := flex_refusals()[backward]:
        left_out[FLEX] = reason
    else:
        found[FLEX] = flex(seq_len, window)
    return found, left_out

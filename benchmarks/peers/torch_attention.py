"""Causal and sliding attention of PyTorch; importing this needs PyTorch.

A variant is a function `(q, k, v) -> out` of tensors `[B, H, S, h]`.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
import torch._dynamo
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

CAUSAL = "torch SDPA causal"
BAND = "torch SDPA, band mask"
CHUNKED = "torch SDPA, hand-chunked"
FLEX = "torch flex_attention, compiled"
# Back ends of SDPA by name; both serve full causal attention, without a window.
BACKENDS = {
    "torch SDPA flash": SDPBackend.FLASH_ATTENTION,
    "torch SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
}


def sdpa_causal() -> Attend:
    """Full causal attention by PyTorch's own kernel.

    The kernel skips what lies above the diagonal.
    """
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, is_causal=True)


def sdpa_backend(name: str) -> Attend:
    """Full causal attention by a back end of `BACKENDS`, and no other.

    The gradient is that of the same back end.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[name]):
            return scaled_dot_product_attention(q, k, v, is_causal=True)

    return attend


def sdpa_band(seq_len: int, window: int) -> Attend:
    """A window as a mask `[S, S]`, which the kernel adds to every logit."""
    positions = torch.arange(seq_len)
    distance = positions[:, None] - positions[None, :]
    mask = (distance >= 0) & (distance < window)
    return lambda q, k, v: scaled_dot_product_attention(q, k, v, attn_mask=mask)


def sdpa_chunked(window: int) -> Attend:
    """Blocks of `window` queries against their own block and the one before.

    The first block is plain causal. The length must be a multiple of the window.
    """
    query = torch.arange(window)[:, None] + window
    key = torch.arange(2 * window)[None]
    seen = (key <= query) & (query - key < window)
    # Two dimensions: with a mask of three, PyTorch leaves its fused kernel for one that
    # is several times slower.
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        batch, heads, _, head_dim = q.shape

        def blocks(x: torch.Tensor) -> torch.Tensor:
            return x.reshape(batch * heads, -1, window, head_dim)

        def pairs(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([blocks(x)[:, :-1], blocks(x)[:, 1:]], dim=2)

        first = scaled_dot_product_attention(
            *(x[:, :, :window] for x in (q, k, v)), is_causal=True
        )
        rest = scaled_dot_product_attention(
            blocks(q)[:, 1:], pairs(k), pairs(v), attn_mask=mask
        )
        return torch.cat([first, rest.reshape(batch, heads, -1, head_dim)], dim=2)

    return attend


def flex(
    seq_len: int, window: int | None, *, fullgraph: bool = True, device: str = "cpu"
) -> Attend:
    """flex_attention with a block mask, compiled for these shapes at the first call.

    Args:
      seq_len: S.
      window: keys that a query sees; None: full causal attention.
      fullgraph: raise an error, in place of a slow run, if PyTorch compiles only a
        part.
      device: of the tensors.
    """

    def see(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        causal = key <= query
        return causal if window is None else causal & (query - key < window)

    mask = create_block_mask(
        see, B=None, H=None, Q_LEN=seq_len, KV_LEN=seq_len, device=device
    )
    # The default, 8, has room for eight lengths and windows.
    torch._dynamo.config.recompile_limit = 1000
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=fullgraph)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


@functools.cache
def flex_unsupported_reasons() -> tuple[str, str]:
    """Say why flex_attention does not run on this CPU, or "".

    It is tried once on a small shape. Then PyTorch's compiler is reset: after a failure
    it runs every later call uncompiled.

    Returns:
      The reason for the forward pass, and for forward and backward.
    """
    if not (shutil.which("g++") or shutil.which("clang++")):
        reason = (
            "torch.compile needs a C++ compiler on a CPU, and neither g++ nor clang++ "
            "is installed"
        )
        return reason, reason
    reasons = []
    for run in (forward, forward_backward):
        inputs = tuple(
            torch.zeros(1, 1, 128, 16, requires_grad=run is forward_backward)
            for _ in range(4)
        )
        try:
            # Without `fullgraph` the error names its cause.
            run(flex(128, 16, fullgraph=False), inputs)
            reasons.append("")
        # NotImplementedError, and what the compiler raises, are kinds of RuntimeError.
        except RuntimeError as error:
            text = " ".join(str(error).split())[:160]
            reasons.append(f"{type(error).__name__}: {text}")
        torch._dynamo.reset()
    return reasons[0], reasons[1]


def forward(
    attend: Attend, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Compute `(out,)` from q, k and v, without what a gradient would need."""
    with torch.no_grad():
        return (attend(*inputs[:3]),)


def forward_backward(
    attend: Attend, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Compute the output and the gradients of q, k and v.

    Args:
      attend: the variant.
      inputs: q, k, v, which require gradients, and the gradient of the output.
    """
    out = attend(*inputs[:3])
    return out.detach(), *torch.autograd.grad(out, inputs[:3], inputs[3])


def variants(
    seq_len: int, window: int | None, mask_gib: float, *, backward: bool
) -> tuple[dict[str, Attend], dict[str, str]]:
    """List PyTorch's variants for a length and window.

    Args:
      seq_len: S.
      window: keys that a query sees; None: full causal attention.
      mask_gib: largest mask that is tried, in GiB of float32.
      backward: whether gradients are needed.

    Returns:
      Name -> variant, and name -> reason for those that are left out.
    """
    served: dict[str, Attend] = {}
    left_out: dict[str, str] = {}
    if window is None:
        served[CAUSAL] = sdpa_causal()
    else:
        gib = 4 * seq_len**2 / 2**30
        if gib <= mask_gib:
            served[BAND] = sdpa_band(seq_len, window)
        else:
            left_out[BAND] = (
                f"its mask takes {gib:.3g} GiB in float32, --mask-gib is {mask_gib:g}"
            )
        if seq_len % window == 0:
            served[CHUNKED] = sdpa_chunked(window)
        else:
            left_out[CHUNKED] = f"seq_len {seq_len} is not a multiple of the window"
    if reason := flex_unsupported_reasons()[backward]:
        left_out[FLEX] = reason
    else:
        served[FLEX] = flex(seq_len, window)
    return served, left_out

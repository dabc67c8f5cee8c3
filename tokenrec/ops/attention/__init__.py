"""Softmax attention for TPUs, GPUs and CPUs: one entry point, several implementations.

Start with `attention` in `tokenrec.ops.attention.api`; `pattern` defines which tokens
see which, `dense` is the reference, `blocked` (with `bands`, `band_chunks`,
`band_passes` and `tiles`), `cudnn`, `triton` (with `triton_calls`, `triton_kernels` and
`key_runs`) and `splash` (with `span_mask`) skip what is not visible.
"""

from tokenrec.ops.attention.api import (
    IMPLEMENTATIONS,
    PORTABLE,
    PREFERRED,
    Choice,
    Implementation,
    attention,
    choose,
    current_platform,
    implementations_of,
)
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern

__all__ = [
    "ATTENTION_RESULT",
    "IMPLEMENTATIONS",
    "PORTABLE",
    "PREFERRED",
    "Choice",
    "Implementation",
    "Pattern",
    "attention",
    "choose",
    "current_platform",
    "implementations_of",
]

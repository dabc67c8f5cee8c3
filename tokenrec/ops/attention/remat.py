"""What a backward pass of attention needs, kept by a policy of `jax.checkpoint`."""

from __future__ import annotations

from typing import Any

import jax

from tokenrec.ops.attention import cudnn
from tokenrec.ops.attention.pattern import ATTENTION_RESULT


def _is_cudnn_attention(primitive: Any, *_: Any, **__: Any) -> bool:
    """A checkpoint policy that keeps the result of cuDNN's attention."""
    return primitive.name == cudnn.FORWARD_PRIMITIVE


# Keeps the results of every implementation, so that the backward pass needs no second
# forward pass; all else is computed again.
SAVE_ATTENTION = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(ATTENTION_RESULT),
    _is_cudnn_attention,
)

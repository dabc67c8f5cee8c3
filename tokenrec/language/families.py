"""The families of language models that a run can start from, as options of one decoder.

A family is what its published implementations have in common; sizes differ between its
models and are read from `config.json` (`architecture.py`). The decoder itself is
`tokenrec/models/backbones/decoder.py`.

    gemma3    Gemma Team, *Gemma 3 Technical Report*, arXiv 2503.19786, 2025
    qwen3     Qwen Team, *Qwen3 Technical Report*, arXiv 2505.09388, 2025
    llama3    Llama Team, *The Llama 3 Herd of Models*, arXiv 2407.21783, 2024

This module imports no JAX.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Activation = Literal["silu", "gelu_tanh"]


@dataclasses.dataclass(frozen=True)
class Family:
    """The options that all models of a family share.

    Attributes:
      model_types: values of `model_type` in a `config.json` of the family.
      offset_norm: an RMSNorm multiplies by 1 + w, not by w.
      sandwich_norm: attention and feed-forward network also have a norm behind them.
      qk_norm: queries and keys have an RMSNorm with a learned scale.
      activation: of the gate of the feed-forward network.
      scaled_words: word vectors are multiplied by the square root of the width.
      begin: special token that every text starts with; empty for none.
      turn: what stands before and behind the words of a user, as text, and what begins
        the answer.
    """

    model_types: tuple[str, ...]
    offset_norm: bool
    sandwich_norm: bool
    qk_norm: bool
    activation: Activation
    scaled_words: bool
    begin: str
    turn: tuple[str, str]


FAMILIES: dict[str, Family] = {
    "gemma3": Family(
        model_types=("gemma3_text", "gemma3"),
        offset_norm=True,
        sandwich_norm=True,
        qk_norm=True,
        activation="gelu_tanh",
        scaled_words=True,
        begin="<bos>",
        turn=(
            "<start_of_turn>user\n",
            "<end_of_turn>\n<start_of_turn>model\n",
        ),
    ),
    "qwen3": Family(
        model_types=("qwen3",),
        offset_norm=False,
        sandwich_norm=False,
        qk_norm=True,
        activation="silu",
        scaled_words=False,
        begin="",
        # The empty thought is what the model writes where it is asked not to think.
        turn=(
            "<|im_start|>user\n",
            "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        ),
    ),
    "llama3": Family(
        model_types=("llama",),
        offset_norm=False,
        sandwich_norm=False,
        qk_norm=False,
        activation="silu",
        scaled_words=False,
        begin="<|begin_of_text|>",
        turn=(
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
    ),
}

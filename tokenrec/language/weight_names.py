"""Names and shapes of a language model's weights, here and in checkpoints.

Letters: d width, H heads, G heads of keys and values, h width of a head, f inner width
of the feed-forward network, V words. A checkpoint in the format of Hugging Face stores
projections as [out, in]; here heads have an axis of their own.

    backbone/blocks/0/attention/query [d, H, h]    layers.0.self_attn.q_proj [H h, d]
    backbone/blocks/0/attention/output [H, h, d]   layers.0.self_attn.o_proj [d, H h]
    backbone/blocks/0/ffn/gate [d, f]              layers.0.mlp.gate_proj [f, d]
    words/inputs [V, d]                            embed_tokens [V, d]

Layers that a loop runs are stacked (`model.scan`): their entry of `backbone/blocks` has
weights `[n, ...]` that stand for n tensors of the checkpoint.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import NamedTuple

import numpy as np

from tokenrec.config import ModelConfig
from tokenrec.errors import InputError
from tokenrec.language.families import FAMILIES
from tokenrec.models.backbones.bfts import stack_sizes

INPUTS, OUTPUTS = "words/inputs", "words/outputs"
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


@dataclasses.dataclass(frozen=True)
class WeightLayout:
    """How one of our weights is stored in a checkpoint.

    Attributes:
      tensors: names of its tensors, one for each stacked layer, without what stands
        before them in the whole checkpoint (`Naming`).
      stored: shape of each tensor.
      split: the tensor's shape with heads on an axis of their own.
      axes: axes of `split` in our order.
      stacked: the weight has a leading axis of layers.
    """

    tensors: tuple[str, ...]
    stored: tuple[int, ...]
    split: tuple[int, ...]
    axes: tuple[int, ...]
    stacked: bool = False

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of the weight of one layer."""
        return tuple(self.split[axis] for axis in self.axes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        layers = (len(self.tensors),) if self.stacked else ()
        return (*layers, *self.layer_shape)

    def from_stored(self, tensor: np.ndarray) -> np.ndarray:
        """View a tensor `stored` of the checkpoint as ours, `layer_shape`."""
        return tensor.reshape(self.split).transpose(self.axes)

    def to_stored(self, weight: np.ndarray) -> np.ndarray:
        """Turn our weight of one layer, `layer_shape`, into the `stored` tensor."""
        back = tuple(int(axis) for axis in np.argsort(self.axes))
        return weight.transpose(back).reshape(self.stored)


class Naming(NamedTuple):
    """What stands before the names of a checkpoint.

    Attributes:
      body: before the names of the text model.
      head: before `lm_head.weight`.
    """

    body: str
    head: str

    def full(self, tensor: str) -> str:
        """Name of a tensor in the whole checkpoint."""
        return (self.head if tensor == HEAD else self.body) + tensor


TEXT_NAMING = Naming("model.", "")
# The second and third are Gemma 3 with a vision tower, before and since transformers
# 4.52; the last is a text model that was saved without its head.
NAMINGS = (
    TEXT_NAMING,
    Naming("language_model.model.", "language_model."),
    Naming("model.language_model.", ""),
    Naming("", ""),
)


def find_naming(tensors: Collection[str]) -> Naming:
    """Find out how the tensors of a checkpoint are named.

    Raises:
      InputError: no tensor is the word embedding of a text model.
    """
    for naming in NAMINGS:
        if naming.full(EMBEDDING) in tensors:
            return naming
    names = ", ".join(naming.full(EMBEDDING) for naming in NAMINGS)
    raise InputError(
        f"the checkpoint has no word embedding: none of its {len(tensors)} tensors is "
        f"{names}; give the checkpoint of a causal language model"
    )


def weight_layouts(config: ModelConfig) -> dict[str, WeightLayout]:
    """Name of each weight that a checkpoint of the model has -> how it is stored.

    Args:
      config: `model` of a config whose sizes are filled in.
    """
    decoder, d = config.decoder, config.width
    words = (decoder.vocabulary, d)
    layouts = {INPUTS: _same((EMBEDDING,), words)}
    if not decoder.tied:
        layouts[OUTPUTS] = _same((HEAD,), words)
    first = 0
    for entry, count in enumerate(stack_sizes(config)):
        prefixes = tuple(f"layers.{first + layer}." for layer in range(count))
        for name, tensor, layout in _block_layouts(config):
            layouts[f"backbone/blocks/{entry}/{name}"] = dataclasses.replace(
                layout,
                tensors=tuple(f"{prefix}{tensor}.weight" for prefix in prefixes),
                stacked=count > 1,
            )
        first += count
    layouts["backbone/norm/scale"] = _same(("norm.weight",), (d,))
    return layouts


def tensor_places(
    layouts: dict[str, WeightLayout], naming: Naming = TEXT_NAMING
) -> dict[str, tuple[str, int]]:
    """Full name of each tensor -> the name of our weight, and the layer within it."""
    return {
        naming.full(tensor): (name, layer)
        for name, layout in layouts.items()
        for layer, tensor in enumerate(layout.tensors)
    }


def parameter_count(config: ModelConfig) -> int:
    """Weights of the model that a checkpoint has."""
    layouts = weight_layouts(config).values()
    return sum(math.prod(layout.shape) for layout in layouts)


def _block_layouts(config: ModelConfig) -> Iterator[tuple[str, str, WeightLayout]]:
    """Yield name, tensor and layout of each weight of a block."""
    family, decoder = FAMILIES[config.kind], config.decoder
    d, f, h = config.width, config.ffn_width, decoder.head_width
    heads = {"query": config.heads, "key": decoder.kv_heads, "value": decoder.kv_heads}
    # `post_attention_layernorm` stands behind attention where the feed-forward network
    # has a norm of its own before it, and before that network elsewhere.
    norms = [("attention_norm", "input_layernorm")]
    if family.sandwich_norm:
        norms += [
            ("attention_output_norm", "post_attention_layernorm"),
            ("ffn_norm", "pre_feedforward_layernorm"),
            ("ffn_output_norm", "post_feedforward_layernorm"),
        ]
    else:
        norms += [("ffn_norm", "post_attention_layernorm")]
    for name, tensor in norms:
        yield f"{name}/scale", tensor, _same((), (d,))
    if family.qk_norm:
        yield "attention/query_norm/scale", "self_attn.q_norm", _same((), (h,))
        yield "attention/key_norm/scale", "self_attn.k_norm", _same((), (h,))
    for name, n in heads.items():
        layout = WeightLayout((), (n * h, d), (n, h, d), (2, 0, 1))
        yield f"attention/{name}", f"self_attn.{name[0]}_proj", layout
    n = config.heads
    output = WeightLayout((), (d, n * h), (d, n, h), (1, 2, 0))
    yield "attention/output", "self_attn.o_proj", output
    for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
        yield f"ffn/{name}", f"mlp.{name}_proj", WeightLayout((), shape, shape, (1, 0))


def _same(tensors: tuple[str, ...], shape: tuple[int, ...]) -> WeightLayout:
    """A weight that is stored as it is."""
    return WeightLayout(tensors, shape, shape, tuple(range(len(shape))))

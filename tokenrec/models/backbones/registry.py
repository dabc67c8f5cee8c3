"""Backbones of other papers on the shared makers, layout, head and loop; `model.kind` chooses one (docs/rivals.md)."""

from __future__ import annotations

from flax import nnx

from tokenrec.config import BackboneKind, ModelConfig
from tokenrec.models.backbones.dcnv2 import DCNv2
from tokenrec.models.backbones.din import DIN
from tokenrec.models.backbones.hstu import HSTU
from tokenrec.models.backbones.interface import Backbone
from tokenrec.models.backbones.longer import LONGER
from tokenrec.models.backbones.onetrans import OneTrans
from tokenrec.models.backbones.rankmixer import RankMixer
from tokenrec.models.backbones.sasrec import SASRec
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.tokens.layout import Layout

RIVALS: dict[BackboneKind, type[Backbone]] = {
    "hstu": HSTU,
    "din": DIN,
    "dcnv2": DCNv2,
    "onetrans": OneTrans,
    "sasrec": SASRec,
    "longer": LONGER,
    "rankmixer": RankMixer,
}


def make_backbone(
    config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs
) -> TokenFormer | Backbone:
    """The backbone of `model.kind`; `longest` is the longest stream that it will read."""
    if config.kind == "tokenformer":
        return TokenFormer(config, longest, rngs=rngs)
    return RIVALS[config.kind](config, longest, rngs)

"""Backbones of other papers on the shared makers, layout, head and loop; `model.kind` chooses one (docs/rivals.md)."""

from __future__ import annotations

from flax import nnx

from tokenrec.config import BackboneKind, ModelConfig
from tokenrec.models.backbone import Backbone
from tokenrec.models.rivals.dcnv2 import DCNv2
from tokenrec.models.rivals.din import DIN
from tokenrec.models.rivals.hstu import HSTU
from tokenrec.models.rivals.longer import LONGER
from tokenrec.models.rivals.onetrans import OneTrans
from tokenrec.models.rivals.rankmixer import RankMixer
from tokenrec.models.rivals.rival import Rival
from tokenrec.models.rivals.sasrec import SASRec
from tokenrec.tokens.layout import Layout

RIVALS: dict[BackboneKind, type[Rival]] = {
    "hstu": HSTU,
    "din": DIN,
    "dcnv2": DCNv2,
    "onetrans": OneTrans,
    "sasrec": SASRec,
    "longer": LONGER,
    "rankmixer": RankMixer,
}


def make_backbone(config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs) -> Backbone | Rival:
    """The backbone of `model.kind`; `longest` is the longest stream that it will read."""
    if config.kind == "tokenformer":
        return Backbone(config, longest, rngs=rngs)
    return RIVALS[config.kind](config, longest, rngs)

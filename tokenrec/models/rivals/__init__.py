"""Backbones of other papers on the shared makers, layout, head and loop; `model.kind` chooses one (docs/rivals.md)."""

from __future__ import annotations

from flax import nnx

from tokenrec.config import BackboneKind, ModelConfig
from tokenrec.models.backbone import Backbone
from tokenrec.models.rivals.hstu import HSTU
from tokenrec.models.rivals.rival import Rival
from tokenrec.tokens.layout import Layout

RIVALS: dict[BackboneKind, type[Rival]] = {"hstu": HSTU}


def make_backbone(config: ModelConfig, longest: Layout, *, rngs: nnx.Rngs) -> Backbone | Rival:
    """The backbone of `model.kind`; `longest` is the longest stream that it will read."""
    return Backbone(config, rngs=rngs) if config.kind == "tokenformer" else RIVALS[config.kind](config, longest, rngs)

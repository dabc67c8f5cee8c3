"""What each backbone can do, and reads of `ModelConfig`: the part of validation that depends on `model.kind`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from tokenrec.config import BackboneKind, Config, ModelConfig

# Every kind reads these, or `kind_problems` has words of its own for them.
_ALWAYS = ("kind", "width", "layers", "dropout", "dtype", "windows")


class BackboneCapabilities(NamedTuple):
    """A rival.

    Attributes:
      reads: fields of `ModelConfig`, besides those that every kind reads.
      windows: its top layers can slide.
      uc: it scores every event of a user stream. retrieval: it predicts the next item.
      tensor: its weights split over `mesh.tensor`.
      prompt: it reads any stream of tokens, not just user, history and one target.
      target_tokens: it reads several tokens of a target.
    """

    reads: tuple[str, ...]
    windows: bool = False
    uc: bool = True
    retrieval: bool = False
    tensor: bool = True
    prompt: bool = False
    target_tokens: bool = False


RIVAL_KINDS: dict[BackboneKind, BackboneCapabilities] = {
    "hstu": BackboneCapabilities(
        ("heads", "needed_rows", "time_bias"),
        windows=True,
        retrieval=True,
        prompt=True,
        target_tokens=True,
    ),
    "onetrans": BackboneCapabilities(
        ("heads", "ffn_width", "rope_base", "attention"), uc=False, target_tokens=True
    ),
    "longer": BackboneCapabilities(
        ("heads", "ffn_width", "rope_base", "attention", "qk_norm", "merge"),
        uc=False,
        target_tokens=True,
    ),
    "rankmixer": BackboneCapabilities(("heads", "ffn_width"), tensor=False),
    "din": BackboneCapabilities(("ffn_width",), tensor=False),
    "dcnv2": BackboneCapabilities(("ffn_width",), tensor=False),
    "sasrec": BackboneCapabilities(
        ("heads", "ffn_width", "attention", "qk_norm"), retrieval=True
    ),
}


def reads_event_ages(config: ModelConfig) -> bool:
    """Whether the backbone asks for `Batch.ages`."""
    return config.kind == "hstu" and config.time_bias


def uses_heads(config: ModelConfig) -> bool:
    """Whether the backbone has attention heads, or token mixing by heads: its width is a multiple of their number."""
    return config.kind == "tokenformer" or "heads" in RIVAL_KINDS[config.kind].reads


def uses_rope(config: ModelConfig) -> bool:
    """Whether the rows of a head are turned in pairs by rotary positions (of SASRec by 0, in the shared attention)."""
    return (
        config.kind in ("tokenformer", "sasrec")
        or "rope_base" in RIVAL_KINDS[config.kind].reads
    )


def splits_heads(config: ModelConfig) -> bool:
    """Whether `mesh.tensor` has something to split."""
    return config.kind == "tokenformer" or RIVAL_KINDS[config.kind].tensor


def kind_problems(c: Config) -> Iterator[str]:
    """What of a config its kind of backbone cannot do."""
    name, usual = c.model.kind, ModelConfig()
    if name == "tokenformer":
        for own, owner in (("merge", "longer"), ("time_bias", "hstu")):
            value, default = getattr(c.model, own), getattr(usual, own)
            if value != default:
                yield f"model.{own}={value} is for model.kind='{owner}'; leave it at {default}"
        return
    kind, says = RIVAL_KINDS[name], f"with model.kind='{name}'"
    for field in dataclasses.fields(ModelConfig):
        value, default = getattr(c.model, field.name), getattr(usual, field.name)
        if field.name not in (*_ALWAYS, *kind.reads) and value != default:
            yield f"model.{field.name}={value!r} {says}, which does not read it; leave it at {default!r}"
    if c.model.windows and not kind.windows:
        yield f"model.windows={c.model.windows} {says}, which has no sliding layers; use ()"
    if c.data.paradigm == "uc" and not kind.uc:
        yield f"data.paradigm='uc' {says}, which keeps only the newest rows of a history; use 'nio'"
    if c.data.objective == "retrieval" and not kind.retrieval:
        yield f"data.objective='retrieval' {says}, which scores a target that it reads; use 'ranking'"
    if c.data.objective == "retrieval" and c.head.retrieval == "semantic_id":
        yield f"head.retrieval='semantic_id' {says}, which has no prefix cache to generate from; use 'next_item'"
    if c.mesh.tensor != 1 and not splits_heads(c.model):
        yield f"mesh.tensor={c.mesh.tensor} {says}, which has no attention heads to split; use 1, and data or fsdp"
    if c.train.log_states:
        yield f"train.log_states=True {says}, whose states are not events'; leave it out"
    if c.tokens.target_tokens > 1 and not kind.target_tokens:
        yield f"tokens.target_tokens={c.tokens.target_tokens} {says}, which reads one token of a target; use 1"
    if not kind.prompt:
        for field_name in ("prompt", "text"):
            if value := getattr(c.tokens, field_name):
                yield f"tokens.{field_name}={value!r} {says}, which reads user, events and targets alone; leave it out"
        if c.tokens.compression != "none":
            yield f"tokens.compression='{c.tokens.compression}' {says}, which reads single events; use 'none'"
        if c.tokens.history_cap:
            yield f"tokens.history_cap={c.tokens.history_cap} {says}; lower data.events instead"

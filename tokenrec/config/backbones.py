"""The registry of backbones: the class and the capabilities of each `model.kind`.

A backbone is added by one entry in `BACKBONES` and one file in
`tokenrec/models/backbones/` (docs/guides/adding_a_backbone.md). This module imports no JAX,
so that a config is read and checked quickly; a class is imported on first use.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tokenrec.config.tuning_config import GROUPS
from tokenrec.errors import suggest

if TYPE_CHECKING:
    from tokenrec.config.config import Config
    from tokenrec.config.model_config import ModelConfig
    from tokenrec.config.tokens_config import TokensConfig
    from tokenrec.config.tuning_config import TuningConfig
    from tokenrec.models.backbones.interface import Backbone

# Every backbone reads these fields of `ModelConfig`, or the branch beside it does, or
# `backbone_problems` checks them with a message of their own.
_ALWAYS_READ = (
    "kind",
    "width",
    "layers",
    "dropout",
    "dtype",
    "windows",
    "branch",
    "branch_layers",
)


@dataclasses.dataclass(frozen=True)
class BackboneSpec:
    """A backbone's class and its capabilities.

    Attributes:
      path: module and class, `package.module:Class`; the class implements `Backbone`
        of `tokenrec.models.backbones.interface`.
      reads: fields of `ModelConfig` that it uses, besides those that all backbones use.
        A field that it does not read must keep its default.
      windows: its top layers can use sliding windows (`model.windows`).
      uc: it scores every event of a user-centric stream.
      retrieval: it predicts the next item.
      generates: it has a prefix cache, which beam search over semantic ids needs.
      tensor_parallel: its weights split over `mesh.tensor`.
      context_parallel: the tokens of its streams split over `mesh.context`.
      any_prompt: it reads any stream of tokens, not only user, history and one target.
      target_tokens: it reads several tokens per target.
      rope: queries and keys are rotated in pairs, so the width of a head is even.
      event_states: its layers have a state per event, for `train.log_states`.
      decoder: it is a language model, whose sizes are those of a `config.json`
        (`model.decoder`) and which reads words with its own embedding.
    """

    path: str
    reads: tuple[str, ...]
    windows: bool = False
    uc: bool = True
    retrieval: bool = False
    generates: bool = False
    tensor_parallel: bool = True
    context_parallel: bool = False
    any_prompt: bool = False
    target_tokens: bool = False
    rope: bool = False
    event_states: bool = False
    decoder: bool = False

    def load(self) -> type[Backbone]:
        """Import the class."""
        module, _, name = self.path.partition(":")
        return getattr(importlib.import_module(module), name)


_FOLDER = "tokenrec.models.backbones"
_DECODER = BackboneSpec(
    f"{_FOLDER}.decoder:Decoder",
    reads=(
        "heads",
        "ffn_width",
        "rope_base",
        "needed_rows",
        "attention",
        "remat",
        "scan",
        "scan_unroll",
        "pretrained",
        "architecture",
        "decoder",
    ),
    windows=True,
    retrieval=True,
    generates=True,
    any_prompt=True,
    target_tokens=True,
    rope=True,
    decoder=True,
)
BACKBONES: dict[str, BackboneSpec] = {
    "tokenformer": BackboneSpec(
        f"{_FOLDER}.tokenformer:TokenFormer",
        reads=(
            "heads",
            "discard_static",
            "positions",
            "prefix",
            "gate",
            "gate_bias",
            "ffn_width",
            "qk_norm",
            "rope_base",
            "needed_rows",
            "attention",
            "remat",
            "scan",
            "scan_unroll",
        ),
        windows=True,
        retrieval=True,
        generates=True,
        context_parallel=True,
        any_prompt=True,
        target_tokens=True,
        rope=True,
        event_states=True,
    ),
    "hstu": BackboneSpec(
        f"{_FOLDER}.hstu:HSTU",
        reads=("heads", "needed_rows", "time_bias"),
        windows=True,
        retrieval=True,
        any_prompt=True,
        target_tokens=True,
    ),
    "onetrans": BackboneSpec(
        f"{_FOLDER}.onetrans:OneTrans",
        reads=("heads", "ffn_width", "rope_base", "attention"),
        uc=False,
        target_tokens=True,
        rope=True,
    ),
    "longer": BackboneSpec(
        f"{_FOLDER}.longer:LONGER",
        reads=("heads", "ffn_width", "rope_base", "attention", "qk_norm", "merge"),
        uc=False,
        target_tokens=True,
        rope=True,
    ),
    "rankmixer": BackboneSpec(
        f"{_FOLDER}.rankmixer:RankMixer",
        reads=("heads", "ffn_width"),
        tensor_parallel=False,
    ),
    "din": BackboneSpec(
        f"{_FOLDER}.din:DIN", reads=("ffn_width",), tensor_parallel=False
    ),
    "dcnv2": BackboneSpec(
        f"{_FOLDER}.dcnv2:DCNv2", reads=("ffn_width",), tensor_parallel=False
    ),
    "sasrec": BackboneSpec(
        f"{_FOLDER}.sasrec:SASRec",
        reads=("heads", "ffn_width", "attention", "qk_norm"),
        retrieval=True,
        # It shares TokenFormer's attention and rotates by an angle of zero.
        rope=True,
    ),
    "gemma3": _DECODER,
    "qwen3": _DECODER,
    "llama3": _DECODER,
}


def reads_event_ages(config: ModelConfig) -> bool:
    """Whether batches must hold the ages of events (`Batch.ages`)."""
    return "time_bias" in BACKBONES[config.kind].reads and config.time_bias


def is_decoder(config: ModelConfig) -> bool:
    """Whether the backbone is a language model of `model.decoder`."""
    return BACKBONES[config.kind].decoder


def head_width(config: ModelConfig) -> int:
    """Width h of an attention head."""
    return config.decoder.head_width or config.width // config.heads


def uses_heads(config: ModelConfig) -> bool:
    """Whether the width must be a multiple of `model.heads`."""
    spec = BACKBONES[config.kind]
    return "heads" in spec.reads and not spec.decoder


def uses_rope(config: ModelConfig) -> bool:
    """Whether rotary positions rotate the entries of a head in pairs."""
    return BACKBONES[config.kind].rope


def supports_tensor_parallelism(config: ModelConfig) -> bool:
    """Whether weights can be split over `mesh.tensor`."""
    return BACKBONES[config.kind].tensor_parallel


def supports_context_parallelism(config: ModelConfig) -> bool:
    """Whether tokens can be split over `mesh.context`."""
    return BACKBONES[config.kind].context_parallel


def backbone_problems(config: Config) -> Iterator[str]:
    """Yield a message for each option that the chosen backbone does not support."""
    model, data = config.model, config.data
    spec, suffix = BACKBONES[model.kind], f"with model.kind='{model.kind}'"
    yield from _unread_fields(model, spec, suffix)
    yield from _language_model_problems(config, spec, suffix)
    if model.windows and not spec.windows:
        yield (
            f"model.windows={model.windows} {suffix}, which has no sliding layers; "
            "use ()"
        )
    if data.paradigm == "uc" and not spec.uc:
        yield (
            f"data.paradigm='uc' {suffix}, which reads out the newest tokens of a "
            "history only; use 'nio'"
        )
    if data.objective == "retrieval" and not spec.retrieval:
        yield (
            f"data.objective='retrieval' {suffix}, which scores a target that is part "
            "of its input; use 'ranking'"
        )
    if (
        data.objective == "retrieval"
        and config.head.retrieval == "semantic_id"
        and not spec.generates
    ):
        yield (
            f"head.retrieval='semantic_id' {suffix}, which has no prefix cache to "
            "generate from; use 'next_item'"
        )
    if config.mesh.tensor != 1 and not spec.tensor_parallel:
        yield (
            f"mesh.tensor={config.mesh.tensor} {suffix}, which has no attention heads "
            "to split; use mesh.tensor=1, and mesh.data or mesh.fsdp instead"
        )
    if config.mesh.context != 1 and not spec.context_parallel:
        able = [kind for kind, each in BACKBONES.items() if each.context_parallel]
        yield (
            f"mesh.context={config.mesh.context} {suffix}, whose layers read whole "
            "streams on every device; use mesh.context=1, or one of model.kind="
            f"{able}"
        )
    if config.train.log_states and not spec.event_states:
        yield (
            f"train.log_states=True {suffix}, whose layers have no state per event; "
            "use False"
        )
    yield from _unsupported_tokens(config.tokens, spec, suffix)


def _language_model_problems(
    config: Config, spec: BackboneSpec, suffix: str
) -> Iterator[str]:
    """Yield a message for each option that language models alone have, or lack."""
    tuning = config.tuning
    if not spec.decoder:
        if tuning != type(tuning)():
            yield (
                f"tuning.method='{tuning.method}' {suffix}: tuning is that of a "
                f"pretrained language model; leave the section tuning as it is, or use "
                f"one of model.kind={[k for k, s in BACKBONES.items() if s.decoder]}"
            )
        return
    for group in tuning.rates:
        if group not in GROUPS:
            yield (
                f"tuning.rates names '{group}', which is no group of weights"
                f"{suggest(group, GROUPS)}"
            )
    yield from _ignored_tuning(tuning)
    if config.train.warm_start:
        yield (
            f"train.warm_start='{config.train.warm_start}' {suffix}: language models "
            "start from model.pretrained, which may be a folder that `tokenrec export "
            "--format hf` wrote; leave it empty"
        )
    if config.model.prefix == "bidirectional":
        yield (
            f"model.prefix='bidirectional' {suffix}, which has been trained on causal "
            "attention; use 'causal'"
        )
    if config.tokens.random_tokens:
        yield f"tokens.random_tokens=True {suffix}, which does not support it; use False"


def _ignored_tuning(tuning: TuningConfig) -> Iterator[str]:
    """Yield a message for each field of `tuning` that has no effect."""
    method = f"with tuning.method='{tuning.method}'"
    if tuning.method == "lora" and not tuning.projections:
        yield f"tuning.projections=() {method} adapts nothing; name projections"
    for field in dataclasses.fields(tuning):
        if field.name not in ("rank", "alpha", "dropout", "projections"):
            continue
        value, default = (
            getattr(tuning, field.name),
            getattr(type(tuning)(), field.name),
        )
        if tuning.method != "lora" and value != default:
            yield (
                f"tuning.{field.name}={value!r} {method}, which has no adapters; leave "
                f"it at {default!r}, or use 'lora'"
            )
    frozen: tuple[str, ...] = (
        ("adapters",) if tuning.method == "all" else ("base", "words")
    )
    frozen += ("adapters",) if tuning.method == "frozen" else ()
    for group in sorted(set(frozen) & tuning.rates.keys()):
        yield (
            f"tuning.rates['{group}']={tuning.rates[group]} {method}, which does not "
            "train it; leave it out"
        )


def _unread_fields(
    model: ModelConfig, spec: BackboneSpec, suffix: str
) -> Iterator[str]:
    """Yield a message for each model field that is set and has no effect."""
    defaults = type(model)()
    for field in dataclasses.fields(model):
        value, default = getattr(model, field.name), getattr(defaults, field.name)
        if field.name not in (*_ALWAYS_READ, *spec.reads) and value != default:
            yield (
                f"model.{field.name}={value!r} {suffix}, which does not read it; "
                f"leave it at {default!r}"
            )


def branch_problems(config: Config) -> Iterator[str]:
    """Yield a message for each option that `model.branch` does not support."""
    model = config.model
    if model.branch == "none":
        default = type(model)().branch_layers
        if model.branch_layers != default:
            yield (
                f"model.branch_layers={model.branch_layers} with model.branch='none' "
                f"has no effect; leave it at {default}, or choose a branch"
            )
        return
    suffix = f"with model.branch='{model.branch}'"
    if config.data.objective == "retrieval":
        yield (
            f"data.objective='retrieval' {suffix}, which multiplies features of a "
            "target; use 'ranking', or model.branch='none'"
        )
    # The branch takes the stream apart as DIN does.
    yield from _unsupported_tokens(config.tokens, BACKBONES["din"], suffix)


def _unsupported_tokens(
    tokens: TokensConfig, spec: BackboneSpec, suffix: str
) -> Iterator[str]:
    """Yield a message for each option of the stream that the backbone cannot read."""
    if tokens.target_tokens > 1 and not spec.target_tokens:
        yield (
            f"tokens.target_tokens={tokens.target_tokens} {suffix}, which reads one "
            "token per target; use 1"
        )
    if spec.any_prompt:
        return
    for name in ("prompt", "template", "text"):
        if value := getattr(tokens, name):
            yield (
                f"tokens.{name}={value!r} {suffix}, which reads user, event and target "
                "tokens only; leave it empty"
            )
    if tokens.compression != "none":
        yield (
            f"tokens.compression='{tokens.compression}' {suffix}, which reads single "
            "events; use 'none'"
        )
    if tokens.history_cap:
        yield (
            f"tokens.history_cap={tokens.history_cap} {suffix}, which does not support "
            "it; lower data.events instead"
        )

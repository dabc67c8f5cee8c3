"""What may not stand in a config: all problems in one readable message."""

from __future__ import annotations

import dataclasses
import itertools
import typing
from collections.abc import Iterator
from typing import Any, Literal, get_args

from tokenrec.config import Config
from tokenrec.config.backbones import (
    BACKBONES,
    backbone_problems,
    uses_heads,
    uses_rope,
)
from tokenrec.config.prompt import ENTITIES, default_prompt, parse_prompt
from tokenrec.config.types import has_type, hint_name
from tokenrec.errors import InputError, suggest


def validate(config: Config) -> Config:
    """Returns `config` if nothing is wrong with it on its own; the data set is checked against it when opened.

    Raises:
      InputError: every problem, a line each, with field, value, reason and remedy.
    """
    problems = list(_type_problems(config, ""))
    if not problems and config.model.kind not in BACKBONES:
        known = suggest(config.model.kind, BACKBONES)
        problems = [f"model.kind={config.model.kind!r} is no backbone{known}"]
    problems = problems or list(_problems(config))
    if problems:
        raise InputError("the config has problems:\n  " + "\n  ".join(problems))
    return config


def _problems(c: Config) -> Iterator[str]:
    positive = {
        "data.events": c.data.events,
        "data.candidates": c.data.candidates,
        "data.batch_size": c.data.batch_size,
        "data.eval_batch_size": c.data.eval_batch_size,
        "data.window_rows": c.data.window_rows,
        "tokens.embedding_dim": c.tokens.embedding_dim,
        "tokens.target_tokens": c.tokens.target_tokens,
        "model.width": c.model.width,
        "model.heads": c.model.heads,
        "model.layers": c.model.layers,
        "model.merge": c.model.merge,
        "optim.steps": c.optim.steps,
        "optim.accumulate": c.optim.accumulate,
        "tokens.group": c.tokens.group,
        "tokens.compressed": c.tokens.compressed,
        "head.beams": c.head.beams,
        "head.top_k": c.head.top_k,
        "train.log_every": c.train.log_every,
        "train.keep": c.train.keep,
    }
    positive |= {
        f"tokens.embedding_dims['{name}']": width
        for name, width in c.tokens.embedding_dims.items()
    }
    for field, value in positive.items():
        if value < 1:
            yield f"{field}={value} must be at least 1"
    natural: dict[str, float] = {
        "seed": c.seed,
        "tokens.user_tokens": c.tokens.user_tokens,
        "tokens.hidden": c.tokens.hidden,
        "tokens.history_cap": c.tokens.history_cap,
        "tokens.recent": c.tokens.recent,
        "head.negatives": c.head.negatives,
        "model.ffn_width": c.model.ffn_width,
        "train.eval_every": c.train.eval_every,
        "train.eval_samples": c.train.eval_samples,
        "train.save_every": c.train.save_every,
        "train.patience": c.train.patience,
        "train.keep_every": c.train.keep_every,
        "train.hang_seconds": c.train.hang_seconds,
        "train.profile_steps": c.train.profile_steps,
        "optim.max_skipped": c.optim.max_skipped,
    }
    for field, number in natural.items():
        if number < 0:
            yield f"{field}={number} must not be negative"
    if c.tokens.replicate_rows < 0:
        yield f"tokens.replicate_rows={c.tokens.replicate_rows} must not be negative; 0 spreads every table"
    if any(value < 1 for value in positive.values()):
        return
    if uses_heads(c.model) and c.model.width % c.model.heads:
        yield f"model.heads={c.model.heads} does not divide model.width={c.model.width}"
    elif uses_rope(c.model) and (c.model.width // c.model.heads) % 2:
        yield f"model.width / model.heads = {c.model.width // c.model.heads} is odd; rotary positions need an even head"
    if len(c.model.windows) > c.model.layers:
        yield f"model.windows has {len(c.model.windows)} entries for model.layers={c.model.layers}; drop some"
    if c.model.scan < 0 or c.model.scan in (1, 2):
        yield f"model.scan={c.model.scan}: a loop of 2 layers below a single one takes 3; use 3 or more, or 0 for none"
    sliding = tuple(w for w in c.model.windows if w)
    if any(w < 0 for w in sliding):
        yield f"model.windows={c.model.windows}: a window counts the row itself, so it is at least 1; 0 is a full layer"
    if any(b > a for a, b in itertools.pairwise(sliding)):
        yield f"model.windows={c.model.windows} grow; BFTS windows shrink from bottom to top"
    if not 0 <= c.model.dropout < 1:
        yield f"model.dropout={c.model.dropout} must be in [0, 1)"
    ranking = c.data.objective == "ranking"
    if (
        ranking
        and c.data.paradigm == "nio"
        and sliding
        and sliding[-1] <= c.tokens.target_tokens + 1
    ):
        yield (
            f"model.windows: {sliding[-1]} holds no event: it must exceed tokens.target_tokens + 1 = "
            f"{c.tokens.target_tokens + 1}"
        )
    yield from _of_uc(c) if c.data.paradigm == "uc" else _of_nio(c)
    yield from _of_prompt(c)
    yield from backbone_problems(c)
    if not ranking:
        yield from _of_retrieval(c)
    elif c.data.positive:
        yield f"data.positive='{c.data.positive}' is for data.objective='retrieval'; leave it empty"
    for bucket in c.data.buckets:
        if not 0 < bucket < c.data.events:
            yield f"data.buckets: {bucket} must lie between 1 and data.events - 1 = {c.data.events - 1}"
    if c.data.batch_size % c.optim.accumulate:
        yield f"optim.accumulate={c.optim.accumulate} does not divide data.batch_size={c.data.batch_size}"
    if not 0 <= c.optim.warmup_steps <= c.optim.steps:
        yield f"optim.warmup_steps={c.optim.warmup_steps} must lie between 0 and optim.steps={c.optim.steps}"
    if not 0 <= c.train.stop_at <= c.optim.steps:
        yield f"train.stop_at={c.train.stop_at} must lie between 0 (the end) and optim.steps={c.optim.steps}"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(c.optim, name) < 1:
            yield f"optim.{name}={getattr(c.optim, name)} must be in [0, 1)"
    if not c.model.rope_base > 1:
        yield f"model.rope_base={c.model.rope_base} must be above 1"
    for name in ("learning_rate", "table_learning_rate", "epsilon"):
        if not getattr(c.optim, name) > 0:
            yield f"optim.{name}={getattr(c.optim, name)} must be above 0"
    for name in ("weight_decay", "table_weight_decay", "clip_norm", "final_fraction"):
        if not getattr(c.optim, name) >= 0:
            yield f"optim.{name}={getattr(c.optim, name)} must not be negative"
    if c.optim.spike_norm and c.optim.spike_norm <= 1:
        yield f"optim.spike_norm={c.optim.spike_norm} must be above 1, or 0 for none; norms vary"
    for axis in ("fsdp", "tensor"):
        if getattr(c.mesh, axis) < 1:
            yield f"mesh.{axis}={getattr(c.mesh, axis)} must be at least 1"
    if c.mesh.data < 1 and c.mesh.data != -1:
        yield f"mesh.data={c.mesh.data} must be at least 1, or -1 for all that is left"
    if ranking and c.train.best_metric in ("recall@10", "ndcg@10"):
        yield f"train.best_metric='{c.train.best_metric}' is for data.objective='retrieval'; use 'macro_auc'"
    for tracker in c.train.trackers:
        if tracker not in ("wandb", "mlflow"):
            yield f"train.trackers: '{tracker}' is not supported; use 'wandb', 'mlflow' or both"
    for name, weight in c.data.tasks.items():
        if not weight > 0:
            yield f"data.tasks['{name}']={weight} must be above 0; leave a task out instead"


def _of_nio(c: Config) -> Iterator[str]:
    if c.data.overlap:
        yield f"data.overlap={c.data.overlap} is for data.paradigm='uc'; a sample of 'nio' has its own history, use 0"


def _of_uc(c: Config) -> Iterator[str]:
    ranking = c.data.objective == "ranking"
    if ranking and c.tokens.fused:
        yield "tokens.fused=True with data.paradigm='uc': a fused token holds the label it must predict; use False"
    if c.data.candidates != 1:
        yield f"data.candidates={c.data.candidates} with data.paradigm='uc': a user stream has no candidates; use 1"
    if c.tokens.target_tokens != 1:
        tokens = c.tokens.target_tokens
        yield f"tokens.target_tokens={tokens} with data.paradigm='uc': the state token is the target; use 1"
    least = 0 if ranking else 1  # what is retrieved first needs an event before it
    if not least <= c.data.overlap < c.data.events:
        yield f"data.overlap={c.data.overlap} must be at least {least} and below data.events={c.data.events}"
    if c.tokens.compression != "none":
        yield f"tokens.compression='{c.tokens.compression}' with data.paradigm='uc' mixes later events in; use 'none'"
    if c.model.prefix != "causal":
        yield f"model.prefix='{c.model.prefix}' with data.paradigm='uc' shows later events; use 'causal'"
    if c.tokens.history_cap:
        yield f"tokens.history_cap={c.tokens.history_cap} is for data.paradigm='nio'; lower data.events instead"
    if "query" in c.tokens.prompt:
        yield "tokens.prompt holds 'query' with data.paradigm='uc': a user stream has no one request; leave it out"
    if not ranking and "history" in c.tokens.text:
        yield (
            "tokens.text['history'] with data.paradigm='uc': every event is read out at its one token; leave it soft, "
            "or use data.paradigm='nio'"
        )


def _of_prompt(c: Config) -> Iterator[str]:
    try:
        segments = parse_prompt(c)
    except InputError as error:
        yield str(error)
        return
    kinds = {segment.kind for segment in segments}
    for field, named in (("text", c.tokens.text), ("soft", c.tokens.soft)):
        for entity, features in named.items():
            if entity not in ENTITIES:
                yield f"tokens.{field} names '{entity}'{suggest(entity, ENTITIES)}"
            elif entity not in kinds:
                yield (
                    f"tokens.{field} names '{entity}', and tokens.prompt={c.tokens.prompt or default_prompt(c)} holds "
                    "none; leave it out, or add the segment"
                )
            elif not features:
                yield f"tokens.{field}['{entity}'] is empty; name features, or leave the entity out, which is soft"
    for entity in c.tokens.text.keys() & c.tokens.soft.keys():
        yield f"tokens.soft['{entity}'] and tokens.text['{entity}'] contradict each other; keep one of them"
    if "history" in c.tokens.soft and not c.tokens.fused:
        yield "tokens.soft['history'] with tokens.fused=False: a state and an action have makers of their own; use True"
    if "history" in c.tokens.text and not c.tokens.fused:
        yield "tokens.text['history'] with tokens.fused=False: an event in text is one group of tokens; use fused=True"
    if c.tokens.history_cap and not c.tokens.fused:
        yield f"tokens.history_cap={c.tokens.history_cap} with tokens.fused=False; use fused=True"
    if c.tokens.compression != "none":
        if not c.tokens.fused or "history" in c.tokens.text:
            yield "tokens.compression needs one soft token per event: tokens.fused=True, no tokens.text['history']"
        older = c.data.events - c.tokens.recent
        if older < 1:
            yield f"tokens.recent={c.tokens.recent} leaves nothing of data.events={c.data.events} to compress; lower it"
        elif c.tokens.compression == "mlp" and c.tokens.compressed > older:
            yield f"tokens.compressed={c.tokens.compressed} is more than the {older} older events; lower it"
        if c.tokens.history_cap:
            yield "tokens.history_cap cuts the same events that tokens.compression keeps; use one of them"
    if (
        c.model.prefix == "bidirectional"
        and sum(w > 0 for w in c.model.windows) == c.model.layers
    ):
        yield "model.prefix='bidirectional' is of full layers, and every layer has a window; drop some of model.windows"
    if (
        c.tokens.random_tokens
        and c.data.objective == "retrieval"
        and c.head.retrieval == "next_item"
        and c.head.tied
    ):
        yield "tokens.random_tokens with head.tied=True: trained item vectors would be added to events; use tied=False"


def _of_retrieval(c: Config) -> Iterator[str]:
    if not c.tokens.fused:
        yield "tokens.fused=False with data.objective='retrieval': the token of a whole event is read out; use True"
    if c.tokens.target_tokens != 1:
        tokens = c.tokens.target_tokens
        yield f"tokens.target_tokens={tokens} with data.objective='retrieval', which has no target; use 1"
    if c.head.retrieval == "semantic_id" and not c.data.semantic_ids:
        yield "head.retrieval='semantic_id' needs data.semantic_ids; name the output of `tokenrec semantic-ids` there"
    if c.head.retrieval == "semantic_id" and c.head.beams < c.head.top_k:
        yield f"head.beams={c.head.beams} gives fewer items than head.top_k={c.head.top_k}; raise it"
    if c.head.retrieval == "semantic_id" and c.head.negatives:
        yield f"head.negatives={c.head.negatives} is for head.retrieval='next_item'; use 0"
    if not c.head.temperature > 0:
        yield f"head.temperature={c.head.temperature} must be above 0"
    if c.head.negatives % c.data.batch_size:
        yield f"head.negatives={c.head.negatives} must be a multiple of data.batch_size={c.data.batch_size}"
    if c.train.best_metric in ("macro_auc", "macro_gauc", "loss"):
        yield f"train.best_metric='{c.train.best_metric}' is for ranking; retrieval has 'recall@10' and 'ndcg@10'"


def _type_problems(value: Any, prefix: str) -> Iterator[str]:
    """Values that an override or a config file set to the wrong type."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, got, hint = (
            prefix + field.name,
            getattr(value, field.name),
            hints[field.name],
        )
        if dataclasses.is_dataclass(hint):
            if not isinstance(got, hint):  # type: ignore[arg-type]
                yield f"{name}={got!r} must be a {hint.__name__}"  # type: ignore[union-attr]
            else:
                yield from _type_problems(got, name + ".")
        elif not has_type(got, hint):
            choices = get_args(hint) if typing.get_origin(hint) is Literal else ()
            reason = (
                suggest(str(got), choices)
                if choices
                else f", which is not {hint_name(hint)}"
            )
            yield f"{name}={got!r}{reason}"

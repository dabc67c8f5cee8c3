"""Checks of config fields against each other.

Each check reads fields whose own values are allowed. Its message names every field that
it read, so that `validate` can drop it when one of them was a stand-in.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from tokenrec.config.alignment import alignment_problems
from tokenrec.config.backbones import (
    backbone_problems,
    branch_problems,
    head_width,
    uses_heads,
    uses_rope,
)
from tokenrec.config.config import Config
from tokenrec.config.stream_checks import (
    check_compression,
    check_entities,
    check_prompt,
    check_user_centric_tokens,
)


def cross_check(config: Config) -> Iterator[str]:
    """Yield a message for each pair of fields that do not go together."""
    yield from check_data(config)
    if config.data.paradigm == "uc":
        yield from check_user_centric(config)
    if config.data.objective == "retrieval":
        yield from check_retrieval(config)
    yield from check_prompt(config)
    yield from alignment_problems(config)
    yield from check_entities(config)
    yield from check_compression(config)
    yield from check_ids(config)
    yield from check_model(config)
    yield from backbone_problems(config)
    yield from branch_problems(config)
    yield from check_optim(config)
    yield from check_train(config)


def check_ids(config: Config) -> Iterator[str]:
    """Check the options of rare ids."""
    tokens = config.tokens
    any_rare = tokens.min_count or any(tokens.min_counts.values())
    if tokens.rare_buckets > 1 and not any_rare:
        yield (
            f"tokens.rare_buckets={tokens.rare_buckets} with tokens.min_count=0 and no "
            "tokens.min_counts: no id is rare; set the fewest training rows of an id "
            "that has a row of its own, or leave it at 1"
        )


def check_data(config: Config) -> Iterator[str]:
    """Check the data section against the objective, the paradigm and the optimizer."""
    data = config.data
    if data.paradigm == "nio" and data.overlap:
        yield (
            f"data.overlap={data.overlap} with data.paradigm='nio', whose samples each "
            "have their own history; use 0"
        )
    if data.objective == "ranking" and data.positive:
        yield (
            f"data.positive='{data.positive}' is for data.objective='retrieval'; "
            "leave it empty"
        )
    if data.unscored_weight != 1 and (
        data.paradigm == "nio" or data.objective == "retrieval"
    ):
        yield (
            f"data.unscored_weight={data.unscored_weight} with "
            f"data.paradigm='{data.paradigm}' and data.objective='{data.objective}', "
            "which learns from scored rows only; use 1"
        )
    yield from _check_task_options(config)
    for bucket in data.buckets:
        if not 0 < bucket < data.events:
            yield (
                f"data.buckets: {bucket} must lie between 1 and data.events - 1 = "
                f"{data.events - 1}"
            )
    if data.batch_size % config.optim.accumulate:
        yield (
            f"data.batch_size={data.batch_size} is not a multiple of "
            f"optim.accumulate={config.optim.accumulate}; use a multiple"
        )
    if config.optim.gradient_sums == "bfloat16" != config.model.dtype:
        yield (
            "optim.gradient_sums='bfloat16' with model.dtype="
            f"'{config.model.dtype}' would round the weights of the products too; use "
            "model.dtype='bfloat16', or gradient_sums='float32'"
        )


def _check_task_options(config: Config) -> Iterator[str]:
    """Check the options of tasks, which retrieval does not have."""
    data = config.data
    if data.objective == "retrieval":
        for name, value, unset in (
            ("losses", data.losses, {}),
            ("auxiliary", data.auxiliary, ()),
            ("request_loss", data.request_loss, "none"),
            ("request_ndcg", data.request_ndcg, 0),
        ):
            if value != unset and value != []:
                yield (
                    f"data.{name}={value!r} is for data.objective='ranking', which has "
                    f"labels; use {unset!r}"
                )
    elif data.request_loss != "none" and data.paradigm == "uc":
        yield (
            f"data.request_loss='{data.request_loss}' with data.paradigm='uc': of the "
            "events of one time a training stream reads the first alone, so that a "
            "request has nothing to compare; use data.paradigm='nio', or 'none'"
        )
    elif data.request_loss != "none" and data.candidates == 1:
        yield (
            f"data.request_loss='{data.request_loss}' compares the candidates of a "
            "request, and data.candidates=1 gives each a sample of its own; raise it"
        )


def check_user_centric(config: Config) -> Iterator[str]:
    """Check what `data.paradigm='uc'` needs: overlapping streams, causal attention."""
    data, model = config.data, config.model
    suffix = "with data.paradigm='uc'"
    if data.candidates != 1:
        yield (
            f"data.candidates={data.candidates} {suffix}: a stream of events has no "
            "candidates; use 1"
        )
    # An item can be retrieved only if an event comes before it.
    least = 1 if data.objective == "retrieval" else 0
    if not least <= data.overlap < data.events:
        yield (
            f"data.overlap={data.overlap} {suffix} and "
            f"data.objective='{data.objective}' must be at least {least} and below "
            f"data.events={data.events}"
        )
    if model.prefix != "causal":
        yield (
            f"model.prefix='{model.prefix}' {suffix}: it would show later events to "
            "earlier ones; use 'causal'"
        )
    yield from check_user_centric_tokens(config)


def check_retrieval(config: Config) -> Iterator[str]:
    """Check what `data.objective='retrieval'` needs, the head included."""
    tokens, head = config.tokens, config.head
    suffix = "with data.objective='retrieval'"
    if not tokens.fused:
        yield (
            f"tokens.fused=False {suffix}: items are predicted from the token of a "
            "whole event; use True"
        )
    if tokens.target_tokens != 1:
        yield (
            f"tokens.target_tokens={tokens.target_tokens} {suffix}, which has no "
            "target; use 1"
        )
    if head.retrieval == "semantic_id":
        yield from _check_semantic_id_head(config)
    if head.copy and head.drop_seen:
        yield (
            f"head.copy=True with head.drop_seen=True {suffix}: the first raises the "
            "items of the history, which the second leaves out; use one of them"
        )
    if head.negatives % config.data.batch_size:
        yield (
            f"head.negatives={head.negatives} {suffix} must be a multiple of "
            f"data.batch_size={config.data.batch_size}"
        )
    if head.item_features and not head.negatives:
        yield (
            f"head.item_features={head.item_features} {suffix} and head.negatives=0, "
            "whose item vectors are no table rows: set head.negatives, or use ()"
        )
    if config.train.best_metric in ("macro_auc", "macro_gauc", "loss", "request_ndcg"):
        yield (
            f"train.best_metric='{config.train.best_metric}' {suffix} is a metric of "
            "ranking; use 'recall@10' or 'ndcg@10'"
        )
    if tokens.random_tokens and head.retrieval == "next_item" and head.tied:
        yield (
            f"tokens.random_tokens=True {suffix}, head.retrieval='next_item' and "
            "head.tied=True: trained item vectors would be added to events; "
            "use tied=False"
        )


def _check_semantic_id_head(config: Config) -> Iterator[str]:
    head = config.head
    suffix = "with head.retrieval='semantic_id'"
    if not config.data.semantic_ids:
        yield (
            f"data.semantic_ids='' {suffix} and data.objective='retrieval'; name the "
            "output of `tokenrec semantic-ids`"
        )
    if head.beams < head.top_k:
        yield (
            f"head.beams={head.beams} {suffix} finds fewer items than "
            f"head.top_k={head.top_k}; use at least {head.top_k}"
        )
    if head.negatives:
        yield f"head.negatives={head.negatives} {suffix}, which draws none; use 0"


def check_model(config: Config) -> Iterator[str]:
    """Check the heads and the windows."""
    model = config.model
    if uses_heads(model) and model.width % model.heads:
        yield (
            f"model.heads={model.heads} does not divide model.width={model.width}, "
            f"which model.kind='{model.kind}' needs; use a multiple of {model.heads} "
            "for the width"
        )
    elif uses_rope(model) and head_width(model) % 2:
        yield (
            f"model.width / model.heads = {head_width(model)} is odd; rotary "
            f"positions of model.kind='{model.kind}' rotate pairs, use an even head"
        )
    if len(model.windows) > model.layers:
        yield (
            f"model.windows={model.windows} has more entries than "
            f"model.layers={model.layers}; drop some"
        )
    sliding = tuple(window for window in model.windows if window)
    if any(above > below for below, above in itertools.pairwise(sliding)):
        yield (
            f"model.windows={model.windows} grow from bottom to top; BFTS windows must "
            "not, let them shrink"
        )
    # The target's tokens and the separator before them fill a window this small.
    target = config.tokens.target_tokens
    ranks_candidates = (
        config.data.objective == "ranking" and config.data.paradigm == "nio"
    )
    if ranks_candidates and sliding and sliding[-1] <= target + 1:
        yield (
            f"model.windows: {sliding[-1]} holds no event with "
            f"data.objective='ranking' and data.paradigm='nio'; it must exceed "
            f"tokens.target_tokens + 1 = {target + 1}"
        )
    if model.prefix == "bidirectional" and len(sliding) == model.layers:
        yield (
            f"model.prefix='bidirectional' needs a full layer, and every layer has a "
            f"window (model.windows={model.windows}, model.layers={model.layers}); "
            "drop some windows"
        )


def check_optim(config: Config) -> Iterator[str]:
    """Check the schedule. Steps of epochs are known with the data set only."""
    optim = config.optim
    if not (optim.steps or optim.epochs):
        yield (
            f"optim.steps={optim.steps} and optim.epochs={optim.epochs:g} give training "
            "no length; set one of them"
        )
    elif optim.steps and optim.warmup_steps > optim.steps:
        yield (
            f"optim.warmup_steps={optim.warmup_steps} must be at most {_length(config)}"
        )


def _length(config: Config) -> str:
    """The steps of a run, for messages, with the epochs that they are of."""
    epochs = config.optim.epochs
    suffix = f", the steps of optim.epochs={epochs:g}" if epochs else ""
    return f"optim.steps={config.optim.steps}{suffix}"


def check_train(config: Config) -> Iterator[str]:
    """Check the end of the loop, and what its evaluations are to decide."""
    train = config.train
    if train.patience and not train.eval_split:
        yield (
            f"train.patience={train.patience} with train.eval_split='' would never "
            "stop the run: nothing is evaluated; name a split, or use patience=0"
        )
    elif train.patience and not train.eval_every:
        yield (
            f"train.patience={train.patience} with train.eval_every=0 would never stop "
            "the run: it is evaluated at the end only; set train.eval_every"
        )
    if train.log_states and not train.eval_split:
        yield (
            "train.log_states=True with train.eval_split='' would log nothing: states "
            "are measured at evaluations; name a split"
        )
    if train.stop_at > config.optim.steps > 0:
        yield (
            f"train.stop_at={train.stop_at} must be at most {_length(config)}; "
            "use 0 to train all steps"
        )
    if train.best_metric == "request_ndcg" and not config.data.request_ndcg:
        yield (
            "train.best_metric='request_ndcg' with data.request_ndcg=0, which computes "
            "none; set the number of places, such as 10"
        )
    retrieval_metric = train.best_metric in ("recall@10", "ndcg@10")
    if config.data.objective == "ranking" and retrieval_metric:
        yield (
            f"train.best_metric='{train.best_metric}' is for "
            "data.objective='retrieval'; use 'macro_auc'"
        )

"""Checks of the fields that make up a stream: prompt, entities, compression."""

from __future__ import annotations

from collections.abc import Iterator

from tokenrec.config.config import Config
from tokenrec.config.prompt import ENTITIES, parse_prompt, prompt_name
from tokenrec.errors import InputError, suggest


def check_prompt(config: Config) -> Iterator[str]:
    """Check the order of the segments, and the entities that have features chosen."""
    tokens = config.tokens
    try:
        segments = parse_prompt(config)
    except InputError as error:
        # Without segments there is nothing to check the entities against.
        yield str(error)
        return
    kinds = {segment.kind for segment in segments}
    for field, entities in (("text", tokens.text), ("soft", tokens.soft)):
        for entity, features in entities.items():
            if entity not in ENTITIES:
                yield (
                    f"tokens.{field} names '{entity}', which is no entity"
                    f"{suggest(entity, ENTITIES)}"
                )
            elif entity not in kinds:
                yield (
                    f"tokens.{field} names '{entity}', and {prompt_name(config)} of "
                    f"data.objective='{config.data.objective}' with "
                    f"data.paradigm='{config.data.paradigm}' holds none; leave it out, "
                    "or add the segment"
                )
            elif not features:
                yield (
                    f"tokens.{field}['{entity}'] is empty; name features, or leave the "
                    "entity out, which makes it soft"
                )


def check_entities(config: Config) -> Iterator[str]:
    """Check the features of text and soft tokens against the tokens of an event."""
    tokens = config.tokens
    for entity in sorted(tokens.text.keys() & tokens.soft.keys()):
        yield (
            f"tokens.soft['{entity}'] and tokens.text['{entity}'] contradict each "
            "other; keep one of them"
        )
    if tokens.fused:
        return
    if "history" in tokens.soft:
        yield (
            "tokens.soft['history'] with tokens.fused=False: state and action tokens "
            "have makers of their own; use True"
        )
    if "history" in tokens.text:
        yield (
            "tokens.text['history'] with tokens.fused=False: an event in text is one "
            "group of tokens; use fused=True"
        )
    if tokens.history_cap:
        yield (
            f"tokens.history_cap={tokens.history_cap} with tokens.fused=False, which "
            "does not support it; use fused=True"
        )


def check_compression(config: Config) -> Iterator[str]:
    """Check that there are events to compress, each of them one soft token."""
    tokens, events = config.tokens, config.data.events
    if tokens.compression == "none":
        return
    suffix = f"with tokens.compression='{tokens.compression}'"
    if not tokens.fused or "history" in tokens.text:
        yield (
            f"tokens.fused={tokens.fused} and tokens.text={tokens.text} {suffix}: an "
            "event must be one soft token; use fused=True and no text for the history"
        )
    older = events - tokens.recent
    if older < 1:
        yield (
            f"tokens.recent={tokens.recent} {suffix} leaves nothing of "
            f"data.events={events} to compress; lower it"
        )
    elif tokens.compression == "mlp" and tokens.compressed > older:
        yield (
            f"tokens.compressed={tokens.compressed} {suffix} is more than the {older} "
            f"older events (data.events={events} less tokens.recent={tokens.recent}); "
            "lower it"
        )
    if tokens.history_cap:
        yield (
            f"tokens.history_cap={tokens.history_cap} {suffix}: both shorten the older "
            "events; use one of them"
        )


def check_user_centric_tokens(config: Config) -> Iterator[str]:
    """Check that no token of a user-centric stream shows what is predicted."""
    tokens = config.tokens
    ranking = config.data.objective == "ranking"
    suffix = "with data.paradigm='uc'"
    if ranking and tokens.fused:
        yield (
            f"tokens.fused=True {suffix} and data.objective='ranking': a fused token "
            "contains the label that it must predict; use False"
        )
    if tokens.target_tokens != 1:
        yield (
            f"tokens.target_tokens={tokens.target_tokens} {suffix}: predictions are "
            "read from the token of the event; use 1"
        )
    if tokens.compression != "none":
        yield (
            f"tokens.compression='{tokens.compression}' {suffix}: a compressed token "
            "would show later events to earlier ones; use 'none'"
        )
    if tokens.history_cap:
        yield (
            f"tokens.history_cap={tokens.history_cap} {suffix}, which does not support "
            "it; use 0 and lower data.events instead"
        )
    if not ranking and "history" in tokens.text:
        yield (
            f"tokens.text['history'] {suffix} and data.objective='retrieval': every "
            "event is read out at its one token; leave it soft, or use "
            "data.paradigm='nio'"
        )

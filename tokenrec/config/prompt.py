"""The prompt: which segments make up a stream, in order (methods.md section 2, "Prompt").

A segment is written as one word, or as `text:` and literal text:

| segment | its tokens |
|---|---|
| `user` | what is known of the user |
| `sep` | one learned vector; each has its own |
| `history` | the events, oldest first |
| `query` | the context of the request |
| `text:Which of these will be bought?` | the literal text, by the tokenizer of the data set |
| `title` | the candidate's own text (its features of the kind `text`) |
| `candidate` | the target; the last of its tokens is read out |
| `||` | what is left of it depends on the request alone, what is right of it on one candidate |
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

from tokenrec.config import Config
from tokenrec.errors import InputError, suggest

SegmentKind = Literal["user", "sep", "history", "query", "text", "title", "candidate"]
ENTITIES = ("user", "history", "query", "candidate")
BAR = "||"


class Segment(NamedTuple):
    """A part of the stream. `own`: it stands right of `||`, once per candidate. `text`: of a literal."""

    kind: SegmentKind
    own: bool = False
    text: str = ""


def default_prompt(config: Config) -> tuple[str, ...]:
    """TokenFormer's layout (methods.md section 3), and its counterparts without a candidate."""
    if config.data.paradigm == "uc":
        return ("user", "sep", "history")
    if config.data.objective == "retrieval":
        return ("user", "sep", "history", "sep", "query")
    return ("user", "sep", "history", "sep", BAR, "candidate")


def parse_prompt(config: Config) -> tuple[Segment, ...]:
    """The segments of `tokens.prompt`, or of the default.

    Raises:
      InputError: an unknown segment, or an order that the task cannot use.
    """
    words = config.tokens.prompt or default_prompt(config)
    segments, own = [], False
    for word in words:
        kind, _, text = word.partition(":")
        if word == BAR:
            if own:
                raise InputError(f"tokens.prompt={words} holds '{BAR}' twice; keep one")
            own = True
        elif kind not in get_args(SegmentKind) or (kind == "text") != bool(text):
            known = [name for name in get_args(SegmentKind) if name != "text"]
            raise InputError(
                f"tokens.prompt: '{word}'{suggest(word, [*known, BAR])}; literal text is 'text:...'"
            )
        else:
            segments.append(Segment(kind, own, text))  # type: ignore[arg-type]
    _check(config, words, segments)
    return tuple(segments)


def _check(config: Config, words: tuple[str, ...], segments: list[Segment]) -> None:
    kinds = [segment.kind for segment in segments]
    where = f"tokens.prompt={words}"
    for kind in ("user", "history", "query", "title", "candidate"):
        if kinds.count(kind) > 1:
            raise InputError(
                f"{where} holds '{kind}' {kinds.count(kind)} times; keep one"
            )
    if "history" not in kinds:
        raise InputError(f"{where} holds no 'history'; add it")
    shared = [segment.kind for segment in segments if not segment.own]
    if any(
        segment.own and segment.kind not in ("text", "title", "candidate")
        for segment in segments
    ):
        raise InputError(
            f"{where}: right of '{BAR}' only text, title and candidate can stand; move the others left"
        )
    if any(kind in ("title", "candidate") for kind in shared):
        raise InputError(f"{where}: title and candidate belong right of '{BAR}'")
    ranks_candidates = (
        config.data.objective == "ranking" and config.data.paradigm == "nio"
    )
    if ranks_candidates and kinds[-1] != "candidate":
        raise InputError(
            f"{where} must end with 'candidate', whose last token is read out"
        )
    if not ranks_candidates and len(shared) < len(kinds):
        raise InputError(
            f"{where}: only ranking with data.paradigm='nio' has candidates; leave out '{BAR}' and after"
        )
    if config.data.paradigm == "uc" and shared[-1] != "history":
        raise InputError(
            f"{where} must end with 'history' where data.paradigm='uc', as every event is read out"
        )

"""The prompt: the segments of a stream, in order (docs/methods.md section 2, "Prompt").

A segment is one word of `tokens.prompt`, or `text:` followed by literal text. A
`tokens.template` is translated to such words (template.py).

| segment | its tokens |
|---|---|
| `user` | features of the user |
| `sep` | a learned vector, another one for each `sep` |
| `history` | the events, oldest first |
| `query` | the context of the request |
| `text:Which of these will be bought?` | the literal text, tokenized |
| `title` | text features of the candidate, tokenized |
| `candidate` | the target; predictions are read from its last token |

The word `||` separates segments that the candidates of a request share, on its left,
from those that each candidate has of its own. A language model can also have text
behind the candidate, and its predictions are read from the last token of that.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, cast, get_args

from tokenrec.config.backbones import is_decoder
from tokenrec.config.config import Config
from tokenrec.config.template import BAR, template_words
from tokenrec.errors import InputError, suggest

SegmentKind = Literal["user", "sep", "history", "query", "text", "title", "candidate"]
ENTITIES = ("user", "history", "query", "candidate")

# Segments that may occur once, and those that may stand right of `||`.
_SINGLE = ("user", "history", "query", "title", "candidate")
_OF_CANDIDATES = ("text", "title", "candidate")


class Segment(NamedTuple):
    """A part of the stream.

    Attributes:
      kind: what its tokens are made of.
      own: it stands right of `||`, once per candidate.
      text: literal text of a `text:` segment.
    """

    kind: SegmentKind
    own: bool = False
    text: str = ""


def default_prompt(config: Config) -> tuple[str, ...]:
    """TokenFormer's layout (docs/methods.md section 3), or that without a target."""
    if config.data.paradigm == "uc":
        return ("user", "sep", "history")
    if config.data.objective == "retrieval":
        return ("user", "sep", "history", "sep", "query")
    return ("user", "sep", "history", "sep", BAR, "candidate")


def prompt_words(config: Config) -> tuple[str, ...]:
    """The words of `tokens.prompt` or `tokens.template`, or those of the default.

    Raises:
      InputError: two fields contradict each other, or as `template_words`.
    """
    tokens = config.tokens
    if tokens.prompt and tokens.template:
        raise InputError(
            f"tokens.prompt={tokens.prompt} and tokens.template={tokens.template!r} "
            "both give the order of the stream; keep one of them"
        )
    if tokens.template:
        return template_words(config)
    if tokens.chat:
        raise InputError(
            "tokens.chat=True with tokens.template='', which are the words that it puts "
            "into the chat format; write a template, or use False"
        )
    return tokens.prompt or default_prompt(config)


def prompt_name(config: Config) -> str:
    """The field that gives the order of the stream, with its value, for messages."""
    tokens = config.tokens
    if tokens.template:
        return f"tokens.template={tokens.template!r}"
    return f"tokens.prompt={tokens.prompt or default_prompt(config)}"


def parse_prompt(config: Config) -> tuple[Segment, ...]:
    """Parse `tokens.prompt` or `tokens.template`, or the default prompt without both.

    Raises:
      InputError: a segment is unknown, or the task cannot use this order.
    """
    words = prompt_words(config)
    segments: list[Segment] = []
    own = False
    for word in words:
        kind, _, text = word.partition(":")
        if word == BAR:
            if own:
                raise InputError(f"{prompt_name(config)} holds '{BAR}' twice; keep one")
            own = True
        elif kind not in get_args(SegmentKind) or (kind == "text") != bool(text):
            known = [name for name in get_args(SegmentKind) if name != "text"]
            closest = suggest(word, [*known, BAR])
            raise InputError(
                f"tokens.prompt: '{word}' is not a segment{closest}; "
                "write literal text as 'text:...'"
            )
        else:
            segments.append(Segment(cast(SegmentKind, kind), own, text))
    problem = next(_order_problems(config, segments), None)
    if problem:
        raise InputError(problem)
    return tuple(_join_texts(segments) if is_decoder(config.model) else segments)


def _join_texts(segments: list[Segment]) -> list[Segment]:
    """Join literal texts that stand side by side, which a tokenizer must read as one."""
    joined: list[Segment] = []
    for segment in segments:
        last = joined[-1] if joined else None
        if last and last.kind == segment.kind == "text" and last.own == segment.own:
            joined[-1] = last._replace(text=last.text + segment.text)
        else:
            joined.append(segment)
    return joined


def _order_problems(config: Config, segments: list[Segment]) -> Iterator[str]:
    """Yield what is wrong with the order of the segments, the first problem first."""
    data = config.data
    decoder = is_decoder(config.model)
    kinds: list[str] = [segment.kind for segment in segments]
    shared: list[str] = [segment.kind for segment in segments if not segment.own]
    own: list[str] = [segment.kind for segment in segments if segment.own]
    where = prompt_name(config)
    task = f"data.objective='{data.objective}' and data.paradigm='{data.paradigm}'"
    for kind in _SINGLE:
        if kinds.count(kind) > 1:
            yield f"{where} holds '{kind}' {kinds.count(kind)} times; keep one"
    if "history" not in kinds:
        yield f"{where} holds no 'history'; add it"
    if any(kind not in _OF_CANDIDATES for kind in own):
        yield (
            f"{where}: right of '{BAR}' only {', '.join(_OF_CANDIDATES)} can stand; "
            "move the others left"
        )
    if any(kind in ("title", "candidate") for kind in shared):
        yield f"{where}: title and candidate belong right of '{BAR}'; move them there"
    ranks_candidates = data.objective == "ranking" and data.paradigm == "nio"
    if ranks_candidates and decoder:
        if "candidate" not in kinds:
            yield f"{where} holds no 'candidate'; add it"
        if kinds[-1] not in ("candidate", "text"):
            yield (
                f"{where} must end with 'candidate' or with text, whose last token is "
                f"read out with {task}"
            )
    elif ranks_candidates and kinds[-1:] != ["candidate"]:
        yield (
            f"{where} must end with 'candidate', whose last token is read out with "
            f"{task}"
        )
    if not ranks_candidates and own:
        # A template may have no bar that the user wrote.
        behind = "the slots of candidates" if config.tokens.template else "what follows"
        yield (
            f"{where}: with {task} there are no candidates; "
            f"leave out '{BAR}' and {behind}"
        )
    if data.paradigm == "uc" and "query" in kinds:
        yield (
            f"{where} holds 'query' with data.paradigm='uc': the stream belongs to no "
            "one request; leave it out"
        )
    if data.paradigm == "uc" and config.tokens.chat:
        yield (
            "tokens.chat=True with data.paradigm='uc': events are read out, and the "
            "model's answer would begin behind them; use False"
        )
    if data.paradigm == "uc" and shared[-1:] != ["history"]:
        yield (
            f"{where} must end with 'history', whose events are read out with {task}"
        )

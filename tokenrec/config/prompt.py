"""The prompt: the segments of a stream, in order (docs/methods.md section 2, "Prompt").

A segment is one word of `tokens.prompt`, or `text:` followed by literal text:

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
from those that each candidate has of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, cast, get_args

from tokenrec.config.config import Config
from tokenrec.errors import InputError, suggest

SegmentKind = Literal["user", "sep", "history", "query", "text", "title", "candidate"]
ENTITIES = ("user", "history", "query", "candidate")
BAR = "||"

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


def parse_prompt(config: Config) -> tuple[Segment, ...]:
    """Parse `tokens.prompt`, or the default prompt if it is empty.

    Raises:
      InputError: a segment is unknown, or the task cannot use this order.
    """
    words = config.tokens.prompt or default_prompt(config)
    segments: list[Segment] = []
    own = False
    for word in words:
        kind, _, text = word.partition(":")
        if word == BAR:
            if own:
                raise InputError(f"tokens.prompt={words} holds '{BAR}' twice; keep one")
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
    problem = next(_order_problems(config, words, segments), None)
    if problem:
        raise InputError(problem)
    return tuple(segments)


def _order_problems(
    config: Config, words: tuple[str, ...], segments: list[Segment]
) -> Iterator[str]:
    """Yield what is wrong with the order of the segments, the first problem first."""
    data = config.data
    kinds: list[str] = [segment.kind for segment in segments]
    shared: list[str] = [segment.kind for segment in segments if not segment.own]
    own: list[str] = [segment.kind for segment in segments if segment.own]
    where = f"tokens.prompt={words}"
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
    if ranks_candidates and kinds[-1:] != ["candidate"]:
        yield (
            f"{where} must end with 'candidate', whose last token is read out with "
            f"{task}"
        )
    if not ranks_candidates and own:
        yield (
            f"{where}: with {task} there are no candidates; "
            f"leave out '{BAR}' and what follows"
        )
    if data.paradigm == "uc" and shared[-1:] != ["history"]:
        yield (
            f"{where} must end with 'history', whose events are read out with {task}"
        )

"""The visibility rule of BFTS on a small stream, as the picture of windows shows it.

It restates `docs/methods.md` section 3 in a few lines, so that pictures need no JAX. A
test compares it with `tokenrec.ops.attention.pattern`.
"""

from __future__ import annotations

from typing import NamedTuple

USER_TOKENS, EVENTS = 3, 4


class Stream(NamedTuple):
    """Roles of the positions of a stream, and which of them are static."""

    roles: tuple[str, ...]
    static: tuple[bool, ...]


def toy_stream() -> Stream:
    """Three user tokens, four events of two tokens, and one target."""
    static = ("user",) * USER_TOKENS + ("sep",)
    rest = ("state", "action") * EVENTS + ("sep", "target")
    return Stream(static + rest, (True,) * len(static) + (False,) * len(rest))


def sees(stream: Stream, query: int, key: int, window: int | None) -> bool:
    """Whether `query` attends to `key`; `window=None` is a full layer."""
    if query == key:
        return True
    if key > query:
        return False
    if window is None:
        return True
    return query - key < window and (stream.static[query] or not stream.static[key])

"""Streams: user-centric, new impression only, and the prefix cache."""

from __future__ import annotations

from docs.pictures.svg import ROLE_COLOURS, Picture


def streams() -> Picture:
    """User-centric and new-impression-only streams of the same user."""
    picture = Picture(
        "streams",
        780,
        440,
        "Top: one user-centric stream of user tokens and interleaved state and action "
        "tokens, with a prediction at every state token. Middle: three "
        "new-impression-only streams, one per impression, each with a prediction at its "
        "target. Bottom: a request whose three candidates share one history.",
    )
    pitch, size = 38, 32

    def draw(x: float, y: float, names: str, read: tuple[str, ...]) -> None:
        roles = {"u": "user", "s": "state", "a": "action", "v": "target", "|": "sep"}
        for number, name in enumerate(names.split()):
            left = x + number * pitch
            word = "sep" if name == "|" else name
            picture.token(left, y, word, ROLE_COLOURS[roles[name[0]]], size=size)
            if name in read:
                picture.arrow((left + size / 2, y - 2), (left + size / 2, y - 17))
                picture.text(
                    left + size / 2, y - 21, f"ŷ{name[1:]}", size=13, colour="ink"
                )

    picture.text(8, 20, "User-centric (UC)", anchor="start", bold=True)
    picture.text(
        196,
        20,
        "one stream per user; every event is predicted from the events before it",
        anchor="start",
        size=13,
        colour="soft",
    )
    draw(
        8,
        66,
        "u | s1 a1 s2 a2 s3 a3 s4 a4",
        ("s1", "s2", "s3", "s4"),
    )
    picture.lines(
        410,
        78,
        ("4 predictions from 10 tokens", "an action token follows its state token"),
        size=13,
        anchor="start",
    )

    picture.text(8, 140, "New impression only (NIO)", anchor="start", bold=True)
    picture.text(
        236,
        140,
        "one stream per impression; its target ends the stream",
        anchor="start",
        size=13,
        colour="soft",
    )
    for number, names in enumerate(
        ("u | s1 a1 | v2", "u | s1 a1 s2 a2 | v3", "u | s1 a1 s2 a2 s3 a3 | v4")
    ):
        draw(8, 180 + number * 54, names, (f"v{number + 2}",))
    picture.lines(
        410,
        200,
        (
            "3 predictions from 24 tokens",
            "the history is computed again each time",
            "several candidate features may enter,",
            "and the upper layers shrink to the target",
        ),
        size=13,
        anchor="start",
    )

    picture.text(8, 364, "Request grouping (NIO)", anchor="start", bold=True)
    picture.text(
        212,
        364,
        "candidates shown together share the history and do not see each other",
        anchor="start",
        size=13,
        colour="soft",
    )
    draw(
        8,
        402,
        "u | s1 a1 s2 a2 s3 a3 | v4 v5 v6",
        ("v4", "v5", "v6"),
    )
    picture.text(486, 424, "3 predictions from 12 tokens", anchor="start", size=13)
    return picture


def prefix_cache() -> Picture:
    """A request's prompt is computed once; each slice of candidates reads its cache."""
    picture = Picture(
        "prefix_cache",
        780,
        330,
        "Left of the bar stand text, history and query tokens, which depend on the "
        "request alone. Prefill computes them once and keeps keys and values of each "
        "layer. Extend scores slices of candidates against that cache, and candidates "
        "do not see each other.",
    )
    size, pitch = 32, 37
    # 1. The prompt and its candidates.
    x = 8
    for name, role in (
        ("text", "sep"),
        ("u", "user"),
        ("e1", "state"),
        ("e2", "state"),
        ("e3", "state"),
        ("e4", "state"),
        ("q", "action"),
    ):
        picture.token(x, 34, name, ROLE_COLOURS[role], size=size)
        x += pitch
    picture.arrow((x + 5, 22), (x + 5, 78), colour="ink", head=False)
    picture.text(x + 5, 18, "||", size=14, code=True, bold=True)
    picture.text(130, 18, "depends on the request alone", size=13, colour="soft")
    picture.text(420, 18, "one candidate each", size=13, colour="soft")
    x += 20
    for number in range(6):
        picture.token(x + number * pitch, 34, f"v{number + 1}", "pink", size=size)
    picture.text(x + 6 * pitch + 12, 54, "…", size=18)

    # 2. Prefill.
    picture.arrow((135, 70), (135, 118))
    picture.text(145, 98, "prefill once", size=13, anchor="start")
    for layer in range(4):
        y = 122 + layer * 46
        picture.box(8, y, 254, 36, fill="blue", stroke="blue", opacity=0.14)
        picture.text(
            135, y + 23, f"layer {layer}: keys and values", size=13, colour="blue"
        )
    picture.text(135, 318, "the cache", size=13, bold=True)

    # 3. Extend, slice by slice.
    for slice_number, left in enumerate((306, 464)):
        for layer in range(4):
            y = 122 + layer * 46
            picture.box(left, y, 108, 36, fill="pink", stroke="pink", opacity=0.14)
            if not slice_number:
                picture.arrow((262, y + 18), (left - 2, y + 18), colour="blue")
            else:
                # Around the first slice: slices read the cache, not each other.
                picture.arrow(
                    (262, y + 28),
                    (284, y + 28),
                    (284, y + 41),
                    (440, y + 41),
                    (440, y + 18),
                    (left - 2, y + 18),
                    colour="blue",
                    dashed=True,
                )
        picture.arrow((left + 54, 70), (left + 54, 118))
        words = "v1 v2 v3" if not slice_number else "v4 v5 v6"
        picture.text(left + 54, 145, words, size=13, colour="pink")
        picture.text(left + 54, 318, "scores", size=13, bold=True)
    picture.text(372, 98, "extend", size=13, anchor="start")
    picture.text(530, 98, "extend", size=13, anchor="start")
    picture.lines(
        596,
        150,
        (
            "Each slice reads the",
            "cached prefix and itself.",
            "",
            "Scores equal those of",
            "whole streams to 1e-5",
            "in float32.",
        ),
        size=13,
        anchor="start",
    )
    return picture

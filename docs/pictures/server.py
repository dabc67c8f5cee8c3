"""The server: a request to its answer, and the parts that a request may skip."""

from __future__ import annotations

from docs.pictures.svg import Picture


def server() -> Picture:
    """Request, encoder, prefix cache, scorer, answer."""
    picture = Picture(
        "server",
        780,
        330,
        "A request is parsed and encoded on the event loop, and waits in a queue. When "
        "the device is free it takes all that waits as one batch. Prefixes of users "
        "that are in the cache are taken from there, the others are computed by "
        "prefill. Extend scores the candidates of all requests of the batch against "
        "their prefixes.",
    )

    # 1. The two threads.
    picture.text(8, 24, "event loop", anchor="start", bold=True, colour="soft")
    picture.text(8, 186, "device thread", anchor="start", bold=True, colour="soft")

    # 2. A request on the event loop, and its answer.
    for x, title, words, colour in (
        (8, "request", "user, history, candidates", "line"),
        (202, "encoder", "values to ids and numbers", "blue"),
        (396, "queue", "429 when it is full", "amber"),
        (590, "answer", "scores by task, unknowns", "pink"),
    ):
        picture.box(x, 40, 180, 62, stroke=colour)
        picture.text(x + 90, 66, title, bold=True)
        picture.text(x + 90, 87, words, size=12, colour="soft")
    picture.arrow((188, 71), (200, 71))
    picture.arrow((382, 71), (394, 71))

    # 3. A batch on the device.
    picture.arrow((486, 102), (486, 134), (98, 134), (98, 200))
    picture.text(292, 128, "all that waits when the device is free", size=12.5)
    for x, title, words, colour in (
        (8, "batch", "at most 16 requests", "line"),
        (202, "prefix cache", "artifact, user, history", "green"),
        (396, "prefill", "history of the others", "blue"),
        (590, "extend", "candidates of all", "blue"),
    ):
        picture.box(x, 202, 180, 62, stroke=colour)
        picture.text(x + 90, 228, title, bold=True)
        picture.text(x + 90, 249, words, size=12, colour="soft")
    picture.arrow((188, 233), (200, 233))
    picture.arrow((382, 233), (394, 233))
    picture.text(388, 192, "miss", size=12.5, colour="soft")
    picture.arrow((576, 233), (588, 233))
    picture.arrow((292, 264), (292, 300), (680, 300), (680, 266))
    picture.text(486, 318, "hit: the history costs nothing", size=12.5)
    picture.arrow((680, 202), (680, 104))
    return picture

"""The machine: signals, makers, stream, backbone, heads."""

from __future__ import annotations

from docs.pictures.svg import ROLE_COLOURS, Picture


def machine() -> Picture:
    """Signals to makers to a stream to the backbone to the heads."""
    picture = Picture(
        "machine",
        780,
        560,
        "Signals of the user, of each event and of the candidate pass through makers, "
        "which turn each entity into a few soft tokens. The tokens form one stream. "
        "A backbone of four layers reads the stream: two full layers below, two sliding "
        "layers above, which compute fewer and fewer positions. Heads read the last "
        "position.",
    )
    first, pitch, size = 112, 40, 34
    names = ["u1", "u2", "sep", "s1", "a1", "s2", "a2", "s3", "a3", "s4", "a4", "sep"]
    names += ["v"]
    roles = {"u": "user", "s": "state", "a": "action", "v": "target"}

    # 1. Row titles.
    for y, title in (
        (58, "signals"),
        (139, "makers"),
        (210, "stream"),
        (330, "backbone"),
        (505, "heads"),
    ):
        picture.text(8, y, title, anchor="start", bold=True, colour="soft")

    # 2. Signals of each entity, and the maker of each token.
    cards = (
        (96, 114, "user", "User", "age, country, plan"),
        (222, 152, "state", "Item and context", "category, title, hour"),
        (384, 152, "action", "Action", "click, seconds watched"),
        (546, 170, "target", "Candidate", "item and context"),
    )
    for x, width, role, title, example in cards:
        colour = ROLE_COLOURS[role]
        picture.box(x, 18, width, 64, stroke=colour)
        picture.text(x + width / 2, 44, title, bold=True, colour=colour)
        picture.text(x + width / 2, 65, example, size=12, colour="soft")
        picture.arrow((x + width / 2, 82), (x + width / 2, 114))
        picture.box(x, 116, width, 34, fill=colour, stroke=colour, opacity=0.14)
        picture.text(x + width / 2, 138, f"{role} maker", size=13, colour=colour)
    picture.text(736, 54, "…", size=20, colour="soft")
    picture.arrow((153, 150), (149, 184))
    picture.arrow((298, 150), (298, 184))
    picture.arrow((460, 150), (460, 184))
    picture.arrow((631, 150), (611, 184))

    # 3. The stream.
    for number, name in enumerate(names):
        role = "sep" if name == "sep" else roles[name[0]]
        x = first + number * pitch
        picture.token(x, 188, name, ROLE_COLOURS[role], size=size)
    end = first + len(names) * pitch - (pitch - size)
    picture.text(end + 14, 210, "oldest to newest", anchor="start", size=12.5)

    # 4. Layers: each bar spans the positions that the layer computes.
    layers = (
        (13, "full causal attention", "blue"),
        (8, "full causal attention", "blue"),
        (3, "window of 6", "sky"),
        (1, "window of 3", "sky"),
    )
    for number, (positions, words, colour) in enumerate(layers):
        y = 244 + number * 54
        width = positions * pitch - (pitch - size)
        picture.box(end - width, y, width, 34, fill=colour, stroke=colour, opacity=0.22)
        if positions > 3:
            picture.text(end - width / 2, y + 22, f"layer {number}: {words}", size=13)
        else:
            picture.text(
                end - width - 10,
                y + 22,
                f"layer {number}: {words}",
                size=13,
                anchor="end",
            )
        if number + 1 < len(layers):
            below = layers[number + 1][0] * pitch - (pitch - size)
            picture.polygon(
                (
                    (end - width, y + 34),
                    (end, y + 34),
                    (end, y + 54),
                    (end - below, y + 54),
                ),
                fill=colour,
            )
    picture.lines(
        end + 14,
        300,
        ("upper layers compute", "only positions that", "the read-out can see"),
        size=12.5,
        anchor="start",
    )

    # 5. Heads.
    picture.arrow((end - size / 2, 440), (end - size / 2, 478))
    for x, width, words in (
        (172, 138, "next item"),
        (322, 138, "semantic id"),
        (472, 138, "click, long view, …"),
    ):
        fill = "pink" if "click" in words else "card"
        picture.box(
            x,
            482,
            width,
            36,
            fill=fill,
            stroke="pink" if fill == "pink" else "line",
            opacity=0.16 if fill == "pink" else 1,
        )
        picture.text(x + width / 2, 505, words, size=13)
    picture.text(541, 540, "ranking", size=12.5, colour="soft")
    picture.text(
        316, 540, "retrieval over the whole catalogue", size=12.5, colour="soft"
    )
    return picture

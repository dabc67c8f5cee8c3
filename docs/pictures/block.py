"""The block: attention masks by layer, and the gate."""

from __future__ import annotations

from docs.pictures.attention import sees, toy_stream
from docs.pictures.svg import ROLE_COLOURS, Picture


def windows() -> Picture:
    """What each layer of a small 2F2S model lets a position see."""
    stream = toy_stream()
    count, cell, gap = len(stream.roles), 11, 36
    side = count * cell
    picture = Picture(
        "windows",
        4 * side + 3 * gap + 76,
        side + 92,
        "Four attention masks. Layers 0 and 1 are lower triangles: every position sees "
        "all earlier ones. Layer 2 is a band of six positions and layer 3 a band of "
        "three; in both, events and the target no longer see the static tokens.",
    )
    top = 44
    for number, (window, title) in enumerate(
        ((None, "full"), (None, "full"), (6, "window 6"), (3, "window 3"))
    ):
        left = 64 + number * (side + gap)
        picture.text(
            left + side / 2, 18, f"layer {number}: {title}", size=13.5, bold=True
        )
        picture.box(left, top, side, side, radius=0, fill="none")
        for query in range(count):
            for key in range(count):
                if sees(stream, query, key, window):
                    colour = ROLE_COLOURS[stream.roles[key]]
                    picture.box(
                        left + key * cell + 0.5,
                        top + query * cell + 0.5,
                        cell - 1,
                        cell - 1,
                        fill=colour,
                        stroke="none",
                        radius=1.5,
                        opacity=0.75,
                    )
        # Roles of the keys stand above the matrix as a strip of colours.
        for key in range(count):
            picture.box(
                left + key * cell + 0.5,
                top - 12,
                cell - 1,
                7,
                fill=ROLE_COLOURS[stream.roles[key]],
                stroke="none",
                radius=1.5,
            )
        if not number:
            for query in range(count):
                picture.box(
                    left - 12,
                    top + query * cell + 0.5,
                    7,
                    cell - 1,
                    fill=ROLE_COLOURS[stream.roles[query]],
                    stroke="none",
                    radius=1.5,
                )
    picture.text(64 + side / 2, top + side + 20, "key", size=12.5, colour="soft")
    picture.text(8, top + side / 2, "query", size=12.5, colour="soft", anchor="start")
    x = 64
    for role, words in (
        ("user", "static (user)"),
        ("sep", "separator"),
        ("state", "state"),
        ("action", "action"),
        ("target", "target"),
    ):
        picture.box(
            x, top + side + 33, 11, 11, fill=ROLE_COLOURS[role], stroke="none", radius=2
        )
        picture.text(x + 17, top + side + 43, words, size=12.5, anchor="start")
        x += 34 + 7.2 * len(words)
    return picture


def gate() -> Picture:
    """The block: attention whose result a gate of the layer's input scales."""
    picture = Picture(
        "gate",
        780,
        270,
        "The block from left to right. The input X passes through a norm into "
        "attention, giving A. Beside it the same input passes through a linear map and a "
        "sigmoid, giving the gate. Gate times A is added to X. The sum passes through a "
        "norm and a SwiGLU network, whose result is added again.",
    )
    middle = 190
    picture.text(20, middle + 5, "X", size=18, bold=True)
    picture.arrow((32, middle), (398, middle))

    # 1. Attention branch.
    picture.arrow((60, middle), (60, 120), (92, 120))
    picture.box(94, 102, 92, 36)
    picture.text(140, 125, "RMSNorm", size=13.5)
    picture.arrow((186, 120), (212, 120))
    picture.box(214, 102, 122, 36, fill="blue", stroke="blue", opacity=0.2)
    picture.text(275, 125, "attention, W_o", size=13.5, colour="blue")
    picture.arrow((336, 120), (396, 120))
    picture.text(364, 111, "A", size=14, bold=True, colour="blue")
    picture.circle(412, 120, 14, "\N{MULTIPLICATION SIGN}")

    # 2. Gate branch, from the input of the layer.
    picture.arrow((60, 120), (60, 40), (212, 40), colour="amber")
    picture.box(214, 22, 122, 36, fill="amber", stroke="amber", opacity=0.2)
    picture.text(
        275, 45, "\N{GREEK SMALL LETTER SIGMA}(X W_g + b_g)", size=13.5, colour="amber"
    )
    picture.arrow((336, 40), (412, 40), (412, 104), colour="amber")
    picture.text(424, 66, "gate: 0.73 at the start", size=12.5, anchor="start")
    picture.text(
        424, 84, "(W_g = 0, b_g = 1)", size=12.5, anchor="start", colour="soft"
    )

    # 3. Residual sums and the network.
    picture.arrow((412, 134), (412, middle - 15))
    picture.circle(412, middle, 14, "+")
    picture.arrow((426, middle), (708, middle))
    picture.text(450, middle - 9, "I", size=15, bold=True)
    picture.arrow((474, middle), (474, 236), (500, 236))
    picture.box(502, 218, 86, 36)
    picture.text(545, 241, "RMSNorm", size=13.5)
    picture.arrow((588, 236), (612, 236))
    picture.box(614, 218, 80, 36, fill="green", stroke="green", opacity=0.2)
    picture.text(654, 241, "SwiGLU", size=13.5, colour="green")
    picture.arrow((694, 236), (724, 236), (724, middle + 16))
    picture.circle(724, middle, 14, "+")
    picture.arrow((738, middle), (758, middle))
    picture.text(768, middle + 5, "X\N{PRIME}", size=18, bold=True)
    return picture

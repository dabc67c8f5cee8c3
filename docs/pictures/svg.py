"""Shapes of the pictures as SVG text, in the colours of the studies' report.

Every colour is a CSS variable. A picture that stands in an `<img>` follows the colour
scheme of the browser; one that the site puts into its pages follows the site's own
switch (pictures.css).
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Literal

# Ink and grey are those of tokenrec/analysis/figure_style.py, hues those of Okabe and
# Ito, which colour-blind readers tell apart. Dark counterparts are lighter, so that the
# contrast with the page is about the same.
LIGHT = {
    "ink": "#333333",
    "soft": "#5d6670",
    "line": "#9a9a9a",
    "card": "#f5f7f9",
    "page": "#ffffff",
    "blue": "#0072b2",
    "orange": "#d55e00",
    "green": "#009e73",
    "pink": "#b5568f",
    "amber": "#b87a00",
    "sky": "#56b4e9",
}
DARK = {
    "ink": "#e4e6eb",
    "soft": "#aab1bb",
    "line": "#777f8a",
    "card": "#262a35",
    "page": "#1e2129",
    "blue": "#5aaee6",
    "orange": "#f08a45",
    "green": "#3cc79c",
    "pink": "#e29ac6",
    "amber": "#e8b64c",
    "sky": "#8ccdf5",
}
FONT = (
    'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
)
MONO = 'ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace'

# A role has one colour in all pictures.
ROLE_COLOURS = {
    "user": "orange",
    "sep": "soft",
    "state": "blue",
    "action": "green",
    "target": "pink",
}

type Anchor = Literal["start", "middle", "end"]


def variables(colours: dict[str, str]) -> str:
    """Declarations of the colours as CSS variables."""
    return " ".join(f"--{name}: {value};" for name, value in colours.items())


def site_style() -> str:
    """Rules for pictures inside the pages of the site, where its own switch decides."""
    shared = style().splitlines()[-2:]
    return "\n".join(
        [
            f'[data-md-color-scheme="default"] .picture {{ {variables(LIGHT)} }}',
            f'[data-md-color-scheme="slate"] .picture {{ {variables(DARK)} }}',
            f".picture {{ font-family: {FONT}; }}",
            *shared,
            "",
        ]
    )


def style() -> str:
    """The style sheet that every picture carries."""
    return (
        f".picture {{ {variables(LIGHT)} font-family: {FONT}; }}\n"
        "@media (prefers-color-scheme: dark) { "
        f".picture {{ {variables(DARK)} }} }}\n"
        f".picture .code {{ font-family: {MONO}; }}\n"
        ".picture .bold { font-weight: 650; }"
    )


class Picture:
    """A canvas that collects shapes and writes them as one SVG document.

    Args:
      name: file name without its ending; also the prefix of ids.
      width: width of the canvas in pixels.
      height: height of the canvas in pixels.
      label: description for readers who do not see the picture.
    """

    def __init__(self, name: str, width: int, height: int, label: str) -> None:
        self.name, self.width, self.height, self.label = name, width, height, label
        self._shapes: list[str] = []

    def text(
        self,
        x: float,
        y: float,
        words: str,
        *,
        size: float = 14,
        colour: str = "ink",
        anchor: Anchor = "middle",
        bold: bool = False,
        code: bool = False,
    ) -> None:
        """Write one line of text with its baseline at `y`."""
        classes = " ".join(["code"] * code + ["bold"] * bold)
        marked = f' class="{classes}"' if classes else ""
        self._shapes.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" text-anchor="{anchor}" '
            f'fill="var(--{colour})"{marked}>{html.escape(words, quote=False)}</text>'
        )

    def lines(
        self, x: float, y: float, words: Iterable[str], *, step: float = 17, **options
    ) -> None:
        """Write several lines of text, `step` pixels apart."""
        for number, line in enumerate(words):
            self.text(x, y + number * step, line, **options)

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        *,
        fill: str = "card",
        stroke: str = "line",
        radius: float = 6,
        opacity: float = 1,
        dashed: bool = False,
    ) -> None:
        """Draw a rectangle; `fill` and `stroke` name colours, or are "none"."""
        paint = fill if fill == "none" else f"var(--{fill})"
        edge = stroke if stroke == "none" else f"var(--{stroke})"
        self._shapes.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" '
            f'rx="{radius:g}" fill="{paint}" stroke="{edge}"'
            + (f' fill-opacity="{opacity:g}"' if opacity != 1 else "")
            + (' stroke-dasharray="4 3"' if dashed else "")
            + "/>"
        )

    def token(
        self, x: float, y: float, words: str, colour: str, *, size: float = 30
    ) -> None:
        """Draw a token of a stream: a filled square with a short name."""
        self.box(x, y, size, size, fill=colour, stroke=colour, radius=4, opacity=0.2)
        self.text(x + size / 2, y + size / 2 + 4.5, words, size=12.5, colour=colour)

    def arrow(
        self,
        *points: tuple[float, float],
        colour: str = "soft",
        dashed: bool = False,
        head: bool = True,
    ) -> None:
        """Draw a line through `points`, with a head at the last one."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        self._shapes.append(
            f'<path d="{path}" fill="none" stroke="var(--{colour})" stroke-width="1.5"'
            + (' stroke-dasharray="4 3"' if dashed else "")
            + "/>"
        )
        if not head:
            return
        (x0, y0), (x, y) = points[-2:]
        length = max(((x - x0) ** 2 + (y - y0) ** 2) ** 0.5, 1e-9)
        along = ((x - x0) / length, (y - y0) / length)
        left = (x - 8 * along[0] - 4 * along[1], y - 8 * along[1] + 4 * along[0])
        right = (x - 8 * along[0] + 4 * along[1], y - 8 * along[1] - 4 * along[0])
        self._shapes.append(
            f'<path d="M{x:g} {y:g} L{left[0]:.1f} {left[1]:.1f} '
            f'L{right[0]:.1f} {right[1]:.1f} Z" fill="var(--{colour})"/>'
        )

    def polygon(
        self, points: Iterable[tuple[float, float]], *, fill: str, opacity: float = 0.12
    ) -> None:
        """Draw a filled polygon without an edge."""
        corners = " ".join(f"{x:g},{y:g}" for x, y in points)
        self._shapes.append(
            f'<polygon points="{corners}" fill="var(--{fill})" '
            f'fill-opacity="{opacity:g}"/>'
        )

    def circle(self, x: float, y: float, radius: float, words: str) -> None:
        """Draw a circle that holds one sign, such as a plus."""
        self._shapes.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="var(--page)" '
            f'stroke="var(--ink)" stroke-width="1.5"/>'
        )
        self.text(x, y + 5.5, words, size=16)

    def document(self) -> str:
        """The picture as an SVG file."""
        label = html.escape(self.label)
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="picture" role="img" '
                f'aria-label="{label}" viewBox="0 0 {self.width} {self.height}" '
                f'width="{self.width}" height="{self.height}">',
                f"<style>\n{style()}\n</style>",
                *self._shapes,
                "</svg>",
                "",
            ]
        )

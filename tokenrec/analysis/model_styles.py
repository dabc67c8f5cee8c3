"""A style for each model: colour, marker and line, the same in all figures and tables.

Models are told apart by colour first, then by line and marker:

    line figures     colour x line: 28 models
    scatter figures  colour x marker (filled or hollow): 49 models

The page has a light and a dark theme. It refers to a colour by a CSS variable
(`--series-1`), whose two values `colour_variables` writes; files of figures have the
light colours.
"""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import Any, NamedTuple

# Light and dark value of each colour. The light ones are the palette of Okabe and Ito
# (2008), which colour-blind readers can tell apart, without its yellow, which is too
# faint on white. The dark ones are the same hues, bright enough for a dark page.
COLOURS = (
    ("#0072B2", "#4A9FE0"),
    ("#D55E00", "#F5812A"),
    ("#009E73", "#2CC798"),
    ("#CC79A7", "#E59AC6"),
    ("#E69F00", "#F2BC40"),
    ("#56B4E9", "#A5DCFA"),
    ("#4D4D4D", "#C2C7CC"),
)
# Markers as matplotlib names them, and as SVG paths around (0, 0), 4 units in radius.
_MARKERS = {
    "o": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "s": "M-3.6-3.6h7.2v7.2h-7.2z",
    "^": "M0-4.4L4.2 3.6h-8.4z",
    "D": "M0-4.8L4.8 0L0 4.8L-4.8 0z",
    "v": "M0 4.4L4.2-3.6h-8.4z",
    "P": "M-1.6-4.4h3.2v2.8h2.8v3.2h-2.8v2.8h-3.2v-2.8h-2.8v-3.2h2.8z",
    "X": "M-4.4-2.6L-2.6-4.4L0-1.8L2.6-4.4L4.4-2.6L1.8 0L4.4 2.6L2.6 4.4L0 1.8"
    "L-2.6 4.4L-4.4 2.6L-1.8 0z",
}
# Dash patterns in line widths, on and off in turn; empty for a solid line.
_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1), (4, 1.2, 1, 1.2))


class ModelStyle(NamedTuple):
    """Style of a model in figures and tables.

    Attributes:
      series: number of the colour, from 0.
      marker: matplotlib's name of the marker.
      dashes: dash pattern of the line in line widths; empty for a solid line.
      filled: whether markers are filled with the colour; hollow otherwise.
    """

    series: int
    marker: str
    dashes: tuple[float, ...]
    filled: bool

    @property
    def colour(self) -> str:
        """The light value of the colour, `#rrggbb`."""
        return COLOURS[self.series][0]

    def line_arguments(self, paper: str) -> dict[str, Any]:
        """Arguments of `Axes.plot`; `paper` is the colour inside hollow markers."""
        return {
            "color": self.colour,
            "linestyle": (0, self.dashes) if self.dashes else "-",
            "marker": self.marker,
            "markerfacecolor": self.colour if self.filled else paper,
        }


def assign_styles(models: Iterable[str]) -> dict[str, ModelStyle]:
    """Assign a style to each model, in order of first appearance.

    The first seven models differ in colour and marker. Each further round of seven has
    the same colours with another line; its markers are shifted by two colours, and are
    hollow and filled in turn.
    """
    markers = list(_MARKERS)
    styles = {}
    for number, model in enumerate(dict.fromkeys(models)):
        turn, series = divmod(number, len(COLOURS))
        # A shift of two never repeats a pair of colour and marker within seven rounds.
        marker = markers[(series + 2 * turn) % len(markers)]
        dashes = _DASHES[turn % len(_DASHES)]
        styles[model] = ModelStyle(series, marker, dashes, filled=turn % 2 == 0)
    return styles


def legend_key(style: ModelStyle) -> str:
    """Draw line and marker of a model as an inline SVG, for a row of a table."""
    colour = f"var(--series-{style.series + 1})"
    fill = colour if style.filled else "var(--page)"
    dashes = " ".join(f"{2 * length:g}" for length in style.dashes)
    pattern = f' stroke-dasharray="{dashes}"' if dashes else ""
    return (
        '<svg class="key" viewBox="-14 -6 28 12" aria-hidden="true">'
        f'<path d="M-14 0H14" style="stroke: {colour}"{pattern}/>'
        f'<path d="{escape(_MARKERS[style.marker])}" '
        f'style="stroke: {colour}; fill: {fill}"/></svg>'
    )


def colour_variables(theme: int) -> str:
    """CSS declarations of the series colours; theme 0 is light, 1 is dark."""
    return " ".join(
        f"--series-{number}: {values[theme]};"
        for number, values in enumerate(COLOURS, start=1)
    )

"""Save figures as PNG files and as SVG elements, which follow the theme of the page."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING

from tokenrec.analysis.figure_style import GRID, INK, PALE, PAPER
from tokenrec.analysis.model_styles import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PNG_DPI = 160
# Colours of figures that follow the theme, as variables of the page's style sheet.
_THEME = {
    INK: "--figure-ink",
    PALE: "--figure-pale",
    GRID: "--figure-grid",
    PAPER: "--page",
} | {light: f"--series-{n}" for n, (light, _) in enumerate(COLOURS, start=1)}


def lay_out(figure: Figure) -> None:
    """Compute the layout once and keep it: it takes most of the time of each file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def to_png(figure: Figure) -> bytes:
    """Save a figure as PNG, in the light theme."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """Save a figure as an element of an HTML page.

    Args:
      figure: the figure.
      name: prefix of its ids, which are unique in the page then.
      label: text for a screen reader.
    """
    buffer = io.BytesIO()
    figure.savefig(
        buffer,
        format="svg",
        # The shade of a scrolling figure is behind it.
        facecolor="none",
        metadata={"Date": None, "Creator": None},
    )
    text = buffer.getvalue().decode()
    # Without the XML declaration and the document type, which HTML does not allow here.
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # HTML knows the namespaces; a page without addresses visibly needs no network.
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    # Ids of all figures share one page.
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    # Colours are written as `fill: #333333` and `stroke: #333333` in style attributes.
    for colour, variable in _THEME.items():
        text = text.replace(f": {colour.lower()}", f": var({variable})")
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)

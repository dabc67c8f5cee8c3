"""How figures look: a style per model, panels and their legend, and a figure as SVG for a page or as PNG.

matplotlib is optional (extra `report`) and loaded when a figure is drawn.
"""

from __future__ import annotations

import contextlib
import html
import importlib.util
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenrec.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, PALE = "#333333", "#9a9a9a"

# Okabe and Ito's colours, which colour-blind readers tell apart, without the yellow, which is faint on white.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#4D4D4D")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)))

_WIDTH = 9.0  # inches of every figure, so that print is of one size in all
_PNG_DPI = 160
_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": PALE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.w_pad": 0.1,
    "font.size": 9.5,
    "grid.color": "#e6e6e6",
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text, which can be searched and read aloud
    "svg.hashsalt": "tokenrec",  # ids by content, so that equal results make an equal page
    "text.color": INK,
    "text.parse_math": False,  # names may hold a $
    "xtick.color": INK,
    "ytick.color": INK,
}


class Style(NamedTuple):
    """Of a model, in every figure. `filled` is its markers'; `line` is what matplotlib takes as a line style."""

    colour: str
    marker: str
    line: Any
    filled: bool

    def of_line(self) -> dict[str, Any]:
        """Arguments of `Axes.plot`."""
        face = self.colour if self.filled else "white"
        return {
            "color": self.colour,
            "linestyle": self.line,
            "marker": self.marker,
            "markerfacecolor": face,
        }


def assign_styles(models: Iterable[str]) -> dict[str, Style]:
    """A style for each model; past seven colours, lines are broken and markers hollow."""
    count = len(_COLOURS)
    return {
        model: Style(
            _COLOURS[n % count],
            _MARKERS[n % count],
            _LINES[n // count % len(_LINES)],
            n < count,
        )
        for n, model in enumerate(dict.fromkeys(models))
    }


def require_matplotlib() -> None:
    """Raises an InputError where it is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "figures need matplotlib, which is not installed; pip install 'tokenrec[report]'"
        )


@contextlib.contextmanager
def figure_defaults() -> Iterator[None]:
    """Draw and save figures in it.

    Raises:
      InputError: matplotlib is not installed.
    """
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def make_panels(
    titles: Iterable[str],
    height: float,
    *,
    across: int = 3,
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A panel of `height` inches for each title, at most `across` in a row and about as many in each."""
    from matplotlib.figure import Figure  # no pyplot: it holds every figure in a global

    names = list(titles)
    down = -(-len(names) // across)
    across = -(-len(names) // down)
    figure = Figure(figsize=(_WIDTH, height * down), layout="constrained")
    axes = list(
        figure.subplots(
            down, across, squeeze=False, sharex=sharex, sharey=sharey
        ).ravel()
    )
    for ax in axes[len(names) :]:
        ax.remove()
    for ax, name in zip(axes, names, strict=False):
        ax.set_title(name)
        ax.tick_params(
            labelbottom=True
        )  # also where a shared axis has no panel below it
    return figure, axes[: len(names)]


def add_legend(
    figure: Figure, styles: Mapping[str, Style], models: Iterable[str]
) -> None:
    """One legend for all panels, below them."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], label=model, markersize=5, **styles[model].of_line())
        for model in models
    ]
    figure.legend(
        handles=keys,
        loc="outside lower center",
        ncols=min(5, len(keys)),
        handlelength=3.2,
    )


def lay_out(figure: Figure) -> None:
    """Places everything once, which takes most of the time of drawing, and not again for each file."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")


def to_png(figure: Figure) -> bytes:
    """The figure as a file of its own."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, name: str, label: str) -> str:
    """The figure as an element of an HTML page; `name` keeps its ids apart, `label` is what a screen reader says."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r' xmlns(:\w+)?="[^"]*"', "", text
    )  # HTML knows them, and a page without addresses is seen to be one
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1)

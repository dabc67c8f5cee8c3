"""Build figures in one style: settings, panels, legend, bands of deviation.

matplotlib is optional (extra `report`) and is imported when a figure is drawn. It is
never imported through pyplot, which keeps every figure in a global list.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from tokenrec.analysis.model_styles import ModelStyle
from tokenrec.analysis.study_metrics import Spread
from tokenrec.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours that follow the theme of the page (`figure_files.py`).
INK = "#333333"
PALE = "#9a9a9a"
GRID = "#e6e6e6"
PAPER = "#ffffff"

# Width of every figure in inches, so that text has one size in all of them.
_WIDTH = 9.0
_SETTINGS: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": PALE,
    "axes.facecolor": PAPER,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "figure.constrained_layout.w_pad": 0.1,
    "figure.facecolor": PAPER,
    "font.size": 9.5,
    "grid.color": GRID,
    "legend.frameon": False,
    # Text stays text, which can be searched and read aloud.
    "svg.fonttype": "none",
    # Ids depend on content alone, so that equal results make an equal page.
    "svg.hashsalt": "tokenrec",
    "text.color": INK,
    # Names of models and tasks may contain a $.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}

type Styles = Mapping[str, ModelStyle]


class ReportFigure(NamedTuple):
    """A figure of the report.

    Attributes:
      name: name of its file, after that of the study.
      title: its title.
      note: what a reader must know to read it.
      figure: the figure.
    """

    name: str
    title: str
    note: str
    figure: Figure


def require_matplotlib() -> None:
    """Raise an InputError if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "figures need matplotlib, which is not installed; run "
            '`pip install ".[report]"` in the clone of tokenrec'
        )


@contextlib.contextmanager
def figure_defaults() -> Iterator[None]:
    """Set the style of the figures that are drawn and saved within.

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
    """Make a figure with one panel for each title.

    Args:
      titles: titles of the panels.
      height: height of a panel in inches.
      across: panels in a row at most; rows are about equally full.
      sharex: whether all panels have one x axis.
      sharey: whether all panels have one y axis.

    Returns:
      The figure and its panels, in the order of the titles.
    """
    from matplotlib.figure import Figure

    names = list(titles)
    down = -(-len(names) // across)
    across = -(-len(names) // down)
    figure = Figure(figsize=(_WIDTH, height * down), layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharex=sharex, sharey=sharey)
    panels = list(grid.ravel())
    for ax in panels[len(names) :]:
        ax.remove()
    for ax, name in zip(panels, names, strict=False):
        ax.set_title(name)
        # Also where a shared axis has no panel below it.
        ax.tick_params(labelbottom=True)
    return figure, panels[: len(names)]


def add_legend(figure: Figure, styles: Styles, models: Iterable[str]) -> None:
    """Add one legend for all panels, below them.

    Args:
      figure: the figure.
      styles: style of each model.
      models: the models that it shows, in order.
    """
    from matplotlib.lines import Line2D

    entries = [
        Line2D([], [], label=model, markersize=5, **styles[model].line_arguments(PAPER))
        for model in models
    ]
    figure.legend(
        handles=entries,
        loc="outside lower center",
        ncols=min(5, len(entries)),
        handlelength=3.2,
    )


def draw_band(ax: Axes, line: Mapping[int, Spread], style: ModelStyle) -> None:
    """Draw means as a line, with a band of one deviation to either side.

    Args:
      ax: the panel.
      line: x -> mean and deviation.
      style: style of the model.
    """
    x = np.array(list(line))
    mean = np.array([np.nan if s.mean is None else s.mean for s in line.values()])
    deviation = np.array(
        [np.nan if s.deviation is None else s.deviation for s in line.values()]
    )
    # Markers of many points would cover the line.
    marker = {"marker": ""} if len(x) > 20 else {"markersize": 4}
    ax.plot(x, mean, linewidth=1.5, **(style.line_arguments(PAPER) | marker))
    ax.fill_between(
        x,
        mean - deviation,
        mean + deviation,
        color=style.colour,
        alpha=0.12,
        linewidth=0,
    )


def in_order[Value](
    values: Mapping[str, Value], models: Iterable[str]
) -> list[tuple[str, Value]]:
    """List the entries of `values` in the order of `models`."""
    return [(model, values[model]) for model in models if model in values]

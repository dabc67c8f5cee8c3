"""Figures of attention: maps of every layer, and the mass on parts of the stream.

The tables behind them come from `benchmarks/study_states.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenrec.analysis.figure_style import ReportFigure, in_order, make_panels
from tokenrec.analysis.study_rows import AttentionShare, MapCell
from tokenrec.analysis.summary import StudySummary
from tokenrec.analysis.wording import layer_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# The least share of attention that a map distinguishes from none.
LEAST_SHARE = 1e-3
# Heat maps look the same in both themes of the page: these two colours, unlike INK and
# PAPER of `figure_style.py`, are not replaced by variables.
_HEAT_DARK = "#222222"
_HEAT_LIGHT = "#fefefe"


def draw_maps(cells: Sequence[MapCell], summary: StudySummary) -> ReportFigure:
    """Draw attention maps: a row of panels for each model, a panel for each layer."""
    by_model: dict[str, dict[int, list[MapCell]]] = {}
    for cell in cells:
        by_model.setdefault(cell.model, {}).setdefault(cell.layer, []).append(cell)
    depth = max(len(by_layer) for by_layer in by_model.values())
    panels = [
        (model, layer, by_layer.get(layer, []))
        for model, by_layer in in_order(by_model, summary.models)
        for layer in range(depth)
    ]
    titles = [f"{model}, {layer_name(layer)}" for model, layer, _ in panels]
    figure, axes = make_panels(titles, 1.9, across=depth)
    for ax, title, (model, layer, of_panel) in zip(axes, titles, panels, strict=True):
        if of_panel:
            _draw_map(ax, of_panel, f"{model}-{layer}")
            ax.set_title(title, fontsize=7)
        else:
            # The model has fewer layers than another one.
            ax.remove()
    axes[0].set_ylabel("query (position)", fontsize=7)
    axes[0].set_xlabel("key (position)", fontsize=7)
    note = (
        "Mean over heads and streams; positions of the stream in blocks, named by "
        "their first. The darkest blue is a share of 1, the palest one of "
        f"{LEAST_SHARE:g} or less, on a logarithmic scale. White is nothing: later "
        "positions, positions outside a window, and padding."
    )
    return ReportFigure("maps", "Attention maps", note, figure)


def _draw_map(ax: Axes, cells: Sequence[MapCell], gid: str) -> None:
    """Draw the map of one layer.

    Args:
      ax: the panel.
      cells: cells of the map.
      gid: id of the image. Equal images would otherwise share an id, and a page may
        hold each id once.
    """
    from matplotlib.colors import LogNorm

    queries = sorted({cell.query for cell in cells})
    keys = sorted({cell.key for cell in cells})
    shares = np.zeros((len(queries), len(keys)))
    for cell in cells:
        shares[queries.index(cell.query), keys.index(cell.key)] = cell.value
    # The colour map has no place for 0 on its logarithmic scale.
    masked = np.ma.masked_less_equal(shares, 0.0)
    norm = LogNorm(LEAST_SHARE, 1.0, clip=True)
    image = ax.imshow(
        masked, cmap="Blues", norm=norm, interpolation="nearest", aspect="auto"
    )
    image.set_gid(gid)
    ax.set_facecolor(_HEAT_LIGHT)
    for axis, blocks in ((ax.xaxis, keys), (ax.yaxis, queries)):
        ticks = np.linspace(0, len(blocks) - 1, min(4, len(blocks))).astype(int)
        axis.set_ticks(ticks, labels=[str(blocks[tick]) for tick in ticks])
    ax.tick_params(labelsize=6, length=2)
    ax.grid(visible=False)


def draw_attention(
    rows: Sequence[AttentionShare], summary: StudySummary
) -> ReportFigure:
    """Draw the attention mass, mean over heads: a heat map of layers by parts."""
    sources = list(dict.fromkeys(row.source for row in rows))
    # Model -> layer -> part of the stream -> values of the heads.
    values: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in rows:
        by_source = values.setdefault(row.model, {}).setdefault(row.layer, {})
        by_source.setdefault(row.source, []).append(row.value)
    tables = {
        model: np.array(
            [
                [np.mean(by_layer[layer].get(source, [0.0])) for source in sources]
                for layer in sorted(by_layer)
            ]
        )
        for model, by_layer in in_order(values, summary.models)
    }
    depth = max(len(table) for table in tables.values())
    largest = max(float(table.max()) for table in tables.values())
    figure, axes = make_panels(tables, 1.2 + 0.25 * depth, across=2)
    for ax, (model, table) in zip(axes, tables.items(), strict=True):
        _draw_mass(ax, table, largest)
        centres = np.arange(len(sources)) + 0.5
        ax.set_xticks(
            centres, labels=sources, rotation=40, ha="right", rotation_mode="anchor"
        )
        layers = [str(layer) for layer in sorted(values[model])]
        ax.set_yticks(np.arange(len(table)) + 0.5, labels=layers)
        ax.set_ylabel("layer")
    note = "Share of attention that goes to each part of the stream, mean over heads."
    return ReportFigure("attention", "Attention mass", note, figure)


def _draw_mass(ax: Axes, table: np.ndarray, largest: float) -> None:
    """Draw a heat map with its numbers.

    Args:
      ax: the panel.
      table: `[layers, parts]`, shares of attention.
      largest: largest share of all models, the end of the colour scale.
    """
    ax.pcolormesh(
        table,
        cmap="Blues",
        vmin=0,
        # The darkest tenth of the colour map would hide the numbers.
        vmax=1.1 * largest,
        edgecolors=_HEAT_LIGHT,
        linewidth=0.5,
    )
    for (row, column), value in np.ndenumerate(table):
        is_dark = value > 0.6 * largest
        ax.text(
            column + 0.5,
            row + 0.5,
            f"{value:.2f}",
            ha="center",
            va="center",
            color=_HEAT_LIGHT if is_dark else _HEAT_DARK,
            fontsize=6.5,
        )
    ax.invert_yaxis()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.grid(visible=False)

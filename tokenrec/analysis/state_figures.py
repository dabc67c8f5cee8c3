"""Figures of trained models from the inside: ranks, spectra, information, attention.

The tables behind them come from `benchmarks/study_states.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenrec.analysis.figure_style import (
    ReportFigure,
    Styles,
    add_legend,
    draw_band,
    in_order,
    make_panels,
)
from tokenrec.analysis.study_metrics import Spread, spread
from tokenrec.analysis.study_rows import (
    AttentionShare,
    EffectiveRank,
    LabelInformation,
    MapCell,
    SingularValue,
)
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


def last_ranks(ranks: Iterable[EffectiveRank]) -> dict[str, dict[int, Spread]]:
    """Effective rank at the last step of each run: model -> layer -> mean over seeds."""
    last: dict[tuple[str, int, int], EffectiveRank] = {}
    for row in ranks:
        key = (row.model, row.layer, row.seed)
        if key not in last or row.step > last[key].step:
            last[key] = row
    values: dict[str, dict[int, list[float | None]]] = {}
    for (model, layer, _), row in sorted(last.items()):
        values.setdefault(model, {}).setdefault(layer, []).append(row.effective_rank)
    return {
        model: {layer: spread(of_layer) for layer, of_layer in by_layer.items()}
        for model, by_layer in values.items()
    }


def draw_ranks(
    ranks: Sequence[EffectiveRank], summary: StudySummary, styles: Styles
) -> ReportFigure:
    """Draw effective ranks by layer, and that of the top layer during training.

    Args:
      ranks: ranks of all runs, at one step or several.
      summary: summary of the study.
      styles: style of each model.
    """
    by_layer = last_ranks(ranks)
    by_step: dict[str, dict[int, list[float | None]]] = {}
    for row in ranks:
        if row.layer == max(by_layer[row.model]):
            of_model = by_step.setdefault(row.model, {})
            of_model.setdefault(row.step, []).append(row.effective_rank)
    has_steps = any(len(of_model) > 1 for of_model in by_step.values())
    titles = ["by layer, at the last step"]
    if has_steps:
        titles.append("top layer, during training")
    figure, axes = make_panels(titles, 3.4, sharey=True)
    models = in_order(by_layer, summary.models)
    for model, line in models:
        draw_band(axes[0], line, styles[model])
    axes[0].set(xlabel="layer", ylabel="effective rank")
    layers = sorted({layer for line in by_layer.values() for layer in line})
    labels = [layer_name(layer).removeprefix("layer ") for layer in layers]
    axes[0].set_xticks(layers, labels=labels)
    if has_steps:
        for model, of_model in in_order(by_step, summary.models):
            line = {step: spread(values) for step, values in sorted(of_model.items())}
            draw_band(axes[1], line, styles[model])
        axes[1].set(xlabel="step")
        axes[1].locator_params(axis="x", nbins=5)
    add_legend(figure, styles, (model for model, _ in models))
    note = (
        "Of the centred event states; mean over seeds, the band is one deviation to "
        "either side."
    )
    return ReportFigure("ranks", "Effective rank of the event states", note, figure)


def draw_spectra(
    values: Sequence[SingularValue], summary: StudySummary, styles: Styles
) -> ReportFigure:
    """Draw the singular values over the largest: a panel for each layer.

    Args:
      values: singular values of all runs.
      summary: summary of the study.
      styles: style of each model.
    """
    # Layer -> model -> seed -> index -> value.
    spectra: dict[int, dict[str, dict[int, dict[int, float]]]] = {}
    for row in values:
        by_seed = spectra.setdefault(row.layer, {}).setdefault(row.model, {})
        by_seed.setdefault(row.seed, {})[row.index] = row.singular_value
    layers = sorted(spectra)
    figure, axes = make_panels(map(layer_name, layers), 2.8, sharex=True, sharey=True)
    for ax, layer in zip(axes, layers, strict=True):
        for model, by_seed in in_order(spectra[layer], summary.models):
            shared = sorted(set.intersection(*map(set, by_seed.values())))
            sigma = np.array(
                [[of_seed[index] for index in shared] for of_seed in by_seed.values()]
            )
            # A singular value of 0 becomes a mean of 0, outside of a logarithmic axis.
            with np.errstate(divide="ignore"):
                ratios = np.log(sigma / sigma.max(axis=1, keepdims=True))
                line = np.exp(ratios.mean(axis=0))
            style = styles[model].line_arguments("none") | {"marker": ""}
            ax.plot(np.array(shared) + 1, line, linewidth=1.4, **style)
        ax.set(yscale="log", xlabel="index")
        ax.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes[0].set_ylabel("singular value / largest")
    models = dict.fromkeys(
        model
        for by_model in spectra.values()
        for model, _ in in_order(by_model, summary.models)
    )
    add_legend(figure, styles, models)
    note = (
        "Of the centred event states, geometric mean over seeds. A steep fall is a "
        "collapse onto few directions."
    )
    return ReportFigure("spectra", "Spectra of the event states", note, figure)


def draw_information(
    rows: Sequence[LabelInformation], summary: StudySummary, styles: Styles
) -> ReportFigure:
    """Draw the information of the top layer by number of clusters: a panel per task.

    Args:
      rows: information of all runs and layers.
      summary: summary of the study.
      styles: style of each model.
    """
    top: dict[str, int] = {}
    for row in rows:
        top[row.model] = max(row.layer, top.get(row.model, row.layer))
    # Task -> model -> number of clusters -> values of the seeds.
    values: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for row in rows:
        if row.layer == top[row.model]:
            by_count = values.setdefault(row.task, {}).setdefault(row.model, {})
            by_count.setdefault(row.clusters, []).append(row.nats)
    figure, axes = make_panels(values, 3.0, sharey=True)
    for ax, by_model in zip(axes, values.values(), strict=True):
        for model, by_count in in_order(by_model, summary.models):
            line = {count: spread(nats) for count, nats in sorted(by_count.items())}
            draw_band(ax, line, styles[model])
        ax.set(xlabel="clusters")
    axes[0].set_ylabel("nats")
    add_legend(figure, styles, (model for model, _ in in_order(top, summary.models)))
    note = (
        "Mutual information of the cluster of a top-layer state with the label, less that "
        "with shuffled labels; mean over seeds, the band is one deviation to either side."
    )
    title = "Information of the event states on the label"
    return ReportFigure("information", title, note, figure)


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
        "Mean over heads and streams; positions of the stream in blocks, named by their "
        "first. The darkest blue is a share of 1, the palest one of "
        f"{LEAST_SHARE:g} or less, on a logarithmic scale. White is nothing: later "
        "positions, positions outside a window, and padding."
    )
    return ReportFigure("maps", "Attention maps", note, figure)


def _draw_map(ax: Axes, cells: Sequence[MapCell], gid: str) -> None:
    """Draw the map of one layer.

    Args:
      ax: the panel.
      cells: cells of the map.
      gid: id of the image. Equal images would otherwise share an id, and a page may hold
        each id once.
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

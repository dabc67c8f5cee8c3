"""Figures of the event states of trained models: ranks, spectra, information.

The tables behind them come from `benchmarks/study_states.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
    EffectiveRank,
    LabelInformation,
    SingularValue,
)
from tokenrec.analysis.summary import StudySummary
from tokenrec.analysis.wording import layer_name


def last_ranks(ranks: Iterable[EffectiveRank]) -> dict[str, dict[int, Spread]]:
    """Effective rank at the last step: model -> layer -> mean over seeds."""
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
        "Mutual information of the cluster of a top-layer state with the label, less "
        "that with shuffled labels; mean over seeds, the band is one deviation to "
        "either side."
    )
    title = "Information of the event states on the label"
    return ReportFigure("information", title, note, figure)

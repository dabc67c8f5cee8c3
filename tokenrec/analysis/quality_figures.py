"""Figures of quality: differences to the reference, learning curves, quality and FLOPs.

A function returns None if there is nothing to show.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from tokenrec.analysis.figure_style import (
    INK,
    PALE,
    PAPER,
    ReportFigure,
    Styles,
    add_legend,
    draw_band,
    in_order,
    make_panels,
)
from tokenrec.analysis.study_metrics import MetricKey, higher_is_better, spread
from tokenrec.analysis.study_rows import (
    MACRO,
    CurvePoint,
    Difference,
    ReliabilityBin,
)
from tokenrec.analysis.summary import StudySummary, verdict
from tokenrec.analysis.wording import metric_name, si_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Logged values that are shown, where a run has them.
_CURVES = ("train/loss", f"valid/{MACRO}_auc", "valid/ndcg@10")
_RANK = "rank/layer_"
# Labels of an axis of FLOPs that fit into a panel side by side.
_MOST_TICKS = 4


def draw_differences(summary: StudySummary, styles: Styles) -> ReportFigure | None:
    """Draw differences to the reference: a panel per claimed task, a line per model."""
    keys = [
        MetricKey(summary.main_split, task, summary.headline)
        for task in summary.claimed_tasks
    ]
    differences = {
        key: summary.differences[key] for key in keys if summary.differences.get(key)
    }
    models = [
        model
        for model in summary.models
        if any(model in by_model for by_model in differences.values())
    ]
    if not models:
        return None
    titles = (key.task for key in differences)
    figure, axes = make_panels(titles, 0.9 + 0.24 * len(models), sharey=True)
    for ax, by_model in zip(axes, differences.values(), strict=True):
        for y, model in enumerate(models):
            if model in by_model:
                _draw_interval(ax, y, by_model[model], styles[model].colour)
        ax.axvline(0, color=INK, linewidth=0.8)
        # Models from top to bottom, with a margin of half a line.
        ax.set(
            yticks=range(len(models)),
            yticklabels=models,
            ylim=(len(models) - 0.4, -0.6),
        )
        ax.grid(axis="y", visible=False)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(
            f"{metric_name(summary.headline)} minus that of {summary.reference}"
        )
    side = "right" if higher_is_better(summary.headline) else "left"
    note = (
        f"On {summary.main_split}; better is to the {side}. Bars are 95 % intervals of "
        "a paired bootstrap over users. Hollow and grey: the interval contains 0, so "
        "the model is not distinguishable from the reference. Baselines and ensembles are "
        "in the tables."
    )
    title = f"Difference to {summary.reference}"
    return ReportFigure("differences", title, note, figure)


def _draw_interval(ax: Axes, y: int, difference: Difference, colour: str) -> None:
    """Draw a difference with its interval; grey if the interval contains 0."""
    value, low, high = difference.difference, difference.low, difference.high
    if value is None or low is None or high is None:
        return
    is_equal = verdict(difference) == "equal"
    if is_equal:
        colour = PALE
    face = PAPER if is_equal else colour
    ax.plot([low, high], [y, y], color=colour, linewidth=1.6)
    ax.plot(value, y, "o", color=colour, markerfacecolor=face)


def draw_curves(
    points: Sequence[CurvePoint], summary: StudySummary, styles: Styles
) -> ReportFigure | None:
    """Draw learning curves at the chosen rates: mean and deviation over seeds.

    A curve ends where the first seed of its model ends. If runs logged effective ranks,
    that of the top layer is shown too.

    Args:
      points: logged values of all runs.
      summary: summary of the study.
      styles: style of each model.
    """
    # Sorted by number: layer 10 is above layer 9.
    ranks = {point.name for point in points if point.name.startswith(_RANK)}
    top_rank = sorted(ranks, key=lambda name: int(name.removeprefix(_RANK)))[-1:]
    selected = (*_CURVES, *top_rank)
    values: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for point in points:
        is_chosen = point.learning_rate == summary.rates.get(point.model)
        if point.name in selected and is_chosen:
            by_step = values.setdefault(point.name, {}).setdefault(point.model, {})
            by_step.setdefault(point.step, []).append(point.value)
    names = [name for name in selected if name in values]
    if not names:
        return None
    figure, axes = make_panels(names, 3.4)
    for ax, name in zip(axes, names, strict=True):
        for model, by_step in in_order(values[name], summary.models):
            line = {
                step: spread(of_step)
                for step, of_step in sorted(by_step.items())
                # A mean over fewer seeds would jump where a run ends.
                if len(of_step) == len(summary.seeds[model])
            }
            if line:
                draw_band(ax, line, styles[model])
        ax.set(xlabel="step")
        ax.locator_params(axis="x", nbins=5)
    models = [
        model
        for model in summary.models
        if any(model in by_model for by_model in values.values())
    ]
    add_legend(figure, styles, models)
    note = (
        "Mean over seeds at the chosen learning rate; the band is one deviation to "
        "either side."
    )
    return ReportFigure("curves", "Learning curves", note, figure)


def draw_reliability(
    bins: Sequence[ReliabilityBin], summary: StudySummary, styles: Styles
) -> ReportFigure | None:
    """Draw observed against predicted rates: a panel for each claimed task.

    Args:
      bins: calibration of the final runs.
      summary: summary of the study.
      styles: style of each model.
    """
    tasks = [
        task
        for task in summary.claimed_tasks
        if any((row.split, row.task) == (summary.main_split, task) for row in bins)
    ]
    if not tasks:
        return None
    figure, axes = make_panels(tasks, 3.2)
    for ax, task in zip(axes, tasks, strict=True):
        shown = [
            row for row in bins if (row.split, row.task) == (summary.main_split, task)
        ]
        top = max(max(row.predicted, row.observed) for row in shown)
        ax.plot([0, top], [0, top], color=INK, linewidth=0.8)
        for model in summary.models:
            by_bin: dict[int, list[ReliabilityBin]] = {}
            for row in shown:
                if row.model == model:
                    by_bin.setdefault(row.bin, []).append(row)
            # The seeds of a model have the same bins, unless many scores are equal.
            points = [
                (
                    statistics.mean(row.predicted for row in rows),
                    statistics.mean(row.observed for row in rows),
                )
                for _, rows in sorted(by_bin.items())
            ]
            if points:
                style = styles[model].line_arguments(PAPER)
                ax.plot(
                    *zip(*points, strict=True), linewidth=1.2, markersize=3, **style
                )
        ax.set(xlabel="mean predicted probability", ylabel="observed share")
    add_legend(figure, styles, [row for row in summary.models if _in(row, bins)])
    note = (
        f"On {summary.main_split}, mean over seeds. A point is a bin: the log rows in "
        "order of their probability, cut into bins of equal size. On the line, labels "
        "come as often as predicted; below it they are over-predicted."
    )
    return ReportFigure("reliability", "Reliability", note, figure)


def _in(model: str, bins: Sequence[ReliabilityBin]) -> bool:
    return any(row.model == model for row in bins)


def draw_quality(
    flops: Mapping[str, float], summary: StudySummary, styles: Styles
) -> ReportFigure | None:
    """Draw the headline metric against FLOPs: a panel for each claimed task.

    Args:
      flops: model -> FLOPs of a forward pass per example.
      summary: summary of the study.
      styles: style of each model.
    """
    split = summary.main_split
    tasks = list(summary.claimed_tasks)
    if MACRO in summary.tasks[split] and (split, MACRO) not in summary.no_claim:
        tasks.insert(0, MACRO)
    models = [model for model in summary.models if model in flops]
    if not tasks or not models:
        return None
    figure, axes = make_panels(tasks, 3.2, sharex=True)
    for ax, task in zip(axes, tasks, strict=True):
        spreads = summary.spreads[MetricKey(split, task, summary.headline)]
        for model in models:
            of_model = spreads.get(model)
            if of_model is None or of_model.mean is None:
                continue
            # Points are not joined: models have no order.
            style = styles[model].line_arguments(PAPER) | {"linestyle": "none"}
            ax.errorbar(
                flops[model],
                of_model.mean,
                yerr=of_model.deviation or 0,
                capsize=2,
                markersize=6,
                **style,
            )
        ax.set(
            xscale="log",
            xlabel="FLOPs per example",
            ylabel=metric_name(summary.headline),
        )
        ax.minorticks_off()
        ax.locator_params(axis="y", nbins=6)
    # The axes share x: once all points are drawn, its limits are those of every panel.
    ticks = log_ticks(*axes[0].get_xlim())
    for ax in axes:
        ax.set_xticks(ticks, labels=[si_number(tick) for tick in ticks], minor=False)
    add_legend(figure, styles, models)
    missing = [model for model in summary.models if model not in flops]
    note = (
        f"On {split}, mean and deviation over seeds. FLOPs are those of the forward "
        "pass, on a logarithmic axis."
    )
    if missing:
        note += f" Without FLOPs: {', '.join(missing)}."
    return ReportFigure("quality-flops", "Quality against FLOPs", note, figure)


def log_ticks(low: float, high: float) -> list[float]:
    """Choose at most four round positions on a logarithmic axis, evenly spread.

    >>> log_ticks(1e6, 1e9)
    [1000000.0, 10000000.0, 100000000.0, 1000000000.0]
    >>> log_ticks(28e6, 93e6)
    [30000000.0, 40000000.0, 60000000.0, 80000000.0]

    Args:
      low: lower limit of the axis, above 0.
      high: upper limit.
    """
    # 1. Decades, every k-th of them if there are many.
    decades = 10.0 ** np.arange(np.ceil(np.log10(low)), np.floor(np.log10(high)) + 1)
    if len(decades) >= 3:
        return decades[:: -(-len(decades) // _MOST_TICKS)].tolist()

    # 2. Otherwise round numbers, from coarse to fine, until three fit. A number too
    # close to the one before is left out: labels are of about equal width.
    least_gap = np.log(high / low) / (_MOST_TICKS + 0.5)
    scale = 10.0 ** np.floor(np.log10(low))
    ticks: list[float] = []
    for mantissas in (
        np.array([1, 2, 5]),
        np.arange(1, 10),
        np.arange(1, 10, 0.5),
        np.arange(1, 10, 0.1),
    ):
        ticks = []
        for candidate in np.concatenate([scale * mantissas * k for k in (1, 10, 100)]):
            inside = low <= candidate <= high
            if inside and (not ticks or np.log(candidate / ticks[-1]) >= least_gap):
                # Without the rounding error of the product.
                ticks.append(float(f"{candidate:.3g}"))
        if len(ticks) >= 3:
            break
    return ticks

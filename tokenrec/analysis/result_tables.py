"""The tables of the report."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from html import escape

from tokenrec.analysis.html_table import (
    Column,
    HtmlTable,
    difference_markup,
    model_cell,
    number_cell,
    spread_markup,
    table_markup,
)
from tokenrec.analysis.model_styles import ModelStyle
from tokenrec.analysis.rate_search import RateSearch
from tokenrec.analysis.study_files import StudyFiles
from tokenrec.analysis.study_metrics import MetricKey, Spread, higher_is_better
from tokenrec.analysis.study_rows import Difference
from tokenrec.analysis.summary import (
    LEAST_POSITIVES,
    StudySummary,
    Verdict,
    best_model,
    verdict,
)
from tokenrec.analysis.wording import (
    DASH,
    decimal,
    interval_text,
    layer_name,
    metric_name,
    si_number,
)

_VERDICTS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "≈ not distinguishable from 0",
    "unknown": "no interval",
}

type Styles = Mapping[str, ModelStyle]


def models_table(files: StudyFiles, summary: StudySummary, styles: Styles) -> HtmlTable:
    """Make the table of trained models: config fields, rate, seeds, size and speed.

    Args:
      files: tables of the study.
      summary: summary of the study.
      styles: style of each model.
    """
    columns = [
        Column("model", numeric=False),
        Column("config fields that it sets", numeric=False),
        Column("learning rate"),
        Column("seeds"),
        Column("parameters"),
        Column("examples / s"),
    ]
    if files.flops is not None:
        columns.append(Column("FLOPs / example"))
    rows = []
    for model in summary.models:
        fields = ", ".join(
            f"{name} = {value}"
            for name, value in files.info.arms.get(model, {}).items()
        )
        code = f"<code>{escape(fields)}</code>" if fields else "those of the base"
        sizes, speed = _size_and_speed(files, model, summary.rates[model])
        cells = [
            model_cell(model, styles),
            f"<td>{code}</td>",
            number_cell(f"{summary.rates[model]:g}"),
            number_cell(str(len(summary.seeds[model]))),
            number_cell(sizes),
            number_cell(speed),
        ]
        if files.flops is not None:
            flops = files.flops.get(model)
            cells.append(number_cell(DASH if flops is None else si_number(flops)))
        rows.append("".join(cells))
    note = (
        "The line and marker of a model are those of all figures. Speed is that of "
        "training, mean over seeds."
    )
    return HtmlTable("Models", note, table_markup(columns, [("", rows)]))


def _size_and_speed(files: StudyFiles, model: str, rate: float) -> tuple[str, str]:
    """Format the number of parameters and the speed of a model at a learning rate."""
    rows = [
        row for row in files.results if row.model == model and row.learning_rate == rate
    ]
    # Every metric of a run repeats its size and speed.
    sizes = {row.parameters for row in rows if row.parameters is not None}
    speeds = {
        row.seed: row.examples_per_second
        for row in rows
        if row.examples_per_second is not None
    }
    size = " / ".join(f"{size:,}" for size in sorted(sizes)) or DASH
    speed = f"{statistics.mean(speeds.values()):,.0f}" if speeds else DASH
    return size, speed


def quality_table(
    summary: StudySummary, split: str, task: str, styles: Styles
) -> HtmlTable:
    """Make the table of a task: every metric, and its difference to the reference.

    Args:
      summary: summary of the study.
      split: name of the split.
      task: name of the task.
      styles: style of each model.
    """
    reason = summary.no_claim.get((split, task))
    keys = {metric: MetricKey(split, task, metric) for metric in summary.metrics}
    keys = {metric: key for metric, key in keys.items() if key in summary.spreads}
    # Where nothing is claimed no difference is shown.
    differences: dict[str, Mapping[str, Difference]] = {
        metric: {} if reason else summary.differences.get(key, {})
        for metric, key in keys.items()
    }
    best = {metric: best_model(summary, key) for metric, key in keys.items()}

    def row(model: str) -> str:
        # All cells of the row have a second line if one of them has.
        two_lines = any(model in by_model for by_model in differences.values())
        cells = [model_cell(model, styles)]
        for metric, key in keys.items():
            value = spread_markup(summary.spreads[key].get(model))
            difference = differences[metric].get(model)
            below = difference_markup(difference) if two_lines else ""
            css_class = "number best" if best[metric] == model else "number"
            cells.append(f'<td class="{css_class}">{value}{below}</td>')
        return "".join(cells)

    columns = [Column("model", numeric=False)]
    for metric in keys:
        arrow = "↑" if higher_is_better(metric) else "↓"
        columns.append(Column(f"{metric_name(metric)} {arrow}"))
    known = {model for key in keys.values() for model in summary.spreads[key]}
    trained = [row(model) for model in summary.models if model in known]
    ensembles = [row(model) for model in summary.ensembles if model in known]
    baselines = [row(model) for model in summary.baselines if model in known]
    groups = [
        ("", trained),
        ("ensembles: averages of the log-odds of runs", ensembles),
        ("baselines", baselines),
    ]

    if reason:
        markup = table_markup(columns, groups, "unclaimed")
        return HtmlTable(f"{task}, {split}", "", markup, reason)
    note = (
        "The study holds no intervals for these values, so no difference between them "
        "is claimed."
    )
    if any(differences.values()):
        note = (
            f"Below a value: its difference to {summary.reference} and the 95 % "
            "interval; grey with ≈, it is not distinguishable from 0. Bold: the best of "
            "its column, where its lead is distinguishable from 0."
        )
    return HtmlTable(f"{task}, {split}", note, table_markup(columns, groups))


def differences_table(summary: StudySummary) -> HtmlTable | None:
    """Make the table of differences of the headline metric, with p-values and verdicts.

    Returns:
      None if the main split has no differences.
    """
    groups = []
    for task in summary.claimed_tasks:
        key = MetricKey(summary.main_split, task, summary.headline)
        by_model = summary.differences.get(key, {})
        groups.append((task, [_difference_row(row) for row in by_model.values()]))
    # A study of one model compares nothing.
    if not any(rows for _, rows in groups):
        return None
    columns = [
        Column("model", numeric=False),
        Column("difference"),
        Column("95 % interval"),
        Column("p"),
        Column("users"),
        Column("positives"),
        Column("undefined draws"),
        Column(f"than {summary.reference}", numeric=False),
    ]
    note = (
        "Model minus reference, mean over seeds; a paired bootstrap over users. Users "
        "are resampled, seeds are not: their deviation is in the tables above. "
        "Draws without positives or without negatives are undefined; interval and p are "
        "without them, and more than a few mean that few users hold one class. "
        "Intervals and p are not corrected for the number of comparisons."
    )
    title = (
        f"{metric_name(summary.headline)} against {summary.reference}, "
        f"{summary.main_split}"
    )
    return HtmlTable(title, note, table_markup(columns, groups))


def _difference_row(difference: Difference) -> str:
    p_value, undefined_draws = difference.p_value, difference.undefined_draws
    cells = [
        f'<th scope="row">{escape(difference.model)}</th>',
        number_cell(decimal(difference.difference, sign=True)),
        number_cell(interval_text(difference)),
        number_cell(DASH if p_value is None else f"{p_value:.3f}"),
        number_cell(f"{difference.users:,}"),
        number_cell(f"{difference.positives:,}"),
        number_cell(DASH if undefined_draws is None else f"{undefined_draws:,}"),
        f"<td>{_VERDICTS[verdict(difference)]}</td>",
    ]
    row = "".join(cells)
    is_equal = verdict(difference) == "equal"
    return f'<tr class="grey">{row}</tr>' if is_equal else row


def search_table(search: RateSearch, rates: Mapping[str, float]) -> HtmlTable:
    """Make the table of the headline metric at every learning rate that was tried.

    Args:
      search: values of the search.
      rates: model -> chosen rate.
    """
    tried = sorted({rate for by_rate in search.values.values() for rate in by_rate})
    rows = []
    for model, by_rate in search.values.items():
        cells = [f'<th scope="row">{escape(model)}</th>']
        for rate in tried:
            text = decimal(by_rate[rate].mean) if rate in by_rate else ""
            cells.append(number_cell(text, "chosen" if rate == rates[model] else ""))
        at_edge = search.at_edge(model, rates[model])
        cells.append(f"<td>{'at the edge' if at_edge else ''}</td>")
        rows.append("".join(cells))
    columns = [
        Column("model", numeric=False),
        *(Column(f"{rate:g}") for rate in tried),
        Column("", numeric=False),
    ]
    note = (
        f"{metric_name(search.key.metric)}, {search.key.task}, on {search.key.split}; "
        f"{_seed_names(search.seeds)}. Bold: the chosen rate. At the edge of those "
        "tried, a better one may lie outside."
    )
    return HtmlTable("Learning rates tried", note, table_markup(columns, [("", rows)]))


def _seed_names(seeds: Sequence[int]) -> str:
    """
    >>> _seed_names([0]), _seed_names([0, 1]), _seed_names([])
    ('seed 0', 'seeds 0, 1', 'no seed in common')
    """
    if not seeds:
        return "no seed in common"
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def positives_table(files: StudyFiles) -> HtmlTable | None:
    """Make the table of positive labels; counts too small for a claim are grey.

    Returns:
      None if the study does not record them.
    """
    counts: Mapping[str, Mapping[str, int]] = files.info.data.get("positives", {})
    tasks = list(dict.fromkeys(task for by_task in counts.values() for task in by_task))
    if not tasks:
        return None
    rows = []
    for split, by_task in counts.items():
        cells = [f'<th scope="row">{escape(split)}</th>']
        for task in tasks:
            count = by_task.get(task)
            if count is None:
                cells.append(number_cell(DASH))
            else:
                css_class = "grey" if count < LEAST_POSITIVES else ""
                cells.append(number_cell(f"{count:,}", css_class))
        rows.append("".join(cells))
    columns = [Column("split", numeric=False), *map(Column, tasks)]
    note = f"Grey: fewer than {LEAST_POSITIVES}, too few for a claim."
    return HtmlTable("Positives", note, table_markup(columns, [("", rows)]))


def ranks_table(
    ranks: Mapping[str, Mapping[int, Spread]],
    summary: StudySummary,
    styles: Styles,
) -> HtmlTable:
    """Make the table of effective ranks.

    Args:
      ranks: model -> layer -> mean and deviation at the last step.
      summary: summary of the study.
      styles: style of each model.
    """
    layers = sorted({layer for by_layer in ranks.values() for layer in by_layer})
    rows = []
    for model in summary.models:
        if model not in ranks:
            continue
        cells = [model_cell(model, styles)]
        for layer in layers:
            value = spread_markup(ranks[model].get(layer), places=1)
            cells.append(f'<td class="number">{value}</td>')
        rows.append("".join(cells))
    columns = [
        Column("model", numeric=False),
        *(Column(layer_name(layer)) for layer in layers),
    ]
    note = "At the last step of each run; mean and deviation over seeds."
    title = "Effective rank of the event states"
    return HtmlTable(title, note, table_markup(columns, [("", rows)], "narrow"))

"""The tables of a study, as HTML."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tokenrec.analysis.figure_style import Style
from tokenrec.analysis.study_files import Difference, StudyFiles
from tokenrec.analysis.summary import (
    LEAST_POSITIVES,
    MetricKey,
    Search,
    Spread,
    Summary,
    Verdict,
    best_model,
    higher_is_better,
    verdict,
)
from tokenrec.analysis.wording import (
    DASH,
    decimal,
    interval_text,
    layer_name,
    metric_name,
    plain_spread,
    si_number,
)

_WORDS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "≈ not distinguishable from 0",
    "unknown": "no interval",
}


class Table(NamedTuple):
    """A table as HTML; its title, what one must know to read it, and why nothing is claimed, if so, as text."""

    title: str
    note: str
    markup: str
    no_claim: str = ""


class _Column(NamedTuple):
    label: str
    numeric: bool = True


def models_table(
    files: StudyFiles, summary: Summary, styles: Mapping[str, Style]
) -> Table:
    """What each trained model is: the config fields that it sets, its learning rate, seeds, size and speed."""
    columns = [
        _Column("model", numeric=False),
        _Column("config fields that it sets", numeric=False),
    ]
    columns += [
        _Column(name)
        for name in ("learning rate", "seeds", "parameters", "examples / s")
    ]
    if files.flops is not None:
        columns.append(_Column("FLOPs / example"))
    rows = []
    for model in summary.models:
        own = [
            row
            for row in files.results
            if row.model == model and row.learning_rate == summary.rates[model]
        ]
        speeds = {
            row.seed: row.examples_per_second
            for row in own
            if row.examples_per_second is not None
        }
        sizes = {row.parameters for row in own if row.parameters is not None}
        fields = ", ".join(
            f"{name} = {value}"
            for name, value in files.about.arms.get(model, {}).items()
        )
        cells = [
            _name(model, styles),
            f"<td><code>{escape(fields)}</code></td>"
            if fields
            else "<td>those of the base</td>",
            _number(f"{summary.rates[model]:g}"),
            _number(str(len(summary.seeds[model]))),
            _number(" / ".join(f"{size:,}" for size in sorted(sizes)) or DASH),
            _number(f"{statistics.mean(speeds.values()):,.0f}" if speeds else DASH),
        ]
        if files.flops is not None:
            cells.append(
                _number(si_number(files.flops[model]) if model in files.flops else DASH)
            )
        rows.append("".join(cells))
    note = "The dot is the colour of the model in all figures. Speed is that of training, mean over seeds."
    return Table("Models", note, _markup(columns, [("", rows)]))


def quality_table(
    summary: Summary, split: str, task: str, styles: Mapping[str, Style]
) -> Table:
    """Every metric of a task: mean and deviation over seeds, and below them the difference to the reference."""
    reason = summary.no_claim.get((split, task))
    metrics = [
        m for m in summary.metrics if MetricKey(split, task, m) in summary.spreads
    ]
    gaps = (
        []
        if reason
        else [
            summary.differences.get(MetricKey(split, task, metric), {})
            for metric in metrics
        ]
    )
    best = {
        metric: best_model(summary, MetricKey(split, task, metric))
        for metric in metrics
    }

    def row(model: str) -> str:
        two_lines = any(model in of_metric for of_metric in gaps)
        cells = []
        for metric in metrics:
            place = MetricKey(split, task, metric)
            value = spread_text(summary.spreads[place].get(model))
            gap = None if reason else summary.differences.get(place, {}).get(model)
            below = gap_text(gap) if two_lines else ""
            cells.append(
                f'<td class="number{" best" if best[metric] == model else ""}">{value}{below}</td>'
            )
        return _name(model, styles) + "".join(cells)

    columns = [_Column("model", numeric=False)]
    columns += [
        _Column(f"{metric_name(metric)} {'↑' if higher_is_better(metric) else '↓'}")
        for metric in metrics
    ]
    shown = {
        model
        for metric in metrics
        for model in summary.spreads[MetricKey(split, task, metric)]
    }
    groups = [("", [row(model) for model in summary.models if model in shown])]
    groups.append(
        (
            "rate baselines",
            [row(model) for model in summary.baselines if model in shown],
        )
    )
    note = "The study holds no intervals for these values, so that no difference between them is claimed."
    if any(gaps):
        note = (
            f"Below a value: its difference to {summary.reference} and the 95 % interval; grey with ≈, it is not "
            "distinguishable from 0. Bold: the best of its column, where its lead is distinguishable from 0."
        )
    markup = _markup(columns, groups, "unclaimed" if reason else "")
    return Table(f"{task}, {split}", "" if reason else note, markup, reason or "")


def differences_table(summary: Summary) -> Table | None:
    """Differences of the headline metric on the main split in words, with p-values."""
    groups = []
    for task in summary.claimed_tasks:
        rows = []
        for gap in summary.differences.get(
            MetricKey(summary.main_split, task, summary.headline), {}
        ).values():
            cells = [
                f'<th scope="row">{escape(gap.model)}</th>',
                _number(decimal(gap.difference, sign=True)),
                _number(interval_text(gap)),
                _number(DASH if gap.p_value is None else f"{gap.p_value:.3f}"),
                _number(f"{gap.users:,}"),
                _number(f"{gap.positives:,}"),
                f"<td>{_WORDS[verdict(gap)]}</td>",
            ]
            rows.append(
                f'<tr class="grey">{"".join(cells)}</tr>'
                if verdict(gap) == "equal"
                else "".join(cells)
            )
        groups.append((task, rows))
    if not any(rows for _, rows in groups):
        return None
    columns = [_Column("model", numeric=False)]
    columns += [
        _Column(name)
        for name in ("difference", "95 % interval", "p", "users", "positives")
    ]
    columns.append(_Column(f"than {summary.reference}", numeric=False))
    note = (
        "Model minus reference, mean over seeds; a paired bootstrap over users. Users are drawn, seeds are not: their "
        "deviation stands in the tables. Intervals and p are not corrected for the number of comparisons."
    )
    title = f"{metric_name(summary.headline)} against {summary.reference}, {summary.main_split}"
    return Table(title, note, _markup(columns, groups))


def search_table(search: Search, rates: Mapping[str, float]) -> Table:
    """The headline metric of every learning rate that was tried."""
    tried = sorted({rate for of_model in search.values.values() for rate in of_model})
    rows = []
    for model, values in search.values.items():
        cells = [f'<th scope="row">{escape(model)}</th>']
        for rate in tried:
            chosen = rate == rates[model]
            text = "" if rate not in values else decimal(values[rate].mean)
            cells.append(f'<td class="number{" chosen" if chosen else ""}">{text}</td>')
        cells.append(
            f"<td>{'at the edge' if search.at_edge(model, rates[model]) else ''}</td>"
        )
        rows.append("".join(cells))
    columns = [
        _Column("model", numeric=False),
        *(_Column(f"{rate:g}") for rate in tried),
        _Column("", numeric=False),
    ]
    seeds = f"seed{'s' if len(search.seeds) > 1 else ''} {', '.join(map(str, search.seeds)) or 'in common: none'}"
    note = (
        f"{metric_name(search.place.metric)}, {search.place.task}, on {search.place.split}; {seeds}. Bold is the "
        "chosen rate; at the edge of those tried, a better one may lie outside."
    )
    return Table("Learning rates tried", note, _markup(columns, [("", rows)]))


def positives_table(files: StudyFiles) -> Table | None:
    """Positives of each task and split; too few for a claim are grey."""
    counts: Mapping[str, Mapping[str, int]] = files.about.data.get("positives", {})
    tasks = list(
        dict.fromkeys(task for of_split in counts.values() for task in of_split)
    )
    if not tasks:
        return None
    rows = []
    for split, of_split in counts.items():
        cells = [f'<th scope="row">{escape(split)}</th>']
        for task in tasks:
            count = of_split.get(task)
            rare = count is not None and count < LEAST_POSITIVES
            cells.append(
                f'<td class="number{" grey" if rare else ""}">{DASH if count is None else f"{count:,}"}</td>'
            )
        rows.append("".join(cells))
    note = f"Grey: fewer than {LEAST_POSITIVES}, too few for a claim."
    return Table(
        "Positives",
        note,
        _markup([_Column("split", numeric=False), *map(_Column, tasks)], [("", rows)]),
    )


def ranks_table(
    ranks: Mapping[str, Mapping[int, Spread]],
    summary: Summary,
    styles: Mapping[str, Style],
) -> Table:
    """The effective ranks of the figure, in numbers."""
    layers = sorted({layer for of_model in ranks.values() for layer in of_model})
    rows = []
    for model in (model for model in summary.models if model in ranks):
        found = ranks[model]
        cells = (
            _number(spread_text(found.get(layer), places=1), markup=True)
            for layer in layers
        )
        rows.append(_name(model, styles) + "".join(cells))
    columns = [
        _Column("model", numeric=False),
        *(_Column(layer_name(layer)) for layer in layers),
    ]
    note = "At the last step of each run; mean and deviation over seeds."
    return Table(
        "Effective rank of the event states",
        note,
        _markup(columns, [("", rows)], "narrow"),
    )


def spread_text(value: Spread | None, places: int = 4) -> str:
    """HTML of `plain_spread`; a deviation keeps its room where there is none, so that digits stay below digits."""
    mean, sign, deviation = (
        DASH if value is None else plain_spread(value, places)
    ).partition(" ± ")
    return f'<span class="value">{mean}</span><span class="deviation">{sign}{deviation}</span>'


def gap_text(gap: Difference | None) -> str:
    """HTML of a difference and its interval, on a line of its own."""
    if gap is None or verdict(gap) == "unknown":
        return f'<span class="gap none">{DASH}</span>'
    equal = verdict(gap) == "equal"
    words = f"{'≈ ' if equal else ''}{decimal(gap.difference, sign=True)} {interval_text(gap)}"
    return f'<span class="gap{" equal" if equal else ""}">{words}</span>'


def _name(model: str, styles: Mapping[str, Style]) -> str:
    if model not in styles:
        return f'<th scope="row">{escape(model)}</th>'
    filled = " filled" if styles[model].filled else ""
    key = f'<span class="key{filled}" style="--of: {styles[model].colour}"></span>'
    return f'<th scope="row">{key}{escape(model)}</th>'


def _number(text: str, *, markup: bool = False) -> str:
    return f'<td class="number">{text if markup else escape(text)}</td>'


def _markup(
    columns: Sequence[_Column],
    groups: Iterable[tuple[str, Sequence[str]]],
    kind: str = "",
) -> str:
    """A table of groups of rows under their headings; a row is its cells, or a whole `<tr>`."""
    head = "".join(
        f'<th scope="col"{" class=number" if c.numeric else ""}>{escape(c.label)}</th>'
        for c in columns
    )
    body = ""
    for heading, rows in groups:
        if not rows:
            continue
        title = (
            f'<tr class="group"><th colspan="{len(columns)}">{escape(heading)}</th></tr>'
            if heading
            else ""
        )
        lines = "\n".join(
            row if row.startswith("<tr") else f"<tr>{row}</tr>" for row in rows
        )
        body += f"<tbody>{title}\n{lines}\n</tbody>"
    opening = f'<table class="{kind}">' if kind else "<table>"
    return f'<div class="scroll">{opening}\n<thead><tr>{head}</tr></thead>\n{body}</table></div>'

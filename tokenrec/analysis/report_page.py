"""The HTML of the report around its tables and figures.

Every function returns HTML; text from files of a study is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any

from tokenrec.analysis.model_styles import colour_variables
from tokenrec.analysis.study_files import StudyFiles
from tokenrec.analysis.study_metrics import MetricKey
from tokenrec.analysis.summary import (
    LEAST_POSITIVES,
    StudySummary,
    Verdict,
    verdict,
)
from tokenrec.analysis.wording import metric_name, plain_spread

STATES_HEADING = "Inside the models"

# Optional tables by their field of StudyFiles: what they show, and the file.
_OPTIONAL = {
    "differences": ("Differences with intervals", "differences.parquet"),
    "reliability": ("Reliability", "reliability.parquet"),
    "curves": ("Learning curves", "curves.parquet"),
    "flops": ("Quality against FLOPs", "flops.json"),
    "ranks": ("Effective ranks", "ranks.parquet"),
    "spectra": ("Spectra", "spectra.parquet"),
    "information": ("Information on the label", "information.parquet"),
    "attention": ("Attention mass", "attention.parquet"),
    "maps": ("Attention maps", "maps.parquet"),
}
_CONCLUSIONS: dict[Verdict, str] = {
    "better": "better",
    "worse": "worse",
    "equal": "not distinguishable from it",
}


def conclusions(files: StudyFiles, summary: StudySummary) -> str:
    """State the differences of the main split in words, and what is not finished."""
    lines = [_conclusion(summary, task) for task in summary.tasks[summary.main_split]]
    lines.append(_unfinished(files, summary))
    paragraphs = "".join(f"<p>{line}</p>" for line in lines if line)
    return f'<div class="short">{paragraphs}</div>' if paragraphs else ""


def _conclusion(summary: StudySummary, task: str) -> str:
    """State the differences of one task; empty without intervals."""
    split = summary.main_split
    reason = summary.no_claim.get((split, task))
    if reason:
        return f"<b>{escape(task)}</b>: no claim; {escape(reason)}."
    key = MetricKey(split, task, summary.headline)
    differences = summary.differences.get(key, {})
    if not differences:
        return ""
    groups = []
    # Models without an interval are in no group.
    for kind, words in _CONCLUSIONS.items():
        models = [m for m, gap in differences.items() if verdict(gap) == kind]
        if models:
            groups.append(f"{words}: {', '.join(map(_name, models))}")
    value = plain_spread(summary.spreads[key][summary.reference])
    return (
        f"<b>{escape(task)}</b>: {_name(summary.reference)} has "
        f"{metric_name(summary.headline)} {value} on {escape(split)}; "
        f"{'; '.join(groups)}."
    )


def _name(model: str) -> str:
    """A name that does not break at its hyphens."""
    return f'<i class="name">{escape(model)}</i>'


def _unfinished(files: StudyFiles, summary: StudySummary) -> str:
    wanted = len(files.info.seeds)
    lines = [
        f"{model} has {len(seeds)} of {wanted} seeds"
        for model, seeds in summary.seeds.items()
        if len(seeds) < wanted
    ]
    lines += [
        f"{model} has no finished run"
        for model in files.info.arms
        if model not in summary.models
    ]
    if not lines:
        return ""
    return f'<span class="reason">Not finished: {escape("; ".join(lines))}.</span>'


def facts(files: StudyFiles) -> str:
    """List what was run: reference, seeds, rates, budget, data, versions."""
    info = files.info
    values = {
        "reference": info.reference,
        "seeds": ", ".join(map(str, info.seeds)),
        "learning rates": ", ".join(f"{rate:g}" for rate in info.learning_rates),
        "diverged": ", ".join(info.diverged),
        "budget": f"{info.spent_cpu_hours:.2f} CPU-hours spent of {info.cpu_hours:g}",
        "rows": _words(info.data.get("rows")),
        "versions": _words(info.versions),
    }
    # A study without diverged runs has no such line.
    entries = (
        f"<dt>{name}</dt><dd>{escape(value)}</dd>"
        for name, value in values.items()
        if value
    )
    return f"<dl>{''.join(entries)}</dl>"


def commands(files: StudyFiles) -> str:
    """List the commands behind the tables and figures of a study: once per section."""
    lines = {"training, scores and differences": files.info.command}
    has_states = any(
        table is not None
        for table in (
            files.ranks,
            files.spectra,
            files.information,
            files.attention,
            files.maps,
        )
    )
    if has_states:
        # Tables from before the command was recorded.
        unknown = "python -m benchmarks.study_states --study DIR"
        lines[f"“{STATES_HEADING}”"] = files.states_command or unknown
    entries = (
        f"<dt>{escape(name)}</dt><dd>{command_markup(line)}</dd>"
        for name, line in lines.items()
    )
    return f'<dl class="commands">{"".join(entries)}</dl>'


def command_markup(line: str) -> str:
    """A command line that breaks between words; a browser would break at hyphens."""
    words = " ".join(f"<span>{escape(word)}</span>" for word in line.split())
    return f"<code>{words}</code>"


def figure(kind: str, title: str, note: str, markup: str, no_claim: str = "") -> str:
    """A numbered figure or table with its caption.

    Args:
      kind: "drawn" or "tabled".
      title: title, as text.
      note: what a reader must know, as text.
      markup: its HTML.
      no_claim: why nothing is claimed, as text; empty if something may be.
    """
    reason = ""
    if no_claim:
        reason = f'<span class="reason">No claim: {escape(no_claim)}.</span>'
    caption = f"<b>{escape(title)}.</b> {escape(note)}{reason}"
    return (
        f'<figure class="{kind}">\n<figcaption>{caption}</figcaption>\n'
        f"{markup}\n</figure>"
    )


def missing_files(files: StudyFiles) -> str:
    """List the optional tables that the study lacks."""
    lines = [
        f"<li>{content}: <code>{file}</code> is not in the study's folder; "
        "docs/guides/report.md says what it holds.</li>"
        for field, (content, file) in _OPTIONAL.items()
        if getattr(files, field) is None
    ]
    if not lines:
        return ""
    return f'<div class="missing"><h3>Not shown</h3><ul>{"".join(lines)}</ul></div>'


def base_config(files: StudyFiles) -> str:
    """The config that all models start from, folded up."""
    lines = "\n".join(f"{name} = {value}" for name, value in _flat(files.info.base))
    return (
        "<details><summary>Config that all models start from</summary>"
        f"<pre>{escape(lines)}</pre></details>"
    )


def breakable(name: str) -> str:
    """Escape a name and let it break after underscores, which a phone needs."""
    return escape(name).replace("_", "_<wbr>")


def page(
    names: Mapping[str, str], sections: Sequence[str], *, command: str, figures: str
) -> str:
    """Write the page.

    Args:
      names: identifier -> name of each study.
      sections: HTML of each study.
      command: the command line that draws the page.
      figures: folder of the figures' files.
    """
    # Several names would fill a phone's screen as a heading; they are links below it.
    if len(names) == 1:
        heading = f"Study {breakable(*names.values())}"
        navigation = ""
    else:
        heading = f"{len(names)} studies"
        entries = "".join(
            f'<li><a href="#{name}">{breakable(study)}</a></li>'
            for name, study in names.items()
        )
        navigation = f"<nav><ul>{entries}</ul></nav>"
    title = escape(f"tokenrec: {', '.join(names.values())}")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{_style()}</style>
</head>
<body>
<header>
<h1>{heading}</h1>
<p class="lead">Values are means over seeds with their sample deviation; differences are
to the reference of the study. Nothing is claimed about a task with fewer than
{LEAST_POSITIVES} positives.</p>
</header>
{navigation}
<main>
{"".join(sections)}
</main>
<footer>Drawn by {command_markup(command)}. The figures are also files in
<code>{figures}/</code>.</footer>
</body>
</html>
"""


def _style() -> str:
    """The style sheet, with the colours of models in both themes."""
    folder = resources.files("tokenrec.analysis")
    css = folder.joinpath("report.css").read_text(encoding="utf-8")
    return (
        f":root {{ {colour_variables(0)} }}\n"
        "@media screen and (prefers-color-scheme: dark) "
        f"{{ :root {{ {colour_variables(1)} }} }}\n{css}"
    )


def _words(value: Any) -> str:
    """
    >>> _words({"train": 12000, "jax": "0.12.0", "torch": None}), _words(None)
    ('train 12,000, jax 0.12.0', '')
    """
    if value is None:
        return ""
    if isinstance(value, dict):
        entries = ((name, entry) for name, entry in value.items() if entry is not None)
        return ", ".join(f"{name} {_words(entry)}" for name, entry in entries)
    return f"{value:,}" if isinstance(value, int) else str(value)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """
    >>> list(_flat({"seed": 0, "model": {"width": 64}}))
    [('seed', 0), ('model.width', 64)]
    """
    for name, value in fields.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value

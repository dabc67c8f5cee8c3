"""`tokenrec report`: the results of studies as one HTML page, with every figure and the command that made it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from tokenrec.analysis import figures, result_tables
from tokenrec.analysis.figure_style import (
    Style,
    assign_styles,
    figure_defaults,
    lay_out,
    to_png,
    to_svg,
)
from tokenrec.analysis.figures import Drawing
from tokenrec.analysis.result_tables import Table
from tokenrec.analysis.study_files import StudyFiles, read_study
from tokenrec.analysis.summary import (
    LEAST_POSITIVES,
    MetricKey,
    Summary,
    search_of,
    summarize_study,
    verdict,
)
from tokenrec.analysis.wording import metric_name, plain_spread
from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace, write_text_atomically

PAGE, FIGURES = "report.html", "figures"

_OPTIONAL = {
    "differences": ("Differences with intervals", "differences.parquet"),
    "curves": ("Learning curves", "curves.parquet"),
    "flops": ("Quality against FLOPs", "flops.json"),
    "ranks": ("Effective ranks", "ranks.parquet"),
    "spectra": ("Spectra", "spectra.parquet"),
    "information": ("Information on the label", "information.parquet"),
    "attention": ("Attention mass", "attention.parquet"),
    "maps": ("Attention maps", "maps.parquet"),
}

type Part = str | Table | Drawing | None


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes `out/report.html`, which needs no other file, no network and no script, and `out/figures/*.png`.

    Args:
      folders: of studies, as `tokenrec study` leaves them.

    Returns:
      The page's path.

    Raises:
      InputError: `read_study` refuses a folder, two studies have one name, `out` is a file, or matplotlib is not
        installed.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; name a folder")
    studies: dict[str, tuple[StudyFiles, Summary]] = {}
    for folder in folders:
        files = read_study(folder)
        name = (
            re.sub(r"[^a-z0-9]+", "-", files.about.study.lower()).strip("-") or "study"
        )
        if name in studies:
            raise InputError(
                f"--study={folder} is of study '{files.about.study}', as another one; name each study once"
            )
        studies[name] = files, summarize_study(files)
    styles = assign_styles(
        model for _, found in studies.values() for model in found.models
    )
    own = shlex.join(
        [
            "tokenrec",
            "report",
            *(f"--study={folder}" for folder in folders),
            f"--out={out}",
        ]
    )
    bodies = []
    with figure_defaults():
        for name, (files, summary) in studies.items():
            trained = files.about.command
            measured = (
                files.states_command or "python -m benchmarks.study_states --study DIR"
            )
            heading = f'<h2 id="{name}">{escape(files.about.study)}</h2>'
            parts = [
                _render(part, name, out, (trained, own))
                for part in _study_parts(files, summary, styles)
            ]
            inside = _inside_parts(files, summary, styles)
            parts += [
                _render(part, name, out, (trained, measured, own)) for part in inside
            ]
            bodies.append(
                "\n".join(
                    [
                        "<section>",
                        heading,
                        *parts,
                        _missing(files),
                        _config(files),
                        "</section>",
                    ]
                )
            )
    page = out / PAGE
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(
        page,
        _page(
            {name: files.about.study for name, (files, _) in studies.items()},
            bodies,
            own,
        ),
    )
    return page


def _study_parts(
    files: StudyFiles, summary: Summary, styles: Mapping[str, Style]
) -> Iterator[Part]:
    yield _in_short(files, summary)
    yield "<h3>What was run</h3>"
    yield _what_was_run(files)
    yield result_tables.models_table(files, summary, styles)
    yield result_tables.positives_table(files)
    for split, tasks in summary.tasks.items():
        yield f"<h3>Quality on {escape(split)}</h3>"
        if split == summary.main_split:
            yield figures.draw_differences(summary, styles)
        for task in tasks:
            yield result_tables.quality_table(summary, split, task, styles)
        if split == summary.main_split:
            yield result_tables.differences_table(summary)
    yield "<h3>Learning-rate search</h3>"
    yield result_tables.search_table(search_of(files.results), summary.rates)
    drawings = []
    if files.curves is not None:
        drawings.append(figures.draw_curves(files.curves, summary, styles))
    if files.flops is not None:
        drawings.append(figures.draw_quality(files.flops, summary, styles))
    if any(drawings):
        yield "<h3>Training and cost</h3>"
        yield from drawings


def _inside_parts(
    files: StudyFiles, summary: Summary, styles: Mapping[str, Style]
) -> Iterator[Part]:
    """What the trained models are like inside."""
    if any(
        table is not None
        for table in (
            files.ranks,
            files.spectra,
            files.information,
            files.attention,
            files.maps,
        )
    ):
        yield "<h3>Inside the models</h3>"
    if files.ranks is not None:
        yield figures.draw_ranks(files.ranks, summary, styles)
        yield result_tables.ranks_table(
            figures.last_ranks(files.ranks), summary, styles
        )
    if files.spectra is not None:
        yield figures.draw_spectra(files.spectra, summary, styles)
    if files.information is not None:
        yield figures.draw_information(files.information, summary, styles)
    if files.attention is not None:
        yield figures.draw_attention(files.attention, summary)
    if files.maps is not None:
        yield figures.draw_maps(files.maps, summary)


def _render(part: Part, study: str, out: Path, commands: Iterable[str]) -> str:
    """HTML of a part; a figure is also written as a file."""
    if part is None or isinstance(part, str):
        return part or ""
    below = "".join(f'<p class="command">{_command(line)}</p>' for line in commands)
    reason = ""
    if isinstance(part, Table):
        kind, content = "tabled", part.markup
        if part.no_claim:
            reason = f'<span class="reason">No claim: {escape(part.no_claim)}.</span>'
    else:
        lay_out(part.figure)
        kind, content = (
            "drawn",
            to_svg(part.figure, f"{study}-{part.name}", f"{part.title}. {part.note}"),
        )
        _write_bytes(out / FIGURES / f"{study}-{part.name}.png", to_png(part.figure))
    caption = f"<figcaption><b>{escape(part.title)}.</b> {escape(part.note)}{reason}</figcaption>"
    return f'<figure class="{kind}">\n{caption}\n{content}\n{below}\n</figure>'


def _in_short(files: StudyFiles, summary: Summary) -> str:
    """What the differences say, in words."""
    split, metric = summary.main_split, metric_name(summary.headline)
    lines = []
    for task in summary.tasks[split]:
        place = MetricKey(split, task, summary.headline)
        reason = summary.no_claim.get((split, task))
        gaps = summary.differences.get(place, {})
        if reason:
            lines.append(f"<b>{escape(task)}</b>: no claim; {escape(reason)}.")
        elif gaps:
            said = {
                "better": "better",
                "worse": "worse",
                "equal": "not distinguishable from it",
            }
            found = {
                kind: [m for m, gap in gaps.items() if verdict(gap) == kind]
                for kind in said
            }
            words = [
                f"{said[kind]}: {', '.join(models)}"
                for kind, models in found.items()
                if models
            ]
            value = summary.spreads[place][summary.reference]
            lines.append(
                f"<b>{escape(task)}</b>: {escape(summary.reference)} has {metric} {plain_spread(value)} on "
                f"{escape(split)}; {escape('; '.join(words))}."
            )
    wanted = len(files.about.seeds)
    late = [
        f"{model} has {len(seeds)} of {wanted} seeds"
        for model, seeds in summary.seeds.items()
        if len(seeds) < wanted
    ]
    absent = [model for model in files.about.arms if model not in summary.models]
    late += [f"{model} has no finished run" for model in absent]
    if late:
        lines.append(
            f'<span class="reason">Not finished: {escape("; ".join(late))}.</span>'
        )
    return (
        f'<div class="short">{"".join(f"<p>{line}</p>" for line in lines)}</div>'
        if lines
        else ""
    )


def _what_was_run(files: StudyFiles) -> str:
    about = files.about
    facts = {
        "command": _command(about.command),
        "reference": escape(about.reference),
        "seeds": ", ".join(map(str, about.seeds)),
        "learning rates": ", ".join(f"{rate:g}" for rate in about.learning_rates),
        "diverged": escape(", ".join(about.diverged)),
        "budget": f"{about.spent_cpu_hours:.2f} CPU hours spent of {about.cpu_hours:g} allowed",
        "rows": escape(_words(about.data.get("rows"))),
        "versions": escape(_words(about.versions)),
    }
    return f"<dl>{''.join(f'<dt>{name}</dt><dd>{value}</dd>' for name, value in facts.items() if value)}</dl>"


def _command(line: str) -> str:
    """A command that breaks between its words only: a browser would also break it at hyphens."""
    return f"<code>{' '.join(f'<span>{escape(word)}</span>' for word in line.split())}</code>"


def _words(value: Any) -> str:
    """
    >>> _words({"train": 12000, "jax": "0.12.0", "torch": None}), _words(None)
    ('train 12,000, jax 0.12.0', '')
    """
    if isinstance(value, dict):
        return ", ".join(
            f"{name} {_words(of_name)}"
            for name, of_name in value.items()
            if of_name is not None
        )
    return (
        "" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
    )


def _missing(files: StudyFiles) -> str:
    lines = [
        f"<li>{what}: <code>{file}</code> is not in the study's folder; docs/guides/report.md says what it holds.</li>"
        for field, (what, file) in _OPTIONAL.items()
        if getattr(files, field) is None
    ]
    return (
        f'<div class="missing"><h3>Not shown</h3><ul>{"".join(lines)}</ul></div>'
        if lines
        else ""
    )


def _config(files: StudyFiles) -> str:
    lines = "\n".join(f"{name} = {value}" for name, value in _flat(files.about.base))
    return f"<details><summary>Config that all models start from</summary><pre>{escape(lines)}</pre></details>"


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


def _page(names: Mapping[str, str], bodies: Sequence[str], command: str) -> str:
    style = (
        resources.files("tokenrec.analysis")
        .joinpath("report.css")
        .read_text(encoding="utf-8")
    )
    contents = "".join(
        f'<li><a href="#{name}">{escape(study)}</a></li>'
        for name, study in names.items()
    )
    title = escape(
        f"Stud{'y' if len(names) == 1 else 'ies'} {', '.join(names.values())}"
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="lead">Values are means over seeds with their sample deviation; differences are to the reference of the study.
Nothing is claimed of a task with fewer than {LEAST_POSITIVES} positives.</p>
</header>
{f"<nav><ul>{contents}</ul></nav>" if len(names) > 1 else ""}
<main>
{"".join(bodies)}
</main>
<footer>Made by {_command(command)}. The figures are also files in <code>{FIGURES}/</code>.</footer>
</body>
</html>
"""


def _write_bytes(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(path) as partial:
        partial.write_bytes(content)

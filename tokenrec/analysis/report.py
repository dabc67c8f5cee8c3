"""`tokenrec report`: the results of studies as one HTML page with figures.

This module fixes what the page shows and in which order. `report_page.py` writes its
HTML and `result_tables.py` its tables; `quality_figures.py`, `state_figures.py` and
`attention_figures.py` draw its figures.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from tokenrec.analysis import (
    attention_figures,
    quality_figures,
    report_page,
    result_tables,
    state_figures,
)
from tokenrec.analysis.figure_files import lay_out, to_png, to_svg
from tokenrec.analysis.figure_style import ReportFigure, Styles, figure_defaults
from tokenrec.analysis.html_table import HtmlTable
from tokenrec.analysis.model_styles import assign_styles
from tokenrec.analysis.rate_search import search_of
from tokenrec.analysis.study_files import StudyFiles, read_study
from tokenrec.analysis.summary import StudySummary, summarize_study
from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace, write_text_atomically

PAGE = "report.html"
FIGURES = "figures"

# A part of a section: HTML, a table, a figure, or nothing.
type Part = str | HtmlTable | ReportFigure | None


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the page, which needs no other file, no network and no script.

    Args:
      folders: folders of studies, as `tokenrec study` leaves them.
      out: folder for `report.html`, and for its figures as `figures/*.png`.

    Returns:
      Path of the page.

    Raises:
      InputError: `read_study` refuses a folder, two studies have one name, `out` is a
        file, or matplotlib is not installed.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out={out} is a file; name a folder")

    # 1. Read all studies before anything is written.
    studies: dict[str, tuple[StudyFiles, StudySummary]] = {}
    for folder in folders:
        files = read_study(folder)
        name = _identifier(files.info.study)
        if name in studies:
            raise InputError(
                f"--study={folder} holds the study '{files.info.study}' again; name "
                "each study once"
            )
        studies[name] = files, summarize_study(files)

    # 2. Draw section by section. A model has one style in all studies.
    styles = assign_styles(
        model for _, summary in studies.values() for model in summary.models
    )
    sections = []
    with figure_defaults():
        for name, (files, summary) in studies.items():
            parts = [
                _render(part, name, out)
                for part in _section_parts(files, summary, styles)
            ]
            heading = report_page.breakable(files.info.study)
            sections.append(
                "\n".join(
                    [
                        f'<section><h2 id="{name}">{heading}</h2>',
                        *parts,
                        report_page.missing_files(files),
                        report_page.base_config(files),
                        "</section>",
                    ]
                )
            )

    # 3. Write the page.
    words = ["tokenrec", "report", *(f"--study={folder}" for folder in folders)]
    page = report_page.page(
        {name: files.info.study for name, (files, _) in studies.items()},
        sections,
        command=shlex.join([*words, f"--out={out}"]),
        figures=FIGURES,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / PAGE, page)
    return out / PAGE


def _identifier(study: str) -> str:
    """
    >>> _identifier("KuaiRand pure, v2"), _identifier("?")
    ('kuairand-pure-v2', 'study')
    """
    return re.sub(r"[^a-z0-9]+", "-", study.lower()).strip("-") or "study"


def _section_parts(
    files: StudyFiles, summary: StudySummary, styles: Styles
) -> Iterator[Part]:
    """Yield the parts of the section of a study, in order."""
    yield report_page.conclusions(files, summary)
    yield "<h3>What was run</h3>"
    yield report_page.facts(files)
    yield report_page.commands(files)
    yield result_tables.models_table(files, summary, styles)
    yield result_tables.positives_table(files)
    for split, tasks in summary.tasks.items():
        yield f"<h3>Quality on {escape(split)}</h3>"
        is_main = split == summary.main_split
        if is_main:
            yield quality_figures.draw_differences(summary, styles)
        for task in tasks:
            yield result_tables.quality_table(summary, split, task, styles)
        if is_main:
            yield result_tables.differences_table(summary)
        if is_main and files.reliability is not None:
            yield quality_figures.draw_reliability(files.reliability, summary, styles)
    yield "<h3>Learning-rate search</h3>"
    yield result_tables.search_table(search_of(files.results), summary.rates)
    yield from _cost_parts(files, summary, styles)
    yield from _state_parts(files, summary, styles)


def _cost_parts(
    files: StudyFiles, summary: StudySummary, styles: Styles
) -> Iterator[Part]:
    """Yield learning curves and quality against FLOPs, of the tables that exist."""
    figures = []
    if files.curves is not None:
        figures.append(quality_figures.draw_curves(files.curves, summary, styles))
    if files.flops is not None:
        figures.append(quality_figures.draw_quality(files.flops, summary, styles))
    if any(figures):
        yield "<h3>Training and cost</h3>"
        yield from figures


def _state_parts(
    files: StudyFiles, summary: StudySummary, styles: Styles
) -> Iterator[Part]:
    """Yield the measurements of states and attention, of the tables that exist."""
    tables = (
        files.ranks,
        files.spectra,
        files.information,
        files.attention,
        files.maps,
    )
    if any(table is not None for table in tables):
        yield f"<h3>{report_page.STATES_HEADING}</h3>"
    if files.ranks is not None:
        yield state_figures.draw_ranks(files.ranks, summary, styles)
        last = state_figures.last_ranks(files.ranks)
        yield result_tables.ranks_table(last, summary, styles)
    if files.spectra is not None:
        yield state_figures.draw_spectra(files.spectra, summary, styles)
    if files.information is not None:
        yield state_figures.draw_information(files.information, summary, styles)
    if files.attention is not None:
        yield attention_figures.draw_attention(files.attention, summary)
    if files.maps is not None:
        yield attention_figures.draw_maps(files.maps, summary)


def _render(part: Part, study: str, out: Path) -> str:
    """Turn a part into HTML, and write a figure as a file too.

    Args:
      part: the part.
      study: identifier of the study, a prefix of ids and file names.
      out: folder of the page.
    """
    if part is None or isinstance(part, str):
        return part or ""
    if isinstance(part, HtmlTable):
        return report_page.figure(
            "tabled", part.title, part.note, part.markup, part.no_claim
        )
    lay_out(part.figure)
    name = f"{study}-{part.name}"
    svg = to_svg(part.figure, name, f"{part.title}. {part.note}")
    png = out / FIGURES / f"{name}.png"
    png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_replace(png) as partial:
        partial.write_bytes(to_png(part.figure))
    # A figure is drawn for the width of a page; on a phone it scrolls.
    markup = f'<div class="scroll" tabindex="0">{svg}</div>'
    return report_page.figure("drawn", part.title, part.note, markup)

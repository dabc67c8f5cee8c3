"""HTML of tables: rows under headings, cells for models, numbers and differences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import NamedTuple

from tokenrec.analysis.model_styles import ModelStyle, legend_key
from tokenrec.analysis.study_metrics import Spread
from tokenrec.analysis.study_rows import Difference
from tokenrec.analysis.summary import verdict
from tokenrec.analysis.wording import DASH, decimal, interval_text, plain_spread


class HtmlTable(NamedTuple):
    """A table of the report.

    Attributes:
      title: its title, as text.
      note: what a reader must know to read it, as text.
      markup: the table as HTML.
      no_claim: why nothing is claimed from it, as text; empty if something may be.
    """

    title: str
    note: str
    markup: str
    no_claim: str = ""


class Column(NamedTuple):
    """Heading of a column; the cells of numeric columns are aligned to the right."""

    label: str
    numeric: bool = True


def table_markup(
    columns: Sequence[Column],
    groups: Iterable[tuple[str, Sequence[str]]],
    css_class: str = "",
) -> str:
    """Write a table.

    Args:
      columns: headings.
      groups: (heading, rows); a group without rows is left out. A row is the HTML of
        its cells, or a whole `<tr>`.
      css_class: class of the table.
    """
    head = "".join(
        f'<th scope="col"{" class=number" if column.numeric else ""}>'
        f"{escape(column.label)}</th>"
        for column in columns
    )
    bodies = []
    for heading, rows in groups:
        if not rows:
            continue
        title = ""
        if heading:
            cell = f'<th colspan="{len(columns)}">{escape(heading)}</th>'
            title = f'<tr class="group">{cell}</tr>'
        lines = "\n".join(
            row if row.startswith("<tr") else f"<tr>{row}</tr>" for row in rows
        )
        bodies.append(f"<tbody>{title}\n{lines}\n</tbody>")
    opening = f'<table class="{css_class}">' if css_class else "<table>"
    # A table that is wider than a phone scrolls by itself, not with the page.
    return (
        f'<div class="scroll" tabindex="0">{opening}\n<thead><tr>{head}</tr></thead>\n'
        f"{''.join(bodies)}</table></div>"
    )


def model_cell(model: str, styles: Mapping[str, ModelStyle]) -> str:
    """Cell with the name of a model and, if it is trained, its line and marker."""
    key = legend_key(styles[model]) if model in styles else ""
    return f'<th scope="row">{key}{escape(model)}</th>'


def number_cell(text: str, css_class: str = "") -> str:
    """Cell of a numeric column; `text` is escaped."""
    return f'<td class="{f"number {css_class}".strip()}">{escape(text)}</td>'


def spread_markup(value: Spread | None, places: int = 4) -> str:
    """HTML of mean and deviation.

    A missing deviation keeps its width, so that digits stand below digits.
    """
    # `plain_spread` decides whether there is a deviation.
    text = DASH if value is None else plain_spread(value, places)
    mean, sign, deviation = text.partition(" ± ")
    return (
        f'<span class="value">{mean}</span>'
        f'<span class="deviation">{sign}{deviation}</span>'
    )


def difference_markup(difference: Difference | None) -> str:
    """HTML of a difference and its interval, on a line below the value."""
    # Kept as an invisible line, so that values of a row stand side by side.
    if difference is None or verdict(difference) == "unknown":
        return f'<span class="gap none">{DASH}</span>'
    text = f"{decimal(difference.difference, sign=True)} {interval_text(difference)}"
    if verdict(difference) == "equal":
        return f'<span class="gap equal">≈ {text}</span>'
    return f'<span class="gap">{text}</span>'

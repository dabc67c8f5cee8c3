"""Draw results of `benchmarks.attention`, in the style of the study report.

    python -m benchmarks.plot                    # benchmarks/results/attention.json
    python -m benchmarks.plot RESULT.json ...

Each JSON file is drawn to a PNG of its name beside it; nothing is measured again.
matplotlib is optional (extra `bench`), and loaded when a picture is drawn.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import run_script
from tokenrec.analysis.figure_files import lay_out, to_png
from tokenrec.analysis.figure_style import (
    PAPER,
    figure_defaults,
    make_panels,
    require_matplotlib,
)
from tokenrec.analysis.model_styles import ModelStyle, assign_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dashes of the first, second, ... window, in line widths; a solid line first.
WINDOW_DASHES: tuple[tuple[float, ...], ...] = ((), (4, 1.5), (1, 1), (6, 1, 1, 1))
PANEL_HEIGHT = 3.6  # inches
PASS_NAMES = {"forward": "forward", "forward_backward": "forward and backward"}

Rows = Sequence[Mapping[str, Any]]


def line_label(row: Mapping[str, Any]) -> str:
    """Name the line of a row: implementation and window."""
    window = row["window"]
    return f"{row['implementation']}, " + (
        "full" if window == "full" else f"window {window}"
    )


def line_styles(rows: Rows) -> dict[str, ModelStyle]:
    """Label -> style: a colour and marker per implementation, a line per window."""
    by_name = assign_styles(row["implementation"] for row in rows)
    windows = list(dict.fromkeys(row["window"] for row in rows))
    styles = {}
    # By window, then by implementation: a legend fills its columns first.
    for row in sorted(rows, key=lambda row: windows.index(row["window"])):
        number = windows.index(row["window"])
        dashes = WINDOW_DASHES[number % len(WINDOW_DASHES)]
        style = by_name[row["implementation"]]
        styles[line_label(row)] = style._replace(dashes=dashes)
    return styles


def plot_throughput(rows: Rows, path: Path) -> None:
    """Draw tokens a second against length, both logarithmic.

    There is a panel for every mesh, dtype and pass.

    Args:
      rows: rows of a result of `benchmarks.attention`.
      path: the PNG file.

    Raises:
      InputError: matplotlib is not installed.
    """
    require_matplotlib()
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        title = f"{PASS_NAMES[row['pass']]}, {row['dtype']}, mesh {row['mesh']}"
        panels.setdefault(title, []).append(row)
    styles = line_styles(rows)
    lengths = sorted({row["seq_len"] for row in rows})
    with figure_defaults():
        figure, axes = make_panels(
            panels, PANEL_HEIGHT, across=2, sharex=True, sharey=True
        )
        for ax, panel in zip(axes, panels.values(), strict=True):
            _draw_panel(ax, panel, styles, lengths)
        axes[0].set_ylabel("tokens / second")
        _add_legend(figure, styles, columns=len({row["window"] for row in rows}))
        lay_out(figure)
        path.write_bytes(to_png(figure))


def _draw_panel(
    ax: Axes, rows: Rows, styles: Mapping[str, ModelStyle], lengths: Sequence[int]
) -> None:
    """Draw the lines of one panel.

    Args:
      ax: the panel.
      rows: its rows.
      styles: label -> style.
      lengths: lengths of all panels, the ticks of the axis.
    """
    from matplotlib.ticker import LogLocator

    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        point = row["seq_len"], row["tokens_per_second"]
        lines.setdefault(line_label(row), []).append(point)
    for label, points in lines.items():
        x, y = zip(*sorted(points), strict=True)
        ax.plot(x, y, markersize=5, **styles[label].line_arguments(PAPER))
    ax.set(xscale="log", yscale="log", xlabel="sequence length, tokens")
    ax.set_xticks(lengths, labels=[f"{length:,}" for length in lengths])
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    # Not the default powers of ten: the style does not parse mathematics.
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.minorticks_off()


def _add_legend(figure: Figure, styles: Mapping[str, ModelStyle], columns: int) -> None:
    """Add one legend below all panels, with a column for every window."""
    from matplotlib.lines import Line2D

    keys = [
        Line2D([], [], label=label, markersize=5, **style.line_arguments(PAPER))
        for label, style in styles.items()
    ]
    figure.legend(
        handles=keys, loc="outside lower center", ncols=columns, handlelength=3.2
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the results that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results",
        nargs="*",
        type=Path,
        default=[Path(__file__).parent / "results" / "attention.json"],
        help="JSON files of benchmarks.attention",
    )
    for path in parser.parse_args(argv).results:
        picture = path.with_suffix(".png")
        plot_throughput(json.loads(path.read_text())["rows"], picture)
        print(picture)


if __name__ == "__main__":
    run_script(main)

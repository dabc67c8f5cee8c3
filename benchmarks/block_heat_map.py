"""Draw a result of `benchmarks.attention_block`: MFU by mesh and length, as a heat map.

    python -m benchmarks.block_heat_map benchmarks/results/attention_block_v5p_4x4x4.json

matplotlib is optional (extra `bench`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import run_script
from tokenrec.analysis.figure_files import lay_out, to_png
from tokenrec.analysis.figure_style import PAPER, figure_defaults, make_panels

CELL_HEIGHT = 0.35  # inches


def plot_meshes(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw a panel for each width and window.

    Args:
      rows: of `benchmarks.attention_block`.
      path: file of the picture, .png.

    Raises:
      InputError: matplotlib is not installed.
    """
    keys = list(dict.fromkeys((row["width"], row["window"]) for row in rows))
    meshes = list(dict.fromkeys(row["mesh"] for row in rows))
    lengths = sorted({row["seq_len"] for row in rows})
    with figure_defaults():
        titles = [_title(width, window) for width, window in keys]
        height = 1.2 + CELL_HEIGHT * len(meshes)
        figure, axes = make_panels(titles, height)
        for (width, window), panel in zip(keys, axes, strict=True):
            by_cell = {
                (row["mesh"], row["seq_len"]): row
                for row in rows
                if (row["width"], row["window"]) == (width, window)
            }
            shares = [
                [by_cell.get((mesh, length), {}).get("mfu", 0.0) for length in lengths]
                for mesh in meshes
            ]
            panel.imshow(shares, aspect="auto", cmap="Blues", vmin=0.0, vmax=1.0)
            for line, cells in enumerate(shares):
                for column, share in enumerate(cells):
                    text = f"{share:.0%}" if share else "-"
                    color = PAPER if share > 0.5 else "black"
                    panel.text(
                        column, line, text, ha="center", va="center", color=color
                    )
            panel.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths])
            panel.set_yticks(range(len(meshes)), meshes)
            panel.set_xlabel("tokens of a stream")
            panel.grid(visible=False)
        lay_out(figure)
        path.write_bytes(to_png(figure))


def _title(width: int, window: int | str) -> str:
    attention = "full" if window == "full" else f"window {window}"
    return f"width {width:,}, {attention}: MFU by schedule"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", nargs="+", type=Path)
    for file in parser.parse_args().results:
        plot_meshes(json.loads(file.read_text())["rows"], file.with_suffix(".png"))


if __name__ == "__main__":
    run_script(main)

"""Pictures of benchmark results; matplotlib is optional and loaded when a picture is drawn."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import InputError


def require_matplotlib() -> None:
    """Raises InputError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(
            "a picture needs matplotlib, which is not installed; pip install 'tokenrec[bench]', or pass --no-png"
        )


def plot_throughput(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes tokens a second against length, both logarithmic: a panel per mesh, dtype and pass.

    A colour is an implementation and a line style is a window.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: it holds every figure in a global

    panels = list(
        dict.fromkeys((row["mesh"], row["dtype"], row["pass"]) for row in rows)
    )
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    windows = list(dict.fromkeys(row["window"] for row in rows))
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(5.5 * across, 4 * down), layout="constrained")
    axes = figure.subplots(
        down, across, squeeze=False, sharex=True, sharey=True
    ).ravel()
    for panel, ax in zip(panels, axes, strict=False):
        for name in names:
            for window in windows:
                line = [
                    (row["seq_len"], row["tokens_per_second"])
                    for row in rows
                    if (row["mesh"], row["dtype"], row["pass"]) == panel
                    and (row["implementation"], row["window"]) == (name, window)
                ]
                if line:
                    lengths, speeds = zip(*sorted(line), strict=True)
                    style = ("-", "--", ":", "-.")[windows.index(window) % 4]
                    label = (
                        f"{name}, {'full' if window == 'full' else f'window {window}'}"
                    )
                    ax.plot(
                        lengths,
                        speeds,
                        style,
                        marker="o",
                        color=f"C{names.index(name)}",
                        label=label,
                    )
        ax.set(
            xscale="log",
            yscale="log",
            xlabel="seq_len",
            ylabel="tokens / second",
            title=", ".join(panel),
        )
        ax.set_xticks(
            sorted({row["seq_len"] for row in rows}),
            labels=sorted({row["seq_len"] for row in rows}),
        )
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize="small")
    for ax in axes[len(panels) :]:
        ax.remove()
    figure.savefig(path, dpi=120)

"""Attention of two trained runs, soft tokens and text, on the same request: maps side by side, and mass by distance.

    python -m benchmarks.attention_maps --soft RUN --text RUN [--data DIR]

The runs are folders of `benchmarks/soft_tokens.py`, or any two ranking runs on one data set. The picture shows one
request of the split with its first candidate, a column per layer, mean over heads. The table is the mean over
`--requests` requests: what events and candidates look at.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.plot import require_matplotlib
from benchmarks.report import run_script, write_result
from tokenrec.analysis.attention_maps import AttentionMaps, run_maps
from tokenrec.analysis.attention_mass import attention_mass
from tokenrec.errors import InputError
from tokenrec.tokens.layout import ROLES

FAINTEST = 1e-3  # of the colours, which are logarithmic
NARROWEST = 0.05  # of a map's side, between two labels


def mass_rows(name: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """A row per layer for what events, and for what candidates, look at; mean over requests, rows and heads."""
    rows = []
    for reader in ("event", "target"):
        for layer, weights in enumerate(maps.weights):
            mass = attention_mass(weights, maps.layout, maps.valid).get(reader)
            if mass is not None:
                seen = {kind: float(of_head.mean()) for kind, of_head in mass.items()}
                rows.append({"run": name, "reader": reader, "layer": layer} | seen)
    return rows


def one_request(
    maps: AttentionMaps, request: int
) -> tuple[list[np.ndarray], list[str]]:
    """AttentionMaps of a request with its first candidate, mean over heads: `[S', S']` of each layer, and the rows' roles."""
    shown = np.flatnonzero((maps.layout.candidate < 1) & maps.valid[request])
    names = [ROLES[role] for role in maps.layout.roles[shown]]
    return [
        weights[request].mean(axis=0)[np.ix_(shown, shown)] for weights in maps.weights
    ], names


def part_labels(
    names: Sequence[str], edges: Sequence[int]
) -> tuple[list[float], list[str]]:
    """Places and names of the parts of a stream; parts too narrow for two lines of print share one.

    >>> part_labels(["user"] * 30 + ["event"] * 60 + ["query", "target"], [30, 90, 91])
    ([14.5, 59.5, 90.5], ['user', 'event', 'query, target'])
    """
    runs: list[list[int]] = []
    for first, last in zip([0, *edges], [*edges, len(names)], strict=True):
        if runs and (last - runs[-1][0]) / 2 < NARROWEST * len(names):
            runs[-1][1] = last
        else:
            runs.append([first, last])
    labels = [", ".join(dict.fromkeys(names[first:last])) for first, last in runs]
    return [(first + last - 1) / 2 for first, last in runs], labels


def plot_maps(
    maps: Mapping[str, Sequence[np.ndarray]],
    roles: Mapping[str, Sequence[str]],
    path: Path,
) -> None:
    """Writes a picture: a row per run, a column per layer, lines between the parts of the stream."""
    require_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # no pyplot: it holds every figure in a global

    layers = max(len(of_run) for of_run in maps.values())
    figure = Figure(figsize=(3.2 * layers + 1, 3.2 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), layers, squeeze=False)
    for line, (name, of_run) in zip(axes, maps.items(), strict=True):
        names = list(roles[name])
        edges = [at for at in range(1, len(names)) if names[at] != names[at - 1]]
        middles, parts = part_labels(names, edges)
        for layer, (ax, weights) in enumerate(zip(line, of_run, strict=False)):
            colours = LogNorm(FAINTEST, 1)
            image = ax.imshow(
                np.maximum(weights, FAINTEST),
                norm=colours,
                interpolation="nearest",
                cmap="magma",
            )
            for at in edges:
                ax.axhline(at - 0.5, color="w", linewidth=0.4)
                ax.axvline(at - 0.5, color="w", linewidth=0.4)
            ax.set_xticks(middles, labels=parts, rotation=90, fontsize="x-small")
            ax.set_yticks(
                middles,
                labels=parts if layer == 0 else [""] * len(parts),
                fontsize="x-small",
            )
            ax.set_title(
                f"{name}, layer {layer}, {len(names)} tokens", fontsize="small"
            )
        for ax in line[len(of_run) :]:
            ax.remove()
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention, mean over heads")
    figure.savefig(path, dpi=100)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--soft",
        type=Path,
        required=True,
        help="folder of a trained run with soft tokens",
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="folder of a trained run with text"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="prepared data set, if it is not where the runs read it",
    )
    parser.add_argument("--split", default="valid")
    parser.add_argument(
        "--requests",
        type=int,
        default=16,
        help="requests that the table is the mean of",
    )
    parser.add_argument(
        "--request",
        type=int,
        help="of these, the one in the picture; default: the longest history",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "attention_maps"
    )
    flags = parser.parse_args(argv)
    require_matplotlib()  # before the work, not after it
    if flags.requests < 1 or not 0 <= (flags.request or 0) < flags.requests:
        raise InputError(
            f"--request {flags.request}: choose one of the {flags.requests} of --requests, from 0"
        )
    found = {
        name: run_maps(folder, flags.data, flags.split, flags.requests)
        for name, folder in (("soft", flags.soft), ("text", flags.text))
    }
    soft, text = found["soft"], found["text"]
    for name, maps in found.items():
        if not maps.layout.candidates:
            raise InputError(
                f"--{name} is a run without candidates; give one that ranks, in paradigm 'nio'"
            )
    if not np.array_equal(soft.rows, text.rows):
        raise InputError(
            "--soft and --text ask different requests; give runs on one data set with equal data.candidates"
        )
    longest = int(np.argmax(soft.valid.sum(axis=1)))
    request = longest if flags.request is None else flags.request
    params = {
        "split": flags.split,
        "requests": flags.requests,
        "picture": f"request {request}",
        "steps": f"{soft.step:,} soft, {text.step:,} text",
        "mean": "over requests, real rows and heads",
    }
    words = [
        "python -m benchmarks.attention_maps --soft RUN --text RUN",
        f"--split {flags.split}",
    ]
    command = " ".join([*words, f"--requests {flags.requests} --request {request}"])
    rows = [row for name, maps in found.items() for row in mass_rows(name, maps)]
    write_result(
        flags.out, rows, params, command, title="Attention of soft tokens and of text"
    )
    shown = {name: one_request(maps, request) for name, maps in found.items()}
    picture = flags.out.with_name(flags.out.name + ".png")
    plot_maps(
        {n: maps for n, (maps, _) in shown.items()},
        {n: names for n, (_, names) in shown.items()},
        picture,
    )
    page = flags.out.with_name(flags.out.name + ".md")
    with page.open("a") as file:
        file.write(
            "\nEvents are counted back from the reader's own event, and for a candidate from the end of the history, "
            f"whose newest event is 1 back.\n\n![Attention maps]({picture.name})\n"
        )
    print(page.read_text())


if __name__ == "__main__":
    run_script(main)

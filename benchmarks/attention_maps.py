"""Attention maps of two trained runs, soft tokens and text, on the same request.

    python -m benchmarks.attention_maps --soft RUN --text RUN [--data DIR]

The runs are folders of `benchmarks/soft_tokens.py`, or any two ranking runs on one data
set. The picture shows one request of the split with its first candidate: a line of maps
per run, a column per layer, mean over heads. The table says what events and candidates
attend to, by distance, as the mean over `--requests` requests.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from tokenrec.analysis.attention_maps import Maps, attention_mass, run_maps
from tokenrec.analysis.figure_style import require_matplotlib
from tokenrec.errors import InputError
from tokenrec.tokens.layout import ROLES

# Least attention that the colours show; they are logarithmic.
FAINTEST = 1e-3
# Least distance of two labels, as a share of a map's side.
NARROWEST = 0.05


def mass_rows(name: str, maps: Maps) -> list[dict[str, Any]]:
    """Compute what events and candidates attend to, a row per reader and layer.

    Figures are means over requests, valid tokens and heads.

    Args:
      name: name of the run.
      maps: its attention maps.
    """
    rows = []
    for reader in ("event", "target"):
        for layer, weights in enumerate(maps.weights):
            mass = attention_mass(weights, maps.layout, maps.valid).get(reader)
            if mass is not None:
                means = {kind: float(by_head.mean()) for kind, by_head in mass.items()}
                rows.append({"run": name, "reader": reader, "layer": layer} | means)
    return rows


def one_request(maps: Maps, request: int) -> tuple[list[np.ndarray], list[str]]:
    """Take the maps of one request with its first candidate, mean over heads.

    Args:
      maps: attention maps of a run.
      request: number of the request.

    Returns:
      `[S', S']` for each layer, over the S' valid tokens, and the tokens' roles.
    """
    tokens = np.flatnonzero((maps.layout.candidate < 1) & maps.valid[request])
    names = [ROLES[role] for role in maps.layout.roles[tokens]]
    return [
        weights[request].mean(axis=0)[np.ix_(tokens, tokens)]
        for weights in maps.weights
    ], names


def part_labels(
    names: Sequence[str], edges: Sequence[int]
) -> tuple[list[float], list[str]]:
    """Place the labels of the parts of a stream.

    Parts too narrow for two lines of print share one label.

    >>> part_labels(["user"] * 30 + ["event"] * 60 + ["query", "target"], [30, 90, 91])
    ([14.5, 59.5, 90.5], ['user', 'event', 'query, target'])

    Args:
      names: role of each token.
      edges: first tokens of all parts but the first.

    Returns:
      Middle and text of each label.
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
    """Draw maps: a line per run, a column per layer, edges between parts of the stream.

    Args:
      maps: run -> `[S', S']` for each layer.
      roles: run -> role of each of its S' tokens.
      path: the PNG file.
    """
    require_matplotlib()
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure  # no pyplot: it holds every figure in a global

    layers = max(len(of_run) for of_run in maps.values())
    figure = Figure(figsize=(3.2 * layers + 1, 3.2 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), layers, squeeze=False)
    for line, (name, of_run) in zip(axes, maps.items(), strict=True):
        names = list(roles[name])
        edges = [
            token for token in range(1, len(names)) if names[token] != names[token - 1]
        ]
        middles, parts = part_labels(names, edges)
        for layer, (ax, weights) in enumerate(zip(line, of_run, strict=False)):
            image = ax.imshow(
                np.maximum(weights, FAINTEST),
                norm=LogNorm(FAINTEST, 1),
                interpolation="nearest",
                cmap="magma",
            )
            for edge in edges:
                ax.axhline(edge - 0.5, color="w", linewidth=0.4)
                ax.axvline(edge - 0.5, color="w", linewidth=0.4)
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


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--soft",
        type=Path,
        required=True,
        help="folder of a trained run with soft tokens",
    )
    add("--text", type=Path, required=True, help="folder of a trained run with text")
    add(
        "--data",
        type=Path,
        help="prepared data set, if it is not where the runs read it",
    )
    add("--split", default="valid")
    add(
        "--requests",
        type=int,
        default=16,
        help="requests that the table is the mean of",
    )
    add(
        "--request",
        type=int,
        help="of these, the one in the picture; default: the longest history",
    )
    add(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results" / "attention_maps",
        help="stem of the result files",
    )
    return parser


def read_maps(flags: argparse.Namespace) -> dict[str, Maps]:
    """Compute the maps of both runs, "soft" and "text".

    Raises:
      InputError: a run has no candidates, or the two read different requests.
    """
    maps = {
        name: run_maps(folder, flags.data, flags.split, flags.requests)
        for name, folder in (("soft", flags.soft), ("text", flags.text))
    }
    for name, of_run in maps.items():
        if not of_run.layout.candidates:
            raise InputError(
                f"--{name} is a run without candidates; give one that ranks, in "
                "paradigm 'nio'"
            )
    if not np.array_equal(maps["soft"].rows, maps["text"].rows):
        raise InputError(
            "--soft and --text read different requests; give runs on one data set with "
            "equal data.candidates"
        )
    return maps


def main(argv: Sequence[str] | None = None) -> None:
    """Write table and picture, and print the page."""
    flags = make_parser().parse_args(argv)
    require_matplotlib()  # before the work, not after it
    if flags.requests < 1 or not 0 <= (flags.request or 0) < flags.requests:
        raise InputError(
            f"--request {flags.request} is out of range; choose one of the "
            f"{flags.requests} of --requests, from 0"
        )
    maps = read_maps(flags)
    soft, text = maps["soft"], maps["text"]
    longest = int(np.argmax(soft.valid.sum(axis=1)))
    request = longest if flags.request is None else flags.request
    command = (
        "python -m benchmarks.attention_maps --soft RUN --text RUN "
        f"--split {flags.split} --requests {flags.requests} --request {request}"
    )
    write_result(
        flags.out,
        [row for name, of_run in maps.items() for row in mass_rows(name, of_run)],
        {
            "split": flags.split,
            "requests": flags.requests,
            "picture": f"request {request}",
            "steps": f"{soft.step:,} soft, {text.step:,} text",
            "mean": "over requests, real rows and heads",
        },
        command,
        title="Attention of soft tokens and of text",
    )
    drawn = {name: one_request(of_run, request) for name, of_run in maps.items()}
    picture = flags.out.with_name(flags.out.name + ".png")
    plot_maps(
        {name: of_run for name, (of_run, _) in drawn.items()},
        {name: roles for name, (_, roles) in drawn.items()},
        picture,
    )
    page = flags.out.with_name(flags.out.name + ".md")
    with page.open("a") as file:
        file.write(
            "\nEvents are counted back from the reader's own event, and for a "
            "candidate from the end of the history, whose newest event is 1 back.\n\n"
            f"![Attention maps]({picture.name})\n"
        )
    print(page.read_text())


if __name__ == "__main__":
    run_script(main)

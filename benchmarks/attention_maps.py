"""Compare the attention of two runs, soft tokens and text, on the same requests.

    python -m benchmarks.attention_maps --soft RUN --text RUN [--data DIR]

The runs are folders of `benchmarks/soft_tokens.py`, or any two ranking runs on one data
set. The picture shows one request of the split with its first candidate, a column for
each layer, mean over heads. The table has the attention mass from events and from
candidates, mean over `--requests` requests (docs/methods.md section 5).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.report import run_script, write_result
from tokenrec.analysis.attention_figures import LEAST_SHARE
from tokenrec.analysis.attention_maps import AttentionMaps, run_maps
from tokenrec.analysis.attention_mass import attention_mass
from tokenrec.analysis.figure_style import require_matplotlib
from tokenrec.errors import InputError
from tokenrec.tokens.layout import ROLES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# Least distance of two labels, as a share of the side of a map.
_LABEL_GAP = 0.05


def mass_rows(name: str, maps: AttentionMaps) -> list[dict[str, Any]]:
    """Make a table row for each layer, for events and for candidates as queries.

    Args:
      name: name of the run.
      maps: its attention.

    Returns:
      Rows with the mass on each part of the stream, mean over requests, queries and
      heads.
    """
    rows = []
    for query in ("event", "target"):
        for layer, weights in enumerate(maps.weights):
            mass = attention_mass(weights, maps.layout, maps.valid).get(query)
            if mass is not None:
                shares = {part: float(by_head.mean()) for part, by_head in mass.items()}
                rows.append({"run": name, "reader": query, "layer": layer} | shares)
    return rows


def one_request(
    maps: AttentionMaps, request: int
) -> tuple[list[np.ndarray], list[str]]:
    """Select the maps of a request with its first candidate, without padding.

    Args:
      maps: attention of a run.
      request: number of the request.

    Returns:
      `[S', S']` for each layer, mean over heads, and the roles of the S' positions.
    """
    # Candidate -1 stands for the positions that all candidates share.
    is_shown = (maps.layout.candidate < 1) & maps.valid[request]
    positions = np.flatnonzero(is_shown)
    roles = [ROLES[role] for role in maps.layout.roles[positions]]
    layers = [
        weights[request].mean(axis=0)[np.ix_(positions, positions)]
        for weights in maps.weights
    ]
    return layers, roles


def part_labels(
    names: Sequence[str], edges: Sequence[int]
) -> tuple[list[float], list[str]]:
    """Place a label in the middle of each part of a stream.

    Neighbours that are too narrow for a label each share one.

    Args:
      names: role of each position.
      edges: first positions of all parts but the first.

    Returns:
      Places and texts of the labels.

    >>> part_labels(["user"] * 30 + ["event"] * 60 + ["query", "target"], [30, 90, 91])
    ([14.5, 59.5, 90.5], ['user', 'event', 'query, target'])
    """
    runs: list[list[int]] = []
    for first, last in zip([0, *edges], [*edges, len(names)], strict=True):
        if runs and (last - runs[-1][0]) / 2 < _LABEL_GAP * len(names):
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
    """Write a picture: a row for each run, a column for each layer.

    Args:
      maps: run -> `[S, S]` for each layer, queries by keys.
      roles: run -> role of each position.
      path: PNG file.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # no pyplot: it holds every figure in a global

    layers = max(len(of_run) for of_run in maps.values())
    figure = Figure(figsize=(3.2 * layers + 1, 3.2 * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), layers, squeeze=False)
    for row, (name, of_run) in zip(axes, maps.items(), strict=True):
        names = list(roles[name])
        for layer, (ax, weights) in enumerate(zip(row, of_run, strict=False)):
            image = _draw_map(ax, weights, names, label_rows=layer == 0)
            ax.set_title(
                f"{name}, layer {layer}, {len(names)} tokens", fontsize="small"
            )
        # A run may have fewer layers than the other.
        for ax in row[len(of_run) :]:
            ax.remove()
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention, mean over heads")
    figure.savefig(path, dpi=100)


def _draw_map(
    ax: Axes, weights: np.ndarray, names: Sequence[str], *, label_rows: bool
) -> AxesImage:
    """Draw one map, with lines between the parts of the stream and their names."""
    from matplotlib.colors import LogNorm

    edges = [at for at in range(1, len(names)) if names[at] != names[at - 1]]
    middles, parts = part_labels(names, edges)
    image = ax.imshow(
        np.maximum(weights, LEAST_SHARE),
        norm=LogNorm(LEAST_SHARE, 1),
        interpolation="nearest",
        cmap="magma",
    )
    for edge in edges:
        ax.axhline(edge - 0.5, color="w", linewidth=0.4)
        ax.axvline(edge - 0.5, color="w", linewidth=0.4)
    row_labels = parts if label_rows else [""] * len(parts)
    ax.set_xticks(middles, labels=parts, rotation=90, fontsize="x-small")
    ax.set_yticks(middles, labels=row_labels, fontsize="x-small")
    return image


def compare(
    maps: Mapping[str, AttentionMaps],
    request: int | None,
    params: Mapping[str, Any],
    out: Path,
) -> str:
    """Write the table and the picture of two runs.

    Args:
      maps: "soft" and "text" -> attention.
      request: the request of the picture; None for that with the longest history.
      params: settings of the measurement: split and requests.
      out: path of the result without its suffix.

    Returns:
      The page.
    """
    soft, text = maps["soft"], maps["text"]
    if request is None:
        request = int(np.argmax(soft.valid.sum(axis=1)))
    command = (
        "python -m benchmarks.attention_maps --soft RUN --text RUN "
        f"--split {params['split']} --requests {params['requests']} --request {request}"
    )
    settings = {
        **params,
        "picture": f"request {request}",
        "steps": f"{soft.step:,} soft, {text.step:,} text",
        "mean": "over requests, real rows and heads",
    }
    rows = [row for name, of_run in maps.items() for row in mass_rows(name, of_run)]
    write_result(
        out, rows, settings, command, title="Attention of soft tokens and of text"
    )
    pictures = {name: one_request(of_run, request) for name, of_run in maps.items()}
    picture = out.with_name(out.name + ".png")
    plot_maps(
        {name: layers for name, (layers, _) in pictures.items()},
        {name: roles for name, (_, roles) in pictures.items()},
        picture,
    )
    page = out.with_name(out.name + ".md")
    with page.open("a") as file:
        file.write(
            "\nEvents are counted back from the reader's own event, and for a "
            "candidate from the end of the history, whose newest event is 1 back.\n\n"
            f"![Attention maps]({picture.name})\n"
        )
    return page.read_text()


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
        help="the one of these in the picture; default: the longest history",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "attention_maps"
    )
    flags = parser.parse_args(argv)
    # Before the measurement, not after it.
    require_matplotlib()
    if flags.requests < 1 or not 0 <= (flags.request or 0) < flags.requests:
        raise InputError(
            f"--request {flags.request}: choose one of the {flags.requests} of "
            "--requests, from 0"
        )
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
    params = {"split": flags.split, "requests": flags.requests}
    print(compare(maps, flags.request, params, flags.out))


if __name__ == "__main__":
    run_script(main)

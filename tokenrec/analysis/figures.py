"""The figures of a study. Each takes what it shows, and returns None where there is nothing to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from tokenrec.analysis.figure_style import INK, PALE, Style, add_legend, make_panels
from tokenrec.analysis.study_files import (
    MACRO,
    Cell,
    CurvePoint,
    Information,
    Mass,
    Rank,
    SingularValue,
)
from tokenrec.analysis.summary import (
    MetricKey,
    Spread,
    Summary,
    higher_is_better,
    spread,
    verdict,
)
from tokenrec.analysis.wording import layer_name, metric_name, si_number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_CURVES = ("train/loss", f"valid/{MACRO}_auc", "valid/ndcg@10")
_RANK = "rank/layer_"
LEAST_SHARE = 1e-3  # of attention that a map tells from nothing

type Styles = Mapping[str, Style]


class Drawing(NamedTuple):
    """A figure, the name of its file, its title, and what one must know to read it."""

    name: str
    title: str
    note: str
    figure: Figure


def draw_differences(summary: Summary, styles: Styles) -> Drawing | None:
    """Model minus reference with its interval: a panel for each task of which something is claimed."""
    places = [
        MetricKey(summary.main_split, task, summary.headline)
        for task in summary.claimed_tasks
    ]
    gaps = {
        place: summary.differences[place]
        for place in places
        if summary.differences.get(place)
    }
    models = [
        model
        for model in summary.models
        if any(model in of_place for of_place in gaps.values())
    ]
    if not models:
        return None
    figure, axes = make_panels(
        (place.task for place in gaps), 0.9 + 0.24 * len(models), sharey=True
    )
    for ax, found in zip(axes, gaps.values(), strict=True):
        for row, model in enumerate(models):
            gap = found.get(model)
            if (
                gap is None
                or gap.difference is None
                or gap.low is None
                or gap.high is None
            ):
                continue
            equal = verdict(gap) == "equal"
            colour = PALE if equal else styles[model].colour
            ax.plot([gap.low, gap.high], [row, row], color=colour, linewidth=1.6)
            ax.plot(
                gap.difference,
                row,
                "o",
                color=colour,
                markerfacecolor="white" if equal else colour,
            )
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.set(
            yticks=range(len(models)),
            yticklabels=models,
            ylim=(len(models) - 0.4, -0.6),
        )
        ax.grid(axis="y", visible=False)
        ax.locator_params(axis="x", nbins=5)
        ax.set_xlabel(
            f"{metric_name(summary.headline)} minus that of {summary.reference}"
        )
    side = "right" if higher_is_better(summary.headline) else "left"
    note = (
        f"On {summary.main_split}; better is to the {side}. Bars are 95 % intervals of a paired bootstrap over users; "
        "hollow and grey: the interval contains 0, so the model is not distinguishable from the reference. Rate "
        "baselines are in the tables."
    )
    return Drawing("differences", f"Difference to {summary.reference}", note, figure)


def draw_curves(
    points: Sequence[CurvePoint], summary: Summary, styles: Styles
) -> Drawing | None:
    """Mean over seeds at the chosen rates, and a band of one deviation, as far as all seeds of a model came.

    Where runs logged effective ranks, that of the top layer of the deepest is shown, too.
    """
    ranked = {point.name for point in points if point.name.startswith(_RANK)}
    shown = (
        *_CURVES,
        *sorted(ranked, key=lambda name: int(name.removeprefix(_RANK)))[-1:],
    )
    values: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for point in points:
        if point.name in shown and point.learning_rate == summary.rates.get(
            point.model
        ):
            by_step = values.setdefault(point.name, {}).setdefault(point.model, {})
            by_step.setdefault(point.step, []).append(point.value)
    names = [name for name in shown if name in values]
    if not names:
        return None
    figure, axes = make_panels(names, 3.4)
    for ax, name in zip(axes, names, strict=True):
        for model, by_step in _in_order(values[name], summary.models):
            whole = {
                s: spread(v)
                for s, v in sorted(by_step.items())
                if len(v) == len(summary.seeds[model])
            }
            if whole:
                _draw_band(ax, whole, styles[model])
        ax.set(xlabel="step")
        ax.locator_params(axis="x", nbins=5)
    add_legend(
        figure,
        styles,
        (model for model in summary.models if any(model in v for v in values.values())),
    )
    note = "Mean over seeds at the chosen learning rate; the band is one deviation to either side."
    return Drawing("curves", "Learning curves", note, figure)


def draw_quality(
    flops: Mapping[str, float], summary: Summary, styles: Styles
) -> Drawing | None:
    """The headline metric against FLOPs of an example: a panel for each task of which something is claimed."""
    from matplotlib.ticker import LogLocator

    split = summary.main_split
    macro = (
        [MACRO]
        if MACRO in summary.tasks[split] and (split, MACRO) not in summary.no_claim
        else []
    )
    tasks = [*macro, *summary.claimed_tasks]
    models = [model for model in summary.models if model in flops]
    if not tasks or not models:
        return None
    figure, axes = make_panels(tasks, 3.2, sharex=True)
    for ax, task in zip(axes, tasks, strict=True):
        found = summary.spreads[MetricKey(split, task, summary.headline)]
        for model in models:
            of_model = found.get(model)
            if of_model is not None and of_model.mean is not None:
                deviation = of_model.deviation or 0
                style = styles[model].of_line() | {"linestyle": "none"}
                ax.errorbar(
                    flops[model],
                    of_model.mean,
                    yerr=deviation,
                    capsize=2,
                    markersize=6,
                    **style,
                )
        ax.set(
            xscale="log",
            xlabel="FLOPs of an example",
            ylabel=metric_name(summary.headline),
        )
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.xaxis.set_major_formatter(lambda flops, _: si_number(flops))
        ax.minorticks_off()
        ax.locator_params(axis="y", nbins=6)
    add_legend(figure, styles, models)
    missing = [model for model in summary.models if model not in flops]
    note = f"On {split}, mean and deviation over seeds. FLOPs are those of the forward pass."
    if missing:
        note += f" Without FLOPs: {', '.join(missing)}."
    return Drawing("quality-flops", "Quality against FLOPs", note, figure)


def last_ranks(ranks: Iterable[Rank]) -> dict[str, dict[int, Spread]]:
    """Effective rank of each model and layer at the last step of each seed, over seeds."""
    last: dict[tuple[str, int, int], Rank] = {}
    for row in ranks:
        key = (row.model, row.layer, row.seed)
        if key not in last or row.step > last[key].step:
            last[key] = row
    values: dict[str, dict[int, list[float | None]]] = {}
    for (model, layer, _), row in sorted(last.items()):
        values.setdefault(model, {}).setdefault(layer, []).append(row.effective_rank)
    return {
        model: {layer: spread(found) for layer, found in by_layer.items()}
        for model, by_layer in values.items()
    }


def draw_ranks(ranks: Sequence[Rank], summary: Summary, styles: Styles) -> Drawing:
    """By layer at the end of training, and of the top layer during it."""
    ends = last_ranks(ranks)
    during: dict[str, dict[int, list[float | None]]] = {}
    for row in ranks:
        if row.layer == max(ends[row.model]):
            during.setdefault(row.model, {}).setdefault(row.step, []).append(
                row.effective_rank
            )
    trained = any(len(by_step) > 1 for by_step in during.values())
    titles = [
        "by layer, at the last step",
        *(["top layer, during training"] if trained else []),
    ]
    figure, axes = make_panels(titles, 3.4, sharey=True)
    for model, by_layer in _in_order(ends, summary.models):
        _draw_band(axes[0], by_layer, styles[model])
    axes[0].set(xlabel="layer", ylabel="effective rank")
    layers = sorted({n for found in ends.values() for n in found})
    axes[0].set_xticks(
        layers, labels=[layer_name(n).removeprefix("layer ") for n in layers]
    )
    if trained:
        for model, by_step in _in_order(during, summary.models):
            _draw_band(
                axes[1],
                {step: spread(found) for step, found in sorted(by_step.items())},
                styles[model],
            )
        axes[1].set(xlabel="step")
        axes[1].locator_params(axis="x", nbins=5)
    add_legend(figure, styles, (model for model, _ in _in_order(ends, summary.models)))
    note = "Of the centred event states; mean over seeds, the band is one deviation to either side."
    return Drawing("ranks", "Effective rank of the event states", note, figure)


def draw_spectra(
    values: Sequence[SingularValue], summary: Summary, styles: Styles
) -> Drawing:
    """Singular values over the largest, geometric mean over seeds: a panel for each layer."""
    found: dict[int, dict[str, dict[int, dict[int, float]]]] = {}
    for row in values:
        of_seed = (
            found.setdefault(row.layer, {})
            .setdefault(row.model, {})
            .setdefault(row.seed, {})
        )
        of_seed[row.index] = row.singular_value
    figure, axes = make_panels(
        map(layer_name, sorted(found)), 2.8, sharex=True, sharey=True
    )
    for ax, layer in zip(axes, sorted(found), strict=True):
        for model, seeds in _in_order(found[layer], summary.models):
            shared = sorted(
                set.intersection(*(set(of_seed) for of_seed in seeds.values()))
            )
            sigma = np.array(
                [[of_seed[index] for index in shared] for of_seed in seeds.values()]
            )
            with np.errstate(
                divide="ignore"
            ):  # a singular value of 0 leaves the logarithmic axis
                line = np.exp(
                    np.log(sigma / sigma.max(axis=1, keepdims=True)).mean(axis=0)
                )
            style = styles[model].of_line() | {"marker": ""}
            ax.plot(np.array(shared) + 1, line, linewidth=1.4, **style)
        ax.set(yscale="log", xlabel="index")
        ax.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes[0].set_ylabel("singular value / largest")
    add_legend(
        figure,
        styles,
        dict.fromkeys(
            m for layer in found.values() for m, _ in _in_order(layer, summary.models)
        ),
    )
    note = "Of the centred event states, geometric mean over seeds. A steep fall is a collapse onto few directions."
    return Drawing("spectra", "Spectra of the event states", note, figure)


def draw_information(
    rows: Sequence[Information], summary: Summary, styles: Styles
) -> Drawing:
    """Of the top layer, against the number of clusters: a panel for each task."""
    top: dict[str, int] = {}
    for row in rows:
        top[row.model] = max(row.layer, top.get(row.model, row.layer))
    held: dict[str, dict[str, dict[int, list[float | None]]]] = {}
    for row in rows:
        if row.layer == top[row.model]:
            of_model = held.setdefault(row.task, {}).setdefault(row.model, {})
            of_model.setdefault(row.clusters, []).append(row.nats)
    figure, axes = make_panels(held, 3.0, sharey=True)
    for ax, of_task in zip(axes, held.values(), strict=True):
        for model, by_count in _in_order(of_task, summary.models):
            _draw_band(
                ax,
                {count: spread(found) for count, found in sorted(by_count.items())},
                styles[model],
            )
        ax.set(xlabel="clusters")
    axes[0].set_ylabel("nats")
    add_legend(figure, styles, (model for model, _ in _in_order(top, summary.models)))
    note = (
        "Mutual information of the cluster of a top-layer state with the label, less that with shuffled labels; mean "
        "over seeds, the band is one deviation to either side."
    )
    return Drawing(
        "information", "Information of the event states on the label", note, figure
    )


def draw_maps(cells: Sequence[Cell], summary: Summary) -> Drawing:
    """A row of panels for each model, one for each layer: who reads whom."""
    from matplotlib.colors import LogNorm

    held: dict[str, dict[int, list[Cell]]] = {}
    for cell in cells:
        held.setdefault(cell.model, {}).setdefault(cell.layer, []).append(cell)
    across = max(len(layers) for layers in held.values())
    panels = {
        (model, layer): sorted(
            layers.get(layer, []), key=lambda cell: (cell.query, cell.key)
        )
        for model, layers in _in_order(held, summary.models)
        for layer in range(across)
    }
    figure, axes = make_panels(
        (f"{model}, {layer_name(n)}" for model, n in panels), 1.9, across=across
    )
    for ax, (panel, found) in zip(axes, panels.items(), strict=True):
        if not found:  # a model of fewer layers
            ax.remove()
            continue
        queries, keys = (
            sorted({getattr(cell, side) for cell in found}) for side in ("query", "key")
        )
        table = np.zeros((len(queries), len(keys)))
        for cell in found:
            table[queries.index(cell.query), keys.index(cell.key)] = cell.value
        read = np.ma.masked_less_equal(table, 0.0)
        shares = LogNorm(LEAST_SHARE, 1.0, clip=True)
        image = ax.imshow(
            read, cmap="Blues", norm=shares, interpolation="nearest", aspect="auto"
        )
        image.set_gid(
            "-".join(map(str, panel))
        )  # else equal images have one id, which a page may hold once
        for axis, blocks in ((ax.xaxis, keys), (ax.yaxis, queries)):
            some = np.linspace(0, len(blocks) - 1, min(4, len(blocks))).astype(int)
            axis.set_ticks(some, labels=[str(blocks[n]) for n in some])
        ax.tick_params(labelsize=6, length=2)
        ax.set_title(f"{panel[0]}, {layer_name(panel[1])}", fontsize=7)
        ax.grid(visible=False)
    axes[0].set_ylabel("reads (row)", fontsize=7)
    axes[0].set_xlabel("is read (row)", fontsize=7)
    note = (
        "Mean over heads and streams; rows of the stream in blocks, named by their first. The darkest blue is a share "
        f"of 1, the palest of {LEAST_SHARE:g} or less, on a logarithmic scale; white is nothing: later rows, rows "
        "outside a window, and padding."
    )
    return Drawing("maps", "Attention maps", note, figure)


def draw_attention(rows: Sequence[Mass], summary: Summary) -> Drawing:
    """Mean over heads: a heat map of layers by sources for each model."""
    sources = list(dict.fromkeys(row.source for row in rows))
    held: dict[str, dict[int, dict[str, list[float]]]] = {}
    for row in rows:
        held.setdefault(row.model, {}).setdefault(row.layer, {}).setdefault(
            row.source, []
        ).append(row.value)
    maps = {
        model: np.array(
            [
                [np.mean(layers[n].get(source, [0.0])) for source in sources]
                for n in sorted(layers)
            ]
        )
        for model, layers in _in_order(held, summary.models)
    }
    depth = max(len(table) for table in maps.values())
    figure, axes = make_panels(maps, 1.2 + 0.25 * depth, across=2)
    largest = max(float(table.max()) for table in maps.values())
    for ax, (model, table) in zip(axes, maps.items(), strict=True):
        ax.pcolormesh(
            table,
            cmap="Blues",
            vmin=0,
            vmax=1.1 * largest,
            edgecolors="white",
            linewidth=0.5,
        )
        for (row, column), value in np.ndenumerate(table):
            colour = "white" if value > 0.6 * largest else INK
            words = f"{value:.2f}".lstrip("0")
            ax.text(
                column + 0.5,
                row + 0.5,
                words,
                ha="center",
                va="center",
                color=colour,
                fontsize=7,
            )
        ax.invert_yaxis()
        ax.set_xticks(
            np.arange(len(sources)) + 0.5,
            labels=sources,
            rotation=40,
            ha="right",
            rotation_mode="anchor",
        )
        ax.set_yticks(
            np.arange(len(table)) + 0.5, labels=[str(n) for n in sorted(held[model])]
        )
        ax.set_ylabel("layer")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        ax.grid(visible=False)
    note = "Share of attention that goes to each part of the stream, mean over heads."
    return Drawing("attention", "Attention mass", note, figure)


def _in_order[Value](
    found: Mapping[str, Value], models: Iterable[str]
) -> list[tuple[str, Value]]:
    return [(model, found[model]) for model in models if model in found]


def _draw_band(ax: Axes, line: Mapping[int, Spread], style: Style) -> None:
    places = np.array(list(line))
    mean = np.array([np.nan if s.mean is None else s.mean for s in line.values()])
    deviation = np.array(
        [np.nan if s.deviation is None else s.deviation for s in line.values()]
    )
    looks = style.of_line() | (
        {"marker": ""} if len(places) > 20 else {"markersize": 4}
    )
    ax.plot(places, mean, linewidth=1.5, **looks)
    ax.fill_between(
        places,
        mean - deviation,
        mean + deviation,
        color=style.colour,
        alpha=0.12,
        linewidth=0,
    )

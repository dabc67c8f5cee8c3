"""Figures of the README are those of benchmarks/results."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest

from tests.docs.pages import ROOT

README = (ROOT / "README.md").read_text()
HOME = (ROOT / "docs" / "index.md").read_text()
RESULTS = (ROOT / "docs" / "results" / "index.md").read_text()


def rows(name: str) -> list[dict[str, Any]]:
    """Rows of a result."""
    path = ROOT / "benchmarks" / "results" / f"{name}.json"
    return json.loads(path.read_text())["rows"]


def row(name: str, **known: Any) -> dict[str, Any]:
    """The row of a result with these values."""
    (found,) = [r for r in rows(name) if all(r[k] == v for k, v in known.items())]
    return found


def journey() -> str:
    scores = {r["model"]: r["auc"] for r in rows("complete_journey")}
    ours = scores["tokenrec, configs/complete_journey.py"]
    return f"{ours:.4f}; logistic regression on rates: {scores['rates']:.4f}"


def kuairand() -> str:
    (ours, trees) = (
        [
            row("kuairand_pure", config=config, task=task)["auc"]
            for task in ("is_click", "long_view")
        ]
        for config in ("uc", "lightgbm")
    )
    return (
        f"{' / '.join(ours)}; LightGBM on the same statistics: "
        f"{trees[0]:.4f} / {trees[1]:.4f}"
    )


def amazon(data: str) -> str:
    scores = row("amazon", data=data, config="next_item")
    return f"{scores['recall@10']} / {scores['ndcg@10']}"


def beauty() -> str:
    return amazon("beauty")


def toys() -> str:
    return amazon("toys")


def next_products() -> str:
    copy, repeat = (
        row("complete_journey_retrieval", arm=arm)["recall@10"]
        for arm in ("copy", "(repeat)")
    )
    generated = row("complete_journey_retrieval_generative", arm="generative_copy")
    return (
        f"{copy}; as generated semantic ids {generated['recall@10']}; the household's "
        f"own products: {repeat}"
    )


def soft_tokens() -> str:
    soft, text = (
        row("soft_tokens_complete_journey", arm=arm)["prompt tokens"]
        for arm in ("soft", "text")
    )
    return f"{soft} against {text}"


def attention() -> str:
    band, blocks = (
        row(
            "attention_peers",
            seq_len=2048,
            window=64,
            implementation=f"torch SDPA, {kind}",
            **{"pass": "forward_backward"},
        )["this / ours"]
        for kind in ("band mask", "hand-chunked")
    )
    return (
        f"{band:.1f} times as fast as PyTorch SDPA with a band mask, "
        f"{blocks:.2f} times as fast as PyTorch on blocks cut by hand"
    )


def long_step() -> str:
    ratio = row("step_long", stream="NIO, tiles, needed rows")["train / first line"]
    return f"{ratio:.1f} times the rate of dense masks"


def pod() -> str:
    found = row("pods", config="lrm_1b", topology="v5p:4x4x4")
    return (
        f"{found['memory_share']:.0%} of memory; "
        f"{found['mfu_by_schedule']:.0%} MFU by the compiler's schedule"
    ).replace("%", " %")


def prepared() -> str:
    large = row("prepare_scale", rows=100_000_000)
    return (
        f"{large['anonymous_mib'] / 1024:.1f} GiB of memory, "
        f"{round(large['rows_per_cpu_second'], -3):,} rows a CPU second"
    )


def faults() -> str:
    result = json.loads((ROOT / "benchmarks" / "results" / "chaos.json").read_text())
    (total,) = [r for r in result["rows"] if r["kind"] == "all"]
    lost, bits = result["params"]["lost samples"], result["params"]["differing bits"]
    return (
        f"{lost} samples lost, {bits} bits different, {total['failed']} wrong exit code"
    )


@pytest.mark.parametrize(
    "figure",
    [
        journey,
        kuairand,
        beauty,
        toys,
        next_products,
        soft_tokens,
        attention,
        long_step,
        pod,
        prepared,
        faults,
    ],
    ids=lambda f: f.__name__,
)
def test_a_figure_of_the_readme_is_that_of_its_result(figure: Any) -> None:
    assert f"| {figure()} |" in README


def test_the_tables_of_make_train_are_those_of_its_result() -> None:
    for scores in rows("complete_journey"):
        auc, gauc, entropy = (
            f"{scores[metric]:.4f}" for metric in ("auc", "gauc", "normalized_entropy")
        )
        assert f"{auc}  {gauc}    {scores['log_loss']:.4f}  {entropy}" in HOME
        assert f"| {auc} | {gauc} | {entropy} |" in RESULTS


def test_the_headline_tables_are_those_of_their_results() -> None:
    for config in ("uc", "nio"):
        click, view = (
            row("kuairand_pure", config=config, task=task)["auc"]
            for task in ("is_click", "long_view")
        )
        assert f"| `kuairand_pure_{config}` | {click} | {view} |" in RESULTS
    for data, config in itertools.product(
        ("beauty", "toys"), ("next_item", "next_item, seen items ranked too")
    ):
        scores = row("amazon", data=data, config=config)
        assert f"| {scores['recall@10']} | {scores['ndcg@10']} |" in RESULTS
    for arm in ("copy", "(repeat)"):
        recall = row("complete_journey_retrieval", arm=arm)["recall@10"]
        assert f"| {recall} |" in RESULTS
    for arm in ("generative_copy", "generative"):
        recall = row("complete_journey_retrieval_generative", arm=arm)["recall@10"]
        assert f"| {recall} |" in RESULTS
    (scores,) = (
        r for r in rows("amazon_beauty_generative") if r["config"] == "generative"
    )
    recall, ndcg = (float(scores[f"{name}@10"]) for name in ("recall", "ndcg"))
    assert f"| {recall:.4f} | {ndcg:.4f} |" in RESULTS


def test_the_table_of_a_small_language_model_is_that_of_its_result() -> None:
    page = (ROOT / "docs" / "guides" / "language_models.md").read_text()
    arms = [r for r in rows("language_model_transfer") if "events as" in r]
    assert arms
    for arm in arms:
        metrics = (
            ("AUC", "GAUC")
            if arm["task"] == "complete_journey"
            else ("Recall@10", "NDCG@10")
        )
        cells = [arm["task"], arm["arm"], arm["events as"], arm["seeds"], arm["tokens"]]
        cells += [arm.get("train loss", "-"), *(arm[metric] for metric in metrics)]
        assert f"| {' | '.join(map(str, cells))} |" in page

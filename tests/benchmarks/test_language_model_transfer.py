"""The benchmark of pretrained language models, whole and tiny; its differences by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from benchmarks import language_model_transfer as transfer
from benchmarks import language_model_transfer_texts as texts
from benchmarks.language_model_transfer_arms import ORIGINS, Arm, Size
from benchmarks.language_model_transfer_pretrain import REPORT
from tokenrec.data.tokenizer import load_tokenizer

USERS, ITEMS = 60, 40
TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def amazon(tmp_path_factory):
    """Reviews and attributes in the format of S3-Rec, drawn at random."""
    folder = tmp_path_factory.mktemp("amazon")
    random = np.random.default_rng(0)
    lines = [
        " ".join(map(str, [user, *random.permutation(ITEMS)[:6] + 1]))
        for user in range(1, USERS + 1)
    ]
    (folder / "Beauty.txt").write_text("\n".join(lines))
    attributes = {str(item): [item % 7 + 1, item % 5 + 10] for item in range(1, 40)}
    (folder / "Beauty_item2attributes.json").write_text(json.dumps(attributes))
    return folder


def test_items_are_written_as_their_attributes(amazon):
    source = texts.AmazonTexts(amazon, "Beauty")
    titles = source.items()["title"].to_pylist()
    # Item 40 has no attributes.
    assert titles[:2] == ["Beauty 2 11", "Beauty 3 12"]
    assert titles[-1] is None
    assert len(texts.item_texts(source)) == 35


def test_held_out_texts_are_not_read(amazon):
    found = texts.item_texts(texts.AmazonTexts(amazon, "Beauty"))
    prose = [f"a sentence about number {n}" for n in range(200)]
    tokenizer = texts.train_tokenizer(found + prose, 300)
    corpus = texts.make_corpus(tokenizer, {"items": found, "prose": prose}, 8)
    assert corpus.words["items"] // 8 + corpus.words["prose"] // 8 == len(corpus.train)

    def lines(rows):
        return set(tokenizer.decode(list(rows.reshape(-1))).split("\n")[1:-1])

    held_out = lines(corpus.held_out["prose"])
    assert held_out
    assert not held_out & lines(corpus.train)


@pytest.mark.slow
def test_a_tiny_benchmark_runs_and_is_read_again(amazon, tmp_path, monkeypatch):
    whole = transfer.architecture
    monkeypatch.setattr(transfer, "architecture", lambda words: whole(words) | TINY)
    monkeypatch.setattr(transfer, "WORDS", 300)
    monkeypatch.setattr(transfer, "LENGTH", 8)
    monkeypatch.setattr(transfer, "PROSE", ("optax",))
    monkeypatch.setattr(texts, "PROSE_WORDS", 10_000)
    monkeypatch.setattr(transfer, "SIZES", {"beauty": Size(4, 8, 4, 16)})
    command = ["--amazon", str(amazon), "--work", str(tmp_path / "work")]
    command += ["--tasks", "beauty", "--seeds", "1", "--out", str(tmp_path / "out")]
    transfer.main(command)
    report = json.loads((tmp_path / "work" / "model" / REPORT).read_text())
    for kind, before in report["perplexity before"].items():
        assert report["perplexity after"][kind] < before
    # The data are written in the words of the model.
    words = len(load_tokenizer(tmp_path / "work" / "beauty").get_vocab())
    assert words == 300
    first = json.loads((tmp_path / "out.json").read_text())
    arms = [row for row in first["rows"] if "events as" in row]
    assert [(row["arm"], row["events as"]) for row in arms] == [
        (origin, "soft") for origin in ORIGINS
    ]
    assert "Against scratch" in (tmp_path / "out.md").read_text()

    def refuse(*_, **__):
        raise AssertionError("a finished run was trained again")

    monkeypatch.setattr(transfer, "train", refuse)
    monkeypatch.setattr(transfer, "pretrain", refuse)
    monkeypatch.setattr(transfer, "evaluate_run", refuse)
    transfer.main(command)
    assert json.loads((tmp_path / "out.json").read_text()) == first


def test_differences_are_those_of_the_same_seed():
    soft = Arm("beauty", "scratch", "soft")

    def records(*losses):
        return [{"loss": loss, "metrics": {"AUC": 1 - loss}} for loss in losses]

    found = transfer.difference_rows(
        {
            soft: records(0.5, 0.7),
            dataclasses.replace(soft, origin="pretrained"): records(0.4, 0.6),
        }
    )
    assert found == [
        {
            "task": "beauty",
            "arm": "pretrained",
            "events as": "soft",
            "train loss": "-0.1000 ± 0.0000",
            "AUC": "+0.1000 ± 0.0000",
        }
    ]

"""Building semantic ids, by the command line and by the function that it calls."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.semantic_ids.shops import COLD, ITEMS, item_aisle, prepare_shop
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.semantic_id_file import SEMANTIC_IDS, align, load_semantic_ids
from tokenrec.errors import EXIT_INPUT, InputError
from tokenrec.semantic_ids import rq_vae
from tokenrec.semantic_ids.build import build_semantic_ids


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_shop(tmp_path_factory.mktemp("shop") / "set")


@pytest.fixture(scope="module")
def built(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ids") / "deep" / "ids"
    assert (
        main(
            [
                "semantic-ids",
                "--data",
                str(data),
                "--out",
                str(out),
                "--levels",
                "2",
                "--codes",
                "4",
            ]
        )
        == 0
    )
    return out


def test_every_item_has_its_own_codes_and_aisles_share_prefixes(
    data: Path, built: Path
) -> None:
    assert sorted(p.name for p in built.iterdir()) == ["report.json", SEMANTIC_IDS]
    item_id = open_dataset(data).catalogue.item_id
    codes = align(load_semantic_ids(built), item_id)
    assert codes.shape == (3 * ITEMS, 3)
    cold = np.arange(len(item_id)) >= len(item_id) - COLD
    assert (codes[cold, 0] == 3).all()
    assert (codes[~cold, 0] < 3).all()
    assert len(np.unique(codes[cold, :2], axis=0)) == COLD
    aisle = item_aisle(item_id)
    assert all(len(np.unique(codes[~cold & (aisle == a), 0])) == 1 for a in range(3))


def test_report_agrees_with_the_codes(data: Path, built: Path) -> None:
    report = json.loads((built / "report.json").read_text())
    codes = load_semantic_ids(built).codes
    assert (report["items"], report["levels"], report["quantized_levels"]) == (
        len(codes),
        3,
        2,
    )
    assert (report["never_seen"], report["without_vector"]) == (COLD, COLD)
    for level, (size, use) in enumerate(
        zip(report["codes_per_level"], report["per_level"], strict=True)
    ):
        assert use["codes"] == size > codes[:, level].max()
        assert use["used"] == len(np.unique(codes[:, level]))
        assert 1 <= use["perplexity"] <= use["used"]
    assert report["codes_per_level"] == [4, 4, int(codes[:, 2].max()) + 1]
    _, sizes = np.unique(codes[:, :2], axis=0, return_counts=True)
    assert report["collisions"]["items"] == sizes[sizes > 1].sum()
    assert report["collisions"]["largest"] == sizes.max()
    assert report["collisions"]["distinct"] == [4, len(sizes)]
    first, second = (level["explained_variance"] for level in report["reconstruction"])
    assert 0 < first < second <= 1
    assert all(level["converged"] for level in report["reconstruction"])
    assert len(report["neighbours"]) == 10
    aisle = {
        int(i): int(a)
        for i, a in zip(
            open_dataset(data).catalogue.item_id, item_aisle(np.arange(36)), strict=True
        )
    }
    for sample in report["neighbours"]:
        assert sample["text"].split(" | ")[0] in ("fish", "paint", "tea")
        assert len(sample["nearest"]) == 5
        assert all(
            aisle[n["item_id"]] == aisle[sample["item_id"]] for n in sample["nearest"]
        )
        row = codes[list(aisle).index(sample["item_id"])]
        shared = (
            codes[:, : sample["shared_levels"]] == row[: sample["shared_levels"]]
        ).all(axis=1).sum() - 1
        assert sample["sharing"] == shared >= len(sample["shared_by"]) > 0


def test_one_seed_gives_one_file(data: Path, built: Path, tmp_path: Path) -> None:
    build_semantic_ids(data, tmp_path / "same", levels=2, codes=4)
    build_semantic_ids(data, tmp_path / "other", levels=2, codes=4, seed=1)
    same, other = (
        (tmp_path / name / SEMANTIC_IDS).read_bytes() for name in ("same", "other")
    )
    assert same == (built / SEMANTIC_IDS).read_bytes() != other


def test_enough_codes_need_no_last_level(data: Path, tmp_path: Path) -> None:
    report = build_semantic_ids(data, tmp_path / "ids", levels=3, codes=64)
    assert report["codes_per_level"] == [64, 64, 64]
    assert report["collisions"] == {
        "items": 0,
        "largest": 1,
        "distinct": [34, 34, 36],
    }  # cold items differ in the last code


@pytest.mark.parametrize(("levels", "codes"), [(1, 2), (3, 2)])
def test_few_codes_still_give_every_item_its_own(
    data: Path, tmp_path: Path, levels: int, codes: int
) -> None:
    report = build_semantic_ids(data, tmp_path / "ids", levels=levels, codes=codes)
    written = load_semantic_ids(tmp_path / "ids").codes  # refuses equal codes
    assert written.shape == (36, levels + 1)
    assert report["codes_per_level"][:-1] == [codes] * levels


def test_rq_vae_writes_the_same_contract(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HIDDEN": (16,), "LATENT": 4, "BATCH": 32}.items():
        monkeypatch.setattr(rq_vae, name, value)
    monkeypatch.setattr(rq_vae.fit_rq_vae, "__defaults__", (50,))
    report = build_semantic_ids(
        data, tmp_path / "ids", method="rq_vae", levels=2, codes=4
    )
    assert report["method"] == "rq_vae"
    assert load_semantic_ids(tmp_path / "ids").codes.shape == (36, report["levels"])


def test_ids_are_replaced_only_when_asked(
    data: Path, built: Path, tmp_path: Path
) -> None:
    before = (built / SEMANTIC_IDS).read_bytes()
    command = [
        "semantic-ids",
        "--data",
        str(data),
        "--out",
        str(built),
        "--levels",
        "2",
        "--codes",
        "4",
    ]
    assert main(command) == EXIT_INPUT
    with pytest.raises(InputError, match=r"holds semantic_ids.parquet; .* --overwrite"):
        build_semantic_ids(data, built, levels=3)
    assert (built / SEMANTIC_IDS).read_bytes() == before
    assert main([*command, "--overwrite"]) == 0
    assert (built / SEMANTIC_IDS).read_bytes() == before
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"is a file; give the folder"):
        build_semantic_ids(data, tmp_path / "file")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--levels", "0"], "levels=0 must be from 1 to 8"),
        (["--codes", "1"], "codes=1 must be from 2 to 65536"),
        (
            ["--method", "rq_means"],
            "'rq_means' is not a choice; did you mean 'rq_kmeans'?",
        ),
        (["--vectors", "txt"], "'txt' is not a choice; did you mean 'text'?"),
        (["--level", "3"], "unknown flag --level; did you mean '--levels'?"),
    ],
)
def test_wrong_option_names_the_right_one(
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    message: str,
) -> None:
    assert (
        main(
            [
                "semantic-ids",
                "--data",
                str(data),
                "--out",
                str(tmp_path / "ids"),
                *flags,
            ]
        )
        == EXIT_INPUT
    )
    assert message in capsys.readouterr().err
    assert not (tmp_path / "ids").exists()

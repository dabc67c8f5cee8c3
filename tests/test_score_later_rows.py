"""A trained run scores rows that came after its data set: `prepare --like`, `predict`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tokenrec
from tests.data.memory_source import MemorySource
from tests.data.preparation.test_like import END, ITEMS, part, random_log, tables
from tests.test_api import config_of
from tokenrec import Config, HeadConfig, InputError, ModelConfig
from tokenrec.data.preparation.prepare import prepare
from tokenrec.semantic_ids.build import build_semantic_ids


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data sets of the first rows, of all rows, and of later rows like the first."""
    out = tmp_path_factory.mktemp("later")
    columns = random_log(5)
    is_later = np.asarray(columns["time_ms"]) >= END
    first = MemorySource(part(columns, ~is_later), **tables(12))
    prepare(first, out / "first")
    prepare(MemorySource(columns, **tables(ITEMS)), out / "whole")
    later = MemorySource(part(columns, is_later), **tables(ITEMS))
    prepare(later, out / "later", like=out / "first")
    return out


def train(data: Path, workdir: Path, **changes: object) -> Path:
    config: Config = config_of(data)
    config.model = ModelConfig(width=8, heads=1, layers=1, windows=())
    # Rows of which some are shown and never used: candidates, not history.
    config.data.paradigm = "nio"
    config.data.overlap = 0
    for name, value in changes.items():
        section, _, field = name.partition("__")
        setattr(getattr(config, section) if field else config, field or section, value)
    tokenrec.train(config, workdir, progress=False)
    return workdir


@pytest.fixture(scope="module")
def ranker(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranking run on the first rows; copy it to change it."""
    return train(folder / "first", tmp_path_factory.mktemp("ranker") / "run")


def scores(workdir: Path, data: Path, out: Path) -> pa.Table:
    tokenrec.predict(workdir, "test", out, data=data)
    keys = ["user_id", "time_ms", "item_id"]
    return pq.read_table(out).sort_by([(key, "ascending") for key in keys])


def test_scores_equal_those_of_one_log_bit_for_bit(
    folder: Path, ranker: Path, tmp_path: Path
) -> None:
    one = scores(ranker, folder / "whole", tmp_path / "one.parquet")
    other = scores(ranker, folder / "later", tmp_path / "other.parquet")
    assert one.num_rows > 50
    assert one.equals(other)
    # Items that training had not are scored.
    assert max(other["item_id"].to_pylist()) >= 12
    # The split need not be named where there is one.
    assert tokenrec.predict(ranker, None, tmp_path / "p", data=folder / "later") == (
        one.num_rows
    )
    with pytest.raises(InputError, match="has the splits train, valid, test; name one"):
        tokenrec.predict(ranker, None, tmp_path / "q", data=folder / "whole")
    assert tokenrec.evaluate(ranker, "test", data=folder / "later")["tasks"]["click"]


def test_the_data_set_of_a_run_is_found_by_the_run(
    folder: Path, ranker: Path, tmp_path: Path
) -> None:
    run = shutil.copytree(ranker, tmp_path / "run")
    columns = random_log(5)
    is_later = np.asarray(columns["time_ms"]) >= END
    source = MemorySource(part(columns, is_later), **tables(ITEMS))
    tokenrec.prepare(source, tmp_path / "later", like=run)
    a, b = (scores(run, d / "later", tmp_path / "p") for d in (folder, tmp_path))
    assert a.equals(b)
    config = (run / "config.json").read_text()
    (run / "config.json").write_text(config.replace(str(folder / "first"), "/gone"))
    with pytest.raises(InputError, match=r"the data set of the run .*moved, give its"):
        tokenrec.prepare(source, tmp_path / "again", like=run)


def test_a_refusal_names_what_differs(ranker: Path, tmp_path: Path) -> None:
    columns = random_log(5)
    columns["tab"] = np.asarray(columns["tab"]) + 1
    prepare(MemorySource(columns, **tables(12)), tmp_path / "other")
    with pytest.raises(InputError, match="values of the vocabularies") as error:
        tokenrec.predict(ranker, "test", tmp_path / "p", data=tmp_path / "other")
    assert f"tokenrec prepare --like '{ranker}'" in str(error.value)
    assert "price" not in str(error.value)


# Both answer with the whole catalogue; only their losses differ.
@pytest.mark.parametrize("negatives", [pytest.param(0, marks=pytest.mark.slow), 8])
def test_a_retriever_finds_the_items_that_it_knows(
    folder: Path, tmp_path: Path, negatives: int
) -> None:
    run = train(
        folder / "first",
        tmp_path / "run",
        data__objective="retrieval",
        tokens__fused=True,
        head=HeadConfig(negatives=negatives, top_k=20),
    )
    rows = tokenrec.predict(run, "test", tmp_path / "p", data=folder / "later")
    assert rows
    found = pq.read_table(tmp_path / "p")["item_id"].to_pylist()
    assert set(found) == set(range(12))
    # The catalogue of a data set that was not prepared like the first has another order.
    with pytest.raises(InputError, match="items of the catalogue: 12 -> 15"):
        tokenrec.predict(run, "test", tmp_path / "q", data=folder / "whole")
    with pytest.raises(InputError, match="3 items that the run was not trained with"):
        tokenrec.evaluate(run, "test", data=folder / "later")


def test_semantic_ids_stay_and_new_items_have_none(
    folder: Path, tmp_path: Path
) -> None:
    codes = tmp_path / "codes"
    build_semantic_ids(folder / "first", codes, levels=2, codes=4)
    run = train(folder / "first", tmp_path / "run", data__semantic_ids=str(codes))
    table = scores(run, folder / "later", tmp_path / "p")
    assert table.num_rows > 50
    generator = train(
        folder / "first",
        tmp_path / "generator",
        data__semantic_ids=str(codes),
        data__objective="retrieval",
        tokens__fused=True,
        head=HeadConfig(retrieval="semantic_id", tied=False, beams=8, top_k=4),
    )
    assert tokenrec.predict(generator, "test", tmp_path / "q", data=folder / "later")
    assert max(pq.read_table(tmp_path / "q")["item_id"].to_pylist()) < 12

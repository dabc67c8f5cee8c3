"""Rows of the tokens of a data set have the names of its tokenizer."""

from __future__ import annotations

from pathlib import Path

from tests.data.memory_source import MemorySource
from tests.data.model_tokenizer import CONTROL, with_gap, write_model
from tests.worlds import tiny
from tokenrec.checkpoint.run_weights import describe_run_weights, table_keys
from tokenrec.data.dataset import open_dataset
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema, Task
from tokenrec.state import build_model

SCHEMA = Schema(
    (
        Feature("title", "text", "item", length=3, codes=256),
        Feature("clicked", "categorical", "action"),
    ),
    (Task("click"),),
)


def test_tokens_behind_a_gap_in_their_numbers_keep_their_names(tmp_path: Path) -> None:
    tokenizer, highest = with_gap()
    model = write_model(tmp_path / "model", tokenizer)
    data = tmp_path / "data"
    rows = {"user_id": [1, 1], "item_id": [7, 8], "time_ms": [1, 2]}
    items = {"item_id": [7, 8], "title": ["green tea", "tea"]}
    prepare(MemorySource(rows, {"user_id": [1]}, items, SCHEMA), data, tokenizer=model)
    config = tiny(
        fused=True,
        tokens={"template": f"tea{CONTROL[-1]} {{history}} {{candidate}}"},
        model={"windows": ()},
    )
    config.data.path = str(data)
    run = describe_run_weights(
        build_model(config, open_dataset(data).schema, ("click",)), data
    )
    keys = table_keys("text", run)
    assert keys.rows == FIRST_KNOWN + highest + 1
    assert keys.values is not None
    names = keys.values.to_pylist()
    assert len(set(names)) == len(names)
    for token, number in tokenizer.get_vocab().items():
        assert names[number] == token
    words = run.keys["words"].values
    assert words is not None
    assert words.to_pylist()[-1] == CONTROL[-1]

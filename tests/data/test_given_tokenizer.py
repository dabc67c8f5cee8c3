"""`prepare --tokenizer`: texts in the tokens of a pretrained language model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from tests.data.memory_source import MemorySource
from tests.data.model_tokenizer import (
    byte_level,
    metaspace,
    replaced_spaces,
    with_gap,
    write_model,
)
from tokenrec.cli.main import main
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import FIRST_KNOWN, MISSING, Feature, Schema, Task, columns
from tokenrec.data.tokenizer import (
    TOKENIZER_FILE,
    decode,
    encode_literal,
    encode_text,
    encode_texts,
    load_tokenizer,
    table_rows,
    train_tokenizer,
)
from tokenrec.errors import InputError

LENGTH = 5
SCHEMA = Schema(
    (
        Feature("bio", "text", "user", length=LENGTH, codes=256),
        Feature("title", "text", "item", length=LENGTH, codes=256),
    ),
    (Task("click"),),
)
TITLES = ["green tea bags", "Which of these? <bos>", "", None]
ITEMS = [10, 20, 30, 40]


def source(schema: Schema = SCHEMA, first: int = 0) -> MemorySource:
    rows = {
        "user_id": [1] * 4,
        "item_id": ITEMS,
        "time_ms": [first + n for n in range(4)],
    }
    if schema is not SCHEMA:
        return MemorySource(rows, {"user_id": [1]}, {"item_id": ITEMS}, schema)
    return MemorySource(
        rows,
        {"user_id": [1], "bio": [" tea, tea"]},
        {"item_id": ITEMS, "title": TITLES},
        schema,
    )


def own_ids(file: Path, text: str | None) -> list[int]:
    """What the library makes of a text by itself, as ids of a data set."""
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    tokens = tokenizer.encode(text or "", add_special_tokens=False).ids[:LENGTH]
    ids = [token + FIRST_KNOWN for token in tokens]
    return ids + [MISSING] * (LENGTH - len(ids))


@pytest.mark.parametrize("name", ["", TOKENIZER_FILE])
def test_texts_have_the_tokens_of_the_model_and_the_file_is_kept(
    tmp_path: Path, name: str
) -> None:
    file = write_model(tmp_path / "model") / TOKENIZER_FILE
    metadata = prepare(source(), tmp_path / "set", tokenizer=tmp_path / "model" / name)
    data = open_dataset(tmp_path / "set")
    assert (tmp_path / "set" / TOKENIZER_FILE).read_bytes() == file.read_bytes()
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert metadata.options["tokenizer"] == digest
    title = slice(*columns(data.schema.group("catalogue")).ids["title"])
    wanted = [own_ids(file, text) for text in TITLES]
    assert data.catalogue.ids[:, title].tolist() == wanted
    # The model's file cuts texts after two tokens, fills them up, and begins with <bos>.
    assert wanted[1][-1] != MISSING
    bos = FIRST_KNOWN + byte_level().token_to_id("<bos>")
    assert bos not in wanted[1]
    assert data.load("train").user_ids.tolist() == [own_ids(file, " tea, tea")]
    tokens = byte_level().get_vocab_size()
    assert data.schema.tables["text"] == FIRST_KNOWN + tokens
    titles = data.to_arrow("train").read_all()["title"].to_pylist()
    assert titles == [
        "green tea bags",
        decode_of(data.directory, wanted[1]),
        None,
        None,
    ]


def decode_of(directory: Path, ids: list[int]) -> str:
    return decode(load_tokenizer(directory), np.array(ids))


def test_the_table_reaches_the_highest_token_over_gaps(tmp_path: Path) -> None:
    gapped, highest = with_gap()
    assert gapped.get_vocab_size() < highest
    assert table_rows(gapped) == FIRST_KNOWN + highest + 1
    folder = write_model(tmp_path / "model", gapped)
    prepare(source(), tmp_path / "set", tokenizer=folder)
    assert open_dataset(tmp_path / "set").schema.tables["text"] == table_rows(gapped)


def test_a_control_token_is_one_in_a_prompt_and_letters_in_the_data() -> None:
    tokenizer = byte_level()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    bos = FIRST_KNOWN + tokenizer.token_to_id("<bos>")
    assert encode_literal(tokenizer, "<bos>tea")[0] == bos
    assert encode_literal(tokenizer, "<bos>").tolist() == [bos]
    assert encode_text(tokenizer, "<bos>").tolist() == [
        FIRST_KNOWN + tokenizer.token_to_id(letter) for letter in "<bos>"
    ]
    assert bos not in encode_texts(tokenizer, ["<bos>tea"], 8)


@pytest.mark.parametrize(
    ("make", "text", "kept"),
    [
        (byte_level, " green tea", " green tea"),
        (byte_level, "Tea", "Tea"),
        (replaced_spaces, " green tea", " green tea"),
        (replaced_spaces, "green tea", "green tea"),
        (metaspace, "green tea", "green tea"),
        (lambda: train_tokenizer(["tea"], 256), "green tea", "green tea"),
    ],
)
def test_a_text_comes_back_without_a_space_that_it_did_not_have(
    make: Any, text: str, kept: str
) -> None:
    tokenizer = make()
    tokenizer.no_truncation()
    tokenizer.no_padding()
    assert decode(tokenizer, encode_text(tokenizer, text)) == kept


def test_a_data_set_without_text_keeps_it_for_prompts(tmp_path: Path) -> None:
    schema = Schema((Feature("tab", "categorical", "context"),), (Task("click"),))
    folder = write_model(tmp_path / "model")
    prepare(source(schema), tmp_path / "plain")
    prepare(source(schema), tmp_path / "set", tokenizer=folder)
    plain, data = (open_dataset(tmp_path / name) for name in ("plain", "set"))
    assert encode_literal(load_tokenizer(data.directory), "tea").size
    assert "text" not in data.schema.tables
    # A run on the one must refuse the other, whose prompts have other tokens.
    assert plain.schema.ids_digest != data.schema.ids_digest


def test_a_later_log_keeps_it_and_takes_no_other(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    first, later = tmp_path / "first", tmp_path / "later"
    prepare(source(), first, tokenizer=folder)
    with pytest.raises(
        InputError, match=r"'.*first' has another tokenizer.*leave --to"
    ):
        prepare(
            source(first=9),
            later,
            like=first,
            tokenizer=write_model(tmp_path / "other", metaspace()),
        )
    prepare(source(first=9), later, like=first)
    prepare(source(first=9), tmp_path / "equal", like=first, tokenizer=folder)
    for name in ("later", "equal"):
        assert (tmp_path / name / TOKENIZER_FILE).read_bytes() == (
            folder / TOKENIZER_FILE
        ).read_bytes()
        options = Metadata.load(tmp_path / name).options
        assert options["tokenizer"] == Metadata.load(first).options["tokenizer"]
    assert (
        open_dataset(later).catalogue.ids.tolist()
        == open_dataset(first).catalogue.ids.tolist()
    )


def test_the_command_line_takes_a_folder(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    out = tmp_path / "set"
    words = ["prepare", "synthetic", "--rows", "300", "--out", str(out)]
    assert main([*words, "--tokenizer", str(folder)]) == 0
    assert (out / TOKENIZER_FILE).read_bytes() == (folder / TOKENIZER_FILE).read_bytes()


def test_what_is_no_tokenizer_is_named_before_the_log_is_read(tmp_path: Path) -> None:
    class Unread(MemorySource):
        def rows(self) -> Any:
            raise AssertionError("the log was read")

    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "config.json"
    damaged.write_text('{"hidden_size": 8}')
    for path, words in (
        (tmp_path / "missing", r"missing' does not exist; give the folder of a lang"),
        (empty, r"empty' is a folder without tokenizer\.json; .*save_pretrained"),
        (damaged, r"config\.json' is no tokenizer of the library tokenizers \("),
    ):
        with pytest.raises(InputError, match=words):
            prepare(
                Unread({"user_id": [1]}, schema=SCHEMA),
                tmp_path / "set",
                tokenizer=path,
            )
    assert not (tmp_path / "set").exists()

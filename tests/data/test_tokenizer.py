"""Text in a prepared data set: the tokenizer, its training texts, and its ids."""

from __future__ import annotations

import json
import random
import sys
import unicodedata
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import nnx

from tests.data.memory_source import MemorySource
from tokenrec.config import TokensConfig
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.schema import (
    BYTES,
    FIRST_KNOWN,
    MISSING,
    Feature,
    Schema,
    Task,
    columns,
)
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.tokenizer import (
    TOKENIZER_FILE,
    decode,
    encode_text,
    encode_texts,
    load_tokenizer,
    save_tokenizer,
    table_rows,
    train_tokenizer,
)
from tokenrec.errors import InputError
from tokenrec.tokens.feature_transforms import FeatureTransform, table_widths

TEXTS = [
    "GREEN TEA 50 BAGS",
    "black tea 100 bags",
    "Ice - Crushed/Cubed 22 LB",
    "coffee",
    "green coffee 12 oz",
] * 4
SCHEMA = Schema(
    (
        Feature("bio", "text", "user", length=6, codes=300),
        Feature("brand", "categorical", "item"),
        Feature("title", "text", "item", length=4, codes=300),
        Feature("clicked", "categorical", "action"),
    ),
    (Task("click"),),
)


def source(**change: object) -> MemorySource:
    """Make a log in which user 2 and item 20 occur in valid only.

    Item 30 has no title, and item 40 is not in the table of items.
    """
    columns = {
        "rows": {
            "user_id": [1, 2, 1, 1],
            "item_id": [10, 20, 30, 40],
            "time_ms": [1, 2, 3, 4],
            "split": [0, 1, 0, 0],
        },
        "users": {"user_id": [1, 2], "bio": ["tea tea tea", "zzzz zzzz zzzz"]},
        "items": {
            "item_id": [20, 10, 30],
            "title": ["qqqq qqqq", "Green Tea", None],
            "brand": [1, 2, 3],
        },
    } | change
    return MemorySource(columns["rows"], columns["users"], columns["items"], SCHEMA)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text",
    [
        "Green TEA",
        "",
        " two  spaces ",
        "naïve café",
        "日本の茶 🍵",
        "<pad> <unk>",
        "\x00\x7f\n\t",
        "ﬁ Ⅳ",
        "e\u0301",
    ],
)
def test_any_string_comes_back_normalised(text: str) -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    ids = encode_text(tokenizer, text)
    wanted = unicodedata.normalize("NFKC", text).lower()
    assert decode(tokenizer, ids) == wanted.removeprefix(" ")
    assert np.all(ids >= FIRST_KNOWN)
    assert np.all(ids < table_rows(tokenizer))


def test_random_strings_come_back() -> None:
    tokenizer, draw = train_tokenizer(TEXTS, 300), random.Random(0)
    for _ in range(200):
        letters = [
            draw.choice((draw.randrange(97, 123), draw.randrange(0x4E00, 0x9000)))
            for _ in range(9)
        ]
        text = "a" + "".join(map(chr, letters))
        assert decode(tokenizer, encode_text(tokenizer, text)) == text


def test_capitals_and_small_letters_have_equal_ids_and_a_word_one_token_anywhere() -> (
    None
):
    tokenizer = train_tokenizer(TEXTS, 400)
    assert (
        encode_text(tokenizer, "GREEN Tea").tolist()
        == encode_text(tokenizer, "green tea").tolist()
    )
    tea = encode_text(tokenizer, "tea").tolist()
    assert len(tea) == 1
    assert encode_text(tokenizer, "black tea").tolist()[-1:] == tea


def test_a_text_is_cut_at_the_right_end_and_filled_up() -> None:
    tokenizer = train_tokenizer(TEXTS, 400)
    whole = encode_text(tokenizer, "green tea 50 bags")
    assert encode_text(tokenizer, "green tea 50 bags", 2).tolist() == whole[:2].tolist()
    assert encode_text(tokenizer, "tea", 3).tolist() == [
        *encode_text(tokenizer, "tea"),
        MISSING,
        MISSING,
    ]
    assert encode_text(tokenizer, "tea", 3).dtype == np.int32


def test_many_texts_are_encoded_as_each_one_is() -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    texts = [*TEXTS[:5], None, "", "新"]
    ids = encode_texts(tokenizer, texts, 7)
    assert ids.shape == (8, 7)
    for text, row in zip(texts, ids, strict=True):
        assert row.tolist() == encode_text(tokenizer, text or "", 7).tolist()
    assert encode_texts(tokenizer, [], 7).shape == (0, 7)


def test_training_is_deterministic_and_does_not_depend_on_the_order_of_texts() -> None:
    first, again, backward = (
        train_tokenizer(texts, 350).to_str() for texts in (TEXTS, TEXTS, TEXTS[::-1])
    )
    assert first == again == backward


def test_vocabulary_is_at_most_what_was_asked_and_never_without_the_bytes() -> None:
    assert table_rows(train_tokenizer(TEXTS, 280)) == FIRST_KNOWN + 280
    assert table_rows(train_tokenizer(["tea"], 2000)) < FIRST_KNOWN + BYTES + 10
    assert table_rows(train_tokenizer([], 2000)) == FIRST_KNOWN + BYTES
    with pytest.raises(InputError, match="vocabulary=255 is below 256"):
        train_tokenizer(TEXTS, 255)


def test_a_broken_surrogate_is_refused() -> None:
    with pytest.raises(InputError, match="no Unicode string"):
        encode_text(train_tokenizer([], 256), "\ud800")


def test_a_saved_tokenizer_is_the_same_one(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 300)
    assert save_tokenizer(tokenizer, tmp_path).name == TOKENIZER_FILE
    assert [path.name for path in tmp_path.iterdir()] == [TOKENIZER_FILE]
    assert load_tokenizer(tmp_path).to_str() == tokenizer.to_str()


def test_a_data_set_without_text_says_what_to_add(tmp_path: Path) -> None:
    prepare(MemorySource({"user_id": [1]}), tmp_path / "set")
    assert not (tmp_path / "set" / TOKENIZER_FILE).exists()
    with pytest.raises(
        InputError,
        match=r'no tokenizer.*feature of kind "text" to the schema and prepare it again',
    ):
        load_tokenizer(tmp_path / "set")


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    (tmp_path / TOKENIZER_FILE).write_text("{")
    with pytest.raises(InputError, match=r"tokenizer\.json' cannot be read"):
        load_tokenizer(tmp_path)


def test_a_missing_library_names_the_extra_before_the_log_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Unread(MemorySource):
        def rows(self) -> object:  # type: ignore[override]
            raise AssertionError("the log was read")

    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match=r'run `pip install "\.\[text\]"`'):
        prepare(Unread({"user_id": [1]}, schema=SCHEMA), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []
    prepare(
        MemorySource({"user_id": [1]}), tmp_path / "set"
    )  # without a text nobody needs it


def test_prepared_texts_are_ids_of_the_saved_tokenizer(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "set")
    data, tokenizer = open_dataset(tmp_path / "set"), load_tokenizer(tmp_path / "set")
    title = slice(*columns(data.schema.group("catalogue")).ids["title"])
    assert data.catalogue.item_id.tolist() == [10, 20, 30, 40]
    wanted = [
        encode_text(tokenizer, text, 4).tolist()
        for text in ("Green Tea", "qqqq qqqq", "", "")
    ]
    assert data.catalogue.ids[:, title].tolist() == wanted
    assert data.catalogue.ids[2:, title].tolist() == [[MISSING] * 4] * 2
    assert (
        data.catalogue.ids[0, columns(data.schema.group("catalogue")).ids["brand"][0]]
        == 2
    )
    assert data.load("train").user_ids.tolist() == [
        encode_text(tokenizer, "tea tea tea", 6).tolist()
    ]
    assert data.schema.tables["text"] == table_rows(tokenizer)
    assert "text" not in {
        path.stem for path in (tmp_path / "set" / "vocabularies").iterdir()
    }


def test_the_tokenizer_sees_texts_of_training_entities_only(tmp_path: Path) -> None:
    other = {"user_id": [1, 2], "bio": ["tea tea tea", "unseen words"]}
    prepare(source(), tmp_path / "a")
    prepare(source(users=other), tmp_path / "b")
    prepare(
        source(users={"user_id": [1, 2], "bio": ["teas teas teas", "zzzz"]}),
        tmp_path / "c",
    )
    first, same, different = (
        load_tokenizer(tmp_path / name).to_str() for name in "abc"
    )
    assert first == same
    assert first != different
    merged = json.loads(first)["model"]["merges"]
    assert ["t", "e"] in merged or ["e", "a"] in merged
    assert not any("z" in part or "q" in part for pair in merged for part in pair)


def test_an_order_of_rows_changes_no_tokenizer(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "a")
    rows = {
        "user_id": [1, 1, 2, 1],
        "item_id": [40, 30, 20, 10],
        "time_ms": [4, 3, 2, 1],
        "split": [0, 0, 1, 0],
    }
    prepare(source(rows=rows), tmp_path / "b")
    first, second = ((tmp_path / name / TOKENIZER_FILE).read_bytes() for name in "ab")
    assert first == second


def test_a_text_that_is_excluded_leaves_the_other_columns(tmp_path: Path) -> None:
    prepare(source(), tmp_path / "set")
    data = open_dataset(tmp_path / "set", ("title", "bio"))
    assert data.catalogue.ids.tolist() == [[2], [1], [3], [0]]
    assert set(data.schema.tables) == {"brand", "clicked"}


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.dictionary(pa.int32(), pa.string()),
        pa.string_view(),
        pa.null(),
    ],
)
def test_a_text_may_have_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    values = [None] if pa.types.is_null(kind) else ["green tea"]
    column = (
        pa.array(values).dictionary_encode()
        if pa.types.is_dictionary(kind)
        else pa.array(values, kind)
    )
    items = {"item_id": [10], "title": column, "brand": [1]}
    prepare(
        source(rows={"user_id": [1], "item_id": [10]}, items=items), tmp_path / "set"
    )
    data = open_dataset(tmp_path / "set")
    ids = data.catalogue.ids[
        0, slice(*columns(data.schema.group("catalogue")).ids["title"])
    ]
    assert decode(load_tokenizer(tmp_path / "set"), ids).startswith(
        "" if values == [None] else "g"
    )
    assert (ids > 0).any() == (values != [None])


@pytest.mark.parametrize("values", [[5, 6, 7], [["tea"], None, None]])
def test_a_text_that_is_no_string_is_refused(
    tmp_path: Path, values: list[object]
) -> None:
    items = {"item_id": [20, 10, 30], "title": values, "brand": [1, 2, 3]}
    with pytest.raises(
        InputError,
        match=r"items\(\): column 'title' has the type .*, but a text is a string; cast it",
    ):
        prepare(source(items=items), tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


TEXT = {"kind": "text", "entity": "item", "codes": 300, "length": 4}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            [TEXT | {"entity": "context"}],
            "has the entity context, but a text belongs to a user or to an item",
        ),
        ([TEXT | {"entity": "action"}], "has the entity action, but a text belongs to"),
        (
            [TEXT | {"per_row": True}],
            "is an item feature with per_row, but a text belongs to",
        ),
        (
            [TEXT | {"codes": 0}],
            "codes=0; a text needs its vocabulary size, at least 256",
        ),
        (
            [TEXT, TEXT | {"codes": 301}],
            "codes=301, but 'f0' has codes=300, and all texts share a vocabulary",
        ),
        (
            [TEXT | {"table": "words"}],
            "table='words', but all texts share the table 'text'",
        ),
        (
            [TEXT, {"kind": "categorical", "entity": "user", "table": "text"}],
            "give this categorical feature another",
        ),
        ([TEXT | {"length": 0}], "length=0 must be 1 to 65536"),
    ],
)
def test_a_wrong_text_feature_is_named(
    features: list[dict[str, object]], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Schema.from_json(
            {
                "features": [{"name": f"f{i}"} | f for i, f in enumerate(features)],
                "tasks": [],
            }
        )


def test_metadata_come_back_with_their_texts(tmp_path: Path) -> None:
    made, read = (
        prepare(source(), tmp_path / "set").schema,
        Metadata.load(tmp_path / "set").schema,
    )
    assert (read.features, read.tables) == (made.features, made.tables)
    assert [f.table_name for f in read.features if f.kind == "text"] == ["text", "text"]


def test_a_delimited_log_may_have_texts(tmp_path: Path) -> None:
    features = [
        {"name": "title", "kind": "text", "entity": "item", "length": 3, "codes": 256}
    ]
    features.append({"name": "clicked", "kind": "categorical", "entity": "action"})
    names = {"user_id": "u", "item_id": "i", "time_ms": "t", "clicked": "click"}
    schema = {"features": features, "tasks": [{"name": "click"}], "columns": names}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    (tmp_path / "log.csv").write_text(
        "u,i,t,click\n1,a,1000,1\n1,b,2000,0\n1,a,3000,1\n"
    )
    (tmp_path / "items.csv").write_text("i,title\na,Tea\nb,\n")
    log = DelimitedSource(
        tmp_path / "schema.json",
        [tmp_path / "log.csv"],
        None,
        tmp_path / "items.csv",
        "2500",
        None,
    )
    prepare(log, tmp_path / "set")
    data, tokenizer = open_dataset(tmp_path / "set"), load_tokenizer(tmp_path / "set")
    assert data.catalogue.ids.tolist() == [
        encode_text(tokenizer, "tea", 3).tolist(),
        [MISSING] * 3,
    ]


@pytest.mark.parametrize(
    ("pooling", "wanted"), [("mean", [2.0, 3.0]), ("sum", [4.0, 6.0])]
)
def test_a_soft_token_reads_a_text_as_its_rows_pooled_without_the_padding(
    pooling: str, wanted: list[float]
) -> None:
    config = TokensConfig(embedding_dim=2, multi_valued=pooling)  # type: ignore[arg-type]
    feature = SCHEMA.feature("title")
    assert table_widths(SCHEMA.features, config)["text"] == 2
    with jax.set_mesh(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])):
        transform = FeatureTransform(feature, config, rngs=nnx.Rngs(0))
        rows = jnp.array([[[1.0, 2.0], [3.0, 4.0], [50.0, 50.0], [50.0, 50.0]]])
        assert transform(rows, jnp.array([[7, 9, 0, 0]])).tolist() == [wanted]
        assert transform(rows, jnp.zeros((1, 4), jnp.int32)).tolist() == [[0.0, 0.0]]

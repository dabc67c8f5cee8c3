"""Any text gives a value or an `InputError`, whatever reads it.

Hypothesis runs with one seed (derandomize), so that a run gives one result.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_targets import SCHEMA
from tokenrec.config import Config, from_json, to_json
from tokenrec.config.load import load_config
from tokenrec.config.overrides import split_overrides
from tokenrec.config.prompt import BAR, SegmentKind, parse_prompt
from tokenrec.config.validate import validate
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.sources.tabular import read_csv
from tokenrec.errors import InputError

QUICK = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
TEXT = st.text(max_size=5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | TEXT
    | st.sampled_from(["train", "uc", "||"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2)
    ),
    max_leaves=4,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all parts of a JSON value but the whole."""
    parts = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, part in parts:
        yield (*path, key)
        yield from places(part, (*path, key))


def changed(value: Any) -> st.SearchStrategy[str]:
    """JSON text of `value` with a part replaced by anything, or left out."""

    @st.composite
    def draw_one(draw: st.DrawFn) -> str:
        out = copy.deepcopy(value)
        *above, last = draw(st.sampled_from(list(places(value))))
        owner = out
        for key in above:
            owner = owner[key]
        if draw(st.integers(0, 4)):
            owner[last] = draw(VALUES)
        else:
            del owner[last]
        return json.dumps(out)

    return draw_one()


def read(reader: Callable[[], object]) -> None:
    with contextlib.suppress(InputError):
        reader()


def read_config(text: str) -> None:
    config = validate(from_json(text))
    parse_prompt(config)
    assert validate(from_json(to_json(config))) == config


CONFIG = dataclasses.asdict(Config())
CONFIG["data"]["tasks"], CONFIG["tokens"]["texts"] = {"click": 1.0}, {"item": ["title"]}
FIELDS = sorted(
    {".".join(map(str, path)) for path in places(CONFIG)}
    | {"", "x", "data.x", ".", "data.tasks."}
)


@QUICK
@given(text=changed(CONFIG) | st.text(max_size=40) | VALUES.map(json.dumps))
def test_a_config_json_gives_a_config_or_a_refusal(text: str) -> None:
    read(lambda: read_config(text))


@QUICK
@given(
    field=st.sampled_from(FIELDS),
    text=TEXT
    | st.sampled_from(
        [
            "(1,",
            "{a:1}",
            "{a:",
            "a:b:c",
            "'",
            "nan",
            "1e999",
            "9" * 5000,
            "||",
            "[" * 200,
        ]
    ),
)
def test_an_override_gives_a_config_or_a_refusal(field: str, text: str) -> None:
    read(lambda: load_config("synthetic", [f"{field}={text}"]))
    read(lambda: split_overrides([f"--config.{field}", text]))


WORDS = st.sampled_from([*get_args(SegmentKind), BAR, "text:", "text:Buy", "usr", ""])


@QUICK
@given(
    prompt=st.lists(WORDS | st.text(max_size=4), max_size=7),
    paradigm=st.sampled_from(["nio", "uc"]),
    objective=st.sampled_from(["ranking", "retrieval"]),
)
def test_a_prompt_gives_segments_or_a_refusal(
    prompt: list[str], paradigm: Any, objective: Any
) -> None:
    config = Config()
    config.data.paradigm, config.data.objective, config.tokens.prompt = (
        paradigm,
        objective,
        tuple(prompt),
    )
    read(lambda: parse_prompt(config))
    read(lambda: validate(config))


@QUICK
@given(text=changed(SCHEMA) | st.text(max_size=40) | VALUES.map(json.dumps))
def test_a_schema_gives_a_source_or_a_refusal(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name in ("log.csv", "users.csv", "items.csv"):
            Path(folder, name).write_text("user_id\n")
        schema, log, users, items = (
            Path(folder, n)
            for n in ("schema.json", "log.csv", "users.csv", "items.csv")
        )
        schema.write_text(text, encoding="utf-8", errors="surrogatepass")
        read(
            lambda: DelimitedSource(
                schema, [log], users, items, "5", None
            ).schema.to_json()
        )


FIELD = st.text(alphabet='ab1-.,"|é\0\r\n', max_size=4) | st.sampled_from(
    ["1", "nan", "-1", "1|2", "9" * 30]
)
LINES = st.lists(st.lists(FIELD, min_size=2, max_size=4).map(",".join), max_size=5).map(
    "\n".join
)


@QUICK
@given(
    body=LINES.map(str.encode) | st.binary(max_size=40),
    size=st.sampled_from([1, 7, 1 << 20]),
)
def test_a_csv_file_gives_rows_or_a_refusal(body: bytes, size: int) -> None:
    types = {"a": pa.int64(), "b": pa.string(), "c": pa.list_(pa.float32())}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "log.csv")
        path.write_bytes(b"a,b,c\n" + body)
        read(
            lambda: [
                batch.to_pylist() for batch in read_csv(path, types, block_bytes=size)
            ]
        )

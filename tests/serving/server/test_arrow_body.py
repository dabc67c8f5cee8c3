"""A request in Arrow is the request in JSON, and a hostile stream is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.serving.server.request_bodies import body_of
from tokenrec.serving.request import BadRequest, Limits, parse_request
from tokenrec.serving.server.arrow_body import parse_arrow
from tokenrec.serving.server.arrow_schema import Budget
from tokenrec.serving.server.http_io import HttpError

LIMITS = Limits(columns=20)


def stream_of(*rows: dict[str, Any], **options: Any) -> bytes:
    """Rows as a stream of one record batch."""
    return stream_of_table(pa.Table.from_pylist(list(rows)), **options)


def stream_of_table(table: pa.Table, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    writer = pa.ipc.new_stream(
        sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)
    )
    with writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def with_columns(**columns: pa.Array) -> pa.Table:
    """A request with further columns of candidates."""
    body = body_of(1, candidates=3)
    table = pa.Table.from_pylist([body])
    given = {"item_id": pa.array(body["candidates"]["item_id"])} | columns
    lists = [pa.ListArray.from_arrays([0, len(v)], v) for v in given.values()]
    part = pa.StructArray.from_arrays(lists, list(given))
    place = table.schema.get_field_index("candidates")
    return table.set_column(place, "candidates", part)


def plain(value: Any) -> Any:
    """Arrays as lists, NaN as null."""
    if isinstance(value, dict):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        return [None if one != one else one for one in value.tolist()]
    return value


def test_a_request_is_what_json_says() -> None:
    for seed in range(5):
        body = body_of(seed) | {"user_version": "3"}
        found = parse_arrow(stream_of(body), LIMITS)
        assert plain(found) == body
        assert isinstance(found["candidates"]["item_id"], np.ndarray)
        assert parse_request(found, LIMITS).time_ms == 20_000


TEXTS = ["a", None, "é" * 20]
TYPES: dict[str, tuple[pa.Array, list[Any]]] = {
    "int8": (pa.array([1, -2, 3], pa.int8()), [1, -2, 3]),
    "uint64": (pa.array([1, 2, (1 << 63) - 1], pa.uint64()), [1, 2, (1 << 63) - 1]),
    "int_with_null": (pa.array([1 << 60, None, 3]), [1 << 60, None, 3]),
    "float": (pa.array([1.5, None, -0.25], pa.float32()), [1.5, None, -0.25]),
    "half": (pa.array([1.5, None, 2], pa.float16()), [1.5, None, 2.0]),
    "bool": (pa.array([True, False, True]), [True, False, True]),
    "bool_with_null": (pa.array([True, None, False]), [True, None, False]),
    "text": (pa.array(TEXTS), TEXTS),
    "large_text": (pa.array(TEXTS, pa.large_string()), TEXTS),
    "view": (pa.array(TEXTS, pa.string_view()), TEXTS),
    "null": (pa.nulls(3), [None] * 3),
    "categorical": (pa.array(TEXTS).dictionary_encode(), TEXTS),
    "integer_categorical": (pa.array([7, 7, None]).dictionary_encode(), [7, 7, None]),
    "list": (pa.array([[1, 2], None, []]), [[1, 2], None, []]),
    "large_list": (
        pa.array([["a"], None, []], pa.large_list(pa.string())),
        [["a"], None, []],
    ),
    "embedding": (
        pa.array([[1.0, 2.0]] * 3, pa.list_(pa.float32(), 2)),
        [[1.0, 2.0]] * 3,
    ),
    "empty_lists": (pa.array([[], [], None]), [[], [], None]),
}


@pytest.mark.parametrize("name", TYPES)
def test_every_type_has_the_values_of_json(name: str) -> None:
    array, expected = TYPES[name]
    found = parse_arrow(stream_of_table(with_columns(x=array)), LIMITS)
    assert plain(found["candidates"]["x"]) == expected
    assert list(parse_request(found, LIMITS).candidates) == ["item_id", "x"]


def test_parts_that_are_null_are_not_there() -> None:
    body = body_of(1) | {"history": "live", "model": "0123456789", "context": None}
    found = parse_arrow(stream_of(body), LIMITS)
    assert found["history"] == "live"
    assert found["model"] == "0123456789"
    assert "context" not in found


def test_a_slice_of_a_longer_array_has_its_own_rows() -> None:
    rows = pa.Table.from_pylist([body_of(seed) for seed in range(3)]).slice(1, 1)
    assert plain(parse_arrow(stream_of_table(rows), LIMITS)) == body_of(1)


BODY = body_of(1)
ANNOTATED = pa.struct([pa.field("item_id", pa.list_(pa.decimal128(5)))])


@pytest.mark.parametrize(
    ("body", "kind", "words"),
    [
        (b"", "bad_arrow", "is no sound Arrow IPC stream"),
        (b"{}", "bad_arrow", "is no sound Arrow IPC stream"),
        (b"ARROW1\0\0" + stream_of(BODY), "bad_arrow", "no sound Arrow IPC stream"),
        (stream_of(BODY)[:-600], "bad_arrow", "is no sound Arrow IPC stream"),
        (stream_of(BODY, compression="lz4"), "wrong_type", "are compressed"),
        (stream_of(BODY, compression="zstd"), "wrong_type", "are compressed"),
        (
            stream_of(BODY, metadata_version=pa.ipc.MetadataVersion.V4),
            "bad_arrow",
            "older than that of Arrow 1.0",
        ),
        (stream_of(BODY, BODY), "bad_request", "has 2 rows; send one row"),
        (
            stream_of_table(pa.concat_tables([pa.Table.from_pylist([BODY])] * 2)),
            "bad_request",
            "more than one record batch",
        ),
        (
            stream_of_table(pa.table({f"x{n}": [1] for n in range(21)})),
            "bad_request",
            "has 21 columns, more than the limit of 20",
        ),
        (
            stream_of_table(
                pa.table([[1], [2]], schema=pa.schema([("a", "int8"), ("a", "int8")]))
            ),
            "bad_request",
            "two columns have one name",
        ),
        (
            stream_of(BODY | {"candidates": {"item_id": 3}}),
            "bad_request",
            "candidates.item_id: is int64 and no list",
        ),
        (
            stream_of(BODY | {"candidates": {"item_id": [{"a": 1}]}}),
            "bad_request",
            "candidates.item_id: is struct<a: int64>; send integers",
        ),
        (
            stream_of(BODY | {"context": {"x": [[1]]}}),
            "bad_request",
            "context.x: is list<",
        ),
        (
            stream_of_table(pa.table({"candidates": pa.array([None], ANNOTATED)})),
            "bad_request",
            "candidates.item_id: is decimal128(5, 0); send integers",
        ),
        (
            stream_of_table(pa.table({"time_ms": pa.array([0], pa.timestamp("ms"))})),
            "bad_request",
            "time_ms: is timestamp[ms]; send integers",
        ),
        (
            stream_of_table(
                pa.table({"x": pa.array([1], pa.bool8())}),
            ),
            "bad_request",
            "x: is extension<arrow.bool8>; send integers",
        ),
    ],
)
def test_what_is_no_request_is_refused(body: bytes, kind: str, words: str) -> None:
    with pytest.raises((HttpError, BadRequest)) as refused:
        parse_arrow(body, LIMITS)
    assert words in str(refused.value)
    assert "; " in str(refused.value)
    assert getattr(refused.value, "kind", "bad_request") == kind


def test_a_compressed_dictionary_is_refused() -> None:
    text = pa.array(["a" * 1000] * 3).dictionary_encode()
    for compression in ("lz4", "zstd"):
        body = stream_of_table(with_columns(x=text), compression=compression)
        with pytest.raises(HttpError, match="are compressed"):
            parse_arrow(body, LIMITS)


@pytest.mark.parametrize(
    ("rows", "size", "words"),
    [
        (30_000, 0, "candidates: has 30000 rows, more than the limit of 2000"),
        (1_000, 60, "more values than a body of its size"),
    ],
)
def test_values_that_take_no_byte_are_bounded(rows: int, size: int, words: str) -> None:
    kind = pa.list_(pa.null(), size)
    lists = pa.FixedSizeListArray.from_buffers(
        kind, rows, [None], children=[pa.nulls(rows * size)]
    )
    column = pa.ListArray.from_arrays([0, rows], lists)
    part = pa.StructArray.from_arrays([column], ["item_id"])
    with pytest.raises(BadRequest, match=words):
        parse_arrow(stream_of_table(pa.table({"candidates": part})), LIMITS)


def test_a_second_schema_is_refused() -> None:
    """The types of one would be checked, and those of the other read."""
    many = 1 << 22
    views = pa.ListViewArray.from_arrays([0], [many], pa.nulls(many))
    body = stream_of_table(pa.table({"user": views}))
    innocent = pa.schema([("user", pa.int64())]).serialize().to_pybytes()
    end = body[-8:]
    with pytest.raises(HttpError, match="it has two schemas; send one record batch"):
        parse_arrow(body[:-8] + innocent + end, LIMITS)


def test_lists_of_nulls_without_bytes_are_refused() -> None:
    kind = pa.list_(pa.large_list(pa.null()))
    many = 1 << 30
    inner = pa.LargeListArray.from_buffers(
        pa.large_list(pa.null()),
        1,
        [None, pa.py_buffer(np.array([0, many]))],
        children=[pa.nulls(1).from_buffers(pa.null(), many, [None])],
    )
    rows = pa.ListArray.from_arrays([0, 1], inner)
    part = pa.StructArray.from_arrays([rows], fields=[pa.field("item_id", kind)])
    with pytest.raises(BadRequest, match="more values than a body of its size"):
        parse_arrow(stream_of_table(pa.table({"candidates": part})), LIMITS)


def test_a_body_gives_no_more_texts_than_its_bytes() -> None:
    text = pa.array(["x" * 1_000])
    views = pa.array(["x" * 1_000] * 3, pa.string_view())
    Budget(3_000).spend([text] * 3)
    Budget(3_000).spend([views])
    for arrays in ([text] * 4, [views, text], [text.dictionary_encode()] * 4):
        with pytest.raises(BadRequest, match="its columns share memory"):
            Budget(3_000).spend(arrays)
    with pytest.raises(BadRequest, match="its columns share memory"):
        Budget(3_000).spend([pa.nulls(60_000)] * 2)


SOUND = stream_of_table(
    with_columns(**{name: array for name, (array, _) in TYPES.items()})
)


def test_a_body_without_memory_is_not_called_unsound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def open_stream(*_: Any, **__: Any) -> None:
        raise pa.ArrowMemoryError("malloc of size 64 failed")

    monkeypatch.setattr(pa.ipc, "open_stream", open_stream)
    with pytest.raises(MemoryError):
        parse_arrow(stream_of(BODY), LIMITS)


def test_a_word_that_is_lost_is_refused_or_a_request() -> None:
    """Offsets of flatbuffers among them, which then point anywhere."""
    for place in range(0, len(SOUND), 4):
        damaged = bytearray(SOUND)
        damaged[place : place + 4] = bytes(4)
        with contextlib.suppress(HttpError, BadRequest):
            parse_request(parse_arrow(damaged, Limits()), Limits())


@settings(max_examples=400, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, len(SOUND) - 1),
            st.sampled_from([0, 1, 2, 4, 0x10, 0x7F, 0x80, 0xFF]),
            st.sampled_from(["set", "delete", "insert", "repeat"]),
        ),
        min_size=1,
        max_size=4,
    )
)
def test_a_damaged_stream_is_refused_or_a_request(
    damages: list[tuple[int, int, str]],
) -> None:
    damaged = bytearray(SOUND)
    for place, value, kind in damages:
        if kind == "set":
            damaged[place % len(damaged)] = value
        elif kind == "delete":
            del damaged[place : place + value]
        elif kind == "insert":
            damaged[place:place] = bytes([value])
        else:
            damaged[place:place] = damaged[place : place + value]
    before = pa.total_allocated_bytes()
    outcome = ""
    try:
        parse_request(parse_arrow(damaged, Limits()), Limits())
    except (HttpError, BadRequest) as error:
        outcome = str(error)
    assert not outcome or "; " in outcome
    assert pa.total_allocated_bytes() - before < 8 * len(SOUND)

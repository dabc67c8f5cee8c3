"""Tests of `prepare --beam`: it makes the data set of the local path.

They run where apache_beam is installed: `make test-beam`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.memory_source import SCHEMA as MEMORY_SCHEMA
from tests.data.memory_source import MemorySource
from tests.data.model_tokenizer import write_model
from tests.data.past.declared import DECLARED, random_rows
from tests.data.past.declared import source as past_rows
from tokenrec.cli.main import main
from tokenrec.data import records
from tokenrec.data.beam.prepare import prepare_with_beam
from tokenrec.data.dataset import open_dataset
from tokenrec.data.frozen_rows import FROZEN, check_frozen_time
from tokenrec.data.metadata import Metadata
from tokenrec.data.past import WithStatistics, parse_statistics, runs
from tokenrec.data.preparation.intake import PARTITION_ROWS
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.row_marks import log_of_marks
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import LogPart
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.sources.synthetic import SyntheticSource
from tokenrec.data.sources.synthetic_labels import LabelKindsSource
from tokenrec.errors import InputError

SMALL = {"chunk_events": 12, "overlap": 5}  # most users have several chunks
ONE = {"partition_bytes": 1 << 30, "user_partitions": 1}
MANY = {"partition_bytes": 4_000, "user_partitions": 5}

SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "user_id", "kind": "categorical", "entity": "user"},
        {"name": "plan", "kind": "categorical", "entity": "user"},
        {"name": "age", "kind": "dense", "entity": "user"},
        {"name": "sku", "kind": "categorical", "entity": "item"},
        {"name": "tags", "kind": "multi_valued", "entity": "item", "length": 3},
        {"name": "title", "kind": "text", "entity": "item", "length": 4, "codes": 300},
        {
            "name": "code",
            "kind": "semantic_id",
            "entity": "item",
            "length": 2,
            "codes": 4,
        },
        {
            "name": "seen",
            "kind": "multi_valued",
            "entity": "context",
            "length": 2,
            "table": "tags",
        },
        {"name": "device", "kind": "categorical", "entity": "context"},
        {"name": "place", "kind": "dense", "entity": "item", "per_row": True},
        {"name": "seconds", "kind": "dense", "entity": "action", "transform": "log1p"},
    ],
    "tasks": [{"name": "click"}],
    "columns": {"user_id": "uid", "item_id": "sku", "time_ms": "at", "request": "page"},
}


class Files:
    """A log of strings in several files; users, repeats and times straddle the files."""

    def __init__(self, folder: Path, rows: int = 900) -> None:
        self.folder = folder
        folder.mkdir()
        draw = np.random.default_rng(0)
        user, time = draw.integers(0, 40, rows), draw.integers(0, 300, rows)
        table = pa.table(
            {
                "uid": [f"u{i}é" for i in user],
                "sku": [
                    f"s{i}" for i in draw.integers(0, 25, rows) + 5 * (time > 200)
                ],  # later items are unknown
                "at": time,
                "page": np.where(draw.random(rows) < 0.5, -1, time),
                "seen": [["red", "x", "y"][: i % 4] or None for i in time.tolist()],
                "device": [None if i % 7 == 0 else f"d{i % 90}" for i in time.tolist()],
                "place": pa.array(draw.random(rows), mask=draw.random(rows) < 0.2),
                "seconds": pa.array(draw.random(rows) * 100),
                "click": pa.array(
                    draw.integers(0, 2, rows), mask=draw.random(rows) < 0.2
                ),
            }
        )
        # Of rows that repeat one another the first stays; its labels and features show
        # which one that was.
        repeats = table.slice(0, 60).set_column(5, "device", pa.array(["again"] * 60))
        self.logs = [
            self._csv("a.csv", table.slice(0, 250)),
            folder / "b.parquet",
            self._csv("c.csv", pa.concat_tables([table.slice(600), repeats])),
        ]
        pq.write_table(table.slice(250, 350), self.logs[1])
        users = [
            f"u{i}é" for i in range(5, 60)
        ]  # some users of the log are absent, some never occur in it
        self.users = self._csv(
            "users.csv",
            pa.table(
                {
                    "uid": users,
                    "plan": [f"p{i % 3}" for i in range(55)],
                    "age": range(55),
                }
            ),
        )
        codes = [[i % 4, 3] for i in range(20)]
        items = {
            "sku": [f"s{i}" for i in range(20)],
            "tags": [["red", f"t{i}"] for i in range(20)],
        }
        self.items = self._csv(
            "items.csv",
            pa.table(
                items | {"title": [f"A mug, no. {i}" for i in range(20)], "code": codes}
            ),
        )
        (folder / "schema.json").write_text(json.dumps(SCHEMA))

    def source(
        self, valid_from: str = "200", test_from: str = "250"
    ) -> DelimitedSource:
        return DelimitedSource(
            self.folder / "schema.json",
            self.logs,
            self.users,
            self.items,
            valid_from,
            test_from,
        )

    def replace(self, name: str, old: str, new: str) -> None:
        path = self.folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def _csv(self, name: str, table: pa.Table) -> Path:
        rows = [
            table.column_names,
            *(map(_field, row.values()) for row in table.to_pylist()),
        ]
        (self.folder / name).write_text("".join(",".join(row) + "\n" for row in rows))
        return self.folder / name


def _field(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return "" if value is None else f'"{value}"' if "," in str(value) else str(value)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path / "files")


def synthetic() -> SyntheticSource:
    # With labels of every kind and weights of rows.
    return LabelKindsSource(
        3_000, users=150, items=60, requests=3, batch_rows=300
    )  # three parts


def contents(folder: Path) -> dict[str, bytes]:
    """Read every file: path to bytes."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in folder.rglob("*")
        if p.is_file()
    }


def without_frozen(metadata: Metadata) -> Metadata:
    """Leave out statistics as of the start of a split, which Beam does not keep."""
    options = {k: v for k, v in metadata.options.items() if k != FROZEN}
    return dataclasses.replace(metadata, options=options, row_digests={})


def chunks(folder: Path) -> dict[str, list[records.Chunk]]:
    return {
        split: [
            records.decode(record)
            for block in records.read_records(folder, split, lengths, 0, sum(lengths))
            for record in block
        ]
        for split, lengths in records.shard_lengths(
            folder / "dataset_info.json"
        ).items()
    }


def by_user(folder: Path) -> dict[str, dict[int | str, list[records.Chunk]]]:
    """Read the chunks of each user, in the order of the records, by split and user."""
    out: dict[str, dict[int | str, list[records.Chunk]]] = {}
    for split, found in chunks(folder).items():
        out[split] = {}
        for chunk in found:
            out[split].setdefault(chunk.user_id, []).append(chunk)
    return out


def assert_equal_but_for_order(local: Path, beam: Path) -> None:
    assert by_user(local) == by_user(beam)
    for split in records.shard_lengths(beam / "dataset_info.json"):
        row_bytes = records.row_dtype(open_dataset(beam).metadata.schema).itemsize
        assert [len(c.rows) // row_bytes for c in chunks(beam)[split]] == open_dataset(
            beam
        ).chunk_lengths(split).tolist()
    assert {n for n in contents(local) if not n.startswith(f"{FROZEN}/")} == (
        contents(beam).keys()
    )
    same = [
        n
        for n in contents(local)
        if n.startswith(("items/", "vocab", "tokenizer", "features", "dataset_info"))
    ]
    assert {n: contents(local)[n] for n in same} == {n: contents(beam)[n] for n in same}
    one, other = (open_dataset(f).metadata for f in (local, beam))
    # The digests of rows stand for their order as well.
    assert without_frozen(one) == without_frozen(other)


def test_a_log_of_one_partition_gives_the_files_of_the_local_path(
    tmp_path: Path, files: Files
) -> None:
    for name, make in (("synthetic", synthetic), ("delimited", files.source)):
        local, beam = tmp_path / name / "local", tmp_path / name / "beam"
        prepare(make(), local, **SMALL)
        prepare_with_beam(make(), beam, **SMALL, **ONE)
        assert contents(local) == contents(beam), "byte for byte, shards too"
        assert sum(open_dataset(local).chunk_lengths("train")) < PARTITION_ROWS, (
            "the local path must not have spilled"
        )
        assert {path.name for path in (tmp_path / name).iterdir()} == {
            "local",
            "beam",
        }, "nothing is left behind"


def test_the_tokenizer_of_a_model_is_used_as_on_the_local_path(
    tmp_path: Path, files: Files
) -> None:
    model = write_model(tmp_path / "model")
    local, beam = tmp_path / "local", tmp_path / "beam"
    prepare(files.source(), local, **SMALL, tokenizer=model)
    prepare_with_beam(files.source(), beam, **SMALL, **ONE, tokenizer=model)
    assert contents(local) == contents(beam)
    name = "tokenizer.json"
    assert (beam / name).read_bytes() == (model / name).read_bytes()


def test_many_partitions_give_the_same_chunks_in_another_order(
    tmp_path: Path, files: Files
) -> None:
    prepare(files.source(), tmp_path / "local", **SMALL)
    found = prepare_with_beam(files.source(), tmp_path / "beam", **SMALL, **MANY)
    assert_equal_but_for_order(tmp_path / "local", tmp_path / "beam")
    assert list(by_user(tmp_path / "beam")["train"]) != list(
        by_user(tmp_path / "local")["train"]
    )
    digests = open_dataset(tmp_path / "local").metadata.row_digests
    assert found.row_digests.keys() == digests.keys()
    assert not found.row_digests.items() & digests.items()
    data = open_dataset(tmp_path / "beam")
    for split in data.splits:
        log, marks = data.load(split), data.row_marks(split)
        assert marks is not None
        marked = log_of_marks(marks, log.start, [0])
        np.testing.assert_array_equal(marked.flags, log.flags)
        np.testing.assert_array_equal(marked.labels[:, 0], log.labels[:, 0])
    assert found.counts["repeats_dropped"] >= 60
    assert found.counts["users"] == 60, "those of the log and those of the table alone"


def test_workers_of_other_processes_give_the_same(tmp_path: Path) -> None:
    def source() -> WithStatistics:
        declared = {"keys": [{"key": ["genre", "hour"], "tasks": "click"}]}
        log = synthetic()
        return WithStatistics(log, parse_statistics(declared, log.schema, "here"))

    prepare(source(), tmp_path / "local", **SMALL)
    workers = ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    work = tmp_path / "shared"
    prepare_with_beam(
        source(),
        tmp_path / "beam",
        **SMALL,
        **MANY,
        span_rows=1000,
        arguments=workers,
        work=str(work),
    )
    assert_equal_but_for_order(tmp_path / "local", tmp_path / "beam")
    assert list(work.iterdir()) == []


def problem(source: Any, out: Path) -> str:
    with pytest.raises(InputError) as caught:
        prepare_with_beam(source, out, **SMALL, **MANY)
    assert not out.exists()
    assert not list(out.parent.glob(f"{out.name}.*"))
    return str(caught.value)


def test_a_malformed_row_is_named_by_file_and_line_as_locally(
    tmp_path: Path, files: Files
) -> None:
    third = (files.folder / "c.csv").read_text().splitlines()[3]
    files.replace("c.csv", third, third.replace(third.split(",")[2], "noon", 1))
    found = problem(files.source(), tmp_path / "set")
    assert f"{files.folder}/c.csv, line 4: column 'at': 'noon' is not a time" in found
    with pytest.raises(InputError) as caught:
        prepare(files.source(), tmp_path / "local")
    assert str(caught.value) == found


def test_the_first_of_several_problems_is_reported(
    tmp_path: Path, files: Files
) -> None:
    files.replace("c.csv", "\nu", "\n,u")
    files.replace("a.csv", "\nu", "\n,u")
    assert f"{files.folder}/a.csv, line 2: 10 fields" in problem(
        files.source(), tmp_path / "set"
    )
    files.replace("users.csv", "\nu", "\nu6é,p1,3\nu")
    assert "user_id='u6é' occurs twice" in problem(
        DelimitedSource(
            files.folder / "schema.json",
            files.logs[1:2],
            files.users,
            files.items,
            "200",
            "250",
        ),
        tmp_path / "set",
    )


def test_what_only_the_whole_log_shows_is_refused(tmp_path: Path, files: Files) -> None:
    assert "leaves valid empty" in problem(
        files.source("5000", "6000"), tmp_path / "set"
    )
    text = (files.folder / "a.csv").read_text()
    header = text.partition("\n")[0]
    for name, at in (
        ("d.csv", "7"),
        ("e.csv", "8"),
    ):  # one request, two times, two files
        (files.folder / name).write_text(f"{header}\nsame,s1,{at},777,,d1,,1,0\n")
        files.logs.append(files.folder / name)
    assert "request 777 of one user has rows at time_ms 7 and 8" in problem(
        files.source(), tmp_path / "set"
    )


@dataclasses.dataclass
class Changing(MemorySource):
    """A source of several parts, whose columns may have different types."""

    others: tuple[MemorySource, ...] = ()

    def rows(self) -> Iterator[pa.RecordBatch]:
        return itertools.chain(*(part.read() for part in self.row_parts()))

    def row_parts(self) -> list[LogPart]:
        return [
            LogPart(f"part {i}", s.rows)
            for i, s in enumerate((MemorySource(self.row_columns), *self.others))
        ]

    def user_parts(self) -> list[LogPart]:
        return [LogPart("users", functools.partial(_batches, self.users()))]

    def check_times(self, earliest: int, latest: int) -> None: ...


def _batches(table: pa.Table) -> Iterator[pa.RecordBatch]:
    return iter(table.to_batches())


@pytest.mark.parametrize(
    ("rows", "other", "message"),
    [
        (
            {"user_id": [1, 1]},
            {"user_id": [1], "split": [3]},
            r"part 1: rows\(\): column 'split' is 3 in row 0",
        ),
        (
            {"user_id": [1], "tab": [1]},
            {"user_id": [1], "tab": ["x"]},
            r"table 'tab' holds int64 .* string",
        ),
        ({"user_id": [1]}, {"user_id": ["x"]}, r"user_id.*int64.*string"),
        (
            {"user_id": [1]},
            {"user_id": [1], "item_id": ["x"]},
            r"item_id.*int64.*string",
        ),
        (
            {"user_id": [1], "split": [1]},
            {"user_id": [1], "split": [2]},
            r"no row has split 0",
        ),
        (
            {"user_id": [1], "event": [False], "scored": [False]},
            None,
            r"nothing to learn from",
        ),
        ({"user_id": pa.array([], pa.int64())}, None, r"rows\(\) is empty"),
    ],
)
def test_a_bad_part_is_named(
    tmp_path: Path, rows: dict, other: dict | None, message: str
) -> None:
    others = () if other is None else (MemorySource(other),)
    with pytest.raises(InputError, match=message):
        prepare_with_beam(Changing(rows, others=others), tmp_path / "set", **MANY)
    assert list(tmp_path.iterdir()) == []


PAST_KEYS = [
    # Shared keys with half-lives; several values of a row are added up.
    {"key": "tags", "horizons": ["all", "1m", "2h"], "means": "price"},
    {"key": "tab", "horizons": ["1h"]},
]


def past_source(rows: list[dict[str, Any]], *cuts: int) -> WithStatistics:
    """A source with statistics of every kind, in parts that end at `cuts`."""
    declared = {**DECLARED, "keys": [*DECLARED["keys"], *PAST_KEYS]}
    valid_from = np.quantile([row["time_ms"] for row in rows], 0.7)

    def part(rows: list[dict[str, Any]]) -> MemorySource:
        source = past_rows(rows)
        split = [int(row["time_ms"] >= valid_from) for row in rows]
        source.row_columns["split"] = pa.array(split, pa.int8())
        return source

    ends = itertools.pairwise([0, *cuts, len(rows)])
    first, *others = [part(rows[begin:end]) for begin, end in ends]
    source = Changing(
        first.row_columns, first.user_columns, first.item_columns, others=tuple(others)
    )
    return WithStatistics(source, parse_statistics(declared, MEMORY_SCHEMA, "here"))


def test_statistics_of_the_past_have_the_bits_of_one_machine(tmp_path: Path) -> None:
    rows = random_rows(400, seed=1)
    # Rows that repeat others, and parts that are not in the order of time.
    rows += [{**row, "price": 1.0, "label_click": 1} for row in rows[:30]]
    np.random.default_rng(0).shuffle(rows)  # type: ignore[arg-type]
    prepare(past_source(rows), tmp_path / "local", **SMALL)
    one = past_source(rows, 100, 300)
    prepare_with_beam(one, tmp_path / "one", **SMALL, **ONE)
    local, beam = contents(tmp_path / "local"), contents(tmp_path / "one")
    # All but the frozen statistics, and the metadata, which has digests of all files.
    assert {n: d for n, d in local.items() if not n.startswith(FROZEN)} | {
        "tokenrec.json": beam["tokenrec.json"]
    } == beam
    assert_equal_but_for_order(tmp_path / "local", tmp_path / "one")
    data = open_dataset(tmp_path / "one")
    with pytest.raises(InputError, match="prepare it again, without --beam"):
        check_frozen_time(data.metadata, data.schema, "valid", 0, "split")
    many = past_source(rows, 100, 300)
    # Five spans of time, in which keys with many rows begin with totals.
    prepare_with_beam(many, tmp_path / "many", **SMALL, **MANY, span_rows=90)
    assert_equal_but_for_order(tmp_path / "local", tmp_path / "many")
    local, beam = contents(tmp_path / "local"), contents(tmp_path / "many")
    state = [name for name in local if name.startswith("state/past_")]
    assert {name: local[name] for name in state} == {name: beam[name] for name in state}
    assert len(state) > 30


def test_statistics_of_a_schema_file_go_on_from_beam(
    tmp_path: Path, files: Files
) -> None:
    statistics = {
        "keys": ["sku", {"key": ["plan", "tags"], "means": "seconds"}, "user_id"],
        "matches": [{"of": "tags", "horizons": "last 3"}],
        "times": {"gap": True, "idle_after": "seconds", "session": "1s"},
    }
    text = json.dumps({**SCHEMA, "statistics": statistics})
    (files.folder / "schema.json").write_text(text)
    prepare(files.source(), tmp_path / "local", **SMALL)
    prepare_with_beam(files.source(), tmp_path / "beam", **SMALL, **MANY, span_rows=300)
    assert_equal_but_for_order(tmp_path / "local", tmp_path / "beam")
    header, *lines = (files.folder / "c.csv").read_text().splitlines()[:40]
    for number, line in enumerate(lines):
        user, item, _, _, *rest = line.split(",")
        lines[number] = ",".join([user, item, str(1000 + number // 2), "-1", *rest])
    (files.folder / "d.csv").write_text("\n".join([header, *lines, ""]))
    for name in ("local", "beam"):
        source = DelimitedSource(
            files.folder / "schema.json",
            files.folder / "d.csv",
            files.users,
            files.items,
            like=True,
        )
        prepare(source, tmp_path / f"after_{name}", like=tmp_path / name)
    local, beam = (contents(tmp_path / f"after_{n}") for n in ("local", "beam"))
    assert {n: d for n, d in local.items() if n.startswith("tokenrec-")} == {
        n: d for n, d in beam.items() if n.startswith("tokenrec-")
    }


@pytest.mark.parametrize(
    ("most", "price", "message"),
    [
        (1 << 26, 1.0, "statistics of .*: the sum of '.*' is too large for exact sums"),
        (1 << 62, 2e6, r"'price' is 2e\+06 in a row, .* \"transform\": \"log1p"),
    ],
)
def test_statistics_too_large_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    price: float,
    message: str,
) -> None:
    monkeypatch.setattr(runs, "_MOST_SUM", most)
    rows = [{**row, "price": price} for row in random_rows(100, seed=1)]
    with pytest.raises(InputError, match=message):
        prepare_with_beam(past_source(rows, 50), tmp_path / "set", **MANY)
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_parts_and_a_text_of_users_are_refused(tmp_path: Path) -> None:
    whole = MemorySource({"user_id": [1]})
    declared = parse_statistics(DECLARED, MEMORY_SCHEMA, "here")
    for source in (whole, WithStatistics(whole, declared)):
        with pytest.raises(InputError, match="source 'memory' does not come in parts"):
            prepare_with_beam(source, tmp_path / "set")
    schema = Schema((Feature("about", "text", "user", codes=300),), (Task("click"),))
    with pytest.raises(InputError, match="'about' is a text of users"):
        prepare_with_beam(Changing({"user_id": [1]}, schema=schema), tmp_path / "set")


def test_the_command_line_runs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, command = tmp_path / "beam", ["prepare", "synthetic", "--rows", "600"]
    assert main([*command, "--out", str(tmp_path / "local")]) == 0
    local = capsys.readouterr().out.partition(":")[2]
    assert (
        main(
            [
                *command,
                "--out",
                str(out),
                "--beam",
                "--beam-options=--direct_num_workers=1",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.partition(":")[2] == local
    assert main([*command, "--out", str(out), "--beam"]) == 2
    assert "exists" in capsys.readouterr().err

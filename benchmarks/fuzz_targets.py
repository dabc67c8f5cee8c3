"""Make small, sound folders of every kind that tokenrec reads, for `fuzz_readers`."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import io
import json
import shutil
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.config import Config, read_config, to_json
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.semantic_id_file import (
    SEMANTIC_IDS,
    SemanticIds,
    load_semantic_ids,
    save_semantic_ids,
)
from tokenrec.data.sources.archive import extract
from tokenrec.data.sources.delimited import DelimitedSource
from tokenrec.data.tokenizer import encode_text, load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary

SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "plan", "kind": "categorical", "entity": "user"},
        {"name": "age", "kind": "dense", "entity": "user"},
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "title", "kind": "text", "entity": "item", "length": 3, "codes": 260},
        {"name": "tags", "kind": "multi_valued", "entity": "item", "length": 2},
        {"name": "tab", "kind": "categorical", "entity": "context"},
        {
            "name": "vector",
            "kind": "embedding",
            "entity": "item",
            "length": 2,
            "per_row": True,
        },
        {"name": "seconds", "kind": "dense", "entity": "action", "transform": "log1p"},
    ],
    "tasks": [{"name": "click"}],
    "columns": {"request": "page"},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Files that cases damage.

    Attributes:
      name: name of the target.
      rule: "equal" or "sound"; see `fuzz_readers`.
      folder: the sound folder.
      files: its files to damage, one per case.
      read: digest of what a folder holds; raises InputError if it refuses.
    """

    name: str
    rule: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], str]


def make_targets(folder: Path) -> list[Target]:
    """Make the sound folders below `folder`."""
    raw = _write_raw(folder / "raw", "csv")
    data = folder / "data"
    _prepare(raw, "csv", data)
    shards = tuple(sorted(path.name for path in data.glob("*.array_record-*")))
    rest = [
        path for path in data.rglob("*") if path.is_file() and path.name not in shards
    ]
    others = tuple(sorted(path.relative_to(data).as_posix() for path in rest))
    before = without_digests(data, folder / "before")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(to_json(Config()))
    codes = folder / "codes"
    codes.mkdir()
    numbers = np.arange(64, dtype=np.int32)
    save_semantic_ids(
        SemanticIds(np.arange(64), np.stack([numbers // 8, numbers % 8], 1)),
        codes / SEMANTIC_IDS,
    )
    tables = ("log", "users", "items")
    targets = [
        Target("shards", "equal", data, shards, _digest_data),
        Target("other files of a data set", "equal", data, others, _digest_data),
        Target("shards, no checksums", "sound", before, shards, _digest_data),
        Target("other files, no checksums", "sound", before, others, _digest_data),
        Target("semantic ids", "equal", codes, (SEMANTIC_IDS,), _digest_codes),
        Target("config.json", "sound", config, ("config.json",), _digest_config),
        Target("schema.json", "sound", raw, ("schema.json",), _read_raw("csv")),
    ]
    targets += [
        _archive_target(folder / f"archive {kind}", kind) for kind in ("tar.gz", "zip")
    ]
    for kind in ("csv", "csv.gz", "parquet"):
        place = _write_raw(folder / f"raw {kind}", kind)
        names = tuple(f"{table}.{kind}" for table in tables)
        targets.append(Target(f"raw {kind}", "sound", place, names, _read_raw(kind)))
    return targets


def _write_raw(folder: Path, kind: str) -> Path:
    """Write a log of strings, numbers and lists, and its schema."""
    folder.mkdir()
    (folder / "schema.json").write_text(json.dumps(SCHEMA, indent=1))
    draw = np.random.default_rng(0)
    n = 60
    time = np.sort(draw.integers(0, 100, n))
    tables = {
        "log": {
            "user_id": [f"u{i}" for i in draw.integers(0, 6, n)],
            "item_id": [f"i{i}" for i in draw.integers(0, 8, n)],
            "time_ms": time.tolist(),
            "page": [None if t % 3 else int(t) for t in time],
            "tab": [f"t{i}é" for i in draw.integers(0, 3, n)],
            "vector": [
                [round(float(v), 2) for v in pair] for pair in draw.normal(size=(n, 2))
            ],
            "seconds": [None if i % 5 == 0 else i / 4 for i in range(n)],
            "click": draw.integers(0, 2, n).tolist(),
        },
        "users": {
            "user_id": [f"u{i}" for i in range(6)],
            "plan": ["a", "b"] * 3,
            "age": list(range(6)),
        },
        "items": {
            "item_id": [f"i{i}" for i in range(8)],
            "title": ["A mug"] * 8,
            "tags": [["x"], ["x", "y"]] * 4,
        },
    }
    for name, columns in tables.items():
        path = folder / f"{name}.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table(columns), path)
            continue
        lines = [
            ",".join(columns),
            *(
                ",".join(map(_field, row))
                for row in zip(*columns.values(), strict=True)
            ),
        ]
        text = ("\n".join(lines) + "\n").encode()
        path.write_bytes(gzip.compress(text, mtime=0) if kind == "csv.gz" else text)
    return folder


def _field(value: Any) -> str:
    if isinstance(value, list):
        return "|".join(map(str, value))
    return "" if value is None else str(value)


def _prepare(raw: Path, kind: str, out: Path) -> None:
    log, users, items = (raw / f"{name}.{kind}" for name in ("log", "users", "items"))
    source = DelimitedSource(raw / "schema.json", [log], users, items, "70", "85")
    prepare(source, out, chunk_events=6, overlap=3)


def without_digests(data: Path, out: Path) -> Path:
    """Copy a data set, as it was written before its files had checksums."""
    shutil.copytree(data, out)
    value = json.loads((out / METADATA_FILE).read_text())
    del value["digest"], value["files"], value["schema"]["ids_digest"]
    (out / METADATA_FILE).write_text(json.dumps(value))
    return out


def _read_raw(kind: str) -> Callable[[Path], str]:
    def read(folder: Path) -> str:
        with tempfile.TemporaryDirectory() as out:
            _prepare(folder, kind, Path(out, "set"))
            return _digest_data(Path(out, "set"))

    return read


def _archive_target(folder: Path, kind: str) -> Target:
    """Make an archive.

    The data have a checksum in both kinds; the names of the files have none in a zip.
    """
    folder.mkdir()
    path, content = folder / f"files.{kind}", bytes(range(256)) * 4
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as bundle:
            for method in (
                zipfile.ZIP_STORED,
                zipfile.ZIP_DEFLATED,
                zipfile.ZIP_BZIP2,
                zipfile.ZIP_LZMA,
            ):
                bundle.writestr(f"top/{method}.csv", content, method)
    else:
        with tarfile.open(path, "w:gz") as bundle:
            for number in range(3):
                member = tarfile.TarInfo(f"top/{number}.csv")
                member.size = len(content)
                bundle.addfile(member, io.BytesIO(content))

    def read(place: Path) -> str:
        with tempfile.TemporaryDirectory() as out:
            unpacked = extract(place / path.name, Path(out, "set"), max_bytes=1 << 16)
            return repr(sorted((file.name, file.read_bytes()) for file in unpacked))

    return Target(
        f"archive {kind}",
        "sound" if kind == "zip" else "equal",
        folder,
        (path.name,),
        read,
    )


def _digest_data(folder: Path) -> str:
    data = open_dataset(folder)
    digest = hashlib.sha256(json.dumps(data.schema.to_json(), sort_keys=True).encode())
    for array in _arrays(folder, data):
        digest.update(str((array.shape, array.dtype)).encode())
        digest.update(
            repr(array.tolist()).encode()
            if array.dtype.kind in "OU"
            else np.ascontiguousarray(array)
        )
    return digest.hexdigest()


def _arrays(folder: Path, data: Any) -> Iterator[np.ndarray]:
    for split in data.splits:
        log = data.load(split)
        # Without labels of numbers or weights of rows there are no arrays of these.
        fields = (getattr(log, field.name) for field in dataclasses.fields(log))
        yield from (array for array in fields if array is not None)
    yield from (data.catalogue.item_id, data.catalogue.ids, data.catalogue.dense)
    for name in ("plan", "item_id", "tags", "tab"):
        yield load_vocabulary(folder, name)
    yield encode_text(load_tokenizer(folder), "A mug of tea")


def _digest_codes(folder: Path) -> str:
    ids = load_semantic_ids(folder)
    return repr((ids.item_id.tolist(), ids.codes.tolist()))


def _digest_config(folder: Path) -> str:
    return to_json(validate(read_config(folder / "config.json")))

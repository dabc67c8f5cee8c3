"""Damaged files against every reader: each case ends in equal data or in a refusal, never in a crash or other data.

    python -m benchmarks.fuzz_readers --cases 400 --out benchmarks/results/fuzz_readers

A case takes one file of a small, sound folder, changes it (bits flipped, bytes cut off, put in, left out or replaced, a
digit changed, the file gone or a folder in its place) and reads the folder. What it may end in depends on the target:

- `equal`, files that have a checksum: the data of the sound folder, or an `InputError`;
- `sound`, files of a user, or from before there were checksums, where a changed digit is just another value: also other
  data that passes every check.

Anything else, a warning too, is a failure: it is printed with its seed, which makes the same case again
(`--target T --only SEED`), and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import faulthandler
import gzip
import hashlib
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import run_script, write_result
from tokenrec.config import Config, from_json, to_json
from tokenrec.data.dataset import open_dataset
from tokenrec.data.delimited import DelimitedSource
from tokenrec.data.metadata import METADATA_FILE
from tokenrec.data.prepare import prepare
from tokenrec.data.tokenizer import encode_text, load_tokenizer
from tokenrec.data.vocabulary import load_vocabulary
from tokenrec.errors import InputError
from tokenrec.semantic_ids.codes import SEMANTIC_IDS, SemanticIds, load_semantic_ids, save_semantic_ids
from tokenrec.validation import validate

SCHEMA: dict[str, Any] = {
    "features": [
        {"name": "plan", "kind": "categorical", "entity": "user"},
        {"name": "age", "kind": "dense", "entity": "user"},
        {"name": "item_id", "kind": "categorical", "entity": "item"},
        {"name": "title", "kind": "text", "entity": "item", "length": 3, "codes": 260},
        {"name": "tags", "kind": "multi_valued", "entity": "item", "length": 2},
        {"name": "tab", "kind": "categorical", "entity": "context"},
        {"name": "vector", "kind": "embedding", "entity": "item", "length": 2, "per_row": True},
        {"name": "seconds", "kind": "dense", "entity": "action", "transform": "log1p"},
    ],
    "tasks": [{"name": "click"}],
    "columns": {"request": "page"},
}


@dataclasses.dataclass(frozen=True)
class Target:
    """Files that cases damage. `read` digests what the folder holds, or raises an InputError."""

    name: str
    rule: str
    folder: Path
    files: tuple[str, ...]
    read: Callable[[Path], str]


def make_targets(folder: Path) -> list[Target]:
    """Makes the sound folders below `folder`."""
    raw = _write_raw(folder / "raw", "csv")
    data = folder / "data"
    _prepare(raw, "csv", data)
    shards = tuple(sorted(path.name for path in data.glob("*.array_record-*")))
    rest = [path for path in data.rglob("*") if path.is_file() and path.name not in shards]
    others = tuple(sorted(path.relative_to(data).as_posix() for path in rest))
    before = _without_digests(data, folder / "before")
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(to_json(Config()))
    codes = folder / "codes"
    codes.mkdir()
    numbers = np.arange(64, dtype=np.int32)
    save_semantic_ids(SemanticIds(np.arange(64), np.stack([numbers // 8, numbers % 8], 1)), codes / SEMANTIC_IDS)
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
    for kind in ("csv", "csv.gz", "parquet"):
        place = _write_raw(folder / f"raw {kind}", kind)
        names = tuple(f"{table}.{kind}" for table in tables)
        targets.append(Target(f"raw {kind}", "sound", place, names, _read_raw(kind)))
    return targets


def run_case(target: Target, seed: int, sound: str, work: Path) -> str:
    """Damages a file of a copy of the target's folder and reads it: "refused", "equal", "other data".

    Raises:
      Exception: whatever else the reader raised; it is a failure.
    """
    copy = work / "case"
    shutil.copytree(target.folder, copy)
    try:
        draw = np.random.default_rng(seed)
        damage(copy / target.files[draw.integers(len(target.files))], draw)
        try:
            found = target.read(copy)
        except InputError:
            return "refused"
        return "equal" if found == sound else "other data"
    finally:
        shutil.rmtree(copy)


def damage(path: Path, draw: np.random.Generator) -> None:
    """Changes a file in one of the ways in which files are damaged."""
    content = bytearray(path.read_bytes())
    size = len(content)
    begin = int(draw.integers(size + 1))
    end = min(size, begin + 1 + int(2 ** draw.uniform(0, 8)))
    kind = draw.integers(12)
    digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if kind > 9 and digits:
        content[int(draw.choice(digits))] = ord("0") + int(draw.integers(10))
    elif kind < 3:
        for _ in range(int(draw.choice([1, 1, 1, 2, 8]))):
            content[int(draw.integers(size))] ^= 1 << int(draw.integers(8))
    elif kind == 3:
        del content[begin:]
    elif kind == 4:
        del content[begin:end]
    elif kind == 5:
        content[begin:begin] = draw.bytes(end - begin + 1)
    elif kind == 6:
        content[begin:end] = draw.bytes(end - begin)
    elif kind == 7:
        content[begin:begin] = content[: int(draw.integers(1, 200))]
    elif kind == 8:
        content[begin:end] = bytes(end - begin)
    path.unlink()
    if kind != 9:
        path.write_bytes(content)
    elif draw.random() < 0.5:
        path.mkdir()


def fuzz(targets: Sequence[Target], seeds: Sequence[int], work: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """A row of counts for each target, and the failures in words."""
    rows, failures = [], []
    for target in targets:
        sound = target.read(target.folder)
        ends: collections.Counter[str] = collections.Counter()
        for seed in seeds:
            try:
                end = run_case(target, seed, sound, work)
            except (Exception, Warning):  # noqa: BLE001 - every kind of failure is to be counted and shown
                end, text = "failure", traceback.format_exc()
            else:
                text = "other data than the sound folder's\n"
            failed = end == "failure" or (end == "other data" and target.rule == "equal")
            if failed:
                failures.append(f"--target '{target.name}' --only {seed}: {text}")
            ends["failures" if failed else end] += 1
        counts = {name: ends[name] for name in ("refused", "equal", "other data", "failures")}
        rows.append(
            {"target": target.name, "rule": target.rule, "files": len(target.files), "cases": len(seeds)} | counts
        )
    return rows, failures


def _write_raw(folder: Path, kind: str) -> Path:
    """A log of strings, numbers and lists with its schema."""
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
            "vector": [[round(float(v), 2) for v in pair] for pair in draw.normal(size=(n, 2))],
            "seconds": [None if i % 5 == 0 else i / 4 for i in range(n)],
            "click": draw.integers(0, 2, n).tolist(),
        },
        "users": {"user_id": [f"u{i}" for i in range(6)], "plan": ["a", "b"] * 3, "age": list(range(6))},
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
        lines = [",".join(columns), *(",".join(map(_field, row)) for row in zip(*columns.values(), strict=True))]
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


def _without_digests(data: Path, out: Path) -> Path:
    """The data set as it was written before its files had checksums."""
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


def _digest_data(folder: Path) -> str:
    data = open_dataset(folder)
    found = hashlib.sha256(json.dumps(data.schema.to_json(), sort_keys=True).encode())
    for array in _arrays(folder, data):
        found.update(str((array.shape, array.dtype)).encode())
        found.update(repr(array.tolist()).encode() if array.dtype.kind in "OU" else np.ascontiguousarray(array))
    return found.hexdigest()


def _arrays(folder: Path, data: Any) -> Iterator[np.ndarray]:
    for split in data.splits:
        log = data.load(split)
        yield from (getattr(log, field.name) for field in dataclasses.fields(log))
    yield from (data.catalogue.item_id, data.catalogue.ids, data.catalogue.dense)
    for name in ("plan", "item_id", "tags", "tab"):
        yield load_vocabulary(folder, name)
    yield encode_text(load_tokenizer(folder), "A mug of tea")


def _digest_codes(folder: Path) -> str:
    ids = load_semantic_ids(folder)
    return repr((ids.item_id.tolist(), ids.codes.tolist()))


def _digest_config(folder: Path) -> str:
    try:
        text = (folder / "config.json").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(str(error)) from error
    return to_json(validate(from_json(text)))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=400, help="of each target")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--target", help="only this one")
    parser.add_argument("--only", type=int, help="only the case of this seed")
    parser.add_argument("--out", type=Path, help="path stem of the result, which is printed otherwise")
    args = parser.parse_args(argv)
    faulthandler.enable()  # a reader in C++ that is led astray ends the process
    warnings.simplefilter("error")
    seeds = range(args.first, args.first + args.cases) if args.only is None else [args.only]
    with tempfile.TemporaryDirectory() as folder:
        targets = [t for t in make_targets(Path(folder)) if args.target in (None, t.name)]
        rows, failures = fuzz(targets, seeds, Path(folder))
    print(*failures, sep="\n", file=sys.stderr)
    command = f"python -m benchmarks.fuzz_readers --cases {args.cases} --first {args.first}"
    if args.out is not None:
        write_result(args.out, rows, {}, f"{command} --out {args.out}", title="Damaged files against every reader")
    else:
        print(json.dumps(rows, indent=1))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

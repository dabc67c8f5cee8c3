"""The parts of a prepared folder that are not shards: vocabularies, tokenizer, catalogue, index of chunks, metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tokenrec.data import records
from tokenrec.data.dataset import ITEMS
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import TEXT_TABLE, Feature, Schema
from tokenrec.data.source import Provenance
from tokenrec.data.tokenizer import (
    TOKENIZER_FILE,
    save_tokenizer,
    table_rows,
    tokenizers_library,
    train_tokenizer,
)
from tokenrec.data.vocabulary import (
    TableValues,
    load_vocabulary,
    save_vocabulary,
    semantic_rows,
    value_tables,
)
from tokenrec.errors import InputError

LONGEST_ITEM_ID = 1024  # characters
NOTHING_TO_LEARN = "rows(): no row is an event, scored, or has a label, so there is nothing to learn from"


def check_options(schema: Schema, chunk_events: int, overlap: int) -> None:
    """Raises an InputError if an option is too small, or the library that the schema's texts need is missing."""
    for name, value, least in (
        ("chunk_events", chunk_events, 1),
        ("overlap", overlap, 0),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}")
    if any(f.kind == "text" for f in schema.features):
        tokenizers_library()  # missing, it is to end the run now and not after the log


def checksums_of(provenance: Provenance) -> dict[str, str]:
    """File name -> SHA-256; a name that occurs twice gets its folder in front."""
    files = [Path(path) for path in provenance.files]
    twice = {name for name, n in Counter(path.name for path in files).items() if n > 1}
    out = {}
    for path in files:
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise InputError(
                f"source: cannot read '{os.fspath(path)}': {error.strerror}"
            ) from error
        out[f"{path.parent.name}/{path.name}" if path.name in twice else path.name] = (
            digest
        )
    return out


def write_vocabularies(
    folder: Path, schema: Schema, tables: Mapping[str, TableValues]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Writes a file per table; returns, by table, provisional id -> id, and the number of rows, semantic ids' too."""
    finals: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    for f in schema.features:
        if f.kind == "semantic_id":
            rows[f.table_name] = semantic_rows(f)
        elif f.has_vocabulary and f.table_name not in finals:
            known, finals[f.table_name] = tables[f.table_name].finish()
            rows[f.table_name] = len(known) + 2
            save_vocabulary(folder, f.table_name, known)
    return finals, rows


def write_tokenizer(
    folder: Path, schema: Schema, entities: Sequence[Entities]
) -> dict[str, int]:
    """Trains on the texts of training entities, if the schema has any, and gives every text its ids.

    Returns the rows of the table of all texts, by its name; nothing if the schema has no text.
    """
    codes = [f.codes for f in schema.features if f.kind == "text"]
    if not codes:
        return {}
    tokenizer = train_tokenizer(
        itertools.chain(*(some.training_texts() for some in entities)), codes[0]
    )
    for some in entities:
        some.encode_texts(tokenizer)
    save_tokenizer(tokenizer, folder)
    return {TEXT_TABLE: table_rows(tokenizer)}


def write_catalogue(folder: Path, items: Entities) -> np.ndarray:
    """Writes the items, whose ids are final, sorted by original id; returns `[items] int32`, code -> row."""
    values = items.index.values()
    order = np.argsort(values, kind="stable")
    rows = np.empty(len(order), np.int32)
    rows[order] = np.arange(len(order), dtype=np.int32)
    target = folder / ITEMS
    target.mkdir()
    np.save(
        target / "item_id.npy",
        _fixed_width(values[order]) if values.dtype == object else values[order],
    )
    np.save(target / "ids.npy", items.ids[order])
    np.save(target / "dense.npy", items.dense[order])
    return rows


def _fixed_width(item_id: np.ndarray) -> np.ndarray:
    """Strings as NumPy stores them: each as wide as the longest, and filled up with NUL."""
    for value in item_id.tolist():
        reason = (
            f"{len(value)} characters, more than {LONGEST_ITEM_ID}"
            if len(value) > LONGEST_ITEM_ID
            else ""
        )
        if reason or value.endswith("\0"):
            raise InputError(
                f"item_id={value[:40]!r} has {reason or 'a NUL at its end, which is not kept'}; give it another id"
            )
    return item_id.astype(str)


def write_chunk_index(folder: Path, sizes: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Writes, for each split, the rows of each chunk, from arrays that follow one another."""
    (folder / records.INDEX).mkdir()
    for split, parts in sizes.items():
        np.save(
            folder / records.INDEX / f"{split}.npy",
            np.concatenate(parts).astype(np.int64),
        )


def digest_ids(folder: Path, schema: Schema) -> str:
    """SHA-256 of what ids stand for: the values of each vocabulary, the tokenizer, and the original ids of the items.

    Of values and not of files, which another version of their library may write otherwise.
    """
    whole = hashlib.sha256()
    values = {
        f"table {name}": load_vocabulary(folder, name)
        for name in value_tables(schema.features)
    }
    values["items"] = np.load(
        folder / ITEMS / "item_id.npy", mmap_mode="r", allow_pickle=False
    )
    for name, array in sorted(values.items()):
        whole.update(f"{name}: {len(array)} {array.dtype.kind}\n".encode())
        if array.dtype.kind == "i":
            whole.update(np.ascontiguousarray(array, "<i8"))
            continue
        for value in array.tolist():
            text = value.encode()
            whole.update(len(text).to_bytes(4, "little") + text)
    if TEXT_TABLE in {f.table_name for f in schema.features if f.kind == "text"}:
        whole.update((folder / TOKENIZER_FILE).read_bytes())
    return whole.hexdigest()


def describe(
    folder: Path,
    schema: Schema,
    tables: dict[str, int],
    moments: Sequence[Moments],
    counts: Mapping[str, int],
    shards: Mapping[str, records.Shards],
    key_types: dict[str, str],
    provenance: Provenance,
    checksums: dict[str, str],
    options: Mapping[str, int],
) -> Metadata:
    """Metadata of the folder, with the features normalised by `moments` and the chunks of each split counted."""
    normalised: dict[str, Feature] = {}
    missing: dict[str, int] = {}
    for some in moments:
        normalised |= some.features()
        missing |= {
            f"missing_train_{name}": count
            for name, count in some.missing.items()
            if count
        }
    features = tuple(normalised.get(f.name, f) for f in schema.features)
    chunks = {
        f"chunks_{split}": sum(written.lengths) for split, written in shards.items()
    }
    return Metadata(
        schema=dataclasses.replace(
            schema,
            features=features,
            tables=tables,
            items=counts["items"],
            ids_digest=digest_ids(folder, schema),
        ),
        source=provenance.name,
        licence=provenance.licence,
        citation=provenance.citation,
        checksums=checksums,
        counts=dict(
            sorted({**counts, **chunks, **missing, **provenance.counts}.items())
        ),
        options=dict(options),
        key_types=key_types,
    )

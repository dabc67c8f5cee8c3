"""Write the files of a prepared folder that are not shards, and make its metadata.

These are vocabularies, tokenizer, catalogue and `tokenrec.json`; row_index.py writes
the index of the log rows. The
local path and Apache Beam both call these functions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
from tokenrec.runtime.files import digest_file, read_with_retries

if TYPE_CHECKING:
    from tokenizers import Tokenizer

LONGEST_ITEM_ID = 1024  # characters
NOTHING_TO_LEARN = (
    "rows(): no row is an event, scored, or has a label, so there is nothing to learn "
    "from; set `scored` for impressions and `event` for uses"
)


def check_options(schema: Schema, chunk_events: int, overlap: int) -> None:
    """Check the options of `prepare` before the log is read.

    Args:
      schema: features and tasks of the source.
      chunk_events: the most new rows of a chunk.
      overlap: the most events that a chunk repeats at its head.

    Raises:
      InputError: an option is too small, or the schema has a text and the library
        `tokenizers` is missing.
    """
    for name, value, least in (
        ("chunk_events", chunk_events, 1),
        ("overlap", overlap, 0),
    ):
        if value < least:
            raise InputError(f"{name}={value} must be at least {least}; raise it")
    if any(f.kind == "text" for f in schema.features):
        # Called for its error: the tokenizer is trained after the log was read.
        tokenizers_library()


def file_checksums(provenance: Provenance) -> dict[str, str]:
    """Compute the SHA-256 of each file of a source, by name.

    A name that occurs twice gets the name of its folder in front.

    Raises:
      InputError: a file cannot be read.
    """
    files = [Path(path) for path in provenance.files]
    name_counts = Counter(path.name for path in files)
    checksums = {}
    for path in files:
        digest = read_with_retries(
            functools.partial(digest_file, path),
            path,
            "source:",
            "check the path and its permissions",
        )
        is_unique = name_counts[path.name] == 1
        name = path.name if is_unique else f"{path.parent.name}/{path.name}"
        checksums[name] = digest
    return checksums


def write_vocabularies(
    folder: Path, schema: Schema, tables: Mapping[str, TableValues]
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Write the vocabulary of each embedding table.

    Args:
      folder: the prepared folder.
      schema: features and tasks.
      tables: values of the whole log, by table.

    Returns:
      By table, `[size + 2] int32` from provisional id to vocabulary id; and the number
      of rows of each embedding table, those of semantic ids too.
    """
    vocabulary_ids: dict[str, np.ndarray] = {}
    rows: dict[str, int] = {}
    for f in schema.features:
        if f.kind == "semantic_id":
            rows[f.table_name] = semantic_rows(f)
        # Features may share a table; it is written once.
        elif f.has_vocabulary and f.table_name not in vocabulary_ids:
            known, vocabulary_ids[f.table_name] = tables[f.table_name].finish()
            # Two rows more than values: the ids for missing and unknown.
            rows[f.table_name] = len(known) + 2
            save_vocabulary(folder, f.table_name, known)
    return vocabulary_ids, rows


def write_tokenizer(
    folder: Path,
    schema: Schema,
    entities: Sequence[Entities],
    tokenizer: Tokenizer | None = None,
) -> dict[str, int]:
    """Train and write the tokenizer, and give every text its ids.

    It is trained on the texts of the users and items of training rows.

    Args:
      folder: the prepared folder.
      schema: features and tasks.
      entities: users and items; ids of their texts are filled in.
      tokenizer: one that is trained already; None to train it.

    Returns:
      Rows of the table that all texts share, by its name; empty without a text feature.
    """
    codes = [f.codes for f in schema.features if f.kind == "text"]
    if not codes:
        return {}
    # The schema gives all texts the same number of codes: they share the tokenizer.
    if tokenizer is None:
        texts = itertools.chain(*(group.training_texts() for group in entities))
        tokenizer = train_tokenizer(texts, codes[0])
    for group in entities:
        group.encode_texts(tokenizer)
    save_tokenizer(tokenizer, folder)
    return {TEXT_TABLE: table_rows(tokenizer)}


def write_catalogue(folder: Path, items: Entities, first: int = 0) -> np.ndarray:
    """Write the items, whose ids are vocabulary ids, sorted by original id.

    Args:
      folder: the prepared folder.
      items: the items.
      first: number of items that keep their rows, those of an earlier data set; the
        others follow them.

    Returns:
      `[items] int32`, from code of an item to its row of the catalogue.

    Raises:
      InputError: an item id is too long, or ends in a NUL character.
    """
    values = items.index.values()
    order = np.arange(len(values))
    order[first:] = first + np.argsort(values[first:], kind="stable")
    # `rows` is the inverse of the permutation `order`.
    rows = np.empty(len(order), np.int32)
    rows[order] = np.arange(len(order), dtype=np.int32)
    item_id = values[order]
    if item_id.dtype == object:
        item_id = _fixed_width(item_id)
    target = folder / ITEMS
    target.mkdir()
    np.save(target / "item_id.npy", item_id)
    np.save(target / "ids.npy", items.ids[order])
    np.save(target / "dense.npy", items.dense[order])
    return rows


def _fixed_width(item_id: np.ndarray) -> np.ndarray:
    """Convert strings to NumPy's fixed width, which can be memory-mapped.

    Each takes the width of the longest, filled up with NUL, so that one long id would
    make the file huge and a NUL at the end would be lost.
    """
    for value in item_id.tolist():
        if len(value) > LONGEST_ITEM_ID:
            problem = f"{len(value)} characters, more than {LONGEST_ITEM_ID}"
        elif value.endswith("\0"):
            problem = "a NUL at its end, which is not kept"
        else:
            continue
        raise InputError(f"item_id={value[:40]!r} has {problem}; give it another id")
    return item_id.astype(str)


class IdDigests(NamedTuple):
    """SHA-256 digests of the meaning of ids, as in `Schema`.

    Attributes:
      ids: of the vocabularies, the tokenizer and the item ids.
      vocabularies: of the vocabularies and the tokenizer.
    """

    ids: str
    vocabularies: str


def digest_ids(folder: Path, schema: Schema) -> IdDigests:
    """Compute the digests of what the ids of a prepared folder mean.

    Values are hashed and not files, because another version of a library may write the
    same values as other bytes.
    """
    values = {
        f"table {name}": load_vocabulary(folder, name)
        for name in value_tables(schema.features)
    }
    tokenizer = b""
    if any(f.kind == "text" for f in schema.features):
        tokenizer = (folder / TOKENIZER_FILE).read_bytes()
    items = np.load(folder / ITEMS / "item_id.npy", mmap_mode="r", allow_pickle=False)
    return IdDigests(
        ids=_digest_values({**values, "items": items}, tokenizer),
        vocabularies=_digest_values(values, tokenizer),
    )


def _digest_values(values: Mapping[str, np.ndarray], tokenizer: bytes) -> str:
    """SHA-256 of arrays of int64 or strings by name, and of the tokenizer's file."""
    digest = hashlib.sha256()
    for name, array in sorted(values.items()):
        digest.update(f"{name}: {len(array)} {array.dtype.kind}\n".encode())
        if array.dtype.kind == "i":
            # Little-endian int64 on every machine.
            digest.update(np.ascontiguousarray(array, "<i8"))
            continue
        for value in array.tolist():
            text = value.encode()
            # The length in front keeps ["ab", "c"] and ["a", "bc"] apart.
            digest.update(len(text).to_bytes(4, "little") + text)
    digest.update(tokenizer)
    return digest.hexdigest()


def make_metadata(
    folder: Path,
    schema: Schema,
    tables: dict[str, int],
    moments: Sequence[Moments],
    counts: Mapping[str, int],
    shards: Mapping[str, records.Shards],
    key_types: dict[str, str],
    provenance: Provenance,
    checksums: dict[str, str],
    options: Mapping[str, object],
    row_digests: dict[str, str],
    state: Mapping[str, Any],
) -> Metadata:
    """Make the metadata of a folder whose other files are written.

    Args:
      folder: the prepared folder.
      schema: features and tasks of the source.
      tables: rows of each embedding table.
      moments: moments of the dense features of users, items, rows and actions; empty
        where `schema` is normalised already.
      counts: numbers of log rows, users and items.
      shards: shards of each split.
      key_types: "int64" or "string" for `user_id` and `item_id`.
      provenance: origin of the data.
      checksums: SHA-256 of the raw files.
      options: options of `prepare` that change its output.
      row_digests: SHA-256 of the log rows of each split.
      state: what a later data set goes on from.

    Returns:
      The metadata, with features normalised by `moments` and chunks counted.
    """
    normalised: dict[str, Feature] = {}
    missing: dict[str, int] = {}
    for group in moments:
        normalised |= group.features()
        for name, count in group.missing.items():
            if count:
                missing[f"missing_train_{name}"] = count
    chunks = {
        f"chunks_{split}": sum(written.lengths) for split, written in shards.items()
    }
    # What the source counted comes last: it wins where a name is the same.
    digests = digest_ids(folder, schema)
    all_counts = {**counts, **chunks, **missing, **provenance.counts}
    return Metadata(
        schema=dataclasses.replace(
            schema,
            features=tuple(normalised.get(f.name, f) for f in schema.features),
            tables=tables,
            items=counts["items"],
            ids_digest=digests.ids,
            vocabularies_digest=digests.vocabularies,
        ),
        source=provenance.name,
        licence=provenance.licence,
        citation=provenance.citation,
        checksums=checksums,
        counts=dict(sorted(all_counts.items())),
        options=dict(options),
        key_types=key_types,
        row_digests=row_digests,
        state=dict(state),
    )

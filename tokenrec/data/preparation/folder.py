"""Write the files of a prepared folder that are not shards, and make its metadata.

These are vocabularies, tokenizer and `tokenrec.json`; catalogue.py writes the items, and
row_index.py the index of the log rows. The local path and Apache Beam both call these
functions.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tokenrec.data import records
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.preparation.id_digests import digest_ids
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.schema import TEXT_TABLE, Feature, Schema
from tokenrec.data.source import Provenance
from tokenrec.data.tokenizer import (
    TOKENIZER_FILE,
    parse_tokenizer,
    save_tokenizer,
    table_rows,
    tokenizers_library,
    train_tokenizer,
)
from tokenrec.data.vocabulary import (
    TableValues,
    VocabularyWriter,
    semantic_rows,
)
from tokenrec.errors import InputError
from tokenrec.runtime.files import digest_file, read_with_retries

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
            with VocabularyWriter(folder, f.table_name) as writer:
                vocabulary_ids[f.table_name] = tables[f.table_name].finish(writer.write)
            # Two rows more than values: the ids for missing and unknown.
            rows[f.table_name] = writer.size + 2
    return vocabulary_ids, rows


def write_tokenizer(
    folder: Path,
    schema: Schema,
    entities: Sequence[Entities],
    given: bytes | None = None,
) -> dict[str, int]:
    """Write the tokenizer, a new one if none is given, and give every text its ids.

    A new one is trained on the texts of the users and items of training rows. One that
    is given is written though there is no text, for the literal texts of prompts.

    Args:
      folder: the prepared folder.
      schema: features and tasks.
      entities: users and items; ids of their texts are filled in.
      given: contents of a `tokenizer.json`, which are kept byte for byte; None to
        train a tokenizer.

    Returns:
      Rows of the table that all texts share, by its name; empty without a text feature.
    """
    codes = [f.codes for f in schema.features if f.kind == "text"]
    if given is not None:
        (folder / TOKENIZER_FILE).write_bytes(given)
    if not codes:
        return {}
    if given is not None:
        tokenizer = parse_tokenizer(given)
    else:
        texts = itertools.chain(*(group.training_texts() for group in entities))
        # The schema gives all texts the same number of codes: they share the tokenizer.
        tokenizer = train_tokenizer(texts, codes[0])
        save_tokenizer(tokenizer, folder)
    for group in entities:
        group.encode_texts(tokenizer)
    return {TEXT_TABLE: table_rows(tokenizer)}


def describe_tokenizer(given: bytes | None) -> dict[str, str]:
    """SHA-256 of a tokenizer that was not trained here, for `Metadata.options`."""
    return {} if given is None else {"tokenizer": hashlib.sha256(given).hexdigest()}


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

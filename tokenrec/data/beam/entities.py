"""Make ids final on the driver, between the two passes of `prepare --beam`.

The functions of the local path write vocabularies, tokenizer and catalogue from the
values that the scan collected. The sorted values are then shared with the workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from tokenrec.data.beam.lookup import ITEM_IDS, vocabulary_file
from tokenrec.data.beam.scan import DistinctValues, ScanResult, UserSummary
from tokenrec.data.beam.shared_files import save_values
from tokenrec.data.preparation.catalogue import write_catalogue
from tokenrec.data.preparation.entities import Entities, to_vocabulary_ids
from tokenrec.data.preparation.folder import (
    write_tokenizer,
    write_vocabularies,
)
from tokenrec.data.preparation.matches import Matches
from tokenrec.data.preparation.moments import Moments
from tokenrec.data.preparation.partition import PreparationCounts
from tokenrec.data.schema import Schema
from tokenrec.data.vocabulary import TableValues, load_vocabulary
from tokenrec.errors import InputError


class WrittenEntities(NamedTuple):
    """Description of the files that `write_entities` wrote.

    Attributes:
      key_types: "int64" or "string" for `user_id` and `item_id`.
      table_rows: rows of each embedding table.
      moments: moments of the dense features of users and of items.
      counts: numbers of users and items; the second pass adds its counts.
    """

    key_types: dict[str, str]
    table_rows: dict[str, int]
    moments: tuple[Moments, Moments]
    counts: PreparationCounts


def write_entities(
    folder: Path,
    work: str,
    schema: Schema,
    items: Entities,
    tables: dict[str, TableValues],
    result: ScanResult,
    tokenizer_file: bytes | None = None,
) -> WrittenEntities:
    """Write vocabularies, tokenizer and catalogue, and share the ids with the workers.

    Args:
      folder: the prepared folder.
      work: folder that all workers see.
      schema: features and tasks.
      items: items of the source's table; those of the log are added.
      tables: values of the embedding tables of items; those of the log are added.
      result: result of the scan.
      tokenizer_file: contents of a `tokenizer.json`; None to train a tokenizer.

    Raises:
      InputError: an id or a value is an integer in one block and a string in another.
    """
    # 1. Add what the scan found, and check types across blocks.
    user_id_type = _check_one_type(
        "rows(): column 'user_id'", [summary.type for summary in result.users]
    )
    _add_distinct_values(result.distinct, items, tables)

    # 2. Make ids final, as the local path does between its passes. Features of users
    #    follow in the second pass, where users are together.
    vocabulary_ids, table_rows = write_vocabularies(folder, schema, tables)
    table_rows |= write_tokenizer(folder, schema, (items,), tokenizer_file)
    to_vocabulary_ids(items.ids, items.features, vocabulary_ids)
    write_catalogue(folder, items)
    moments = _entity_moments(schema, result.users, items)

    # 3. Share the sorted values with the workers of the second pass.
    for name in tables:
        save_values(work, vocabulary_file(name), load_vocabulary(folder, name))
    save_values(work, ITEM_IDS, np.sort(items.index.values()))

    counts = PreparationCounts.empty(schema)
    by_name = counts.by_name
    by_name["items"] = items.index.size
    by_name["items_train"] = int(items.in_training().sum())
    by_name["users"] = sum(summary.users for summary in result.users)
    by_name["users_train"] = sum(summary.trained for summary in result.users)
    Matches.sum((s.matches for s in result.users), "user_id").count(by_name)
    items.matches().count(by_name)
    key_types = {"user_id": user_id_type, "item_id": items.index.type}
    return WrittenEntities(key_types, table_rows, moments, counts)


def _entity_moments(
    schema: Schema, users: Sequence[UserSummary], items: Entities
) -> tuple[Moments, Moments]:
    """Moments of the dense features of users and of items."""
    user_moments = Moments(schema.group("user"))
    for summary in users:
        user_moments.merge(summary.moments)
    item_moments = Moments(schema.group("catalogue"))
    for features in items.training_features():
        item_moments.add(*features)
    return user_moments, item_moments


def _add_distinct_values(
    distinct: Sequence[DistinctValues], items: Entities, tables: dict[str, TableValues]
) -> None:
    """Add the scanned values to the items and tables; mark those of training rows."""
    # A worker sees one block at a time; only here can types of two blocks be compared.
    for name in dict.fromkeys(d.table for d in distinct):
        types = [d.type for d in distinct if d.table == name]
        where = f"table '{name}'"
        if name is None:
            where = "rows(): column 'item_id'"
            if items.index.type:
                types = [items.index.type, *types]
        _check_one_type(where, types)
    for d in distinct:
        values = pa.array(d.values, pa.string() if d.type == "string" else pa.int64())
        if d.table is None:
            codes = items.codes(values, "rows()", 0)
            items.in_log.add(codes)
            items.trained.add(codes[d.trained])
        else:
            # Workers send only those values of a table that training rows use.
            table = tables[d.table]
            table.mark(table.provisional(values, f"table '{d.table}'"))
    items.complete()


def _check_one_type(where: str, types: Sequence[str]) -> str:
    """Return the one type of `types`, in which "" stands for no value.

    Raises:
      InputError: there are two types.
    """
    different = sorted({kind for kind in types if kind})
    if len(different) > 1:
        raise InputError(
            f"{where} holds {' values here and '.join(different)} values there; give "
            "it one type"
        )
    return different[0]

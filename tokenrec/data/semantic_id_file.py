"""Semantic ids as a file: one row per item, its codes coarse to fine, no two items alike."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace

SEMANTIC_IDS = "semantic_ids.parquet"
_DIGEST = b"sha256"


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """`item_id: [N]`, original ids (int64 or str); `codes: [N, L] int32`, from 0, no two rows equal."""

    item_id: np.ndarray
    codes: np.ndarray


def load_semantic_ids(path: Path) -> SemanticIds:
    """Reads what `tokenrec semantic-ids` wrote: the Parquet file, or the folder that holds it.

    Raises:
      InputError: no such file, damage, columns other than `item_id` and `codes`, rows of unequal length, a code
        below 0, an item that occurs twice, or two items with equal codes.
    """
    file = Path(path) / SEMANTIC_IDS if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise InputError(
            f"semantic ids '{file}' do not exist; make them with `tokenrec semantic-ids`"
        )
    try:
        table = pq.read_table(file, page_checksum_verification=True)
        table.validate(full=True)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"semantic ids '{file}' are not a Parquet file: {error}; make them again"
        ) from error
    if set(table.column_names) != {"item_id", "codes"}:
        raise InputError(
            f"semantic ids '{file}' have the columns {', '.join(table.column_names)}, not item_id and codes; "
            f"give the file that `tokenrec semantic-ids` wrote"
        )
    item_id = _item_ids(table["item_id"], file)
    ids = SemanticIds(item_id, _codes(table["codes"], item_id, file))
    written = (table.schema.metadata or {}).get(
        _DIGEST
    )  # None in a file of another's, or from before there was one
    if written not in (None, _digest(ids)):
        raise InputError(
            f"semantic ids '{file}' are damaged: not what was written; make them again"
        )
    return _checked(ids, f"semantic ids '{file}'")


def save_semantic_ids(ids: SemanticIds, file: Path) -> None:
    """Writes the Parquet file `item_id, codes` (list<int32>), whole or not at all."""
    _checked(ids, "semantic ids")
    rows, levels = ids.codes.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * levels)
    codes = pa.ListArray.from_arrays(
        offsets, pa.array(ids.codes.ravel().astype(np.int32))
    )
    item_id = pa.array(
        ids.item_id, pa.int64() if ids.item_id.dtype.kind == "i" else pa.string()
    )
    table = pa.table({"item_id": item_id, "codes": codes}).replace_schema_metadata(
        {_DIGEST: _digest(ids)}
    )
    with atomic_replace(file) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def align(ids: SemanticIds, item_id: np.ndarray) -> np.ndarray:
    """Codes in the order of a catalogue's item ids: `[N]` -> `[N, L] int32`.

    Raises:
      InputError: the ids are of another type, or an item has none; names the first one.
    """
    wanted, order = np.asarray(item_id), np.argsort(ids.item_id, kind="stable")
    have = ids.item_id[order]
    if (wanted.dtype.kind == "i") != (have.dtype.kind == "i"):
        raise InputError(
            f"semantic ids: item_id is {_type(have)}, but {_type(wanted)} in the data set; "
            f"make them from this data set with `tokenrec semantic-ids`"
        )
    if not len(have):
        at, found = np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    else:
        at = np.minimum(np.searchsorted(have, wanted), len(have) - 1)
        found = have[at] == wanted
    if not found.all():
        raise InputError(
            f"semantic ids: item_id={wanted[int(np.argmin(found))].item()!r} has none, nor have "
            f"{int((~found).sum()) - 1} other items of the data set; make them from this data set with "
            f"`tokenrec semantic-ids`"
        )
    return ids.codes[order[at]]


def collision_groups(codes: np.ndarray) -> np.ndarray:
    """Number of the distinct row that each row of `codes: [N, L]` equals: `[N]`, from 0."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _digest(ids: SemanticIds) -> bytes:
    """SHA-256 of the ids and codes: the checksums of Parquet's pages protect only what lies in pages."""
    found = hashlib.sha256(str((ids.codes.shape, ids.item_id.tolist())).encode())
    found.update(np.ascontiguousarray(ids.codes, "<i4"))
    return found.hexdigest().encode()


def _item_ids(column: pa.ChunkedArray, file: Path) -> np.ndarray:
    kind = column.type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if column.null_count or not (is_string or pa.types.is_integer(kind)):
        raise InputError(
            f"semantic ids '{file}': item_id has {column.null_count} nulls and the type {kind}; it holds an int64 or "
            f"a string in each row"
        )
    values = column.to_numpy()
    return values.astype(str if is_string else np.int64)


def _codes(column: pa.ChunkedArray, item_id: np.ndarray, file: Path) -> np.ndarray:
    kind = column.type
    if not (
        pa.types.is_list(kind) or pa.types.is_large_list(kind)
    ) or not pa.types.is_integer(kind.value_type):
        raise InputError(
            f"semantic ids '{file}': codes has the type {kind}; it holds a list of int32 in each row"
        )
    array = column.combine_chunks()
    lengths = np.diff(array.offsets.to_numpy())
    flat = array.flatten()
    if array.null_count or flat.null_count:
        raise InputError(
            f"semantic ids '{file}': codes holds a null; give every item its codes"
        )
    if len(lengths) and (lengths != lengths[0]).any():
        row = int((lengths != lengths[0]).argmax())
        raise InputError(
            f"semantic ids '{file}': item_id={item_id[row].item()!r} has {lengths[row]} codes, the items before it "
            f"have {lengths[0]}; give all items as many"
        )
    try:
        values = flat.cast(pa.int32()).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(
            f"semantic ids '{file}': a code is no int32: {error}; make them again"
        ) from error
    return values.reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


def _checked(ids: SemanticIds, where: str) -> SemanticIds:
    item_id, codes = ids.item_id, ids.codes
    if not codes.size:
        raise InputError(
            f"{where}: no item has a code; make them with `tokenrec semantic-ids`"
        )
    negative = (codes < 0).any(axis=1)
    if negative.any():
        row = int(negative.argmax())
        raise InputError(
            f"{where}: item_id={item_id[row].item()!r} has the codes {codes[row].tolist()}; codes start at 0"
        )
    order = np.argsort(item_id, kind="stable")
    twice = np.flatnonzero(item_id[order][1:] == item_id[order][:-1])
    if len(twice):
        raise InputError(
            f"{where}: item_id={item_id[order][twice[0]].item()!r} occurs twice; keep one row of it"
        )
    group = collision_groups(codes)
    order = np.argsort(group, kind="stable")
    twice = np.flatnonzero(group[order][1:] == group[order][:-1])
    if len(twice):
        one, other = order[twice[0]], order[twice[0] + 1]
        raise InputError(
            f"{where}: the items {item_id[one].item()!r} and {item_id[other].item()!r} both have the codes "
            f"{codes[one].tolist()}; add a level that tells them apart"
        )
    return ids


def _type(values: np.ndarray) -> str:
    return "int64" if values.dtype.kind == "i" else "string"

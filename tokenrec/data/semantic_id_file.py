"""Read and write semantic ids as a Parquet file: a row per item, no two items alike.

The file has the columns `item_id` (int64 or string) and `codes` (list of int32, coarse
to fine, from 0), and a SHA-256 digest in its metadata. `tokenrec semantic-ids` writes
it (tokenrec/semantic_ids/). What a data set makes of it is in semantic_id_feature.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.errors import InputError
from tokenrec.runtime.files import atomic_replace, is_file, read_with_retries

SEMANTIC_IDS = "semantic_ids.parquet"
_DIGEST = b"sha256"
_REMEDY = "make them with `tokenrec semantic-ids`"


@dataclasses.dataclass(frozen=True)
class SemanticIds:
    """Codes of N items on L levels.

    Attributes:
      item_id: `[N] int64 or str`, original ids.
      codes: `[N, L] int32`, from 0, coarse to fine; no two items have equal codes.
    """

    item_id: np.ndarray
    codes: np.ndarray


def load_semantic_ids(path: Path) -> SemanticIds:
    """Read semantic ids, and check that they are sound.

    Args:
      path: the Parquet file, or the folder that holds it.

    Raises:
      InputError: there is no such file, it is damaged, it has columns other than
        `item_id` and `codes`, items have different numbers of codes, a code is below 0,
        an item occurs twice, or two items have equal codes.
    """
    file = Path(path) / SEMANTIC_IDS if Path(path).is_dir() else Path(path)
    where = f"semantic ids '{file}'"
    if not is_file(file):
        raise InputError(f"{where} do not exist; {_REMEDY}")

    def read() -> pa.Table:
        table = pq.read_table(file, page_checksum_verification=True)
        table.validate(full=True)
        return table

    table = read_with_retries(
        read,
        file,
        "semantic ids: the Parquet file",
        "make them again",
        damage=(pa.ArrowException, ValueError, OverflowError),
    )
    if set(table.column_names) != {"item_id", "codes"}:
        raise InputError(
            f"{where} have the columns {', '.join(table.column_names)}, not item_id "
            "and codes; give the file that `tokenrec semantic-ids` wrote"
        )
    item_id = _parse_item_ids(table["item_id"], where)
    ids = SemanticIds(item_id, _parse_codes(table["codes"], item_id, where))
    # None in a file that another program wrote, or from before there were digests.
    digest = (table.schema.metadata or {}).get(_DIGEST)
    if digest not in (None, _compute_digest(ids)):
        raise InputError(f"{where} are damaged: not what was written; make them again")
    _check_sound(ids, where)
    return ids


def save_semantic_ids(ids: SemanticIds, file: Path) -> None:
    """Write the Parquet file atomically.

    Raises:
      InputError: the ids are not sound; see `load_semantic_ids`.
    """
    _check_sound(ids, "semantic ids")
    rows, levels = ids.codes.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * levels)
    codes = pa.ListArray.from_arrays(
        offsets, pa.array(ids.codes.ravel().astype(np.int32))
    )
    id_type = pa.int64() if ids.item_id.dtype.kind == "i" else pa.string()
    item_id = pa.array(ids.item_id, id_type)
    table = pa.table({"item_id": item_id, "codes": codes})
    # Pages have checksums of their own, which name the damaged place; the digest covers
    # the rest of the file.
    table = table.replace_schema_metadata({_DIGEST: _compute_digest(ids)})
    with atomic_replace(file) as partial:
        pq.write_table(table, partial, write_page_checksum=True)


def align(ids: SemanticIds, item_id: np.ndarray) -> np.ndarray:
    """Put codes into the order of a catalogue's item ids.

    Args:
      ids: semantic ids of at least these items.
      item_id: `[N] int64 or str`, original ids of the catalogue.

    Returns:
      `[N, L] int32`.

    Raises:
      InputError: the ids are of another type, or an item has none; the message names
        the first one.
    """
    # Look up the wanted ids in the sorted available ones.
    wanted = np.asarray(item_id)
    order = np.argsort(ids.item_id, kind="stable")
    available = ids.item_id[order]
    if (wanted.dtype.kind == "i") != (available.dtype.kind == "i"):
        raise InputError(
            f"semantic ids: item_id is {_type_name(available)}, but "
            f"{_type_name(wanted)} in the data set; make them from this data set with "
            "`tokenrec semantic-ids`"
        )
    if not len(available):
        place = np.zeros(len(wanted), np.int64)
        is_known = np.zeros(len(wanted), bool)
    else:
        place = np.minimum(np.searchsorted(available, wanted), len(available) - 1)
        is_known = available[place] == wanted
    if not is_known.all():
        first = wanted[int(np.argmin(is_known))].item()
        others = int((~is_known).sum()) - 1
        raise InputError(
            f"semantic ids: item_id={first!r} has none, nor have {others} other items "
            "of the data set; make them from this data set with `tokenrec "
            "semantic-ids`"
        )
    return ids.codes[order[place]]


def collision_groups(codes: np.ndarray) -> np.ndarray:
    """Number the distinct code lists, from 0: `codes: [N, L]` -> `[N]`."""
    return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _compute_digest(ids: SemanticIds) -> bytes:
    """SHA-256 of ids and codes; Parquet's own checksums protect its pages only."""
    digest = hashlib.sha256(str((ids.codes.shape, ids.item_id.tolist())).encode())
    digest.update(np.ascontiguousarray(ids.codes, "<i4"))
    return digest.hexdigest().encode()


def _parse_item_ids(column: pa.ChunkedArray, where: str) -> np.ndarray:
    kind = column.type
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if column.null_count or not (is_string or pa.types.is_integer(kind)):
        raise InputError(
            f"{where}: item_id has {column.null_count} nulls and the type {kind}; "
            "write an int64 or a string in each row"
        )
    values = column.to_numpy()
    return values.astype(str if is_string else np.int64)


def _parse_codes(
    column: pa.ChunkedArray, item_id: np.ndarray, where: str
) -> np.ndarray:
    """Convert a column of lists to `[N, L] int32`."""
    kind = column.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        raise InputError(
            f"{where}: codes has the type {kind}; write a list of int32 in each row"
        )
    # One flat array of codes, and where the list of each item begins in it.
    array = column.combine_chunks()
    lengths = np.diff(array.offsets.to_numpy())
    flat = array.flatten()
    if array.null_count or flat.null_count:
        raise InputError(f"{where}: codes holds a null; give every item its codes")
    if len(lengths) and (lengths != lengths[0]).any():
        row = int((lengths != lengths[0]).argmax())
        raise InputError(
            f"{where}: item_id={item_id[row].item()!r} has {lengths[row]} codes, the "
            f"items before it have {lengths[0]}; give all items as many"
        )
    try:
        values = flat.cast(pa.int32()).to_numpy()
    except pa.ArrowInvalid as error:
        raise InputError(
            f"{where}: a code is no int32: {error}; make them again"
        ) from error
    return values.reshape(len(lengths), int(lengths[0]) if len(lengths) else 0)


def _check_sound(ids: SemanticIds, where: str) -> None:
    """Check that there are codes, that none is negative, and that all ids differ.

    Raises:
      InputError: names the first item that is wrong.
    """
    item_id, codes = ids.item_id, ids.codes
    if not codes.size:
        raise InputError(f"{where}: no item has a code; {_REMEDY}")
    negative = (codes < 0).any(axis=1)
    if negative.any():
        row = int(negative.argmax())
        raise InputError(
            f"{where}: item_id={item_id[row].item()!r} has the codes "
            f"{codes[row].tolist()}; codes start at 0"
        )
    repeat = _first_repeat(item_id)
    if repeat is not None:
        raise InputError(
            f"{where}: item_id={item_id[repeat[0]].item()!r} occurs twice; keep one "
            "row of it"
        )
    repeat = _first_repeat(collision_groups(codes))
    if repeat is not None:
        one, other = (item_id[row].item() for row in repeat)
        raise InputError(
            f"{where}: the items {one!r} and {other!r} both have the codes "
            f"{codes[repeat[0]].tolist()}; add a level that tells them apart"
        )


def _first_repeat(values: np.ndarray) -> tuple[int, int] | None:
    """Find two equal entries, those of the least value, or None."""
    order = np.argsort(values, kind="stable")
    repeats = np.flatnonzero(values[order][1:] == values[order][:-1])
    if not len(repeats):
        return None
    return int(order[repeats[0]]), int(order[repeats[0] + 1])


def _type_name(values: np.ndarray) -> str:
    return "int64" if values.dtype.kind == "i" else "string"

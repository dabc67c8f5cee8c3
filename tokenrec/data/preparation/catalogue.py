"""Write the items of a prepared folder, sorted by original id, some at a time."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.dataset import ITEMS
from tokenrec.data.memory_limit import NO_LIMIT, MemoryLimit, blocks
from tokenrec.data.preparation.entities import Entities
from tokenrec.data.value_order import in_order
from tokenrec.errors import InputError

LONGEST_ITEM_ID = 1024  # characters
_AT_ONCE = 2**18


def write_catalogue(
    folder: Path, items: Entities, first: int = 0, limit: MemoryLimit = NO_LIMIT
) -> np.ndarray:
    """Write the items, whose ids are vocabulary ids, sorted by original id.

    Args:
      folder: the prepared folder.
      items: the items.
      first: number of items that keep their rows, those of an earlier data set; the
        others follow them.
      limit: of the memory that sorting may take.

    Returns:
      `[items] int32`, from code of an item to its row of the catalogue.

    Raises:
      InputError: an item id is too long, or ends in a NUL character.
    """
    values = items.index.array()
    rows = limit.zeros((len(values),), np.int32)
    is_new = np.arange(len(values)) >= first
    ordered = itertools.chain([np.arange(first)], in_order(values, is_new, limit))
    target = folder / ITEMS
    target.mkdir()
    with contextlib.ExitStack() as stack:
        ids, dense, item_id = (
            stack.enter_context(_ArrayFile(target / f"{name}.npy", shape, dtype))
            for name, shape, dtype in (
                ("ids", items.ids.shape, items.ids.dtype),
                ("dense", items.dense.shape, items.dense.dtype),
                ("item_id", rows.shape, _item_id_type(values)),
            )
        )
        done = 0
        for codes in ordered:
            for part in blocks(len(codes), _AT_ONCE):
                chosen = codes[part]
                keys = values.take(pa.array(chosen))
                item_id.write(keys.to_numpy(zero_copy_only=False))
                ids.write(items.ids[chosen])
                dense.write(items.dense[chosen])
                rows[chosen] = np.arange(done, done + len(chosen))
                done += len(chosen)
    return rows


def _item_id_type(values: pa.Array) -> np.dtype:
    """Type of original ids on disk: int64, or strings of NumPy's fixed width.

    Strings can then be memory-mapped. Each takes the width of the longest, filled up
    with NUL, so that one long id would make the file huge and a NUL at the end would be
    lost.
    """
    if pa.types.is_int64(values.type):
        return np.dtype(np.int64)
    longest = 1
    for part in blocks(len(values), _AT_ONCE):
        lengths = pc.utf8_length(values[part])
        longest = max(longest, pc.max(lengths).as_py())
        too_long = pc.greater(lengths, LONGEST_ITEM_ID)
        for wrong in (too_long, pc.ends_with(values[part], "\0")):
            if (place := pc.index(wrong, True).as_py()) >= 0:
                raise _wrong_item_id(values[part][place].as_py())
    return np.dtype((np.str_, longest))


def _wrong_item_id(value: str) -> InputError:
    problem = "a NUL at its end, which is not kept"
    if len(value) > LONGEST_ITEM_ID:
        problem = f"{len(value)} characters, more than {LONGEST_ITEM_ID}"
    return InputError(f"item_id={value[:40]!r} has {problem}; give it another id")


class _ArrayFile:
    """A `.npy` file that is written in parts along the first axis."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._dtype = dtype
        self._file = path.open("wb")
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": shape,
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, part: np.ndarray) -> None:
        self._file.write(np.ascontiguousarray(part, self._dtype).tobytes())

    def __enter__(self) -> _ArrayFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

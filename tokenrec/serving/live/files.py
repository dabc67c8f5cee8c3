"""Files of a saved live state: a folder that `LiveState.open` goes on from.

| file | contents |
|---|---|
| `live_state.json` | schema, declaration, times, and SHA-256 of the other files |
| `arrays/NAME.npy` | totals of statistics and of the source, at the watermark |
| `items.npy` | ids of the catalogue, ascending |
| `histories.parquet` | the last events of each user, until the watermark |
| `window.arrow` | the events since the watermark, with their ids |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.data.preparation.staging import remove_leftovers, staged_folder
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.runtime.files import digest_file, read_json, write_json
from tokenrec.serving.live.schema import LiveSchema

MANIFEST = "live_state.json"
_FORMAT = 1
_REMEDY = "export the run again, or restore the folder"
_ITEMS, _HISTORIES, _WINDOW = "items.npy", "histories.parquet", "window.arrow"


@dataclasses.dataclass(frozen=True)
class SavedState:
    """What is saved of a live state.

    Attributes:
      schema: columns of events.
      source: name of the source of the data set.
      statistics: the declaration of statistics as JSON; None if there is none.
      events: the most events of a history.
      watermark_ms: time until which `arrays` count events.
      newest_ms: time of the newest event.
      frame: number of the last frame of the journal whose events are here.
      arrays: totals, by the names of `prepare`'s `state/`.
      items: `[N]`, ids of the catalogue, ascending.
      histories: events of each user, with computed features, in order.
      window: events since the watermark, with `event_id_int` or `event_id_text`; None
        if there are none.
    """

    schema: LiveSchema
    source: str
    statistics: dict[str, Any] | None
    events: int
    watermark_ms: int
    newest_ms: int
    frame: int
    arrays: Mapping[str, np.ndarray]
    items: np.ndarray
    histories: pa.Table
    window: pa.Table | None


_PLAIN = ("source", "statistics", "events", "watermark_ms", "newest_ms", "frame")


def write_state(folder: Path, state: SavedState) -> None:
    """Write a folder that appears whole or not at all; an earlier state is replaced.

    Raises:
      InputError: the folder is something else, or the disk is full.
    """
    with staged_folder(Path(folder), overwrite=True, marker=MANIFEST) as partial:
        (partial / "arrays").mkdir()
        for name, array in state.arrays.items():
            np.save(partial / "arrays" / f"{name}.npy", array, allow_pickle=False)
        np.save(partial / _ITEMS, state.items, allow_pickle=False)
        pq.write_table(state.histories, partial / _HISTORIES, compression="zstd")
        if state.window is not None:
            with pa.ipc.new_file(str(partial / _WINDOW), state.window.schema) as file:
                file.write_table(state.window)
        live = state.schema
        write_json(
            partial / MANIFEST,
            {
                "format": _FORMAT,
                **{name: getattr(state, name) for name in _PLAIN},
                "schema": live.schema.to_json(),
                "computed": list(live.computed),
                "key_types": live.key_types,
                "value_types": live.value_types,
                "scored": live.scored,
                "exclude": list(live.exclude),
                "files": {
                    path.relative_to(partial).as_posix(): digest_file(path)
                    for path in sorted(partial.rglob("*.*"))
                },
            },
        )


def read_state(folder: Path) -> SavedState:
    """Read a saved state; the files are checked.

    Raises:
      InputError: it is missing, of another version, or damaged; names the file.
    """
    folder = Path(os.path.abspath(folder))
    # A process that was killed while it replaced the folder has moved it aside.
    remove_leftovers(folder)
    path = folder / MANIFEST
    value = read_json(path, "live state:", _REMEDY)
    if not isinstance(value, dict) or value.get("format") != _FORMAT:
        raise InputError(
            f"'{path}' is no live state of format {_FORMAT}; export the run again with "
            "this version"
        )
    try:
        schema = LiveSchema(
            Schema.from_json(value["schema"]),
            tuple(value["computed"]),
            value["key_types"],
            value["value_types"],
            value["scored"],
            tuple(value["exclude"]),
        )
        plain = {name: value[name] for name in _PLAIN}
        files = dict(value["files"])
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is damaged: {error!r}; {_REMEDY}") from error
    for name, digest in files.items():
        _check(folder, name, digest)
    arrays = [name for name in files if name.startswith("arrays/")]
    window = None
    if _WINDOW in files:
        with pa.ipc.open_file(str(folder / _WINDOW)) as file:
            window = file.read_all()
    return SavedState(
        schema,
        **plain,
        arrays={
            Path(n).stem: np.load(folder / n, mmap_mode="r", allow_pickle=False)
            for n in arrays
        },
        items=np.load(folder / _ITEMS, allow_pickle=False),
        histories=pq.read_table(folder / _HISTORIES),
        window=window,
    )


def _check(folder: Path, name: str, digest: str) -> None:
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not path.is_file():
        raise InputError(f"live state: '{path}' is missing; {_REMEDY}")
    if digest_file(path) != digest:
        raise InputError(f"live state: '{path}' is damaged; {_REMEDY}")

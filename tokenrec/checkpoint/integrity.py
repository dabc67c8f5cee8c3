"""What a checkpoint's files must be: their sizes and SHA-256 sums lie beside them, and are checked before it is used.

Orbax renames a checkpoint's folder when it is whole, but a flipped bit in its weights it would read as a weight.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tokenrec.runtime.files import write_json

_SUMS = "sums.*.json"
SET_ASIDE = "damaged-"


def write_sums(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Writes sums of every `parts`-th file of a whole checkpoint, from the `part`-th on, to `sums.PART.json` there."""
    files = {
        _name(folder, path): _measure(path)
        for path in list(_files(folder))[part::parts]
    }
    write_json(folder / _SUMS.replace("*", str(part)), files)


def find_damage(
    folder: Path, part: int = 0, parts: int = 1, largest: float = math.inf
) -> list[str]:
    """What is wrong with a checkpoint's files, a line each; checks every `parts`-th file, from the `part`-th on.

    A checkpoint without sums, whose process ended before it wrote them, has no known damage.

    Args:
      largest: bytes of the longest file whose contents are checked.
    """
    expected: dict[str, Any] = {}
    for path in sorted(folder.glob(_SUMS)):
        try:
            expected |= json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            return [f"{path.name}: {error}"]
    expected = {
        name: sums for name, sums in expected.items() if sums["bytes"] <= largest
    }
    return list(_differences(folder, sorted(expected.items())[part::parts]))


def quarantine(folder: Path) -> Path:
    """Renames a damaged checkpoint, so that it counts no more and can be looked at."""
    target, number = folder.with_name(SET_ASIDE + folder.name), 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{SET_ASIDE}{folder.name}-{number}")
    return folder.rename(target)


def _differences(folder: Path, expected: Iterable[tuple[str, Any]]) -> Iterator[str]:
    for name, was in expected:
        try:
            now = _measure(folder / name)
        except OSError as error:
            yield f"{name}: {error.strerror}"
            continue
        if now["bytes"] != was["bytes"]:
            yield f"{name}: {now['bytes']:,} bytes, not {was['bytes']:,}"
        elif now != was:
            yield f"{name}: other contents than were written"


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _files(folder: Path) -> Iterator[Path]:
    yield from sorted(
        path for path in folder.rglob("*") if path.is_file() and not path.match(_SUMS)
    )


def _name(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix()

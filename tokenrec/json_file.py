"""JSON files that are there whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Writes `value` and the folders above `path`. No reader sees half a file, and a failed write changes nothing.

    Raises:
      ValueError: a number is not finite, which JSON cannot say.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.incomplete-{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

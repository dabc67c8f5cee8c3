"""Write weight files in the safetensors format (tensor_files.py), a tensor at a time.

The library safetensors wants all tensors of a file in memory, and writes files that only
their owner may read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tokenrec.language.tensor_files import DTYPES

_CODES = {dtype: code for code, dtype in DTYPES.items()}


class TensorSpec(NamedTuple):
    """Name, type and shape of a tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensor_file(
    path: Path, specs: Sequence[TensorSpec], arrays: Iterable[np.ndarray]
) -> None:
    """Write a weight file.

    Args:
      path: the file, which is replaced.
      specs: its tensors, of types among `DTYPES`.
      arrays: their numbers, in the order of `specs`.

    Raises:
      OSError: it cannot be written.
      ValueError: `arrays` has fewer or more entries, or others than `specs` says.
    """
    # Wide numbers first: readers view the bytes as they are, which needs offsets that
    # are multiples of a number's width.
    offsets, position = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        offsets[spec.name] = position
        position += spec.bytes
    # transformers reads files with this `format` only.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for spec in specs:
        begin = offsets[spec.name]
        header[spec.name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.bytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        start = file.tell()
        for spec, array in zip(specs, arrays, strict=True):
            if (array.dtype, array.shape) != (spec.dtype, spec.shape):
                raise ValueError(f"{spec} is {array.dtype} of {array.shape}")
            file.seek(start + offsets[spec.name])
            # As bytes: the buffer of a bfloat16 array has no format of Python's.
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

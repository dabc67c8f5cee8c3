"""Write a .npy file part by part, when its number of rows is known last."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np


class ArrayFile:
    """A .npy file that grows along its first axis.

    Args:
      path: the file.
      dtype: type of the entries.
      shape: shape of a row.
    """

    def __init__(self, path: Path, dtype: np.dtype, shape: tuple[int, ...] = ()):
        self._dtype = np.dtype(dtype)
        self._shape = shape
        self._rows = 0
        self._file: IO[bytes] = path.open("wb")
        self._write_header()

    def append(self, rows: np.ndarray) -> None:
        """Append `rows: [n, *shape]`."""
        self._file.write(rows.astype(self._dtype, copy=False).tobytes())
        self._rows += len(rows)

    def finish(self) -> None:
        """Complete the file."""
        # Now the number of rows is known.
        self._file.seek(0)
        self._write_header()
        self.close()

    def close(self) -> None:
        """Close the file if it is open."""
        self._file.close()

    def _write_header(self) -> None:
        # NumPy leaves room in the header for the first axis to grow, so that a header
        # that is written again is as long as before.
        np.lib.format.write_array_header_1_0(
            self._file,
            {
                "descr": np.lib.format.dtype_to_descr(self._dtype),
                "fortran_order": False,
                "shape": (self._rows, *self._shape),
            },
        )

"""Records of the GPU stages: each row is on the disk as soon as it is measured.

A stage is a module whose `main` calls `run_stage`:

    def measure(recorder: Recorder) -> None:
        # Time two cases.
        for size in (1 << 20, 1 << 10):
            if recorder.out_of_time(20, size=size):  # a row that says so
                continue
            with recorder.case(table="copies", size=size):  # an error becomes a row
                recorder.add(table="copies", size=size, milliseconds=...)

    def main(argv: Sequence[str] | None = None) -> int:
        return run_stage("copies", __doc__, measure, argv)

    if __name__ == "__main__":
        sys.exit(main())

The only file that a stage writes into OUT is its record, `OUT/STAGE.jsonl`: the machine
returns few files. Anything else, such as a checkpoint or a trace, goes into a temporary
folder, and its summary into rows. A record has one JSON object per line:

- `{"event": "begin", ...}` and `{"event": "end", ...}`. A record without its end was
  cut off.
- `{"note": text}`.
- rows of results. `table` names the table that a row belongs to, and is the stage's
  name by default. `result` is "PASS", "FAIL", "ERROR" or "left out" where a row is a
  check or was not measured. A stage with a FAIL or an ERROR ends with exit status 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

PASS, FAIL, ERROR, LEFT_OUT = "PASS", "FAIL", "ERROR", "left out"
# Characters of an error that its row keeps: XLA prints whole programs.
ERROR_CHARACTERS = 800


class Recorder:
    """The record of one stage.

    Attributes:
      rehearse: whether sizes are tiny and the device is a CPU.
      failed: whether a row is a FAIL or an ERROR.
    """

    def __init__(
        self,
        out: Path,
        stage: str,
        *,
        rehearse: bool = False,
        seconds: float = 540.0,
    ) -> None:
        """Start the record anew.

        Args:
          out: folder of all records.
          stage: name of the stage.
          rehearse: whether sizes are tiny and the device is a CPU.
          seconds: the stage's budget from now on.
        """
        self.rehearse = rehearse
        self.failed = False
        self._out = out
        self._stage = stage
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / f"{stage}.jsonl"
        self._path.write_text("")
        self._write({"event": "begin", "stage": stage, "rehearse": rehearse})

    def add(self, **row: Any) -> None:
        """Append a row of results, and wait until it is on the disk."""
        if row.get("result") in (FAIL, ERROR):
            self.failed = True
        self._write(row)

    def note(self, text: str) -> None:
        """Append a remark, which the page shows under the stage's tables."""
        self._write({"note": text})

    def check(self, error: float, tolerance: float, **row: Any) -> None:
        """Append a row that passes if `error` is at most `tolerance`; NaN fails."""
        self.add(
            **row,
            error=error,
            tolerance=tolerance,
            result=PASS if error <= tolerance else FAIL,
        )

    def remaining(self) -> float:
        """Seconds left of the stage's budget."""
        return self._end - time.monotonic()

    def out_of_time(self, seconds: float, **row: Any) -> bool:
        """Whether fewer than `seconds` are left; then a row says what is left out."""
        left = self.remaining()
        if left >= seconds:
            return False
        reason = f"{max(left, 0):.0f} s are left, it may take {seconds:.0f} s"
        self.add(**row, result=LEFT_OUT, reason=reason)
        return True

    @contextlib.contextmanager
    def case(self, **row: Any) -> Iterator[None]:
        """Turn an error inside into a row, so that the next case still runs.

        A TimeoutError says that the case is left out.

        Args:
          **row: columns that name the case.
        """
        try:
            yield
        except TimeoutError:
            self.add(**row, result=LEFT_OUT, reason="out of time")
        except Exception as error:  # noqa: BLE001 - a result like others
            traceback.print_exc()
            text = " ".join(f"{type(error).__name__}: {error}".split())
            text = text.replace(str(Path.cwd()), ".")
            self.add(**row, result=ERROR, reason=text[:ERROR_CHARACTERS])

    def measured_peaks(self) -> dict[str, float]:
        """Peaks that the stage `limits` measured; this does not touch the device.

        Returns:
          "bfloat16", "tf32" and "float32": FLOP/s of a matrix product; "copy": bytes
          read and written per second. A peak that was not measured is absent.
        """
        rows = read_rows(self._out / "limits.jsonl")
        return {row["limit"]: row["peak"] for row in rows if "peak" in row}

    def peaks(self) -> dict[str, float]:
        """As `measured_peaks`; without a bfloat16 peak, that of the data sheet."""
        peaks = self.measured_peaks()
        if "bfloat16" in peaks:
            return peaks
        import jax

        from tokenrec.planner.mfu import peak_flops

        flops = peak_flops(jax.devices()[0].device_kind)
        if flops is None:
            self.note("No peak is known: shares of it are absent.")
            return peaks
        self.note(
            "limits.jsonl has no bfloat16 peak: shares are of the data sheet's "
            f"{flops / 1e12:.0f} TFLOP/s."
        )
        return peaks | {"bfloat16": flops}

    def close(self) -> None:
        """End the record."""
        self._write({"event": "end", "seconds": time.monotonic() - self._begin})

    def _write(self, value: dict[str, Any]) -> None:
        # JSON has no NaN and no infinity.
        value = {
            name: str(cell)
            if isinstance(cell, float) and not math.isfinite(cell)
            else cell
            for name, cell in value.items()
        }
        with self._path.open("a") as file:
            file.write(json.dumps(value, default=_plain) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a record; a last line that was cut off is dropped, no file is no rows."""
    rows = []
    if path.is_file():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def stage_flags(
    description: str | None, argv: Sequence[str] | None = None
) -> argparse.Namespace:
    """Read the command line that all stages share.

    Returns:
      `out: Path`, `rehearse: bool` and `seconds: float`, the budget.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny sizes, on any device"
    )
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="budget of the stage"
    )
    return parser.parse_args(argv)


def run_stage(
    stage: str,
    description: str | None,
    measure: Callable[[Recorder], None],
    argv: Sequence[str] | None = None,
) -> int:
    """Run a stage from its command line.

    Args:
      stage: name of the stage.
      description: text of `--help`.
      measure: adds the rows.
      argv: the command line; None: that of the process.

    Returns:
      The exit status: 1 after a FAIL or an ERROR, else 0.
    """
    flags = stage_flags(description, argv)
    recorder = Recorder(
        flags.out, stage, rehearse=flags.rehearse, seconds=flags.seconds
    )
    # An error outside of any case ends the stage, which closes its record properly.
    with recorder.case():
        measure(recorder)
    recorder.close()
    print(f"{stage}: {'FAILED' if recorder.failed else 'done'}", file=sys.stderr)
    return int(recorder.failed)


def _plain(value: Any) -> Any:
    """Turn a NumPy or JAX number or array into a JSON value, and the rest into text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)

"""`prepare --beam` on Beam's local runner against `prepare`, on one synthetic log.

python benchmarks/beam.py [--rows 1000000] [--out benchmarks/results]

Runs in the environment of the extra `beam` (docs/beam.md). Each way is a process of its own; its seconds include the
start of Python and the generation of the rows, twice with Beam. Writes beam.json and
beam.md. About a minute on two cores.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_result

WAYS = {"local": (), "beam, one process": ("--beam",)}


def measure(rows: int, flags: tuple[str, ...]) -> dict[str, Any]:
    """Prepares a synthetic log by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            "-m",
            "tokenrec",
            "prepare",
            "synthetic",
            "--rows",
            str(rows),
        ]
        wall = time.perf_counter()
        child = subprocess.Popen(
            [*command, "--out", str(Path(folder, "set")), *flags],
            stdout=subprocess.DEVNULL,
        )
        _, status, used = os.wait4(child.pid, 0)
        wall, child.returncode = (
            time.perf_counter() - wall,
            os.waitstatus_to_exitcode(status),
        )
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, child.args)
    cpu = used.ru_utime + used.ru_stime
    return {
        "rows": rows,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "rows_per_second": round(rows / wall),
        "rows_per_cpu_second": round(rows / cpu),
        "peak_mib": round(used.ru_maxrss / 1024),  # kilobytes on Linux
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = []
    for name, flags in WAYS.items():
        results.append({"prepare": name} | measure(arguments.rows, flags))
        print(results[-1], flush=True)
    write_result(
        arguments.out / "beam",
        results,
        {"users": 200, "items": 100},
        f"python benchmarks/beam.py --rows {arguments.rows}",
        title="Prepare on Apache Beam's local runner against the local path",
        packages=("tokenrec", "numpy", "pyarrow", "apache-beam", "tensorflow-datasets"),
    )


if __name__ == "__main__":
    main()

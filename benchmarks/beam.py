"""Compare `prepare --beam` on Beam's local runner with `prepare`, on one synthetic log.

    python benchmarks/beam.py [--rows 1000000] [--out DIR]

Both run without and with statistics of the past (`STATISTICS`, 19 features).

It needs the environment of the extra `beam` (docs/guides/beam.md). Each variant is a process
of its own; its seconds include the start of Python and the generation of the rows,
which Beam does twice.

Writes beam.json and beam.md to `--out`, by default benchmarks/results. It takes about
three minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import write_result

# Name of each variant in the table, and its flags.
VARIANTS = {"local": (), "beam, one process": ("--beam",)}
# Keys of one machine's partitions (with user_id) and keys of all, with half-lives.
STATISTICS = {
    "keys": [
        "item_id",
        {
            "key": ["user_id", "genre"],
            "tasks": "click",
            "means": "seconds",
            "horizons": ["all", "7d"],
        },
        {"key": ["genre", "hour"], "tasks": "click"},
        {"key": "segment", "tasks": "click", "horizons": "1d"},
    ],
    "matches": ["genre"],
    "times": {"gap": True, "idle_after": "seconds", "session": "30m"},
}


def measure(rows: int, flags: tuple[str, ...], statistics: bool) -> dict[str, Any]:
    """Prepare a synthetic log by the command line, and return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        if statistics:
            path = Path(folder, "statistics.json")
            path.write_text(json.dumps(STATISTICS))
            flags = (*flags, f"--statistics={path}")
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
        # `wait4` reports the resources of this child alone.
        _, status, used = os.wait4(child.pid, 0)
        wall = time.perf_counter() - wall
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, child.args)
    cpu = used.ru_utime + used.ru_stime
    return {
        "rows": rows,
        "seconds": round(wall, 1),
        "cpu_seconds": round(cpu, 1),
        "rows_per_second": round(rows / wall),
        "rows_per_cpu_second": round(rows / cpu),
        # Linux reports kilobytes.
        "peak_mib": round(used.ru_maxrss / 1024),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    results = []
    for statistics in (False, True):
        for name, flags in VARIANTS.items():
            name += ", statistics" if statistics else ""
            figures = measure(arguments.rows, flags, statistics)
            results.append({"prepare": name} | figures)
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

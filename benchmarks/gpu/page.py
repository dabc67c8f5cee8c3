"""Make one JSON file and one page from the records of the stages.

    python -m benchmarks.gpu.page --out OUT [--logs LOGS] [--stages NAME,NAME]

It reads every `OUT/STAGE.jsonl` and writes `OUT/gpu_CARD.json` and `OUT/gpu_CARD.md`.
It runs after each stage, so that the page is there however the command ends, and reads
only what is on the disk: neither JAX nor a device is needed. A stage that failed, was
cut off or has no record is named at the top.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.record import ERROR, FAIL, LEFT_OUT, PASS, read_rows
from benchmarks.report import markdown_table

STAGES = {
    "limits": "Limits of the card",
    "correctness": "Correctness",
    "attention": "Attention",
    "steps": "Whole steps",
    "tables": "Tables",
    "train": "A model trained whole",
}
# Lines of a stage's log on the page, where it failed.
LOG_LINES = 40


class Stage(NamedTuple):
    """The record of a stage.

    Attributes:
      name: key of `STAGES`.
      state: "passed", "FAILED", "CUT OFF" or "NO RECORD".
      rehearsed: whether its figures mean nothing.
      seconds: its duration; None if it has no end.
      rows: rows of results.
      notes: remarks.
    """

    name: str
    state: str
    rehearsed: bool
    seconds: float | None
    rows: list[dict[str, Any]]
    notes: list[str]

    def count(self, result: str) -> int:
        """Rows with this result."""
        return sum(row.get("result") == result for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """A row of the table at the top."""
        return {
            "stage": self.name,
            "state": self.state,
            "seconds": self.seconds,
            "rows": len(self.rows),
            "passed": self.count(PASS),
            "failed": self.count(FAIL) + self.count(ERROR),
            "left out": self.count(LEFT_OUT),
        }


def read_stage(out: Path, name: str) -> Stage:
    """Read the record of a stage."""
    records = read_rows(out / f"{name}.jsonl")
    ends = [record for record in records if record.get("event") == "end"]
    # A row may have a column `note`; a remark has nothing else.
    notes = [record["note"] for record in records if record.keys() == {"note"}]
    rows = [
        record
        for record in records
        if "event" not in record and record.keys() != {"note"}
    ]
    failed = any(row.get("result") in (FAIL, ERROR) for row in rows)
    if not records:
        state = "NO RECORD"
    elif failed:
        state = "FAILED"
    elif not ends:
        state = "CUT OFF"
    else:
        state = "passed"
    rehearsed = any(record.get("rehearse") for record in records)
    seconds = ends[0]["seconds"] if ends else None
    return Stage(name, state, rehearsed, seconds, rows, notes)


def tables_of(stage: Stage) -> dict[str, list[dict[str, Any]]]:
    """Rows by the name of their table, without it, in order of appearance."""
    tables: dict[str, list[dict[str, Any]]] = {}
    for row in stage.rows:
        row = dict(row)
        tables.setdefault(row.pop("table", stage.name), []).append(row)
    return tables


def card_of(stages: Sequence[Stage]) -> str:
    """The card as a part of a file name: "nvidia_h100_80gb_hbm3", or "unknown"."""
    for row in (row for stage in stages for row in stage.rows):
        if row.get("table") == "device":
            return re.sub(r"[^a-z0-9]+", "_", row["device"].lower()).strip("_")
    return "unknown"


def stage_lines(stage: Stage, logs: Path | None) -> list[str]:
    """The section of a stage: its tables, notes, and the end of a failed log."""
    lines = [f"## {STAGES[stage.name]}", ""]
    if stage.state != "passed":
        lines += [f"**{stage.state}**", ""]
    for name, rows in tables_of(stage).items():
        lines += [f"### {name}", "", markdown_table(rows), ""]
    lines += [f"- {note}" for note in stage.notes]
    log = logs / f"{stage.name}.log" if logs else None
    if stage.state != "passed" and log is not None and log.is_file():
        text = log.read_text(errors="replace").replace(str(Path.cwd()), ".")
        end = text.splitlines()[-LOG_LINES:]
        lines += ["", "End of its log:", "", *(f"    {line}" for line in end), ""]
    return lines


def write_page(out: Path, logs: Path | None, names: Sequence[str]) -> list[Stage]:
    """Write both files; return the stages that were to run or have a record."""
    found = [read_stage(out, name) for name in STAGES]
    stages = [s for s in found if s.name in names or s.state != "NO RECORD"]
    command = "benchmarks/gpu/run.sh OUT"
    if len(stages) < len(STAGES):
        command += f" --stages {','.join(stage.name for stage in stages)}"
    if any(stage.rehearsed for stage in stages):
        command += " --rehearse"
    card = card_of(stages)
    value = {
        "command": command,
        "stages": [
            stage.summary() | {"notes": stage.notes, "tables": tables_of(stage)}
            for stage in stages
        ],
    }
    (out / f"gpu_{card}.json").write_text(json.dumps(value, indent=1) + "\n")
    bad = [
        f"{stage.name} ({stage.state})" for stage in stages if stage.state != "passed"
    ]
    lines = [f"# On a GPU: {card}", "", f"`{command}`", ""]
    if any(stage.rehearsed for stage in stages):
        lines += ["**A rehearsal: the figures mean nothing.**", ""]
    if bad:
        lines += [f"**NOT ALL PASSED: {', '.join(bad)}.**", ""]
    lines += [markdown_table([stage.summary() for stage in stages]), ""]
    for stage in stages:
        lines += stage_lines(stage, logs)
    (out / f"gpu_{card}.md").write_text("\n".join(lines).rstrip() + "\n")
    return stages


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page, and print its first table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the records")
    parser.add_argument("--logs", type=Path, help="folder of the stages' logs")
    parser.add_argument(
        "--stages", default=",".join(STAGES), help="stages that were to run"
    )
    flags = parser.parse_args(argv)
    stages = write_page(flags.out, flags.logs, flags.stages.split(","))
    print(markdown_table([stage.summary() for stage in stages]))
    return int(any(stage.state != "passed" for stage in stages))


if __name__ == "__main__":
    sys.exit(main())

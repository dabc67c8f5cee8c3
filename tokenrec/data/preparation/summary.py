"""Describe a prepared data set in a few lines, from its counts."""

from __future__ import annotations

from typing import Any

from tokenrec.data.metadata import Metadata
from tokenrec.data.source import SPLITS
from tokenrec.runtime.result_table import format_table

# Counts that the table or a notice tells, by the start of their names.
_TOLD = (
    *(f"{what}_{split}" for what in ("rows", "scored", "events") for split in SPLITS),
    *("users", "items", "chunks_", "labelled_", "positives_", "missing_train_"),
    *("learned_", "repeats_"),
)


def summarise(metadata: Metadata) -> str:
    """Return the numbers of users, items and repeats, and a table of the splits.

    All counts are in `tokenrec.json`. What a source itself counted is listed too.
    """
    counts = metadata.counts
    own = [name for name in counts if counts[name] and not name.startswith(_TOLD)]
    listed = ("users", "items", "repeats_dropped", *own)
    first = ", ".join(f"{name} {counts[name]:,}" for name in listed)
    rows = [_split_row(metadata, split) for split in SPLITS if counts[f"rows_{split}"]]
    return f"{first}\n{format_table(rows)}"


def _split_row(metadata: Metadata, split: str) -> dict[str, Any]:
    counts = metadata.counts
    row: dict[str, Any] = {"split": split}
    for what in ("rows", "scored", "events"):
        row[what] = counts[f"{what}_{split}"]
    for task in metadata.schema.tasks:
        labelled = counts[f"labelled_{split}_{task.name}"]
        if task.kind != "binary":
            row[f"{task.name} known"] = labelled
            continue
        positives = counts[f"positives_{split}_{task.name}"]
        row[f"{task.name}=1"] = positives
        row[f"{task.name}=0"] = labelled - positives
    return row

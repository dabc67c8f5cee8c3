"""Say what was odd in a log that was prepared, from what was counted on the way."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from tokenrec.data.dataset import Dataset
from tokenrec.data.metadata import Metadata
from tokenrec.data.preparation.leaks import find_leaks
from tokenrec.data.schema import Task
from tokenrec.data.source import SPLITS

# Features that lack a value in this share of training rows are listed.
_MOSTLY_MISSING = 0.5
_MOST_NAMES = 8  # features that a notice lists
_ROWS_OF_GROUP = {
    "user": "users_train",
    "catalogue": "items_train",
    "row": "rows_train",
    "action": "rows_train",
}


def say_notices(dataset: Dataset) -> None:
    """Print what the user should know of a data set to standard error."""
    for notice in (*notices(dataset.metadata), *_leak_notices(dataset)):
        print(f"tokenrec: {notice}", file=sys.stderr)


def notices(metadata: Metadata) -> Iterator[str]:
    """Yield what the user should know of a data set, a sentence each."""
    yield from _join_notices(metadata)
    yield from _repeat_notices(metadata)
    # A data set that goes on from another has no training rows.
    if "like" not in metadata.options:
        yield from _missing_notices(metadata)
        yield from _label_notices(metadata)


def _join_notices(metadata: Metadata) -> Iterator[str]:
    for entities in ("users", "items"):
        without = metadata.counts.get(f"{entities}_without_row", 0)
        if without:
            yield (
                f"{entities} of the log without a row in the table of {entities}: "
                f"{without:,}; their features are missing"
            )


def _leak_notices(dataset: Dataset) -> Iterator[str]:
    for leak in find_leaks(dataset):
        yield (
            f"feature '{leak.feature}' predicts task '{leak.task}' by itself (AUC "
            f"{leak.auc:.3f} on training rows), which looks like a leak: if it is known "
            "only after the row was shown, give it the entity 'action', or leave it out"
        )


def _repeat_notices(metadata: Metadata) -> Iterator[str]:
    counts = metadata.counts
    labels = counts.get("repeats_other_labels", 0)
    features = counts.get("repeats_other_features", 0)
    if labels or features:
        yield (
            f"{counts['repeats_dropped']:,} rows repeat user, item and time of another "
            f"and were joined with it; {labels:,} of them had another label (the "
            f"greatest was kept) and {features:,} other features (the row with fewer missing "
            "values was kept)"
        )


def _missing_notices(metadata: Metadata) -> Iterator[str]:
    never, mostly = [], []
    for feature in metadata.schema.features:
        rows = metadata.counts.get(_ROWS_OF_GROUP[feature.group], 0)
        missing = metadata.counts.get(f"missing_train_{feature.name}", 0)
        if rows and missing == rows:
            never.append(feature.name)
        # An impression has no action, so that actions may well be missing in most rows.
        elif feature.group != "action" and rows and missing >= _MOSTLY_MISSING * rows:
            mostly.append(f"{feature.name} {missing / rows:.0%}")
    if never:
        yield (
            f"never known in training: {_listed(never)}; check the columns, or leave "
            "the features out"
        )
    if mostly:
        yield f"missing in most training rows: {_listed(mostly)}"


def _listed(names: Sequence[str]) -> str:
    """Join names; of many, the first, since `tokenrec.json` has the counts of all."""
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    more = len(names) - _MOST_NAMES
    return f"{', '.join(names[:_MOST_NAMES])} and {more} more"


def _constant_notice(task: Task) -> Iterator[str]:
    if task.kind == "real" and task.least == task.most:
        yield (
            f"task '{task.name}': all labels of train are {task.least:g}, so that there "
            "is nothing to learn; check its column"
        )


def _label_notices(metadata: Metadata) -> Iterator[str]:
    counts = metadata.counts
    for task in metadata.schema.tasks:
        labelled = counts.get(f"labelled_train_{task.name}", 0)
        if not labelled:
            yield (
                f"no impression of train has a label of task '{task.name}': a ranking "
                "model learns nothing of it"
            )
            continue
        if task.kind != "binary":
            yield from _constant_notice(task)
            continue
        for split in SPLITS:
            labelled = counts.get(f"labelled_{split}_{task.name}", 0)
            positives = counts.get(f"positives_{split}_{task.name}", 0)
            if labelled and positives in (0, labelled):
                value = 1 if positives else 0
                yield (
                    f"task '{task.name}' has one class alone in {split}: all "
                    f"{labelled:,} labels are {value}, so that nothing can be ranked "
                    "and AUC is undefined; add rows of the other class (what was shown "
                    "and not chosen), or train with data.objective='retrieval'"
                )

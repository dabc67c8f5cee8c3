"""Compute the columns of KuaiRand's log rows, for impressions and earlier events."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.kuairand_log import LOG_TYPES, TASKS, parse_date
from tokenrec.data.sources.kuairand_videos import DAY_MS, Videos, bucket, integers

# Edges of the buckets of the share of a video that was played.
PLAYED_EDGES = np.array([0.02, 0.1, 0.25, 0.5, 0.75, 0.95, 1.05, 1.5, 2.0])


def raw_rows(
    batch: pa.RecordBatch, split: np.ndarray, scored: np.ndarray
) -> pa.RecordBatch:
    """Give rows of the log and of the history the same columns.

    They are those of `LOG_TYPES`, null where absent, and `split` and `scored`.

    Args:
      batch: rows with some of the columns.
      split: `[n] int8`, index into `SPLITS`.
      scored: `[n] bool`, True for an impression.
    """
    names = batch.schema.names
    columns = [
        batch.column(name) if name in names else pa.nulls(batch.num_rows, kind)
        for name, kind in LOG_TYPES.items()
    ]
    return pa.RecordBatch.from_arrays(
        [*columns, pa.array(split), pa.array(scored)],
        names=[*LOG_TYPES, "split", "scored"],
    )


def finish_rows(table: pa.Table, videos: Videos) -> pa.RecordBatch:
    """Make the columns of `Source.rows`.

    Events without a log row (those of the history) have null context.

    Args:
      table: rows as `raw_rows` makes them.
      videos: videos of the catalogue.
    """
    scored = table["scored"].to_numpy()
    rows = len(scored)
    upload_ms = videos.lookup("upload_ms", table["video_id"].to_numpy(), np.nan)
    age_ms = table["time_ms"].to_numpy() - upload_ms
    duration = table["duration_ms"].to_numpy()
    # A duration of 0 or null has no share; `where` computes both sides.
    with np.errstate(divide="ignore", invalid="ignore"):
        share = table["play_time_ms"].to_numpy() / duration
        played = np.where(duration > 0, share, np.nan)
    # A day of upload is known, not its hour: a video may seem to be shown before.
    age_days = np.where(scored, np.maximum(age_ms, 0.0) / DAY_MS, np.nan)
    columns = {
        "user_id": table["user_id"],
        "item_id": table["video_id"],
        "time_ms": table["time_ms"],
        "split": table["split"],
        "event": np.ones(rows, bool),
        "scored": scored,
        "request": np.full(rows, -1, np.int64),
        **{f"label_{task}": table[task] for task in TASKS},
        "tab": pc.cast(table["tab"], pa.int64()),
        # `hourmin` is 1430 for 14:30.
        "hour": pc.divide(pc.cast(table["hourmin"], pa.int64()), 100),
        "weekday": _weekdays(table["date"]),
        "video_age_days": _null_for_nan(age_days),
        **{task: pc.cast(table[task], pa.int64()) for task in TASKS},
        "play_time_ms": table["play_time_ms"],
        "played_share": bucket(played, PLAYED_EDGES),
    }
    return pa.table(columns).combine_chunks().to_batches()[0]


def _weekdays(dates: pa.ChunkedArray) -> pa.Array:
    """Return the weekday of each date, Monday 0; null for null."""
    # A log has few dates, so that each is converted once.
    numbers, inverse = np.unique(integers(dates), return_inverse=True)
    days = [
        -1 if number < 0 else parse_date(number).weekday()
        for number in numbers.tolist()
    ]
    weekday = np.array(days, np.int64)[inverse]
    return pa.array(weekday, mask=weekday < 0)


def _null_for_nan(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))

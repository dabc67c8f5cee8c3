"""Read KuaiRand's videos: the catalogue, and look-ups of a log row's video."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.sources.tabular import read_csv

VIDEO_CATEGORIES = (
    "music_id",
    "upload_type",
    "video_type",
    "music_type",
    "visible_status",
)
MOST_TAGS = 3
# Edges of the buckets of a video's duration, seconds.
DURATION_EDGES_S = np.geomspace(3.0, 1200.0, 20)
CHINA_MS = 8 * 3_600_000  # dates of the files are local dates, UTC+8
DAY_MS = 86_400_000

_TYPES = {
    "video_id": pa.int64(),
    "author_id": pa.int64(),
    "tag": pa.string(),
    "video_duration": pa.float64(),
    "upload_dt": pa.date32(),
    **{name: pa.string() for name in VIDEO_CATEGORIES},
}


class Videos:
    """Videos of the files `video_features_basic_*`.

    Args:
      paths: the files.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def catalogue(self) -> pa.Table:
        """Return the table of items, as `Source.items` does."""
        table = self._read()
        duration = table["video_duration"]
        seconds = duration.to_numpy() / 1000.0
        # Tags are one field, separated by commas.
        tags = pc.list_slice(pc.split_pattern(table["tag"], ","), 0, MOST_TAGS)
        return pa.table(
            {
                "item_id": table["video_id"],
                "video_id": table["video_id"],
                "author_id": table["author_id"],
                "tag": tags,
                **{name: table[name] for name in VIDEO_CATEGORIES},
                "duration_bucket": bucket(seconds, DURATION_EDGES_S),
                "video_duration": duration,
            }
        )

    def lookup(self, name: str, video: np.ndarray, missing: float) -> np.ndarray:
        """Look up an attribute of each log row's video.

        Args:
          name: "author" or "tag" (codes, int64) or "upload_ms" (float64).
          video: `[n] int64`, video ids.
          missing: result where the video is in no file.

        Returns:
          `[n]`, -1 or NaN where the video has no such attribute.
        """
        ids, values = self._attributes["id"], self._attributes[name]
        # An id beyond the last has the index V, which is out of range.
        index = np.searchsorted(ids, video)
        known = index < len(ids)
        known[known] = ids[index[known]] == video[known]
        result = np.full(len(video), missing, values.dtype)
        result[known] = values[index[known]]
        return result

    def _read(self) -> pa.Table:
        batches = [batch for path in self._paths for batch in read_csv(path, _TYPES)]
        return pa.Table.from_batches(batches, schema=pa.schema(_TYPES))

    @functools.cached_property
    def _attributes(self) -> dict[str, np.ndarray]:
        """Attributes by name, `[V]` each, in ascending order of the videos' ids.

        Authors and first tags are codes, -1 for none; the time of the upload is in
        milliseconds since 1970 UTC, NaN for none.
        """
        table = self._read().select(["video_id", "author_id", "tag", "upload_dt"])
        order = np.argsort(table["video_id"].to_numpy(), kind="stable")
        table = table.take(pa.array(order))
        tag = pc.list_element(pc.split_pattern(pc.fill_null(table["tag"], ""), ","), 0)
        days = pc.cast(pc.cast(table["upload_dt"], pa.int32()), pa.float64())
        return {
            "id": table["video_id"].to_numpy(),
            "author": _codes(table["author_id"]),
            "tag": _codes(pc.if_else(pc.equal(tag, ""), None, tag)),
            # A local date begins at midnight in China.
            "upload_ms": days.to_numpy() * float(DAY_MS) - CHINA_MS,
        }


def integers(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Return `[n] int64`, -1 for null."""
    return pc.fill_null(pc.cast(values, pa.int64()), -1).to_numpy(zero_copy_only=False)


def bucket(values: np.ndarray, edges: np.ndarray) -> pa.Array:
    """Return the bucket of each of `values: [n]`, an integer; null where NaN."""
    return pa.array(
        np.searchsorted(edges, values, side="right").astype(np.int64),
        mask=np.isnan(values),
    )


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    """Number the distinct values: `[n] int64`, -1 for null."""
    return integers(values.combine_chunks().dictionary_encode().indices)

"""KuaiRand (Gao et al., CIKM 2022): impressions of short videos, Pure, 1K and 27K, from the official files.

The whole-period video statistics and the randomly exposed log are not read: the first look into the future, the second
is another policy.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.past_rates import PastRates, RateKey
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance
from tokenrec.data.sources.download import download, extract
from tokenrec.data.sources.kuairand_history import HISTORY_TYPES, history_rows
from tokenrec.data.sources.kuairand_log import (
    LOG_TYPES,
    TASKS,
    first_times,
    parse_date,
    read_log,
)
from tokenrec.data.sources.tabular import read_csv, read_parquet
from tokenrec.data.time_order import time_ordered
from tokenrec.errors import InputError, suggest

RATE_TASKS = ("is_click", "long_view")
RATE_KEYS = (
    RateKey("video", "item"),
    RateKey("author", "item"),
    RateKey("tag", "item"),
    RateKey("user", "context"),
    RateKey("user_author", "context"),
    RateKey("user_tag", "context"),
    RateKey("tab", "context"),
)
DURATION_EDGES_S = np.geomspace(3.0, 1200.0, 20)
PLAYED_EDGES = np.array(
    [0.02, 0.1, 0.25, 0.5, 0.75, 0.95, 1.05, 1.5, 2.0]
)  # shares of the video's duration
CHINA_MS = 8 * 3_600_000  # dates of the files are local dates, UTC+8

CITATION = (
    "Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed Videos, CIKM 2022, "
    "https://doi.org/10.1145/3511808.3557624"
)
LICENCE = "CC BY-SA 4.0"
RECORD = "https://zenodo.org/records/10439422/files"
# Archive, MD5 as the data set's own page gives it, most bytes of the files unpacked.
VARIANTS = {
    "pure": ("KuaiRand-Pure", "0820331067a3784d9691136f772b35a7", 10**9),
    "1k": ("KuaiRand-1K", "6b0b9c8222d67fcd4c676218edca3f1f", 10**10),
    "27k": ("KuaiRand-27K", "3e3c799a24e2d23a4d2c757fbf9adf59", 10**11),
}
_NEEDED = re.compile(
    r"^(log_standard_.*|user_features_.*|video_features_basic_.*)\.csv$|^LICENSE"
)

_USER_CATEGORIES = (
    "user_active_degree",
    "is_lowactive_period",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
)
_USER_NUMBERS = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
_VIDEO_CATEGORIES = (
    "music_id",
    "upload_type",
    "video_type",
    "music_type",
    "visible_status",
)

_MOST_TAGS = 3
_OUT_ROWS = 1 << 16


class KuaiRandSource:
    """Impressions of the `log_standard_*` files, and unscored earlier events of an optional `history_to_*` file.

    Args:
      root: folder of the files, or the folder whose `data` holds them.
      valid_from, test_from: ISO dates; rows of the log before the first are train, before the second valid, then test.
      rates: adds past rates (`tokenrec.data.past_rates`) of clicks and long views. They need the rows in the order of
        time, and so room for a copy of the log in the folder for temporary files.

    Raises:
      InputError: a file is missing, or files of more than one variant lie together.
    """

    def __init__(
        self, root: Path, valid_from: str, test_from: str, rates: bool = True
    ) -> None:
        self._valid_from = _date_number("valid_from", valid_from)
        self._test_from = _date_number("test_from", test_from)
        if self._test_from < self._valid_from:
            raise InputError(
                f"test_from={test_from} lies before valid_from={valid_from}; exchange them"
            )
        folder = next(
            (
                d
                for d in (Path(root), Path(root) / "data")
                if any(d.glob("log_standard_*.csv"))
            ),
            None,
        )
        if folder is None:
            raise InputError(
                f"root '{root}' holds no log_standard_*.csv (nor does its 'data'); fetch the official files"
            )
        self._logs = sorted(folder.glob("log_standard_*.csv"))
        self._users = _side_files(folder, "user_features_*.csv")
        self._videos = _side_files(folder, "video_features_basic_*.csv")
        self._histories = sorted(folder.glob("history_to_*.parquet"))
        files = (*self._logs, *self._users, *self._videos, *self._histories)
        variants = {
            match[1]
            for f in files
            if (match := re.search(r"_(pure|1k|27k)(?:_part\d+)?\.", f.name.lower()))
        }
        if len(variants) > 1:
            raise InputError(
                f"folder '{folder}' mixes {sorted(variants)}, whose ids differ; keep one variant a folder"
            )
        self._rates = rates
        self.schema = Schema(features(rates=rates), tuple(Task(name) for name in TASKS))
        self.provenance = Provenance("kuairand", LICENCE, CITATION, files)

    def users(self) -> pa.Table:
        types = {"user_id": pa.int64()}
        types |= {name: pa.string() for name in _USER_CATEGORIES} | {
            name: pa.float64() for name in _USER_NUMBERS
        }
        return pa.Table.from_batches(
            [b for f in self._users for b in read_csv(f, types)],
            schema=pa.schema(types),
        )

    def items(self) -> pa.Table:
        table = self._read_videos()
        duration = table["video_duration"]
        seconds = duration.to_numpy() / 1000.0
        return pa.table(
            {
                "item_id": table["video_id"],
                "video_id": table["video_id"],
                "author_id": table["author_id"],
                "tag": pc.list_slice(
                    pc.split_pattern(table["tag"], ","), 0, _MOST_TAGS
                ),
                **{name: table[name] for name in _VIDEO_CATEGORIES},
                "duration_bucket": _bucket(seconds, DURATION_EDGES_S),
                "video_duration": duration,
            }
        )

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Batches as `Source.rows` says; with rates in the order of time, otherwise in the order of the files."""
        raw = itertools.chain(self._history(), self._log())
        if not self._rates:
            for batch in raw:
                yield self._finish(pa.Table.from_batches([batch]), {})
            return
        rates = PastRates(RATE_KEYS, RATE_TASKS)
        for table in time_ordered(raw):
            labels = {task: _int(table[task]) for task in RATE_TASKS}
            past = rates.update(
                table["time_ms"].to_numpy(),
                self._rate_keys(table),
                labels,
                ~_repeats(table),
            )
            for start in range(0, table.num_rows, _OUT_ROWS):
                part = slice(start, start + _OUT_ROWS)
                yield self._finish(
                    table[part], {name: values[part] for name, values in past.items()}
                )

    def _log(self) -> Iterator[pa.RecordBatch]:
        for batch in itertools.chain.from_iterable(map(read_log, self._logs)):
            date = batch.column("date").to_numpy()
            split = (date >= self._valid_from).astype(np.int8) + (
                date >= self._test_from
            ).astype(np.int8)
            yield _raw(batch, split, np.ones(len(date), bool))

    def _history(self) -> Iterator[pa.RecordBatch]:
        if not self._histories:
            return
        users, first_ms = first_times(self._logs)
        for path in self._histories:
            for batch in read_parquet(path, HISTORY_TYPES):
                rows = history_rows(batch, users, first_ms, path)
                yield _raw(
                    rows,
                    np.zeros(rows.num_rows, np.int8),
                    np.zeros(rows.num_rows, bool),
                )

    def _read_videos(self) -> pa.Table:
        types = {
            "video_id": pa.int64(),
            "author_id": pa.int64(),
            "tag": pa.string(),
            "video_duration": pa.float64(),
            "upload_dt": pa.date32(),
            **{name: pa.string() for name in _VIDEO_CATEGORIES},
        }
        return pa.Table.from_batches(
            [b for f in self._videos for b in read_csv(f, types)],
            schema=pa.schema(types),
        )

    @functools.cached_property
    def _catalogue(self) -> dict[str, np.ndarray]:
        """Per video, ascending by `id`: codes of its author and first tag (-1: none), upload time in ms (NaN: none)."""
        table = self._read_videos().select(
            ["video_id", "author_id", "tag", "upload_dt"]
        )
        table = table.take(
            pa.array(np.argsort(table["video_id"].to_numpy(), kind="stable"))
        )
        tag = pc.list_element(pc.split_pattern(pc.fill_null(table["tag"], ""), ","), 0)
        day = pc.cast(pc.cast(table["upload_dt"], pa.int32()), pa.float64()).to_numpy()
        return {
            "id": table["video_id"].to_numpy(),
            "author": _codes(table["author_id"]),
            "tag": _codes(pc.if_else(pc.equal(tag, ""), None, tag)),
            "upload_ms": day * 86_400_000.0 - CHINA_MS,
        }

    def _of_video(self, name: str, video: np.ndarray, missing: float) -> np.ndarray:
        ids, values = self._catalogue["id"], self._catalogue[name]
        at = np.searchsorted(ids, video)
        known = at < len(ids)
        known[known] = ids[at[known]] == video[known]
        found = np.full(len(video), missing, values.dtype)
        found[known] = values[at[known]]
        return found

    def _rate_keys(self, table: pa.Table) -> dict[str, np.ndarray]:
        user, video = table["user_id"].to_numpy(), table["video_id"].to_numpy()
        author, tag = (
            self._of_video("author", video, -1),
            self._of_video("tag", video, -1),
        )
        return {
            "video": video,
            "author": author,
            "tag": tag,
            "user": user,
            "user_author": _pair(user, author),
            "user_tag": _pair(user, tag),
            "tab": _int(table["tab"]),
        }

    def _finish(self, table: pa.Table, past: dict[str, np.ndarray]) -> pa.RecordBatch:
        """The columns of `Source.rows`; of events without a log row, context and rates are null."""
        logged = table["scored"].to_numpy()
        rows = len(logged)
        time_ms = table["time_ms"].to_numpy()
        age_ms = time_ms - self._of_video(
            "upload_ms", table["video_id"].to_numpy(), np.nan
        )
        duration = table["duration_ms"].to_numpy()
        with np.errstate(divide="ignore", invalid="ignore"):
            played = np.where(
                duration > 0, table["play_time_ms"].to_numpy() / duration, np.nan
            )
        columns = {
            "user_id": table["user_id"],
            "item_id": table["video_id"],
            "time_ms": table["time_ms"],
            "split": table["split"],
            "event": np.ones(rows, bool),
            "scored": logged,
            "request": np.full(rows, -1, np.int64),
            **{f"label_{task}": table[task] for task in TASKS},
            "tab": pc.cast(table["tab"], pa.int64()),
            "hour": pc.divide(pc.cast(table["hourmin"], pa.int64()), 100),
            "weekday": _weekdays(table["date"]),
            "video_age_days": _nullable(
                np.where(logged, np.maximum(age_ms, 0.0) / 86_400_000, np.nan)
            ),
            **{task: pc.cast(table[task], pa.int64()) for task in TASKS},
            "play_time_ms": table["play_time_ms"],
            "played_share": _bucket(played, PLAYED_EDGES),
            **{
                name: _nullable(np.where(logged, values, np.float32(np.nan)))
                for name, values in past.items()
            },
        }
        return pa.table(columns).combine_chunks().to_batches()[0]


def features(*, rates: bool) -> tuple[Feature, ...]:
    """The features that a prepared KuaiRand has, with or without past rates."""
    past = PastRates(RATE_KEYS, RATE_TASKS).features() if rates else ()
    return (
        Feature("user_id", "categorical", "user"),
        *(Feature(name, "categorical", "user") for name in _USER_CATEGORIES),
        *(Feature(name, "dense", "user", transform="log1p") for name in _USER_NUMBERS),
        Feature("video_id", "categorical", "item"),
        Feature("author_id", "categorical", "item"),
        Feature("tag", "multi_valued", "item", length=_MOST_TAGS),
        *(Feature(name, "categorical", "item") for name in _VIDEO_CATEGORIES),
        Feature("duration_bucket", "categorical", "item"),
        Feature("video_duration", "dense", "item", transform="log1p"),
        Feature("video_age_days", "dense", "item", transform="log1p", per_row=True),
        Feature("tab", "categorical", "context"),
        Feature("hour", "categorical", "context"),
        Feature("weekday", "categorical", "context"),
        *(Feature(name, "categorical", "action") for name in TASKS),
        Feature("play_time_ms", "dense", "action", transform="log1p"),
        Feature("played_share", "categorical", "action"),
        *past,
    )


def _side_files(folder: Path, pattern: str) -> list[Path]:
    if not (files := sorted(folder.glob(pattern))):
        raise InputError(
            f"folder '{folder}' holds no {pattern}; it belongs to the official files, place it there"
        )
    return files


def _date_number(field: str, value: str) -> int:
    try:
        return int(datetime.date.fromisoformat(value).strftime("%Y%m%d"))
    except ValueError as error:
        raise InputError(
            f"{field}='{value}' is not a date; write it as 2022-05-03"
        ) from error


def _weekdays(dates: pa.ChunkedArray) -> pa.Array:
    numbers, inverse = np.unique(_int(dates), return_inverse=True)
    days = [
        -1 if number < 0 else parse_date(number).weekday()
        for number in numbers.tolist()
    ]
    weekday = np.array(days, np.int64)[inverse]
    return pa.array(weekday, mask=weekday < 0)


def _raw(
    batch: pa.RecordBatch, split: np.ndarray, scored: np.ndarray
) -> pa.RecordBatch:
    """Log and history rows alike: the columns of the log, null where absent, with `split` and `scored`."""
    names = batch.schema.names
    columns = [
        batch.column(n) if n in names else pa.nulls(batch.num_rows, t)
        for n, t in LOG_TYPES.items()
    ]
    return pa.RecordBatch.from_arrays(
        [*columns, pa.array(split), pa.array(scored)],
        names=[*LOG_TYPES, "split", "scored"],
    )


def _repeats(table: pa.Table) -> np.ndarray:
    """Rows whose user, video and time an earlier row has; `prepare` drops them, so they must not count twice."""
    columns = [table[name].to_numpy() for name in ("video_id", "user_id", "time_ms")]
    order = np.lexsort(columns)
    same = np.ones(len(order) - 1, bool)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    repeated = np.zeros(len(order), bool)
    repeated[order[1:]] = same
    return repeated


def _int(values: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Integers, -1 for null."""
    return pc.fill_null(pc.cast(values, pa.int64()), -1).to_numpy(zero_copy_only=False)


def _codes(values: pa.ChunkedArray) -> np.ndarray:
    return _int(values.combine_chunks().dictionary_encode().indices)


def _pair(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """One key for two; -1 where the second is missing."""
    if first.max() >= 1 << 31 or second.max() >= 1 << 31:
        raise InputError(
            f"user_id={first.max()} is too large to be combined with another key; prepare without rates"
        )
    return np.where(second < 0, -1, (first << 31) | second)


def _bucket(values: np.ndarray, edges: np.ndarray) -> pa.Array:
    return pa.array(
        np.searchsorted(edges, values, side="right").astype(np.int64),
        mask=np.isnan(values),
    )


def _nullable(values: np.ndarray) -> pa.Array:
    return pa.array(values, mask=np.isnan(values))


def fetch(
    variant: str, root: Path, *, record: str = RECORD, md5: str | None = None
) -> Path:
    """Downloads and unpacks the official archive of "pure", "1k" or "27k" below `root`; returns the folder to prepare.

    An interrupted download resumes; a folder that is there already is returned as it is. The statistics files and the
    randomly exposed log stay packed.

    Raises:
      InputError: as `download` and `extract` do.
    """
    if variant not in VARIANTS:
        raise InputError(
            f"variant '{variant}' is not known{suggest(variant, VARIANTS)}"
        )
    name, official_md5, max_bytes = VARIANTS[variant]
    out = Path(root) / name
    if not out.exists():
        archive = Path(root) / f"{name}.tar.gz"
        download(f"{record}/{name}.tar.gz", archive, md5=md5 or official_md5)
        extract(archive, out, max_bytes=max_bytes, strip=1, wanted=_is_needed)
    return out


def _is_needed(path: PurePosixPath) -> bool:
    return _NEEDED.match(path.name) is not None

"""Read KuaiRand: impressions of short videos, in the variants Pure, 1K and 27K.

Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly
Exposed Videos, CIKM 2022. Licence CC BY-SA 4.0. The official files, and the columns
used:

- `log_standard_*.csv` (`kuairand_log.py`): user, video, date, hour, time, six labels,
  play time, duration, tab. Left out are further outcomes (`is_hate`,
  `is_profile_enter`, `profile_stay_time`, `comment_stay_time`) and `is_rand`.
- `user_features_*.csv`: all columns.
- `video_features_basic_*.csv` (`kuairand_videos.py`): author, tags, duration, day of
  the upload, music, types. Left out are `server_width` and `server_height`.
- `history_to_*.parquet` (`kuairand_history.py`), where it is present: videos that a
  user watched before the log.

Not read: `video_features_statistic_*`, whose counts cover the whole period and so look
into the future, and `log_random_*`, whose exposure is another policy.

Outcomes of a row (the six labels, play time, share played) are `action` features: the
model sees them for earlier events only. `tokenrec prepare kuairand` adds statistics of
the past, those of `tokenrec/data/past/shipped.py`. The user files do not say when they
were taken; follower counts and the like may postdate a row.
"""

from __future__ import annotations

import datetime
import itertools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.source import Provenance
from tokenrec.data.sources.archive import extract
from tokenrec.data.sources.download import download
from tokenrec.data.sources.kuairand_history import HISTORY_TYPES, history_rows
from tokenrec.data.sources.kuairand_log import (
    TASKS,
    first_times,
    on_the_clock,
    read_log,
)
from tokenrec.data.sources.kuairand_rows import (
    finish_rows,
    raw_rows,
)
from tokenrec.data.sources.kuairand_videos import (
    MOST_TAGS,
    VIDEO_CATEGORIES,
    Videos,
)
from tokenrec.data.sources.tabular import read_csv, read_parquet
from tokenrec.errors import InputError, suggest

CITATION = (
    "Gao et al., KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly "
    "Exposed Videos, CIKM 2022, https://doi.org/10.1145/3511808.3557624"
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

CLOCKS = ("time_ms", "file")


FEATURES = (
    Feature("user_id", "categorical", "user"),
    *(Feature(name, "categorical", "user") for name in _USER_CATEGORIES),
    *(Feature(name, "dense", "user", transform="log1p") for name in _USER_NUMBERS),
    Feature("video_id", "categorical", "item"),
    Feature("author_id", "categorical", "item"),
    Feature("tag", "multi_valued", "item", length=MOST_TAGS),
    *(Feature(name, "categorical", "item") for name in VIDEO_CATEGORIES),
    Feature("duration_bucket", "categorical", "item"),
    Feature("video_duration", "dense", "item", transform="log1p"),
    Feature("video_age_days", "dense", "item", transform="log1p", per_row=True),
    Feature("tab", "categorical", "context"),
    Feature("hour", "categorical", "context"),
    Feature("weekday", "categorical", "context"),
    # The labels of an earlier event are part of its action.
    *(Feature(name, "categorical", "action") for name in TASKS),
    Feature("play_time_ms", "dense", "action", transform="log1p"),
    Feature("played_share", "categorical", "action"),
)


class KuaiRandSource:
    """Impressions of the log, and unscored earlier events of an optional history file.

    Args:
      root: folder of the files, or the folder whose `data` holds them.
      valid_from: first day of the valid split, an ISO date; rows before it are train.
        None: all rows are.
      test_from: first day of the test split, an ISO date; None for no test split.
      clock: "time_ms": day, hour and weekday of a row are those of `time_ms` in China,
        by which histories are ordered. "file": those of the columns `date` and
        `hourmin`, by which others have split, though they tell of the label
        (`on_the_clock`).

    Raises:
      InputError: a file is missing, or files of more than one variant are in the
        folder.
    """

    def __init__(
        self,
        root: Path,
        valid_from: str | None,
        test_from: str | None,
        clock: str = "time_ms",
    ) -> None:
        if clock not in CLOCKS:
            raise InputError(f"clock='{clock}' is no clock{suggest(clock, CLOCKS)}")
        self._clock = clock
        self._valid_from = _date_number("valid_from", valid_from)
        self._test_from = _date_number("test_from", test_from)
        if self._test_from < self._valid_from:
            raise InputError(
                f"test_from={test_from} lies before valid_from={valid_from}; exchange "
                "them"
            )
        folder = _find_folder(Path(root))
        self._logs = sorted(folder.glob("log_standard_*.csv"))
        self._user_files = _side_files(folder, "user_features_*.csv")
        video_files = _side_files(folder, "video_features_basic_*.csv")
        self._histories = sorted(folder.glob("history_to_*.parquet"))
        files = (*self._logs, *self._user_files, *video_files, *self._histories)
        _check_one_variant(folder, files)
        self._videos = Videos(video_files)
        # Time of the last row of the log that this one goes on from.
        self._earlier_ms: int | None = None
        self.schema = Schema(FEATURES, tuple(Task(name) for name in TASKS))
        self.provenance = Provenance("kuairand", LICENCE, CITATION, files)

    def users(self) -> pa.Table:
        types = {"user_id": pa.int64()}
        types |= {name: pa.string() for name in _USER_CATEGORIES}
        types |= {name: pa.float64() for name in _USER_NUMBERS}
        return pa.Table.from_batches(
            [batch for path in self._user_files for batch in read_csv(path, types)],
            schema=pa.schema(types),
        )

    def items(self) -> pa.Table:
        return self._videos.catalogue()

    def rows(self) -> Iterator[pa.RecordBatch]:
        """Yield the earlier events, then the impressions, each as the files have them."""
        for batch in itertools.chain(self._read_histories(), self._read_logs()):
            yield finish_rows(pa.Table.from_batches([batch]), self._videos)

    def state(self) -> Mapping[str, np.ndarray]:
        """Return nothing: a later log needs only to know that there is an earlier one."""
        return {}

    def resume(self, state: Mapping[str, np.ndarray], last_time_ms: int) -> None:
        """Go on after an earlier log, as `StatefulSource`."""
        self._earlier_ms = last_time_ms

    def _read_logs(self) -> Iterator[pa.RecordBatch]:
        """Yield the impressions, as `raw_rows`."""
        for path in self._logs:
            for batch in read_log(path):
                if self._earlier_ms is not None:
                    later = pc.greater(batch.column("time_ms"), self._earlier_ms)
                    batch = batch.filter(later)
                if self._clock == "time_ms":
                    batch = on_the_clock(batch)
                date = batch.column("date").to_numpy()
                split = (date >= self._valid_from).astype(np.int8)
                split += (date >= self._test_from).astype(np.int8)
                yield raw_rows(batch, split, np.ones(len(date), bool))

    def _read_histories(self) -> Iterator[pa.RecordBatch]:
        """Yield the events before the log, as `raw_rows`; they are train, unscored."""
        # An earlier log that this one goes on from has them already.
        if not self._histories or self._earlier_ms is not None:
            return
        # A pass over the log: events of the history must come before it.
        users, first_ms = first_times(self._logs)
        for path in self._histories:
            for batch in read_parquet(path, HISTORY_TYPES):
                rows = history_rows(batch, users, first_ms, path)
                split = np.zeros(rows.num_rows, np.int8)
                yield raw_rows(rows, split, np.zeros(rows.num_rows, bool))


def fetch(
    variant: str, root: Path, *, record: str = RECORD, md5: str | None = None
) -> Path:
    """Download and unpack an official archive below `root`.

    An interrupted download resumes; a folder that is there already is returned as it
    is. The statistics files and the randomly exposed log stay packed.

    Args:
      variant: "pure", "1k" or "27k".
      root: folder for the archive and the unpacked folder.
      record: address of the folder of the archives.
      md5: MD5 of the archive; default: the official one.

    Returns:
      The folder to prepare.

    Raises:
      InputError: the variant is unknown; or as `download` and `extract`.
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


def _find_folder(root: Path) -> Path:
    """Return the folder of the log: `root` or its `data`."""
    for folder in (root, root / "data"):
        if any(folder.glob("log_standard_*.csv")):
            return folder
    raise InputError(
        f"root '{root}' holds no log_standard_*.csv (nor does its 'data'); fetch the "
        "official files, or add --download"
    )


def _side_files(folder: Path, pattern: str) -> list[Path]:
    if not (files := sorted(folder.glob(pattern))):
        raise InputError(
            f"folder '{folder}' holds no {pattern}; it belongs to the official files, "
            "place it there"
        )
    return files


def _check_one_variant(folder: Path, files: tuple[Path, ...]) -> None:
    names = [file.name.lower() for file in files]
    matches = [re.search(r"_(pure|1k|27k)(?:_part\d+)?\.", name) for name in names]
    variants = {match[1] for match in matches if match}
    if len(variants) > 1:
        raise InputError(
            f"folder '{folder}' mixes {sorted(variants)}, whose ids differ; keep one "
            "variant a folder"
        )


def _date_number(field: str, value: str | None) -> int:
    """Convert an ISO date to the number that the log's column `date` holds.

    None is later than every date.
    """
    if value is None:
        return 9999_99_99
    try:
        return int(datetime.date.fromisoformat(value).strftime("%Y%m%d"))
    except ValueError as error:
        raise InputError(
            f"{field}='{value}' is not a date; write it as 2022-05-03"
        ) from error

"""Tests of the source kuairand: splits, histories, statistics, and no leaks."""

from __future__ import annotations

import datetime
import functools
import hashlib
import http.server
import itertools
import tarfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.preparation.test_like import assert_same_test_rows
from tokenrec.data.dataset import open_dataset
from tokenrec.data.past.shipped import add_statistics
from tokenrec.data.preparation.prepare import prepare
from tokenrec.data.source import FROZEN_COLUMN, Source
from tokenrec.data.sources.kuairand import KuaiRandSource, fetch
from tokenrec.data.sources.kuairand_history import settle_labels
from tokenrec.data.sources.kuairand_log import on_the_clock
from tokenrec.errors import InputError

LOG = "log_standard_4_22_to_5_08_pure.csv"
LOG_COLUMNS = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
USER_COLUMNS = (
    "user_id,user_active_degree,is_lowactive_period,is_live_streamer,is_video_author,follow_user_num,"
    "follow_user_num_range,fans_user_num,fans_user_num_range,friend_user_num,friend_user_num_range,register_days,"
    "register_days_range," + ",".join(f"onehot_feat{i}" for i in range(18))
)
VIDEO_COLUMNS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag"
)
START_MS = 1_651_334_400_000  # 1 May 2022, 00:00 in China
DAY_MS = 86_400_000
OUTCOMES = (
    "is_click",
    "long_view",
    "is_like",
    "is_follow",
    "is_comment",
    "is_forward",
    "play_time_ms",
    "played_share",
)


class Log:
    """A random log, 1 to 5 May, with ties in time and two exact repeats."""

    def __init__(self, rows: int = 400, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.time = START_MS + rng.integers(0, 250, rows) * (5 * DAY_MS // 250)
        self.user, self.video = rng.integers(0, 12, rows), rng.integers(0, 20, rows)
        for column in (self.time, self.user, self.video):
            column[[7, 300]] = column[[8, 301]]
        self.label = rng.integers(0, 2, (rows, 8))
        self.played, self.tab = rng.integers(0, 90_000, rows), rng.integers(0, 3, rows)
        self.order = np.arange(rows)

    def lines(self) -> list[str]:
        lines = [LOG_COLUMNS]
        for i in self.order:
            day, ms = divmod(int(self.time[i]) - START_MS, DAY_MS)
            c = self.label[i]
            lines.append(
                f"{self.user[i]},{self.video[i]},{20220501 + day},{ms // 3_600_000 * 100},{self.time[i]},"
                f"{c[0]},{c[1]},{c[2]},{c[3]},{c[4]},{c[5]},{c[6]},{self.played[i]},30000,{c[7]},{c[7]},{c[7]},0,"
                f"{self.tab[i]}"
            )
        return lines


def write(
    folder: Path, log: Log, history: Sequence[Mapping[str, object]] | None = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG).write_text("\n".join(log.lines()) + "\n")
    users = [
        f'{u},full_active,0,1,1,514,500+,150,"[100,1k)",34,"[30,60)",799,730+,'
        for u in range(10)
    ]
    users = [
        line + ",".join("" if i == 4 else str(i) for i in range(18)) for line in users
    ]
    (folder / "user_features_pure.csv").write_text(
        "\n".join([USER_COLUMNS, *users]) + "\n"
    )
    videos = [
        f"{v},{100 + v % 5},NORMAL,2022-04-{10 + v},Web,0.0,{'' if v == 3 else 1000.0 * (v + 2)},720.0,1280.0,9155,9.0,"
        + ("" if v == 4 else f'"{v % 4},67"')
        for v in range(18)
    ]
    (folder / "video_features_basic_pure.csv").write_text(
        "\n".join([VIDEO_COLUMNS, *videos]) + "\n"
    )
    (folder / "video_features_statistic_pure.csv").write_text(
        "video_id,show_cnt\n0,1\n"
    )
    (folder / "log_random_4_22_to_5_08_pure.csv").write_text("not,read\n")
    if history is not None:
        pq.write_table(
            pa.Table.from_pylist([dict(row) for row in history]),
            folder / "history_to_4_30_pure.parquet",
        )
    return folder


def read(
    folder: Path, statistics: str | None = "none", **options: Any
) -> dict[str, np.ndarray]:
    """Read all rows, ordered by time, user and video, with NaN for null."""
    plain = KuaiRandSource(folder, "2022-05-03", "2022-05-05", **options)
    source = add_statistics(plain, "kuairand", statistics)
    # Statistics look features up in these.
    source.users()
    source.items()
    table = pa.Table.from_batches(list(source.rows()))
    columns = {
        name: np.array(table[name].to_pylist(), float)
        for name in table.column_names
        if name != FROZEN_COLUMN
    }
    order = np.lexsort((columns["item_id"], columns["user_id"], columns["time_ms"]))
    return {name: values[order] for name, values in columns.items()}


def test_rows_carry_splits_labels_and_context(tmp_path: Path) -> None:
    log = Log()
    rows = read(write(tmp_path / "data", log).parent)
    order = np.lexsort((log.video, log.user, log.time))
    day = (log.time[order] - START_MS) // DAY_MS
    np.testing.assert_array_equal(
        rows["split"], np.select([day < 2, day < 4], [0, 1], 2)
    )
    np.testing.assert_array_equal(rows["label_is_click"], log.label[order, 0])
    np.testing.assert_array_equal(rows["label_long_view"], log.label[order, 6])
    np.testing.assert_array_equal(
        rows["weekday"], (6 + day) % 7
    )  # 1 May 2022 was a Sunday
    np.testing.assert_array_equal(
        rows["hour"], (log.time[order] - START_MS) % DAY_MS // 3_600_000
    )
    assert rows["event"].all()
    assert rows["scored"].all()
    assert (rows["request"] == -1).all()
    known = rows["item_id"] < 18
    age = (rows["time_ms"] - START_MS) / DAY_MS + 21 - rows["item_id"]
    np.testing.assert_allclose(rows["video_age_days"][known], age[known], rtol=1e-6)
    assert np.isnan(rows["video_age_days"][~known]).all()


def test_day_and_hour_come_from_the_time_and_not_from_columns_that_differ(
    tmp_path: Path,
) -> None:
    log = Log()
    folder = write(tmp_path, log)
    told = read(folder)
    lines = (folder / LOG).read_text().splitlines()
    # The file's own columns differ for clicked rows alone, some by a day.
    for n, line in enumerate(lines[1:], start=1):
        cells = line.split(",")
        if cells[5] == "1":
            late = int(cells[4]) - 3 * 3_600_000 - START_MS
            day, ms = divmod(late, DAY_MS)
            cells[2] = str(20220501 + day if day >= 0 else 20220430)
            cells[3] = str(ms // 3_600_000 * 100)
            lines[n] = ",".join(cells)
    (folder / LOG).write_text("\n".join(lines) + "\n")
    for name, values in read(folder).items():
        np.testing.assert_array_equal(values, told[name], err_msg=name)
    by_file = read(folder, clock="file")
    moved = by_file["hour"] != told["hour"]
    np.testing.assert_array_equal(moved, told["label_is_click"] == 1)
    assert (by_file["split"] != told["split"]).any()
    with pytest.raises(InputError, match="clock='utc' is no clock"):
        read(folder, clock="utc")


def test_the_days_of_the_clock_are_those_of_the_calendar() -> None:
    start = np.datetime64("2023-12-30T00:00", "ms").astype(np.int64)
    # Every 37 minutes over the ends of a year and of a leap February.
    time = start + np.arange(0, 70 * DAY_MS, 37 * 60_000)
    batch = pa.RecordBatch.from_pydict(
        {
            "time_ms": time,
            "date": np.zeros(len(time), np.int32),
            "hourmin": np.zeros(len(time), np.int16),
        }
    )
    batch = on_the_clock(batch)
    zone = datetime.timezone(datetime.timedelta(hours=8))
    for ms, date, hourmin in zip(
        time.tolist(), *(batch[n].to_pylist() for n in ("date", "hourmin")), strict=True
    ):
        local = datetime.datetime.fromtimestamp(ms / 1000, zone)
        assert f"{date} {hourmin:04d}" == local.strftime("%Y%m%d %H%M")


@pytest.mark.parametrize("statistics", ["none", None])
def test_later_rows_go_on_from_the_past_of_the_earlier_log(
    tmp_path: Path, statistics: str | None
) -> None:
    def source(folder: Path, *days: str | None) -> Source:
        return add_statistics(KuaiRandSource(folder, *days), "kuairand", statistics)

    log = Log()
    history = [
        {
            "user_id": 3,
            "history_len": 2,
            "last_time_ms": START_MS - 5,
            "watch_seq": [1, 2],
            "long_watch_seq": [1],
            "like_seq": [],
        }
    ]
    whole = write(tmp_path / "whole", log, history)
    first, later = (write(tmp_path / n, log, history) for n in ("first", "later"))
    lines = (whole / LOG).read_text().splitlines()
    end = START_MS + 4 * DAY_MS
    is_later = [int(line.split(",")[4]) >= end for line in lines[1:]]
    for folder, wanted in ((first, False), (later, True)):
        kept = [x for x, y in zip(lines[1:], is_later, strict=True) if y == wanted]
        (folder / LOG).write_text("\n".join([lines[0], *kept]) + "\n")
    days = ("2022-05-03", "2022-05-05")
    prepare(source(whole, *days), tmp_path / "a")
    prepare(source(first, *days), tmp_path / "b")
    prepare(source(later, None, None), tmp_path / "c", like=tmp_path / "b")
    assert_same_test_rows(open_dataset(tmp_path / "a"), open_dataset(tmp_path / "c"))


def test_the_share_played_is_a_label_if_asked_for_and_changes_nothing_else(
    tmp_path: Path,
) -> None:
    log = Log()
    folder = write(tmp_path, log)
    order = np.lexsort((log.video, log.user, log.time))
    plain, with_share = read(folder), read(folder, play_share=True)
    share = with_share.pop("label_play_share")
    np.testing.assert_allclose(share, np.minimum(log.played[order] / 30_000, 1))
    assert plain.keys() == with_share.keys()
    for name, values in plain.items():
        np.testing.assert_array_equal(with_share[name], values)


def test_users_and_items_hold_the_declared_features(tmp_path: Path) -> None:
    source = KuaiRandSource(write(tmp_path, Log()), "2022-05-03", "2022-05-05")
    users, items = source.users(), source.items()
    assert set(users.column_names) == {
        "user_id",
        *(f.name for f in source.schema.group("user")),
    }
    assert set(items.column_names) == {
        "item_id",
        *(f.name for f in source.schema.group("catalogue")),
    }
    assert users.num_rows == 10
    assert users["onehot_feat4"].null_count == 10
    assert users["fans_user_num_range"][0].as_py() == "[100,1k)"
    assert items["tag"][1].as_py() == ["1", "67"]
    assert items["tag"][4].as_py() is None
    assert items["duration_bucket"][3].as_py() is None
    buckets = [b for b in items["duration_bucket"].to_pylist() if b is not None]
    assert buckets == sorted(buckets)
    assert len(set(buckets)) > 3


def test_features_of_a_row_do_not_depend_on_its_outcomes_or_the_future(
    tmp_path: Path,
) -> None:
    log, other = Log(), Log()
    moment = np.sort(log.time)[200]
    now = log.time >= moment
    other.label[now] = 1 - other.label[now]
    other.played[now] = 1
    before = read(write(tmp_path / "a", log), statistics=None)
    after = read(write(tmp_path / "b", other), statistics=None)
    shown = before["time_ms"] <= moment
    for name in before.keys() - {f"label_{task}" for task in OUTCOMES} - set(OUTCOMES):
        np.testing.assert_array_equal(
            before[name][shown], after[name][shown], err_msg=name
        )
    assert (
        before["rate_item_id_is_click"][~shown]
        != after["rate_item_id_is_click"][~shown]
    ).any()


def test_the_order_of_lines_and_files_does_not_matter(tmp_path: Path) -> None:
    log, other = Log(), Log()
    log.label[[7, 300]], log.played[[7, 300]], log.tab[[7, 300]] = (
        log.label[[8, 301]],
        5,
        1,
    )
    log.played[[8, 301]], log.tab[[8, 301]] = 5, 1
    other.label, other.played, other.tab = log.label, log.played, log.tab
    other.order = np.random.default_rng(5).permutation(len(log.time))
    a, b = write(tmp_path / "a", log), write(tmp_path / "b", other)
    head, *lines = (b / LOG).read_text().splitlines()
    (b / "log_standard_4_22_to_5_08_pure_part1.csv").write_text(
        "\n".join([head, *lines[:150]]) + "\n"
    )
    (b / "log_standard_4_22_to_5_08_pure_part2.csv").write_text(
        "\n".join([head, *lines[150:]]) + "\n"
    )
    (b / LOG).unlink()
    before, after = read(a), read(b)
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)


HISTORY: Sequence[Mapping[str, object]] = [
    {"user_id": 1, "history_len": 5, "last_time_ms": START_MS - 9 * DAY_MS, "watch_seq": [5, 5, 6, 7, 8],
     "like_seq": [], "long_watch_seq": [5, 7]},
    {"user_id": 2, "history_len": 9, "last_time_ms": START_MS + 9 * DAY_MS, "watch_seq": [9, 10, 9],
     "like_seq": [1, 10], "long_watch_seq": [9, 9]},
    {"user_id": 77, "history_len": 1, "last_time_ms": START_MS - 5, "watch_seq": [0],
     "like_seq": [], "long_watch_seq": []},
]  # fmt: skip


def test_history_events_come_before_the_log_with_the_labels_that_are_settled(
    tmp_path: Path,
) -> None:
    log = Log()
    rows = read(write(tmp_path, log, HISTORY))
    old = rows["scored"] == 0
    assert rows["event"].all()
    assert (rows["split"][old] == 0).all()
    first = {u: log.time[log.user == u].min() for u in range(12)}
    want_item = {1: [5, 5, 6, 7, 8], 2: [9, 10, 9], 77: [0]}
    want_view = {1: [np.nan, np.nan, 0, 1, 0], 2: [1, 0, 1], 77: [0]}
    want_like = {1: [0, 0, 0, 0, 0], 2: [0, 1, 0], 77: [0]}
    want_last = {1: START_MS - 9 * DAY_MS, 2: first[2] - 1, 77: START_MS - 5}
    for user in (1, 2, 77):
        mine = old & (rows["user_id"] == user)
        count = len(want_item[user])
        np.testing.assert_array_equal(
            rows["time_ms"][mine], want_last[user] - np.arange(count)[::-1]
        )
        np.testing.assert_array_equal(rows["item_id"][mine], want_item[user])
        np.testing.assert_array_equal(rows["label_long_view"][mine], want_view[user])
        np.testing.assert_array_equal(rows["label_is_like"][mine], want_like[user])
    unknown = (
        "label_is_click",
        "is_click",
        "tab",
        "hour",
        "weekday",
        "play_time_ms",
        "played_share",
    )
    for name in unknown:
        assert np.isnan(rows[name][old]).all(), name


def test_history_labels_enter_the_statistics_of_later_rows(tmp_path: Path) -> None:
    log = Log()
    rows = read(write(tmp_path, log, HISTORY), statistics=None)
    old = rows["scored"] == 0
    assert np.isnan(rows["count_item_id"][old]).all()
    # Video 7 was watched once in the histories, and its first row in the log says so.
    first = np.flatnonzero((rows["item_id"] == 7) & ~old)[0]
    assert rows["count_item_id"][first] == 1
    assert rows["rate_item_id_long_view"][first] > 0
    assert np.isnan(rows["rate_item_id_is_click"][first])


def test_settled_labels_equal_the_enumeration_of_all_embeddings() -> None:
    rng = np.random.default_rng(4)
    unsettled = 0
    for _ in range(300):
        watched = rng.integers(0, 3, rng.integers(1, 8))
        chosen = np.sort(
            rng.permutation(len(watched))[: rng.integers(0, len(watched) + 1)]
        )
        marked = watched[chosen]
        ways = [
            c
            for c in itertools.combinations(range(len(watched)), len(marked))
            if (watched[list(c)] == marked).all()
        ]
        share = np.mean(
            [[i in way for i in range(len(watched))] for way in ways], axis=0
        )
        label, outside = settle_labels(
            watched[None],
            np.array([len(watched)]),
            marked[None],
            np.array([len(marked)]),
        )
        np.testing.assert_array_equal(
            label[0], np.select([share == 1, share == 0], [1, 0], -1)
        )
        assert outside[0] == 0
        unsettled += int((label == -1).any())
    assert unsettled > 30


def test_a_history_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    wrong = [dict(HISTORY[0], long_watch_seq=[7, 6])]
    with pytest.raises(
        InputError,
        match="1 values of 'long_watch_seq' of user_id=1 are not in its 'watch_seq'",
    ):
        read(write(tmp_path, Log(), wrong))


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("is_click", "2", "is_click=2 is neither 0 nor 1"),
        ("date", "20220231", "date=20220231 is not a date"),
        ("hourmin", "2500", "hourmin=2500 is not in 0 to 2359"),
        ("user_id", "", "user_id= is needed in every row"),
        ("video_id", "-4", "video_id=-4 is negative"),
        ("time_ms", "soon", "time_ms"),
    ],
)
def test_a_malformed_row_names_its_file_and_line(
    tmp_path: Path, column: str, value: str, message: str
) -> None:
    folder = write(tmp_path, Log())
    lines = (folder / LOG).read_text().splitlines()
    fields = lines[5].split(",")
    fields[LOG_COLUMNS.split(",").index(column)] = value
    lines[5] = ",".join(fields)
    (folder / LOG).write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=f"{LOG}.*line 6.*{message}"):
        read(folder)


def test_wrong_folders_and_dates_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no log_standard_\*\.csv"):
        KuaiRandSource(tmp_path, "2022-05-03", "2022-05-05")
    folder = write(tmp_path, Log())
    with pytest.raises(InputError, match="valid_from='3 May' is not a date"):
        KuaiRandSource(folder, "3 May", "2022-05-05")
    with pytest.raises(InputError, match="lies before valid_from"):
        KuaiRandSource(folder, "2022-05-03", "2022-05-02")
    (folder / "user_features_1k.csv").write_text(USER_COLUMNS + "\n")
    with pytest.raises(InputError, match=r"mixes \['1k', 'pure'\]"):
        KuaiRandSource(folder, "2022-05-03", "2022-05-05")
    for file in folder.glob("user_features_*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no user_features"):
        KuaiRandSource(folder, "2022-05-03", "2022-05-05")


def test_prepare_takes_the_source(tmp_path: Path) -> None:
    source = KuaiRandSource(
        write(tmp_path / "raw", Log(), HISTORY), "2022-05-03", "2022-05-05"
    )
    metadata = prepare(source, tmp_path / "out")
    assert metadata.counts["repeats_dropped"] >= 2
    scored = sum(
        metadata.counts[f"scored_{split}"] for split in ("train", "valid", "test")
    )
    assert scored + metadata.counts["repeats_dropped"] == 400
    assert set(metadata.checksums) == {file.name for file in source.provenance.files}
    assert "video_features_statistic_pure.csv" not in metadata.checksums
    assert metadata.schema.tables["video_id"] <= 20


def test_fetch_unpacks_only_the_files_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write(tmp_path / "site" / "KuaiRand-Pure" / "data", Log())
    archive = tmp_path / "site" / "KuaiRand-Pure.tar.gz"
    with tarfile.open(archive, "w:gz") as bundle:
        bundle.add(tmp_path / "site" / "KuaiRand-Pure", "KuaiRand-Pure")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            return

    handler = functools.partial(Quiet, directory=str(tmp_path / "site"))
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}
        )
        thread.start()
        try:
            record = f"http://127.0.0.1:{server.server_port}"
            with pytest.raises(
                InputError, match="expected 0820331067a3784d9691136f772b35a7"
            ):
                fetch("pure", tmp_path / "root", record=record)
            out = fetch("pure", tmp_path / "root", record=record, md5=md5)
        finally:
            server.shutdown()
            thread.join(timeout=10)
    names = sorted(p.name for p in (out / "data").iterdir())
    assert names == [LOG, "user_features_pure.csv", "video_features_basic_pure.csv"]
    assert len(KuaiRandSource(out, "2022-05-03", "2022-05-05").provenance.files) == 3
    assert fetch("pure", tmp_path / "root", record="http://127.0.0.1:1") == out
    with pytest.raises(InputError, match="did you mean 'pure'"):
        fetch("Pure", tmp_path / "root")

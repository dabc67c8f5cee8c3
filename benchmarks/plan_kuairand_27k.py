"""Write the planned schema of KuaiRand-27K: its features and its table sizes.

    python -m benchmarks.plan_kuairand_27k

The features are those of `tokenrec prepare kuairand --statistics none`: the totals of
its pairs of user and video alone would take some 17 GiB of memory. The data set has
322,278,385 log rows of 27,285 users over 32,038,725 videos (Gao et al., KuaiRand, CIKM
2022, table 2, and kuairand.com). Table sizes that are not published are assumptions;
`SIZES` and the notes of the file say which. A table of a prepared data set holds the
values of its training split alone, so that these sizes are upper bounds.
"""

from __future__ import annotations

import json

from tokenrec.config.load import shipped_folder
from tokenrec.data.metadata import FORMAT_VERSION
from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema, Task
from tokenrec.data.sources.kuairand import CITATION, FEATURES, LICENCE
from tokenrec.data.sources.kuairand_log import TASKS
from tokenrec.data.sources.kuairand_rows import PLAYED_EDGES
from tokenrec.data.sources.kuairand_videos import DURATION_EDGES_S

USERS, VIDEOS, ROWS = 27_285, 32_038_725, 322_278_385
PUBLISHED = "published count"
PURE_USERS = "user file of KuaiRand-Pure, which has the same 27,285 users"
PURE_VIDEOS = "assumption: ten times what the video file of KuaiRand-Pure holds"
CALENDAR = "by definition"
# Distinct values of each table, and the source of the number.
SIZES: dict[str, tuple[int, str]] = {
    "user_id": (USERS, PUBLISHED),
    "video_id": (VIDEOS, PUBLISHED),
    "author_id": (8_000_000, "assumption: a quarter of the videos"),
    "music_id": (16_000_000, "assumption: half of the videos"),
    "tag": (100, "assumption: twice what the video file of KuaiRand-Pure holds"),
    "upload_type": (140, PURE_VIDEOS),
    "video_type": (30, PURE_VIDEOS),
    "music_type": (60, PURE_VIDEOS),
    "visible_status": (10, PURE_VIDEOS),
    "duration_bucket": (len(DURATION_EDGES_S) + 1, CALENDAR),
    "tab": (15, "assumption: 15 scenarios, as the page of the data set says"),
    "hour": (24, CALENDAR),
    "weekday": (7, CALENDAR),
    **dict.fromkeys(TASKS, (2, CALENDAR)),
    "played_share": (len(PLAYED_EDGES) + 1, CALENDAR),
    **{
        name: (count, PURE_USERS)
        for name, count in {
            "user_active_degree": 9,
            "is_lowactive_period": 1,
            "is_live_streamer": 2,
            "is_video_author": 2,
            "follow_user_num_range": 8,
            "fans_user_num_range": 9,
            "friend_user_num_range": 7,
            "register_days_range": 8,
        }.items()
    },
    **{
        f"onehot_feat{number}": (count, PURE_USERS)
        for number, count in enumerate(
            (2, 7, 50, 1471, 16, 34, 3, 118, 454, 7, 5, 5, 3, 3, 3, 3, 3, 3)
        )
    },
}


def planned() -> dict[str, object]:
    """Build the JSON value of the planned schema."""
    tables = {name: FIRST_KNOWN + count for name, (count, _) in SIZES.items()}
    schema = Schema(FEATURES, tuple(Task(name) for name in TASKS), tables).to_json()
    # Fields with their default value are left out, for a file that a person can read.
    plain = vars(Feature("", "dense", "user"))
    schema["features"] = [
        {
            key: value
            for key, value in feature.items()
            if key in ("name", "kind", "entity") or value != plain[key]
        }
        for feature in schema["features"]
    ]
    return {
        "format_version": FORMAT_VERSION,
        "schema": {key: schema[key] for key in ("features", "tasks", "tables")},
        "source": "kuairand",
        "licence": LICENCE,
        "citation": CITATION,
        "counts": {"users": USERS, "items": VIDEOS, "rows": ROWS},
        "notes": {
            "rows of a table": "its distinct values and the two reserved ids; upper bounds, "
            "before any row is read",
            "mean, deviation": "of dense features: not known before the data is prepared, "
            "and of no weight here",
            **{name: note for name, (_, note) in SIZES.items()},
        },
    }


def main() -> None:
    path = shipped_folder() / "schemas" / "kuairand_27k.json"
    path.write_text(json.dumps(planned(), indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()

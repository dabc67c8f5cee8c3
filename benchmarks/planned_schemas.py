"""Write the planned schemas that come with tokenrec: features and table sizes, no data.

    python -m benchmarks.planned_schemas kuairand_27k
    python -m benchmarks.planned_schemas kuairand_pure amazon_beauty --data data

A name is that of a data set, `data.name` of a config: with its planned schema, `tokenrec
compile` and `tokenrec describe` need no data set. All but KuaiRand-27K are taken from the
prepared data set below --data; of it the file keeps the features, the sizes of the
tables and the counts.

KuaiRand-27K has features of `tokenrec prepare kuairand --statistics none`: the totals of
its pairs of user and video alone would take some 17 GiB of memory. The data set has
322,278,385 log rows of 27,285 users over 32,038,725 videos (Gao et al., KuaiRand, CIKM
2022, table 2, and kuairand.com). Table sizes that are not published are assumptions;
`SIZES` and the notes of the file say which. A table of a prepared data set holds the
values of its training split alone, so that these sizes are upper bounds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from tokenrec.config.load import shipped_folder
from tokenrec.data.dataset import open_dataset
from tokenrec.data.metadata import FORMAT_VERSION
from tokenrec.data.schema import FIRST_KNOWN, Feature, Schema, Task
from tokenrec.data.source import SPLITS
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


# Data sets of shipped configs.
NAMES = (
    "amazon_beauty",
    "complete_journey",
    "kuairand_27k",
    "kuairand_pure",
    "synthetic",
)
# Where the sizes of a prepared data set need a word.
_ORIGINS = {
    "kuairand_pure": "as prepared from the standard log of 25 April to 4 May 2022 and the "
    "users' histories before it; the whole archive has somewhat more",
}
_REST = {
    "rows of a table": "its distinct values and the two reserved ids; upper bounds, "
    "before any row is read",
    "mean, deviation": "of dense features: not known before the data is prepared, and of "
    "no weight here",
}


def kuairand_27k() -> dict[str, Any]:
    """Planned schema of KuaiRand-27K, from published counts and assumptions."""
    tables = {name: FIRST_KNOWN + count for name, (count, _) in SIZES.items()}
    schema = Schema(FEATURES, tuple(Task(name) for name in TASKS), tables)
    return {
        "format_version": FORMAT_VERSION,
        "schema": _plain(schema),
        "source": "kuairand",
        "licence": LICENCE,
        "citation": CITATION,
        "counts": {"users": USERS, "items": VIDEOS, "rows": ROWS},
        "notes": _REST | {name: note for name, (_, note) in SIZES.items()},
    }


def from_prepared(folder: Path) -> dict[str, Any]:
    """Planned schema of a prepared data set."""
    metadata = open_dataset(folder).metadata
    return {
        "format_version": FORMAT_VERSION,
        "schema": _plain(metadata.schema),
        "source": metadata.source,
        "licence": metadata.licence,
        "citation": metadata.citation,
        "counts": {
            "users": metadata.counts["users"],
            "items": metadata.counts["items"],
            "rows": sum(metadata.counts[f"rows_{split}"] for split in SPLITS),
        },
        "notes": {"rows of a table": _ORIGINS.get(folder.name, "as prepared")},
    }


def _plain(schema: Schema) -> dict[str, Any]:
    """A schema as JSON, for a file that a person can read and that knows no values."""
    value = schema.to_json()
    default = vars(Feature("", "dense", "user"))
    value["features"] = [
        {
            key: entry
            for key, entry in feature.items()
            # Fields with their default value are left out.
            if key in ("name", "kind", "entity")
            or (key not in ("mean", "deviation") and entry != default[key])
        }
        for feature in value["features"]
    ]
    return {key: value[key] for key in ("features", "tasks", "tables")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="+", choices=NAMES, metavar="NAME")
    parser.add_argument("--data", type=Path, default=Path("data"))
    args = parser.parse_args()
    for name in args.names:
        is_planned = name == "kuairand_27k"
        value = kuairand_27k() if is_planned else from_prepared(args.data / name)
        path = shipped_folder() / "schemas" / f"{name}.json"
        path.write_text(json.dumps(value, indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()

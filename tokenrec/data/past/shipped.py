"""Declarations of statistics that come with tokenrec, by name of a source.

`tokenrec prepare` adds them to that source unless `--statistics` says otherwise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenrec.data.past.declaration import PastStatistics
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.past.source import WithStatistics, read_statistics, refuse_second
from tokenrec.data.schema import Schema
from tokenrec.data.source import Source
from tokenrec.errors import InputError, suggest

NONE = "none"
# The tasks are those that KuaiRand's models predict; the others are too rare for a rate.
# Lists were compared on 2 May of KuaiRand-Pure, the last day of train.
_TASKS = ["is_click", "long_view"]
_WITH_DECAY = ["all", "1d"]


def _kuairand_key(*key: str, horizons: list[str] | None = None) -> dict[str, Any]:
    return {"key": list(key), "tasks": _TASKS, "horizons": horizons or ["all"]}


SHIPPED: dict[str, dict[str, Any]] = {
    "kuairand": {
        "keys": [
            {
                **_kuairand_key("item_id", horizons=_WITH_DECAY),
                "means": ["play_time_ms"],
            },
            _kuairand_key("author_id", horizons=_WITH_DECAY),
            _kuairand_key("tag"),
            _kuairand_key("music_id"),
            {
                **_kuairand_key("user_id", horizons=["all", "1d", "1h"]),
                "means": ["play_time_ms"],
            },
            _kuairand_key("user_id", "tab", horizons=_WITH_DECAY),
            _kuairand_key("user_id", "author_id"),
            _kuairand_key("user_id", "tag"),
            _kuairand_key("user_id", "item_id"),
            _kuairand_key("user_id", "duration_bucket"),
            _kuairand_key("user_id", "tab", "duration_bucket"),
            _kuairand_key("user_id", "video_type"),
            _kuairand_key("user_id", "hour"),
            _kuairand_key("duration_bucket"),
            _kuairand_key("tab", "author_id"),
            _kuairand_key("tab", "item_id"),
            _kuairand_key("tab", "tag"),
            _kuairand_key("tab", "music_id"),
            _kuairand_key("tab", "duration_bucket"),
            _kuairand_key("tab", "user_active_degree"),
            _kuairand_key("tab", "hour"),
            _kuairand_key("tab", "weekday"),
            {"key": "user_id", "name": "burst", "tasks": [], "horizons": ["1m", "10m"]},
        ],
        "matches": [
            {"of": name, "tasks": _TASKS}
            for name in ("item_id", "author_id", "tag", "music_id")
        ],
        "times": {
            "gap": True,
            "idle_after": "play_time_ms",
            "unit": "ms",
            "session": "30m",
        },
    },
    "complete_journey": {
        "keys": [
            {"key": "item_id", "horizons": ["all", "14d"]},
            {"key": "product_type"},
            {"key": "user_id", "horizons": ["all", "28d"]},
            {"key": ["user_id", "item_id"], "horizons": ["all", "28d"]},
            {"key": ["user_id", "product_type"], "horizons": ["all", "28d"]},
            {"key": ["user_id", "product_category"]},
            {"key": ["user_id", "manufacturer_id"]},
            {"key": ["user_id", "department"]},
            {"key": ["store_id", "item_id"], "parent": ["item_id"]},
            {"key": ["display_location", "mailer_location"]},
            {"key": ["item_id", "display_location"]},
        ],
        "matches": [
            "item_id",
            "product_type",
            "product_category",
            "manufacturer_id",
            "brand",
        ],
        "times": {"gap": True},
    },
}


def load_statistics(name: str, schema: Schema) -> PastStatistics:
    """Return a declaration by its name, or of a JSON file.

    Args:
      name: name of a shipped declaration, or path of a file.
      schema: schema of the source.

    Raises:
      InputError: there is no such file, it cannot be read, or the declaration does not
        fit the schema.
    """
    if name in SHIPPED:
        return parse_statistics(SHIPPED[name], schema, f"statistics '{name}'")
    if not Path(name).exists():
        raise InputError(
            f"statistics='{name}' is neither a file nor the name of a shipped "
            f"declaration{suggest(name, SHIPPED)}"
        )
    return read_statistics(Path(name), schema)


def add_statistics(source: Source, name: str, chosen: str | None) -> Source:
    """Add statistics of the past to a named source.

    Args:
      source: the source.
      name: its name, by which a shipped declaration is found.
      chosen: as `load_statistics`, or "none" for no statistics. None: those shipped for
        the source, if there are any.

    Raises:
      InputError: as `load_statistics`, or the source declares statistics itself.
    """
    if chosen is None:
        chosen = name if name in SHIPPED else NONE
    if chosen == NONE:
        return source
    refuse_second(source)
    return WithStatistics(source, load_statistics(chosen, source.schema))

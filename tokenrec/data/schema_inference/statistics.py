"""Propose statistics of the past: few ones, of the keys that most logs gain from.

A ranker whose histories are short knows little of how an item or a user did before; the
rates say it. They are for rankers alone: a retriever has no row of the item to count by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tokenrec.data.past.declaration import UNITS_MS
from tokenrec.data.past.declaration_json import parse_statistics
from tokenrec.data.schema import Feature, Schema, Task
from tokenrec.data.schema_inference.decisions import Decision
from tokenrec.data.schema_inference.labels import Label

# Half-lives, the longest of which is taken that the log holds this many times.
_HALF_LIVES = ("1h", "6h", "1d", "7d", "30d")
_HALF_LIVES_IN_LOG = 6
# A column with more values than this pools too few rows in each.
_MOST_CONTEXTS = 1_000
# Columns of each entity that are keys.
_MOST_COLUMNS = 2
# A share of repeats below this means that users do not take an item twice.
_NO_REPEATS = 0.01


@dataclasses.dataclass(frozen=True)
class ProposedStatistics:
    """Statistics of the past for a log.

    Attributes:
      value: the part "statistics" of schema.json; empty for none.
      reasons: what is counted, and why; one pair for each entry.
    """

    value: dict[str, Any] = dataclasses.field(default_factory=dict)
    reasons: tuple[tuple[str, str], ...] = ()

    def feature_names(self, labels: Sequence[Label]) -> set[str]:
        """Names of the features that they add to the schema of a log."""
        columns = {
            name for entry in self.value["keys"] for name in _as_list(entry["key"])
        }
        schema = Schema(
            tuple(
                Feature(name, "categorical", "item")
                for name in sorted(columns - {"user_id", "item_id"})
            ),
            tuple(Task(label.task) for label in labels),
        )
        declared = parse_statistics(self.value, schema, "statistics")
        return {feature.name for feature in declared.features(schema)}


def propose_statistics(
    decisions: Sequence[Decision],
    distinct: Callable[[Decision], int],
    items: int,
    times: np.ndarray,
    repeats: float,
) -> ProposedStatistics:
    """Propose the statistics of a log with labels.

    Args:
      decisions: what was decided about the columns.
      distinct: number of values of a decision's column in the sample.
      items: number of items of the sample.
      times: `[n] int64`, milliseconds of log rows.
      repeats: share of the rows whose user had their item before.
    """
    half_life = _half_life(int(np.ptp(times)))
    horizons = ["all", half_life] if half_life else ["all"]
    lately = f", and lately (a row {half_life} old counts half)" if half_life else ""
    keys: list[dict[str, Any]] = []
    reasons: list[tuple[str, str]] = []

    def count(key: str | list[str], reason: str, **fields: Any) -> None:
        keys.append({"key": key} | fields)
        reasons.append((" x ".join(_as_list(key)), reason))

    count("item_id", f"how it was taken so far{lately}", horizons=horizons)
    count(
        "user_id", f"how often the user took what was shown{lately}", horizons=horizons
    )
    groups = _columns(decisions, distinct, "item", items // 3)
    for name in groups:
        count(name, "pools items of which little is known yet")
    if groups:
        count(["user_id", groups[0]], "what the user takes of it")
    for name in _columns(decisions, distinct, "context", _MOST_CONTEXTS):
        count(name, "where and when rows are taken")
    matches = [*(["item_id"] if repeats >= _NO_REPEATS else []), *groups[:1]]
    value: dict[str, Any] = {"keys": keys}
    if matches:
        value["matches"] = matches
        reasons.append(
            (f"matches of {' and '.join(matches)}", "how often the user had it before")
        )
    value["times"] = {"gap": True}
    reasons.append(("past_gap", "how long ago the user's last event was"))
    return ProposedStatistics(value, tuple(reasons))


def _columns(
    decisions: Sequence[Decision],
    distinct: Callable[[Decision], int],
    entity: str,
    most: int,
) -> list[str]:
    """Categorical features of an entity that pool rows, those with most values first."""
    sizes = {
        d.feature.name: distinct(d)
        for d in decisions
        if d.feature is not None
        and (d.feature.kind, d.feature.entity) == ("categorical", entity)
        and d.role == "feature"
    }
    known = [name for name, size in sizes.items() if 2 <= size <= most]
    return sorted(known, key=lambda name: -sizes[name])[:_MOST_COLUMNS]


def _as_list(key: str | list[str]) -> list[str]:
    return [key] if isinstance(key, str) else key


def _half_life(span: int) -> str:
    """The longest half-life that a log of some milliseconds shows; empty for none.

    >>> _half_life(30 * 86_400_000), _half_life(600_000)
    ('1d', '')
    """
    short = [
        text
        for text in _HALF_LIVES
        if int(text[:-1]) * UNITS_MS[text[-1]] * _HALF_LIVES_IN_LOG <= span
    ]
    return short[-1] if short else ""

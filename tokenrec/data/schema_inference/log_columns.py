"""Decide about the columns of a log that are neither keys nor labels.

The rule that matters: what may be known only after the item was shown is an `action`
feature. A column is put elsewhere only on evidence: it says the same of an item or of a
user on every row, or its name is that of a circumstance and it does not tell the label.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from tokenrec.data.schema import Entity
from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.data.schema_inference.decisions import Decision
from tokenrec.data.schema_inference.feature_kinds import choose_kind
from tokenrec.data.schema_inference.keys import same_within
from tokenrec.data.schema_inference.labels import (
    Label,
    is_outcome,
    is_rating,
    label_values,
)
from tokenrec.metrics.exact_auc import auc_of_sorted

_CONTEXT_WORDS = (
    r"device|platform|^os$|_os$|browser|app_?version|tab$|page_?type|position|place|slot|"
    r"rank$|channel|store|shop|country|region|city|language|locale|surface|network|"
    r"carrier|medium|campaign|referr?er|domain|layout|screen|weekday|day_of_week|^dow$|"
    r"^hour$|hour_of_day|is_(weekend|mobile|night|holiday|rand)|season|context|scene"
)
_CLOCK_WORDS = r"hour|minute|second$|time|date|^day$|week|month|year|^dt$"
_POSITION_WORDS = r"position|place$|slot|rank$"
# A circumstance that ranks the label better than this on its own is an outcome.
TELLS_LABEL = 0.85
_SAME = 0.995
_OF_ITEM = "every row of an item has the same value"
_OF_USER = "every row of a user has the same value"
_OF_OWNER = (_OF_ITEM, _OF_USER)
HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


@dataclasses.dataclass(frozen=True)
class LogContext:
    """What is known of a log when its other columns are looked at.

    Attributes:
      user: column of users.
      item: column of items.
      times: `[n] int64`, milliseconds.
      labels: the tasks.
      wide: whether properties of users and items in the log become tables.
    """

    user: ColumnProfile
    item: ColumnProfile
    times: np.ndarray
    labels: Sequence[Label]
    wide: bool = False


def decide_log_column(
    column: ColumnProfile, context: LogContext, name: str
) -> Decision:
    """Decide what one column of the log is used as.

    Args:
      column: the column.
      context: keys and labels of the log.
      name: name that its feature would get.
    """
    reason = _why_left_out(column, context)
    if reason:
        return Decision("log", column.column, "left out", reason)
    entity, per_row, reason, check = _entity(column, context)
    if context.wide and reason in _OF_OWNER:
        # As a table of the owner would have it: one row for each.
        owner = context.item if entity == "item" else context.user
        column = column.first_of_each(owner)
        per_row = False
    choice = choose_kind(column, name, entity, per_row=per_row)
    if choice.feature is None:
        return Decision("log", column.column, "left out", choice.reason)
    return Decision(
        "log",
        column.column,
        "feature",
        f"{reason}; {choice.reason}",
        choice.feature,
        choice.key_type,
        choice.separator,
        check,
    )


def _why_left_out(column: ColumnProfile, context: LogContext) -> str:
    if not column.known:
        return "it is empty on every row"
    if column.distinct == 1:
        return f"it has one value, {column.examples(1)}"
    if column.known == column.distinct and column.type in ("int", "string"):
        return "every row has a value of its own: it numbers the rows"
    if _follows_time(column, context.times):
        return "it grows with the time, which is known already"
    named = re.search(_CLOCK_WORDS, column.name.lower()) and not _is_duration(column)
    if named and (column.type == "time" or not _is_clock(column, context.times)):
        return (
            "it tells the time again, and not quite the same one: what is written down "
            "later can know the outcome"
        )
    return ""


def _entity(
    column: ColumnProfile, context: LogContext
) -> tuple[Entity, bool, str, bool]:
    """Return entity, `per_row`, a reason, and whether to look at it."""
    if is_outcome(column) or is_rating(column):
        reason = "a reaction to the item, known only afterwards"
        if column.is_binary:
            reason += f" ({np.nanmean(column.numbers):.2%} are 1)"
        return "action", False, reason, False
    told = max((_label_auc(column, label) for label in context.labels), default=0.5)
    if told > TELLS_LABEL:
        reason = f"it tells the label by itself (AUC {told:.2f}): known only afterwards"
        return "action", False, reason, True
    if _is_property(column, context.item):
        return "item", True, _OF_ITEM, not context.wide
    if _is_property(column, context.user):
        return "user" if context.wide else "context", False, _OF_USER, False
    if re.search(_POSITION_WORDS, column.name.lower()):
        return "item", True, "its name is that of a place on a page", False
    if re.search(_CONTEXT_WORDS, column.name.lower()):
        return "context", False, "its name is that of a circumstance", True
    reason = (
        "nothing says that it is known before the item is shown, so the model sees it "
        "for earlier rows only"
    )
    return "action", False, reason, True


def _is_duration(column: ColumnProfile) -> bool:
    return column.is_number and bool(
        re.search(
            r"play|watch|stay|dwell|spent|duration|elapsed|length|_ms$|sec",
            column.name.lower(),
        )
    )


def _follows_time(column: ColumnProfile, times: np.ndarray) -> bool:
    """Whether a column grows with the time, such as a date, a week or a row number."""
    if column.type not in ("int", "float", "time") or column.distinct < 5:
        return False
    known = ~np.isnan(column.numbers)
    if known.sum() < 20:
        return False
    return _rank_correlation(column.numbers[known], times[known]) > 0.98


def _rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    def ranks(values: np.ndarray) -> np.ndarray:
        _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
        # The mean rank of equal values.
        return (np.cumsum(counts) - (counts + 1) / 2)[inverse]

    left, right = ranks(left), ranks(right)
    if left.std() == 0 or right.std() == 0:
        return 0.0
    return float(np.corrcoef(left, right)[0, 1])


def _is_clock(column: ColumnProfile, times: np.ndarray) -> bool:
    """Whether a column is the hour or the weekday of the time, in some zone.

    It then is the same function of the time on every row.
    """
    for period, unit in ((DAY_MS, HOUR_MS), (7 * DAY_MS, DAY_MS)):
        for shift in range(24):
            phase = (times + shift * HOUR_MS) % period // unit
            if same_within(phase, column.codes) > _SAME:
                return True
    return False


def _is_property(column: ColumnProfile, owner: ColumnProfile) -> bool:
    """Whether all rows of an owner have one value, and others another.

    Two random rows must differ far more often than two rows of one owner, so that a
    column which is nearly constant is not taken for a property.
    """
    order = np.argsort(owner.codes, kind="stable")
    owners, values = owner.codes[order], column.codes[order]
    same_owner = owners[1:] == owners[:-1]
    if same_owner.sum() < 20:
        return False
    shares = column.counts / max(column.known, 1)
    differ = 1 - float((shares**2).sum())
    within = float(np.mean(values[1:][same_owner] != values[:-1][same_owner]))
    return differ > 0.1 and within < 0.02 * differ


def _label_auc(column: ColumnProfile, label: Label) -> float:
    """AUC with which a column ranks a label by itself.

    Numbers rank as they are, in the better direction. Categories rank by the rate of
    their value in one half of the rows, measured on the other half.
    """
    target = label_values(label)
    known = (target >= 0) & (column.codes >= 0)
    if known.sum() < 100:
        return 0.5
    target, codes = target[known], column.codes[known]
    if column.is_number and column.distinct > 20:
        auc = _auc(column.numbers[known], target)
        return max(auc, 1 - auc)
    first = np.arange(len(codes)) % 2 == 0
    rows = np.bincount(codes[first], minlength=column.distinct)
    ones = np.bincount(codes[first], target[first], minlength=column.distinct)
    rate = (ones + target.mean() * 5) / (rows + 5)
    return _auc(rate[codes[~first]], target[~first])


def _auc(scores: np.ndarray, target: np.ndarray) -> float:
    """AUC of scores `[n]` for labels `[n]` of 1 and 0; 0.5 with one class alone."""
    auc = auc_of_sorted(np.sort(scores[target == 1]), np.sort(scores[target == 0]))
    return 0.5 if auc is None else auc

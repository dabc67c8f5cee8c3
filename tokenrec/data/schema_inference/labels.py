"""Find what is to be predicted: columns of 0 and 1, and ratings with a threshold.

Numbers and classes are predicted where `--label` says so.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tokenrec.data.schema_inference.column_profile import ColumnProfile
from tokenrec.data.schema_inference.keys import column_named
from tokenrec.data.sources.delimited_schema import LabelRule
from tokenrec.data.task import MOST_CLASSES, Task, TaskKind
from tokenrec.errors import InputError

OPERATORS: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    "!=": operator.ne,
    ">": operator.gt,
    "<": operator.lt,
}
OUTCOME_WORDS = (
    r"click|like|follow|comment|forward|share|hate|dislike|buy|bought|purchas|convert|"
    r"conversion|long_?view|finish|complet|skip|favou?rite|wish|cart|install|download|"
    r"subscri|repl(y|ied)|^(is_)?label|^target|^y$|positive|success|vote|accept|reject|enter|"
    r"watched|read$|played|listen|booked|saved|retweet|open(ed)?$|engage|interact"
)
RATING_WORDS = r"rating|^stars?$|_stars?$|score$|^overall$|^rate$|grade"
# A rarer class than this is too rare to learn from by default.
_RAREST = 0.005
_MOST_RATINGS = 21
# Tasks that are proposed; more are easily added.
_MOST_TASKS = 4


@dataclasses.dataclass(frozen=True)
class Label:
    """A task, and the column that it is read from.

    Attributes:
      task: name of the task.
      profile: the column.
      expression: `COLUMN OP NUMBER`; empty where the column holds 1 and 0.
      reason: a sentence.
      positive: share of the known labels that are 1; of a label that is not binary,
        that are above the median, or in the second half of the classes.
      kind: of the task.
      classes: of a task of classes, those of the sample.
    """

    task: str
    profile: ColumnProfile
    expression: str
    reason: str
    positive: float
    kind: TaskKind = "binary"
    classes: tuple[str, ...] = ()

    @property
    def has_both_classes(self) -> bool:
        if self.kind != "binary":
            return self.profile.distinct > 1
        return 0 < self.positive < 1

    @property
    def as_task(self) -> Task:
        """The task of a schema."""
        return Task(self.task, kind=self.kind, classes=self.classes)


def find_labels(columns: Sequence[ColumnProfile], flags: Sequence[str]) -> list[Label]:
    """Find the tasks of a log.

    Args:
      columns: columns of the log that are no keys.
      flags: values of `--label`; they replace what would be found.

    Raises:
      InputError: a flag does not name a column of numbers.
    """
    if flags:
        return [_parse_label(columns, flag) for flag in flags]
    found = [
        _binary_label(column)
        for column in columns
        if column.is_binary and column.distinct == 2 and is_outcome(column)
    ]
    usual = [label for label in found if _RAREST <= label.positive <= 1 - _RAREST]
    if usual:
        return sorted(usual, key=_rarity)[:_MOST_TASKS]
    ratings = [c for c in columns if is_rating(c)]
    return [_rating_label(ratings[0])] if ratings else []


def label_values(label: Label) -> np.ndarray:
    """Labels of the rows of the sample: `[n] int`, 1, 0, or -1 where unknown.

    A label that is not binary is 1 in its upper half: what tells it tells that as well.
    """
    if label.kind == "classes":
        index = class_indices(label).astype(np.int64)
        return np.where(index < 0, -1, 2 * index >= len(label.classes)).astype(int)
    numbers = label.profile.numbers
    if label.kind == "real":
        upper = numbers > np.nanmedian(numbers)
        return np.where(np.isnan(numbers), -1, upper.astype(int))
    known = ~np.isnan(numbers)
    # A column of 1 and 0 has no expression.
    rule = LabelRule.parse(label.expression or f"{label.profile.column} == 1")
    assert rule is not None
    positive = OPERATORS[rule.operator](numbers, rule.number)
    return np.where(known, positive.astype(int), -1)


def stored_labels(label: Label) -> np.ndarray:
    """Labels of the rows, as `Source.rows` yields them: `[n]` int8 or float64."""
    if label.kind == "real":
        return label.profile.numbers
    if label.kind == "classes":
        return class_indices(label)
    return label_values(label).astype(np.int8)


def class_indices(label: Label) -> np.ndarray:
    """Class of each row of the sample: `[n] int8`, -1 where unknown.

    Raises:
      InputError: a value is none of the classes.
    """
    values = label.profile.values.combine_chunks().cast(pa.string())
    index = pc.index_in(values, value_set=pa.array(label.classes, pa.string()))
    missing = pc.and_(pc.is_valid(values), pc.is_null(index))
    if pc.any(missing).as_py():
        raise InputError(
            f"column '{label.profile.column}' holds "
            f"{values.filter(missing)[0].as_py()!r}, which is no class of task "
            f"'{label.task}' ({', '.join(label.classes)}): the sample that named them "
            "lacks it; read the files with a schema that names all classes"
        )
    return index.fill_null(-1).cast(pa.int8()).to_numpy(zero_copy_only=False)


def is_outcome(column: ColumnProfile) -> bool:
    """Whether the name of a column is that of a user's reaction."""
    return re.search(OUTCOME_WORDS, column.name.lower()) is not None


def is_rating(column: ColumnProfile) -> bool:
    """Whether a column holds ratings: few numbers under such a name."""
    return (
        column.is_number
        and 2 <= column.distinct <= _MOST_RATINGS
        and re.search(RATING_WORDS, column.name.lower()) is not None
    )


def _rarity(label: Label) -> float:
    return abs(label.positive - 0.5)


def _binary_label(column: ColumnProfile) -> Label:
    positive = float(np.nanmean(column.numbers))
    return Label(
        column.name,
        column,
        "",
        f"its name is that of a reaction, and it holds 1 and 0 ({positive:.1%} are 1)",
        positive,
    )


def _rating_label(column: ColumnProfile) -> Label:
    """Choose the threshold that splits the ratings most evenly."""
    ratings = column.numbers[~np.isnan(column.numbers)]
    steps = np.unique(ratings)[1:]
    shares = [float((ratings >= step).mean()) for step in steps]
    # Of two that are as even, the one next to three quarters: 4 of 1 to 5.
    usual = ratings.min() + 0.75 * (ratings.max() - ratings.min())
    share, step = min(
        zip(shares, steps, strict=True),
        key=lambda pair: (round(abs(pair[0] - 0.5), 2), abs(pair[1] - usual)),
    )
    return Label(
        "liked",
        column,
        f"{column.name} >= {step:g}",
        f"ratings from {ratings.min():g} to {ratings.max():g}; {step:g} or more is "
        f"positive, which splits them most evenly ({share:.1%} are positive)",
        share,
    )


def _typed_label(column: ColumnProfile, task: str, flag: str, kind: str) -> Label:
    """Make a label that is predicted as a number or as a class."""
    if kind == "real":
        if not column.is_number:
            raise InputError(
                f"--label '{flag}': column '{column.column}' holds {column.type} "
                f"values ({column.examples()}), and not numbers; name another"
            )
        numbers = column.numbers[~np.isnan(column.numbers)]
        share = float((numbers > np.median(numbers)).mean()) if len(numbers) else 0.0
        reason = "--label says that this number is predicted"
        return Label(task, column, "", reason, share, "real")
    if column.type in ("list", "other", "time", "empty"):
        raise InputError(
            f"--label '{flag}': column '{column.column}' holds {column.type} values "
            f"({column.examples()}), and not classes; name another"
        )
    if column.distinct > MOST_CLASSES:
        raise InputError(
            f"--label '{flag}': column '{column.column}' holds {column.distinct} "
            f"values, and a task has at most {MOST_CLASSES} classes; predict it as a "
            "number (real), or name another"
        )
    values = column.values.combine_chunks().drop_null().unique()
    names = tuple(values.take(pc.sort_indices(values)).cast(pa.string()).to_pylist())
    reason = (
        f"--label says that these classes are predicted: {', '.join(names)}; add those "
        "that the sample lacks, in their order"
    )
    label = Label(task, column, "", reason, 0.0, "classes", names)
    known = label_values(label)
    share = float((known[known >= 0] == 1).mean()) if (known >= 0).any() else 0.0
    return dataclasses.replace(label, positive=share)


def _parse_label(columns: Sequence[ColumnProfile], flag: str) -> Label:
    """Parse `click`, `liked: rating >= 4`, `seconds: real` or `stars: classes`.

    Raises:
      InputError: it is neither, or the column does not hold numbers.
    """
    task, colon, expression = (part.strip() for part in flag.partition(":"))
    if expression in ("real", "classes"):
        column = column_named(columns, task, "--label")
        return _typed_label(column, task, flag, expression)
    rule = LabelRule.parse(expression)
    if colon and rule is None:
        raise InputError(
            f"--label '{flag}' is not a label; write a column of 1 and 0, such as "
            "--label click, a threshold, such as --label 'liked: rating >= 4', or what is "
            "predicted as it is: --label 'seconds: real', --label 'stars: classes'"
        )
    column = column_named(columns, task if rule is None else rule.column, "--label")
    if not column.is_number:
        raise InputError(
            f"--label '{flag}': column '{column.column}' holds {column.type} values "
            f"({column.examples()}), and a label is read from numbers; name another"
        )
    numbers = column.numbers[~np.isnan(column.numbers)]
    if rule is not None:
        positive = float(OPERATORS[rule.operator](numbers, rule.number).mean())
        text = str(dataclasses.replace(rule, column=column.name))
    elif column.is_binary:
        positive, text = float(numbers.mean()), ""
    else:
        raise InputError(
            f"--label '{flag}': column '{column.column}' holds {column.examples()}, "
            f"not 1 and 0; give a threshold: --label 'liked: {column.name} >= 4'"
        )
    reason = f"--label says so ({positive:.1%} are positive)"
    return Label(task, column, text, reason, positive)

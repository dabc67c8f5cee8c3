"""Describe the labels of a data set: binary ones, numbers, and classes."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

TaskKind = Literal["binary", "real", "classes"]
# The most classes of a task: labels are stored as int8.
MOST_CLASSES = 127


@dataclasses.dataclass(frozen=True)
class Task:
    """A label of each log row.

    | kind | label | example |
    |---|---|---|
    | `binary` | 1 or 0 | clicked |
    | `real` | a finite number | seconds watched, share watched, price |
    | `classes` | one of `classes`, as its index from 0 | stars |

    Attributes:
      name: name of the label, unique among the tasks.
      weight: weight of its loss, unless the config gives another.
      kind: what the label is (table above).
      classes: kind `classes`: the names of the classes, in order.
      mean: kind `real`: mean of the labels that training learns from; `prepare` fills
        in this and the following three.
      deviation: their standard deviation.
      least: the smallest of them.
      most: the greatest of them.
    """

    name: str
    weight: float = 1.0
    kind: TaskKind = "binary"
    classes: tuple[str, ...] = ()
    mean: float = 0.0
    deviation: float = 1.0
    least: float = 0.0
    most: float = 0.0

    @property
    def width(self) -> int:
        """Number of logits of the task, and of its predicted values."""
        return len(self.classes) if self.kind == "classes" else 1


def task_json(task: Task) -> dict[str, Any]:
    """Name and weight of a task, and its other fields where they are not defaults."""
    plain = Task(task.name)
    return {
        name: value
        for name, value in dataclasses.asdict(task).items()
        if name in ("name", "weight") or value != getattr(plain, name)
    }

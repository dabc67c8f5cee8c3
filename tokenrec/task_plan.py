"""Decide how each task of ranking is learned: its loss, its logits, its labels.

| kind | losses (the default first) | prediction of logit z |
|---|---|---|
| `binary` | `cross_entropy` | sigmoid(z), a probability |
| `classes` | `cross_entropy` | softmax(z), a probability of each class |
| `real` | `huber`, `squared` | mean + deviation z |
| `real`, 0 or more | `weighted_logistic` | mean exp(z) |
| `real`, 0 to 1 | `cross_entropy` | sigmoid(z) |

Mean and deviation are those of the labels of training, which `prepare` stored with the
task. `tokenrec/task_losses.py` has the equations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from tokenrec.config import DataConfig
from tokenrec.data.schema import Schema
from tokenrec.data.task import Task, TaskKind
from tokenrec.errors import InputError, suggest

LOSSES: dict[TaskKind, tuple[str, ...]] = {
    "binary": ("cross_entropy",),
    "classes": ("cross_entropy",),
    "real": ("huber", "squared", "weighted_logistic", "cross_entropy"),
}
# Labels that a loss of numbers allows: the least and the greatest.
_ALLOWED = {
    "weighted_logistic": (0.0, math.inf),
    "cross_entropy": (0.0, 1.0),
}


class TaskPlan(NamedTuple):
    """How one task is learned.

    Attributes:
      task: the task.
      loss: name of its loss.
      start: its first logit.
      stop: the logit after its last one.
      target: its column of `Batch.targets`; -1 unless its labels are numbers.
    """

    task: Task
    loss: str
    start: int
    stop: int
    target: int


def plan_tasks(
    schema: Schema, names: Sequence[str], losses: Mapping[str, str]
) -> tuple[TaskPlan, ...]:
    """Plan the tasks of a run.

    Args:
      schema: of the data set.
      names: the tasks, in the order of the label columns of a batch.
      losses: task -> loss, `data.losses`; others have the default of their kind.

    Raises:
      InputError: `losses` names an unknown task, or a loss that the kind or the labels
        of the task do not allow.
    """
    for name in losses:
        if name not in names:
            raise InputError(
                f"data.losses: '{name}' is no task of the run{suggest(name, names)}"
            )
    by_name = {task.name: task for task in schema.tasks}
    plans, start, targets = [], 0, 0
    for name in names:
        task = by_name[name]
        loss = losses.get(name, LOSSES[task.kind][0])
        _check_loss(task, loss)
        is_real = task.kind == "real"
        stop = start + task.width
        plans.append(TaskPlan(task, loss, start, stop, targets if is_real else -1))
        start, targets = stop, targets + is_real
    return tuple(plans)


def _check_loss(task: Task, loss: str) -> None:
    if loss not in LOSSES[task.kind]:
        raise InputError(
            f"data.losses['{task.name}']='{loss}', but the task has the kind "
            f"'{task.kind}'; use one of {', '.join(LOSSES[task.kind])}, or leave it out"
        )
    if task.kind != "real" or loss not in _ALLOWED:
        return
    least, most = _ALLOWED[loss]
    if task.least < least or task.most > most:
        wrong = task.least if task.least < least else task.most
        bounds = "of 0 or more" if most == math.inf else "from 0 to 1, such as shares"
        raise InputError(
            f"data.losses['{task.name}']='{loss}' needs labels {bounds}, and training "
            f"has a label of {wrong:g}; use 'huber', or give other labels"
        )


def check_auxiliary(config: DataConfig, names: Sequence[str]) -> None:
    """Check that auxiliary tasks are tasks of the run, and that others are left.

    Raises:
      InputError: one is not, or none is left to evaluate.
    """
    for name in config.auxiliary:
        if name not in names:
            raise InputError(
                f"data.auxiliary: '{name}' is no task of the run{suggest(name, names)}"
            )
    if names and set(names) <= set(config.auxiliary):
        raise InputError(
            f"data.auxiliary={config.auxiliary} are all tasks of the run, so that "
            "nothing is evaluated; leave one out"
        )


class EvaluatedTasks(NamedTuple):
    """The tasks of a run that are evaluated, and where their values are in a batch.

    Attributes:
      plans: the tasks, with places in what is selected.
      labels: columns of the labels.
      outputs: columns of the predictions.
      targets: columns of the targets.
    """

    plans: tuple[TaskPlan, ...]
    labels: tuple[int, ...]
    outputs: tuple[int, ...]
    targets: tuple[int, ...]


def evaluated_tasks(
    plans: Sequence[TaskPlan], auxiliary: Sequence[str]
) -> EvaluatedTasks:
    """Leave the tasks out that `data.auxiliary` names."""
    kept = [i for i, plan in enumerate(plans) if plan.task.name not in auxiliary]
    selected: list[TaskPlan] = []
    outputs: list[int] = []
    targets: list[int] = []
    for i in kept:
        plan, start = plans[i], len(outputs)
        target = len(targets) if plan.target >= 0 else -1
        outputs += range(plan.start, plan.stop)
        if plan.target >= 0:
            targets.append(plan.target)
        selected.append(plan._replace(start=start, stop=len(outputs), target=target))
    return EvaluatedTasks(tuple(selected), tuple(kept), tuple(outputs), tuple(targets))


def output_names(plans: Sequence[TaskPlan]) -> tuple[str, ...]:
    """Names of the logits: the task, or `TASK/CLASS` of a task of classes.

    >>> stars = Task("stars", kind="classes", classes=("1", "2"))
    >>> output_names([TaskPlan(stars, "cross_entropy", 0, 2, -1)])
    ('stars/1', 'stars/2')
    """
    names: list[str] = []
    for plan in plans:
        task = plan.task
        if task.kind == "classes":
            names += [f"{task.name}/{label}" for label in task.classes]
        else:
            names.append(task.name)
    return tuple(names)

"""Check that a schema does not contradict itself.

`schema_problems` yields a message per problem. `Schema` raises all of them at once, so
that a user mends a schema file in one go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import get_args
from urllib.parse import quote

from tokenrec.data.schema import (
    BYTES,
    FIRST_KNOWN,
    LONGEST,
    MOST_ROWS,
    TEXT_TABLE,
    Entity,
    Feature,
    Kind,
    Schema,
    Task,
    Transform,
)
from tokenrec.data.task import MOST_CLASSES, TaskKind
from tokenrec.errors import suggest

# Bytes: the file of a vocabulary is named after its table, and file systems allow 255.
_LONGEST_NAME = 200


def schema_problems(schema: Schema) -> Iterator[str]:
    """Yield a message for each problem of a schema."""
    feature_names = [f.name for f in schema.features]
    for name in _repeated(feature_names):
        yield f"feature '{name}' is declared more than once; give each its own name"
    yield from _task_problems(schema.tasks)
    task_names = [task.name for task in schema.tasks]
    table_names = [f.table for f in schema.features if f.table]
    for name in (*feature_names, *task_names, *table_names):
        yield from _name_problems(name)
    for name, rows in schema.tables.items():
        if not FIRST_KNOWN <= rows <= MOST_ROWS:
            yield f"table '{name}': rows={rows} must be {FIRST_KNOWN} to {MOST_ROWS}"
    for feature in schema.features:
        yield from _choice_problems(feature)
        yield from _size_problems(feature)
        yield from _table_problems(feature)
    yield from _text_problems(schema.features)


def _repeated(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})


def _task_problems(tasks: Sequence[Task]) -> Iterator[str]:
    for name in _repeated([task.name for task in tasks]):
        yield f"task '{name}' is declared more than once; give each its own name"
    for task in tasks:
        if not 0 <= task.weight < math.inf:
            yield (
                f"task '{task.name}': weight={task.weight} must be 0 or more, and "
                "finite"
            )
        yield from _kind_problems(task)


def _kind_problems(task: Task) -> Iterator[str]:
    """Yield what is wrong with the kind of a task, or with its classes."""
    where, kinds = f"task '{task.name}'", get_args(TaskKind)
    if task.kind not in kinds:
        yield f"{where}: kind={task.kind!r} is not a choice{suggest(task.kind, kinds)}"
    if task.kind != "classes":
        if task.classes:
            yield (
                f"{where}: classes={list(task.classes)}, but its kind is "
                f"'{task.kind}'; leave them out, or use the kind 'classes'"
            )
    elif not 2 <= len(task.classes) <= MOST_CLASSES:
        yield (
            f"{where}: the kind 'classes' needs the names of 2 to {MOST_CLASSES} "
            f"classes, in order, and has {len(task.classes)}; write them as "
            '"classes": ["1", "2", "3"]'
        )
    for name in _repeated(task.classes):
        yield f"{where}: class '{name}' is declared more than once; drop one"
    # Also refuses NaN.
    if not task.deviation > 0:
        yield (
            f"{where}: deviation={task.deviation} must be positive, as labels are "
            "divided by it"
        )


def _name_problems(name: str) -> Iterator[str]:
    try:
        length = len(quote(name, safe=""))
    except UnicodeEncodeError:
        yield f"the name {name!r} is no Unicode text; correct it"
        return
    if not 1 <= length <= _LONGEST_NAME:
        yield (
            f"the name '{name}' has {length} bytes (as written in a file's name); "
            f"give it 1 to {_LONGEST_NAME}"
        )


def _choice_problems(feature: Feature) -> Iterator[str]:
    for field, literal in (
        ("kind", Kind),
        ("entity", Entity),
        ("transform", Transform),
    ):
        value = getattr(feature, field)
        choices = get_args(literal)
        if value not in choices:
            yield (
                f"feature '{feature.name}': {field}={value!r} is not a choice"
                f"{suggest(str(value), choices)}"
            )


def _size_problems(feature: Feature) -> Iterator[str]:
    f, where = feature, f"feature '{feature.name}'"
    # A length beyond any use would fill the memory before it is noticed.
    if not 1 <= f.length <= LONGEST:
        yield f"{where}: length={f.length} must be 1 to {LONGEST}"
    # The levels of a semantic id have table rows of their own.
    if f.codes * f.length > MOST_ROWS - FIRST_KNOWN:
        yield (
            f"{where}: codes={f.codes} of length={f.length} are more than {MOST_ROWS} "
            "rows of a table; use fewer"
        )
    # Also refuses NaN.
    if not f.deviation > 0:
        yield (
            f"{where}: deviation={f.deviation} must be positive, as values are divided "
            "by it"
        )
    if f.kind in ("categorical", "dense") and f.length != 1:
        yield (
            f"{where}: length={f.length}, but a {f.kind} feature has one value; leave "
            "it out, or use the kind multi_valued or embedding"
        )
    if f.kind == "semantic_id" and f.codes < 1:
        yield f"{where}: codes={f.codes}; a semantic id needs its code-book size"


def _table_problems(feature: Feature) -> Iterator[str]:
    f, where = feature, f"feature '{feature.name}'"
    if f.per_row and f.entity != "item":
        yield (
            f"{where}: per_row is for item features; {f.entity} features need no flag"
        )
    if f.table and not f.is_integer:
        yield (
            f"{where}: table='{f.table}', but a {f.kind} feature has no table; leave "
            "it out"
        )


def _text_problems(features: Sequence[Feature]) -> Iterator[str]:
    """Yield the problems of text features, which share one tokenizer and one table."""
    texts = [f for f in features if f.kind == "text"]
    for f in texts:
        where = f"feature '{f.name}'"
        if f.group not in ("user", "catalogue"):
            reason = (
                "is an item feature with per_row"
                if f.per_row
                else f"has the entity {f.entity}"
            )
            yield (
                f"{where}: {reason}, but a text belongs to a user or to an item of the "
                "catalogue"
            )
        if f.codes < BYTES:
            yield (
                f"{where}: codes={f.codes}; a text needs its vocabulary size, at least "
                f"{BYTES}"
            )
        if f.codes != texts[0].codes:
            yield (
                f"{where}: codes={f.codes}, but '{texts[0].name}' has "
                f"codes={texts[0].codes}, and all texts share a vocabulary; make them "
                "equal"
            )
        if f.table not in ("", TEXT_TABLE):
            yield (
                f"{where}: table='{f.table}', but all texts share the table "
                f"'{TEXT_TABLE}'; leave it out"
            )
    if not texts:
        return
    for f in features:
        if f.is_integer and f.kind != "text" and f.table_name == TEXT_TABLE:
            yield (
                f"feature '{f.name}': table '{TEXT_TABLE}' is that of the texts; give "
                f"this {f.kind} feature another"
            )

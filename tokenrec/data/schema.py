"""What a data set holds: features, the entity each one describes, and binary tasks.

A feature's values live in one of four groups, by how often they change:

| group | entity and flag | stored once per |
|---|---|---|
| `user` | user | chunk of a user's rows |
| `catalogue` | item | item |
| `row` | context, and item with `per_row` | row of the log |
| `action` | action | row of the log |

Integer values (`categorical`, `multi_valued`, `semantic_id`, `text`) fill columns of an `ids` matrix, the others
columns of a `dense` matrix. Id 0 is a missing value, id 1 a value that the training split does not hold, known values
start at 2. A missing dense value is NaN. A text is tokens, cut at the right end and filled up with id 0; any string
can be written in them, so that id 1 does not occur there (tokenizer.py).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable
from typing import Any, Literal, get_args
from urllib.parse import quote

from tokenrec.config.types import has_type, hint_name
from tokenrec.errors import InputError, suggest

MISSING, UNKNOWN, FIRST_KNOWN = 0, 1, 2
TEXT_TABLE = "text"
BYTES = 256  # the least vocabulary of a byte-level tokenizer
MOST_ROWS = 2**31 - 1  # of a table: its ids are int32
LONGEST = 1 << 16  # values of one feature in a row
_LONGEST_NAME = 200  # bytes, as a file of the vocabularies bears the name of its table

Kind = Literal[
    "categorical", "multi_valued", "dense", "embedding", "semantic_id", "text"
]
Entity = Literal["user", "context", "item", "action"]
Group = Literal["user", "catalogue", "row", "action"]
Transform = Literal["identity", "log1p"]
INTEGER_KINDS = ("categorical", "multi_valued", "semantic_id", "text")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One signal.

    Attributes:
      name: column name, unique in the schema.
      kind: how its value becomes a vector (methods.md section 2).
      entity: whom it describes; all features of one entity enter one maker.
      table: name of the embedding table of an integer kind; features may share one. Empty: the feature's own name. All
        text features share the table "text".
      length: values kept of a multi-valued feature, numbers of an embedding, levels of a semantic id, tokens kept of a
        text; otherwise 1.
      codes: code-book size of each level of a semantic id; most tokens in the vocabulary of a text, equal for all text
        features.
      transform: of a dense feature, before normalisation; `log1p` is signed, `sign(x) log(1 + |x|)`.
      per_row: an item feature that changes from row to row (a display place), so that no catalogue can hold it.
      mean, deviation: of the transformed dense value over the training split; filled in by `prepare`.
    """

    name: str
    kind: Kind
    entity: Entity
    table: str = ""
    length: int = 1
    codes: int = 0
    transform: Transform = "identity"
    per_row: bool = False
    mean: float = 0.0
    deviation: float = 1.0

    @property
    def is_integer(self) -> bool:
        return self.kind in INTEGER_KINDS

    @property
    def has_vocabulary(self) -> bool:
        """Whether its ids stand for the distinct values of the training split."""
        return self.kind in ("categorical", "multi_valued")

    @property
    def table_name(self) -> str:
        return TEXT_TABLE if self.kind == "text" else self.table or self.name

    @property
    def group(self) -> Group:
        if self.entity == "user":
            return "user"
        if self.entity == "action":
            return "action"
        return "row" if self.entity == "context" or self.per_row else "catalogue"


@dataclasses.dataclass(frozen=True)
class Task:
    """A binary label of a row: 1, 0, or -1 where it is unknown."""

    name: str
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where each feature of a list lies in the `ids` and `dense` matrices: name -> (start, stop)."""

    ids: dict[str, tuple[int, int]]
    dense: dict[str, tuple[int, int]]

    @property
    def ids_width(self) -> int:
        return max((stop for _, stop in self.ids.values()), default=0)

    @property
    def dense_width(self) -> int:
        return max((stop for _, stop in self.dense.values()), default=0)


def columns(features: Iterable[Feature]) -> Columns:
    """Lays features side by side in the order given.

    >>> columns([Feature("tab", "categorical", "context"), Feature("age", "dense", "user")]).dense
    {'age': (0, 1)}
    """
    ids: dict[str, tuple[int, int]] = {}
    dense: dict[str, tuple[int, int]] = {}
    widths = {True: 0, False: 0}
    for feature in features:
        start = widths[feature.is_integer]
        widths[feature.is_integer] = start + feature.length
        (ids if feature.is_integer else dense)[feature.name] = (
            start,
            start + feature.length,
        )
    return Columns(ids, dense)


@dataclasses.dataclass(frozen=True)
class Schema:
    """Features, tasks and embedding-table sizes of a data set.

    `tables` maps a table name to its number of rows, the two reserved ids included, and `ids_digest` tells what the
    ids of its vocabularies, tokens and items stand for from other values as many; `prepare` fills them in. A data set,
    when opened, fills in `items`, the rows of its catalogue, and, of the semantic ids that the config names, `levels`,
    the code-book size of each level, and `codes_digest`, which tells them from others of the same sizes.
    """

    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    tables: dict[str, int] = dataclasses.field(default_factory=dict)
    items: int = 0
    levels: tuple[int, ...] = ()
    codes_digest: str = ""
    ids_digest: str = ""

    def __post_init__(self) -> None:
        problems = list(_problems(self))
        if problems:
            raise InputError("schema: " + "; ".join(problems))

    def group(self, group: Group) -> tuple[Feature, ...]:
        return tuple(f for f in self.features if f.group == group)

    @property
    def state(self) -> tuple[Feature, ...]:
        """Features of an event's state token: the item and its context, catalogue columns first."""
        return self.group("catalogue") + self.group("row")

    def feature(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise InputError(
            f"feature '{name}' is not in the schema{suggest(name, (f.name for f in self.features))}"
        )

    def without(self, names: Iterable[str]) -> Schema:
        """The schema less the named features, and less the tables that only they used."""
        dropped = {self.feature(name).name for name in names}
        kept = tuple(f for f in self.features if f.name not in dropped)
        used = {f.table_name for f in kept if f.is_integer}
        tables = {name: rows for name, rows in self.tables.items() if name in used}
        return dataclasses.replace(self, features=kept, tables=tables)

    def to_json(self) -> dict[str, Any]:
        value = dataclasses.asdict(self)
        for name in ("codes_digest", "ids_digest"):
            if not value[name]:
                del value[
                    name
                ]  # nothing to tell apart; runs from before there was one stay as they are
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> Schema:
        """Inverse of `to_json`.

        Raises:
          InputError: a key is unknown (the near one is named) or missing, a value has the wrong type, or the schema is
            not sound.
        """
        built = dict(value)
        for name, kind in (("features", Feature), ("tasks", Task)):
            parts = value.get(name, ())
            if not isinstance(parts, (list, tuple)):
                raise InputError(f"schema: '{name}' is {parts!r}, not a JSON array")
            built[name] = tuple(_from_dict(kind, part) for part in parts)
        schema = _from_dict(Schema, built)
        return dataclasses.replace(schema, levels=tuple(schema.levels))


def _from_dict[T](kind: type[T], value: Any) -> T:
    if not isinstance(value, dict):
        raise InputError(f"schema: a {kind.__name__} is {value!r}, not a JSON object")
    hints = typing.get_type_hints(kind)
    for key, held in value.items():
        if key not in hints:
            raise InputError(
                f"schema: {kind.__name__} has no field '{key}'{suggest(key, hints)}"
            )
        choices = (
            get_args(hints[key]) if typing.get_origin(hints[key]) is Literal else ()
        )
        if not has_type(held, hints[key]) and not (
            choices and isinstance(held, str)
        ):  # `_problems` knows the choices
            kinds = "one of " + ", ".join(choices) if choices else hint_name(hints[key])
            named = f" '{value['name']}'" if "name" in value else ""
            raise InputError(
                f"schema: {kind.__name__}{named}: {key}={held!r} is not {kinds}"
            )
    try:
        return kind(**value)
    except TypeError as error:
        raise InputError(f"schema: {kind.__name__} {value}: {error}") from error


def _problems(schema: Schema) -> Iterable[str]:
    names = [f.name for f in schema.features]
    for name in sorted({n for n in names if names.count(n) > 1}):
        yield f"feature '{name}' is declared more than once; give each its own name"
    tasks = [t.name for t in schema.tasks]
    for name in sorted({n for n in tasks if tasks.count(n) > 1}):
        yield f"task '{name}' is declared more than once"
    for task in schema.tasks:
        if not 0 <= task.weight < math.inf:
            yield f"task '{task.name}': weight={task.weight} must be 0 or more"
    for name in (*names, *tasks, *(f.table for f in schema.features if f.table)):
        yield from _name_problems(name)
    for name, rows in schema.tables.items():
        if not FIRST_KNOWN <= rows <= MOST_ROWS:
            yield f"table '{name}': rows={rows} must be {FIRST_KNOWN} to {MOST_ROWS}"
    for f in schema.features:
        for field, kind in (
            ("kind", Kind),
            ("entity", Entity),
            ("transform", Transform),
        ):
            value = getattr(f, field)
            if value not in get_args(kind):
                yield f"feature '{f.name}': {field}={value!r}{suggest(str(value), get_args(kind))}"
        if not 1 <= f.length <= LONGEST:
            yield f"feature '{f.name}': length={f.length} must be 1 to {LONGEST}"
        if f.codes * f.length > MOST_ROWS - FIRST_KNOWN:
            yield f"feature '{f.name}': codes={f.codes} of length={f.length} are more than {MOST_ROWS} rows of a table"
        if not f.deviation > 0:
            yield f"feature '{f.name}': deviation={f.deviation} must be positive, as values are divided by it"
        if f.kind in ("categorical", "dense") and f.length != 1:
            yield f"feature '{f.name}': length={f.length}, but a {f.kind} feature has one value"
        if f.kind == "semantic_id" and f.codes < 1:
            yield f"feature '{f.name}': codes={f.codes}; a semantic id needs its code-book size"
        if f.per_row and f.entity != "item":
            yield f"feature '{f.name}': per_row is for item features; {f.entity} features need no flag"
        if f.table and not f.is_integer:
            yield f"feature '{f.name}': table='{f.table}', but a {f.kind} feature has no table"
    yield from _text_problems(schema.features)


def _name_problems(name: str) -> Iterable[str]:
    try:
        length = len(quote(name, safe=""))
    except UnicodeEncodeError:
        yield f"the name {name!r} is no Unicode text; correct it"
        return
    if not 1 <= length <= _LONGEST_NAME:
        yield f"the name '{name}' has {length} bytes (as written in a file's name); give it 1 to {_LONGEST_NAME}"


def _text_problems(features: tuple[Feature, ...]) -> Iterable[str]:
    texts = [f for f in features if f.kind == "text"]
    for f in texts:
        if f.group not in ("user", "catalogue"):
            where = (
                "is an item feature with per_row"
                if f.per_row
                else f"has the entity {f.entity}"
            )
            yield f"feature '{f.name}': {where}, but a text belongs to a user or to an item of the catalogue"
        if f.codes < BYTES:
            yield f"feature '{f.name}': codes={f.codes}; a text needs its vocabulary size, at least {BYTES}"
        if f.codes != texts[0].codes:
            yield (
                f"feature '{f.name}': codes={f.codes}, but '{texts[0].name}' has codes={texts[0].codes}, and all texts "
                f"share a vocabulary; make them equal"
            )
        if f.table not in ("", TEXT_TABLE):
            yield f"feature '{f.name}': table='{f.table}', but all texts share the table '{TEXT_TABLE}'; leave it out"
    for f in features if texts else ():
        if f.is_integer and f.kind != "text" and f.table_name == TEXT_TABLE:
            yield f"feature '{f.name}': table '{TEXT_TABLE}' is that of the texts; give this {f.kind} feature another"

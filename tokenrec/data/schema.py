"""Describe a data set: its features, the entity that each describes, and its labels.

**Log row.** One item that was shown to, or used by, one user at one time. A user's log
rows in the order of time are the user's history.

**Entity.** Whom a feature describes. All features of one entity enter one token maker
(docs/methods.md section 2). The entity also decides which token sees the value, and
thereby when the value may be known:

| entity | examples | enters |
|---|---|---|
| `user` | age, city | the user's static tokens |
| `item` | brand, title, price | the state token of an event, and the target |
| `context` | hour, device, tab | the same two, beside the item |
| `action` | watch time, quantity | the action token of *earlier* events only |

Anything that is known only after the impression (watch time, the labels themselves) is
an `action` feature: a model never sees the action of the event that it predicts.

**Kind.** How a raw value becomes a vector:

| kind | raw value | `length` | stored as |
|---|---|---|---|
| `categorical` | int64 or string | 1 | ids of a table |
| `multi_valued` | list of them | values kept | ids of a table, filled up with 0 |
| `semantic_id` | list of codes from 0 | levels | ids of a table, a range per level |
| `text` | string | tokens kept | ids of the table `text`, cut at the right end |
| `dense` | number | 1 | float32, NaN where missing |
| `embedding` | list of numbers | numbers | float32, NaN where missing |

**Ids.** 0 is a missing value, 1 an *unknown* value (one that the training split does
not hold), and known values start at 2. Any string can be written in the tokens of the
tokenizer, so id 1 does not occur in a text.

**Group.** Where a value is stored, which follows from how often it changes:

| group | entity | stored once per |
|---|---|---|
| `user` | `user` | chunk of a user's log rows |
| `catalogue` | `item` | item |
| `row` | `context`, and `item` with `per_row` | log row |
| `action` | `action` | log row |

Within a group, integer kinds are columns of an `ids` matrix and the others columns of a
`dense` matrix, side by side in the order of the schema (`columns`).
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, Literal, get_args

from tokenrec.config.types import has_type, hint_name
from tokenrec.data.task import Task, task_json
from tokenrec.errors import InputError, suggest

# Reserved ids of every embedding table, and the id of its first known value.
MISSING = 0
UNKNOWN = 1
FIRST_KNOWN = 2

TEXT_TABLE = "text"
# The least vocabulary of a byte-level tokenizer.
BYTES = 256
# The most rows of a table, and log rows of a chunk: both are numbered with int32.
MOST_ROWS = 2**31 - 1
# The most values of one feature in one log row.
LONGEST = 1 << 16

Kind = Literal[
    "categorical", "multi_valued", "dense", "embedding", "semantic_id", "text"
]
Entity = Literal["user", "context", "item", "action"]
Group = Literal["user", "catalogue", "row", "action"]
Transform = Literal["identity", "log1p"]
# Kinds whose values are ids of an embedding table.
INTEGER_KINDS = ("categorical", "multi_valued", "semantic_id", "text")
# Those whose ids stand for values of the data, and not for codes or words.
VALUE_KINDS = ("categorical", "multi_valued")


@dataclasses.dataclass(frozen=True)
class Feature:
    """One signal of an entity.

    Attributes:
      name: column name, unique in the schema.
      kind: how a raw value becomes a vector (table above).
      entity: whom the feature describes.
      table: name of the embedding table of an integer kind; features may share one.
        Empty: the feature's own name. All text features share the table "text".
      length: values per log row, item or user (table above).
      codes: semantic_id: size of each level's code book. text: the most tokens of a
        tokenizer that `prepare` trains, equal for all text features.
      transform: function of a dense value before normalisation; `log1p` is signed,
        `sign(x) log(1 + |x|)`.
      per_row: an item feature that changes from log row to log row (a display
        position), so that the catalogue cannot hold it.
      mean: mean of the transformed dense value over the training split; `prepare`
        fills it in.
      deviation: standard deviation of the same.
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
        """Whether values are ids of an embedding table rather than numbers."""
        return self.kind in INTEGER_KINDS

    @property
    def has_vocabulary(self) -> bool:
        """Whether ids stand for the distinct values of the training split."""
        return self.kind in ("categorical", "multi_valued")

    @property
    def table_name(self) -> str:
        """Name of the embedding table that the ids index."""
        return TEXT_TABLE if self.kind == "text" else self.table or self.name

    @property
    def group(self) -> Group:
        """The group in which values are stored (table above)."""
        if self.entity == "user":
            return "user"
        if self.entity == "action":
            return "action"
        return "row" if self.entity == "context" or self.per_row else "catalogue"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Columns of features in an `ids` and a `dense` matrix.

    Attributes:
      ids: name of an integer feature -> (start, stop) in `ids`.
      dense: name of any other feature -> (start, stop) in `dense`.
    """

    ids: dict[str, tuple[int, int]]
    dense: dict[str, tuple[int, int]]

    @property
    def ids_width(self) -> int:
        """Number of columns of `ids`."""
        return max((stop for _, stop in self.ids.values()), default=0)

    @property
    def dense_width(self) -> int:
        """Number of columns of `dense`."""
        return max((stop for _, stop in self.dense.values()), default=0)


def columns(features: Iterable[Feature]) -> Columns:
    """Assign columns to features, side by side in the order given.

    >>> tab = Feature("tab", "categorical", "context")
    >>> columns([tab, Feature("age", "dense", "user")]).dense
    {'age': (0, 1)}
    """
    ids: dict[str, tuple[int, int]] = {}
    dense: dict[str, tuple[int, int]] = {}
    # Columns assigned so far, by `is_integer`.
    widths = {True: 0, False: 0}
    for feature in features:
        start = widths[feature.is_integer]
        stop = start + feature.length
        widths[feature.is_integer] = stop
        matrix = ids if feature.is_integer else dense
        matrix[feature.name] = (start, stop)
    return Columns(ids, dense)


@dataclasses.dataclass(frozen=True)
class Schema:
    """Features, tasks and embedding-table sizes of a data set.

    A source declares features and tasks. `prepare` adds the table sizes and the digest
    of the ids. `open_dataset` adds the rest.

    Attributes:
      features: all features; their order is the order of columns.
      tasks: the labels.
      tables: table name -> number of table rows, the two reserved ids included.
      items: number of items in the catalogue.
      levels: code-book size of each level of the semantic ids that the config names.
      codes_digest: SHA-256 of these semantic ids; it tells them from others with the
        same code-book sizes.
      ids_digest: SHA-256 of the vocabularies, the tokenizer and the item ids; it tells
        a data set from another whose tables have the same sizes.
      vocabularies_digest: the same without the item ids. Data sets that have it equal
        give every value the same id, though their catalogues may differ.
      weighted: log rows have a weight in the training loss, the column `row_weight`
        of `Source.rows`.

    Raises:
      InputError: the schema contradicts itself; the message lists every problem.
    """

    features: tuple[Feature, ...]
    tasks: tuple[Task, ...]
    tables: dict[str, int] = dataclasses.field(default_factory=dict)
    items: int = 0
    levels: tuple[int, ...] = ()
    codes_digest: str = ""
    ids_digest: str = ""
    vocabularies_digest: str = ""
    weighted: bool = False

    def __post_init__(self) -> None:
        # Imported here, because the checks import the types of this module.
        from tokenrec.data.schema_problems import schema_problems

        problems = list(schema_problems(self))
        if problems:
            raise InputError("schema: " + "; ".join(problems))

    def group(self, group: Group) -> tuple[Feature, ...]:
        """Features that are stored in a group, in the order of the schema."""
        return tuple(f for f in self.features if f.group == group)

    @property
    def real_tasks(self) -> tuple[Task, ...]:
        """Tasks whose labels are numbers, in the order of `InteractionLog.targets`."""
        return tuple(task for task in self.tasks if task.kind == "real")

    @property
    def binary_tasks(self) -> tuple[Task, ...]:
        """Tasks whose labels are 1 or 0."""
        return tuple(task for task in self.tasks if task.kind == "binary")

    @property
    def state(self) -> tuple[Feature, ...]:
        """Features of an event's state token: the item's, then those of the log row."""
        return self.group("catalogue") + self.group("row")

    def feature(self, name: str) -> Feature:
        """Find a feature by its name.

        Raises:
          InputError: the schema has no such feature; the message suggests a near name.
        """
        for feature in self.features:
            if feature.name == name:
                return feature
        known = (f.name for f in self.features)
        raise InputError(f"feature '{name}' is not in the schema{suggest(name, known)}")

    def without(self, names: Iterable[str]) -> Schema:
        """Drop features, and the tables that no other feature uses.

        Raises:
          InputError: a name is not that of a feature.
        """
        dropped = {self.feature(name).name for name in names}
        features = tuple(f for f in self.features if f.name not in dropped)
        used = {f.table_name for f in features if f.is_integer}
        tables = {name: rows for name, rows in self.tables.items() if name in used}
        return dataclasses.replace(self, features=features, tables=tables)

    def as_dict(self) -> dict[str, Any]:
        """Convert to a dict, as `dataclasses.asdict`.

        What only labels that are not binary, or weights of rows, need is left out where
        there are none: files of other data sets stay as they were.
        """
        value = dataclasses.asdict(self)
        value["tasks"] = tuple(task_json(task) for task in self.tasks)
        if not self.weighted:
            del value["weighted"]
        return value

    def to_json(self) -> dict[str, Any]:
        """Convert to a JSON object, the inverse of `from_json`."""
        value = self.as_dict()
        for name in ("codes_digest", "ids_digest", "vocabularies_digest"):
            # Runs and data sets from before the digests have no such key. Leaving an
            # empty digest out keeps their files equal to what is compared with them.
            if not value[name]:
                del value[name]
        return value

    @staticmethod
    def from_json(value: dict[str, Any]) -> Schema:
        """Convert from a JSON object.

        Raises:
          InputError: a key is unknown (a near one is suggested) or missing, a value has
            the wrong type, or the schema contradicts itself.
        """
        # JSON has no tuples and no dataclasses: convert the parts first.
        fields = dict(value)
        for name, kind in (("features", Feature), ("tasks", Task)):
            parts = value.get(name, ())
            if not isinstance(parts, (list, tuple)):
                raise InputError(
                    f"schema: '{name}' is {parts!r}, not a JSON array; write a list of "
                    "JSON objects"
                )
            fields[name] = tuple(_parse(kind, part) for part in parts)
        fields["tasks"] = tuple(
            dataclasses.replace(task, classes=tuple(task.classes))
            for task in fields["tasks"]
        )
        schema = _parse(Schema, fields)
        return dataclasses.replace(schema, levels=tuple(schema.levels))


def _parse[T](kind: type[T], value: Any) -> T:
    """Build a dataclass from a JSON object, with the types of its fields checked."""
    if not isinstance(value, dict):
        raise InputError(
            f"schema: a {kind.__name__} is {value!r}, not a JSON object; write an "
            'object such as {"name": ...}'
        )
    hints = typing.get_type_hints(kind)
    for key, field_value in value.items():
        if key not in hints:
            raise InputError(
                f"schema: {kind.__name__} has no field '{key}'{suggest(key, hints)}"
            )
        hint = hints[key]
        choices = get_args(hint) if typing.get_origin(hint) is Literal else ()
        # A wrong string for a Literal passes here: `schema_problems` names it together
        # with the nearest choice.
        is_choice = bool(choices) and isinstance(field_value, str)
        if not has_type(field_value, hint) and not is_choice:
            wanted = "one of " + ", ".join(choices) if choices else hint_name(hint)
            owner = f" '{value['name']}'" if "name" in value else ""
            raise InputError(
                f"schema: {kind.__name__}{owner}: {key}={field_value!r} is not {wanted}"
            )
    try:
        return kind(**value)
    except TypeError as error:
        raise InputError(f"schema: {kind.__name__} {value}: {error}") from error

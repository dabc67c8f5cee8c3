"""Declare config fields with their allowed values, and list the fields of a config.

A field is declared with its documentation below it, as a string:

    events: int = field(50, at_least=1)
    \"\"\"Newest events in a sample, T.\"\"\"

`validate` checks the allowed values, `tokenrec config` shows them with the text.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import typing
from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

# Key of a field's `Bounds` in its dataclass metadata.
BOUNDS = "bounds"


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Allowed values of a field, besides those of its type.

    The bounds of a tuple or mapping field hold for each of its values.

    Attributes:
      choices: all allowed values; empty if any value within the bounds is allowed.
      at_least: smallest allowed value.
      above: number that the value must exceed.
      below: number that the value must stay under.
      special: values that are allowed outside the bounds, each with its meaning.
    """

    choices: tuple[str, ...] = ()
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    special: Mapping[float, str] = dataclasses.field(default_factory=dict)

    def allows(self, value: Any) -> bool:
        """Whether a value of the right type is allowed."""
        if value in self.special:
            return True
        if self.choices and value not in self.choices:
            return False
        return not (
            (self.at_least is not None and value < self.at_least)
            or (self.above is not None and value <= self.above)
            or (self.below is not None and value >= self.below)
        )

    def describe(self) -> str:
        """Put the bounds into words; empty without any.

        >>> Bounds(at_least=0, below=1).describe()
        'at least 0 and below 1'
        >>> Bounds(at_least=1, special={0: "all"}).describe()
        'at least 1, or 0 (all)'
        """
        limits = {
            "at least": self.at_least,
            "above": self.above,
            "below": self.below,
        }
        parts = [
            f"{word} {limit:g}" for word, limit in limits.items() if limit is not None
        ]
        options = [" and ".join(parts) or ", ".join(self.choices)]
        options += [f"{value:g} ({name})" for value, name in self.special.items()]
        return ", or ".join(option for option in options if option)


def field[T](
    default: T,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    special: Mapping[float, str] | None = None,
) -> T:
    """Declare a dataclass field with its default and its allowed values.

    Args:
      default: an immutable value; a mapping is declared with `dataclasses.field`, a
        `default_factory`, and `Bounds` as its metadata.
      choices: all allowed values of a string.
      at_least: smallest allowed value.
      above: number that the value must exceed.
      below: number that the value must stay under.
      special: values that are allowed outside the bounds, each with its meaning.
    """
    allowed = Bounds(choices, at_least, above, below, special or {})
    return dataclasses.field(default=default, metadata={BOUNDS: allowed})


class ConfigField(NamedTuple):
    """A field of a config, found by its full name.

    Attributes:
      name: sections and field, such as `model.width`.
      type: annotation.
      default: value in a config that does not set it.
      bounds: allowed values.
    """

    name: str
    type: Any
    default: Any
    bounds: Bounds

    def value_in(self, config: Any) -> Any:
        """Value of the field in a config."""
        return functools.reduce(getattr, self.name.split("."), config)


def list_fields(config_type: type, prefix: str = "") -> Iterator[ConfigField]:
    """Yield the fields of a config dataclass and of its sections, in order."""
    defaults = config_type()
    hints = typing.get_type_hints(config_type)
    for item in dataclasses.fields(config_type):
        hint = hints[item.name]
        name = prefix + item.name
        if dataclasses.is_dataclass(hint):
            yield from list_fields(cast(type, hint), f"{name}.")
            continue
        bounds = item.metadata.get(BOUNDS, Bounds())
        if typing.get_origin(hint) is Literal:
            bounds = dataclasses.replace(bounds, choices=get_args(hint))
        yield ConfigField(name, hint, getattr(defaults, item.name), bounds)


def list_sections(config_type: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the name and the dataclass of each section of a config."""
    hints = typing.get_type_hints(config_type)
    for item in dataclasses.fields(config_type):
        hint = hints[item.name]
        if dataclasses.is_dataclass(hint):
            yield prefix + item.name, cast(type, hint)
            yield from list_sections(cast(type, hint), f"{prefix}{item.name}.")


@functools.cache
def field_texts(section: type) -> dict[str, str]:
    """Read the documentation of a dataclass's own fields: the string below each one."""
    # Python keeps no strings below fields: read them from the source.
    (definition,) = ast.parse(inspect.getsource(section)).body
    assert isinstance(definition, ast.ClassDef)
    texts: dict[str, str] = {}
    for statement, below in zip(definition.body, definition.body[1:], strict=False):
        if not isinstance(statement, ast.AnnAssign) or not isinstance(below, ast.Expr):
            continue
        if isinstance(below.value, ast.Constant) and isinstance(below.value.value, str):
            name = cast(ast.Name, statement.target).id
            texts[name] = inspect.cleandoc(below.value.value)
    return texts

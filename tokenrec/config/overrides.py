"""Command-line overrides of config fields, `--config.x.y=v`.

ml_collections' config flags parse the values. Parsers for choices, mappings and tuples
of typed elements are registered here, because it has none for them.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from tokenrec.config.config import Config
from tokenrec.config.fields import list_fields, list_sections
from tokenrec.config.json_format import REMOVED_FIELDS
from tokenrec.config.problems import ConfigProblem
from tokenrec.config.suggestions import suggest_field
from tokenrec.config.train_config import OptimConfig
from tokenrec.config.types import hint_name
from tokenrec.errors import InputError

PREFIX = "--config."

# Fields that each say how long to train.
RUN_LENGTHS = ("optim.steps", "optim.epochs")

_TYPES = {field.name: field.type for field in list_fields(Config)}
_MAPPINGS = [name for name, kind in _TYPES.items() if get_origin(kind) is dict]
_NUMBERS = (int, float)
_SECTIONS = dict(list_sections(Config))


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate `--config.x.y=v` and `--config.x.y v` from the other arguments.

    >>> split_overrides(["train", "--config.model.width", "128", "--config.seed=1"])
    (['train'], ['model.width=128', 'seed=1'])

    Returns:
      The other arguments, and the overrides as `x.y=v`.

    Raises:
      InputError: an override has no value.
    """
    others: list[str] = []
    overrides: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        if not argument.startswith(PREFIX):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(PREFIX))
        else:
            value = next(remaining, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{argument} has no value; write {argument}=VALUE")
            overrides.append(f"{argument.removeprefix(PREFIX)}={value}")
    return others, overrides


def apply_overrides(
    config: Config, overrides: Sequence[str]
) -> tuple[Config, list[ConfigProblem]]:
    """Set fields of a config, and list the overrides that cannot be used.

    An override of `optim.epochs` switches the `optim.steps` of the config off, and the
    other way round.

    Args:
      config: the config before the overrides; it is not changed.
      overrides: `model.width=128`, in order; the last one of a field wins.
    """
    problems: list[ConfigProblem] = []
    for override in overrides:
        field, text = _split(override)
        try:
            config = _override(config, field, text)
        except InputError as error:
            problems.append(ConfigProblem(_owner(field), str(error)))
    return _keep_one_length(config, overrides, problems), problems


def _keep_one_length(
    config: Config, overrides: Sequence[str], problems: list[ConfigProblem]
) -> Config:
    """Keep the one of `RUN_LENGTHS` that was overridden; both are a problem."""
    optim = config.optim
    given = {_split(override)[0] for override in overrides}
    given &= set(RUN_LENGTHS)
    if not given or not isinstance(optim, OptimConfig):
        return config
    # One that is set to 0 leaves the other as it is.
    if not (optim.steps and optim.epochs):
        return config
    if len(given) == 2:
        text = (
            f"optim.steps={optim.steps} and optim.epochs={optim.epochs} both say how "
            "long to train; give one of them"
        )
        problems.append(ConfigProblem("optim.steps", text))
        return config
    kept = {"epochs": 0.0} if "optim.steps" in given else {"steps": 0}
    return dataclasses.replace(config, optim=dataclasses.replace(optim, **kept))


def _split(override: str) -> tuple[str, str]:
    """Split an override into field and value; a key of a mapping may hold `=`.

    >>> _split("head.alignment.{sid} = {title}=0.5")
    ('head.alignment.{sid} = {title}', '0.5')
    """
    owner = next((n for n in _MAPPINGS if override.startswith(f"{n}.")), "")
    # A number holds none; a text may.
    is_last = owner and get_args(_TYPES[owner])[1] in _NUMBERS
    field, _, text = override.rpartition("=") if is_last else override.partition("=")
    return field, text


def _owner(field: str) -> str:
    """Field that an override sets, for `data.tasks.like` the mapping; empty if none."""
    for name in _MAPPINGS:
        if field.startswith(f"{name}."):
            return name
    return field if field in _TYPES else ""


def _override(config: Config, field: str, text: str) -> Config:
    """Return a copy of a config with a field set from the text of its value."""
    owner, value = _owner(field), _unquote(text)
    # 1. Name the field that was meant.
    if not owner:
        raise InputError(_unknown_field(field))
    try:
        # 2. ml_collections adds no key to a mapping: replace the whole mapping.
        if owner != field:
            kind = get_args(_TYPES[owner])[1]
            entry = {field.removeprefix(f"{owner}."): _value(kind, value)}
            return _with_field(config, owner, attrgetter(owner)(config) | entry)
        # 3. Parse the value by the type of the field.
        return _parse_flag(config, f"{PREFIX}{owner}={value}")
    except TypeError as error:
        # The value in the config file has the wrong type.
        raise InputError(f"{field}: {error}") from error
    except ValueError as error:
        hint = _TYPES[owner]
        # Parsers of tuples and mappings name the element that is wrong.
        if get_origin(hint) is None:
            raise InputError(f"{field}={text!r} is not {hint_name(hint)}") from None
        raise InputError(f"{field}={text!r}: {error}") from None


def _value(kind: Any, text: str) -> Any:
    """Parse the value of a key of a mapping."""
    return (
        _element(kind, text)
        if get_origin(kind) is None
        else _ElementsParser(kind).parse(text)
    )


def _with_field(owner: Any, field: str, value: Any) -> Any:
    """Return a copy of a dataclass with a nested field, such as `a.b.c`, replaced."""
    first, _, rest = field.partition(".")
    if rest:
        value = _with_field(getattr(owner, first), rest, value)
    return dataclasses.replace(owner, **{first: value})


def _parse_flag(config: Config, argument: str) -> Config:
    # Flags of their own, so that one config does not change the flags of another.
    values = flags.FlagValues()
    try:
        config_flags.DEFINE_config_dataclass(
            "config", config, "", values, sys_argv=[argument]
        )
        values(["tokenrec", argument])
    except flags.IllegalFlagValueError as error:
        # absl's message wraps that of the parser, which is the useful one.
        raise error.__context__ or error from None
    return values.config


def _unknown_field(field: str) -> str:
    if field in _SECTIONS:
        first = next(name for name in _TYPES if name.startswith(f"{field}."))
        return (
            f"config field '{field}' is a section and has no value; set one of its "
            f"fields, such as {first}"
        )
    if field in REMOVED_FIELDS:
        return (
            f"config field '{field}' was removed, and runs behave as with "
            f"'{REMOVED_FIELDS[field]}'; leave it out"
        )
    return f"config field '{field}' does not exist{suggest_field(field, _TYPES)}"


class _ElementsParser(flags.ArgumentParser):
    """Parser of a tuple or a mapping of typed elements; strings need no quotes.

    >>> _ElementsParser(tuple[int, ...]).parse("(32, 16)")
    (32, 16)
    >>> _ElementsParser(dict[str, float]).parse("click:1, like:.5")
    {'click': 1.0, 'like': 0.5}

    A mapping may be written as in Python, which keys with commas and colons need.

    >>> _ElementsParser(dict[str, float]).parse('{"Title: {title}, id: {sid}": 1}')
    {'Title: {title}, id: {sid}': 1.0}
    >>> _ElementsParser(dict[str, tuple[str, ...]]).parse('{"history": ("title",)}')
    {'history': ('title',)}
    """

    def __init__(self, kind: Any) -> None:
        self.origin, self.kinds = get_origin(kind), get_args(kind)

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):
            # The value in the config file, which `validate` checks.
            return argument
        text = argument.strip()
        if self.origin is dict and (literal := _literal_mapping(text)) is not None:
            return {
                _typed(self.kinds[0], key): _typed(self.kinds[1], value)
                for key, value in literal.items()
            }
        brackets = ["{}"] if self.origin is dict else ["()", "[]"]
        if text[:1] + text[-1:] in brackets:
            text = text[1:-1]
        parts = [part for part in text.split(",") if part.strip()]
        if self.origin is tuple:
            return tuple(_element(self.kinds[0], part) for part in parts)
        entries: dict[Any, Any] = {}
        for part in parts:
            is_last = self.kinds[1] in _NUMBERS
            key, colon, value = part.rpartition(":") if is_last else part.partition(":")
            if not colon:
                raise ValueError("not a mapping; write {name: value, ...}")
            entries[_element(self.kinds[0], key)] = _element(self.kinds[1], value)
        return entries


def _literal_mapping(text: str) -> dict[Any, Any] | None:
    """The mapping that a text is in Python's syntax; None if it is none."""
    if text[:1] != "{":
        return None
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, dict) else None


def _typed(kind: Any, value: Any) -> Any:
    """Convert a literal to the type of a field's elements."""
    if get_origin(kind) is tuple and isinstance(value, tuple | list):
        return tuple(_typed(get_args(kind)[0], each) for each in value)
    given = type(value)
    if given is kind or (kind is float and given is int):
        return kind(value)
    raise ValueError(f"{value!r} is not {hint_name(kind)}")


def _element(kind: type, text: str) -> Any:
    text = _unquote(text)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {hint_name(kind)}") from None


def _unquote(text: str) -> str:
    text = text.strip()
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return text[1:-1] if quoted else text


# `validate` checks choices.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())
for _kind in _TYPES.values():
    if get_origin(_kind) in (tuple, dict):
        config_flags.register_flag_parser_for_type(_kind, _ElementsParser(_kind))

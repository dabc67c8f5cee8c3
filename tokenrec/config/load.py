"""`--config` and `--config.x.y=v`: a Python file, typed overrides, one check.

A config file is a Python program: it is run, and defines `get_config()`, which returns a `tokenrec.config.Config`. A
file that ends in `.json`, as the `config.json` of a run, is read instead, and nothing in it is run. A name without a
folder, or a path `configs/NAME.py` that does not exist here, is one of the configs that are installed with tokenrec.
"""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from collections.abc import Iterator, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from tokenrec.config import Config, read_config
from tokenrec.config.validate import validate
from tokenrec.errors import InputError, suggest

PREFIX = "--config."


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked config of a file, or of a shipped name, with `overrides` ("model.width=128") applied.

    Raises:
      InputError: no such file or field, a file that does not return a Config, a value of the wrong type, or anything
        that `tokenrec.config.validate` refuses.
    """
    config = _parse_flag(Config(), f"--config={_find(path_or_name)}")
    for override in overrides:
        field, _, text = override.partition("=")
        config = _override(config, field, text)
    return validate(config)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates `--config.x.y=v` and `--config.x.y v` from the other arguments: (others, ["x.y=v", ...]).

    >>> split_overrides(["train", "--config.model.width", "128", "--config=synthetic", "--config.seed=1"])
    (['train', '--config=synthetic'], ['model.width=128', 'seed=1'])
    """
    others: list[str] = []
    overrides: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if not argument.startswith(PREFIX):
            others.append(argument)
        elif "=" in argument:
            overrides.append(argument.removeprefix(PREFIX))
        else:
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise InputError(f"{argument} has no value; write {argument}=VALUE")
            overrides.append(f"{argument.removeprefix(PREFIX)}={value}")
    return others, overrides


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with tokenrec, installed or in a clone."""
    return {
        file.stem: file
        for file in sorted(shipped_folder().glob("*.py"))
        if file.stem != "__init__"
    }


def shipped_folder() -> Path:
    """Folder of the shipped configs and planned schemas."""
    here = Path(__file__).parents[1]
    # A wheel holds the clone's `configs/` as `tokenrec/configs/`; a clone and an editable install keep it beside us.
    return next(
        (f for f in (here / "configs", here.parent / "configs") if f.is_dir()),
        here / "configs",
    )


def _find(path_or_name: str) -> Path:
    path, shipped = Path(path_or_name), shipped_configs()
    if path.is_file():
        return path
    if path.stem in shipped and path in (
        Path(path.stem),
        Path(path.name),
        Path("configs", path.name),
    ):
        return shipped[path.stem]
    raise InputError(
        f"--config={path_or_name} is neither a file nor a shipped config{suggest(path.stem, shipped)}"
    )


def _parse_flag(config: Config, argument: str) -> Config:
    """Returns a copy of `config` after `--config=FILE` or `--config.x.y=v`."""
    values = flags.FlagValues()
    try:
        # Not DEFINE_config_file (1.1.0): it runs all files in one module, so a second file sees the names of the first.
        config_flags.DEFINE_config_dataclass(
            "config", config, "", values, sys_argv=[argument], parse_fn=_read_file
        )
        values(["tokenrec", argument])
    except (
        flags.IllegalFlagValueError
    ) as error:  # absl's message wraps that of the parser, which says more
        raise error.__context__ or error from None
    return values.config


def _override(config: Config, field: str, text: str) -> Config:
    fields = dict(_fields(Config, ""))
    target, value = field, _unquote(text)
    owner, _, key = field.rpartition(".")
    try:
        if (
            get_origin(fields.get(owner)) is dict
        ):  # data.tasks.is_click=0.5; ml_collections adds no key to a mapping
            target, value = owner, str({**attrgetter(owner)(config), key: value})
        if target in fields:
            return _parse_flag(config, f"--config.{target}={value}")
    except TypeError as error:  # what the config file holds
        raise InputError(f"config field '{field}': {error}") from error
    except ValueError as error:
        reason = (
            f"{text!r} is not {_EXPECTED[fields[target]]}"
            if fields[target] in _EXPECTED
            else error
        )
        raise InputError(f"config field '{field}': {reason}") from None
    raise InputError(f"config field '{field}' does not exist{_near(field, fields)}")


def _fields(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _read_file(path: str) -> Config:
    if path.lower().endswith(".json"):
        return read_config(Path(path))
    return run_file(Path(path), "config", "get_config", Config)


def run_file[Made](path: Path, what: str, function: str, kind: type[Made]) -> Made:
    """What a function of a Python file returns, which is of a kind: of a "config" or "study" file.

    Raises:
      InputError: it raises something, defines no such function, or returns another kind; with the line.
    """
    wanted = f"{kind.__module__}.{kind.__qualname__}"
    try:
        make = runpy.run_path(str(path)).get(function)
        if not callable(make):
            raise InputError(
                f"{what} file {path} defines no {function}(); add one that returns a {wanted}"
            )
        made = make()
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{what} file {path}{_line(error, str(path))}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(made, kind):
        raise InputError(
            f"{what} file {path}: {function}() returned {type(made).__name__}, not {wanted}"
        )
    return made


def _line(error: Exception, path: str) -> str:
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""


def _near(field: str, fields: dict[str, Any]) -> str:
    """The same name in another section comes first, then a near name in the section, then any near name."""
    owner, _, leaf = field.rpartition(".")
    inside = [name for name in fields if name.startswith(field + ".")]
    if inside:
        return f" as a value, it is a section{suggest('', inside)}"
    for name in fields:
        if name.rpartition(".")[2] == leaf:
            return f"; did you mean '{name}'?"
    section = [name for name in fields if owner and name.startswith(owner + ".")]
    return suggest(field, section or fields)


class _ElementsParser(flags.ArgumentParser):
    """Reads a tuple or a mapping of typed elements; names need no quotes.

    >>> _ElementsParser(tuple[int, ...]).parse("(32, 16)"), _ElementsParser(dict[str, float]).parse("click:1, like:.5")
    ((32, 16), {'click': 1.0, 'like': 0.5})
    """

    def __init__(self, kind: Any) -> None:
        self.origin, self.kinds = get_origin(kind), get_args(kind)

    def parse(self, argument: Any) -> Any:
        if not isinstance(
            argument, str
        ):  # what the config file holds; `validate` checks it
            return argument
        text = argument.strip()
        if text[:1] + text[-1:] in (["{}"] if self.origin is dict else ["()", "[]"]):
            text = text[1:-1]
        parts = [part for part in text.split(",") if part.strip()]
        if self.origin is tuple:
            return tuple(_element(self.kinds[0], part) for part in parts)
        pairs = [part.partition(":") for part in parts]
        if not all(colon for _, colon, _ in pairs):
            raise ValueError(
                f"{argument!r} is not a mapping; write {{name: value, ...}}"
            )
        return {
            _element(self.kinds[0], key): _element(self.kinds[1], value)
            for key, _, value in pairs
        }


def _element(kind: type, text: str) -> Any:
    text = _unquote(text)
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {_EXPECTED[kind]}") from None


def _unquote(text: str) -> str:
    text = text.strip()
    return (
        text[1:-1]
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        else text
    )


_EXPECTED = {int: "a whole number", float: "a finite number", bool: "true or false"}

# ml_collections reads no mappings and no choices, and does not look into its tuples.
config_flags.register_flag_parser_for_type(
    Literal, flags.ArgumentParser()
)  # `validate` knows the choices
for _kind in dict(_fields(Config, "")).values():
    if get_origin(_kind) in (tuple, dict):
        config_flags.register_flag_parser_for_type(_kind, _ElementsParser(_kind))

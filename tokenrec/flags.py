"""`--config` and `--config.x.y=v`: a Python file, typed overrides, one check.

A config file defines `get_config()`, which returns a `tokenrec.config.Config`. A name without a folder, or a path
`configs/NAME.py` that does not exist here, is one of the configs that are installed with tokenrec.
"""

from __future__ import annotations

import dataclasses
import runpy
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from absl import flags
from ml_collections import config_flags

from tokenrec.config import Config, validate
from tokenrec.errors import InputError, suggest

PREFIX = "--config."


def load_config(path_or_name: str, overrides: Sequence[str] = ()) -> Config:
    """Returns the checked config of a file, or of a shipped name, with `overrides` ("model.width=128") applied.

    Raises:
      InputError: no such file or field, a file that does not return a Config, a value of the wrong type, or anything
        that `tokenrec.config.validate` refuses.
    """
    settings: dict[str, str] = {}
    for override in overrides:
        field, _, text = override.partition("=")
        # The last one wins: over itself, and a whole mapping over its keys.
        settings = {name: t for name, t in settings.items() if not f"{name}.".startswith(f"{field}.")}
        settings[field] = _unquote(text)
    return validate(_parse(_find(path_or_name), settings))


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
    here = Path(__file__).parent
    # A wheel holds the clone's `configs/` as `tokenrec/configs/`; a clone and an editable install keep it beside us.
    folder = next((f for f in (here / "configs", here.parent / "configs") if f.is_dir()), here / "configs")
    return {file.stem: file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"}


def _find(path_or_name: str) -> Path:
    path, shipped = Path(path_or_name), shipped_configs()
    if path.is_file():
        return path
    if path.stem in shipped and path in (Path(path.stem), Path(path.name), Path("configs", path.name)):
        return shipped[path.stem]
    raise InputError(f"--config={path_or_name} is neither a file nor a shipped config{suggest(path.stem, shipped)}")


def _parse(path: Path, settings: dict[str, str]) -> Config:
    """Lets ml_collections read `path` and set each field, except single keys of mappings, which it cannot add."""
    fields = dict(_fields(Config, ""))
    keys = {f: text for f, text in settings.items() if get_origin(fields.get(f.rpartition(".")[0])) is dict}
    flag_fields = {f"--config.{f}={text}": f for f, text in settings.items() if f not in keys}
    for field in flag_fields.values():
        if field not in fields:
            raise InputError(f"config field '{field}' does not exist{_near(field, fields)}")
    arguments = [f"--config={path}", *flag_fields]
    values = flags.FlagValues()
    # Not DEFINE_config_file (1.1.0): it runs every file in one module, so a second file sees the names of the first.
    config_flags.DEFINE_config_dataclass("config", Config(), parse_fn=_run, flag_values=values, sys_argv=arguments)
    try:
        values(["tokenrec", *arguments])
    except flags.IllegalFlagValueError as error:
        cause = error.__context__  # absl keeps the parser's error here, and puts only its text in its own
        if isinstance(cause, InputError):
            raise cause from cause.__cause__
        for argument, field in flag_fields.items():
            if str(error).startswith(f"flag {argument}: "):
                raise InputError(f"config field '{field}': {_refusal(fields[field], settings[field], cause)}") from None
        raise InputError(f"config file {path}: {error}") from error
    for field, text in keys.items():
        owner, _, key = field.rpartition(".")
        section, _, name = owner.rpartition(".")
        try:
            getattr(getattr(values.config, section), name)[key] = _scalar(get_args(fields[owner])[1], text)
        except ValueError as error:
            raise InputError(f"config field '{field}': {error}") from None
    return values.config


def _refusal(kind: Any, text: str, cause: BaseException | None) -> str:
    return f"{text!r} is not {_SCALARS[kind][1]}" if kind in _SCALARS else str(cause)


def _fields(kind: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            yield from _fields(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field.type


def _run(path: str) -> Config:
    try:
        make = runpy.run_path(path).get("get_config")
        if not callable(make):
            raise InputError(
                f"config file {path} defines no get_config(); add one that returns a tokenrec.config.Config"
            )
        config = make()
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"config file {path}{_line(error, path)}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise InputError(
            f"config file {path}: get_config() returned {type(config).__name__}, not tokenrec.config.Config"
        )
    return config


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


_SCALARS: dict[Any, tuple[flags.ArgumentParser, str]] = {
    int: (flags.IntegerParser(), "a whole number"),
    float: (flags.FloatParser(), "a finite number"),
    bool: (flags.BooleanParser(), "true or false"),
}


def _scalar(kind: type, text: str) -> Any:
    if kind not in _SCALARS:
        return _unquote(text)
    parser, expected = _SCALARS[kind]
    try:
        return parser.parse(text)
    except ValueError:
        raise ValueError(f"{text!r} is not {expected}") from None


def _unquote(text: str) -> str:
    text = text.strip()
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text


class _ElementsParser(flags.ArgumentParser):
    """Reads a tuple or a mapping whose elements have a type, and names may lack quotes.

    >>> _ElementsParser(tuple[int, ...]).parse("(32, 16)"), _ElementsParser(dict[str, float]).parse("click:1, like:.5")
    ((32, 16), {'click': 1.0, 'like': 0.5})
    """

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def parse(self, argument: Any) -> Any:
        if not isinstance(argument, str):  # the value in the config file, which `validate` checks
            return argument
        origin, args = get_origin(self.kind), get_args(self.kind)
        for bracket in ("{}",) if origin is dict else ("()", "[]"):
            if argument[:1] + argument[-1:] == bracket:
                argument = argument[1:-1]
        parts = [part.strip() for part in argument.split(",") if part.strip()]
        if origin is tuple:
            return tuple(_scalar(args[0], part) for part in parts)
        pairs = [part.partition(":") for part in parts]
        if not all(colon for _, colon, _ in pairs):
            raise ValueError(f"{argument!r} is not a mapping; write {{name: value, ...}}")
        return {_scalar(args[0], key): _scalar(args[1], value.strip()) for key, _, value in pairs}


# ml_collections has no parser for mappings and choices, and its tuples hold anything, so it is given these.
config_flags.register_flag_parser_for_type(Literal, flags.ArgumentParser())  # `validate` knows the choices
for _kind in dict(_fields(Config, "")).values():
    if get_origin(_kind) in (tuple, dict):
        config_flags.register_flag_parser_for_type(_kind, _ElementsParser(_kind))

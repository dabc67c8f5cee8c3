"""Load a config by file or name, apply command-line overrides, and check it.

A config file is a Python program that is run: its `get_config()` returns a
`tokenrec.config.Config`. If the function has a parameter, it gets the `Metadata` of the
prepared data set, so that a config can take sizes from the data; None where no data set
is named. A file that ends in `.json`, such as the `config.json` of a run, is read and
not run. A name without a folder, or a path `configs/NAME.py` that does not exist in the
working directory, is a config that is installed with tokenrec.
"""

from __future__ import annotations

import inspect
import runpy
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenrec.config.config import Config, data_directory
from tokenrec.config.json_format import read_config_file
from tokenrec.config.overrides import apply_overrides
from tokenrec.config.problems import ConfigProblem
from tokenrec.config.validate import validate
from tokenrec.errors import InputError, suggest
from tokenrec.runtime.local_copy import local_copy

if TYPE_CHECKING:
    from tokenrec.data.metadata import Metadata


def load_config(
    path_or_name: str | None, overrides: Sequence[str] = (), data: str = ""
) -> Config:
    """Load and check a config.

    Args:
      path_or_name: Python or JSON file, or the name of a shipped config; None for the
        defaults.
      overrides: fields to set, such as `model.width=128`.
      data: folder of the prepared data set, which sets `data.path`; empty leaves it to
        the config and the overrides.

    Raises:
      InputError: there is no such config or field, the file does not return a Config,
        or values are wrong. All problems with fields are reported together.
    """
    config = Config()
    problems: list[ConfigProblem] = []
    if path_or_name is not None:
        config, problems = _read(find_config(path_or_name), overrides, data)
    config, more = apply_overrides(config, overrides)
    if data:
        config.data.path = data
    return validate(config, [*problems, *more])


def shipped_configs() -> dict[str, Path]:
    """Name -> file of the configs that come with tokenrec, installed or in a clone."""
    return {
        file.stem: file
        for file in sorted(shipped_folder().glob("*.py"))
        if file.stem != "__init__"
    }


def shipped_folder() -> Path:
    """Folder of the shipped configs, studies and planned schemas."""
    package = Path(__file__).parents[1]
    # A wheel installs the clone's `configs/` as `tokenrec/configs/`. A clone and an
    # editable install have it beside the package.
    folders = (package / "configs", package.parent / "configs")
    return next((folder for folder in folders if folder.is_dir()), folders[0])


def find_config(path_or_name: str) -> Path:
    """Find the file of a config.

    Raises:
      InputError: it is neither a file nor the name of a shipped config.
    """
    path, shipped = local_copy(path_or_name), shipped_configs()
    if path.is_file():
        return path
    spellings = (Path(path.stem), Path(path.name), Path("configs", path.name))
    if path.stem in shipped and path in spellings:
        return shipped[path.stem]
    raise InputError(
        f"config '{path_or_name}' is neither a file nor a shipped config"
        f"{suggest(path.stem, shipped)}"
    )


def _read(
    path: Path, overrides: Sequence[str], data: str
) -> tuple[Config, list[ConfigProblem]]:
    if path.suffix.lower() == ".json":
        return read_config_file(path)

    def call(get_config: Callable[..., Any]) -> Any:
        if not inspect.signature(get_config).parameters:
            return get_config()
        return get_config(_load_metadata(overrides, data))

    return run_file(path, "config", "get_config", Config, call), []


def _load_metadata(overrides: Sequence[str], data: str) -> Metadata | None:
    """Load the metadata of the data set that the command line names, if it names one.

    Raises:
      InputError: the folder is not a prepared data set.
    """
    from tokenrec.data.metadata import Metadata

    # Wrong overrides are reported later, together with the other problems.
    named, _ = apply_overrides(Config(), overrides)
    if data:
        named.data.path = data
    if not (named.data.path or named.data.name):
        return None
    return Metadata.load(data_directory(named))


def run_file[T](
    path: Path,
    kind: str,
    function: str,
    result_type: type[T],
    call: Callable[[Callable[..., Any]], Any] = lambda make: make(),
) -> T:
    """Run a Python file and call a function that it defines.

    Args:
      path: the file.
      kind: "config" or "study", for messages.
      function: name of the function.
      result_type: type that the function must return.
      call: calls the function; without one, it is called without arguments.

    Raises:
      InputError: the file raises an exception, which is named with its line, defines no
        such function, or the function returns another type.
    """
    wanted = f"{result_type.__module__}.{result_type.__qualname__}"
    try:
        make = runpy.run_path(str(path)).get(function)
        if not callable(make):
            raise InputError(
                f"{kind} file {path} defines no {function}(); "
                f"add one that returns a {wanted}"
            )
        result = call(make)
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{kind} file {path}{_line(error, str(path))}: "
            f"{type(error).__name__}: {error}"
        ) from error
    if not isinstance(result, result_type):
        raise InputError(
            f"{kind} file {path}: {function}() returned {type(result).__name__}, not "
            f"{wanted}"
        )
    return result


def _line(error: Exception, path: str) -> str:
    """Line of a file where an exception arose, for a message; empty if none did."""
    if isinstance(error, SyntaxError):
        return f", line {error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == path]
    return f", line {lines[-1]}" if lines else ""

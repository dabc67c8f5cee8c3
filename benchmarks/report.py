"""Write the result of a benchmark: as JSON and as a Markdown page.

Both hold the command that reproduces the result, its settings, and the machine and
package versions that it was measured with.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenrec.errors import EXIT_INPUT, InputError

PACKAGES = (
    "tokenrec",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "grain",
    "orbax-checkpoint",
    "numpy",
    "pyarrow",
)


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """List package versions, Python, processor and cores.

    Args:
      packages: names of packages; one that is not installed has the version None. A
        benchmark that measures other frameworks adds theirs.

    Returns:
      Name -> version; "cpu" -> name of the processor; "cores" -> number of cores that
      this process may use.
    """
    values: dict[str, Any] = {}
    for package in packages:
        try:
            values[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            values[package] = None
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count()
    )
    return values | {
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": cores,
    }


def spread(values: Sequence[float | None], sign: str = "") -> str:
    """Format the mean and, for several values, the sample deviation.

    Args:
      values: values of the seeds; the result is "-" if one is undefined.
      sign: format of the sign, for example "+".

    >>> spread([0.5, 0.7]), spread([0.5]), spread([0.25], "+"), spread([0.5, None])
    ('0.6000 ± 0.1414', '0.5000', '+0.2500', '-')
    """
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    mean = f"{statistics.mean(known):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(known):.4f}" if len(known) > 1 else mean


def write_result(
    path_stem: str | Path,
    rows: Sequence[Mapping[str, Any]],
    params: Mapping[str, Any],
    command: str,
    *,
    title: str = "",
    packages: Sequence[str] = PACKAGES,
) -> None:
    """Write `path_stem.json` and `path_stem.md`.

    Args:
      path_stem: path without its suffix.
      rows: rows of the table, column -> value; columns in order of appearance.
      params: settings that all rows share.
      command: the command line that reproduces the result, from the repository root.
      title: title of the page; the name of the file if empty.
      packages: packages whose versions are recorded.
    """
    stem = Path(path_stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    machine = versions(packages)
    value = {
        "command": command,
        "params": dict(params),
        "versions": machine,
        "rows": [dict(row) for row in rows],
    }
    stem.with_name(stem.name + ".json").write_text(
        json.dumps(value, indent=1, default=_plain) + "\n"
    )
    software = ", ".join(
        f"{name} {machine[name]}" for name in (*packages, "python") if machine[name]
    )
    page = [f"# {title or stem.name}", "", f"`{command}`", "", markdown_table(rows), ""]
    if params:
        page += [
            "Settings: "
            + ", ".join(f"{name} = {_cell(value)}" for name, value in params.items())
            + ".",
            "",
        ]
    page += [
        f"Measured on {machine['cores']} cores of {machine['cpu']}, with {software}."
    ]
    stem.with_name(stem.name + ".md").write_text("\n".join(page) + "\n")


def kept_rows(file: Path) -> list[dict[str, Any]]:
    """Read the rows of an earlier result, which a command goes on from; none if it is missing.

    Raises:
      InputError: the file is damaged.
    """
    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text())["rows"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"result '{file}' is damaged ({error}); restore it, or delete it to measure "
            "all rows again"
        ) from error
    return rows


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Format rows as a Markdown table.

    Columns are in order of appearance. Numbers have four significant digits, None is
    "-", and columns without text are aligned to the right.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["| " + " | ".join(names) + " |"]
    text = [any(isinstance(row.get(name), str) for row in rows) for name in names]
    lines.append("|" + "|".join("---" if left else "---:" for left in text) + "|")
    lines += [
        "| " + " | ".join(_cell(row.get(name)) for name in names) + " |" for row in rows
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if not isinstance(value, (str, bool, int)) and hasattr(value, "item"):
        value = value.item()
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value).replace("|", "\\|")


def _plain(value: Any) -> Any:
    """Turn a NumPy or JAX number or array, or a path, into a JSON value."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value)


def _cpu_model() -> str:
    """Name of the processor."""
    # On Linux the platform module knows only the architecture.
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def run_script(main: Callable[[], None]) -> None:
    """Call `main`; an InputError ends the process with its message and exit code."""
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_INPUT)

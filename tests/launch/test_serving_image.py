"""The image of servers: its packages are those that serving imports, and no others."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.launch.test_files import CLONE, PROJECT, SERVE, arguments
from tokenrec.cli.main import build_parsers
from tokenrec.launch.server_job import COMPILE_CACHE, PORT, TMP

REQUIREMENTS = [
    line
    for line in (CLONE / "launch/serving/requirements.txt").read_text().splitlines()
    if not line.startswith("#")
]


def distribution(requirement: str) -> str:
    """Name of the package of a requirement, as constraints spell it."""
    name = re.split(r"[\s\[<>=!~;(]", requirement)[0]
    return re.sub(r"[-_.]+", "-", name).lower()


def test_requirements_are_those_of_the_extra_and_some_of_the_core() -> None:
    extra = PROJECT["project"]["optional-dependencies"]["serving"]
    core = PROJECT["project"]["dependencies"]
    assert set(extra) <= set(REQUIREMENTS)
    assert set(REQUIREMENTS) - set(extra) < set(core)
    trains = {"flax", "optax", "orbax-checkpoint", "grain", "tensorflow-datasets"}
    assert not trains & {distribution(line) for line in REQUIREMENTS}


def installed(requirements: list[str]) -> set[str]:
    """Packages that pip installs for requirements, by the metadata of this machine."""
    found: set[str] = set()
    waiting = [distribution(line) for line in requirements]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        try:
            needed = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        waiting += [distribution(line) for line in needed if "extra ==" not in line]
    return found


def test_serving_imports_nothing_that_the_image_lacks() -> None:
    for package in ("flatbuffers", "httptools", "orjson", "uvicorn", "uvloop"):
        pytest.importorskip(package, reason="needs the extra serving")
    image = installed(REQUIREMENTS)
    owners = metadata.packages_distributions()
    missing = sorted(
        module
        for module, names in owners.items()
        if module.isidentifier()
        and module != "tokenrec"
        and not {distribution(name) for name in names} & image
    )
    assert {"flax", "optax", "grain", "orbax"} <= set(missing)
    code = f"""
import importlib, json, pkgutil, sys

class Missing:
    names = frozenset({missing!r})

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import tokenrec.serving
from tokenrec.cli.main import build_parsers
build_parsers()
names = [one.name for one in pkgutil.iter_modules(tokenrec.serving.__path__)]
imported = []
for name in names:
    # Exporting needs the training packages.
    if "export" not in name:
        importlib.import_module(f"tokenrec.serving.{{name}}")
        imported.append(name)
print(json.dumps(imported))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        cwd=CLONE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"scorer", "server", "request"} <= set(json.loads(done.stdout))


def test_the_image_can_run_with_a_root_file_system_that_is_read_only() -> None:
    environment = dict(
        word.split("=", 1) for word in shlex.split(arguments(SERVE, "ENV")[0])
    )
    assert environment["HOME"] == str(TMP)
    assert arguments(SERVE, "VOLUME") == [json.dumps([str(COMPILE_CACHE)])]


def test_the_health_check_asks_the_server_that_the_image_starts() -> None:
    (command,) = arguments(SERVE, "CMD")
    args = build_parsers()[0].parse_args(json.loads(command)[1:])
    assert (args.verb, args.host, args.port) == ("serve", "0.0.0.0", PORT)
    assert args.compile_cache == Path(str(COMPILE_CACHE))
    assert arguments(SERVE, "EXPOSE") == [str(PORT)]
    (check,) = arguments(SERVE, "HEALTHCHECK")
    words = json.loads(check.partition("CMD ")[2])
    assert f"127.0.0.1:{PORT}/readyz" in words[-1]
    compile(words[-1], "HEALTHCHECK", "exec")
    assert Path(words[0]).name == "python"

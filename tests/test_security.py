"""No reader can run what it reads, except of config and study files, which are code."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "shelve",
    "joblib",
    "torch",
    "runpy",
}
CALLS = {"eval", "exec", "compile", "__import__"}

ALLOWED = {
    # Config and study files are run, as README.md says.
    ("tokenrec/config/load.py", "runpy"),
    # Between the workers of one pipeline; docs/guides/beam.md says whom to trust.
    ("tokenrec/data/beam/shared_files.py", "pickle"),
}


def risks(tree: ast.AST) -> Iterator[str]:
    """Yield the modules and calls of a program that can run what they read."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                a.name.split(".")[0]
                for a in node.names
                if a.name.split(".")[0] in MODULES
            )
        elif (
            isinstance(node, ast.ImportFrom)
            and (node.module or "").split(".")[0] in MODULES
        ):
            yield (node.module or "").split(".")[0]
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name in CALLS:
                yield name
            if name == "np.load" and keywords.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"
            if name.endswith(("yaml.load", "yaml.full_load", "yaml.unsafe_load")):
                yield name
            if keywords.get("shell") == "True" or name == "os.system":
                yield f"{name} through a shell"


def test_no_reader_can_run_what_it_reads() -> None:
    found = {
        (path.relative_to(ROOT).as_posix(), risk)
        for path in sorted(ROOT.glob("tokenrec/**/*.py"))
        for risk in risks(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from torch import load",
        "eval(text)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_the_search_finds_what_it_is_for(text: str) -> None:
    assert list(risks(ast.parse(text)))

"""Run the examples of the pages again: `python -m docs.examples [--check]`.

A block

    ```console
    $ tokenrec describe --config=synthetic --config.model.widht=64
    tokenrec: config field 'model.widht' does not exist; did you mean 'model.width'?
    ```

is a command and all that it prints. The commands of a page run one after another in an
empty folder that holds a small synthetic data set (`data/synthetic`), a run of twenty
steps (`runs/first`) and a small log (`log/`). Without `--check` the pages receive what
was printed; with it, pages that differ are named and the exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TRAIN = (
    "tokenrec train --config=synthetic --workdir=runs/first --quiet "
    "--config.optim.steps=20 --config.train.save_every=10"
)
LOG_FILES = {
    "schema.json": """{
 "features": [
  {"name": "age", "kind": "dense", "entity": "user"},
  {"name": "genres", "kind": "multi_valued", "entity": "item", "length": 6},
  {"name": "stars", "kind": "categorical", "entity": "action"}
 ],
 "tasks": [{"name": "liked"}],
 "columns": {"user_id": "user", "item_id": "movie"},
 "key_types": {"user_id": "int64", "item_id": "int64"}
}
""",
    "users.csv": "user,age\n1,24\n2,30\n",
    "movies.csv": "movie,genres\n10,Drama\n11,Drama\n",
    "log.csv": "user,movie,time_ms,stars,liked\n1,10,1000,4,1\n2,11,2000,3,0\n",
    "words.csv": "user,movie,time_ms,stars,liked\n1,10,1000,4,1\n1,11,2000,3,yes\n",
    "when.csv": "user,movie,when,stars,liked\n1,10,1000,4,1\n",
}
_BLOCK = re.compile(r"^```console\n(.*?)^```", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Example:
    """A command of a page and what the page says that it prints."""

    page: Path
    command: str
    printed: str

    @property
    def needs_run(self) -> bool:
        """Whether it reads or writes the run of twenty steps."""
        return "runs/first" in self.command


def examples(text: str, page: Path) -> Iterator[Example]:
    """Yield the examples of a page, in order."""
    for block in _BLOCK.findall(text):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            lines = part.split("\n")
            end = next(n for n, line in enumerate(lines) if not line.endswith("\\"))
            command = "\n".join(lines[: end + 1])
            yield Example(page, command, "\n".join(lines[end + 1 :]).rstrip("\n"))


def write_inputs(folder: Path) -> None:
    """Write the small log of the examples."""
    (folder / "log").mkdir(parents=True)
    for name, text in LOG_FILES.items():
        (folder / "log" / name).write_text(text, encoding="utf-8")


class Sandbox:
    """An empty folder with the inputs, in which commands run."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        shim = folder / ".bin" / "tokenrec"
        shim.parent.mkdir()
        shim.write_text(f'#!/bin/sh\nexec {sys.executable} -m tokenrec "$@"\n')
        shim.chmod(0o755)
        self._environment = os.environ | {
            "PATH": f"{shim.parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "COLUMNS": "88",
        }
        write_inputs(folder)
        self.run("tokenrec prepare synthetic --rows 3000 --out data/synthetic")

    def run(self, command: str) -> str:
        """Run a command and return what it prints, errors included."""
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        # Nothing in a page may depend on where the folder lies.
        return done.stdout.replace(f"{self._folder}/", "").rstrip("\n")


def main(check: bool) -> int:
    """Run every example; return the exit status."""
    found = [
        example
        for page in sorted(DOCS.rglob("*.md"))
        for example in examples(page.read_text(encoding="utf-8"), page)
    ]
    status = 0
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(Path(folder).resolve())
        if any(example.needs_run for example in found):
            sandbox.run(TRAIN)
        for example in found:
            printed = sandbox.run(example.command)
            if printed == example.printed:
                continue
            status = 1
            print(f"{example.page.relative_to(ROOT)}: $ {example.command}")
            difference = difflib.ndiff(
                example.printed.splitlines(), printed.splitlines()
            )
            print("\n".join(difference))
            if not check:
                old = f"$ {example.command}\n{example.printed}\n"
                new = f"$ {example.command}\n{printed}\n"
                text = example.page.read_text(encoding="utf-8")
                example.page.write_text(text.replace(old, new, 1), encoding="utf-8")
    return status if check else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change no page")
    sys.exit(main(parser.parse_args().check))

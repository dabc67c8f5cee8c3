"""Damage each file of an artifact: none may be opened, and none may serve.

    python -m benchmarks.serving_damage --model DIR --out benchmarks/results/serving_damage

`opened` damages one file after another, the manifest too: a byte flipped at a random
place, the second half cut off, the file removed. `tokenrec.load` must refuse each by the
name of the file. `served` moves the link of a server to artifacts with a damaged file of
each kind: the model before must go on, say why, and have the scores of `tokenrec
predict`. `started` starts a server of them: it must end with a message and no traceback.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from benchmarks.report import run_script, write_result
from benchmarks.serving_process import PACKAGES, golden_rows, served
from benchmarks.serving_swaps import Clients, ask, connect, copy_artifact, point
from tokenrec.errors import InputError
from tokenrec.serving.artifact import MANIFEST_FILE, read_artifact

DAMAGES = ("flipped", "truncated", "missing")


@contextlib.contextmanager
def damaged(path: Path, damage: str, draw: np.random.Generator) -> Iterator[None]:
    """Damage a file inside the block. The file may be a hard link of a sound one."""
    data = bytearray(path.read_bytes())
    aside = path.with_name(path.name + ".sound")
    path.rename(aside)
    try:
        if damage == "flipped":
            data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
            path.write_bytes(data)
        elif damage == "truncated":
            path.write_bytes(data[: len(data) // 2])
        yield
    finally:
        aside.replace(path)


def open_each(folder: Path, draw: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Damage each file and open the artifact; yield a row for each damage."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    names = [n for n in (*manifest["files"], MANIFEST_FILE) if _size(folder / n)]
    for damage in DAMAGES:
        ends: collections.Counter[str] = collections.Counter()
        for name in names:
            with damaged(folder / name, damage, draw):
                try:
                    read_artifact(folder)
                except InputError as error:
                    # A manifest that is no JSON, or of another format, is named too.
                    says = (
                        "named"
                        if PurePosixPath(name).name in str(error)
                        else "not named"
                    )
                    ends[f"refused, {says}"] += 1
                    if says != "named":
                        print(f"{damage} {name}: {error}", file=sys.stderr)
                else:
                    ends["opened"] += 1
                    print(f"{damage} {name}: opened", file=sys.stderr)
        yield _row("opened", damage, len(names), ends)
    read_artifact(folder)


def _size(path: Path) -> int:
    return path.stat().st_size


def one_of_each(folder: Path) -> list[str]:
    """A file of each kind: of each folder of the artifact, and those beside them."""
    manifest = json.loads((folder / MANIFEST_FILE).read_text())
    kinds: dict[str, str] = {}
    for name in (*manifest["files"], MANIFEST_FILE):
        parts = PurePosixPath(name).parts
        kind = "/".join(parts[:-1]) or name
        if kind not in kinds and _size(folder / name):
            kinds[kind] = name
    return list(kinds.values())


def serve_each(
    model: Path, folder: Path, draw: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Point a server under load to damaged artifacts; yield a row for each damage."""
    link, golden = folder.parent / "current", golden_rows(model)
    point(link, model)
    names = one_of_each(folder)
    with served(link, "--max-batch", "1", "--max-candidates", "24") as server:
        clients = Clients(server.port, golden, 1)
        with contextlib.closing(connect(server.port)) as connection:
            for damage in DAMAGES:
                ends: collections.Counter[str] = collections.Counter()
                for name in names:
                    with damaged(folder / name, damage, draw):
                        if not (folder / MANIFEST_FILE).exists():
                            # A link to what is no artifact is not followed at all.
                            ends["not loaded"] += 1
                            continue
                        point(link, folder)
                        last = _wait_for(connection, folder.name)
                        point(link, model)
                        _wait_for(connection, model.name)
                    says = "named" if PurePosixPath(name).name in last["error"] else ""
                    ends[f"{last['outcome']}, {says or 'not named'}"] += 1
                yield _row("served", damage, len(names), ends)
        clients.stop()
        yield {
            "case": "served",
            "damage": "meanwhile",
            "files": 0,
            "ends": f"{clients.answers:,} right answers, {len(clients.failures)} others",
        }
        if clients.failures or server.stop():
            raise InputError(f"the server failed: {clients.failures[:3]}")


def _wait_for(connection: Any, name: str) -> dict[str, Any]:
    while True:
        _, listed = ask(connection, "/v1/models")
        last: dict[str, Any] = listed["last_load"]
        if last["name"] == name:
            return last


def start_each(folder: Path, draw: np.random.Generator) -> dict[str, Any]:
    """Start servers of artifacts with a flipped byte; return the row."""
    ends: collections.Counter[str] = collections.Counter()
    names = one_of_each(folder)
    for name in names:
        with damaged(folder / name, "flipped", draw):
            command = [
                sys.executable,
                "-m",
                "tokenrec",
                "serve",
                "--model",
                str(folder),
            ]
            done = subprocess.run(
                [*command, "--port", "0"], capture_output=True, text=True, timeout=600
            )
        named = PurePosixPath(name).name in done.stderr
        clean = "Traceback" not in done.stderr and "ready" not in done.stdout
        ends[
            f"exit {done.returncode}"
            + (", named" if named else ", not named")
            + ("" if clean else ", not clean")
        ] += 1
    return _row("started", "flipped", len(names), ends)


def _row(case: str, damage: str, files: int, ends: Any) -> dict[str, Any]:
    text = ", ".join(f"{number} {end}" for end, number in sorted(ends.items()))
    row = {"case": case, "damage": damage, "files": files, "ends": text}
    print(json.dumps(row), flush=True)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="an artifact")
    parser.add_argument("--seed", type=int, default=0, help="seed of the damage")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    draw = np.random.default_rng(args.seed)
    # Beside the artifact: its files are linked there, and not copied.
    with tempfile.TemporaryDirectory(dir=args.model.resolve().parent) as temporary:
        folder = Path(temporary) / "damaged"
        shutil.copytree(args.model, folder, copy_function=os.link)
        sound = copy_artifact(args.model, Path(temporary) / "sound", 3, os.link)
        rows = list(open_each(folder, draw))
        rows += serve_each(sound, folder, draw)
        rows.append(start_each(folder, draw))
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {"seed": args.seed},
            f"python -m benchmarks.serving_damage --model DIR --out {args.out}",
            title="Artifacts with a damaged file",
            packages=PACKAGES,
        )
    wrong = ("opened,", "ok,", "not clean", "exit 0")
    opened = [row for row in rows if any(w in f"{row['ends']}," for w in wrong)]
    if opened:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

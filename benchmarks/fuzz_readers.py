"""Read damaged files with every reader: none may crash, or return other data unnoticed.

    python -m benchmarks.fuzz_readers --cases 400 --out benchmarks/results/fuzz_readers

A case copies a small, sound folder and damages one of its files: bits flip, bytes are
cut off, inserted, deleted or replaced, a digit changes, the file is deleted or is a
folder. Then it reads the copy. The rule of the target says how a case may end:

- `equal`, files with a checksum: with the data of the sound folder, or an `InputError`.
- `sound`, files that a user writes, or from before there were checksums: also with
  other data that passes every check, because a changed digit is just another value.

Anything else, a warning too, is a failure. It is printed with its seed, which repeats
the case (`--target T --only SEED`), and the exit code is 1.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz_targets import Target, make_targets
from benchmarks.report import run_script, write_result
from tokenrec.errors import InputError


def run_case(target: Target, seed: int, sound: str, work: Path) -> str:
    """Damage a file of a copy of the target's folder, and read the copy.

    Args:
      target: what to damage and how to read it.
      seed: seed of the damage.
      sound: digest of the sound folder.
      work: folder for the copy.

    Returns:
      "refused", "equal" or "other data".

    Raises:
      Exception: anything else that the reader raised; it is a failure.
    """
    copy = work / "case"
    shutil.copytree(target.folder, copy)
    try:
        draw = np.random.default_rng(seed)
        damage(copy / target.files[draw.integers(len(target.files))], draw)
        try:
            digest = target.read(copy)
        except InputError:
            return "refused"
        return "equal" if digest == sound else "other data"
    finally:
        shutil.rmtree(copy)


def damage(path: Path, draw: np.random.Generator) -> None:
    """Change a file in one of the ways in which files get damaged."""
    content = bytearray(path.read_bytes())
    size = len(content)
    begin = int(draw.integers(size + 1))
    end = min(size, begin + 1 + int(2 ** draw.uniform(0, 8)))
    # 0 to 2: flip bits; 3 to 8: cut off, delete, insert, replace, repeat the beginning,
    # zero; 9: delete the file or make it a folder; 10 and 11: change a digit.
    kind = draw.integers(12)
    digits = [place for place, byte in enumerate(content) if byte in b"0123456789"]
    if kind > 9 and digits:
        content[int(draw.choice(digits))] = ord("0") + int(draw.integers(10))
    elif kind < 3:
        for _ in range(int(draw.choice([1, 1, 1, 2, 8]))):
            content[int(draw.integers(size))] ^= 1 << int(draw.integers(8))
    elif kind == 3:
        del content[begin:]
    elif kind == 4:
        del content[begin:end]
    elif kind == 5:
        content[begin:begin] = draw.bytes(end - begin + 1)
    elif kind == 6:
        content[begin:end] = draw.bytes(end - begin)
    elif kind == 7:
        content[begin:begin] = content[: int(draw.integers(1, 200))]
    elif kind == 8:
        content[begin:end] = bytes(end - begin)
    path.unlink()
    if kind != 9:
        path.write_bytes(content)
    elif draw.random() < 0.5:
        path.mkdir()


def fuzz(
    targets: Sequence[Target], seeds: Sequence[int], work: Path
) -> tuple[list[dict[str, Any]], list[str]]:
    """Run the cases of all targets.

    Args:
      targets: what to damage.
      seeds: a case per target and seed.
      work: folder for copies.

    Returns:
      A row of counts per target, and a text per failure.
    """
    rows, failures = [], []
    for target in targets:
        sound = target.read(target.folder)
        ends: collections.Counter[str] = collections.Counter()
        for seed in seeds:
            try:
                end = run_case(target, seed, sound, work)
            except (Exception, Warning):  # noqa: BLE001 - counts every kind of failure
                end, text = "failure", traceback.format_exc()
            else:
                text = "other data than the sound folder's\n"
            failed = end == "failure" or (
                end == "other data" and target.rule == "equal"
            )
            if failed:
                failures.append(f"--target '{target.name}' --only {seed}: {text}")
            ends["failures" if failed else end] += 1
        counts = {
            name: ends[name] for name in ("refused", "equal", "other data", "failures")
        }
        rows.append(
            {
                "target": target.name,
                "rule": target.rule,
                "files": len(target.files),
                "cases": len(seeds),
            }
            | counts
        )
    return rows, failures


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--cases", type=int, default=400, help="cases per target (default 400)"
    )
    parser.add_argument("--first", type=int, default=0, help="first seed (default 0)")
    parser.add_argument("--target", help="run this target only")
    parser.add_argument("--only", type=int, help="run the case of this seed only")
    parser.add_argument(
        "--out", type=Path, help="path stem of the result; printed without it"
    )
    args = parser.parse_args(argv)
    # A crash inside a C++ reader ends the process: show where.
    faulthandler.enable()
    warnings.simplefilter("error")
    seeds = (
        range(args.first, args.first + args.cases) if args.only is None else [args.only]
    )
    with tempfile.TemporaryDirectory() as folder:
        targets = [
            t for t in make_targets(Path(folder)) if args.target in (None, t.name)
        ]
        rows, failures = fuzz(targets, seeds, Path(folder))
    print(*failures, sep="\n", file=sys.stderr)
    command = (
        f"python -m benchmarks.fuzz_readers --cases {args.cases} --first {args.first}"
    )
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {},
            f"{command} --out {args.out}",
            title="Damaged files against every reader",
        )
    else:
        print(json.dumps(rows, indent=1))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

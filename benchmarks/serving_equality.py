"""Score every row of a split with an artifact, and compare with `tokenrec predict`.

    tokenrec predict --workdir RUN --split test --out EXPECTED.parquet
    python -m benchmarks.serving_equality --name "Complete Journey, NIO" --workdir RUN \\
        --model ARTIFACT --expected EXPECTED.parquet --work DIR

Requests are written with the history, the columns and the statistics that the log has, a
thousand to a Parquet file, and scored as `tokenrec score` scores them. Each row of the
file of `predict` must get a score once, or some of them with `--requests`. Files that are
done are kept in `--work`, and the table has a line of each name that is complete there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.report import run_script, write_result
from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.errors import InputError
from tokenrec.runtime.compilation_cache import persistent_compilation_cache
from tokenrec.serving.export.requests import predicted_requests
from tokenrec.serving.request import Limits
from tokenrec.serving.score_file import score_file
from tokenrec.serving.scorer import Scorer, open_scorer
from tokenrec.sharding import make_mesh

TOLERANCE = 1e-6
_KEY = ("user_id", "item_id", "time_ms")
# Requests of a file.
_PART = 1_000

type Key = tuple[Any, Any, int]


def request_files(
    run_folder: Path, data: Path | None, split: str, folder: Path, most: int | None
) -> Iterator[Path]:
    """Write the requests of a split, part by part; those that are there are kept.

    Args:
      run_folder: folder of the run.
      data: its data set, if it has moved.
      split: name of the split.
      folder: where the files are.
      most: number of requests, spread evenly; None: all.

    Yields:
      The path of each file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(load_run_config(run_folder, data).mesh)
    with jax.set_mesh(mesh):
        run = open_run(run_folder, "best", data)
        requests = predicted_requests(run, split, mesh, most)
    for number in itertools.count():
        path = folder / f"{number:04}.parquet"
        with jax.set_mesh(mesh):
            part = [one.request for one in itertools.islice(requests, _PART)]
        if not part:
            return
        if not path.exists():
            pq.write_table(pa.Table.from_pylist(part), path)
        yield path


def compare(
    scorer: Scorer, requests: Path, scores: Path, expected: dict[Key, np.ndarray]
) -> dict[str, Any]:
    """Score a file of requests, and compare.

    Args:
      scorer: the artifact.
      requests: file of requests.
      scores: file of their scores, which is written.
      expected: score columns of `tokenrec predict`; those that are compared are removed.

    Returns:
      The number of requests, of rows and of scores, and the differences.

    Raises:
      InputError: a row was scored that `predict` has not, or one twice.
    """
    most = 1 << 31
    score_file(scorer, requests, scores, Limits(most, most, most, most, most))
    table = pq.read_table(scores)
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    wanted = []
    for key in keys:
        if key not in expected:
            raise InputError(f"row {key} is not in --expected, or was scored before")
        wanted.append(expected.pop(key))
    found = np.stack([table[name].to_numpy() for name in scorer.outputs], 1)
    difference = np.abs(found - np.stack(wanted))
    return {
        "requests": pq.read_metadata(requests).num_rows,
        "rows": table.num_rows,
        "scores": difference.size,
        "equal": int((difference == 0).sum()),
        "beyond": int((~(difference <= TOLERANCE)).sum()),
        "largest": float(difference.max()),
    }


def compare_all(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Compare a split, and return the table row."""
    scorer = open_scorer(args.model)
    table = pq.read_table(args.expected, columns=[*_KEY, *scorer.outputs])
    columns = np.stack([table[name].to_numpy() for name in scorer.outputs], 1)
    keys = zip(*(table[name].to_pylist() for name in _KEY), strict=True)
    expected = dict(zip(keys, columns, strict=True))
    parts = []
    given = args.workdir, args.data, args.split, work / "requests", args.requests
    for path in request_files(*given):
        scores = work / f"scores-{path.name}"
        parts.append(compare(scorer, path, scores, expected))
        print(json.dumps(parts[-1]), flush=True)
    sums = {
        name: sum(part[name] for part in parts)
        for name in ("requests", "rows", "scores", "equal", "beyond")
    }
    manifest = scorer.artifact.manifest
    return {
        "run": args.name,
        "step": manifest["step"],
        "split": args.split,
        "rows of predict": table.num_rows,
        "requests": sums["requests"],
        "rows": sums["rows"],
        "without a score": None if args.requests else len(expected),
        "scores": sums["scores"],
        "equal in every bit": sums["equal"],
        "largest difference": max(part["largest"] for part in parts),
        "beyond 1e-6": sums["beyond"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the run, in the table")
    parser.add_argument("--workdir", type=Path, required=True, help="folder of the run")
    parser.add_argument("--data", type=Path, help="its data set, if it has moved")
    parser.add_argument("--model", type=Path, required=True, help="its artifact")
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--requests", type=int, help="so many, spread evenly, and not all rows"
    )
    parser.add_argument(
        "--expected", type=Path, required=True, help="what `tokenrec predict` wrote"
    )
    parser.add_argument("--work", type=Path, required=True, help="folder to work in")
    parser.add_argument("--out", type=Path, help="path stem of the result")
    args = parser.parse_args(argv)
    name = args.name.replace(" ", "_").replace(",", "")
    done = args.work / f"{name}.json"
    if not done.exists():
        with persistent_compilation_cache(
            args.work, True, every_program=True, remedy="name another --work"
        ):
            row = compare_all(args, args.work / name)
        done.write_text(json.dumps(row))
    rows = [json.loads(path.read_text()) for path in sorted(args.work.glob("*.json"))]
    print(json.dumps(json.loads(done.read_text())))
    if args.out is not None:
        write_result(
            args.out,
            rows,
            {},
            "python -m benchmarks.serving_equality --name NAME --workdir RUN --split "
            "SPLIT --model ARTIFACT --expected EXPECTED.parquet --work DIR --out "
            f"{args.out}",
            title="Scores of an artifact on every row, against tokenrec predict",
        )
    if any(row["beyond 1e-6"] or row["without a score"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)

"""Scores of a prepared split to Parquet."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jax.sharding import Mesh

from tokenrec.checkpoint.run_folder import OpenedRun, load_run_config, open_run
from tokenrec.config import Config
from tokenrec.evaluation.catalogue import RankedItems, rank_split
from tokenrec.evaluation.evaluate import (
    Scores,
    jit_eval_step,
    make_retrieval_step,
    score_split,
)
from tokenrec.runtime import distributed
from tokenrec.sharding import make_mesh


def predict_run(
    workdir: Path, split: str, checkpoint: str, data: Path | None, out: Path
) -> int:
    """Writes the scores of a split and returns how many rows.

    Ranking: a row per impression; columns `user_id, item_id, time_ms`, and per task `label_TASK` (int8, null where
    unknown) and `score_TASK` (float32 probability). Retrieval: `head.top_k` rows per request; columns `user_id, rank`
    (from 1), `item_id, score, time_ms` (of the request). The file appears whole or not at all; the first process
    writes it.
    """
    with distributed.raise_on_all_processes():
        config = load_run_config(workdir, data)
        mesh = make_mesh(config.mesh)
    distributed.assert_same_on_all_processes({"--split": split})
    with jax.set_mesh(mesh):
        tables = _tables(open_run(workdir, checkpoint, data), config, split, mesh)
        if distributed.is_first_process():
            return _write(tables, out)
        return sum(table.num_rows for table in tables)


def _write(tables: Iterator[pa.Table], out: Path) -> int:
    rows = 0
    partial = out.with_name(f".{out.name}.incomplete-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    writer = None
    try:
        for table in tables:
            writer = (
                pq.ParquetWriter(partial, table.schema) if writer is None else writer
            )
            writer.write_table(table)
            rows += table.num_rows
        if writer is not None:
            writer.close()
            os.replace(partial, out)
    finally:
        if writer is not None:
            writer.close()
        partial.unlink(missing_ok=True)
    return rows


def _tables(
    run: OpenedRun, config: Config, split: str, mesh: Mesh
) -> Iterator[pa.Table]:
    if config.data.objective == "retrieval":
        find = functools.partial(make_retrieval_step(run.model, run.dataset), run.state)
        before: set[tuple[object, int]] = set()
        for answers in rank_split(find, config, run.dataset, split, mesh):
            # A request with many goals takes several streams, whose answers are the same.
            asked = list(
                zip(answers.user_id.tolist(), answers.time.tolist(), strict=True)
            )
            new = [
                n
                for n, request in enumerate(asked)
                if request not in before and request not in asked[:n]
            ]
            before.update(asked)
            if new:
                yield _top_table(RankedItems(*(part[new] for part in answers)))
        return
    step = jit_eval_step(run.model)
    for scores in score_split(step, run.state, config, run.dataset, split, mesh):
        yield _table(scores, run.model.tasks)


def _top_table(answers: RankedItems) -> pa.Table:
    row, place = np.nonzero(answers.exists)
    return pa.table(
        {
            "user_id": pa.array(answers.user_id[row]),
            "rank": pa.array((place + 1).astype(np.int32)),
            "item_id": pa.array(answers.items[row, place]),
            "score": pa.array(answers.scores[row, place].astype(np.float32)),
            "time_ms": pa.array(answers.time[row]),
        }
    )


def _table(scores: Scores, tasks: tuple[str, ...]) -> pa.Table:
    columns = {
        "user_id": pa.array(scores.user_id),
        "item_id": pa.array(scores.item_id),
        "time_ms": pa.array(scores.time),
    }
    for k, task in enumerate(tasks):
        label = scores.labels[:, k]
        columns[f"label_{task}"] = pa.array(label, mask=label < 0)
        columns[f"score_{task}"] = pa.array(
            np.ascontiguousarray(scores.probabilities[:, k])
        )
    return pa.table(columns)

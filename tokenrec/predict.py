"""Scores of a prepared split to Parquet."""

from __future__ import annotations

import os
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tokenrec.evaluate import Scores, compiled_eval_step, score_split
from tokenrec.run import load_run_config, open_run
from tokenrec.sharding import make_mesh


def predict_run(workdir: Path, split: str, checkpoint: str, data: Path | None, out: Path) -> int:
    """Writes a row per impression of the split and returns how many.

    Columns `user_id, item_id, time_ms`, and per task `label_TASK` (int8, null where unknown) and `score_TASK`
    (float32 probability). The file appears whole or not at all.
    """
    config = load_run_config(workdir, data)
    mesh = make_mesh(config.mesh)
    rows = 0
    partial = out.with_name(f".{out.name}.incomplete-{os.getpid()}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with jax.set_mesh(mesh):
        run = open_run(workdir, checkpoint, data)
        step = compiled_eval_step(run.model)
        writer = None
        try:
            for scores in score_split(step, run.state, config, run.dataset, split, mesh):
                table = _table(scores, run.model.tasks)
                writer = pq.ParquetWriter(partial, table.schema) if writer is None else writer
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


def _table(scores: Scores, tasks: tuple[str, ...]) -> pa.Table:
    columns = {
        "user_id": pa.array(scores.user_id),
        "item_id": pa.array(scores.item_id),
        "time_ms": pa.array(scores.time),
    }
    for k, task in enumerate(tasks):
        label = scores.labels[:, k]
        columns[f"label_{task}"] = pa.array(label, mask=label < 0)
        columns[f"score_{task}"] = pa.array(np.ascontiguousarray(scores.probabilities[:, k]))
    return pa.table(columns)

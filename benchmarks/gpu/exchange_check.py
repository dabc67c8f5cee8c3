"""The exchange of table rows on one device against plain indexing in NumPy.

Tables that are spread over a mesh are looked up and updated by the exchange
(`tokenrec.ops.tables.exchange`), on one device as well. Looked-up rows must be equal
bit for bit. The row-wise AdaGrad update adds the gradients of one row in any order:
float32 rounding, 2e-7 relative measured on a CPU.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.exchange_step import exchange_step
from benchmarks.gpu.record import FAIL, PASS, Recorder
from benchmarks.gpu.reference import relative_error
from tokenrec.config import MeshConfig
from tokenrec.ops.tables.storage import CYCLE, to_storage_index
from tokenrec.sharding import RULES, make_mesh

TABLE = "exchange on one device"
RATE, TOLERANCE = 0.1, 1e-5


def plain_update(
    table: np.ndarray, sums: np.ndarray, ids: np.ndarray, target: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Row-wise AdaGrad on the gradient of the whole table, in float64."""
    gradient = np.zeros(table.shape)
    np.add.at(gradient, ids, target)
    sums = sums + np.mean(gradient**2, axis=1)
    # Rows that no id reads have a sum of 0 and no gradient.
    return table - RATE * gradient / (np.sqrt(sums)[:, None] + 1e-8), sums


def compare(recorder: Recorder) -> None:
    """Add a row for the look-up and one for each updated array."""
    cycles, width, count = (1, 8, 64) if recorder.rehearse else (8, 64, 20_000)
    rows = cycles * CYCLE
    random = np.random.default_rng(0)
    table = random.normal(size=(rows, width)).astype(np.float32)
    # Half of the ids are among the first rows, so that many occur often.
    ids = random.integers(0, rows, count).astype(np.int32)
    ids[::2] %= 50
    target = random.normal(size=(count, width)).astype(np.float32)
    order = np.asarray(to_storage_index(np.arange(rows), rows))
    stored = np.empty_like(table)
    stored[order] = table
    mesh = make_mesh(MeshConfig(1, 1, 1), jax.devices()[:1])
    inputs = (stored, np.zeros(rows, np.float32), ids, target)
    axes = (("rows", None), ("rows",), ("batch",), ("batch", None))
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, jax.NamedSharding(mesh, RULES(*names)))
            for array, names in zip(inputs, axes, strict=True)
        ]
        vectors, new_table, state = jax.jit(
            # The gradient of every looked-up row is its target.
            lambda table, sums, ids, target: exchange_step(
                table, sums, ids, lambda vectors: jnp.sum(vectors * target), RATE
            )
        )(*placed)
    wrong = int(np.sum(np.asarray(vectors) != table[ids]))
    recorder.add(
        table=TABLE,
        part="look-up",
        numbers_that_differ=wrong,
        result=FAIL if wrong else PASS,
    )
    expected, sums = plain_update(table, np.zeros(rows), ids, target)
    moved = np.asarray(new_table)[order].astype(np.float64) - table
    for part, got, wanted in (
        ("update of the table", moved, expected - table),
        ("AdaGrad sums", np.asarray(state.sum)[order], sums),
    ):
        recorder.check(relative_error(got, wanted), TOLERANCE, table=TABLE, part=part)

"""What `optim.gradient_sums="bfloat16"` costs: error of a gradient, and AUC of a run.

    python -m benchmarks.gradient_sums [--seeds 3] [--out STEM]

1. `configs/synthetic.py` at width 128 with products in bfloat16, and batches of random
   numbers. All errors are the norm of a difference of gradients over the norm of the
   gradient, of all weights that the option touches together.
   - `error_of_products`, on 1 to 8 virtual devices along `mesh.fsdp`: products in
     bfloat16 against float32, what `model.dtype="bfloat16"` costs anyway.
   - `error_here`, on the same: sums in bfloat16 against float32. XLA on a CPU adds in
     float32 and rounds once, so that this is the least that the option costs.
   - `error_in_a_ring`: the gradients of as many streams, one on each device, are rounded
     and added one after another, and every partial sum is rounded: the most that a
     network costs which adds in bfloat16. This is arithmetic, outside of JAX.
2. `configs/synthetic.py` in bfloat16 on two devices along `fsdp`, trained with each type
   of sums on its log of 60,000 rows: the macro AUC of its best checkpoint on valid.

No time is measured; what the bytes are worth on a pod is in
benchmarks/results/pods_changes.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Virtual devices have to be asked for before JAX starts.
MOST = 8
FLAG = "--xla_force_host_platform_device_count"
os.environ["XLA_FLAGS"] = f"{FLAG}={MOST}"
os.environ["JAX_PLATFORMS"] = "cpu"

import jax  # noqa: E402
import ml_dtypes  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.report import run_script, spread, write_result  # noqa: E402
from benchmarks.step_cases import random_batch  # noqa: E402
from tokenrec.config import Config, MeshConfig  # noqa: E402
from tokenrec.config.load import load_config, shipped_configs  # noqa: E402
from tokenrec.config.validate import validate  # noqa: E402
from tokenrec.data.dataset import open_dataset  # noqa: E402
from tokenrec.data.schema import Schema  # noqa: E402
from tokenrec.sharding import make_mesh, to_devices  # noqa: E402
from tokenrec.state import (  # noqa: E402
    abstract_state,
    build_model,
    in_shards,
    init_state,
)
from tokenrec.step import gradients, step_inputs  # noqa: E402

DEVICES = (1, 2, 4, 8)
RING = (8, 64, 512)
TYPES = ("float32", "bfloat16")
ROWS = 60_000
TRAINED_ON = 2


def gradients_of(
    config: Config,
    schema: Schema,
    devices: int,
    dtype: str,
    sums: str,
    batches: int = 1,
) -> Iterator[np.ndarray]:
    """Compute gradients of the weights in shards, each as one vector, float64."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=devices), jax.devices()[:devices])
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, dtype=dtype, width=128),
        optim=dataclasses.replace(config.optim, gradient_sums=sums),
    )
    tasks = tuple(task.name for task in schema.tasks)
    model = build_model(validate(config), schema, tasks)
    random = np.random.default_rng(0)
    with jax.set_mesh(mesh):
        in_sum = [
            name
            for name, shape in sorted(abstract_state(model).params.items())
            if in_shards(name, shape.sharding.spec)
        ]

        @jax.jit
        def dense(state: Any, batch: Any) -> list[jax.Array]:
            inputs = step_inputs(model, state, batch)
            found = gradients(model, state.params, inputs)[1][0]
            return [found[name] for name in in_sum]

        state = init_state(model, 0)
        for _ in range(batches):
            batch = to_devices(random_batch(config, schema, random), mesh)
            found = jax.device_get(dense(state, batch))
            yield np.concatenate([each.ravel() for each in found], dtype=float)


def relative(found: np.ndarray, exact: np.ndarray) -> float:
    """Norm of the difference over that of the exact vector."""
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def error_row(config: Config, schema: Schema, devices: int) -> dict[str, Any]:
    """Measure the errors on so many virtual devices."""
    exact, float32, bfloat16 = (
        next(gradients_of(config, schema, devices, dtype, sums))
        for dtype, sums in (
            ("float32", "float32"),
            ("bfloat16", "float32"),
            ("bfloat16", "bfloat16"),
        )
    )
    return {
        "devices": devices,
        "error_of_products": relative(float32, exact),
        "error_here": relative(bfloat16, float32),
    }


def ring_errors(config: Config, schema: Schema) -> dict[int, float]:
    """Compute the error of adding gradients of single streams in bfloat16, by devices."""
    data = dataclasses.replace(config.data, batch_size=1)
    config = dataclasses.replace(config, data=data)
    exact, rounded, errors = 0.0, None, {}
    streams = gradients_of(config, schema, 1, "bfloat16", "float32", RING[-1])
    for count, one in enumerate(streams, start=1):
        exact = exact + one
        part = one.astype(ml_dtypes.bfloat16)
        rounded = part if rounded is None else rounded + part
        if count in RING:
            errors[count] = relative(rounded.astype(float), exact)
    return errors


def tokenrec(*arguments: str) -> None:
    """Run a command of tokenrec in a process of its own."""
    subprocess.run(
        [sys.executable, "-m", "tokenrec", *arguments],
        env=os.environ | {"XLA_FLAGS": f"{FLAG}={TRAINED_ON}"},
        check=True,
    )


def trained_auc(data: Path, work: Path, sums: str, seed: int) -> float:
    """Train and evaluate one run; return its macro AUC on valid."""
    run = work / f"{sums}_{seed}"
    tokenrec(
        "train",
        f"--config={shipped_configs()['synthetic']}",
        f"--data={data}",
        f"--workdir={run}",
        f"--config.seed={seed}",
        "--config.model.dtype=bfloat16",
        f"--config.optim.gradient_sums={sums}",
        "--config.mesh.data=1",
        f"--config.mesh.fsdp={TRAINED_ON}",
    )
    result = run / "eval.json"
    tokenrec("evaluate", f"--workdir={run}", "--split=valid", f"--json={result}")
    return json.loads(result.read_text())["macro_auc"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "gradient_sums"
    )
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = work / "data"
        tokenrec("prepare", "synthetic", f"--rows={ROWS}", f"--out={data}")
        schema = open_dataset(data).schema
        config = load_config(str(shipped_configs()["synthetic"]))
        rows = {devices: error_row(config, schema, devices) for devices in DEVICES}
        for devices, error in ring_errors(config, schema).items():
            row = rows.setdefault(devices, {"devices": devices})
            row["error_in_a_ring"] = error
        auc = {
            sums: [trained_auc(data, work, sums, seed) for seed in range(flags.seeds)]
            for sums in TYPES
        }
    write_result(
        flags.out,
        list(rows.values()),
        {
            "width": 128,
            "seeds": flags.seeds,
            **{
                f"valid macro AUC with sums in {sums}": spread(auc[sums])
                for sums in TYPES
            },
            "difference of the same seed": spread(
                [b - a for a, b in zip(*auc.values(), strict=True)], "+"
            ),
        },
        "python -m benchmarks.gradient_sums",
        title="Gradients of the backbone summed in bfloat16",
    )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)

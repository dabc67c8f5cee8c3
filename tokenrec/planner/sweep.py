"""Choose a mesh for a pod: rank every mesh shape by formula, compile the best ones.

The formula (`mesh_cost.py`) is rough and takes milliseconds a shape; a compilation is
exact and takes a minute or more. So the formula ranks, and the compiled figures decide.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

from tokenrec.config import Config, MeshConfig
from tokenrec.config.backbones import (
    supports_context_parallelism,
    supports_tensor_parallelism,
)
from tokenrec.config.validate import validate
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.models.backbones.mesh_check import sharded_sizes
from tokenrec.planner.compile import compile_config
from tokenrec.planner.flops import step_work
from tokenrec.planner.inputs import planned_inputs
from tokenrec.planner.mesh_cost import Prediction, predict
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.report import mesh_text
from tokenrec.planner.topology import topology_mesh

COMPILED = 5
# Least tokens of a stream on one device along `context`: with fewer, a batch of such
# streams is split better by the other axes.
LEAST_PART = 2048


def compile_best(
    config: Config,
    topology: str,
    slices: int = 1,
    *,
    count: int = COMPILED,
    schema: Schema | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Compile the step of a config on the best meshes of a pod.

    Args:
      config: a config; its own mesh does not matter, its batch is that of every mesh.
      topology: of each slice, as "v5p:8x8x8".
      slices: number of slices.
      count: meshes to compile, the best by formula.
      schema: as in `compile_config`.
      say: called with a line before each compilation.

    Returns:
      `compile_config` of each mesh, with `predicted_seconds` and `predicted_bytes` by
      formula; fastest first, those that do not fit last.

    Raises:
      InputError: as `compile_config`; or no mesh splits heads, FFN, width and batch.
    """
    predictions = rank(config, topology, slices, schema)
    say(
        f"{len(predictions)} meshes ranked; compiling {min(count, len(predictions))}, "
        "each takes a minute or more"
    )
    results = []
    for prediction in predictions[:count]:
        mesh = prediction.mesh
        say(
            f"{mesh_text(dataclasses.asdict(mesh))}: "
            f"{1e3 * prediction.seconds:.2f} ms, "
            f"{prediction.bytes / 2**30:.2f} GiB a device by formula"
        )
        result = compile_config(config, topology, slices, mesh, schema)
        result["predicted_seconds"] = prediction.seconds
        result["predicted_bytes"] = prediction.bytes
        results.append(result)
    return sorted(
        results,
        key=lambda result: (not result["fits"], result["roofline_seconds"] or math.inf),
    )


def rank(
    config: Config, topology: str, slices: int = 1, schema: Schema | None = None
) -> list[Prediction]:
    """Rank every mesh of a pod that splits the model; nothing is compiled.

    Args:
      config: a config; its own mesh does not matter.
      topology: of each slice, as "v5p:8x8x8".
      slices: number of slices.
      schema: as in `compile_config`.

    Returns:
      Predictions, best first: those that fit, by time.

    Raises:
      InputError: no mesh splits heads, FFN, width and batch.
    """
    config = validate(config)
    schema = resolve_schema(config)[0] if schema is None else schema
    pod = topology_mesh(topology, MeshConfig(), slices)
    devices = pod.size
    # Shapes of arrays are the same on every mesh, and so are the axes that split them.
    inputs = planned_inputs(config, schema, pod)
    length = inputs.model.layout(config.data.events).length
    shapes = list(mesh_shapes(config, devices, slices, length))
    if not shapes:
        raise InputError(
            f"no mesh of {devices} devices splits model.heads={config.model.heads}, "
            f"model.width={config.model.width}, "
            f"data.batch_size={config.data.batch_size} and "
            f"data.eval_batch_size={config.data.eval_batch_size}; "
            "make the batches multiples of the devices"
        )
    # Model FLOPs, too, are the same on every mesh.
    first = topology_mesh(topology, shapes[0], slices)
    work, _ = step_work(inputs.model, first, inputs.batch)
    tokens = config.data.batch_size * length
    predictions = []
    for shape in shapes:
        mesh = topology_mesh(topology, shape, slices)
        predictions.append(
            predict(config, inputs.state, work.model_flops, tokens, mesh)
        )
    return sorted(
        predictions,
        key=lambda each: (not each.fits, each.seconds, each.network_seconds),
    )


def mesh_shapes(
    config: Config, devices: int, slices: int = 1, length: int = 0
) -> Iterator[MeshConfig]:
    """Yield the meshes whose axes divide the batches, width, heads and FFN of a config.

    Args:
      config: a config.
      devices: number of devices, all slices together.
      slices: number of slices, over which `data` is split first.
      length: tokens of the longest stream; `context` splits it into parts of
        `LEAST_PART` tokens or more.

    >>> from tokenrec.config import DataConfig, ModelConfig
    >>> data = DataConfig(batch_size=4, eval_batch_size=4)
    >>> small = Config(data=data, model=ModelConfig(width=64, heads=2))
    >>> [(m.data, m.fsdp, m.tensor) for m in mesh_shapes(small, 4)]
    [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 4, 1), (1, 2, 2)]
    """
    model = config.model
    micro_batch = config.data.batch_size // config.optim.accumulate
    most_context = length // LEAST_PART if supports_context_parallelism(model) else 1
    contexts = [n for n in _divisors(devices)[::-1] if n <= max(most_context, 1)]
    for context in contexts:
        for data in _divisors(devices // context):
            if data % slices:
                continue
            for fsdp in _divisors(devices // context // data):
                tensor = devices // context // data // fsdp
                if tensor > 1 and not supports_tensor_parallelism(model):
                    continue
                axis_sizes = {"fsdp": fsdp, "tensor": tensor}
                splits = [
                    (micro_batch, data * fsdp),
                    (config.data.eval_batch_size, data * fsdp),
                ]
                splits += [
                    (size, axis_sizes[axis]) for _, size, axis in sharded_sizes(model)
                ]
                if all(size % parts == 0 for size, parts in splits):
                    yield MeshConfig(data, fsdp, tensor, context)


def _divisors(number: int) -> list[int]:
    """Divisors of a number, largest first."""
    return [n for n in range(number, 0, -1) if number % n == 0]

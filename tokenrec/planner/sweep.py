"""Choose mesh, recomputation and batch for a pod: rank by formula, compile the best.

The formula (`mesh_cost.py`) is rough and takes milliseconds a setting; a compilation
takes a minute or more, and says what fits and how long the compiler's own schedule is.
So the formula ranks, and the schedule decides.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from tokenrec.config import Config, MeshConfig, Remat
from tokenrec.config.backbones import (
    BACKBONES,
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
# Batches to try, over that of the config.
BATCHES = (1, 2, 4)
REMATS: tuple[Remat, ...] = ("none", "dots", "full")


def compile_best(
    config: Config,
    topology: str,
    slices: int = 1,
    *,
    count: int = COMPILED,
    schema: Schema | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Compile the step of a config with the best settings for a pod.

    A setting is a mesh, `model.remat` and a batch of `BATCHES` times that of the
    config. A larger batch is another training run: it only says what the pod could do.

    Args:
      config: a config; its own mesh and `model.remat` do not matter.
      topology: of each slice, as "v5p:8x8x8".
      slices: number of slices.
      count: settings to compile, the best by formula.
      schema: as in `compile_config`.
      say: called with a line before each compilation.

    Returns:
      `compile_config` of each setting, with `remat`, and with `predicted_seconds` and
      `predicted_bytes` by formula; most examples a second by schedule first, those that
      do not fit last.

    Raises:
      InputError: as `compile_config`; or no mesh splits heads, FFN, width and batch.
    """
    settings = rank(config, topology, slices, schema)
    say(
        f"{len(settings)} settings of mesh, remat and batch ranked; compiling "
        f"{min(count, len(settings))}, each takes a minute or more"
    )
    results = []
    for setting in settings[:count]:
        say(
            f"{mesh_text(dataclasses.asdict(setting.mesh))} remat={setting.remat} "
            f"batch={setting.batch}: {1e3 * setting.cost.seconds:.2f} ms, "
            f"{setting.cost.bytes / 2**30:.2f} GiB a device by formula"
        )
        changed = with_setting(config, setting.remat, setting.batch)
        result = compile_config(changed, topology, slices, setting.mesh, schema)
        result["remat"] = setting.remat
        result["predicted_seconds"] = setting.cost.seconds
        result["predicted_bytes"] = setting.cost.bytes
        results.append(result)
    return sorted(
        results,
        key=lambda result: (
            not result["fits"],
            -(result["examples_per_second_by_schedule"] or 0.0),
        ),
    )


class Setting(NamedTuple):
    """How a pod could run a config.

    Attributes:
      mesh: sizes of the axes.
      remat: `model.remat`.
      batch: `data.batch_size`.
      cost: of a step, by formula.
    """

    mesh: MeshConfig
    remat: Remat
    batch: int
    cost: Prediction


def rank(
    config: Config, topology: str, slices: int = 1, schema: Schema | None = None
) -> list[Setting]:
    """Rank every setting of a pod that splits the model; nothing is compiled.

    Args:
      config: a config; its own mesh and `model.remat` do not matter.
      topology: of each slice, as "v5p:8x8x8".
      slices: number of slices.
      schema: as in `compile_config`.

    Returns:
      Settings, best first: those that fit, by seconds a stream.

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
    # Model FLOPs of a stream, too, are the same in every setting.
    first = topology_mesh(topology, shapes[0], slices)
    work, _ = step_work(inputs.model, first, inputs.batch)
    streams = config.data.batch_size
    reads_remat = "remat" in BACKBONES[config.model.kind].reads
    settings = []
    for remat in REMATS if reads_remat else (config.model.remat,):
        for batch in (streams * times for times in BATCHES):
            changed = with_setting(config, remat, batch)
            for shape in mesh_shapes(changed, devices, slices, length):
                cost = predict(
                    changed,
                    inputs.state,
                    work.model_flops * batch / streams,
                    batch * length,
                    topology_mesh(topology, shape, slices),
                )
                settings.append(Setting(shape, remat, batch, cost))
    return sorted(
        settings,
        key=lambda each: (
            not each.cost.fits,
            each.cost.seconds / each.batch,
            each.cost.network_seconds / each.batch,
            # The formula knows of matrix products only: computing anything again costs
            # more than it says.
            REMATS.index(each.remat),
        ),
    )


def with_setting(config: Config, remat: Remat, batch: int) -> Config:
    """Change `model.remat` and `data.batch_size` of a config."""
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, remat=remat),
        data=dataclasses.replace(config.data, batch_size=batch),
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

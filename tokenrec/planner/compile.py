"""Compiles for a pod that is not there: libtpu compiles for a described topology on any machine.

What comes out is the program that the pod would run, so its memory, FLOPs and collectives are facts; times are the
lower bounds of `roofline.py`.
"""

from __future__ import annotations

import dataclasses
import time
from collections import Counter
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.stages import Compiled

from tokenrec.config import Config, MeshConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.data.schema import Schema
from tokenrec.models.backbones.mesh_check import check_mesh
from tokenrec.planner.flops import Work, step_flops, step_work
from tokenrec.planner.hlo import Collective, read_program
from tokenrec.planner.memory import (
    listed_buffers,
    padded_state_bytes,
    refused_bytes,
    state_bytes,
    traced_buffers,
)
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.roofline import Roofline, chip, network_seconds
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import check_batch_sizes, compiler_options, with_batch_sharding
from tokenrec.state import ModelSpec, abstract_state, build_model
from tokenrec.step import train_step


def compile_config(
    config: Config,
    topology: str,
    slices: int = 1,
    mesh: MeshConfig | None = None,
    schema: Schema | None = None,
) -> dict[str, Any]:
    """The train step of a config, compiled for a described pod: what a device holds and does, and how fast at most.

    The batch is the config's, over all devices; of several stream lengths, the longest. Nothing is run.

    Args:
      topology: of each slice, "v5p:8x8x8".
      mesh: instead of the config's.
      schema: instead of that of the data set, or of the planned one.

    Returns:
      A JSON value. Bytes are those of one device.

      - `fits`, `devices`, `device_kind`, `topology`, `slices`, `mesh`, `batch`, `stream_tokens`, `schema` (where table
        sizes come from), `parameters` {dense, tables}, `attention` (of each layer), `compile_seconds`;
      - `bytes_per_device` {weights, tables, optimizer, inputs, activations, program, total}: with the padding of their
        layout, which `padding_per_device` tells apart; activations are all that XLA makes on the way, gradients and
        gathered weights among them; inputs are the batch and what aligns the arguments. `memory_per_device`,
        `headroom` (share left over);
      - `flops_per_device`, `model_flops_per_device` (without what is computed again), `bytes_moved_per_device` (from
        and to memory, by `traffic.py`);
      - `collective_bytes` and `collectives` (times) by kind, `collective_bytes_by_axis` {mesh axes: {kind: bytes}};
      - `roofline_seconds` of the slowest of `compute_seconds`, `memory_seconds` and `network_seconds`, `bound` (its
        name), `mfu_bound`, and `mfu_if_serial`, if the three do not overlap;
      - `examples_per_step` (rows that a full stream scores) and, by the bound, `examples_per_second` and
        `tokens_per_second` of the whole pod.

      Of a step that the compiler refuses, `problem` is its reason, what only a program tells is None, activations and
      total are what its words say or None, and weights, tables and optimizer are without padding. Of any step that
      does not fit, `largest` are its largest arrays, by XLA's account or as traced.

    Raises:
      InputError: config, topology, mesh and batch do not go together, or there is no schema.
    """
    config = validate(
        config if mesh is None else dataclasses.replace(config, mesh=mesh)
    )
    schema, origin = resolve_schema(config) if schema is None else (schema, "given")
    schema = schema.without(config.data.exclude)
    over = topology_mesh(topology, config.mesh, slices)
    check_batch_sizes(config, over)
    check_mesh(config.model, over)
    model = build_model(config, schema, task_names(schema, config.data))
    ages = reads_event_ages(config.model)
    shapes = batch_shapes(
        schema, config.data, batch_size=config.data.batch_size, ages=ages
    )[config.data.events]
    with jax.set_mesh(over):
        state = abstract_state(model)
    work, layers = step_work(model, over, shapes)
    of = chip(over.devices.flat[0].device_kind)
    result = {
        "topology": topology,
        "slices": slices,
        "devices": over.size,
        "device_kind": over.devices.flat[0].device_kind,
        "mesh": dict(over.shape),
        "batch": config.data.batch_size,
        "stream_tokens": model.layout(config.data.events).length,
        "examples_per_step": _examples(config, shapes),
        "schema": origin,
        "parameters": {
            "dense": sum(leaf.size for leaf in state.params.values()),
            "tables": sum(
                stack.rows * stack.width for stack in model.embedder.stacks.values()
            ),
        },
        "attention": layers,
        "memory_per_device": int(of.hbm_bytes),
        "model_flops_per_device": work.model_flops / over.size,
    }
    begin = time.perf_counter()
    try:
        compiled = compile_train_step(model, over, shapes)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = _refused(str(error), state_bytes(state))
    else:
        flops = step_flops(model, over, shapes, work)
        found = _measured(
            report(compiled, over, work, flops),
            state_bytes(state),
            padded_state_bytes(state, compiled),
        )
        found |= _speed(found["roofline_seconds"], result)
    total = found["bytes_per_device"]["total"]
    fits = "problem" not in found and total <= of.hbm_bytes
    result |= {
        "fits": fits,
        "headroom": None if total is None else 1 - total / of.hbm_bytes,
    }
    result |= {"compile_seconds": time.perf_counter() - begin} | found
    if not fits:
        result["largest_by"] = "by XLA's account"
    if not fits and not result.get("largest"):
        with jax.set_mesh(over):
            traced = jax.make_jaxpr(train_step, static_argnums=0)(
                model, state, with_batch_sharding(shapes, over)
            )
        result["largest"] = [
            buffer._asdict() for buffer in traced_buffers(traced.jaxpr, state)
        ]
        result["largest_by"] = (
            "of the state and as traced, before XLA fuses or drops any"
        )
    return result


def _examples(config: Config, shapes: Batch) -> int:
    """Rows of a step that carry loss if every stream is full; a continued one does not score its overlap again."""
    streams, read = shapes.weight.shape
    return streams * (read - config.data.overlap)


def _measured(
    found: dict[str, Any], plain: dict[str, int], padded: dict[str, int]
) -> dict[str, Any]:
    parts, roofline = found["bytes"], found["roofline"]
    held = padded | {
        "inputs": parts["arguments"] - sum(padded.values()),
        "activations": parts["temporaries"],
    }
    held |= {"program": parts["total"] - sum(held.values()), "total": parts["total"]}
    return {
        "bytes_per_device": held,
        "padding_per_device": {
            name: padded[name] - size for name, size in plain.items()
        },
        "flops_per_device": found["flops"],
        "bytes_moved_per_device": found["bytes_accessed"],
        "collective_bytes": found["collective_bytes"],
        "collective_bytes_by_axis": found["collective_bytes_by_axis"],
        "collectives": found["collectives"],
        "custom_calls": found["custom_calls"],
        "compute_seconds": roofline.compute_seconds,
        "memory_seconds": roofline.memory_seconds,
        "network_seconds": roofline.network_seconds,
        "roofline_seconds": roofline.bound,
        "bound": roofline.limit,
        "mfu_bound": found["mfu_bound"],
        "mfu_if_serial": found["mfu_bound"] * roofline.bound / roofline.total,
    }


_UNKNOWN = (
    *(
        "flops_per_device",
        "bytes_moved_per_device",
        "collective_bytes",
        "collective_bytes_by_axis",
        "collectives",
        "custom_calls",
    ),
    *(
        "compute_seconds",
        "memory_seconds",
        "network_seconds",
        "roofline_seconds",
        "bound",
    ),
    *(
        "mfu_bound",
        "mfu_if_serial",
        "examples_per_second",
        "tokens_per_second",
        "padding_per_device",
    ),
)


def _refused(message: str, plain: dict[str, int]) -> dict[str, Any]:
    needed = refused_bytes(message)
    return dict.fromkeys(_UNKNOWN) | {
        "problem": message.strip(),
        "bytes_per_device": plain
        | {"inputs": None, "activations": None, "program": None, "total": needed},
        "largest": [buffer._asdict() for buffer in listed_buffers(message)],
    }


def _speed(seconds: float, result: dict[str, Any]) -> dict[str, float]:
    return {
        "examples_per_second": result["examples_per_step"] / seconds,
        "tokens_per_second": result["batch"] * result["stream_tokens"] / seconds,
    }


def compile_train_step(model: ModelSpec, mesh: Mesh, shapes: Batch) -> Compiled:
    """The train step as `train` compiles it; `shapes` are of `data.pipeline.batch_shapes`.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, with XLA's account of it, where the step does not fit.
    """
    with jax.set_mesh(mesh):
        step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = step.lower(
            model, abstract_state(model), with_batch_sharding(shapes, mesh)
        )
        return lowered.compile(compiler_options(mesh))


def report(
    compiled: Compiled, mesh: Mesh, work: Work, flops: float | None = None
) -> dict[str, Any]:
    """Memory, FLOPs, collectives and roofline of a compiled program, per device.

    Args:
      flops: of a device; by default XLA's count, which has a loop body once and nothing inside a custom call, and
        `work`'s for the latter.

    Returns:
      `{"devices", "device_kind", "bytes": {"arguments", "outputs", "aliased", "temporaries", "code", "total"},
      "headroom": share of the memory left over, "flops", "bytes_accessed", "model_flops", "collective_bytes": {kind:
      bytes into a device; "... across slices"}, "collective_bytes_by_axis": {mesh axes: {kind: bytes}},
      "collectives": {kind: times}, "custom_calls", "loops", "roofline":
      Roofline, "mfu_bound"}`.

      `bytes_accessed` are by `traffic.py`, and by `work` of what runs in custom calls.
    """
    devices = list(mesh.devices.flat)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    of = chip(devices[0].device_kind)
    memory: Any = compiled.memory_analysis()
    program = read_program(compiled.as_text() or "", len(devices), slices)
    moved: Counter[str] = Counter()
    times: Counter[str] = Counter()
    by_axis: dict[str, Counter[str]] = {}
    for one in program.collectives:
        name = one.kind + (" across slices" if one.slices > 1 else "")
        moved[name] += int(one.moved)
        times[name] += one.trips
        by_axis.setdefault(mesh_axes(one, mesh), Counter())[one.kind] += int(one.moved)
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = (
        sum(parts.values()) - 2 * parts["aliased"]
    )  # outputs that lie in donated arguments are not there twice
    if flops is None:
        flops = (compiled.cost_analysis() or {}).get(
            "flops", 0.0
        ) + work.kernel_flops / len(devices)
    accessed = program.memory_bytes + work.kernel_bytes / len(devices)
    network = network_seconds(program.collectives, devices, of)
    roofline = Roofline(flops / of.flops, accessed / of.hbm_bandwidth, network)
    return {
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "bytes": parts | {"total": total},
        "headroom": 1 - total / of.hbm_bytes,
        "flops": flops,
        "bytes_accessed": accessed,
        "model_flops": work.model_flops / len(devices),
        "collective_bytes": dict(sorted(moved.items())),
        "collective_bytes_by_axis": {
            axes: dict(sorted(kinds.items())) for axes, kinds in sorted(by_axis.items())
        },
        "collectives": dict(sorted(times.items())),
        "custom_calls": program.custom_calls,
        "loops": list(program.loops),
        "roofline": roofline,
        "mfu_bound": roofline.mfu_bound(work.model_flops / len(devices), of),
    }


def mesh_axes(one: Collective, mesh: Mesh) -> str:
    """The mesh axes that a collective runs along, "data+fsdp": those whose place differs within one of its groups."""
    if one.slices > 1:
        return "data across slices"  # the only axis that leaves a slice
    varied = np.zeros(mesh.devices.ndim, bool)
    for group in one.groups:
        places = np.array(np.unravel_index(np.array(group), mesh.devices.shape))
        varied |= (places != places[:, :1]).any(axis=1)
    return "+".join(np.array(mesh.axis_names)[varied].tolist()) or "none"

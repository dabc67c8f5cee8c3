"""Compile the train step of a config for a TPU topology; no TPU is needed.

libtpu compiles for a described topology on any machine. The result is the program that
the pod would run, so that its memory, FLOPs and collectives are facts. Its times are of
two kinds: lower bounds (`roofline.py`), and what the compiler expects of its own
schedule (`schedule.py`).
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
from jax.sharding import Mesh
from jax.stages import Compiled

from tokenrec.compiler_options import compiler_options, refusals_of
from tokenrec.config import Config, MeshConfig
from tokenrec.config.validate import validate
from tokenrec.data.batch import Batch
from tokenrec.data.schema import Schema
from tokenrec.elastic import fit_axes, with_split
from tokenrec.models.backbones.mesh_check import check_mesh
from tokenrec.planner.compiled_program import program_figures
from tokenrec.planner.flops import Work, step_flops, step_work
from tokenrec.planner.inputs import PlannedInputs, planned_inputs
from tokenrec.planner.kernel_cost import step_kernel_seconds
from tokenrec.planner.memory import (
    listed_buffers,
    padded_state_bytes,
    refused_bytes,
    state_bytes,
    traced_buffers,
)
from tokenrec.planner.planned_schema import resolve_schema
from tokenrec.planner.roofline import chip
from tokenrec.planner.schedule import Schedule
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import check_batch_sizes, split_batch, with_batch_sharding
from tokenrec.state import ModelSpec, abstract_state
from tokenrec.step import train_step


def compile_config(
    config: Config,
    topology: str,
    slices: int = 1,
    mesh: MeshConfig | None = None,
    schema: Schema | None = None,
) -> dict[str, Any]:
    """Compile the train step of a config for a described pod. Nothing is run.

    The batch is the config's, over all devices; of several stream lengths, the longest
    is compiled.

    Args:
      config: a config.
      topology: of each slice, as "v5p:8x8x8".
      slices: number of slices, joined by the data-centre network.
      mesh: mesh to compile for; None is the config's.
      schema: features and table sizes; None is the schema of the data set, or else the
        planned one.

    Returns:
      A JSON value. Bytes and FLOPs are those of one device, times are in seconds.

      - `fits`, `devices`, `device_kind`, `topology`, `slices`, `mesh`, `batch`,
        `stream_tokens`, `schema` (where table sizes come from), `parameters` {dense,
        tables}, `attention` (of each layer), `compile_seconds`;
      - `bytes_per_device` {weights, tables, optimizer, inputs, activations, program,
        total}, with the padding of their layout, which is also in `padding_per_device`.
        Activations are all temporaries of XLA, gradients and gathered weights among
        them; inputs are the batch and what aligns the arguments. `memory_per_device`,
        `headroom` (share left over);
      - `flops_per_device`, `model_flops_per_device` (without recomputation),
        `bytes_moved_per_device` (from and to memory, by `hlo_bytes.py`);
      - `collective_bytes` and `collectives` (times run) by kind,
        `collective_bytes_by_axis` {mesh axes: {kind: bytes}}; `sparse_core_calls`, how
        often a step gives work to the sparse cores, by kind;
      - `compute_seconds`, `memory_seconds`, `network_seconds`; `roofline_seconds`, the
        longest of them; `bound`, its name; `mfu_bound`;
      - `schedule_seconds` and `mfu_by_schedule`, by the walk of `schedule.py`, and
        `schedule` {`work`, `exposed`, `network_hidden`, `costliest`, `unpriced`}, its
        parts;
      - `examples_per_step` (log rows that full streams score) and, by the bound,
        `examples_per_second` and `tokens_per_second` of the whole pod;
        `examples_per_second_by_schedule`.

      For a step that the compiler refuses, `problem` is its reason. Figures that need a
      program are None; activations and total are those of the message, or None; and
      weights, tables and optimizer are without padding. For any step that does not fit,
      `largest` lists its largest arrays, and `largest_by` says from which account.

    Raises:
      InputError: config, topology, mesh and batch do not go together, or there is no
        schema.
    """
    # 1. The config on the mesh of the topology.
    if mesh is not None:
        config = dataclasses.replace(config, mesh=mesh)
    config = validate(config)
    schema, origin = resolve_schema(config) if schema is None else (schema, "given")
    if config.train.elastic != "off":
        devices = topology_mesh(topology, MeshConfig(), slices).size
        config = dataclasses.replace(config, mesh=fit_axes(config, devices))
    pod = topology_mesh(topology, config.mesh, slices)
    split = split_batch(config, pod)
    config = with_split(config, split)
    check_batch_sizes(config, pod)
    check_mesh(config.model, pod)
    # 2. What can be said before compiling.
    inputs = planned_inputs(config, schema, pod, updates=split.updates)
    work, layers = step_work(inputs.model, pod, inputs.batch)
    spec = chip(pod.devices.flat[0].device_kind)
    result = {
        "topology": topology,
        "slices": slices,
        "devices": pod.size,
        "device_kind": pod.devices.flat[0].device_kind,
        "mesh": dict(pod.shape),
        "batch": config.data.batch_size,
        "stream_tokens": inputs.model.layout(config.data.events).length,
        "examples_per_step": _examples(config, inputs.batch),
        "schema": origin,
        "parameters": _parameters(inputs),
        "attention": layers,
        "memory_per_device": int(spec.hbm_bytes),
        "model_flops_per_device": work.model_flops / pod.size,
    }
    # 3. Compile.
    begin = time.perf_counter()
    figures = _compile_figures(inputs, pod, work, layers)
    compile_seconds = time.perf_counter() - begin
    # 4. Does it fit, and how fast is it?
    total = figures["bytes_per_device"]["total"]
    fits = "problem" not in figures and total <= spec.hbm_bytes
    result |= {
        "fits": fits,
        "headroom": None if total is None else 1 - total / spec.hbm_bytes,
        "compile_seconds": compile_seconds,
    }
    result |= figures | _rates(figures, result)
    # 5. Where it does not fit, the arrays to look at.
    if not fits:
        result |= _largest_arrays(result.get("largest"), inputs, pod)
    return result


def compile_train_step(model: ModelSpec, mesh: Mesh, shapes: Batch) -> Compiled:
    """Compile the train step as `train` does.

    Args:
      model: static half of the run.
      mesh: mesh to compile for, which may be described only.
      shapes: the batch as `jax.ShapeDtypeStruct`, of `data.pipeline.batch_shapes`.

    Raises:
      InputError: the compiler refuses an option of `train.compiler_options`.
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, with XLA's account of it, if the
        step does not fit.
    """
    with jax.set_mesh(mesh):
        step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = step.lower(
            model, abstract_state(model), with_batch_sharding(shapes, mesh)
        )
        chosen = model.config.train.compiler_options
        with refusals_of(chosen):
            return lowered.compile(compiler_options(mesh, chosen))


def _compile_figures(
    inputs: PlannedInputs, mesh: Mesh, work: Work, layers: list[dict[str, Any]]
) -> dict[str, Any]:
    """Compile the step, and report the figures of its program or of its refusal."""
    model, state, batch = inputs
    try:
        compiled = compile_train_step(model, mesh, batch)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return _refused(str(error), state_bytes(state))
    flops = step_flops(model, mesh, batch, work)
    kernels = step_kernel_seconds(model, mesh, batch, layers)
    return _measured(
        program_figures(compiled, mesh, work, flops, kernels),
        state_bytes(state),
        padded_state_bytes(state, compiled),
    )


def _parameters(inputs: PlannedInputs) -> dict[str, int]:
    """Numbers in dense weights and in tables."""
    stacks = inputs.model.embedder.stacks.values()
    return {
        "dense": sum(leaf.size for leaf in inputs.state.params.values()),
        "tables": sum(stack.rows * stack.width for stack in stacks),
    }


def _examples(config: Config, shapes: Batch) -> int:
    """Log rows of a step that carry loss if every stream is full.

    A continued stream does not score its overlap again.
    """
    streams, read = shapes.weight.shape
    return streams * (read - config.data.overlap)


def _measured(
    figures: dict[str, Any], unpadded: dict[str, int], padded: dict[str, int]
) -> dict[str, Any]:
    """Rename and split the figures of a compiled program.

    Args:
      figures: of `program_figures`.
      unpadded: bytes of each part of the state.
      padded: the same as the program lays them out.
    """
    parts, roofline = figures["bytes"], figures["roofline"]
    schedule: Schedule = figures["schedule"]
    by_part = padded | {
        "inputs": parts["arguments"] - sum(padded.values()),
        "activations": parts["temporaries"],
    }
    by_part["program"] = parts["total"] - sum(by_part.values())
    by_part["total"] = parts["total"]
    return {
        "bytes_per_device": by_part,
        "padding_per_device": {
            name: padded[name] - size for name, size in unpadded.items()
        },
        "flops_per_device": figures["flops"],
        "bytes_moved_per_device": figures["bytes_accessed"],
        "collective_bytes": figures["collective_bytes"],
        "collective_bytes_by_axis": figures["collective_bytes_by_axis"],
        "collectives": figures["collectives"],
        "custom_calls": figures["custom_calls"],
        "sparse_core_calls": figures["sparse_core_calls"],
        "compute_seconds": roofline.compute_seconds,
        "memory_seconds": roofline.memory_seconds,
        "network_seconds": roofline.network_seconds,
        "roofline_seconds": roofline.bound,
        "bound": roofline.limit,
        "mfu_bound": figures["mfu_bound"],
        "schedule_seconds": schedule.seconds,
        "mfu_by_schedule": figures["mfu_by_schedule"],
        "schedule": {
            "work": schedule.work,
            "exposed": schedule.exposed,
            "network_hidden": schedule.network_hidden,
            "costliest": [dataclasses.asdict(each) for each in schedule.costliest],
            "unpriced": list(schedule.unpriced),
        },
    }


# Figures that only a program has.
_OF_PROGRAM = (
    "flops_per_device",
    "bytes_moved_per_device",
    "collective_bytes",
    "collective_bytes_by_axis",
    "collectives",
    "custom_calls",
    "sparse_core_calls",
    "compute_seconds",
    "memory_seconds",
    "network_seconds",
    "roofline_seconds",
    "bound",
    "mfu_bound",
    "schedule_seconds",
    "mfu_by_schedule",
    "schedule",
    "padding_per_device",
)


def _refused(message: str, unpadded: dict[str, int]) -> dict[str, Any]:
    """Figures of a step that the compiler refuses, from its message."""
    by_part: dict[str, int | None] = {
        **unpadded,
        "inputs": None,
        "activations": None,
        "program": None,
        "total": refused_bytes(message),
    }
    return dict.fromkeys(_OF_PROGRAM) | {
        "problem": message.strip(),
        "bytes_per_device": by_part,
        "largest": [buffer._asdict() for buffer in listed_buffers(message)],
    }


def _rates(figures: dict[str, Any], result: dict[str, Any]) -> dict[str, float | None]:
    """Examples and tokens per second of the whole pod; None without a program."""
    examples = result["examples_per_step"]
    tokens = result["batch"] * result["stream_tokens"]
    rates = {
        "examples_per_second": (examples, figures["roofline_seconds"]),
        "tokens_per_second": (tokens, figures["roofline_seconds"]),
        "examples_per_second_by_schedule": (examples, figures["schedule_seconds"]),
    }
    return {
        name: None if seconds is None else count / seconds
        for name, (count, seconds) in rates.items()
    }


def _largest_arrays(
    listed: list[dict[str, Any]] | None, inputs: PlannedInputs, mesh: Mesh
) -> dict[str, Any]:
    """The largest arrays by XLA's account, or as traced where it lists none."""
    if listed:
        return {"largest": listed, "largest_by": "by XLA's account"}
    with jax.set_mesh(mesh):
        traced = jax.make_jaxpr(train_step, static_argnums=0)(
            inputs.model, inputs.state, with_batch_sharding(inputs.batch, mesh)
        )
    buffers = traced_buffers(traced.jaxpr, inputs.state)
    return {
        "largest": [buffer._asdict() for buffer in buffers],
        "largest_by": "of the state and as traced, before XLA fuses or drops any",
    }

"""Describe a config on a data set: parameters, token layout, windows and FLOPs.

Nothing is trained, compiled or allocated.
"""

from __future__ import annotations

import dataclasses
import math
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, MeshConfig
from tokenrec.config.validate import validate
from tokenrec.data.schema import Schema
from tokenrec.planner.flops import step_work
from tokenrec.planner.inputs import PlannedInputs, planned_inputs
from tokenrec.sharding import batch_shards, make_mesh
from tokenrec.tokens.history import compression_plan
from tokenrec.tokens.layout import ROLES, Layout


def describe(config: Config, schema: Schema) -> dict[str, Any]:
    """Compute the figures of a config on a data set.

    Args:
      config: a config.
      schema: all features of the data set, with table sizes.

    Returns:
      A JSON value:

      - "parameters" {"dense", "tables", "by_part", "by_table", "spread"}: numbers of
        dense weights and of tables, and the tables that are sharded over all devices;
      - "objective", "paradigm", "tasks";
      - "training" {"steps", "epochs"}: null where the config has none. The steps of
        epochs follow from a prepared data set (`planned_schema.resolve_steps`);
      - "tokens" of the longest stream, "layout": runs of its token groups;
      - "history" {"events", "tokens", "how"};
      - "layers": [{"layer", "window", "queries", "keys", "implementation", "refused"}],
        tokens that each layer computes and sees, and the attention that runs on this
        machine at the config's batch size, with the reasons against those that the
        platform prefers;
      - "flops_per_example": FLOPs of the matrix products of a forward pass over one
        sample at the longest stream length, attention over visible pairs only.

    Raises:
      InputError: the config is invalid, or does not fit the schema.
    """
    config = validate(config)
    mesh = _mesh(config.mesh)
    # The config's batch, rounded to what the devices at hand can share.
    shards = batch_shards(mesh)
    samples = max(config.data.batch_size // shards, 1) * shards
    inputs = planned_inputs(config, schema, mesh, batch_size=samples)
    model = inputs.model
    layout = model.layout(config.data.events)
    work, layers = step_work(model, mesh, inputs.batch)
    return {
        "parameters": _parameters(inputs),
        "objective": config.data.objective,
        "paradigm": config.data.paradigm,
        "tasks": list(model.tasks),
        "training": {
            "steps": config.optim.steps or None,
            "epochs": config.optim.epochs or None,
        },
        "tokens": layout.length,
        "layout": _runs(layout),
        "history": _history(config, model.schema, layout),
        "layers": [{"layer": number} | layer for number, layer in enumerate(layers)],
        "flops_per_example": work.forward_flops / samples,
    }


def _mesh(config: MeshConfig) -> Mesh:
    """The config's mesh, or one device if it needs more than there are.

    The attention of each layer is that of this mesh and platform; other figures do not
    depend on it.
    """
    devices = jax.devices()
    sizes = dataclasses.astuple(config)
    if math.prod(max(size, 1) for size in sizes) <= len(devices):
        return make_mesh(config)
    return make_mesh(MeshConfig(), devices[:1])


def _parameters(inputs: PlannedInputs) -> dict[str, Any]:
    """Numbers of dense weights and of tables, in all and by name."""
    params, tables = inputs.state.params, inputs.model.schema.tables
    stacks = list(inputs.model.embedder.stacks.values())
    widths = {table: stack.width for stack in stacks for table in stack.offsets}
    spread = [table for stack in stacks if stack.spread for table in stack.offsets]
    return {
        "dense": sum(leaf.size for leaf in params.values()),
        "tables": sum(stack.rows * stack.width for stack in stacks),
        "by_part": _by_part(params),
        # A table that the backbone reads with word vectors of its own has none here.
        "by_table": {name: tables[name] * widths[name] for name in sorted(widths)},
        "spread": sorted(spread),
    }


def _history(config: Config, schema: Schema, layout: Layout) -> dict[str, Any]:
    """Events in, tokens out, and how the ones become the others."""
    tokens, events = config.tokens, config.data.events
    count = len(layout.positions_of("state", "action", "event"))
    if "history" in tokens.text:
        uncut = events * layout.stride
        how = f"text, {layout.stride} tokens an event"
        how += f", cut from {uncut}" if count < uncut else ""
    elif tokens.compression == "none":
        how = "a state and an action token an event"
        if tokens.fused:
            how = "one token an event"
        how += f", cut from {events}" if count < events else ""
    else:
        plan = compression_plan(config)
        by = f"attention pooling in groups of {plan.group}"
        if plan.kind == "mlp":
            by = "an MLP over time"
        how = (
            f"{plan.older} older events into {count - plan.recent} by {by}, "
            f"the newest {plan.recent} kept"
        )
    return {"events": events, "tokens": count, "how": how}


def _by_part(params: dict[str, Any]) -> dict[str, int]:
    """Sizes by maker, layer and head."""
    sizes: dict[str, int] = {}
    for name, leaf in params.items():
        parts = name.split("/")
        # "backbone/blocks/0" for a layer, or else the first part alone.
        part = "/".join(parts[: 3 if parts[:2] == ["backbone", "blocks"] else 1])
        sizes[part] = sizes.get(part, 0) + int(np.prod(leaf.shape))
    return dict(sorted(sizes.items()))


def _runs(layout: Layout) -> list[dict[str, Any]]:
    """The stream as runs of repeated token groups.

    Interleaved events are one group "state action".
    """
    names = [ROLES[role] for role in layout.roles]
    groups, position = [], 0
    while position < len(names):
        length = 2 if names[position] == "state" else 1
        groups.append(" ".join(names[position : position + length]))
        position += length
    return [
        {"tokens": name, "repeats": len(list(run))} for name, run in groupby(groups)
    ]


def to_text(description: dict[str, Any]) -> str:
    """Write the figures of `describe` as text, for `tokenrec describe`."""
    tasks = ", ".join(description["tasks"])
    head = f"{description['paradigm'].upper()}, {description['objective']}"
    lines = [
        head + (f", tasks {tasks}" if tasks else ""),
        "",
        *_parameter_lines(description["parameters"]),
        "",
        *_stream_lines(description),
        "",
        *_layer_lines(description["layers"]),
        "",
        _training_line(description["training"]),
        f"forward     {description['flops_per_example'] / 1e6:,.2f} MFLOP per sample",
    ]
    return "\n".join(lines)


def _training_line(training: dict[str, Any]) -> str:
    steps, epochs = training["steps"], training["epochs"]
    if epochs is None:
        return f"training    {steps:,} steps"
    if steps is None:
        return f"training    {epochs:g} epochs; a prepared data set gives the steps"
    return f"training    {steps:,} steps, which are {epochs:g} epochs"


def _parameter_lines(parameters: dict[str, Any]) -> list[str]:
    lines = [
        f"parameters  {parameters['dense']:>14,} dense   "
        f"{parameters['tables']:>14,} in tables"
    ]
    for name, size in parameters["by_part"].items():
        lines.append(f"  {name:<22}{size:>12,}")
    lines.append("tables")
    for name, size in parameters["by_table"].items():
        suffix = "   sharded over all devices" if name in parameters["spread"] else ""
        lines.append(f"  {name:<22}{size:>12,}{suffix}")
    return lines


def _stream_lines(description: dict[str, Any]) -> list[str]:
    groups = []
    for run in description["layout"]:
        name, repeats = run["tokens"], run["repeats"]
        groups.append(name if repeats == 1 else f"{name} x {repeats}")
    history = description["history"]
    return [
        f"stream      {description['tokens']} tokens",
        f"  {' '.join(groups)}",
        f"history     {history['events']} events in, {history['tokens']} tokens out: "
        f"{history['how']}",
    ]


def _layer_lines(layers: list[dict[str, Any]]) -> list[str]:
    lines = ["layer  window                   queries       keys  attention"]
    for layer in layers:
        window = "full"
        if layer["window"] is not None:
            window = f"{layer['window']} tokens, self included"
        lines.append(
            f"{layer['layer']:>5}  {window:<23}{layer['queries']:>9}"
            f"{layer['keys']:>11}  {layer['implementation']}"
        )
    # The same reason is given once, whatever number of layers it holds for.
    refused = [
        f"  not {name}: {reason}"
        for layer in layers
        for name, reason in layer["refused"].items()
    ]
    return [*lines, *dict.fromkeys(refused)]

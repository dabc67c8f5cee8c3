"""What a config makes of a data set: parameters, token layout, windows, needed rows, FLOPs. Nothing is trained."""

from __future__ import annotations

import math
from itertools import groupby
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from tokenrec.config import Config, MeshConfig
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.validate import validate
from tokenrec.data.pipeline import batch_shapes, task_names
from tokenrec.data.schema import Schema
from tokenrec.planner.flops import STEP_OVER_FORWARD, step_work
from tokenrec.sharding import batch_shards, make_mesh
from tokenrec.state import abstract_state, build_model
from tokenrec.tokens.history import compression_plan
from tokenrec.tokens.layout import ROLES, Layout


def describe(config: Config, schema: Schema) -> dict[str, Any]:
    """Figures of a config on a data set with this schema.

    Returns:
      `{"parameters": {"dense", "tables", "by_part", "by_table", "spread"}, "tokens", "layout", "history": {"events",
      "tokens", "how"}, "layers": [{"layer", "window", "queries", "keys", "implementation", "refused"}],
      "flops_per_example"}`. `implementation` is what attention
      runs on this machine at the config's batch size, and `refused` why it is none that the platform prefers. FLOPs are
      those of the matrix products of a forward pass over one sample at the longest stream length, attention over the
      pairs that see each other alone.
    """
    config = validate(config)
    schema = schema.without(config.data.exclude)
    model = build_model(config, schema, task_names(schema, config.data))
    layout = model.layout(config.data.events)
    mesh = _mesh(config.mesh)
    with jax.set_mesh(mesh):
        state = abstract_state(model)
    shards = batch_shards(mesh)
    samples = max(config.data.batch_size // shards, 1) * shards
    shapes = batch_shapes(
        schema, config.data, batch_size=samples, ages=reads_event_ages(config.model)
    )[config.data.events]
    work, layers = step_work(model, mesh, shapes)
    widths = {
        table: stack.width
        for stack in model.embedder.stacks.values()
        for table in stack.offsets
    }
    return {
        "parameters": {
            "dense": sum(leaf.size for leaf in state.params.values()),
            "tables": sum(
                stack.rows * stack.width for stack in model.embedder.stacks.values()
            ),
            "by_part": _by_part(state.params),
            "by_table": {
                t: schema.tables[t] * widths[t] for t in sorted(schema.tables)
            },
            "spread": sorted(
                t
                for stack in model.embedder.stacks.values()
                if stack.spread
                for t in stack.offsets
            ),
        },
        "objective": config.data.objective,
        "paradigm": config.data.paradigm,
        "tasks": list(model.tasks),
        "tokens": layout.length,
        "layout": _runs(layout),
        "history": _history(config, model.schema, layout),
        "layers": [{"layer": number} | layer for number, layer in enumerate(layers)],
        "flops_per_example": work.model_flops / STEP_OVER_FORWARD / samples,
    }


def _mesh(config: MeshConfig) -> Mesh:
    """The config's mesh, or one device where it is made for more than there are: no figure depends on it."""
    devices = jax.devices()
    fits = math.prod(
        max(size, 1) for size in (config.data, config.fsdp, config.tensor)
    ) <= len(devices)
    return make_mesh(config) if fits else make_mesh(MeshConfig(), devices[:1])


def to_text(description: dict[str, Any]) -> str:
    """`describe`, for a person."""
    parameters = description["parameters"]
    drawn = " ".join(
        name if count == 1 else f"{name} x {count}"
        for name, count in (
            (run["tokens"], run["repeats"]) for run in description["layout"]
        )
    )
    lines = [
        f"{description['paradigm'].upper()}, {description['objective']}"
        + (
            f", tasks {', '.join(description['tasks'])}" if description["tasks"] else ""
        ),
        "",
        f"parameters  {parameters['dense']:>14,} dense   {parameters['tables']:>14,} in tables",
        *(f"  {name:<22}{size:>12,}" for name, size in parameters["by_part"].items()),
        "tables",
        *(
            f"  {name:<22}{size:>12,}"
            + "   spread over all devices" * (name in parameters["spread"])
            for name, size in parameters["by_table"].items()
        ),
        "",
        f"stream      {description['tokens']} tokens",
        f"  {drawn}",
        "history     {events} events in, {tokens} tokens out: {how}".format(
            **description["history"]
        ),
        "",
        "layer  sees                     rows computed  rows seen  attention",
    ]
    for layer in description["layers"]:
        sees = (
            "everything before"
            if layer["window"] is None
            else f"{layer['window']} rows, itself included"
        )
        rows = f"{layer['queries']:>15}{layer['keys']:>11}"
        lines.append(
            f"{layer['layer']:>5}  {sees:<23}{rows}  {layer['implementation']}"
        )
    refused = [
        f"  not {name}: {why}"
        for layer in description["layers"]
        for name, why in layer["refused"].items()
    ]
    lines += dict.fromkeys(refused)
    lines += [
        "",
        f"forward     {description['flops_per_example'] / 1e6:,.2f} MFLOP per sample",
    ]
    return "\n".join(lines)


def _history(config: Config, schema: Schema, layout: Layout) -> dict[str, Any]:
    """Events in, tokens out, and how the ones become the others."""
    rows = len(layout.positions_of("state", "action", "event"))
    if "history" in config.tokens.text:
        whole = config.data.events * layout.stride
        how = f"text, {layout.stride} tokens an event" + (
            f", cut from {whole}" if rows < whole else ""
        )
    elif config.tokens.compression == "none":
        how = (
            "one token an event"
            if config.tokens.fused
            else "a state and an action token an event"
        )
        if rows < config.data.events:
            how += f", cut from {config.data.events}"
    else:
        plan = compression_plan(config)
        by = (
            "an MLP over time"
            if plan.kind == "mlp"
            else f"attention pooling in groups of {plan.group}"
        )
        how = f"{plan.older} older events into {rows - plan.recent} by {by}, the newest {plan.recent} kept"
    return {"events": config.data.events, "tokens": rows, "how": how}


def _by_part(params: dict[str, Any]) -> dict[str, int]:
    """Sizes by maker, layer and head."""
    sizes: dict[str, int] = {}
    for name, leaf in params.items():
        parts = name.split("/")
        part = "/".join(parts[: 3 if parts[:2] == ["backbone", "blocks"] else 1])
        sizes[part] = sizes.get(part, 0) + int(np.prod(leaf.shape))
    return dict(sorted(sizes.items()))


def _runs(layout: Layout) -> list[dict[str, Any]]:
    """The stream as runs of repeated token groups: interleaved events are one group `state action`."""
    names = [ROLES[role] for role in layout.roles]
    groups, at = [], 0
    while at < len(names):
        step = 2 if names[at] == "state" else 1
        groups.append(" ".join(names[at : at + step]))
        at += step
    return [
        {"tokens": name, "repeats": len(list(run))} for name, run in groupby(groups)
    ]

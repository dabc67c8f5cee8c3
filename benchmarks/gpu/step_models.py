"""The models of the stage `steps`, and how their PyTorch peers are run.

| case | config | stream |
|---|---|---|
| `lrm_1b` | `configs/lrm_1b.py` as shipped, 8 streams: 1.27e9 dense weights | 2,048 tokens |
| `uc_2048` | widths, windows and features of `configs/kuairand_27k.py`, 1,020 events | 2,048 tokens |
| `nio` | NIO of `benchmarks/step.py`, float32, 256 samples | 79 tokens |
| `nio_4096` | the same, 4,096 samples | 79 tokens |

State is float32, and the tables of KuaiRand-27K, 56 million rows of width 16, are
whole. Compiled for one TPU v5p, which has 95 GiB, a step of `lrm_1b` takes 49.5 GiB (18
for weights, tables and optimizer, 32 for gradients and activations) and one of
`uc_2048` 12.8 GiB.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from benchmarks.peers.step import CASE as NIO
from benchmarks.step_cases import stream_cases, stream_schema, with_model
from tokenrec.config import Config, MeshConfig
from tokenrec.config.load import load_config, shipped_folder
from tokenrec.config.validate import validate
from tokenrec.data.schema import Schema
from tokenrec.planner.planned_schema import read_planned
from tokenrec.state import ModelSpec, build_model

CASES = ("lrm_1b", "uc_2048", "nio", "nio_4096")
# What a rehearsal changes.
TINY_MODEL = {"width": 32, "heads": 2, "layers": 3, "scan": 3, "ffn_width": 48}
TINY_EVENTS, TINY_BATCH, TINY_ROWS = 24, 2, 50


class PeerOptions(NamedTuple):
    """How the PyTorch peer of a case is run on a GPU.

    Attributes:
      attention: "sdpa" or "flex", for masks other than the causal one.
      how: what `torch.compile` compiles: "blocks" or "model".
    """

    attention: str
    how: str


class StepCase(NamedTuple):
    """A model and its batch.

    Attributes:
      config: a validated config; `data.batch_size` is the batch.
      schema: its features, with the tasks that it learns.
      peer: options of the PyTorch peer.
    """

    config: Config
    schema: Schema
    peer: PeerOptions

    @property
    def model(self) -> ModelSpec:
        """The static half of the model."""
        tasks = tuple(task.name for task in self.schema.tasks)
        return build_model(self.config, self.schema, tasks)


def step_case(name: str, *, rehearse: bool) -> StepCase:
    """Make a case of `CASES`; a rehearsal is tiny."""
    if name in ("nio", "nio_4096"):
        config, schema = stream_cases()[NIO], stream_schema()
        batch = 256 if name == "nio" else 4096
        return _case(config, schema, batch, None, "sdpa", "model", rehearse)
    shipped, events, batch = {
        "lrm_1b": ("lrm_1b", None, 8),
        "uc_2048": ("kuairand_27k", 1020, 32),
    }[name]
    config = load_config(shipped)
    planned = read_planned(shipped_folder() / "schemas" / config.data.schema)
    schema = planned.without(config.data.exclude)
    tasks = tuple(task for task in schema.tasks if task.name in config.data.tasks)
    schema = dataclasses.replace(schema, tasks=tasks)
    return _case(config, schema, batch, events, "flex", "blocks", rehearse)


def _case(
    config: Config,
    schema: Schema,
    batch: int,
    events: int | None,
    attention: str,
    how: str,
    rehearse: bool,
) -> StepCase:
    data: dict[str, Any] = {"batch_size": batch, "eval_batch_size": batch}
    if events:
        data["events"] = events
    if rehearse:
        data = {
            "batch_size": TINY_BATCH,
            "eval_batch_size": TINY_BATCH,
            "events": TINY_EVENTS,
            "overlap": min(config.data.overlap, TINY_EVENTS // 2),
        }
        windows = (16, 8) if config.model.windows else ()
        # Three full layers are a loop over stacked weights, as in `lrm_1b`.
        config = with_model(config, **TINY_MODEL, windows=windows)
        tables = {name: min(rows, TINY_ROWS) for name, rows in schema.tables.items()}
        schema = dataclasses.replace(schema, tables=tables)
        # flex_attention has no backward pass on a CPU; one case rehearses compilation.
        attention, how = "sdpa", how if how == "blocks" and windows else "none"
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **data),
        mesh=MeshConfig(1, 1, 1),
    )
    return StepCase(validate(config), schema, PeerOptions(attention, how))

"""Signal probe: how much of each signal can be recovered from an event's soft token.

    python -m benchmarks.signal_probe --run RUN [--data DIR]

`RUN` is a run of `benchmarks/soft_tokens.py`, or any other whose events are one soft
token each. Probes are trained on the tokens of the newest event of requests of a split,
and of two controls of the same width (docs/methods.md section 5, "Signal probe"):

    soft         the trained maker
    random map   a fixed random map of the trained feature transforms
    untrained    the maker as it was before training, tables included

Events that agree in all signals count once: probes are judged on events that they did
not learn from."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.report import run_script, write_result
from tokenrec.analysis.probe_inputs import Signal, entity_signals, random_tokens
from tokenrec.analysis.signal_probe import probe_signals
from tokenrec.checkpoint.run_folder import load_run_config, open_run
from tokenrec.config.backbones import reads_event_ages
from tokenrec.data.batch import Batch
from tokenrec.data.pipeline import eval_batches
from tokenrec.errors import InputError
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import ModelSpec, TrainState, bind_params, init_state
from tokenrec.tokens.history import merge_entities
from tokenrec.tokens.makers import Maker


class Events(NamedTuple):
    """The distinct events that are probed, n of them.

    Attributes:
      tokens: `[n, N, d]`, soft tokens of the trained maker.
      fresh: `[n, N, d]`, soft tokens of the untrained maker.
      transforms: `[n, e]`, feature transforms of the trained maker.
      signals: signal name -> its values.
      step: training steps of the run.
    """

    tokens: np.ndarray
    fresh: np.ndarray
    transforms: np.ndarray
    signals: dict[str, Signal]
    step: int


def newest_tokens(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Make the tokens of the newest event of each stream.

    Args:
      model: a model whose events are one soft token each.
      state: its weights.
      batch: a batch of B streams.

    Returns:
      `[B, N, d]`, the tokens, and `[B, e]`, the transforms that they are made of.
    """
    newest = batch._replace(
        state=jax.tree.map(lambda x: x[:, -1:], batch.state),
        action=jax.tree.map(lambda x: x[:, -1:], batch.action),
    )
    entities = model.embedder.look_up(state.tables, newest)
    maker = bind_params(model, state.params).history.event
    assert isinstance(maker, Maker)
    values, ids = merge_entities(entities["state"], entities["action"])
    tokens = maker(values, ids, jax.numpy.dtype(model.config.model.dtype))
    transforms = jax.numpy.concatenate(maker.transforms(values, ids), axis=-1)
    return tokens[:, 0], transforms[:, 0]


def read_events(workdir: Path, data: Path | None, split: str, requests: int) -> Events:
    """Read the newest events of requests that are spread evenly over a split.

    Args:
      workdir: folder of the run.
      data: folder of the data set, if it is not where the run read it.
      split: name of the split.
      requests: number of requests.

    Returns:
      The distinct events.

    Raises:
      InputError: there is no run, or its events are not soft tokens of one maker.
    """
    config = load_run_config(workdir, data)
    if not config.tokens.fused or "history" in config.tokens.text:
        raise InputError(
            f"workdir '{workdir}': its events are not one soft token each; give a run "
            "with fused events"
        )
    if (
        config.data.objective == "retrieval"
        and config.head.retrieval == "next_item"
        and config.head.tied
    ):
        raise InputError(
            f"workdir '{workdir}': item vectors are added to its events (head.tied); "
            "give one without"
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = open_run(workdir, "latest", data)
        step = jax.jit(functools.partial(newest_tokens, run.model))
        fresh = init_state(run.model, config.seed)
        parts: list[tuple[np.ndarray, ...]] = []
        # One stream length, so that the step compiles once.
        data_config = dataclasses.replace(config.data, buckets=())
        ages = reads_event_ages(config.model)
        for host, _ in eval_batches(
            run.dataset, data_config, split, limit=requests, ages=ages
        ):
            batch = to_devices(host.batch, mesh)
            tokens, transforms = jax.device_get(step(run.state, batch))
            untrained, _ = jax.device_get(step(fresh, batch))
            state, action = host.batch.state, host.batch.action
            columns = (state.ids, state.dense, action.ids, action.dense)
            real = host.batch.valid[:, -1]
            parts.append(
                tuple(
                    part[real]
                    for part in (
                        tokens,
                        untrained,
                        transforms,
                        *(x[:, -1] for x in columns),
                    )
                )
            )
    tokens, untrained, transforms, *signals_of = (
        np.concatenate(part) for part in zip(*parts, strict=True)
    )
    # Events that agree in every column are one; NaN (missing) equals itself here.
    alike = np.concatenate([column.astype(np.float64) for column in signals_of], axis=1)
    first = np.sort(
        np.unique(np.nan_to_num(alike, nan=-1e300), axis=0, return_index=True)[1]
    )
    schema = run.model.schema
    state_ids, state_dense, action_ids, action_dense = (
        column[first] for column in signals_of
    )
    signals = entity_signals(schema.state, state_ids, state_dense)
    signals |= entity_signals(schema.group("action"), action_ids, action_dense)
    return Events(tokens[first], untrained[first], transforms[first], signals, run.step)


def probe_rows(events: Events, seed: int) -> list[dict[str, Any]]:
    """Probe each kind of token for each signal, with a linear probe and an MLP.

    Args:
      events: the events.
      seed: seed of the halves, the probes and the random map.

    Returns:
      A line of the result table for each signal.
    """
    count, width = events.tokens.shape[1:]
    kinds = {
        "soft": events.tokens,
        "random map": random_tokens(events.transforms, count, width, seed=seed),
        "untrained": events.fresh,
    }
    scores = {
        kind: probe_signals(tokens, events.signals, seed=seed)
        for kind, tokens in kinds.items()
    }
    rows = []
    for name, signal in events.signals.items():
        limit = scores["soft"][name]["limit"]
        row: dict[str, Any] = {
            "signal": name,
            "unit": "R2" if signal.kind == "dense" else "nats",
            "limit": limit,
        }
        for kind, probed in scores.items():
            row |= {
                f"{kind}, {probe}": _defined(probed[name][probe])
                for probe in ("linear", "mlp")
            }
        rows.append(row | {"held-out events": int(scores["soft"][name]["rows"])})
    return rows


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else value


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--run", type=Path, required=True, help="folder of a trained run"
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="prepared data set, if it is not where the run read it",
    )
    parser.add_argument("--split", default="valid")
    parser.add_argument(
        "--requests",
        type=int,
        default=8_192,
        help="number of requests whose newest events are probed",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the halves, the probes and the controls",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "signal_probe"
    )
    flags = parser.parse_args(argv)
    if flags.requests < 1:
        raise InputError(f"--requests {flags.requests} must be at least 1")
    events = read_events(flags.run, flags.data, flags.split, flags.requests)
    params = {
        "split": flags.split,
        "events": len(events.tokens),
        "steps": events.step,
        "token": f"{events.tokens.shape[1]} x {events.tokens.shape[2]}",
        "transforms": f"{events.transforms.shape[1]} numbers",
        "seed": flags.seed,
    }
    command = (
        f"python -m benchmarks.signal_probe --run RUN --split {flags.split} "
        f"--requests {flags.requests}"
    )
    title = "What probes recover of each signal from the token of an event"
    write_result(
        flags.out,
        probe_rows(events, flags.seed),
        params,
        f"{command} --seed {flags.seed}",
        title=title,
    )
    page = flags.out.with_name(flags.out.name + ".md")
    with page.open("a") as file:
        file.write(
            "\nA number is judged by R2, a category by the cross-entropy gained over its "
            "marginal, in nats, of which `limit` is the most. Probes are judged on "
            "events that they did not learn from. `random map` is a fixed random map of "
            "the trained transforms, `untrained` the maker as it was before training.\n"
        )
    print(page.read_text())


if __name__ == "__main__":
    run_script(main)

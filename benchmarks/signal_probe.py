"""How much of each signal of an event survives in its soft token: probes of a trained run, and of two controls.

    python -m benchmarks.signal_probe --run RUN [--data DIR]

`RUN` is a folder of `benchmarks/soft_tokens.py`, or any run whose events are one soft token each. An entity is the
newest event of a request of the split; events that are alike in all signals count once, as the probes are judged on
other events than they learn from. The controls have the same width: a fixed random map of the trained transforms, and
the maker of the run as it was before training, tables included.
"""

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
from tokenrec.tokens.history import merged
from tokenrec.tokens.makers import Maker


class Events(NamedTuple):
    """Distinct events, n of them: `tokens, fresh: [n, N, d]` of the trained and the untrained maker, `transforms:
    [n, e]` of the trained one, and the signals behind them.
    """

    tokens: np.ndarray
    fresh: np.ndarray
    transforms: np.ndarray
    signals: dict[str, Signal]
    step: int


def newest_tokens(
    model: ModelSpec, state: TrainState, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """Of the newest event of every stream: `[B, N, d]` tokens, and `[B, e]`, the transforms that they are made of."""
    newest = batch._replace(
        state=jax.tree.map(lambda x: x[:, -1:], batch.state),
        action=jax.tree.map(lambda x: x[:, -1:], batch.action),
    )
    entities = model.embedder.look_up(state.tables, newest)
    maker = bind_params(model, state.params).history.event
    assert isinstance(maker, Maker)
    values, ids = merged(entities["state"], entities["action"])
    made = maker(values, ids, jax.numpy.dtype(model.config.model.dtype))
    return made[:, 0], jax.numpy.concatenate(maker.transforms(values, ids), axis=-1)[
        :, 0
    ]


def read_events(workdir: Path, data: Path | None, split: str, requests: int) -> Events:
    """Newest events of requests that are spread evenly over a split.

    Raises:
      InputError: no run there, or its events are not soft tokens of one maker.
    """
    config = load_run_config(workdir, data)
    if not config.tokens.fused or "history" in config.tokens.text:
        raise InputError(
            f"workdir '{workdir}': its events are not one soft token each; give a run with fused events"
        )
    if (
        config.data.objective == "retrieval"
        and config.head.retrieval == "next_item"
        and config.head.tied
    ):
        raise InputError(
            f"workdir '{workdir}': item vectors are added to its events (head.tied); give one without"
        )
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        run = open_run(workdir, "latest", data)
        step = jax.jit(functools.partial(newest_tokens, run.model))
        fresh = init_state(run.model, config.seed)
        found: list[tuple[np.ndarray, ...]] = []
        data_config, times = (
            dataclasses.replace(config.data, buckets=()),
            reads_event_ages(config.model),
        )
        for host, _ in eval_batches(
            run.dataset, data_config, split, limit=requests, ages=times
        ):
            batch = to_devices(host.batch, mesh)
            tokens, transforms = jax.device_get(step(run.state, batch))
            untrained, _ = jax.device_get(step(fresh, batch))
            state, action = host.batch.state, host.batch.action
            columns = (state.ids, state.dense, action.ids, action.dense)
            real = host.batch.valid[:, -1]
            found.append(
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
        np.concatenate(part) for part in zip(*found, strict=True)
    )
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
    """A row per signal: what a linear probe and an MLP find in each kind of token."""
    count, width = events.tokens.shape[1:]
    kinds = {
        "soft": events.tokens,
        "random map": random_tokens(events.transforms, count, width, seed=seed),
        "untrained": events.fresh,
    }
    found = {
        kind: probe_signals(tokens, events.signals, seed=seed)
        for kind, tokens in kinds.items()
    }
    rows = []
    for name, signal in events.signals.items():
        limit = found["soft"][name]["limit"]
        row: dict[str, Any] = {
            "signal": name,
            "unit": "R2" if signal.kind == "dense" else "nats",
            "limit": limit,
        }
        for kind, probed in found.items():
            row |= {
                f"{kind}, {probe}": _defined(probed[name][probe])
                for probe in ("linear", "mlp")
            }
        rows.append(row | {"held-out events": int(found["soft"][name]["rows"])})
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
        help="prepared data set, if it is not where the run reads it",
    )
    parser.add_argument("--split", default="valid")
    parser.add_argument(
        "--requests", type=int, default=8_192, help="whose newest events are probed"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the halves, the probes and the controls"
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
    command = f"python -m benchmarks.signal_probe --run RUN --split {flags.split} --requests {flags.requests}"
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
            "\nA number is judged by R2, a category by the cross-entropy gained over its marginal, in nats, of which "
            "`limit` is the most. Probes are judged on events that they did not learn from. `random map` is a fixed "
            "random map of the trained transforms, `untrained` the maker as it was before training.\n"
        )
    print(page.read_text())


if __name__ == "__main__":
    run_script(main)

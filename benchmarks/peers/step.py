"""The NIO step of `benchmarks.step` on a CPU, beside the same models in PyTorch.

    pip install -c constraints.txt ".[peers]"
    python -m benchmarks.peers.step

The peers, each plain and compiled by `torch.compile` (which needs g++ or clang++):

- TokenFormer that computes the needed tokens alone, as ours does;
- TokenFormer that computes every token in every layer, as usual;
- DIN, of the sizes of our `model.kind="din"`.

They are written for this benchmark, with as many parameters as ours. Before the clock
runs, our weights are copied into each, and its probabilities must equal ours. All are
float32, have the same number of threads and take turns; every turn has another batch.
A peer's train step is forward, backward, clipping, fused AdamW, and Adagrad with dense
gradients for the tables, which are short here. `this / ours` is the median of the
ratios of the rates inside a turn: below 1, ours is faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import shutil
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.peers.attention import PAUSE, use_threads
from benchmarks.report import PACKAGES, run_script, write_result
from benchmarks.step_cases import (
    POOL,
    random_batch,
    step_runs,
    stream_cases,
    stream_schema,
    with_model,
)
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.config import Config, MeshConfig
from tokenrec.config.validate import validate
from tokenrec.data.schema import Schema
from tokenrec.errors import InputError
from tokenrec.evaluation.evaluate import jit_eval_step
from tokenrec.sharding import make_mesh, to_devices
from tokenrec.state import build_model, init_state

CASE = "NIO, 2 full + 2 sliding"
OURS = "tokenrec TokenFormer"
# Largest difference between probabilities of two libraries. Measured: a few 1e-7.
TOLERANCE = 1e-5


class Contender(NamedTuple):
    """One model of one library.

    Attributes:
      name: of library and model.
      parameters: numbers in the dense weights and in the tables.
      train: a train step.
      evaluate: an eval step.
      difference: largest difference of its probabilities from ours; None for ours.
    """

    name: str
    parameters: int
    train: Run
    evaluate: Run
    difference: float | None = None


def sized(config: Config, batch: int, events: int) -> Config:
    """Change the batch and the history of a config."""
    data = dataclasses.replace(config.data, batch_size=batch, events=events)
    return dataclasses.replace(config, data=data)


def our_contender(name: str, config: Config, schema: Schema) -> Contender:
    """A model of ours, compiled at its first step."""
    model = build_model(
        validate(config), schema, tuple(task.name for task in schema.tasks)
    )
    state = init_state(model, 0)
    count = sum(leaf.size for leaf in jax.tree.leaves((state.params, state.tables)))
    return Contender(name, count, *step_runs(config, schema))


def torch_contenders(
    name: str, config: Config, schema: Schema, compilers: Sequence[str]
) -> Iterator[Contender]:
    """The PyTorch peers of a config.

    Args:
      name: of the peer.
      config: config of our model.
      schema: its schema.
      compilers: "none" for PyTorch as it is, "model" for `torch.compile`.

    Raises:
      AssertionError: its probabilities are not ours.
    """
    import torch

    from benchmarks.peers.torch_din import TorchDIN
    from benchmarks.peers.torch_tokenformer import TorchTokenFormer
    from benchmarks.peers.torch_train import Trainer, count_parameters
    from benchmarks.peers.torch_weights import copy_weights

    model = build_model(
        validate(config), schema, tuple(task.name for task in schema.tasks)
    )
    state = init_state(model, 0)
    random = np.random.default_rng(0)
    batches = [random_batch(config, schema, random) for _ in range(POOL)]
    on_device = to_devices(batches[0], jax.sharding.get_mesh())
    expected = np.asarray(jit_eval_step(model)(state, on_device))
    for how in compilers:
        torch.manual_seed(0)
        kind = TorchDIN if config.model.kind == "din" else TorchTokenFormer
        peer = kind(model)
        copy_weights(peer, state.params, state.tables)
        trainer = Trainer(peer, config.optim, batches, how=how)
        difference = float(np.abs(trainer.eval_step().numpy() - expected).max())
        # Not `difference > TOLERANCE`, which is False for NaN.
        if not difference <= TOLERANCE:
            raise AssertionError(
                f"{name}: probabilities differ by {difference:.3g}: "
                "it is not the same computation"
            )
        yield Contender(
            name + ", compiled" * (how == "model"),
            sum(count_parameters(peer).values()),
            trainer.train_step,
            trainer.eval_step,
            difference,
        )


def contenders(flags: argparse.Namespace) -> Iterator[Contender]:
    """Ours, then the peers."""
    schema = stream_schema()
    config = sized(stream_cases()[CASE], flags.batch, flags.events)
    every_token = with_model(config, needed_rows=False)
    din = with_model(config, kind="din", windows=())
    compilers = ["none"]
    if not flags.eager and (shutil.which("g++") or shutil.which("clang++")):
        compilers.append("model")
    yield our_contender(OURS, config, schema)
    yield our_contender("tokenrec DIN", din, schema)
    for name, peer in (
        ("torch TokenFormer, needed tokens", config),
        ("torch TokenFormer, every token", every_token),
        ("torch DIN", din),
    ):
        yield from torch_contenders(name, peer, schema, compilers)


def bench(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for each contender."""
    entered = list(contenders(flags))
    runs: dict[str, Run] = {}
    for contender in entered:
        runs[f"train {contender.name}"] = contender.train
        runs[f"eval {contender.name}"] = contender.evaluate
    seconds = take_turns(runs, flags.repeats, pause=PAUSE)
    for contender in entered:
        row: dict[str, Any] = {
            "model": contender.name,
            "parameters": contender.parameters,
        }
        for kind in ("train", "eval"):
            times = seconds[f"{kind} {contender.name}"]
            row[f"{kind}, samples/s"] = flags.batch / statistics.median(times)
            row[f"{kind}, best"] = flags.batch / min(times)
            ours = seconds[f"{kind} {OURS}"]
            row[f"{kind}, this / ours"] = paired_ratio(ours, times)
        yield row | {"max_difference": contender.difference}


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch", type=int, default=256, help="samples of a batch")
    add("--events", type=int, default=50, help="events of a history")
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=20, help="turns of each variant")
    add("--eager", action="store_true", help="leave the compiled peers out")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "results" / "step_peers",
        help="stem of the result files",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its page."""
    flags = make_parser().parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "the peers need PyTorch, which is not installed; "
            "pip install '.[peers]', or pip install torch"
        )
    use_threads(flags.threads)
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        rows = list(bench(flags))
    params = {
        "batch": flags.batch,
        "events": flags.events,
        "dtype": "float32",
        "threads": flags.threads,
        "turns": flags.repeats,
        "statistic": "median",
    }
    command = f"python -m benchmarks.peers.step --repeats {flags.repeats}"
    write_result(
        flags.out,
        rows,
        params,
        command + " --eager" * flags.eager,
        title="Steps beside PyTorch",
        packages=(*PACKAGES, "torch"),
    )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)

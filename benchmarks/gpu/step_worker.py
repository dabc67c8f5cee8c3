"""A train step of one library in a process of its own, for the stage `steps`.

    python -m benchmarks.gpu.step_worker --case lrm_1b --library tokenrec

Each library has the memory of the card to itself, and a crash takes nothing along. The
process prepares what needs no memory: imports, and for ours the compilation. It then
prints `{"ready": seconds}` and waits for a line `{"seconds": s, "profile": bool}` on its
standard input. It runs, prints `{"row": {...}}`, perhaps `{"kernels": [...]}`, and
`{"done": true}`. An error is `{"error": text}`.

Steps are queued without waiting: a turn is about half a second of them. The median of
the turns counts.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.gpu.step_models import CASES, StepCase, step_case
from benchmarks.step_cases import random_batch
from tokenrec.data.batch import Batch

LIBRARIES = ("tokenrec", "torch")
# Turns that count, seconds of one, and steps before them.
TURNS, TURN_SECONDS, WARM = 5, 0.5, 3
# Batches that the steps go through in turn.
POOL = 4
PROFILED_STEPS = 2
ERROR_CHARACTERS = 800


class Prepared(NamedTuple):
    """A step that can be started.

    Attributes:
      start: takes the memory; returns the step, a call that queues the work, and a call
        that waits for its result.
      columns: columns of the row that are known before it runs.
      peak_bytes: most memory that the device has held so far; None if not known.
    """

    start: Callable[[], tuple[Callable[[], Any], Callable[[Any], Any]]]
    columns: dict[str, Any]
    peak_bytes: Callable[[], int | None]


def batches_of(case: StepCase) -> list[Batch]:
    """Draw the batches on the host."""
    random = np.random.default_rng(0)
    return [random_batch(case.config, case.schema, random) for _ in range(POOL)]


def prepare_ours(case: StepCase) -> Prepared:
    """Compile our step."""
    from tokenrec.data.batch_shapes import batch_shapes
    from tokenrec.planner.compile import compile_train_step
    from tokenrec.planner.flops import step_work
    from tokenrec.planner.mfu import peak_flops
    from tokenrec.sharding import make_mesh, to_devices
    from tokenrec.state import init_state

    config, model = case.config, case.model
    device = jax.devices()[0]
    mesh = make_mesh(config.mesh, [device])
    shapes = batch_shapes(case.schema, config.data, batch_size=config.data.batch_size)
    shape = shapes[config.data.events]
    work, layers = step_work(model, mesh, shape)
    begin = time.perf_counter()
    compiled = compile_train_step(model, mesh, shape)
    compile_seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    planned = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    names = [layer["implementation"] for layer in layers]
    attention = ", ".join(
        f"{names.count(name)} x {name}" for name in dict.fromkeys(names)
    )

    def start() -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        with jax.set_mesh(mesh):
            state = init_state(model, config.seed)
            batches = itertools.cycle([to_devices(b, mesh) for b in batches_of(case)])

        def step() -> Any:
            nonlocal state
            state, metrics = compiled(state, next(batches))
            return metrics.loss

        return step, jax.block_until_ready

    def peak_bytes() -> int | None:
        return (device.memory_stats() or {}).get("peak_bytes_in_use")

    columns = {
        "device": device.device_kind,
        "model_flops": work.model_flops,
        "sheet_flops": peak_flops(device.device_kind),
        "planned_gib": planned / 2**30,
        "compile_seconds": compile_seconds,
        "attention": attention,
    }
    return Prepared(start, columns, peak_bytes)


def prepare_torch(case: StepCase) -> Prepared:
    """Import PyTorch; its model compiles when it first runs."""
    import torch

    from benchmarks.peers.torch_tokenformer import TorchTokenFormer
    from benchmarks.peers.torch_train import Trainer, count_parameters

    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns: dict[str, Any] = {}

    def start() -> tuple[Callable[[], Any], Callable[[Any], Any]]:
        # As JAX by default: float32 products in TF32.
        torch.set_float32_matmul_precision("high")
        torch.manual_seed(0)
        begin = time.perf_counter()
        with torch.device(device):
            peer = TorchTokenFormer(case.model, attention=case.peer.attention)  # type: ignore[arg-type]
        trainer = Trainer(
            peer,
            case.config.optim,
            batches_of(case),
            how=case.peer.how,  # type: ignore[arg-type]
            bfloat16=case.config.model.dtype == "bfloat16",
        )

        def wait(loss: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()

        wait(trainer.train_step())
        columns["device"] = torch.cuda.get_device_name() if device == "cuda" else device
        columns["compile_seconds"] = time.perf_counter() - begin
        columns["parameters"] = sum(count_parameters(peer).values())
        columns["attention"] = f"SDPA, {case.peer.attention}; compile: {case.peer.how}"
        return trainer.train_step, wait

    def peak_bytes() -> int | None:
        return torch.cuda.max_memory_allocated() if device == "cuda" else None

    return Prepared(start, columns, peak_bytes)


def time_step(
    step: Callable[[], Any], wait: Callable[[Any], Any], seconds: float
) -> tuple[list[float], Any]:
    """Seconds of a step in each turn, and what the last step returned.

    Args:
      step: queues a step.
      wait: waits for what a step returned.
      seconds: what all turns may take.
    """
    for _ in range(WARM):
        wait(step())
    begin = time.perf_counter()
    wait(step())
    once = time.perf_counter() - begin
    turn = min(TURN_SECONDS, seconds / TURNS)
    count = max(1, math.ceil(turn / max(once, 1e-9)))
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < TURNS and (not times or time.perf_counter() < end):
        begin = time.perf_counter()
        for _ in range(count):
            result = step()
        wait(result)
        times.append((time.perf_counter() - begin) / count)
    return times, result


def measure(case: StepCase, prepared: Prepared, seconds: float) -> tuple[dict, Any]:
    """Run a prepared step: its row, and the step."""
    step, wait = prepared.start()
    times, loss = time_step(step, wait, seconds)
    data = case.config.data
    count = data.batch_size * (
        data.events if data.paradigm == "uc" else data.candidates
    )
    tokens = data.batch_size * case.model.layout(data.events).length
    median = statistics.median(times)
    peak = prepared.peak_bytes()
    row = {
        "batch": data.batch_size,
        "tokens": tokens,
        "step_ms": 1e3 * median,
        "least_ms": 1e3 * min(times),
        "examples_per_second": count / median,
        "tokens_per_second": tokens / median,
        "peak_gib": None if peak is None else peak / 2**30,
        "turns": len(times),
        "loss": float(loss),
    }
    return row | prepared.columns, step


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, wait for the word, measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--library", choices=LIBRARIES, required=True)
    parser.add_argument("--rehearse", action="store_true")
    flags = parser.parse_args(argv)
    # Libraries may print to standard output: answers go through a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    try:
        begin = time.perf_counter()
        case = step_case(flags.case, rehearse=flags.rehearse)
        prepare = prepare_ours if flags.library == "tokenrec" else prepare_torch
        prepared = prepare(case)
        say({"ready": time.perf_counter() - begin})
        line = sys.stdin.readline()
        if not line:
            return 0
        request = json.loads(line)
        row, step = measure(case, prepared, request["seconds"])
        say({"row": row})
        if request["profile"]:
            from benchmarks.gpu.kernels import profile

            say({"kernels": profile(step, PROFILED_STEPS)})
        say({"done": True})
    except Exception as error:  # noqa: BLE001 - a result like others
        text = " ".join(f"{type(error).__name__}: {error}".split())
        say({"error": text[:ERROR_CHARACTERS]})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

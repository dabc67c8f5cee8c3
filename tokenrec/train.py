"""The loop."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import chex
import jax
import numpy as np

from tokenrec.analysis.watch import make_state_logger
from tokenrec.checkpoint.checkpointer import Checkpointer, Progress
from tokenrec.checkpoint.run_folder import create_or_check_run, run_identity
from tokenrec.checkpoint.warm_start import initial_state
from tokenrec.config import Config, data_directory, semantic_ids_path
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.validate import validate
from tokenrec.data.dataset import open_dataset
from tokenrec.data.pipeline import stream_lengths, task_names, train_batches
from tokenrec.errors import NonFiniteError, Stopped
from tokenrec.evaluation.evaluate import make_evaluator
from tokenrec.models.backbones.block import check_mesh
from tokenrec.runtime import distributed
from tokenrec.runtime.compilation_cache import persistent_compilation_cache
from tokenrec.runtime.preemption import StopRequested, StopSignals
from tokenrec.runtime.progress import ProgressDisplay
from tokenrec.runtime.run_log import open_run_log
from tokenrec.runtime.throughput import Throughput
from tokenrec.runtime.watchdog import Watchdog
from tokenrec.sharding import (
    check_batch_sizes,
    compiler_options,
    local_batch_indices,
    make_mesh,
    to_devices,
)
from tokenrec.state import abstract_state, build_model
from tokenrec.step import Metrics, train_step


def train(config: Config, workdir: Path, *, progress: bool = True) -> dict[str, Any]:
    """Trains, or resumes, the run in `workdir`, together with the other processes if there are any.

    Returns:
      `{"step", "best_step", "best", "skipped", "examples_per_second", "evaluation"}`; `evaluation` is the last one,
      or None.

    Raises:
      InputError: the config, the data set or the run in `workdir` do not go together.
      NonFiniteError: a step more than `optim.max_skipped` had a loss or gradient that was not finite, or a spike; the
        checkpoints before it stay.
      Stopped: a signal asked for it; the last step is saved.
    """
    with distributed.raise_on_all_processes():
        config = validate(config)
        dataset = open_dataset(
            data_directory(config), config.data.exclude, semantic_ids_path(config)
        )
        model = build_model(
            config, dataset.schema, task_names(dataset.schema, config.data)
        )
        mesh = make_mesh(config.mesh)
        check_batch_sizes(config, mesh)
        check_mesh(config.model, mesh)
    distributed.assert_same_on_all_processes(run_identity(config, dataset))
    create_or_check_run(config, dataset.schema, workdir)
    stop_at = config.train.stop_at or config.optim.steps
    evaluates = config.train.eval_split in dataset.splits
    # One compilation per stream length and no other: a batch of another shape would compile again in silence.
    chex.clear_trace_counter()  # it counts by function, over all runs of a process
    guarded = chex.assert_max_traces(train_step, n=len(stream_lengths(config.data)))
    step_fn = jax.jit(
        guarded,
        static_argnums=0,
        donate_argnums=1,
        compiler_options=compiler_options(mesh),
    )

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(mesh))
        stack.enter_context(
            persistent_compilation_cache(workdir, config.train.keep_compiled)
        )
        interruption = stack.enter_context(StopSignals())
        watch = stack.enter_context(
            Watchdog(
                config.train.hang_seconds,
                workdir,
                jax.process_index(),
                jax.process_count(),
            )
        )
        assess = make_evaluator(model, dataset, mesh)
        look_inside = (
            make_state_logger(model, dataset, mesh)
            if evaluates and config.train.log_states
            else None
        )
        checkpoints = stack.enter_context(
            Checkpointer(
                workdir,
                keep=config.train.keep,
                keep_every=config.train.keep_every,
                config=dataclasses.asdict(config),
            )
        )
        watch.enter_phase("restoring the latest checkpoint")
        restored = checkpoints.restore(abstract_state(model))
        step, state, reached = restored or (
            0,
            initial_state(model, workdir),
            Progress(),
        )
        with distributed.raise_on_all_processes():
            own = local_batch_indices(mesh, config.data.batch_size, "data.batch_size")
            data = train_batches(
                dataset,
                config.data,
                start=step,
                steps=config.optim.steps,
                seed=config.seed,
                own=own,
                ages=reads_event_ages(config.model),
            )
            stack.callback(data.close)
            throughput = Throughput()
            display = ProgressDisplay(
                throughput,
                total_steps=stop_at,
                start_step=step,
                enabled=progress and distributed.is_first_process(),
            )
            log = _ignore
            if distributed.is_first_process():
                with throughput.excluded():
                    run_log = open_run_log(
                        workdir,
                        start_step=step,
                        config=dataclasses.asdict(config),
                        trackers=config.train.trackers,
                        more=[display],
                    )
                log = stack.enter_context(run_log).write
        pending, compiled, report = _Pending(throughput, config), set(), None
        fresh = (
            restored is None or not reached.assessed
        )  # else a restored step was evaluated before it was saved

        def pulse() -> None:
            watch.enter_phase(f"step {step:,}: evaluation")
            interruption.raise_if_requested()

        while True:
            last, value = step >= stop_at, None
            best = stop = False
            asked = interruption.requested()
            if (
                evaluates
                and step
                and fresh
                and (last or _due(step, config.train.eval_every))
            ):
                reached = dataclasses.replace(reached, assessed=False)
                with throughput.excluded(), contextlib.suppress(StopRequested):
                    watch.enter_phase(
                        f"step {step:,}: waiting for the devices, then evaluation"
                    )
                    reached = pending.check(step, reached)[1]
                    interruption.raise_if_requested()
                    report = assess(
                        state, config.train.eval_split, config.train.eval_samples, pulse
                    )
                    log(step, _flat_report(report), config.train.eval_split)
                    for kind, by_layer in (
                        look_inside(state) if look_inside else {}
                    ).items():
                        log(step, by_layer, kind)
                    value = _value(report, config)
                    reached, best = _advance(reached, step, value)
                    stop = 0 < config.train.patience <= reached.waited
                asked = interruption.signal_received
            due = last or best or stop or asked or _due(step, config.train.save_every)
            if step and fresh and due:
                with throughput.excluded():
                    watch.enter_phase(
                        f"step {step:,}: waiting for the devices and the save before"
                    )
                    reached = pending.check(step, reached)[1]
                    began = time.perf_counter()
                    checkpoints.save(step, state, reached, value)
                    log(step, {"blocked_seconds": time.perf_counter() - began}, "save")
            if asked and not ((last or stop) and reached.assessed):
                watch.enter_phase(f"step {step:,}: the last save")
                checkpoints.wait()
                saved = (
                    "which is saved" if step else "before there was anything to save"
                )
                name = signal.Signals(asked).name
                raise Stopped(
                    f"{name}: stopped at step {step:,}, {saved}; the same command goes on",
                    asked,
                )
            if last or stop:
                break
            watch.enter_phase(f"step {step:,}: waiting for the input")
            host = next(data)
            batch = to_devices(host.batch, mesh)
            timed = batch.valid.shape in compiled
            if timed:
                watch.enter_phase(f"step {step:,}: handing it to the devices")
                state, metrics = step_fn(model, state, batch)
            else:
                watch.enter_phase(
                    f"step {step:,}: compiling it, and waiting for the devices"
                )
                display.show_phase("compiling")
                with throughput.excluded():
                    state, metrics = jax.block_until_ready(step_fn(model, state, batch))
                display.show_phase()
                compiled.add(batch.valid.shape)
            pending.add(metrics, host.rows, timed)
            step, fresh = step + 1, True
            if step % config.train.log_every == 0 or step == stop_at:
                watch.enter_phase(f"step {step:,}: waiting for the devices")
                means, reached = pending.check(
                    step, reached
                )  # the only host synchronisation
                log(step, means | {"examples_per_second": throughput.rate()})
        watch.enter_phase(f"step {step:,}: the last save")
        checkpoints.wait()
        return {
            "step": step,
            "best_step": reached.best_step,
            "best": reached.best,
            "skipped": reached.skipped,
            "examples_per_second": throughput.average(),
            "evaluation": report,
        }


class _Pending:
    """Metrics of the steps since the host last waited for the device, and the rows that each of them read here."""

    def __init__(self, throughput: Throughput, config: Config) -> None:
        self._throughput, self._optim = throughput, config.optim
        self._waiting: deque[tuple[Metrics, np.ndarray, bool]] = deque()

    def add(self, metrics: Metrics, rows: np.ndarray, timed: bool) -> None:
        self._waiting.append((metrics, rows, timed))

    def check(self, step: int, reached: Progress) -> tuple[dict[str, float], Progress]:
        """Means since the last call, whose timed examples the throughput counts, the most rounds that spread tables
        took, and the steps skipped so far if there are any; `step` updates are made. And the progress with these.

        Raises:
          NonFiniteError: in every process, of a skipped step too many; names it and the rows of its batch that lie
            here.
        """
        waiting = list(self._waiting)
        self._waiting.clear()
        fetched = jax.device_get([metrics for metrics, _, _ in waiting])
        for number, (metrics, (_, rows, timed)) in enumerate(
            zip(fetched, waiting, strict=True), step - len(waiting)
        ):
            if timed:
                self._throughput.add(int(metrics.examples))
            if not metrics.applied:
                reached = dataclasses.replace(reached, skipped=reached.skipped + 1)
                self._skipped(number, metrics, rows, reached.skipped)
        made = [metrics for metrics in fetched if metrics.applied]
        if not made:
            return {}, reached
        means = {
            name: float(np.mean([getattr(m, name) for m in made]))
            for name in ("loss", "grad_norm")
        }
        rounds = max(int(m.rounds) for m in fetched)
        more = {"exchange_rounds": rounds} if rounds else {}
        return means | more | (
            {"skipped": reached.skipped} if reached.skipped else {}
        ), reached

    def _skipped(
        self, step: int, metrics: Metrics, rows: np.ndarray, count: int
    ) -> None:
        finite = np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
        spike = (
            f", more than optim.spike_norm={self._optim.spike_norm:g} times its mean"
            if finite
            else ""
        )
        found = f"step {step}: loss={metrics.loss}, gradient norm={metrics.grad_norm}{spike}; the update was not made"
        if count <= self._optim.max_skipped:
            if distributed.is_first_process():
                print(
                    f"tokenrec: {found}; {count} of optim.max_skipped={self._optim.max_skipped}",
                    file=sys.stderr,
                )
            return
        read = np.unique(rows[rows >= 0])
        shown = ", ".join(map(str, read[:8]))
        raise NonFiniteError(
            f"{found}. {_whose_batch()} read {len(read)} rows of train: {shown}, ...; `tokenrec replay --step {step}` "
            "shows more. Lower optim.learning_rate or optim.clip_norm, look for extreme values in these rows, or let "
            f"the run go on without such steps: optim.max_skipped={count}"
        )


def _whose_batch() -> str:
    count = jax.process_count()
    return (
        "Its batch"
        if count == 1
        else f"Of its batch, process {jax.process_index()} of {count}"
    )


def _ignore(
    step: int, values: Mapping[str, SupportsFloat | None], prefix: str = "train"
) -> None:
    """The log of every process but the first."""


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _value(report: dict[str, Any], config: Config) -> float | None:
    """What decides the best checkpoint, higher is better; None if the metric is undefined."""
    metric = config.train.best_metric
    if config.data.objective == "retrieval":
        return report["retrieval"]["ndcg@10" if metric == "auto" else metric]
    if metric != "loss":
        return report["macro_auc" if metric == "auto" else metric]
    losses = [
        task["log_loss"]
        for task in report["tasks"].values()
        if task["log_loss"] is not None
    ]
    return -float(np.mean(losses)) if losses else None


def _advance(
    reached: Progress, step: int, value: float | None
) -> tuple[Progress, bool]:
    """Progress after an evaluation, and whether it is the best so far."""
    if value is not None and (reached.best is None or value > reached.best):
        return dataclasses.replace(
            reached, best=value, best_step=step, waited=0, assessed=True
        ), True
    return dataclasses.replace(reached, waited=reached.waited + 1, assessed=True), False


def _flat_report(report: dict[str, Any]) -> dict[str, float | None]:
    if "retrieval" in report:
        return dict(report["retrieval"])
    flat = {name: value for name, value in report.items() if name != "tasks"}
    for task, values in report["tasks"].items():
        flat |= {f"{task}/{name}": value for name, value in values.items()}
    return flat

"""A training run in progress: its compiled step, input, evaluation, checkpoints and logs.

`train_loop.py` calls these functions in order. Each names its phase to the watchdog before
it waits for anything, so that a run that hangs says where it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.device_history import read_history, record_use
from tokenrec.checkpoint.pretrained import add_frozen, saved_part
from tokenrec.checkpoint.progress import Progress
from tokenrec.checkpoint.warm_start import initial_state
from tokenrec.config.backbones import reads_event_ages
from tokenrec.config.flatten import flatten_fields
from tokenrec.data.batch import Batch, HostBatch
from tokenrec.data.dataset import Dataset
from tokenrec.data.pipeline import stream_lengths, train_batches
from tokenrec.errors import EXIT_INPUT, InputError, Stopped
from tokenrec.evaluation.evaluate import make_evaluator
from tokenrec.evaluation.selection import criterion, flatten_report, selection_value
from tokenrec.jitted_step import JittedStep
from tokenrec.metrics_buffer import MetricsBuffer
from tokenrec.optim import dense_rate
from tokenrec.run_setup import Setup
from tokenrec.runtime import distributed
from tokenrec.runtime.lease import Lease
from tokenrec.runtime.preemption import StopRequested, StopSignals
from tokenrec.runtime.profiler import StepProfiler, profile_steps
from tokenrec.runtime.progress import ProgressDisplay
from tokenrec.runtime.run_log import RunLog, open_run_log
from tokenrec.runtime.throughput import Throughput
from tokenrec.runtime.watchdog import Watchdog
from tokenrec.sharding import local_batch_indices, to_devices
from tokenrec.state import ModelSpec, TrainState, abstract_state, table_statistics
from tokenrec.step import Metrics

# Values of the inside of a model by kind and name, such as {"rank": {"layer_0": 12.3}}.
StateLogger = Callable[[TrainState], dict[str, dict[str, float | None]]]
MakeStateLogger = Callable[[ModelSpec, Dataset, Mesh], StateLogger]


class ActiveRun:
    """The resources of a run, and one method for each thing that its loop does.

    Made by `run_context` (run_context.py). State and progress are arguments and results
    of its methods; it holds only what must live on the host between two steps, such as
    metrics that have not been fetched from the devices.
    """

    def __init__(
        self,
        setup: Setup,
        stack: contextlib.ExitStack,
        signals: StopSignals,
        watchdog: Watchdog,
        checkpoints: Checkpointer,
        lease: Lease | None,
        state_logger: StateLogger | None,
        show_progress: bool,
    ) -> None:
        self.setup = setup
        self._train = setup.config.train
        self._stack = stack
        self._signals = signals
        self._watchdog = watchdog
        self._checkpoints = checkpoints
        self._lease = lease
        self._state_logger = state_logger
        self._show_progress = show_progress
        self._evaluate = make_evaluator(setup.model, setup.dataset, setup.mesh)
        self._learning_rate = dense_rate(setup.config.optim, setup.model.updates)
        self._throughput = Throughput()
        self._metrics = MetricsBuffer(self._throughput, setup.config.optim)
        # Processes but the first have no writers, and show nothing.
        self._run_log = RunLog()
        self._display: ProgressDisplay | None = None
        self._profiler: StepProfiler | None = None
        self._said_undefined = False
        self._last_report: dict[str, Any] | None = None
        self._best_report: dict[str, Any] | None = None
        # The step whose evaluation and checkpoint are complete: nothing is due there.
        self._completed_step = 0
        self._step = JittedStep(setup)

    def restore_or_initialize(self) -> tuple[TrainState, Progress]:
        """Load the latest checkpoint; without one, start from another run or a seed."""
        self._watchdog.enter_phase("restoring the latest checkpoint")
        model, workdir = self.setup.model, self.setup.workdir
        abstract = abstract_state(model)
        restored = self._checkpoints.restore(saved_part(model, abstract))
        now = criterion(self.setup.config)
        if restored is None:
            return initial_state(model, workdir), Progress(criterion=now)
        step, state, saved = restored
        state = add_frozen(model, state, abstract, workdir)
        progress = saved.compared_by(now)
        if saved.best is not None and progress.best is None:
            print(
                f"tokenrec: the best checkpoint was chosen by {saved.criterion}, and is "
                f"now chosen by {now}: the search begins again at step {step:,}; before "
                f"it, step {saved.best_step:,} was the best",
                file=sys.stderr,
            )
        # A run that was stopped before an evaluation that was due repeats it.
        self._completed_step = step if progress.assessed else -1
        return state, progress

    def open_input(self, start: int) -> Iterator[HostBatch]:
        """Open the stream of training batches at a step.

        Each process reads the samples that lie on its own devices. The batch of a step
        is a function of the seed and the step, so no iterator state is restored.

        Raises:
          Stopped: a signal asked the run to stop while the samples were counted.
        """
        config, mesh = self.setup.config, self.setup.mesh

        def on_progress(phase: str) -> None:
            self._watchdog.enter_phase(phase)
            self._signals.raise_if_requested()

        self._watchdog.enter_phase("opening the input")
        try:
            with distributed.raise_on_all_processes():
                batches = train_batches(
                    self.setup.dataset,
                    config.data,
                    start=start,
                    steps=config.optim.steps,
                    seed=config.seed,
                    own=local_batch_indices(
                        mesh, config.data.batch_size, "data.batch_size"
                    ),
                    ages=reads_event_ages(config.model),
                    on_progress=on_progress,
                )
        except StopRequested:
            # All processes stop at the same call, so none waits for another.
            number = self._signals.signal_received
            assert number is not None
            self.stop(number, Progress(step=start))
        self._stack.callback(batches.close)
        return batches

    def open_log(self, start: int) -> None:
        """Open the logs in the first process; metrics after step `start` are dropped.

        A trace of `train.profile_steps` begins when all programs are compiled.
        """
        config, workdir = self.setup.config, self.setup.workdir
        self._watchdog.enter_phase("opening the logs")
        self._check_lease()
        with distributed.raise_on_all_processes(), self._throughput.excluded():
            if distributed.is_first_process():
                self._display = ProgressDisplay(
                    self._throughput,
                    total_steps=self.setup.last_step,
                    start_step=start,
                    enabled=self._show_progress,
                )
                run_log = open_run_log(
                    workdir,
                    start_step=start,
                    config=dataclasses.asdict(config),
                    trackers=config.train.trackers,
                    more=[self._display],
                )
                self._run_log = self._stack.enter_context(run_log)
                self._record_devices(start)
        first = start + 1 + len(stream_lengths(config.data))
        # One trace is enough: all processes run the same program.
        count = config.train.profile_steps if distributed.is_first_process() else 0
        folder = self._run_log.folder or workdir
        self._profiler = self._stack.enter_context(profile_steps(folder, first, count))
        self._signals.begin_steps()

    def _record_devices(self, start: int) -> None:
        """Note the devices of this start, and log them where they have changed."""
        setup = self.setup
        use = dataclasses.replace(setup.device_use, step=start)
        unknown = use.elastic != "off" and not self._train.elastic_devices
        if start and unknown and read_history(setup.workdir) is None:
            print(
                f"tokenrec: '{setup.workdir}' is a run from before devices were noted: "
                f"the {use.devices} of now count as all that it is meant for; if it "
                "began with others, set train.elastic_devices",
                file=sys.stderr,
            )
        before = record_use(setup.workdir, use)
        if before is not None:
            print(f"tokenrec: {use.describe_change(before)}", file=sys.stderr)
            self._run_log.write(start, use.numbers(), "mesh")

    def finished(self, progress: Progress) -> bool:
        """Whether the last step is reached, or `train.patience` is used up."""
        patience_used_up = 0 < self._train.patience <= progress.waited
        return progress.step >= self.setup.last_step or patience_used_up

    def next_batch(self, batches: Iterator[HostBatch], progress: Progress) -> HostBatch:
        """Wait for the next batch of the input pipeline."""
        self._watchdog.enter_phase(f"step {progress.step:,}: waiting for the input")
        began = time.perf_counter()
        batch = next(batches)
        self._metrics.add_input_wait(time.perf_counter() - began)
        return batch

    def train_step(
        self, state: TrainState, host: HostBatch, progress: Progress
    ) -> tuple[TrainState, Progress]:
        """Make one update, asynchronously but for the step that compiles.

        The metrics stay on the devices until `flush_metrics`.
        """
        assert self._profiler is not None
        step = progress.step
        batch = to_devices(host.batch, self.setup.mesh)
        compiled = self._step.is_compiled(batch)
        self._profiler.before_step(step)
        if compiled:
            self._watchdog.enter_phase(f"step {step:,}: handing it to the devices")
            state, metrics = self._step(state, batch)
        else:
            # Nothing is lost if a signal ends the process in the first compilation.
            with self._signals.nothing_to_save(self.is_complete(progress)):
                state, metrics = self._compile_and_step(state, batch, step)
        self._profiler.after_step(step, metrics)
        flops = self._step.model_flops(batch)
        self._metrics.add(metrics, host.rows, timed=compiled, model_flops=flops)
        return state, dataclasses.replace(progress, step=step + 1)

    def _compile_and_step(
        self, state: TrainState, batch: Batch, step: int
    ) -> tuple[TrainState, Metrics]:
        self._watchdog.enter_phase(
            f"step {step:,}: compiling it, and waiting for the devices"
        )
        if self._display is not None:
            self._display.show_phase("compiling")
        with self._throughput.excluded():
            outputs = self._step.compile_and_run(state, batch)
        if self._display is not None:
            self._display.show_phase()
        return outputs

    def log_due(self, progress: Progress) -> bool:
        """Whether a log line is due: every `train.log_every` steps, and the last one."""
        due = progress.step % self._train.log_every == 0
        return due or progress.step == self.setup.last_step

    def flush_metrics(self, progress: Progress) -> Progress:
        """Wait for the devices, check the steps since the last flush, and log them.

        Raises:
          NonFiniteError: more steps were skipped than `optim.max_skipped` allows.
          InputError: another trainer has taken over the folder.
        """
        self._watchdog.enter_phase(f"step {progress.step:,}: waiting for the devices")
        values, progress = self._metrics.flush(progress)
        self._check_lease()
        timings = self._metrics.timings()
        last_update = progress.step * self.setup.model.updates - 1
        learning_rate = float(self._learning_rate(last_update))
        logged = values | timings | {"learning_rate": learning_rate}
        flops_per_second = timings.get("model_flops_per_second")
        if flops_per_second is not None:
            logged["mfu"] = self._step.utilisation(flops_per_second)
        self._run_log.write(progress.step, logged)
        return progress

    def is_complete(self, progress: Progress) -> bool:
        """Whether evaluation and checkpoint of this step were made already."""
        return progress.step == self._completed_step

    def stop_signal(self) -> int | None:
        """Signal that asks the run to stop; all processes must call it equally often.

        Raises:
          InputError: another trainer has taken over the folder.
        """
        self._check_lease()
        return self._signals.requested()

    def evaluation_due(self, progress: Progress) -> bool:
        """Whether this step is evaluated: every `train.eval_every`, and the last one."""
        last = progress.step >= self.setup.last_step
        due = last or _is_multiple(progress.step, self._train.eval_every)
        return self.setup.evaluates and due

    def evaluate(
        self, state: TrainState, progress: Progress
    ) -> tuple[Progress, int | None]:
        """Evaluate on `train.eval_split`; a stop signal ends it between two batches.

        Returns:
          The progress (`assessed` is False if a signal came first), and the signal.
        """
        step, config = progress.step, self.setup.config
        progress = dataclasses.replace(progress, assessed=False)

        def between_batches() -> None:
            self._watchdog.enter_phase(f"step {step:,}: evaluation")
            self._check_lease()
            self._signals.raise_if_requested()

        with self._throughput.excluded(), contextlib.suppress(StopRequested):
            self._watchdog.enter_phase(
                f"step {step:,}: waiting for the devices, then evaluation"
            )
            _, progress = self._metrics.flush(progress)
            self._signals.raise_if_requested()
            report = self._evaluate(
                state, self._train.eval_split, self._train.eval_samples, between_batches
            )
            self._run_log.write(step, flatten_report(report), self._train.eval_split)
            inside = self._state_logger(state) if self._state_logger else {}
            for kind, by_layer in inside.items():
                self._run_log.write(step, by_layer, kind)
            self._run_log.write(step, table_statistics(state), "tables")
            value = selection_value(report, config)
            if value is None:
                self._say_undefined(step)
            progress = progress.after_evaluation(value)
            self._last_report = report
            if progress.best_step == step:
                self._best_report = report
        return progress, self._signals.signal_received

    def _say_undefined(self, step: int) -> None:
        """Say once that no checkpoint can be the best one."""
        if self._said_undefined or not distributed.is_first_process():
            return
        self._said_undefined = True
        print(
            f"tokenrec: step {step:,}: {criterion(self.setup.config)} is undefined, so "
            "that no checkpoint is the best one: each of its tasks has labels of one "
            "class alone, or none; evaluate on a split that has both "
            "(train.eval_split), choose by train.best_metric='loss', or train with "
            "data.objective='retrieval' on a log of uses alone",
            file=sys.stderr,
        )

    def save_due(self, progress: Progress, stop_signal: int | None) -> bool:
        """Whether to save: the last step, the best so far, a stop, or `save_every`.

        Also after a save that a fault of the storage prevented.
        """
        return (
            self.finished(progress)
            or self._checkpoints.save_failed
            or progress.best_step == progress.step
            or stop_signal is not None
            or _is_multiple(progress.step, self._train.save_every)
        )

    def save(self, state: TrainState, progress: Progress) -> Progress:
        """Write a checkpoint in the background, once the one before it is complete.

        Steps are checked first: a checkpoint never holds the result of a bad step
        without its count.

        Raises:
          InputError: on all processes, if another trainer has taken over the folder.
        """
        step = progress.step
        with self._throughput.excluded():
            self._watchdog.enter_phase(
                f"step {step:,}: waiting for the devices and the save before"
            )
            _, progress = self._metrics.flush(progress)
            with distributed.raise_on_all_processes():
                if self._lease is not None:
                    self._lease.verify()
            began = time.perf_counter()
            # A run that resumes here has the metrics of the steps before.
            self._run_log.sync()
            self._checkpoints.save(step, saved_part(self.setup.model, state), progress)
            self._run_log.write(
                step, {"blocked_seconds": time.perf_counter() - began}, "save"
            )
        return progress

    def stop(self, number: int, progress: Progress) -> NoReturn:
        """End the run at the request of a signal, when its checkpoint is complete.

        Raises:
          Stopped: always.
        """
        name = signal.Signals(number).name
        saved = "checkpoint saved" if progress.step else "there was nothing to save yet"
        raise Stopped(
            f"{name}: stopped at step {progress.step:,}; {saved}; rerun the command to "
            "resume",
            number,
        )

    def finish_saves(self, state: TrainState, progress: Progress) -> None:
        """Wait until the checkpoint of the last step is completely on disk."""
        self._watchdog.enter_phase(f"step {progress.step:,}: the last save")
        self._checkpoints.finish(
            progress.step, saved_part(self.setup.model, state), progress
        )

    def _check_lease(self) -> None:
        """Raise InputError if another trainer is known to have taken over the folder."""
        if self._lease is None:
            return
        try:
            self._lease.check()
        except InputError as error:
            if jax.process_count() == 1:
                raise
            # The other processes go on to their next collective operation: to close the
            # run in order would wait for them.
            print(f"tokenrec: {error}", file=sys.stderr)
            distributed.exit_immediately(EXIT_INPUT)

    def summary(self, progress: Progress) -> dict[str, Any]:
        """Log the best evaluation beside the config; result as `train` returns it."""
        if self._best_report is not None:
            config = flatten_fields(dataclasses.asdict(self.setup.config))
            self._run_log.write_result(config, flatten_report(self._best_report))
        return {
            "step": progress.step,
            "best_step": progress.best_step,
            "best": progress.best,
            "skipped": progress.skipped,
            "examples_per_second": self._throughput.average(),
            "evaluation": self._last_report,
            "best_evaluation": self._best_report,
        }


def _is_multiple(step: int, every: int) -> bool:
    return every > 0 and step % every == 0

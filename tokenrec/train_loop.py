"""The training loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenrec.active_run import ActiveRun, MakeStateLogger
from tokenrec.checkpoint.progress import Progress
from tokenrec.config import Config
from tokenrec.run_context import run_context
from tokenrec.run_setup import set_up
from tokenrec.runtime.paths import as_path
from tokenrec.state import TrainState


def train(
    config: Config,
    workdir: Path,
    *,
    progress: bool = True,
    make_state_logger: MakeStateLogger | None = None,
) -> dict[str, Any]:
    """Train the run in `workdir`, or resume it, together with the other processes.

    Args:
      config: what to train; a run in `workdir` must have been started with the same one.
      workdir: folder of the run: config, checkpoints, logs.
      progress: show a progress bar.
      make_state_logger: see `run_context`; needed with `train.log_states`.

    Returns:
      `step`, the last one; `best_step` and `best`, the step with the best evaluation and
      its value; `skipped`, steps without an update; `examples_per_second`; `evaluation`
      and `best_evaluation`, the reports of the last and of the best evaluation of this
      call, None if there was none.

    Raises:
      InputError: the config, the data set and the run in `workdir` do not fit together.
      NonFiniteError: more than `optim.max_skipped` steps had a loss or gradient that was
        not finite, or a spike; the checkpoints before them are kept.
      Stopped: a signal asked the run to stop; the state of the last step is saved.
    """
    # 1. Everything derives from the config; processes that disagree end here. Nothing is
    # written until the run has its folder to itself.
    setup = set_up(config, as_path(workdir))
    with run_context(
        setup, show_progress=progress, make_state_logger=make_state_logger
    ) as run:
        # 2. The latest checkpoint, or the weights of another run, or random ones.
        state, reached = run.restore_or_initialize()
        # 3. The input continues with the batch of the next step.
        batches = run.open_input(reached.step)
        run.open_log(reached.step)
        # 4. A run that was stopped before an evaluation was complete repeats it.
        reached = evaluate_and_save(run, state, reached)
        while not run.finished(reached):
            batch = run.next_batch(batches, reached)
            # 5. The devices work on this step while the host prepares the next one.
            state, reached = run.train_step(state, batch, reached)
            # 6. Here the host waits for the devices, and bad steps are noticed.
            if run.log_due(reached):
                reached = run.flush_metrics(reached)
            reached = evaluate_and_save(run, state, reached)
        run.finish_saves(state, reached)
        return run.summary(reached)


def evaluate_and_save(
    run: ActiveRun, state: TrainState, progress: Progress
) -> Progress:
    """Evaluate and save if either is due, then stop if a signal asked for it.

    The order matters: the evaluation decides whether this checkpoint is the best, and a
    stop comes after the save so that no step is lost.

    Raises:
      Stopped: a signal asked the run to stop; the state is saved.
    """
    # A signal that arrives later is seen in the next step, after another save.
    stop_signal = run.stop_signal()
    if not run.is_complete(progress):
        if run.evaluation_due(progress):
            progress, stop_signal = run.evaluate(state, progress)
        if run.save_due(progress, stop_signal):
            progress = run.save(state, progress)
    # A run that has just finished ends as such, whatever was asked.
    complete = run.finished(progress) and progress.assessed
    if stop_signal is not None and not complete:
        run.finish_saves(state, progress)
        run.stop(stop_signal, progress)
    return progress

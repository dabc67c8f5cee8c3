"""Open what a training run needs, in order, and close it however the run ends."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Iterator

import jax

from tokenrec.active_run import ActiveRun, MakeStateLogger
from tokenrec.checkpoint.checkpointer import Checkpointer
from tokenrec.checkpoint.run_folder import create_or_check_run, create_workdir
from tokenrec.errors import Stopped
from tokenrec.run_setup import Setup
from tokenrec.runtime import distributed
from tokenrec.runtime.compilation_cache import persistent_compilation_cache
from tokenrec.runtime.lease import Lease, acquire
from tokenrec.runtime.preemption import StopSignals
from tokenrec.runtime.watchdog import Watchdog


@contextlib.contextmanager
def run_context(
    setup: Setup,
    *,
    show_progress: bool = True,
    make_state_logger: MakeStateLogger | None = None,
) -> Iterator[ActiveRun]:
    """Hold the resources of a run: its folder, mesh, signals, watchdog, checkpoints.

    Nothing is written to the folder before this process, or the first one of several,
    has its lease; then the files of the run are created, or checked on resume.

    Leaving the context waits for the checkpoint being written and closes everything,
    however the run ended.

    Args:
      setup: what `set_up` returned.
      show_progress: print a progress bar, or lines where stderr is no terminal.
      make_state_logger: makes the function that measures the states of the model at
        each evaluation; needed with `train.log_states`.

    Raises:
      InputError: on all processes, if another trainer holds the folder, or if it holds
        another run.
      Stopped: a signal arrived while it waited for the folder.
    """
    train = setup.config.train
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(setup.mesh))
        signals = stack.enter_context(StopSignals())
        lease = _acquire_lease(setup, signals, stack)
        create_or_check_run(setup.config, setup.dataset, setup.workdir)
        stack.enter_context(
            persistent_compilation_cache(setup.workdir, train.keep_compiled)
        )
        watchdog = stack.enter_context(
            Watchdog(
                train.hang_seconds,
                setup.workdir,
                jax.process_index(),
                jax.process_count(),
            )
        )
        state_logger = None
        if setup.evaluates and train.log_states:
            if make_state_logger is None:
                raise ValueError(
                    "train.log_states=True and make_state_logger=None; pass "
                    "tokenrec.analysis.watch.make_state_logger, or call tokenrec.train"
                )
            state_logger = make_state_logger(setup.model, setup.dataset, setup.mesh)
        watchdog.enter_phase("verifying the latest checkpoint")
        checkpoints = stack.enter_context(
            Checkpointer(
                setup.workdir,
                keep=train.keep,
                keep_every=train.keep_every,
                config=dataclasses.asdict(setup.config),
                devices=setup.device_use.as_origin(),
            )
        )
        yield ActiveRun(
            setup,
            stack,
            signals,
            watchdog,
            checkpoints,
            lease,
            state_logger,
            show_progress,
        )


def _acquire_lease(
    setup: Setup, signals: StopSignals, stack: contextlib.ExitStack
) -> Lease | None:
    """Take the lease of the folder in the first process, which holds it for all.

    Args:
      setup: the run.
      signals: a signal ends the wait for a lease that may be stale.
      stack: releases the lease.

    Returns:
      The lease; None in the other processes.
    """

    def stop_if_requested() -> None:
        number = signals.signal_received
        if number is not None:
            raise Stopped(
                f"{signal.Signals(number).name}: stopped while waiting for the lease of "
                f"'{setup.workdir}'; there was nothing to save yet; rerun the command",
                number,
            )

    lease = None
    with distributed.raise_on_all_processes():
        if distributed.is_first_process():
            create_workdir(setup.workdir)
            lease = stack.enter_context(
                acquire(setup.workdir, interrupted=stop_if_requested)
            )
    return lease

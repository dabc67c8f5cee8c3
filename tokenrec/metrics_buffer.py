"""Metrics of steps that the devices may still be working on."""

from __future__ import annotations

import dataclasses
import sys
from typing import NamedTuple

import jax
import numpy as np

from tokenrec.checkpoint.progress import Progress
from tokenrec.config import OptimConfig
from tokenrec.errors import NonFiniteError
from tokenrec.runtime import distributed
from tokenrec.runtime.throughput import Throughput
from tokenrec.step import Metrics

_LISTED_ROWS = 8


class _Entry(NamedTuple):
    metrics: Metrics
    log_rows: np.ndarray
    timed: bool
    model_flops: float


class MetricsBuffer:
    """Metrics of the steps since the host last waited for the devices.

    Fetching the metrics of every step would make the host wait for each of them, and
    the devices for the host. So they stay on the devices until a log line, an
    evaluation or a checkpoint is due. Bad steps are noticed then.
    """

    def __init__(self, throughput: Throughput, optim: OptimConfig) -> None:
        self._throughput = throughput
        self._optim = optim
        self._entries: list[_Entry] = []
        self._timed_steps = 0
        self._timed_examples = 0
        self._timed_flops = 0.0
        self._input_seconds = 0.0

    def add(
        self,
        metrics: Metrics,
        log_rows: np.ndarray,
        *,
        timed: bool,
        model_flops: float = 0.0,
    ) -> None:
        """Keep the metrics of a step.

        Args:
          metrics: scalars on the devices.
          log_rows: `[B, T] int64`, rows of the training log that this process read for
            the batch, negative for padding.
          timed: False for a step that compiled, which counts for no rate.
          model_flops: FLOPs that the step needs, over all devices; 0 if unknown.
        """
        self._entries.append(_Entry(metrics, log_rows, timed, model_flops))

    def add_input_wait(self, seconds: float) -> None:
        """Count seconds that the host waited for a batch."""
        self._input_seconds += seconds

    def flush(self, progress: Progress) -> tuple[dict[str, float], Progress]:
        """Wait for the devices and check every step since the last flush.

        The means start anew at every flush, also at those of evaluations and saves,
        whose means are not logged: a run that is resumed there then logs the same
        numbers as one that was not interrupted.

        Returns:
          Means of the steps whose update was made (`loss`, `grad_norm`), the largest
          number of exchange rounds if tables are spread over devices, and the number of
          skipped steps of the run if there are any; and the progress with that number.

        Raises:
          NonFiniteError: on all processes, if more than `optim.max_skipped` steps were
            skipped; names the step and the log rows that this process read for it.
        """
        entries = self._entries
        self._entries = []
        fetched: list[Metrics] = jax.device_get([entry.metrics for entry in entries])
        first = progress.step - len(entries)
        for step, (metrics, entry) in enumerate(
            zip(fetched, entries, strict=True), first
        ):
            if entry.timed:
                self._throughput.add(int(metrics.examples))
                self._timed_steps += 1
                self._timed_examples += int(metrics.examples)
                self._timed_flops += entry.model_flops
            if not metrics.applied:
                skipped = progress.skipped + 1
                progress = dataclasses.replace(progress, skipped=skipped)
                self._report_skipped_step(step, metrics, entry.log_rows, skipped)

        values: dict[str, float] = {}
        applied = [metrics for metrics in fetched if metrics.applied]
        if applied:
            for name in ("loss", "grad_norm"):
                values[name] = float(np.mean([getattr(m, name) for m in applied]))
        rounds = max((int(metrics.rounds) for metrics in fetched), default=0)
        if rounds:
            values["exchange_rounds"] = rounds
        if progress.skipped:
            values["skipped"] = progress.skipped
        return values, progress

    def timings(self) -> dict[str, float | None]:
        """Speed since the last call, without compilation, evaluation and saves.

        Returns:
          `examples_per_second`; `step_seconds`, the mean time of a step;
          `input_seconds`, the part of it in which the host waited for a batch; and, if
          FLOPs are known, `model_flops_per_second`, over all devices.
        """
        rate = self._throughput.rate()
        values: dict[str, float | None] = {"examples_per_second": rate}
        if rate and self._timed_steps:
            seconds = self._timed_examples / rate
            values["step_seconds"] = seconds / self._timed_steps
            values["input_seconds"] = self._input_seconds / self._timed_steps
            if self._timed_flops:
                values["model_flops_per_second"] = self._timed_flops / seconds
        self._timed_steps = 0
        self._timed_examples = 0
        self._timed_flops = 0.0
        self._input_seconds = 0.0
        return values

    def _report_skipped_step(
        self, step: int, metrics: Metrics, log_rows: np.ndarray, skipped: int
    ) -> None:
        finite = np.isfinite(metrics.loss) and np.isfinite(metrics.grad_norm)
        spike = ""
        if finite:
            limit = self._optim.spike_norm
            spike = f", more than optim.spike_norm={limit:g} times its mean"
        problem = (
            f"step {step}: loss={metrics.loss}, gradient norm={metrics.grad_norm}"
            f"{spike}; the update was not made"
        )
        if skipped <= self._optim.max_skipped:
            if distributed.is_first_process():
                print(
                    f"tokenrec: {problem}; {skipped} of "
                    f"optim.max_skipped={self._optim.max_skipped}",
                    file=sys.stderr,
                )
            return
        rows = np.unique(log_rows[log_rows >= 0])
        listed = ", ".join(map(str, rows[:_LISTED_ROWS]))
        raise NonFiniteError(
            f"{problem}. {_local_batch()} read {len(rows)} rows of train: {listed}, "
            f"...; `tokenrec replay --step {step}` shows more. Lower "
            "optim.learning_rate or optim.clip_norm, look for extreme values in these "
            "rows, or let the run continue without such steps: "
            f"optim.max_skipped={skipped}"
        )


def _local_batch() -> str:
    count = jax.process_count()
    if count == 1:
        return "Its batch"
    return f"Of its batch, process {jax.process_index()} of {count}"

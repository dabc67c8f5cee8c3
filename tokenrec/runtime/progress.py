"""Progress of a run on stderr: a bar on a terminal, otherwise plain lines."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import SupportsFloat

from tqdm import tqdm

from tokenrec.runtime.metric_writer import finite_values
from tokenrec.runtime.result_table import format_cell
from tokenrec.runtime.throughput import Throughput

# Training metrics that the display shows.
LOSS = "loss"
EXAMPLES_PER_SECOND = "examples_per_second"

TRAINING = "train"
# Without a terminal every fifth log of training is printed.
_LOGS_PER_LINE = 5
# The times come from `Throughput`: those of tqdm include compilation and evaluation.
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps{postfix}"


class ProgressDisplay:
    """Show the step, the loss, the speed and the time left; a `MetricWriter`.

    On a terminal the display is a bar. Otherwise it is a plain line for every fifth log
    of training. Metrics under another prefix than "train" are always a line. Time and
    speed are those of training: compilation, evaluation and saves do not count.

    Args:
      throughput: the run's timer.
      total_steps: step at which the run ends.
      start_step: step at which it starts.
      enabled: False shows nothing (`--quiet`, and all processes but the first).
    """

    def __init__(
        self,
        throughput: Throughput,
        *,
        total_steps: int,
        start_step: int = 0,
        enabled: bool = True,
    ) -> None:
        self._throughput = throughput
        self._total_steps = total_steps
        self._step = start_step
        self._enabled = enabled
        self._phase = TRAINING
        self._training_logs = 0
        self._bar: tqdm | None = None
        if enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                desc=TRAINING,
                bar_format=_BAR,
                dynamic_ncols=True,
                file=sys.stderr,
            )

    def show_phase(self, phase: str = TRAINING) -> None:
        """Show what the run does now, e.g. "compiling"; call it again when that ends."""
        if not self._enabled or phase == self._phase:
            return
        self._phase = phase
        if self._bar is not None:
            # Drawn at once: a compilation can take minutes.
            self._bar.set_description_str(phase)
        elif phase != TRAINING:
            self._print(f"{self._position()}  {phase}")

    def write(
        self,
        step: int,
        values: Mapping[str, SupportsFloat | None],
        prefix: str = TRAINING,
    ) -> None:
        """Show the metrics of a step.

        Args:
          step: number of updates made so far.
          values: metric name -> number; None if undefined.
          prefix: group of the metrics.
        """
        self._step = step
        if not self._enabled:
            return
        numbers = finite_values(values)
        if prefix == TRAINING:
            self._show_training(numbers)
            return
        # Metrics of single tasks, "TASK/NAME", would make the line too long.
        texts = [
            f"{name} {format_cell(number)}"
            for name, number in numbers.items()
            if "/" not in name
        ]
        if texts:
            self._print(f"{prefix} at step {step:,}: {'  '.join(texts)}")

    def close(self) -> None:
        """Close the bar; further calls do nothing."""
        if self._bar is not None:
            self._bar.close()

    def _show_training(self, numbers: Mapping[str, float | None]) -> None:
        texts = []
        if LOSS in numbers:
            texts.append(f"loss {format_cell(numbers[LOSS])}")
        speed = numbers.get(EXAMPLES_PER_SECOND)
        if speed is not None:
            texts.append(f"{speed:,.0f} examples/s")
        left = self._time_left()
        if self._bar is not None:
            if left:
                trained = tqdm.format_interval(self._throughput.training_seconds)
                texts.append(f"[{trained} trained, {left} left]")
            # `update` draws the bar once, with the new text.
            self._bar.set_postfix_str("  ".join(texts), refresh=False)
            self._bar.update(self._step - self._bar.n)
            return
        is_last = self._step == self._total_steps
        if self._training_logs % _LOGS_PER_LINE == 0 or is_last:
            if left:
                texts.append(f"{left} left")
            self._print("  ".join([self._position(), *texts]))
        self._training_logs += 1

    def _position(self) -> str:
        return f"step {self._step:,}/{self._total_steps:,}"

    def _time_left(self) -> str:
        """Training time of the remaining steps; empty before a step was timed."""
        seconds = self._throughput.seconds_per_step()
        if seconds is None:
            return ""
        return tqdm.format_interval(seconds * (self._total_steps - self._step))

    def _print(self, line: str) -> None:
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            # tqdm clears the bar, prints the line above it and draws the bar again.
            tqdm.write(line, file=sys.stderr)

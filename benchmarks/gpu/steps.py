"""Stage 4: whole train steps of large models, beside PyTorch, and a profile.

    python -m benchmarks.gpu.steps --out OUT [--rehearse]

Models are those of `benchmarks.gpu.step_models`. Each library runs in a process of its
own, one at a time. Ours compile at the same time beforehand, while nothing is timed.

- `examples_per_second`: log rows that carry loss (UC), or scored candidates (NIO).
- `mfu`: FLOPs that the model needs (`tokenrec/planner/flops.py`: no recomputation,
  visible pairs only) per second, over the bfloat16 matrix product of `limits`;
  `mfu_sheet` over the data sheet's. PyTorch's model needs the same FLOPs.
- `peak_gib`: most memory in use; `planned_gib`: what the compiler planned.

The peer is `benchmarks/peers/torch_tokenformer.py`: torch.compile, causal SDPA in full
layers and flex_attention in others, bfloat16 by autocast, fused AdamW, Adagrad with
sparse gradients for long tables. "steps, costliest kernels" has milliseconds of one
step of ours.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Sequence
from typing import Any

from benchmarks.gpu.record import ERROR, LEFT_OUT, Recorder, run_stage

# Case, library and the seconds that it may take once it is ready; most important first.
RUNS = (
    ("lrm_1b", "tokenrec", 20),
    ("uc_2048", "tokenrec", 15),
    ("uc_2048", "torch", 45),
    ("lrm_1b", "torch", 45),
    ("nio", "tokenrec", 8),
    ("nio", "torch", 30),
    ("nio_4096", "tokenrec", 8),
    ("nio_4096", "torch", 30),
)
PROFILED = ("lrm_1b", "uc_2048")
REHEARSED = ("lrm_1b", "uc_2048", "nio")
# Seconds that a preparation may take, and that an answer is waited for at most.
PREPARATION, LONGEST_WAIT = 90, 3600
# Of the issue that asked for these figures.
GOAL_CASE, GOAL_MFU = "lrm_1b", 0.45


class Worker:
    """A process of `benchmarks.gpu.step_worker`: a context manager that ends it."""

    def __init__(self, case: str, library: str, *, rehearse: bool) -> None:
        command = [sys.executable, "-m", "benchmarks.gpu.step_worker"]
        command += ["--case", case, "--library", library, *["--rehearse"] * rehearse]
        # For PyTorch, JAX is there for the sizes alone.
        platform = {"JAX_PLATFORMS": "cpu"} if library == "torch" else {}
        self._process = subprocess.Popen(
            command,
            env=os.environ | platform,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process, wherever it is, and give its memory back."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """The next answer; `{"error": ...}` if none comes, None at the end."""
        seconds = min(max(seconds, 0.01), LONGEST_WAIT)
        try:
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            return {"error": f"no answer within {seconds:.0f} s"}
        return None if line is None else json.loads(line)

    def start(self, request: dict[str, Any]) -> None:
        """Send the word."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()

    def end(self) -> int:
        """Wait for a process that has closed its output; returns its exit status."""
        return self._process.wait(timeout=LONGEST_WAIT)


class Steps:
    """The runs of the stage.

    Args:
      recorder: gets the rows.
      peak: FLOP/s of a bfloat16 product; None if it is not known.
    """

    def __init__(self, recorder: Recorder, peak: float | None) -> None:
        self._recorder = recorder
        self._peak = peak
        # Rows by case and library.
        self._rows: dict[tuple[str, str], dict[str, Any]] = {}

    def run(self, case: str, library: str, worker: Worker, seconds: float) -> None:
        """Let a prepared worker run, and add its rows."""
        named = {"case": case, "library": library}
        if self._recorder.out_of_time(seconds, table="steps", **named):
            return
        profile = case in PROFILED and library == "tokenrec"
        turns = 0.1 if self._recorder.rehearse else 3.0
        worker.start({"seconds": turns, "profile": profile})
        while (answer := worker.answer(self._recorder.remaining())) is not None:
            if "done" in answer:
                # It holds the memory of the card until it has ended.
                worker.stop()
                return
            if "error" in answer:
                reason = answer["error"]
                self._recorder.add(table="steps", **named, result=ERROR, reason=reason)
                worker.stop()
                return
            for kernel in answer.get("kernels", ()):
                self._recorder.add(
                    table="steps, costliest kernels", case=case, **kernel
                )
            if "row" in answer:
                self._add(named, answer["row"])
        reason = f"the process ended with {worker.end()}"
        self._recorder.add(table="steps", **named, result=ERROR, reason=reason)

    def _add(self, named: dict[str, str], row: dict[str, Any]) -> None:
        case, library = named["case"], named["library"]
        flops = row.pop("model_flops", None)
        sheet = row.pop("sheet_flops", None)
        if library == "torch" and (case, "tokenrec") in self._rows:
            ours = self._rows[case, "tokenrec"]
            flops, sheet = ours["model_flops"], ours["sheet_flops"]
        rate = flops and flops / (row["step_ms"] / 1e3)
        shares = {
            "model_tflops": rate and rate / 1e12,
            "mfu": rate / self._peak if rate and self._peak else None,
            "mfu_sheet": rate / sheet if rate and sheet else None,
        }
        self._recorder.add(table="steps", **named, **(row | shares))
        self._rows[case, library] = (
            row | shares | {"model_flops": flops, "sheet_flops": sheet}
        )

    def compare(self) -> None:
        """Add the ratios to PyTorch and the goal."""
        for (case, library), row in self._rows.items():
            peer = self._rows.get((case, "torch"))
            if library == "tokenrec" and peer is not None:
                ratio = peer["step_ms"] / row["step_ms"]
                self._recorder.add(
                    table="steps, beside PyTorch",
                    case=case,
                    ours_over_torch=ratio,
                    ours_ms=row["step_ms"],
                    torch_ms=peer["step_ms"],
                )
        row = self._rows.get((GOAL_CASE, "tokenrec"))
        if row is not None:
            self._recorder.add(
                table="steps, goals",
                goal=f"MFU of {GOAL_CASE}",
                least=GOAL_MFU,
                mfu=row["mfu"],
                reached=row["mfu"] and ("yes" if row["mfu"] >= GOAL_MFU else "NO"),
            )


def prepare(
    recorder: Recorder,
    stack: contextlib.ExitStack,
    runs: Sequence[tuple[str, str, float]],
) -> dict[tuple[str, str], Worker]:
    """Start workers, and wait until each is ready or has failed.

    Args:
      recorder: gets a row for each that is not ready.
      stack: ends the workers.
      runs: case, library and seconds of each.

    Returns:
      Those that are ready, by case and library.
    """
    workers: dict[tuple[str, str], Worker] = {}
    for case, library, _ in runs:
        if library == "torch" and importlib.util.find_spec("torch") is None:
            recorder.add(
                table="steps",
                case=case,
                library=library,
                result=LEFT_OUT,
                reason="PyTorch is not installed",
            )
            continue
        worker = Worker(case, library, rehearse=recorder.rehearse)
        workers[case, library] = stack.enter_context(worker)
    ready = {}
    for (case, library), worker in workers.items():
        answer = worker.answer(
            recorder.remaining()
            if recorder.rehearse
            else min(PREPARATION, recorder.remaining())
        )
        if answer is not None and "ready" in answer:
            ready[case, library] = worker
            continue
        reason = (answer or {}).get("error", "the process ended before it was ready")
        recorder.add(
            table="steps", case=case, library=library, result=ERROR, reason=reason
        )
        worker.stop()
    return ready


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    steps = Steps(recorder, recorder.measured_peaks().get("bfloat16"))
    # Two cores rehearse one model at a time, and each once.
    groups = [[run] for run in RUNS if run[0] in REHEARSED]
    for group in groups if recorder.rehearse else [RUNS]:
        with contextlib.ExitStack() as stack:
            workers = prepare(recorder, stack, group)
            for case, library, seconds in group:
                if (case, library) in workers:
                    needed = 0 if recorder.rehearse else seconds
                    steps.run(case, library, workers[case, library], needed)
    steps.compare()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("steps", __doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())

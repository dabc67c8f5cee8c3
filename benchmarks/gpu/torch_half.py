"""The stage's end of the pipe to `benchmarks.gpu.torch_worker`."""

from __future__ import annotations

import importlib.util
import json
import os
import queue
import subprocess
import sys
import threading
from typing import Any

from benchmarks.gpu.attention_timing import measured
from benchmarks.gpu.record import ERROR, LEFT_OUT, Recorder


class TorchHalf:
    """A process that times PyTorch's attention: a context manager that ends it.

    It is started at once, so that it imports PyTorch while JAX compiles, and uses the
    device only between a request and its answers.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()
        if importlib.util.find_spec("torch") is None:
            return
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.gpu.torch_worker"],
            # JAX is there for the shapes of the specs alone.
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def __enter__(self) -> TorchHalf:
        return self

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def time(
        self,
        recorder: Recorder,
        table: str,
        request: dict[str, Any],
        peak: float | None,
    ) -> list[dict[str, Any]]:
        """Add PyTorch's rows of one length; returns those that were timed.

        Args:
          recorder: gets the rows.
          table: their table.
          request: as `benchmarks.gpu.torch_worker` says.
          peak: FLOP/s of a matrix product; None if it is not known.
        """
        row = {"seq_len": request["seq_len"], "implementation": "torch"}
        if self._process is None:
            recorder.add(
                table=table, **row, result=LEFT_OUT, reason="PyTorch is not installed"
            )
            return []
        if recorder.out_of_time(15, table=table, **row):
            return []
        assert self._process.stdin is not None
        rows = []
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            while True:
                line = self._lines.get(timeout=max(recorder.remaining(), 0.01))
                if line is None:
                    raise BrokenPipeError
                answer = json.loads(line)
                if answer.get("done"):
                    return rows
                if flops := answer.pop("useful_flops", None):
                    seconds = answer["milliseconds"] / 1e3
                    answer |= measured(seconds, flops, peak)
                    rows.append(answer)
                recorder.add(table=table, **answer)
        except queue.Empty:
            recorder.add(table=table, **row, result=LEFT_OUT, reason="out of time")
        except BrokenPipeError:
            code = self._process.wait()
            recorder.add(
                table=table,
                **row,
                result=ERROR,
                reason=f"the process of PyTorch ended with {code}",
            )
        # What is late would be taken for the answer of the next request.
        self._process.kill()
        self._process = None
        return rows

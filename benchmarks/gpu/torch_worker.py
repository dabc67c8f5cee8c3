"""PyTorch's half of the stage `attention`: a process of its own.

A crash of one framework must not take the other along, and each manages the memory of
the device in its own way. The stage writes a request per line to this process, and
reads rows, one JSON object per line, until `{"done": true}`:

    {"seq_len": 8192, "windows": [256, null, 64], "batch": 4, "heads": 8,
     "head_dim": 64, "target": 0.05}

`target` is the seconds of a measurement. A window takes compiled flex_attention with a
block mask; full attention takes SDPA, causal, with the flash and the cuDNN back end, as
well. Inputs are those of the stage. Short calls are recorded in a CUDA graph, so that
neither the launches nor the interpreter count; `launched_ms` is without.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import numpy as np
import torch

from benchmarks.attention_cases import PASSES, useful_flops
from benchmarks.attention_specs import AttentionSpec, causal_spec
from benchmarks.gpu.clock import median_seconds
from benchmarks.gpu.record import ERROR, ERROR_CHARACTERS, FAIL, LEFT_OUT, PASS
from benchmarks.gpu.reference import Sample, draw_inputs
from benchmarks.peers import torch_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Seconds of a call above which its launch does not count.
LONG_SECONDS = 1e-3
GRAPH_CALLS = 10
TOLERANCE = 0.02

Run = Callable[[], tuple[torch.Tensor, ...]]


def seconds_of(run: Callable[[], Any], target: float) -> float:
    """Median seconds of a call, of several that are queued between two events."""

    def seconds(count: int) -> float:
        if DEVICE == "cpu":
            begin = time.perf_counter()
            for _ in range(count):
                run()
            return (time.perf_counter() - begin) / count
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        for _ in range(count):
            run()
        last.record()
        torch.cuda.synchronize()
        return first.elapsed_time(last) / 1e3 / count

    return median_seconds(seconds, target=target)


def graph_seconds(run: Run, target: float) -> float:
    """Median seconds of a call inside a CUDA graph of `GRAPH_CALLS`."""
    # The calls before a capture must run on another stream than the current one.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            run()
    return seconds_of(graph.replay, target) / GRAPH_CALLS


def attends(seq_len: int, window: int | None) -> dict[str, Callable[[], Any]]:
    """Name -> function that makes the variant of a length and window."""
    made: dict[str, Callable[[], Any]] = {}
    if window is None:
        made = {
            name: functools.partial(torch_attention.sdpa_backend, name)
            for name in torch_attention.BACKENDS
        }
    made[torch_attention.FLEX] = functools.partial(
        torch_attention.flex, seq_len, window, device=DEVICE
    )
    return made


def refusal(name: str, pass_: str) -> str:
    """Why a variant does not run on a CPU, or ""; a GPU serves all."""
    if DEVICE != "cpu":
        return ""
    if name == "torch SDPA cuDNN":
        return "it needs a GPU"
    if name == torch_attention.FLEX:
        return torch_attention.flex_unsupported_reasons()[pass_ == "forward_backward"]
    return ""


def tensors_of(inputs: tuple[np.ndarray, ...]) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output, `[B, H, S, h] bfloat16`."""
    return tuple(
        torch.from_numpy(x.astype(np.float32).swapaxes(1, 2).copy()).to(
            DEVICE, torch.bfloat16
        )
        for x in inputs
    )


def call_of(
    attend: torch_attention.Attend, tensors: tuple[torch.Tensor, ...], pass_: str
) -> Run:
    """A call of one pass; without gradients, the tensors require none."""
    if pass_ == "forward":
        return functools.partial(torch_attention.forward, attend, tensors)
    leaves = tuple(x.detach().requires_grad_(True) for x in tensors[:3])
    return functools.partial(
        torch_attention.forward_backward, attend, (*leaves, tensors[3])
    )


def time_one(
    run: Run, spec: AttentionSpec, pass_: str, sample: Sample, target: float
) -> dict[str, Any]:
    """Compare a variant with the reference, and time it."""
    # Heads first -> `[B, S, H, h]`.
    arrays = [x.float().cpu().numpy().swapaxes(1, 2) for x in run()[:2]]
    error = sample.error(*arrays)
    launched = seconds_of(run, target)
    seconds, timed, note = launched, "launches", None
    if DEVICE == "cuda" and launched < LONG_SECONDS:
        try:
            seconds, timed = graph_seconds(run, target), "graph"
        except RuntimeError as failure:
            note = f"no CUDA graph: {failure}"[:200]
    return {
        "milliseconds": 1e3 * seconds,
        "useful_flops": useful_flops(spec, pass_),
        "launched_ms": 1e3 * launched,
        "timed": timed,
        "error": error,
        "result": PASS if error <= TOLERANCE else FAIL,
        "note": note,
    }


def rows(request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for every window, variant and pass of a request."""
    seq_len = request["seq_len"]
    sizes = {name: request[name] for name in ("batch", "heads", "head_dim")}
    for window in request["windows"]:
        spec = causal_spec(seq_len, seq_len, window, dtype="bfloat16", **sizes)
        inputs = draw_inputs(spec)
        sample, tensors = Sample(spec, inputs), tensors_of(inputs)
        for name, make in attends(seq_len, window).items():
            made = functools.cache(make)
            for pass_ in PASSES:
                row = {
                    "seq_len": seq_len,
                    "window": window or "full",
                    "pass": pass_,
                    "implementation": name,
                }
                if reason := refusal(name, pass_):
                    yield row | {"result": LEFT_OUT, "reason": reason}
                    continue
                try:
                    run = call_of(made(), tensors, pass_)
                    row |= time_one(run, spec, pass_, sample, request["target"])
                # Of a compiler and a driver: any kind of error.
                except Exception as error:  # noqa: BLE001 - a result like others
                    text = " ".join(f"{type(error).__name__}: {error}".split())
                    row |= {"result": ERROR, "reason": text[:ERROR_CHARACTERS]}
                yield row


def main(requests: TextIO, answers: TextIO) -> None:
    """Answer requests until the stage closes the pipe."""

    def say(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    for line in requests:
        for row in rows(json.loads(line)):
            say(row)
        say({"done": True})


if __name__ == "__main__":
    # Libraries may print to standard output: rows go through a copy of it.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, answers)

"""Stage 3: attention of this library beside PyTorch and `jax.nn`, in bfloat16.

    python -m benchmarks.gpu.attention --out OUT [--rehearse]

`milliseconds` are those of the device: calls run in a compiled loop, PyTorch's short
ones in a CUDA graph; `launched_ms` has a launch for each call. `tflops` is useful work
(`benchmarks.attention`), `peak_share` its share of the bfloat16 matrix product of
`limits`. Before the clock runs, output and gradient of q of some queries are compared
with float64 (`error`).

Per length and window, "attention, winners" has the fastest of ours, what `auto` takes,
and both beside full flash attention of the same length and flex_attention of the same
window; above 1, ours is faster. "attention, streams" has layers that cuDNN refuses or
whose shapes are those of models: static tokens, candidates, padding.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.attention_specs import Stream, causal_spec, stream_specs
from benchmarks.gpu.attention_timing import Named, target_seconds, time_specs
from benchmarks.gpu.record import Recorder, run_stage
from benchmarks.gpu.torch_half import TorchHalf
from tokenrec.ops.attention import IMPLEMENTATIONS

SIZES = {"batch": 4, "heads": 8, "head_dim": 64}
# The most important first, in case the time runs out.
SEQ_LENS, WINDOWS = (8192, 2048, 32768, 512), (256, None, 64)
REHEARSED_SIZES = {"batch": 1, "heads": 2, "head_dim": 16}
REHEARSED_SEQ_LENS, REHEARSED_WINDOWS = (128,), (32, None)
# Streams are timed after so many lengths.
STREAMS_AFTER = 2
# Streams of 2,048 tokens: a full layer and two sliding ones over static tokens,
# in NIO with candidates.
STREAMS = {
    "uc": Stream(
        events=1016,
        candidates=0,
        target_tokens=1,
        fused=False,
        user_tokens=15,
        windows=(None, 256, 64),
    ),
    "nio, 20 candidates": Stream(
        events=996,
        candidates=20,
        target_tokens=2,
        fused=False,
        user_tokens=14,
        windows=(None, 256, 64),
    ),
}
REHEARSED_STREAMS = {
    "nio, 3 candidates": Stream(
        events=20,
        candidates=3,
        target_tokens=2,
        fused=False,
        user_tokens=2,
        windows=(16,),
    )
}
FLASH, FLEX = "torch SDPA flash", "torch flex_attention, compiled"
# Of the issue that asked for these figures: S, w and the least ratios.
GOAL_SEQ_LEN, GOAL_WINDOW, GOAL_OVER_FLASH, GOAL_OVER_FLEX = 8192, 256, 4.0, 1.0


def causal(seq_len: int, windows: Iterable[int | None], sizes: Any) -> list[Named]:
    """Plain causal specs of one length."""
    return [
        Named(
            {"seq_len": seq_len, "window": window or "full"},
            causal_spec(seq_len, seq_len, window, dtype="bfloat16", **sizes),
            plain=True,
        )
        for window in windows
        if window is None or window < seq_len
    ]


def streams(
    named: dict[str, Stream], sizes: Any, every: tuple[bool, ...] = (True, False)
) -> list[Named]:
    """Every layer of some streams, over all tokens and over those that are needed.

    Args:
      named: the streams.
      sizes: batch, heads and width of a head.
      every: for each, whether all tokens are computed, or those that are needed.
    """
    return [
        Named(
            {
                "stream": name,
                "tokens": "all" if every_token else "needed",
                "window": spec.window or "full",
                "queries": spec.queries,
                "keys": spec.keys,
            },
            spec.replace(dtype="bfloat16", **sizes),
            plain=False,
        )
        for name, stream in named.items()
        for every_token in every
        for spec in stream_specs(stream, every_token=every_token)
    ]


def winners(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The fastest of ours per shape and pass, `auto`'s choice, and their ratios.

    Args:
      rows: timed rows; columns other than those of a measurement name the shape.
    """
    shapes: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    names = ("stream", "tokens", "seq_len", "window", "queries", "keys", "pass")
    for row in rows:
        shape = tuple((name, row[name]) for name in names if name in row)
        shapes.setdefault(shape, {})[row["implementation"]] = row
    found = []
    for shape, by_name in shapes.items():
        ours = {name: row for name, row in by_name.items() if name in IMPLEMENTATIONS}
        if not ours:
            continue
        best = min(ours, key=lambda name: ours[name]["milliseconds"])
        auto = next((name for name, row in ours.items() if row.get("auto")), None)
        full = shapes.get(tuple(dict(shape, window="full").items()), {}).get(FLASH)
        flex = by_name.get(FLEX)
        taken = ours[auto]["milliseconds"] if auto else None
        found.append(
            dict(shape)
            | {
                "fastest of ours": best,
                "ms": ours[best]["milliseconds"],
                "auto": auto,
                "auto, ms": taken,
                "auto / fastest": taken and taken / ours[best]["milliseconds"],
                "x of full flash": _ratio(full, taken),
                "x of flex": _ratio(flex, taken),
            }
        )
    return found


def _ratio(peer: dict[str, Any] | None, ours: float | None) -> float | None:
    return peer["milliseconds"] / ours if peer and ours else None


def add_goals(recorder: Recorder, found: list[dict[str, Any]]) -> None:
    """Say whether the goals are reached, from what `auto` takes."""
    for row in found:
        if (row.get("seq_len"), row["window"]) != (GOAL_SEQ_LEN, GOAL_WINDOW):
            continue
        goals = [("x of full flash", GOAL_OVER_FLASH)]
        if row["pass"] == "forward_backward":
            goals.append(("x of flex", GOAL_OVER_FLEX))
        for column, least in goals:
            ratio = row[column]
            recorder.add(
                table="attention, goals",
                goal=f"{row['pass']} {column} at {GOAL_SEQ_LEN}, window {GOAL_WINDOW}",
                least=least,
                ratio=ratio,
                reached=None if ratio is None else ("yes" if ratio >= least else "NO"),
            )


def measure(recorder: Recorder) -> None:
    """Add the rows of this stage."""
    # JAX keeps the memory that it has once taken; PyTorch needs the rest. It is read
    # when JAX first looks for devices.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")
    tiny = recorder.rehearse
    sizes = REHEARSED_SIZES if tiny else SIZES
    lengths = REHEARSED_SEQ_LENS if tiny else SEQ_LENS
    windows = REHEARSED_WINDOWS if tiny else WINDOWS
    target = target_seconds(recorder)
    peak = recorder.peaks().get("bfloat16")
    with TorchHalf() as torch_half:
        for number, seq_len in enumerate(lengths, start=1):
            rows = time_specs(
                recorder, "attention", causal(seq_len, windows, sizes), peak
            )
            rows += torch_half.time(
                recorder,
                "attention",
                {"seq_len": seq_len, "windows": list(windows), "target": target}
                | sizes,
                peak,
            )
            found = winners(rows)
            for row in found:
                recorder.add(table="attention, winners", **row)
            add_goals(recorder, found)
            if number == min(STREAMS_AFTER, len(lengths)):
                chosen = (
                    streams(REHEARSED_STREAMS, sizes, (True,))
                    if tiny
                    else streams(STREAMS, sizes)
                )
                rows = time_specs(recorder, "attention, streams", chosen, peak)
                for row in winners(rows):
                    recorder.add(table="attention, stream winners", **row)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage."""
    return run_stage("attention", __doc__, measure, argv)


if __name__ == "__main__":
    sys.exit(main())

"""Times of this library's attention, and of `jax.nn`, for a list of specs.

Programs of one list are compiled at the same time, and timed when all are compiled: a
compilation measures matrix products on the device.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_cases import PASSES, logits_gib, useful_flops
from benchmarks.attention_specs import AttentionSpec
from benchmarks.gpu.choices import choice, refusal
from benchmarks.gpu.clock import Looped
from benchmarks.gpu.record import FAIL, PASS, Recorder
from benchmarks.gpu.reference import Sample, draw_inputs
from tokenrec.ops.attention import attention, current_platform, implementations_of

JAX_NN = "jax.nn xla"
# Largest relative error of outputs and gradients in bfloat16. Measured on a CPU: 3e-3.
TOLERANCE = 0.02
# `dense` and `jax.nn` keep all logits: GiB of them in float32 that are tried.
MOST_LOGITS_GIB = 9.0
# A call that takes longer than this at a modest speed needs no loop: its launch is a
# few per cent of it at most.
LONG_SECONDS, MODEST_FLOPS = 2e-3, 5e13
LOOP_CALLS = 16
# Seconds of a measurement, and of one in a rehearsal.
TARGET, REHEARSED_TARGET = 0.05, 1e-3


class Named(NamedTuple):
    """A spec with the columns that name it.

    Attributes:
      columns: such as `seq_len` and `window`.
      spec: the arguments.
      plain: whether it is plain causal order, which `jax.nn` serves as well.
    """

    columns: dict[str, Any]
    spec: AttentionSpec
    plain: bool


class Contender(NamedTuple):
    """A pass of an implementation.

    Attributes:
      named: the spec.
      pass_: "forward" or "forward_backward".
      implementation: key of `IMPLEMENTATIONS`, or `JAX_NN`.
    """

    named: Named
    pass_: str
    implementation: str

    @property
    def row(self) -> dict[str, Any]:
        """Columns that name the row."""
        return self.named.columns | {
            "pass": self.pass_,
            "implementation": self.implementation,
        }


def contenders(named: Named) -> Iterator[Contender]:
    """Yield both passes of all that serve a spec, what `auto` takes first."""
    spec = named.spec
    names = [
        name
        for name in implementations_of(current_platform())
        if not refusal(spec, name)
    ]
    names.sort(key=lambda name: name != choice(spec).name)
    if named.plain:
        names.append(JAX_NN)
    for name in names:
        if name in ("dense", JAX_NN) and logits_gib(spec) > MOST_LOGITS_GIB:
            continue
        for pass_ in PASSES:
            yield Contender(named, pass_, name)


def attend_of(spec: AttentionSpec, implementation: str) -> Callable[..., jax.Array]:
    """The function `(q, k, v) -> out` of an implementation."""
    if implementation == JAX_NN:
        # A window of w keys is w - 1 keys to the left of the query and 0 to the right.
        window = None if spec.window is None else (spec.window - 1, 0)
        return functools.partial(
            jax.nn.dot_product_attention,
            is_causal=True,
            local_window_size=window,
            implementation="xla",
        )
    return functools.partial(
        attention,
        window=spec.window,
        implementation=implementation,
        pattern=spec.pattern,
        valid=None if spec.valid is None else jnp.asarray(spec.valid),
    )


def compile_contender(contender: Contender) -> Looped:
    """Compile a contender. It may run in any thread."""
    spec = contender.named.spec
    attend = attend_of(spec, contender.implementation)

    def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, ...]:
        return (attend(q, k, v),)

    def forward_backward(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(gradient)

    arrays = spec.arrays()
    long = useful_flops(spec, contender.pass_) > LONG_SECONDS * MODEST_FLOPS
    calls = 1 if long else LOOP_CALLS
    if contender.pass_ == "forward":
        return Looped(forward, arrays[:3], calls)
    return Looped(forward_backward, arrays, calls)


def time_specs(
    recorder: Recorder, table: str, specs: Sequence[Named], peak: float | None
) -> list[dict[str, Any]]:
    """Compile, compare and time all contenders of some specs.

    Args:
      recorder: gets a row for each.
      table: name of the rows' table.
      specs: the specs, in order of importance.
      peak: FLOP/s of a matrix product; None if it is not known.

    Returns:
      The rows.
    """
    entered = [contender for named in specs for contender in contenders(named)]
    rows: list[dict[str, Any]] = []
    target = target_seconds(recorder)
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        programs = [pool.submit(compile_contender, each) for each in entered]
        concurrent.futures.wait(programs, timeout=max(recorder.remaining() - 10, 0))
        inputs: tuple[Named | None, tuple[np.ndarray, ...]] = (None, ())
        for contender, program in zip(entered, programs, strict=True):
            row = contender.row
            if recorder.out_of_time(5, table=table, **row):
                continue
            with recorder.case(table=table, **row):
                looped = program.result(timeout=0)
                # The contenders of a spec follow each other and share its inputs.
                if inputs[0] is not contender.named:
                    inputs = contender.named, draw_inputs(contender.named.spec)
                    sample = Sample(contender.named.spec, inputs[1])
                row |= time_one(contender, looped, inputs[1], sample, peak, target)
                recorder.add(table=table, **row)
                rows.append(row)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return rows


def time_one(
    contender: Contender,
    looped: Looped,
    inputs: tuple[np.ndarray, ...],
    sample: Sample,
    peak: float | None,
    target: float,
) -> dict[str, Any]:
    """Compare a compiled contender with the reference, and time it.

    Returns:
      The columns that are measured.
    """
    spec = contender.named.spec
    arguments = [jax.device_put(x) for x in inputs]
    if contender.pass_ == "forward":
        arguments.pop()
    error = sample.error(*looped.single(*arguments)[:2])
    flops = useful_flops(spec, contender.pass_)
    queued = looped.queued(*arguments, target=target)
    seconds = looped.seconds(*arguments, target=target) if looped.calls > 1 else queued
    return {
        "auto": choice(spec).name == contender.implementation,
        **measured(seconds, flops, peak),
        "launched_ms": 1e3 * queued,
        "timed": "loop" if looped.calls > 1 else "launches",
        "error": error,
        "result": PASS if error <= TOLERANCE else FAIL,
    }


def target_seconds(recorder: Recorder) -> float:
    """Seconds that a measurement shall take."""
    return REHEARSED_TARGET if recorder.rehearse else TARGET


def measured(seconds: float, flops: float, peak: float | None) -> dict[str, Any]:
    """Columns of a time: milliseconds, useful TFLOP/s and their share of the peak."""
    return {
        "milliseconds": 1e3 * seconds,
        "tflops": flops / seconds / 1e12,
        "peak_share": flops / seconds / peak if peak else None,
    }

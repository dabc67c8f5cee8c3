"""Attention on the device against its definition in float64 on the CPU.

Every implementation of the platform computes named specs (`benchmarks.attention_specs`)
at the head width of the shipped configs, with its gradients, in each precision:

    float32, highest    products in float32
    float32             products as JAX takes them by default: TF32 on such a GPU
    bfloat16            inputs, outputs and gradients in bfloat16

The reference computes from the same rounded inputs. The error is the largest of the
relative errors `||x - reference|| / ||reference||` of output and gradients.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.attention_specs import (
    CAUSAL_SPECS,
    STREAMS,
    AttentionSpec,
    codes_specs,
    prefix_spec,
    stream_specs,
)
from benchmarks.gpu.choices import refusal
from benchmarks.gpu.record import PASS, Recorder
from benchmarks.gpu.reference import Result, draw_inputs, errors, reference
from tokenrec.ops.attention import (
    attention,
    current_platform,
    implementations_of,
)

TABLE = "attention values"
HEADS, HEAD_DIM = 2, 64
# Name -> dtype, matmul precision and tolerance, the most telling first. Measured on a
# CPU: 2.9e-3 in bfloat16 and 5.3e-7 in float32. TF32 has three more bits than bfloat16,
# so that 3.6e-4 is expected. The margins are 7x, 19x and 11x.
PRECISIONS: dict[str, tuple[str, str | None, float]] = {
    "bfloat16": ("bfloat16", None, 0.02),
    "float32, highest": ("float32", "highest", 1e-5),
    "float32": ("float32", None, 4e-3),
}


class Job(NamedTuple):
    """A program to compile and compare.

    Attributes:
      name: the spec's name.
      spec: the arguments.
      implementation: key of `IMPLEMENTATIONS`.
      precision: key of `PRECISIONS`.
    """

    name: str
    spec: AttentionSpec
    implementation: str
    precision: str


def named_specs(*, rehearse: bool) -> dict[str, AttentionSpec]:
    """Specs by name, those that a run needs first.

    Streams have static tokens, candidates, padding and, in upper layers, fewer queries
    than keys. A rehearsal takes one of each family.
    """
    specs: dict[str, AttentionSpec] = {}
    for stream in STREAMS:
        for layer, spec in enumerate(stream_specs(stream)):
            if layer == 1:  # as layer 0
                continue
            specs[f"{stream}, layer {layer}, window {spec.window or 'full'}"] = spec
    whole = stream_specs("nio", every_token=True)[2]
    specs["nio, every token, layer 2"] = whole
    specs |= {f"causal {name}": spec for name, spec in CAUSAL_SPECS.items()}
    for spec in codes_specs():
        specs[f"codes, window {spec.window or 'full'}"] = spec
    specs["bidirectional prefix"] = prefix_spec()
    specs["nio, static tokens kept"] = whole.replace(
        pattern=dataclasses.replace(whole.pattern, discard=False)
    )
    if rehearse:
        kept = (
            "nio, layer 2",
            "nio, static",
            "bidirectional",
        )
        specs = {name: spec for name, spec in specs.items() if name.startswith(kept)}
    return {
        name: spec.replace(heads=HEADS, head_dim=HEAD_DIM)
        for name, spec in specs.items()
    }


def make_jobs(specs: dict[str, AttentionSpec]) -> Iterator[Job]:
    """Yield what the implementations of this platform serve, in order of importance."""
    names = implementations_of(current_platform())
    for precision, (dtype, _, _) in PRECISIONS.items():
        for name, spec in specs.items():
            typed = spec.replace(dtype=dtype)
            for implementation in names:
                if not refusal(typed, implementation):
                    yield Job(name, typed, implementation, precision)


def compile_job(job: Job) -> jax.stages.Compiled:
    """Compile output and gradients. It may run in any thread."""
    spec = job.spec
    attend = functools.partial(
        attention,
        window=spec.window,
        implementation=job.implementation,
        pattern=spec.pattern,
        valid=None if spec.valid is None else jnp.asarray(spec.valid),
    )

    def forward_backward(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(gradient)

    precision = PRECISIONS[job.precision][1]
    with (
        jax.default_matmul_precision(precision)
        if precision
        else contextlib.nullcontext()
    ):
        return jax.jit(forward_backward).lower(*spec.arrays()).compile()


def compare(recorder: Recorder, seconds: float) -> None:
    """Add a row for every job that the time allows, and a summary.

    Args:
      recorder: the record.
      seconds: left of the budget when this must stop.
    """
    check_cudnn(recorder)
    jobs = list(make_jobs(named_specs(rehearse=recorder.rehearse)))
    expected: dict[tuple[str, str], tuple[tuple[np.ndarray, ...], Result]] = {}
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count())
    try:
        # XLA compiles without the lock of the interpreter.
        programs = [pool.submit(compile_job, job) for job in jobs]
        for job, program in zip(jobs, programs, strict=True):
            row = {
                "spec": job.name,
                "implementation": job.implementation,
                "precision": job.precision,
            }
            left = recorder.remaining() - seconds
            with recorder.case(table=TABLE, **row):
                try:
                    compiled = program.result(timeout=max(left, 0))
                except TimeoutError:
                    count = len(jobs) - jobs.index(job)
                    recorder.note(
                        f"Out of time: {count} of {len(jobs)} specs left out."
                    )
                    break
                key = job.name, job.spec.dtype
                if key not in expected:
                    inputs = draw_inputs(job.spec)
                    expected[key] = inputs, reference(job.spec, *inputs)
                inputs, wanted = expected[key]
                result = Result(*map(np.asarray, compiled(*inputs)))
                parts = errors(job.spec, result, wanted)
                add_row(recorder, row, parts, worst)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    for summary in worst.values():
        recorder.add(table=f"{TABLE}, worst", **summary)


def add_row(
    recorder: Recorder,
    row: dict[str, Any],
    parts: dict[str, float],
    worst: dict[tuple[str, str], dict[str, Any]],
) -> None:
    """Add a row, and keep the worst of its implementation and precision."""
    # NaN is as bad as infinity, and can be compared then.
    error = float(np.nan_to_num(list(parts.values()), nan=np.inf, posinf=np.inf).max())
    tolerance = PRECISIONS[row["precision"]][2]
    recorder.check(error, tolerance, table=TABLE, **row, **parts)
    key = row["implementation"], row["precision"]
    before = worst.get(key, {"specs": 0, "passed": 0, "error": -1.0})
    summary = {
        "implementation": key[0],
        "precision": key[1],
        "specs": before["specs"] + 1,
        "passed": before["passed"] + (error <= tolerance),
        "error": before["error"],
        "tolerance": tolerance,
        "of": before.get("of"),
    }
    if error > before["error"]:
        summary |= {"error": error, "of": row["spec"]}
    worst[key] = summary


def check_cudnn(recorder: Recorder) -> None:
    """Check that cuDNN serves plain causal order, the least that it must do.

    If it does not, `auto` passes it over in silence.
    """
    if current_platform() != "gpu":
        return
    spec = CAUSAL_SPECS["300 of 300, full"].replace(
        heads=HEADS, head_dim=HEAD_DIM, dtype="bfloat16"
    )
    reason = refusal(spec, "cudnn")
    recorder.add(
        table="cuDNN",
        serves="plain causal order",
        result="FAIL" if reason else PASS,
        reason=reason or None,
    )

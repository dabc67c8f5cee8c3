"""Attention on a CPU beside that of JAX and PyTorch, float32, forward and backward, in one process and one run.

pip install -c constraints.txt ".[peers]"     # PyTorch; torch.compile needs g++ or clang++ as well
python -m benchmarks.peers.attention

`jax.nn.dot_product_attention`, where its square of logits fits, and PyTorch: scaled_dot_product_attention (SDPA) causal
and with a banded mask, SDPA on blocks cut by hand, and compiled flex_attention with a block mask. Each library gets the
layout that it prefers, the same numbers and the same number of threads, and all take turns. Before the clock runs,
every output and gradient of PyTorch is compared with ours: `max_difference`. A peer that cannot serve keeps its row,
with the reason as a note. `this / ours` is the median of the ratios inside a turn; above 1, ours is faster. Between
turns the run sleeps a moment, as PyTorch's threads spin on after their work.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.attention_cases import (
    PASSES,
    Case,
    Sizes,
    compile_case,
    local_mesh,
    logits_gib,
    random_inputs,
    refusal,
)
from benchmarks.report import PACKAGES, run_script, write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention import IMPLEMENTATIONS

TOLERANCE = 1e-4  # of outputs and gradients of order 1; measured: a few 1e-6
PAUSE = 0.02  # seconds before each run

Key = tuple[int, int | None, str, str]  # length, window, name, pass


def arrays(result: Sequence[Any], *, by_head: bool) -> list[np.ndarray]:
    """The output, and gradients if there are any, as `[B, S, H, h]`."""
    return [np.asarray(x).swapaxes(1, 2) if by_head else np.asarray(x) for x in result]


def use_threads(count: int) -> None:
    """Ties the process to so many cores and PyTorch to as many threads; before JAX starts, which counts the cores.

    Raises:
      InputError: fewer cores than that.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise InputError(
            f"--threads {count}: this process may use {len(cores)} cores; use 1 to {len(cores)}"
        )
    os.sched_setaffinity(0, cores[:count])
    torch.set_num_threads(count)


def torch_runs(
    case: Case,
    inputs: Sequence[jax.Array],
    expected: Sequence[np.ndarray],
    mask_gib: float,
) -> Iterator[tuple[str, Run | None, float | None, str]]:
    """Name, run, largest difference from what is expected, and note; no run where PyTorch cannot serve."""
    import torch

    from benchmarks.peers import torch_attention

    backward = case.pass_ == "forward_backward"
    run = torch_attention.forward_backward if backward else torch_attention.forward
    tensors = tuple(
        torch.from_numpy(np.asarray(x).swapaxes(1, 2).copy()) for x in inputs
    )
    for tensor in tensors[:3]:
        tensor.requires_grad_(backward)
    ways, left_out = torch_attention.ways(
        case.seq_len, case.window, mask_gib, backward=backward
    )
    for name, attend in ways.items():
        result = arrays(run(attend, tensors), by_head=True)
        difference = max(
            float(np.abs(a - b).max()) for a, b in zip(result, expected, strict=True)
        )
        if not difference <= TOLERANCE:
            raise AssertionError(
                f"{name}, {case}: differs by {difference:.3g}, so it is not the same computation"
            )
        yield name, functools.partial(run, attend, tensors), difference, ""
    for name, reason in left_out.items():
        yield name, None, None, reason


def masked_by_jax(
    case: Case, sizes: Sizes, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """`jax.nn`'s attention, which on a CPU masks its window."""
    window = None if case.window is None else (case.window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, local_window_size=window
    )
    return compile_case(case, sizes, mesh, attend=attend)


def bench(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row per length, window, pass and contender."""
    sizes = Sizes(flags.batch, flags.heads, flags.head_dim)
    mesh = local_mesh("1x1x1", sizes)
    runs: dict[Key, Run] = {}
    found: dict[Key, tuple[float | None, str]] = {}
    for seq_len in flags.seq_lens:
        for window in [w for w in flags.windows if w is None or w < seq_len]:
            for pass_ in flags.passes:
                case = Case(
                    "1x1x1", seq_len, window, flags.implementation, "float32", pass_
                )
                if reason := refusal(case, sizes, mesh):
                    raise InputError(reason)
                inputs = random_inputs(case, sizes, mesh)
                mine = functools.partial(
                    compile_case(case, sizes, mesh),
                    *inputs[: 3 if pass_ == "forward" else 4],
                )
                expected = arrays(
                    (mine(),) if pass_ == "forward" else mine(), by_head=False
                )
                runs[seq_len, window, "tokenrec", pass_] = mine
                found[seq_len, window, "tokenrec", pass_] = None, ""
                if logits_gib(case, sizes) <= flags.mask_gib:
                    theirs = functools.partial(
                        masked_by_jax(case, sizes, mesh), *inputs[: len(mine.args)]
                    )
                    runs[seq_len, window, "jax.nn", pass_] = theirs
                    found[seq_len, window, "jax.nn", pass_] = None, ""
                for name, run, difference, note in torch_runs(
                    case, inputs, expected, flags.mask_gib
                ):
                    found[seq_len, window, name, pass_] = difference, note
                    if run is not None:
                        runs[seq_len, window, name, pass_] = run
    seconds = take_turns(runs, flags.repeats, pause=PAUSE)
    for (seq_len, window, name, pass_), (difference, note) in found.items():
        took = seconds.get((seq_len, window, name, pass_))
        ours = seconds[seq_len, window, "tokenrec", pass_]
        yield {
            "seq_len": seq_len,
            "window": window or "full",
            "implementation": f"tokenrec {flags.implementation}"
            if name == "tokenrec"
            else name,
            "pass": pass_,
            "milliseconds": took and 1e3 * statistics.median(took),
            "least_milliseconds": took and 1e3 * min(took),
            "tokens_per_second": took
            and sizes.batch * seq_len / statistics.median(took),
            "this / ours": took and paired_ratio(took, ours),
            "max_difference": difference,
            "note": note,
        }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-lens", nargs="+", type=int, default=[512, 2048, 8192])
    parser.add_argument(
        "--windows",
        nargs="+",
        default=["64", "256", "full"],
        help="keys seen; full: all",
    )
    parser.add_argument(
        "--implementation",
        default="blocked",
        help=f"ours: {', '.join(IMPLEMENTATIONS)}",
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=10, help="turns of each variant")
    parser.add_argument(
        "--mask-gib", type=float, default=1.0, help="no banded mask larger than this"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "results" / "attention_peers",
    )
    flags = parser.parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "the peers need PyTorch, which is not installed; pip install '.[peers]', or pip install torch"
        )
    if flags.implementation not in IMPLEMENTATIONS:
        known = suggest(flags.implementation, IMPLEMENTATIONS)
        raise InputError(f"--implementation {flags.implementation} is not known{known}")
    use_threads(flags.threads)
    words = [
        f"--{name.replace('_', '-')} {getattr(flags, name)}"
        for name in ("implementation", "threads", "repeats")
    ]
    words += [
        f"--{name.replace('_', '-')} {' '.join(map(str, getattr(flags, name)))}"
        for name in ("seq_lens", "windows")
    ]
    flags.windows = [
        None if text in ("full", "0") else int(text) for text in flags.windows
    ]
    params = {
        "batch": flags.batch,
        "heads": flags.heads,
        "head_dim": flags.head_dim,
        "dtype": "float32",
    }
    params |= {"threads": flags.threads, "turns": flags.repeats, "statistic": "median"}
    write_result(
        flags.out,
        list(bench(flags)),
        params,
        " ".join(["python -m benchmarks.peers.attention", *words]),
        title="Attention beside PyTorch",
        packages=(*PACKAGES, "torch"),
    )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)

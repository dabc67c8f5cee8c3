"""Attention on a CPU beside that of JAX and PyTorch, in one process and one run.

    pip install -c constraints.txt ".[peers]"
    python -m benchmarks.peers.attention

`torch.compile` needs g++ or clang++ as well. All figures are float32, forward, and
forward and backward. The peers:

- `jax.nn.dot_product_attention`, where its square of logits fits;
- PyTorch's scaled_dot_product_attention (SDPA), causal and with a banded mask;
- SDPA on blocks cut by hand;
- compiled flex_attention with a block mask.

Each library gets the layout that it prefers, the same numbers and the same number of
threads, and all take turns. Before the clock runs, every output and gradient of a peer
is compared with ours: `max_difference`. A peer that cannot serve keeps its row, with
the reason as a note. `this / ours` is the median of the ratios inside a turn; above 1,
ours is faster. Before each run the process sleeps a moment, as PyTorch's threads spin
on after their work.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.attention_cases import (
    PASSES,
    Case,
    Sizes,
    compile_attention,
    local_mesh,
    logits_gib,
    unsupported_reason,
)
from benchmarks.attention_specs import AttentionSpec
from benchmarks.report import PACKAGES, run_script, write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention import IMPLEMENTATIONS

# Largest difference between two libraries, of outputs and gradients of order 1.
# Measured: a few 1e-6.
TOLERANCE = 1e-4
# Seconds of sleep before each run.
PAUSE = 0.02

OURS = "tokenrec"
JAX_NN = "jax.nn"


class Contender(NamedTuple):
    """One variant of a run.

    Attributes:
      case: length, window and pass.
      name: `OURS`, `JAX_NN` or a name of `torch_attention`.
      run: the call to time; None if it cannot serve.
      difference: largest difference from our result; None for ours.
      note: why it cannot serve, or "".
    """

    case: Case
    name: str
    run: Run | None
    difference: float | None = None
    note: str = ""


def as_numpy(result: Sequence[Any], *, heads_first: bool) -> list[np.ndarray]:
    """Output and gradients as `[B, S, H, h]`, from `[B, H, S, h]` if `heads_first`."""
    arrays = [np.asarray(x) for x in result]
    return [x.swapaxes(1, 2) for x in arrays] if heads_first else arrays


def largest_difference(
    name: str, case: Case, result: list[np.ndarray], expected: list[np.ndarray]
) -> float:
    """Compare a peer's output and gradients with ours.

    Args:
      name: the peer.
      case: length, window and pass, for the message.
      result: arrays `[B, S, H, h]`.
      expected: ours.

    Raises:
      AssertionError: they differ by more than rounding.
    """
    difference = max(
        float(np.abs(got - wanted).max())
        for got, wanted in zip(result, expected, strict=True)
    )
    # Not `difference > TOLERANCE`, which is False for NaN.
    if not difference <= TOLERANCE:
        raise AssertionError(
            f"{name}, {case} differs by {difference:.3g}: "
            "it is not the same computation"
        )
    return difference


def use_threads(count: int) -> None:
    """Bind the process to some cores, and PyTorch to as many threads.

    To be called before JAX starts, which counts the cores.

    Raises:
      InputError: the process may not use so many cores.
    """
    import torch

    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= count <= len(cores):
        raise InputError(
            f"--threads {count} is out of range; this process may use {len(cores)} "
            f"cores, use 1 to {len(cores)}"
        )
    os.sched_setaffinity(0, cores[:count])
    torch.set_num_threads(count)


def torch_contenders(
    case: Case,
    inputs: Sequence[jax.Array],
    expected: list[np.ndarray],
    mask_gib: float,
) -> Iterator[Contender]:
    """Yield PyTorch's variants of a case.

    Args:
      case: length, window and pass.
      inputs: q, k, v and the gradient of the output, `[B, S, H, h]`.
      expected: our output and gradients.
      mask_gib: largest mask that is tried.
    """
    import torch

    from benchmarks.peers import torch_attention

    backward = case.pass_ == "forward_backward"
    run = torch_attention.forward_backward if backward else torch_attention.forward
    tensors = tuple(
        torch.from_numpy(np.asarray(x).swapaxes(1, 2).copy()) for x in inputs
    )
    for tensor in tensors[:3]:
        tensor.requires_grad_(backward)
    variants, left_out = torch_attention.variants(
        case.seq_len, case.window, mask_gib, backward=backward
    )
    for name, attend in variants.items():
        result = as_numpy(run(attend, tensors), heads_first=True)
        difference = largest_difference(name, case, result, expected)
        yield Contender(case, name, functools.partial(run, attend, tensors), difference)
    for name, reason in left_out.items():
        yield Contender(case, name, None, note=reason)


def compile_jax_nn(
    spec: AttentionSpec, pass_: str, mesh: jax.sharding.Mesh
) -> jax.stages.Compiled:
    """Compile `jax.nn.dot_product_attention`, which on a CPU masks its window."""
    # A window of w keys is w - 1 keys to the left of the query and 0 to the right.
    window = None if spec.window is None else (spec.window - 1, 0)
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=True, local_window_size=window
    )
    return compile_attention(spec, JAX_NN, pass_, mesh, attend=attend)


def contenders(
    case: Case, sizes: Sizes, mesh: jax.sharding.Mesh, mask_gib: float
) -> Iterator[Contender]:
    """Yield ours and all peers for one case, compiled and compared.

    Args:
      case: length, window and pass.
      sizes: sizes of the run.
      mesh: a mesh of one device.
      mask_gib: largest mask or square of logits that is tried.

    Raises:
      InputError: our implementation does not serve the case.
    """
    spec = case.spec(sizes)
    if reason := unsupported_reason(spec, case.implementation, mesh):
        raise InputError(reason)
    forward = case.pass_ == "forward"
    inputs = spec.random_inputs(mesh)
    arguments = inputs[:3] if forward else inputs

    def run_of(program: jax.stages.Compiled) -> tuple[Run, list[np.ndarray]]:
        result = program(*arguments)
        arrays = as_numpy((result,) if forward else result, heads_first=False)
        return functools.partial(program, *arguments), arrays

    run, expected = run_of(
        compile_attention(spec, case.implementation, case.pass_, mesh)
    )
    yield Contender(case, OURS, run)
    if logits_gib(spec) <= mask_gib:
        run, result = run_of(compile_jax_nn(spec, case.pass_, mesh))
        difference = largest_difference(JAX_NN, case, result, expected)
        yield Contender(case, JAX_NN, run, difference)
    yield from torch_contenders(case, inputs, expected, mask_gib)


def bench(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row per length, window, pass and contender."""
    sizes = Sizes(flags.batch, flags.heads, flags.head_dim)
    mesh = local_mesh("1x1x1", sizes)
    entered: list[Contender] = []
    for seq_len in flags.seq_lens:
        for window in flags.windows:
            if window is not None and window >= seq_len:
                continue
            for pass_ in flags.passes:
                case = Case(
                    "1x1x1", seq_len, window, flags.implementation, "float32", pass_
                )
                entered += contenders(case, sizes, mesh, flags.mask_gib)
    runs = {
        (contender.case, contender.name): contender.run
        for contender in entered
        if contender.run is not None
    }
    seconds = take_turns(runs, flags.repeats, pause=PAUSE)
    for contender in entered:
        case, name = contender.case, contender.name
        times = seconds.get((case, name))
        median = times and statistics.median(times)
        yield {
            "seq_len": case.seq_len,
            "window": case.window or "full",
            "implementation": f"{OURS} {case.implementation}" if name == OURS else name,
            "pass": case.pass_,
            "milliseconds": median and 1e3 * median,
            "least_milliseconds": times and 1e3 * min(times),
            "tokens_per_second": median and sizes.batch * case.seq_len / median,
            "this / ours": times and paired_ratio(times, seconds[case, OURS]),
            "max_difference": contender.difference,
            "note": contender.note,
        }


def make_parser() -> argparse.ArgumentParser:
    """The command line's flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--seq-lens", nargs="+", type=int, default=[512, 2048, 8192])
    add(
        "--windows",
        nargs="+",
        default=["64", "256", "full"],
        help="keys that a query sees; full: all",
    )
    add(
        "--implementation",
        default="blocked",
        help=f"ours: {', '.join(IMPLEMENTATIONS)}",
    )
    add("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    add("--batch", type=int, default=4)
    add("--heads", type=int, default=4)
    add("--head-dim", type=int, default=32)
    add("--threads", type=int, default=2)
    add("--repeats", type=int, default=10, help="turns of each variant")
    add("--mask-gib", type=float, default=1.0, help="largest banded mask that is tried")
    add(
        "--out",
        type=Path,
        default=Path(__file__).parents[1] / "results" / "attention_peers",
        help="stem of the result files",
    )
    return parser


def command_line(flags: argparse.Namespace) -> str:
    """Write the command that reproduces the run."""
    words = ["python -m benchmarks.peers.attention"]
    for name in ("implementation", "threads", "repeats", "seq_lens", "windows"):
        value = getattr(flags, name)
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark, and print its page."""
    flags = make_parser().parse_args(argv)
    if importlib.util.find_spec("torch") is None:
        raise InputError(
            "the peers need PyTorch, which is not installed; "
            "pip install '.[peers]', or pip install torch"
        )
    if flags.implementation not in IMPLEMENTATIONS:
        known = suggest(flags.implementation, IMPLEMENTATIONS)
        raise InputError(f"--implementation {flags.implementation} is not known{known}")
    use_threads(flags.threads)
    command = command_line(flags)
    flags.windows = [
        None if text in ("full", "0") else int(text) for text in flags.windows
    ]
    params = {
        "batch": flags.batch,
        "heads": flags.heads,
        "head_dim": flags.head_dim,
        "dtype": "float32",
        "threads": flags.threads,
        "turns": flags.repeats,
        "statistic": "median",
    }
    write_result(
        flags.out,
        list(bench(flags)),
        params,
        command,
        title="Attention beside PyTorch",
        packages=(*PACKAGES, "torch"),
    )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)

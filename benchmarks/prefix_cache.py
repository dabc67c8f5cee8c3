"""Time to score the candidates of a request, with a prefix cache and without.

    python -m benchmarks.prefix_cache    # 1,024 candidates, histories of 128 and 512

A request has one history and many candidates, which are scored in slices. Variants:

    cached        the history once, then each slice against its cached keys and values
    again         the history again with each slice
    alone         the history again with each candidate
    folded        as cached, but each candidate with logits for the history and itself
                  alone (folded_extend.py), which is what serving does
    one stream    the history and all candidates in one stream

The times of "cached" and "folded" hold the history; those of "extend" are the
candidates alone, against a history that is cached already, for each of the two, and
"extend, dense" with a logit for every candidate and another (`model.attention='dense'`).

Tokens are random and weights fresh. Makers and head are left out, as they cost all
variants the same. The variants take turns within one run, so that load on the machine
falls on each alike and their ratios hold."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.report import run_script, write_result
from benchmarks.timing import Run, paired_ratio, take_turns
from tokenrec.config import MeshConfig, ModelConfig
from tokenrec.errors import InputError
from tokenrec.models.backbones.folded_extend import extend_folded
from tokenrec.models.backbones.tokenformer import TokenFormer
from tokenrec.sharding import RULES, make_mesh
from tokenrec.tokens.layout import Layout
from tokenrec.tokens.stream_segments import StreamSegment, make_layout

STACKS = {
    "4F": ModelConfig(width=64, layers=4, windows=()),
    "2F2S": ModelConfig(width=64, layers=4, windows=(32, 16)),
}
STREAMS = 16  # streams of a lone candidate that are computed together


def stream(history: int, candidates: int) -> Layout:
    """Lay out a history of so many tokens, then candidates of one token each.

    Two of the tokens of the history are separators, before and behind the events.
    """
    separator = StreamSegment.tokens("sep", 1)
    events = StreamSegment.history("event", np.arange(history - 2))
    return make_layout(
        [separator, events, separator],
        [StreamSegment.tokens("target", 1)],
        events=history - 2,
        candidates=candidates,
        readout="candidates",
    )


class Request:
    """Random tokens of requests with equal histories, and programs that score them.

    Args:
      config: `model` of a config.
      history: tokens of the history.
      candidates: candidates of a request.
      batch: number of requests.
    """

    def __init__(self, config: ModelConfig, history: int, candidates: int, batch: int):
        backbone = TokenFormer(config, rngs=nnx.Rngs(params=jax.random.key(0)))
        graph, self.weights = nnx.split(backbone)
        self.history = history
        self.candidates = candidates
        self.batch = batch

        def normal(seed: int, tokens: int) -> jax.Array:
            return jax.random.normal(
                jax.random.key(seed),
                (batch, tokens, config.width),
                out_sharding=RULES("batch", None, None),
            )

        self.prefix, self.own = normal(1, history), normal(2, candidates)
        merge = functools.partial(nnx.merge, graph)

        def all_real(x: jax.Array, count: int) -> jax.Array:
            """`[B, count] bool`: no event and no candidate is padding."""
            return jnp.ones(
                (x.shape[0], count), bool, out_sharding=RULES("batch", None)
            )

        @jax.jit
        def prefill(weights: Any, x: jax.Array) -> Any:
            return merge(weights).prefill(
                x, stream(history, 1), all_real(x, history - 2)
            )[0]

        @jax.jit
        def extend(weights: Any, cache: Any, x: jax.Array) -> jax.Array:
            count = x.shape[1]
            return merge(weights).extend(
                cache,
                x,
                stream(history, count),
                all_real(x, history - 2),
                all_real(x, count),
            )

        @jax.jit
        def forward(weights: Any, x: jax.Array) -> jax.Array:
            count = x.shape[1] - history
            return merge(weights)(
                x,
                stream(history, count),
                all_real(x, history - 2),
                all_real(x, count),
                None,
            )

        @jax.jit
        def fold(weights: Any, cache: Any, x: jax.Array) -> jax.Array:
            events = all_real(x, history - 2)
            own, layout = x[:, :, None], stream(history, 1)
            return extend_folded(merge(weights), cache, own, layout, events)[:, :, 0]

        self._prefill, self._extend, self._forward = prefill, extend, forward
        self._fold = fold

    def prefill(self) -> Any:
        """Compute the prefix cache."""
        return self._prefill(self.weights, self.prefix)

    def cached(
        self, size: int, *, folded: bool = False, cache: Any = None
    ) -> Callable[[], list[jax.Array]]:
        """Create a run: the history once, then slices of `size` candidates.

        Args:
          size: candidates of a slice.
          folded: candidates have no logits for one another.
          cache: cache of the history, which is not computed then.
        """
        slices = jnp.split(self.own, self.candidates // size, axis=1)
        extend = self._fold if folded else self._extend

        def run() -> list[jax.Array]:
            kept = self.prefill() if cache is None else cache
            return [extend(self.weights, kept, own) for own in slices]

        return run

    def again(self, size: int) -> Callable[[], list[jax.Array]]:
        """Create a run: the history again with each slice of `size` candidates."""
        streams = [
            jnp.concatenate([self.prefix, own], axis=1)
            for own in jnp.split(self.own, self.candidates // size, axis=1)
        ]
        return lambda: [self._forward(self.weights, x) for x in streams]

    def alone(self) -> Callable[[], list[jax.Array]]:
        """Create a run: the history again with each candidate, `STREAMS` at a time."""
        together = min(STREAMS, self.candidates)
        shape = (self.batch * together, self.history, self.prefix.shape[2])
        prefix = jnp.broadcast_to(
            self.prefix[:, None], (self.batch, together, *shape[1:])
        ).reshape(shape)
        streams = [
            jnp.concatenate([prefix, own.reshape(shape[0], 1, shape[2])], axis=1)
            for own in jnp.split(self.own, self.candidates // together, axis=1)
        ]
        return lambda: [
            self._forward(self.weights, x).reshape(self.batch, together, -1)
            for x in streams
        ]


def bench(
    stacks: Sequence[str],
    histories: Sequence[int],
    slices: Sequence[int],
    *,
    candidates: int,
    batch: int,
    repeats: int,
    alone: bool,
) -> Iterator[dict[str, Any]]:
    """Time all variants.

    Args:
      stacks: names of `STACKS`.
      histories: tokens of the history.
      slices: candidates of a slice.
      candidates: candidates of a request.
      batch: requests.
      repeats: turns of each variant.
      alone: also time the history again with each candidate, which is slow.

    Yields:
      A line of the result table for each stack, history and size of slices.
    """
    for name in stacks:
        for history in histories:
            request = Request(STACKS[name], history, candidates, batch)
            runs: dict[Any, Run] = {
                "prefill": request.prefill,
                "one stream": request.again(candidates),
            }
            if alone:
                runs["alone"] = request.alone()
            cache = request.prefill()
            masked = Request(
                dataclasses.replace(STACKS[name], attention="dense"),
                history,
                candidates,
                batch,
            )
            for size in slices:
                runs["cached", size] = request.cached(size)
                runs["folded", size] = request.cached(size, folded=True)
                runs["extend", size] = request.cached(size, cache=cache)
                runs["extend, dense", size] = masked.cached(size, cache=cache)
                runs["extend, folded", size] = request.cached(
                    size, folded=True, cache=cache
                )
                runs["again", size] = (
                    runs["one stream"] if size == candidates else request.again(size)
                )
            seconds = take_turns(runs, repeats)
            scores = {
                key: np.concatenate(run(), axis=1)
                for key, run in runs.items()
                if key != "prefill"
            }
            largest_difference = max(
                float(np.abs(score - scores["one stream"]).max())
                for score in scores.values()
            )
            for size in slices:
                cached = seconds["cached", size]
                yield {
                    "layers": name,
                    "history": history,
                    "slice": size,
                    "prefill, ms": 1e3 * statistics.median(seconds["prefill"]),
                    "cached, ms": 1e3 * statistics.median(cached),
                    "least, ms": 1e3 * min(cached),
                    "folded, ms": 1e3 * statistics.median(seconds["folded", size]),
                    "extend / folded": paired_ratio(
                        seconds["extend", size], seconds["extend, folded", size]
                    ),
                    "extend, dense / folded": paired_ratio(
                        seconds["extend, dense", size], seconds["extend, folded", size]
                    ),
                    "history with each slice / cached": paired_ratio(
                        seconds["again", size], cached
                    ),
                    "one stream / cached": paired_ratio(seconds["one stream"], cached),
                    "history with each candidate / cached": (
                        paired_ratio(seconds["alone"], cached) if alone else None
                    ),
                    "largest difference": largest_difference,
                }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stacks",
        nargs="+",
        default=list(STACKS),
        choices=STACKS,
        help="layers: all full, or two full and two sliding",
    )
    parser.add_argument(
        "--histories",
        nargs="+",
        type=int,
        default=[128, 512],
        help="tokens of the prefix",
    )
    parser.add_argument(
        "--slices",
        nargs="+",
        type=int,
        default=[16, 128, 1024],
        help="candidates scored together",
    )
    parser.add_argument(
        "--candidates", type=int, default=1024, help="candidates of a request"
    )
    parser.add_argument("--batch", type=int, default=1, help="requests")
    parser.add_argument("--repeats", type=int, default=10, help="turns of each variant")
    parser.add_argument(
        "--no-alone",
        action="store_true",
        help="leave out the variant of a stream per candidate, which is slow",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "prefix_cache"
    )
    flags = parser.parse_args(arguments)
    for size in (*flags.slices, min(STREAMS, flags.candidates)):
        if size < 1 or flags.candidates % size:
            raise InputError(
                f"--candidates {flags.candidates} is no multiple of a slice of {size}; "
                "choose a divisor"
            )
    if min(flags.histories) < 3:
        raise InputError(
            f"--histories {min(flags.histories)}: two tokens are separators; use at "
            "least 3"
        )
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        rows = list(
            bench(
                flags.stacks,
                flags.histories,
                flags.slices,
                candidates=flags.candidates,
                batch=flags.batch,
                repeats=flags.repeats,
                alone=not flags.no_alone,
            )
        )
    params = {
        "requests": flags.batch,
        "candidates": flags.candidates,
        "model": "width 64, 4 layers, windows 32 and 16 where sliding",
        "turns": flags.repeats,
        "statistic": "median",
        "device": jax.devices()[0].device_kind,
    }
    words = ["python -m benchmarks.prefix_cache"]
    for field in ("stacks", "histories", "slices", "candidates", "batch", "repeats"):
        value = getattr(flags, field)
        words += [
            f"--{field}",
            *map(str, value if isinstance(value, list) else [value]),
        ]
    command = " ".join([*words, *(["--no-alone"] if flags.no_alone else [])])
    write_result(
        flags.out,
        rows,
        params,
        command,
        title="Scoring the candidates of a request with a prefix cache",
    )
    print(flags.out.with_name(flags.out.name + ".md").read_text())


if __name__ == "__main__":
    run_script(main)

"""Device time of a JAX function: many calls inside one compiled loop.

The launch of a compiled function costs the host tens of microseconds, as long as a
short kernel runs. `Looped` repeats the function inside a loop on the device instead.
XLA moves out of a loop what does not change in it, also past an optimisation barrier,
and drops what nobody reads. So

- the first element of every input is overwritten in each turn by a number that depends
  on all outputs of the turn before it. This is one tiny kernel per input, in place;
- the outputs are carried out of the loop;
- the number of turns is static: for any other loop the host waits for the condition in
  every turn.

`queued` times the same calls with one launch each, without waiting between them. Where
a call takes longer than its launch, both must agree.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Measurements that count, and those of a launch that takes longer than the target.
TURNS, SLOW_TURNS = 5, 3
MOST_LAUNCHES = 2_000


class Looped:
    """A compiled loop over `outputs = function(*inputs)`.

    Args:
      function: traceable; returns an array or a tree of arrays.
      inputs: its arguments, floating-point arrays or their `jax.ShapeDtypeStruct`.
      calls: turns of the loop; 1: no loop is compiled, and calls are queued.
    """

    def __init__(
        self, function: Callable[..., Any], inputs: tuple[Any, ...], calls: int
    ) -> None:
        def turn(_: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            inputs, outputs = carry
            inputs = changed(inputs, outputs)
            return inputs, function(*inputs)

        def loop(*inputs: Any) -> Any:
            # The first call stands outside: it gives the loop its first outputs.
            return jax.lax.fori_loop(1, calls, turn, (inputs, function(*inputs)))[1]

        self.calls = calls
        self.single = jax.jit(function).lower(*inputs).compile()
        self.loop = jax.jit(loop).lower(*inputs).compile() if calls > 1 else self.single

    def seconds(self, *inputs: Any, target: float) -> float:
        """Median seconds of a call inside the loop.

        Args:
          *inputs: the arguments.
          target: seconds that a measurement of several launches shall take.
        """
        return launch_seconds(lambda: self.loop(*inputs), target=target) / self.calls

    def queued(self, *inputs: Any, target: float) -> float:
        """Median seconds of a call when each has a launch of its own."""
        return launch_seconds(lambda: self.single(*inputs), target=target)


def changed(inputs: tuple[Any, ...], outputs: Any) -> tuple[Any, ...]:
    """Overwrite the first element of every input by a number that follows the outputs.

    The number lies between -1 and 1.
    """
    first = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(outputs)]
    number = jnp.tanh(sum(x.astype(jnp.float32) for x in first))
    return tuple(
        jax.lax.dynamic_update_slice(
            x, jnp.full((1,) * x.ndim, number, x.dtype), (0,) * x.ndim
        )
        for x in inputs
    )


def launch_seconds(launch: Callable[[], Any], *, target: float) -> float:
    """Median seconds of a launch, of several that follow each other without waiting.

    Args:
      launch: starts the work and returns its result, which is waited for at the end.
      target: seconds that a measurement shall take.
    """

    def seconds(count: int) -> float:
        begin = time.perf_counter()
        for _ in range(count - 1):
            launch()
        jax.block_until_ready(launch())
        return (time.perf_counter() - begin) / count

    return median_seconds(seconds, target=target)


def median_seconds(seconds: Callable[[int], float], *, target: float) -> float:
    """Warm up, choose how many launches fill a measurement, and take the median.

    Args:
      seconds: seconds of a launch, over so many launches.
      target: seconds that a measurement shall take.
    """
    seconds(1)
    count = math.ceil(target / max(seconds(2), 1e-9))
    if count <= 1:
        return statistics.median(seconds(1) for _ in range(SLOW_TURNS))
    count = min(MOST_LAUNCHES, count)
    return statistics.median(seconds(count) for _ in range(TURNS))

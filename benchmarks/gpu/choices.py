"""What `attention` would choose for a spec on this device, and what it refuses."""

from __future__ import annotations

import jax

from benchmarks.attention_specs import AttentionSpec
from tokenrec.errors import InputError
from tokenrec.ops.attention import Choice, choose


def choice(spec: AttentionSpec, implementation: str | None = None) -> Choice:
    """The choice for a spec, traced without arrays.

    Args:
      spec: the arguments.
      implementation: the one to use if it can; None: the platform's first that serves.

    Raises:
      InputError: the implementation cannot serve.
    """
    chosen: list[Choice] = []

    def serve(q: jax.Array, k: jax.Array) -> jax.Array:
        chosen.append(
            choose(
                q,
                k,
                window=spec.window,
                pattern=spec.pattern,
                implementation=implementation,
            )
        )
        return q

    q, k, _, _ = spec.arrays()
    jax.eval_shape(serve, q, k)
    return chosen[0]


def refusal(spec: AttentionSpec, implementation: str) -> str:
    """Why an implementation does not serve a spec on this device, or ""."""
    try:
        choice(spec, implementation)
    except InputError as error:
        return str(error)
    return ""

"""Softmax attention: one entry point that chooses an implementation.

For a stream of queries q, keys k and values v of width h,

    out_i = sum_j p_ij v_j,     p_ij = exp(s_ij) / sum_j' exp(s_ij'),
    s_ij  = q_i . k_j / sqrt(h)

where the sums run over the keys that query i sees: in plain causal order
`i - window < j <= i`, and in the streams of a model what the `Pattern` and the padding
mask say (`tokenrec.ops.attention.pattern`).

Implementations, all of one signature:

    dense     one masked Q x K product                       any platform
    blocked   visible tiles of logits, in XLA                any platform
    cudnn     cuDNN's fused kernels                          GPU
    triton    block-sparse Pallas kernels                    GPU, if it is named
    splash    block-sparse Pallas kernels                    TPU

`choose` takes the first in the platform's order that can serve the shapes at hand and
is likely to be the fastest. `attention` checks its arguments and calls it under a
`shard_map`: streams are split over the batch axes of the mesh, heads over `tensor`, so
that every device attends on its own and nothing is exchanged. Where the tokens of the
queries and keys are split over `context`, `tokenrec.ops.attention.context` exchanges
what the parts need.

Shape letters: B streams, Q queries, K keys, H heads of queries, G heads of keys and
values, h width of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention import blocked, cudnn, dense, splash, triton
from tokenrec.ops.attention.context import split_attention, split_splash
from tokenrec.ops.attention.context_plan import SplitPlan, plan_split
from tokenrec.ops.attention.grouped import repeat_heads
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern, causal_pattern
from tokenrec.ops.attention.platform import current_platform
from tokenrec.sharding import RULES, tokens_of

__all__ = [
    "ATTENTION_RESULT",
    "IMPLEMENTATIONS",
    "PORTABLE",
    "PREFERRED",
    "Choice",
    "Implementation",
    "Pattern",
    "attention",
    "choose",
    "current_platform",
    "implementations_of",
]


def _no_reason(q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None) -> str:
    return ""


class Implementation(NamedTuple):
    """A way to compute attention on the arrays of one device.

    Attributes:
      attend: `(q, k, v, pattern, window, valid) -> out`, arguments as in `attention`.
      unsupported_reason: `(q, k, pattern, window) -> str`, why it cannot serve, or "".
      inefficient_reason: `(q, k, pattern, window) -> str`, why the next one in the
        order is the better choice, or "". It still serves when it is named explicitly.
    """

    attend: Callable[..., jax.Array]
    unsupported_reason: Callable[..., str]
    inefficient_reason: Callable[..., str] = _no_reason


IMPLEMENTATIONS = {
    "dense": Implementation(dense.dense_attention, _no_reason),
    "blocked": Implementation(
        blocked.blocked_attention, _no_reason, blocked.inefficient_reason
    ),
    "cudnn": Implementation(cudnn.cudnn_attention, cudnn.unsupported_reason),
    "splash": Implementation(
        splash.splash_attention, splash.unsupported_reason, splash.inefficient_reason
    ),
    "triton": Implementation(triton.triton_attention, triton.unsupported_reason),
}

# Implementations in plain XLA, which run on any platform, known or not.
PORTABLE = ("blocked", "dense")

# Order of preference by platform. The first without a reason against it serves. `dense`
# stands last everywhere, because it has none.
PREFERRED = {
    "cpu": PORTABLE,
    "gpu": ("cudnn", *PORTABLE),
    "tpu": ("splash", *PORTABLE),
}

# Implementations that serve only when they are named, by platform: no measurement says
# yet for which shapes they are the fastest.
NAMED_ONLY = {"gpu": ("triton",)}


class Choice(NamedTuple):
    """The implementation that serves.

    Attributes:
      name: key of `IMPLEMENTATIONS`.
      refused: name -> reason, for those that the platform prefers to it.
    """

    name: str
    refused: dict[str, str]


def implementations_of(platform: str) -> tuple[str, ...]:
    """List the implementations that run on a platform, preferred ones first.

    Those that serve only when they are named stand last. On a platform that is not in
    `PREFERRED`, these are the portable ones.
    """
    return PREFERRED.get(platform, PORTABLE) + NAMED_ONLY.get(platform, ())


def unsupported_reason(
    name: str, q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Say why an implementation cannot serve, or return "".

    Args:
      name: key of `IMPLEMENTATIONS`.
      q: `[B, Q, H, h]`; only shape and dtype are read.
      k: `[B, K, H, h]`; only shape and dtype are read.
      pattern: which queries may see which keys.
      window: keys that a query of a sliding layer sees; None in a full layer.
    """
    # Bands, tiles, spans and fused kernels all hold one run of shared keys per query.
    if name != "dense" and pattern.keeps_static(window):
        return (
            "static tokens stay visible in a sliding layer "
            "(model.discard_static=False), so that a query sees two runs of keys"
        )
    return IMPLEMENTATIONS[name].unsupported_reason(q, k, pattern, window)


class _Call(NamedTuple):
    """One call of an implementation; of q and k only shape and dtype are read."""

    q: jax.Array
    k: jax.Array
    pattern: Pattern


def _check_explicit(name: str, calls: Sequence[_Call], window: int | None) -> None:
    """Raise InputError if the implementation that was named cannot serve."""
    if name not in IMPLEMENTATIONS:
        raise InputError(
            f"implementation={name!r} is not known{suggest(name, IMPLEMENTATIONS)}"
        )
    platform = current_platform()
    if name not in implementations_of(platform):
        raise InputError(
            f"model.attention (implementation=)={name!r} does not run on {platform}; "
            f"use one of: {', '.join(implementations_of(platform))}"
        )
    for call in calls:
        if reason := unsupported_reason(name, *call, window):
            raise InputError(
                f"model.attention (implementation=)={name!r} cannot serve: {reason}; "
                "use 'auto' (None) for the first one that can"
            )


def choose(
    q: jax.Array,
    k: jax.Array,
    *,
    window: int | None,
    pattern: Pattern,
    implementation: str | None = None,
) -> Choice:
    """Choose the implementation for these shapes, on the platform of the mesh in use.

    Args:
      q: `[B, Q, H, h]`; only shape and dtype are read.
      k: `[B, K, H, h]`; only shape and dtype are read.
      window: keys that a query of a sliding layer sees; None in a full layer.
      pattern: which queries may see which keys.
      implementation: the one to use if it can; None: the platform's first that serves.

    Returns:
      The choice, with the reason against each one that the platform prefers to it.

    Raises:
      InputError: `implementation` is not known, does not run on this platform or cannot
        serve; or it is None, and the platform is not one of `PREFERRED`. A portable
        implementation can be named on any platform.
    """
    return _choose([_Call(q, k, pattern)], window, implementation)


def _choose(
    calls: Sequence[_Call], window: int | None, implementation: str | None
) -> Choice:
    """Choose the implementation that serves all calls; the last is the largest."""
    if implementation is not None:
        _check_explicit(implementation, calls, window)
        return Choice(implementation, {})
    platform = current_platform()
    # No silent default: nobody has tried which implementation is right and fast there.
    if platform not in PREFERRED:
        raise InputError(
            f"platform={platform!r} has no order of attention implementations, only "
            f"{', '.join(sorted(PREFERRED))} have; set model.attention (or "
            f"implementation=) to one that runs on any platform: {', '.join(PORTABLE)}"
        )
    refused: dict[str, str] = {}
    for name in PREFERRED[platform]:
        reasons = [unsupported_reason(name, *call, window) for call in calls]
        reason = next((reason for reason in reasons if reason), "")
        reason = reason or IMPLEMENTATIONS[name].inefficient_reason(*calls[-1], window)
        if not reason:
            return Choice(name, refused)
        refused[name] = reason
    raise AssertionError("dense serves everything")


def _check_arguments(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    pattern: Pattern | None,
    valid: jax.Array | None,
) -> None:
    """Raise InputError if shapes, dtypes or the window of `attention` are wrong."""
    if window is not None and window < 1:
        raise InputError(
            f"window={window} is below 1; a window counts the query itself, "
            "use 1 or more"
        )
    if (
        q.ndim != 4
        or k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[3] != k.shape[3]
        or q.shape[2] % k.shape[2]
        or q.shape[1] > k.shape[1]
    ):
        raise InputError(
            f"q {q.shape}, k {k.shape} and v {v.shape} do not agree; "
            "use [B, Q, H, h] and twice [B, K, G, h] with Q <= K and G a divisor of H"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise InputError(
            f"q {q.dtype}, k {k.dtype} and v {v.dtype} do not agree; use one dtype"
        )
    if pattern is not None:
        queries, keys = len(pattern.query_positions), len(pattern.key_positions)
        if (queries, keys) != (q.shape[1], k.shape[1]):
            raise InputError(
                f"the pattern has {queries} queries and {keys} keys, and q {q.shape} "
                f"and k {k.shape} have {q.shape[1]} and {k.shape[1]}; use a pattern of "
                "the same positions"
            )
    # A mask of another shape might broadcast, and integers might be read as bits.
    if valid is not None and (valid.shape != k.shape[:2] or valid.dtype != bool):
        raise InputError(
            f"valid {valid.shape} {valid.dtype} does not match k {k.shape}; "
            f"use [B, K] bool, here {k.shape[:2]}"
        )


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    implementation: str | None = None,
    pattern: Pattern | None = None,
    valid: jax.Array | None = None,
) -> jax.Array:
    """Compute softmax attention with scale `1 / sqrt(h)`.

    Args:
      q: `[B, Q, H, h]`, queries. Q < K where only some tokens are needed.
      k: `[B, K, G, h]`, keys. Each of the G heads serves H / G heads of queries next
        to each other (grouped-query attention; Ainslie et al., arXiv 2305.13245, 2023).
      v: `[B, K, G, h]`, values.
      window: keys that a query sees, itself included; None: every earlier one.
      implementation: key of `IMPLEMENTATIONS`; None: the platform's first that serves.
      pattern: order, static tokens and candidates; None: plain causal order, in which
        the queries are the last Q of the K tokens.
      valid: `[B, K] bool`, keys that are not padding; None: all. The output of a query
        that is padding is finite, and differs between implementations.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`. Logits and softmax are float32.

    Raises:
      InputError: the window is below 1; shapes or dtypes do not agree; or no
        implementation can be chosen (`choose`).
    """
    _check_arguments(q, k, v, window, pattern, valid)
    k, v = (repeat_heads(x, q.shape[2]) for x in (k, v))
    pattern = causal_pattern(q.shape[1], k.shape[1]) if pattern is None else pattern
    if tokens_of(q) is not None:
        return _attend_split(q, k, v, window, implementation, pattern, valid)
    # 1. Choose the implementation, for the shapes of the whole arrays.
    name = choose(
        q, k, window=window, pattern=pattern, implementation=implementation
    ).name

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, *valid: jax.Array
    ) -> jax.Array:
        # `valid` is absent, not None: `shard_map` wants one spec per array.
        return IMPLEMENTATIONS[name].attend(
            q, k, v, pattern, window, valid[0] if valid else None
        )

    # 2. Without a mesh, call it as it is.
    inputs = (q, k, v) if valid is None else (q, k, v, valid)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return attend(*inputs)
    # 3. On a mesh, call it on each device. A device has whole streams and whole heads,
    #    so that nothing is exchanged, and replication need not be tracked. Keys that
    #    are split over `context` are gathered: the queries are few.
    by_head, by_token = RULES("batch", None, "heads", None), RULES("batch", None)
    specs = (by_head, by_head, by_head, by_token)[: len(inputs)]
    inputs = tuple(
        jax.sharding.reshard(x, spec) for x, spec in zip(inputs, specs, strict=True)
    )
    return jax.shard_map(attend, in_specs=specs, out_specs=by_head, check_vma=False)(
        *inputs
    )


def _attend_split(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    window: int | None,
    implementation: str | None,
    pattern: Pattern,
    valid: jax.Array | None,
) -> jax.Array:
    """Compute attention whose queries and keys are split over `mesh.context`."""
    parts = jax.sharding.get_abstract_mesh().shape["context"]
    plan = plan_split(pattern, window, parts)
    name = _choose(_part_calls(plan, q, k, window), window, implementation).name
    if name == "splash":
        # One program serves all parts: its spans are those over all gathered keys.
        spans = plan.spans(window)
        if not isinstance(spans, str) and not splash.unpackable_reason(
            spans, plan.keys
        ):
            return split_splash(plan, q, k, v, valid, window=window)
    attend = IMPLEMENTATIONS[name].attend
    return split_attention(attend, plan, q, k, v, valid, window=window)


def _part_calls(
    plan: SplitPlan, q: jax.Array, k: jax.Array, window: int | None
) -> list[_Call]:
    """Describe the calls of all parts."""
    calls = []
    for part in plan.parts:
        pattern = part.cut(window).pattern
        queries, keys = len(pattern.query_positions), len(pattern.key_positions)
        shapes: list[Any] = [
            jax.ShapeDtypeStruct((x.shape[0], count, *x.shape[2:]), x.dtype)
            for x, count in ((q, queries), (k, keys))
        ]
        calls.append(_Call(shapes[0], shapes[1], pattern))
    return calls

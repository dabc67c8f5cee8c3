"""Attention: the one entry. It picks an implementation for the platform and owns the only `shard_map` of attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention import blocked, cudnn, dense, splash
from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern, causal_pattern
from tokenrec.sharding import RULES

__all__ = [
    "ATTENTION_RESULT",
    "IMPLEMENTATIONS",
    "PREFERRED",
    "Choice",
    "Implementation",
    "Pattern",
    "attention",
    "choose",
]


def refusal(
    name: str, q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Why an implementation cannot serve, or ""."""
    if name != "dense" and pattern.keeps_static(window):
        return "static rows stay in sight of a sliding layer (model.discard_static=False), which is two runs of keys"
    return IMPLEMENTATIONS[name].refusal(q, k, pattern, window)


def _never(q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None) -> str:
    return ""


class Implementation(NamedTuple):
    """A way to compute attention on local arrays.

    Attributes:
      attend: `(q, k, v, pattern, window, valid) -> out`.
      refusal: `(q, k, pattern, window) -> str`, why it cannot serve, or "".
      unprofitable: likewise, why the next one in line is the better choice; it serves all the same when asked for.
    """

    attend: Callable[..., jax.Array]
    refusal: Callable[..., str]
    unprofitable: Callable[..., str] = _never


IMPLEMENTATIONS = {
    "dense": Implementation(dense.dense_attention, _never),
    "blocked": Implementation(blocked.blocked_attention, _never, blocked.unprofitable),
    "cudnn": Implementation(cudnn.cudnn_attention, cudnn.refusal),
    "splash": Implementation(
        splash.splash_attention, splash.refusal, splash.unprofitable
    ),
}

# In order, by platform; the first that neither refuses nor is unprofitable serves.
PREFERRED = {
    "cpu": ("blocked", "dense"),
    "gpu": ("cudnn", "blocked", "dense"),
    "tpu": ("splash", "blocked", "dense"),
}


class Choice(NamedTuple):
    """The implementation that serves, and why each one that the platform prefers to it does not."""

    name: str
    refused: dict[str, str]


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in use, which may be a described pod, or else of this process."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def choose(
    q: jax.Array,
    k: jax.Array,
    *,
    window: int | None,
    pattern: Pattern,
    implementation: str | None = None,
) -> Choice:
    """Which implementation serves these shapes on the platform of the mesh in use.

    Raises:
      InputError: `implementation` is not known, or was asked for and cannot serve.
    """
    if implementation is not None:
        if implementation not in IMPLEMENTATIONS:
            raise InputError(
                f"implementation={implementation!r} is not known{suggest(implementation, IMPLEMENTATIONS)}"
            )
        here = platform()
        if implementation not in PREFERRED.get(here, PREFERRED["cpu"]):
            others = ", ".join(PREFERRED.get(here, PREFERRED["cpu"]))
            raise InputError(
                f"implementation={implementation!r} does not run on {here}; use one of: {others}"
            )
        if reason := refusal(implementation, q, k, pattern, window):
            raise InputError(
                f"implementation={implementation!r} cannot serve: {reason}; leave it out to fall through"
            )
        return Choice(implementation, {})
    refused: dict[str, str] = {}
    for name in PREFERRED.get(platform(), PREFERRED["cpu"]):
        unprofitable = IMPLEMENTATIONS[name].unprofitable
        reason = refusal(name, q, k, pattern, window) or unprofitable(
            q, k, pattern, window
        )
        if not reason:
            return Choice(name, refused)
        refused[name] = reason
    raise AssertionError("dense refuses nothing")


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
    """Softmax attention with scale `1 / sqrt(h)`, causal unless `pattern` says otherwise.

    Args:
      q: `[B, Q, H, h]`; `k, v: [B, K, H, h]`, with Q <= K where only some rows are needed.
      window: keys that a query sees, itself included; None sees every earlier one.
      implementation: one of `IMPLEMENTATIONS`; None takes the platform's first that can serve.
      pattern: order, static rows and candidates; None is plain causal order, queries last.
      valid: `[B, K] bool`, keys that are not padding; None: all. Rows of padding come out finite, and are not the same
        for all implementations.

    Returns:
      `[B, Q, H, h]` in the dtype of `q`; the softmax is float32.

    Raises:
      InputError: an unknown implementation or one that cannot serve, a window below 1, or shapes that do not agree.
    """
    if window is not None and window < 1:
        raise InputError(
            f"window={window}: a window counts the row itself, so it is at least 1"
        )
    if (
        k.shape != v.shape
        or q.shape[0] != k.shape[0]
        or q.shape[2:] != k.shape[2:]
        or q.shape[1] > k.shape[1]
    ):
        raise InputError(
            f"q {q.shape}, k {k.shape}, v {v.shape}: expected [B, Q, H, h], [B, K, H, h] twice, Q <= K"
        )
    pattern = causal_pattern(q.shape[1], k.shape[1]) if pattern is None else pattern
    if (len(pattern.query_rows), len(pattern.key_rows)) != (q.shape[1], k.shape[1]):
        raise InputError(
            f"pattern is for {len(pattern.query_rows)} x {len(pattern.key_rows)} rows, q {q.shape} k {k.shape}"
        )
    name = choose(
        q, k, window=window, pattern=pattern, implementation=implementation
    ).name

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *valid: jax.Array) -> jax.Array:
        return IMPLEMENTATIONS[name].attend(
            q, k, v, pattern, window, valid[0] if valid else None
        )

    inputs = (q, k, v) if valid is None else (q, k, v, valid)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(*inputs)
    heads, rows = RULES("batch", None, "heads", None), RULES("batch", None)
    specs = (heads, heads, heads, rows)[: len(inputs)]
    # Inside, a device has whole streams and whole heads, so nothing is exchanged and replication need not be tracked.
    inputs = tuple(
        jax.sharding.reshard(x, spec) for x, spec in zip(inputs, specs, strict=True)
    )
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(
        *inputs
    )

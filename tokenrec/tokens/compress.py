"""History compression: fewer tokens for the older events, the newest ones untouched (Token Factory; methods.md 2).

Histories are right-aligned: event T - 1 is the newest and padding stands before the oldest. All lengths are static.
"""

from __future__ import annotations

import dataclasses
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from tokenrec.config import Compression
from tokenrec.errors import InputError, suggest
from tokenrec.ops.attention.dense import MASKED
from tokenrec.ops.contract import contract
from tokenrec.ops.layers import RMSNorm, constant, rms_normalize, spec_of, weight
from tokenrec.sharding import RULES


@dataclasses.dataclass(frozen=True)
class CompressionPlan:
    """Which events become which tokens.

    Attributes:
      events: T, of the longest history.
      kind: "none", "mlp" (`compressed` tokens of all older events) or "attention" (one of each `group`).
      recent: R, the newest events, which stay as they are.
      group: k; groups end at the newest of the older events, so the oldest one may be short.
      compressed: M'.
      absent: events at the old end that a shorter stream (`data.buckets`) does not have.

    Raises:
      InputError: a length does not fit.

    >>> CompressionPlan(10, "attention", recent=3, group=4).event.tolist()
    [2, 6, 7, 8, 9]
    >>> CompressionPlan(10, "mlp", recent=3, compressed=2).event.tolist()
    [2, 6, 7, 8, 9]
    """

    events: int
    kind: Compression = "none"
    recent: int = 0
    group: int = 1
    compressed: int = 1
    absent: int = 0

    def __post_init__(self) -> None:
        if self.kind not in get_args(Compression):
            raise InputError(
                f"compression={self.kind!r} is not known{suggest(self.kind, get_args(Compression))}"
            )
        if not 0 <= self.absent <= self.events:
            raise InputError(
                f"a stream of {self.length} events is not within 0 to events={self.events}"
            )
        if self.kind == "none":
            return
        if not 0 <= self.recent < self.events:
            raise InputError(
                f"recent={self.recent} of events={self.events} leaves nothing to compress; use 0 to {self.events - 1}"
            )
        name, most = (
            ("compressed", self.events - self.recent)
            if self.kind == "mlp"
            else ("group", None)
        )
        value = getattr(self, name)
        if value < 1 or (most is not None and value > most):
            allowed = (
                "at least 1"
                if most is None
                else f"1 to {most}, the number of older events"
            )
            raise InputError(
                f"{name}={value} of compression={self.kind!r} must be {allowed}"
            )

    def of(self, length: int) -> CompressionPlan:
        """The plan of a stream of `length` events, at most `events`: the tokens whose events it does not have are gone.

        Raises:
          InputError: the stream is longer.
        """
        return dataclasses.replace(self, absent=self.events - length)

    @property
    def length(self) -> int:
        """Events of the stream."""
        return self.events - self.absent

    @property
    def older(self) -> int:
        """Events that are compressed: all but the newest `recent`, none in a stream as short as these."""
        return 0 if self.kind == "none" else max(self.length - self.recent, 0)

    @property
    def event(self) -> np.ndarray:
        """`[tokens]`, the newest event that each token stands for, ascending; the token is valid if that event is.

        Of a right-aligned history, this is so where any event of the token's group is valid. The tokens of "mlp", each
        of which reads every older event, are spread evenly over these, the last at the newest.
        """
        every = np.arange(self.events)
        if self.kind == "none":
            newest = every
        else:
            older = self.events - self.recent
            if self.kind == "mlp":
                ends = (np.arange(self.compressed) + 1) * older // self.compressed
            else:
                ends = older - np.arange(-(-older // self.group))[::-1] * self.group
            newest = np.concatenate([ends - 1, every[older:]])
        return newest[newest >= self.absent] - self.absent

    @property
    def tokens(self) -> int:
        """Tokens out, for `length` events in."""
        return len(self.event)


class OverTime(nnx.Module):
    """A linear map along time: `y_o = sum_t W_to x_t + b_o`, `[B, i, d] -> [B, o, d]`."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.kernel = weight(rngs, (inputs, outputs), None, None, inputs=inputs)
        self.bias = constant(0.0, (outputs, 1), None, None)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Fewer rows than `inputs` are the newest ones, as if zeros stood before them."""
        kernel = self.kernel[...][self.kernel.shape[0] - x.shape[1] :]
        return contract("btd,to->bod", x, kernel, spec_of(x)) + self.bias[...].astype(
            x.dtype
        )


class MlpOverTime(nnx.Module):
    """M' tokens of T events: the mean of each token's span of events, plus `W_2 gelu(W_1 x + b_1) + b_2` along time.

    Padding enters as zeros, so a stream that lacks it at the old end gives the same tokens. A module for another T is
    another function: its weights belong to places in the history.

    Args:
      events, tokens: T and M'.
      hidden: width along time between the two maps.
    """

    def __init__(self, events: int, tokens: int, hidden: int, *, rngs: nnx.Rngs):
        plan = CompressionPlan(events, "mlp", compressed=tokens)
        self.events = events
        self.span = tuple(
            np.searchsorted(plan.event, np.arange(events)).tolist()
        )  # the token of each event
        self.inner = OverTime(events, hidden, rngs=rngs)
        self.output = OverTime(hidden, tokens, rngs=rngs)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """`x: [B, t, d]` the newest t <= T events, `valid: [B, t] bool` -> `[B, M', d]`."""
        x = jnp.where(valid[..., None], x, 0)
        mixed = self.output(jax.nn.gelu(self.inner(x)))
        # The means are fixed: on a made-up regression (T = 50, M' = 5, three seeds) the squared error was 0.017 so,
        # 0.021 where the skip started as means and was learned, and 0.026 without a skip.
        own = np.array(self.span)[self.events - x.shape[1] :, None] == np.arange(
            mixed.shape[1]
        )
        counts = contract(
            "bt,to->bo",
            valid.astype(jnp.float32),
            jnp.asarray(own, jnp.float32),
            spec_of(valid),
        )
        sums = contract("btd,to->bod", x, jnp.asarray(own, x.dtype), spec_of(x))
        return sums / jnp.maximum(counts, 1)[..., None].astype(x.dtype) + mixed


class AttentionPool(nnx.Module):
    """One token per group of k events: a Transformer layer inside the group, then a learned query per head.

    `X = X + A(RMSNorm(X) + P)`, `X = X + gelu(RMSNorm(X) W_1) W_2`, and head h of the token is the mean of its share of
    the channels of X, weighted by `softmax(RMSNorm(X) q_h)`. P, one learned vector per place in the group, tells the
    order. Groups end at the newest event; the oldest one may be short. A group without an event gives zeros.

    Args:
      width: d, a multiple of `heads`.
      group: k.
    """

    def __init__(self, width: int, heads: int, group: int, *, rngs: nnx.Rngs):
        if width % heads:
            raise InputError(
                f"heads={heads} does not divide width={width}; use a divisor"
            )
        each = width // heads
        self.group = group
        self.place = weight(rngs, (group, width), None, None, inputs=width)
        self.query = weight(
            rngs, (width, heads, each), "embed", "heads", None, inputs=width
        )
        self.key = weight(
            rngs, (width, heads, each), "embed", "heads", None, inputs=width
        )
        self.value = weight(
            rngs, (width, heads, each), "embed", "heads", None, inputs=width
        )
        self.output = weight(
            rngs, (heads, each, width), "heads", None, "embed", inputs=width
        )
        self.attention_norm = RMSNorm(width)
        self.ffn_norm = RMSNorm(width)
        self.inner = weight(rngs, (width, 2 * width), "embed", "ffn", inputs=width)
        self.outer = weight(rngs, (2 * width, width), "ffn", "embed", inputs=2 * width)
        self.reader = weight(rngs, (width, heads), None, None, inputs=width)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """`x: [B, T, d]`, `valid: [B, T] bool` -> `[B, ceil(T / k), d]`, for any T."""
        batch, events, width = x.shape
        groups = -(-events // self.group)
        missing = groups * self.group - events
        x = jnp.pad(jnp.where(valid[..., None], x, 0), ((0, 0), (missing, 0), (0, 0)))
        x = x.reshape(batch, groups, self.group, width)
        valid = jnp.pad(valid, ((0, 0), (missing, 0))).reshape(
            batch, groups, self.group
        )
        return self._read(self._mix(x, valid), valid)

    def _mix(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """The Transformer layer, on `x: [B, G, k, d]`."""
        rows, of_heads = (
            RULES("batch", None, None, None),
            RULES("batch", None, None, "heads", None),
        )

        def project(kernel: nnx.Param) -> jax.Array:
            return contract("bgkd,dhe->bgkhe", normed, kernel[...], of_heads)

        normed = self.attention_norm(x) + self.place[...].astype(x.dtype)
        q, k, v = project(self.query), project(self.key), project(self.value)
        logits = jnp.einsum(
            "bgqhe,bgkhe->bghqk",
            q * q.shape[-1] ** -0.5,
            k,
            preferred_element_type=jnp.float32,
        )
        weights = jax.nn.softmax(
            jnp.where(valid[:, :, None, None, :], logits, MASKED), axis=-1
        )
        seen = jnp.einsum("bghqk,bgkhe->bgqhe", weights.astype(v.dtype), v)
        x = x + contract("bgqhe,hed->bgqd", seen, self.output[...], rows)
        wide = RULES("batch", None, None, "ffn")
        inner = contract("bgkd,df->bgkf", self.ffn_norm(x), self.inner[...], wide)
        return x + contract("bgkf,fd->bgkd", jax.nn.gelu(inner), self.outer[...], rows)

    def _read(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """The learned queries, on `x: [B, G, k, d] -> [B, G, d]`."""
        rows = RULES("batch", None, None, None)
        logits = contract(
            "bgkd,dh->bgkh", rms_normalize(x), self.reader[...], rows
        ).astype(jnp.float32)
        weights = jax.nn.softmax(jnp.where(valid[..., None], logits, MASKED), axis=2)
        # Of an empty group every weight is 1 / k: without the mask its token would be made of padding.
        weights = jnp.where(valid[..., None], weights, 0).astype(x.dtype)
        shares = x.reshape(*x.shape[:-1], weights.shape[-1], -1)
        read = jnp.einsum("bgkh,bgkhe->bghe", weights, shares)
        return read.reshape(*read.shape[:2], x.shape[-1])


def _pool(
    plan: CompressionPlan, width: int, heads: int, rngs: nnx.Rngs
) -> MlpOverTime | AttentionPool | None:
    if plan.kind == "mlp":
        return MlpOverTime(
            plan.events - plan.recent, plan.compressed, 4 * plan.compressed, rngs=rngs
        )
    return (
        AttentionPool(width, heads, plan.group, rngs=rngs)
        if plan.kind == "attention"
        else None
    )


class Compressor(nnx.Module):
    """Older events compressed as the plan says, the newest `recent` untouched, oldest first.

    The inner width of "mlp" is four times its number of tokens. Weights do not depend on the length of a stream.
    """

    def __init__(
        self, plan: CompressionPlan, width: int, heads: int, *, rngs: nnx.Rngs
    ):
        self.plan = plan
        self.pool = _pool(plan, width, heads, rngs)

    def __call__(self, x: jax.Array, valid: jax.Array) -> jax.Array:
        """`x: [B, t, d]`, `valid: [B, t] bool` -> `[B, plan.of(t).tokens, d]`.

        Raises:
          InputError: there are more events than the plan has.
        """
        plan = self.plan.of(x.shape[1])
        older = plan.older
        if self.pool is None or not older:
            return x
        made = self.pool(x[:, :older], valid[:, :older])
        kept = plan.tokens - (plan.length - older)
        return jnp.concatenate([made[:, made.shape[1] - kept :], x[:, older:]], axis=1)

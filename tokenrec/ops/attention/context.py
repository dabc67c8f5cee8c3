"""Attention of streams whose tokens are split over the mesh axis `context`.

How it works. Every device projects queries, keys and values of its own tokens. Then

1. keys and values come: all of them by an all-gather, or the halo that a window needs
   from the part before by a collective-permute;
2. chunks of queries change places in a full layer, so that all parts have the same
   work (`tokenrec.ops.attention.context_plan` has the plan and its reasons);
3. each device runs an implementation on its part, with the mask of its part;
4. the outputs go back to the places of their queries.

JAX derives the backward pass: gradients of keys and values are summed over the devices
while they are scattered to their owners. The gathered arrays are not kept for it but
gathered again, so that no device holds whole streams between the passes.

All devices run one program. Splash takes the list of its tiles as data, split over the
parts. The other implementations have static plans: the program holds those of all
parts, and a device runs its own (`jax.lax.switch`).

Shape letters: B streams, Q queries, K keys, H heads, h width of a head, P parts.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from tokenrec.ops.attention import splash
from tokenrec.ops.attention.context_plan import SplitPlan, chunk_owner
from tokenrec.ops.attention.remat import SAVE_ATTENTION
from tokenrec.ops.attention.splash_kernel import SplashKernel, make_kernel
from tokenrec.sharding import RULES

AXIS = "context"

# `(q, k, v, valid) -> out` of the part at hand, on the arrays that it holds.
_Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]


def split_attention(
    attend: Callable[..., jax.Array],
    plan: SplitPlan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    window: int | None,
) -> jax.Array:
    """Compute attention by an implementation with static plans, one for each part.

    Args:
      attend: `(q, k, v, pattern, window, valid) -> out`, of one device.
      plan: what each part computes.
      q: `[B, Q, H, h]`, split by streams, tokens and heads.
      k: `[B, K, H, h]`, split likewise.
      v: `[B, K, H, h]`, split likewise.
      valid: `[B, K] bool`, keys that are not padding, split by streams; None: all.
      window: keys that a query of a sliding layer sees; None in a full layer.

    Returns:
      `[B, Q, H, h]`, split as `q`.
    """

    def branch(number: int) -> _Attend:
        part = plan.parts[number].cut(window)
        stop = part.first_key + len(part.pattern.key_positions)
        keys = slice(part.first_key, stop)
        swap = plan.balanced and number % 2 == 1

        def compute(
            q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
        ) -> jax.Array:
            # Chunks arrive in an order that a swap of two halves puts right.
            half = q.shape[1] // 2
            q = jnp.roll(q, half, axis=1) if swap else q
            shown = None if valid is None else valid[:, keys]
            out = attend(q, k[:, keys], v[:, keys], part.pattern, window, shown)
            return jnp.roll(out, half, axis=1) if swap else out

        return compute

    branches = [branch(number) for number in range(len(plan.parts))]

    def local(q: jax.Array, k: jax.Array, v: jax.Array, *valid: jax.Array) -> jax.Array:
        def attend_part(
            q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
        ) -> jax.Array:
            return jax.lax.switch(jax.lax.axis_index(AXIS), branches, q, k, v, valid)

        return _exchange(plan, attend_part, q, k, v, valid[0] if valid else None)

    inputs = (q, k, v) if valid is None else (q, k, v, valid)
    return _map(local, inputs, ())


def split_splash(
    plan: SplitPlan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
    *,
    window: int | None,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Compute attention by the splash kernels, one program for all parts.

    Args:
      plan: what each part computes.
      q: `[B, Q, H, h]`, split by streams, tokens and heads.
      k: `[B, K, H, h]`, split likewise.
      v: `[B, K, H, h]`, split likewise.
      valid: `[B, K] bool`, keys that are not padding, split by streams; None: all.
      window: keys that a query of a sliding layer sees; None in a full layer.
      blocks: queries and keys of a tile; None: the kernel's choice.
      interpret: run the kernels step by step on any platform, slowly, for tests.

    Returns:
      `[B, Q, H, h]`, split as `q`.
    """
    spans = plan.spans(window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    mesh = jax.sharding.get_abstract_mesh()
    heads = q.shape[2] // mesh.shape["tensor"]
    kernel = make_kernel(
        spans, plan.keys, heads, len(plan.parts), blocks=blocks, interpret=interpret
    )
    # The kernel is data: its lists of tiles and its queries' places are split by part.
    by_part = jax.NamedSharding(mesh, PartitionSpec(None, AXIS))
    call_specs = kernel.call.manual_sharding_spec(by_part)
    itself_spec = RULES("tokens")

    def local(
        call: jax.Array,
        itself: jax.Array,
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        *valid: jax.Array,
    ) -> jax.Array:
        own = SplashKernel(call, itself, kernel.queries, kernel.keys)

        def attend_part(
            q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array | None
        ) -> jax.Array:
            return splash.run_kernel(own, q, k, v, valid)

        return _exchange(plan, attend_part, q, k, v, valid[0] if valid else None)

    inputs = (q, k, v) if valid is None else (q, k, v, valid)
    masks = (kernel.call, jnp.asarray(kernel.itself, jnp.int32))
    return _map(local, (*masks, *inputs), (call_specs, itself_spec))


def _map(
    local: Callable[..., jax.Array],
    arguments: tuple[jax.Array, ...],
    first_specs: tuple[object, ...],
) -> jax.Array:
    """Call `local(*first, q, k, v[, valid])` on every device."""
    by_head = RULES("batch", "tokens", "heads", None)
    specs = (*first_specs, by_head, by_head, by_head, RULES("batch", None))
    specs = specs[: len(arguments)]
    arguments = jax.tree.map(jax.sharding.reshard, arguments, specs)
    # Only what a policy names is kept: not what is gathered.
    kept = jax.checkpoint(local, policy=SAVE_ATTENTION)
    return jax.shard_map(kept, in_specs=specs, out_specs=by_head, check_vma=False)(
        *arguments
    )


def _exchange(
    plan: SplitPlan,
    attend: _Attend,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    valid: jax.Array | None,
) -> jax.Array:
    """Fetch what a part needs, attend, and send the outputs back, on one device.

    Args:
      plan: what each part computes.
      attend: the attention of this part.
      q: `[B, Q / P, H, h]`, the queries of this part.
      k: `[B, K / P, H, h]`, its keys.
      v: `[B, K / P, H, h]`, its values.
      valid: `[B, K] bool`, of all keys.
    """
    if plan.halo is None:
        k, v = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
    else:
        k, v = (_with_halo(x, plan.halo, len(plan.parts)) for x in (k, v))
        if valid is not None:
            # Before the first part there is nothing.
            padded = jnp.pad(valid, ((0, 0), (plan.halo, 0)))
            start = jax.lax.axis_index(AXIS) * (plan.keys - plan.halo)
            valid = jax.lax.dynamic_slice_in_dim(padded, start, plan.keys, axis=1)
    if not plan.balanced:
        return attend(q, k, v, valid)
    parts = len(plan.parts)
    out = attend(_swap_chunks(q, parts), k, v, valid)
    return _swap_chunks(out, parts, back=True)


def _with_halo(x: jax.Array, halo: int, parts: int) -> jax.Array:
    """Put the last `halo` tokens of the part before in front of `[B, n, H, h]`."""
    to_next = [(part, part + 1) for part in range(parts - 1)]
    # The first part receives zeros.
    received = jax.lax.ppermute(x[:, x.shape[1] - halo :], AXIS, to_next)
    return jnp.concatenate([received, x], axis=1)


def _swap_chunks(x: jax.Array, parts: int, *, back: bool = False) -> jax.Array:
    """Send the two chunks of `[B, n, H, h]` to the parts that compute them, or back."""
    chunks = jnp.split(x, 2, axis=1)
    moved = []
    for which, chunk in enumerate(chunks):
        pairs = [(part, chunk_owner(2 * part + which, parts)) for part in range(parts)]
        if back:
            pairs = [(owner, part) for part, owner in pairs]
        moved.append(jax.lax.ppermute(chunk, AXIS, pairs))
    return jnp.concatenate(moved, axis=1)

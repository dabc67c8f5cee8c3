"""What the attention benchmarks time: a case, its useful operations, its inputs and its compiled program."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.attention import PREFERRED, attention, choose, current_platform
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.planner.roofline import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    attention_flops,
    visible_pairs,
)
from tokenrec.sharding import RULES, make_mesh

PASSES = ("forward", "forward_backward")
DTYPES = ("float32", "bfloat16")


class Case(NamedTuple):
    """What one row times. `mesh` is data x fsdp x tensor, as in "2x1x2"; `window` None is full causal attention."""

    mesh: str
    seq_len: int
    window: int | None
    implementation: str
    dtype: str
    pass_: str

    def row(self) -> dict[str, Any]:
        """The columns that name the case, by which results are compared."""
        named = {
            name.removesuffix("_"): value for name, value in self._asdict().items()
        }
        return named | {"window": self.window or "full"}


class Sizes(NamedTuple):
    """`[batch, seq_len, heads, head_dim]` without the length."""

    batch: int
    heads: int
    head_dim: int


def useful_flops(case: Case, sizes: Sizes) -> float:
    """Operations that the result needs: two products over visible pairs forward, and five more backward."""
    pairs = sizes.batch * visible_pairs(
        causal_pattern(case.seq_len, case.seq_len), case.window
    )
    products = FORWARD_PRODUCTS + (
        BACKWARD_PRODUCTS if case.pass_ == "forward_backward" else 0
    )
    return attention_flops(pairs, sizes.heads, sizes.head_dim, products)


def logits_gib(case: Case, sizes: Sizes) -> float:
    """Size of the float32 logits of every query and every key, over all streams and heads."""
    return 4 * sizes.batch * sizes.heads * case.seq_len**2 / 2**30


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Devices along data, fsdp and tensor.

    >>> parse_mesh("2x1x4")
    (2, 1, 4)
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(
            f"--meshes {text}: a mesh is data x fsdp x tensor, three whole numbers; write 1x1x1 or 2x1x4"
        )
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


def local_mesh(text: str, sizes: Sizes) -> jax.sharding.Mesh:
    """The mesh over the first local devices.

    Raises:
      InputError: too few devices, or a batch or heads that the mesh cannot split.
    """
    data, fsdp, tensor = parse_mesh(text)
    count, there = data * fsdp * tensor, len(jax.devices())
    if count > there:
        raise InputError(
            f"--meshes {text} needs {count} devices and there are {there}; take a smaller mesh, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if sizes.batch % (data * fsdp) or sizes.heads % tensor:
        raise InputError(
            f"--meshes {text} splits --batch {sizes.batch} into {data * fsdp} and --heads {sizes.heads} into {tensor} "
            "parts, which does not come out even; take multiples"
        )
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:count])


def array_spec(
    case: Case, sizes: Sizes, mesh: jax.sharding.Mesh
) -> jax.ShapeDtypeStruct:
    """`[B, S, H, h]`, laid over the mesh as the backbone lays queries, keys and values."""
    place = jax.NamedSharding(mesh, RULES("batch", None, "heads", None))
    shape = (sizes.batch, case.seq_len, sizes.heads, sizes.head_dim)
    return jax.ShapeDtypeStruct(shape, jnp.dtype(case.dtype), sharding=place)


def random_inputs(
    case: Case, sizes: Sizes, mesh: jax.sharding.Mesh
) -> tuple[jax.Array, ...]:
    """Normal q, k, v and gradient of the output, `[B, S, H, h]` each."""
    x = array_spec(case, sizes, mesh)
    return tuple(
        jax.device_put(
            jax.random.normal(jax.random.key(seed), x.shape, x.dtype), x.sharding
        )
        for seed in range(4)
    )


def refusal(case: Case, sizes: Sizes, mesh: jax.sharding.Mesh) -> str:
    """Why the implementation does not serve the case; empty where it does."""
    with jax.set_mesh(mesh):
        kind = current_platform()
    if case.implementation not in PREFERRED[kind]:
        return f"it is not for a {kind}, which has {', '.join(PREFERRED[kind])}"
    pattern = causal_pattern(case.seq_len, case.seq_len)

    def serve(x: jax.Array) -> jax.Array:
        choose(
            x,
            x,
            window=case.window,
            pattern=pattern,
            implementation=case.implementation,
        )
        return x

    try:
        with jax.set_mesh(mesh):
            jax.eval_shape(serve, array_spec(case, sizes, mesh))
    except InputError as error:
        return str(error)
    return ""


def compile_case(
    case: Case,
    sizes: Sizes,
    mesh: jax.sharding.Mesh,
    *,
    attend: Callable[..., jax.Array] | None = None,
) -> jax.stages.Compiled:
    """`(q, k, v) -> out`, or `(q, k, v, gradient of out) -> (out, gradients of q, k and v)`.

    `attend(q, k, v)`: instead of the one entry with the case's implementation.
    """
    attend = attend or functools.partial(
        attention, window=case.window, implementation=case.implementation
    )

    def forward_backward(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(gradient)

    x = array_spec(case, sizes, mesh)
    with jax.set_mesh(mesh):
        lowered = (
            jax.jit(attend).lower(x, x, x)
            if case.pass_ == "forward"
            else jax.jit(forward_backward).lower(*[x] * 4)
        )
        return lowered.compile()

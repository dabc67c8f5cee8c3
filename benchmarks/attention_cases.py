"""Cases of the attention benchmarks: columns, meshes, useful work, compiled programs.

A `Case` names a row of a result. Its arrays are those of a named spec
(`benchmarks.attention_specs`): plain causal order at the case's length and window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from benchmarks.attention_specs import AttentionSpec, causal_spec
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.ops.attention import (
    attention,
    choose,
    current_platform,
    implementations_of,
)
from tokenrec.planner.attention_cost import (
    BACKWARD_PRODUCTS,
    FORWARD_PRODUCTS,
    attention_flops,
    visible_pairs,
)
from tokenrec.sharding import RULES, make_mesh

PASSES = ("forward", "forward_backward")
DTYPES = ("float32", "bfloat16")


class Sizes(NamedTuple):
    """Sizes that all cases of a run share.

    Attributes:
      batch: B, streams.
      heads: H.
      head_dim: h.
    """

    batch: int
    heads: int
    head_dim: int


class Case(NamedTuple):
    """The columns that name one row of a result.

    Attributes:
      mesh: devices along data x fsdp x tensor, such as "2x1x2".
      seq_len: S, tokens of a stream.
      window: keys that a query sees; None: full causal attention.
      implementation: key of `IMPLEMENTATIONS`.
      dtype: of queries, keys and values.
      pass_: "forward" or "forward_backward".
    """

    mesh: str
    seq_len: int
    window: int | None
    implementation: str
    dtype: str
    pass_: str

    def row(self) -> dict[str, Any]:
        """The columns by name; results of two runs are matched by them."""
        columns = {
            name.removesuffix("_"): value for name, value in self._asdict().items()
        }
        return columns | {"window": self.window or "full"}

    def spec(self, sizes: Sizes) -> AttentionSpec:
        """The arguments of attention."""
        return causal_spec(
            self.seq_len,
            self.seq_len,
            self.window,
            dtype=self.dtype,
            **sizes._asdict(),
        )


def useful_flops(spec: AttentionSpec, pass_: str) -> float:
    """Count the FLOPs that the result needs, over all streams and heads.

    They are two products over visible pairs forward, and five more backward.
    """
    pairs = spec.batch * visible_pairs(spec.pattern, spec.window)
    products = FORWARD_PRODUCTS
    if pass_ == "forward_backward":
        products += BACKWARD_PRODUCTS
    return attention_flops(pairs, spec.heads, spec.head_dim, products)


def logits_gib(spec: AttentionSpec) -> float:
    """GiB of the float32 logits of all queries and keys, over all streams and heads."""
    return 4 * spec.batch * spec.heads * spec.queries * spec.keys / 2**30


def parse_mesh(text: str) -> tuple[int, int, int]:
    """Read the devices along data, fsdp and tensor.

    >>> parse_mesh("2x1x4")
    (2, 1, 4)
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise InputError(
            f"--meshes {text} is not data x fsdp x tensor, three whole numbers; "
            "write 1x1x1 or 2x1x4"
        )
    data, fsdp, tensor = map(int, parts)
    return data, fsdp, tensor


def local_mesh(text: str, sizes: Sizes) -> jax.sharding.Mesh:
    """Make a mesh over the first local devices.

    Args:
      text: devices along data x fsdp x tensor.
      sizes: sizes of the run, which the mesh splits.

    Raises:
      InputError: too few devices, or a batch or heads that the mesh cannot split.
    """
    data, fsdp, tensor = parse_mesh(text)
    count, available = data * fsdp * tensor, len(jax.devices())
    if count > available:
        raise InputError(
            f"--meshes {text} needs {count} devices and there are {available}; take a "
            "smaller mesh, or on a CPU set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    if sizes.batch % (data * fsdp) or sizes.heads % tensor:
        raise InputError(
            f"--meshes {text} splits --batch {sizes.batch} into {data * fsdp} and "
            f"--heads {sizes.heads} into {tensor} parts, which does not come out even; "
            "take multiples"
        )
    return make_mesh(MeshConfig(data, fsdp, tensor), jax.devices()[:count])


def unsupported_reason(
    spec: AttentionSpec, implementation: str, mesh: jax.sharding.Mesh
) -> str:
    """Say why an implementation does not serve a spec on a mesh, or return ""."""
    with jax.set_mesh(mesh):
        platform = current_platform()
    if implementation not in implementations_of(platform):
        others = ", ".join(implementations_of(platform))
        return f"it is not for a {platform}, which has {others}"

    def serve(q: jax.Array, k: jax.Array) -> jax.Array:
        choose(
            q,
            k,
            window=spec.window,
            pattern=spec.pattern,
            implementation=implementation,
        )
        return q

    q, k, _, _ = spec.arrays(mesh)
    try:
        with jax.set_mesh(mesh):
            jax.eval_shape(serve, q, k)
    except InputError as error:
        return str(error)
    return ""


def _on_each_device(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Map a function of q, k and v over the mesh, as `attention` does with its own.

    Library code fails on arrays of an explicit mesh: a reshape of a batch of one
    forgets over which axis the batch is split, and the next product raises a
    ShardingTypeError.
    """
    spec = RULES("batch", None, "heads", None)
    return jax.shard_map(
        attend, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False
    )


def compile_attention(
    spec: AttentionSpec,
    implementation: str,
    pass_: str,
    mesh: jax.sharding.Mesh,
    *,
    attend: Callable[..., jax.Array] | None = None,
) -> jax.stages.Compiled:
    """Compile one pass of attention for a mesh.

    Args:
      spec: the arguments.
      implementation: key of `IMPLEMENTATIONS`.
      pass_: "forward" or "forward_backward".
      mesh: the mesh, which may be that of a described pod.
      attend: `(q, k, v) -> out` on the arrays of one device, to compile in place of
        `attention`.

    Returns:
      `(q, k, v) -> out`, or `(q, k, v, gradient of out) -> (out, gradients of q, k,
      v)`.
    """
    if attend is None:
        attend = functools.partial(
            attention,
            window=spec.window,
            implementation=implementation,
            pattern=spec.pattern,
        )
    else:
        attend = _on_each_device(attend)

    def forward_backward(
        q: jax.Array, k: jax.Array, v: jax.Array, gradient: jax.Array
    ) -> tuple[jax.Array, ...]:
        out, pull_back = jax.vjp(attend, q, k, v)
        return out, *pull_back(gradient)

    q, k, v, gradient = spec.arrays(mesh)
    with jax.set_mesh(mesh):
        if pass_ == "forward":
            return jax.jit(attend).lower(q, k, v).compile()
        return jax.jit(forward_backward).lower(q, k, v, gradient).compile()

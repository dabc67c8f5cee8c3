"""What a train step has to do, in FLOPs: matrix products as traced, attention by formula and by implementation."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import Mesh

from tokenrec.data.batch import Batch
from tokenrec.ops.attention import Choice, choose, splash
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.planner.roofline import (
    FORWARD_PRODUCTS,
    MODEL_BACKWARD_PRODUCTS,
    attention_bytes,
    attention_flops,
    visible_pairs,
    visible_tiles,
)
from tokenrec.sharding import with_batch_sharding
from tokenrec.state import ModelSpec, abstract_state, bind_params
from tokenrec.step import step_loss, train_step

# Splash makes the gradients of q, and of k and v, in two kernels, each of which makes the logits and their gradient.
SPLASH_BACKWARD_PRODUCTS = 7
# FLOPs of a train step over those of its forward pass: the gradient of a product is two products.
STEP_OVER_FORWARD = 3


class Work(NamedTuple):
    """What a program has to do, over all devices.

    Attributes:
      model_flops: what the mathematics asks for, without recomputation: the numerator of MFU.
      kernel_flops, kernel_bytes: of what runs in custom calls, where XLA sees nothing.
    """

    model_flops: float
    kernel_flops: float
    kernel_bytes: float


def attention_work(
    implementation: str,
    pattern: Pattern,
    window: int | None,
    *,
    batch: int,
    heads: int,
    head_dim: int,
    itemsize: int,
    backward: bool,
) -> Work:
    """Of one attention over `batch` streams. Model FLOPs count visible pairs, a kernel's the tiles that it computes."""
    shape = len(pattern.query_positions), len(pattern.key_positions)
    products = FORWARD_PRODUCTS + (MODEL_BACKWARD_PRODUCTS if backward else 0)
    model = batch * attention_flops(
        visible_pairs(pattern, window), heads, head_dim, products
    )
    if implementation != "splash":
        return Work(model, 0.0, 0.0)
    spans = splash.visible_spans(pattern, window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    sides = splash.block_sizes(spans, shape[1])
    tiled = visible_tiles(pattern, window, *sides) * math.prod(sides)
    products = FORWARD_PRODUCTS + (SPLASH_BACKWARD_PRODUCTS if backward else 0)
    bytes_ = sum(
        attention_bytes(*shape, heads, head_dim, itemsize, backward=b)
        for b in (False, True)[: 1 + backward]
    )
    return Work(
        model, batch * attention_flops(tiled, heads, head_dim, products), batch * bytes_
    )


def step_work(
    model: ModelSpec, mesh: Mesh, shapes: Batch
) -> tuple[Work, list[dict[str, Any]]]:
    """Work of a train step on a full batch, and per layer `{"window", "queries", "keys", "implementation", "refused"}`.

    Model FLOPs are three times the matrix products of a forward pass, attention over visible pairs only.
    """
    config = model.config
    batch, events = shapes.valid.shape
    dtype = jnp.dtype(config.model.dtype)
    heads, head_dim = config.model.heads, config.model.width // config.model.heads
    with jax.set_mesh(mesh):
        state = abstract_state(model)
        forward = jax.make_jaxpr(step_loss, static_argnums=0)(
            model, state, with_batch_sharding(shapes, mesh)
        )
        layers, works = (
            [],
            [Work(STEP_OVER_FORWARD * product_flops(forward.jaxpr), 0.0, 0.0)],
        )
        for pattern, window, own in bind_params(
            model, state.params
        ).backbone.attention_layers(model.layout(events)):
            queries, keys = pattern.query_positions, pattern.key_positions
            q, k = ((batch, len(some), heads, head_dim) for some in (queries, keys))
            wanted = (
                None if config.model.attention == "auto" else config.model.attention
            )
            name, refused = (
                (own, {})
                if own
                else implementation_of(q, k, window, pattern, dtype, wanted)
            )
            sizes = {"window": window, "queries": len(queries), "keys": len(keys)}
            layers.append(sizes | {"implementation": name, "refused": refused})
            each = {
                "batch": batch,
                "heads": heads,
                "head_dim": head_dim,
                "itemsize": dtype.itemsize,
            }
            works.append(attention_work(name, pattern, window, **each, backward=True))
    return Work(*(sum(part) for part in zip(*works, strict=True))), layers


def implementation_of(
    q: tuple[int, ...],
    k: tuple[int, ...],
    window: int | None,
    pattern: Pattern,
    dtype: Any,
    name: str | None = None,
) -> Choice:
    """What `attention` chooses for arrays of these shapes under the mesh in use; `name` as its `implementation`."""
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k)]
    return choose(*arrays, window=window, pattern=pattern, implementation=name)


def product_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products of a traced program, global shapes, attention left out.

    Attention is the only `shard_map` with products there. Bodies of scans count as often as they run, of `while` once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, made = (
                _shape_of(one[0]) for one in (equation.invars, equation.outvars)
            )
            total += (
                2.0 * math.prod(left[axis] for axis in contracted) * math.prod(made)
            )
        elif equation.primitive.name != "shard_map":
            trips = (
                equation.params["length"] if equation.primitive.name == "scan" else 1
            )
            total += trips * sum(
                product_flops(inner)
                for inner in _inner_jaxprs(equation.params.values())
            )
    return total


def step_flops(model: ModelSpec, mesh: Mesh, shapes: Batch, work: Work) -> float:
    """FLOPs of a device in a train step: matrix products as traced, those computed again too, and those of kernels.

    XLA's own count has the body of a loop once, and nothing inside a kernel.
    """
    with jax.set_mesh(mesh):
        step = jax.make_jaxpr(train_step, static_argnums=0)(
            model, abstract_state(model), with_batch_sharding(shapes, mesh)
        )
    return device_flops(step.jaxpr) + work.kernel_flops / mesh.size


def device_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of one device in the matrix products of a traced program with explicit shardings; none inside a kernel."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, made = equation.invars[0].aval, equation.outvars[0].aval
            # A sum over mesh axes is made whole on every device, and scattered over them after that.
            summed = {
                axis for dimension in contracted for axis in _mesh_axes(left, dimension)
            }
            sizes = [_local_size(left, dimension) for dimension in contracted]
            sizes += [
                _local_size(made, dimension, summed)
                for dimension in range(len(_shape_of(equation.outvars[0])))
            ]
            total += 2.0 * math.prod(sizes)
        elif equation.primitive.name != "pallas_call":
            trips = (
                equation.params["length"] if equation.primitive.name == "scan" else 1
            )
            total += trips * sum(
                device_flops(inner) for inner in _inner_jaxprs(equation.params.values())
            )
    return total


def _mesh_axes(aval: Any, dimension: int) -> tuple[str, ...]:
    """Mesh axes that split a dimension of a traced array; none inside a `shard_map`, whose shapes are of one device."""
    if aval.sharding.mesh.empty or aval.sharding.mesh.are_all_axes_manual:
        return ()
    axes = aval.sharding.spec[dimension]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _local_size(aval: Any, dimension: int, besides: Collection[str] = ()) -> int:
    """Length of a dimension on one device, as the mesh axes split it, less those `besides`."""
    split = (
        aval.sharding.mesh.shape[axis]
        for axis in _mesh_axes(aval, dimension)
        if axis not in besides
    )
    return -(-aval.shape[dimension] // math.prod(split))


def _shape_of(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _inner_jaxprs(values: Iterable[Any]) -> Iterable[Jaxpr]:
    for value in values:
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _inner_jaxprs(value)

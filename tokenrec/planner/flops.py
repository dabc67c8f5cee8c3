"""FLOPs of a train step: matrix products from the traced program, attention by formula.

What is counted: `dot_general`, two FLOPs a multiply-add, and the products of attention
over visible pairs. What is not: element-wise operations, softmax, norms, look-ups and
reductions, which take little of the compute time and are bound by memory.

Two counts of the same step:

- *model FLOPs* (`step_work`): three times the forward pass (the gradient of a product
  is two products), without recomputation. A product with a frozen weight counts twice:
  its gradient is one product. The numerator of MFU. Of all devices together.
- *device FLOPs* (`step_flops`): what one device computes, what `model.remat` computes
  again included. The compute time of the roofline.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from tokenrec.config.backbones import head_width
from tokenrec.data.batch import Batch
from tokenrec.models.backbones.bfts import live_positions_alone
from tokenrec.ops.attention import Choice, choose, splash, splash_kernel, triton
from tokenrec.ops.attention.key_runs import visited_pairs
from tokenrec.ops.attention.pattern import Pattern
from tokenrec.ops.attention.rotary import is_exchange
from tokenrec.planner.attention_cost import (
    FORWARD_PRODUCTS,
    MODEL_BACKWARD_PRODUCTS,
    attention_bytes,
    attention_flops,
    visible_pairs,
    visible_tiles,
)
from tokenrec.planner.jaxprs import inner_jaxprs
from tokenrec.sharding import with_batch_sharding
from tokenrec.state import ModelSpec, TrainState, abstract_state, bind_params
from tokenrec.step import step_loss, train_step
from tokenrec.tuning import split_frozen

# The Pallas kernels compute the gradient of q, and those of k and v, in two kernels,
# each of which computes the logits and their gradient.
KERNEL_BACKWARD_PRODUCTS = 7
# FLOPs of a train step over those of its forward pass, if all weights are trained: the
# gradient of a product is two products.
STEP_OVER_FORWARD = 3


class Work(NamedTuple):
    """Work of a program over all devices.

    Attributes:
      model_flops: FLOPs of the mathematics, without recomputation: the numerator of
        MFU.
      kernel_flops: FLOPs inside custom calls, which XLA does not count.
      kernel_bytes: bytes that custom calls move to and from memory.
      forward_flops: the part of `model_flops` that is the forward pass.
    """

    model_flops: float
    kernel_flops: float
    kernel_bytes: float
    forward_flops: float = 0.0


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
    """Compute the work of one attention.

    Model FLOPs count visible pairs; the FLOPs of a kernel count the tiles that it
    computes.

    Args:
      implementation: name of the attention; "splash" and "triton" are custom calls.
      pattern: which queries see which keys.
      window: keys that a query of a sliding layer sees; None for full attention.
      batch: number of streams.
      heads: H.
      head_dim: h, the width of a head.
      itemsize: bytes of a number in q, k and v.
      backward: add the backward pass to the forward pass.
    """
    shape = len(pattern.query_positions), len(pattern.key_positions)
    products = FORWARD_PRODUCTS + (MODEL_BACKWARD_PRODUCTS if backward else 0)
    pairs = visible_pairs(pattern, window)
    model_flops = batch * attention_flops(pairs, heads, head_dim, products)
    forward_flops = model_flops * FORWARD_PRODUCTS / products
    if implementation == "splash":
        spans = splash.visible_spans(pattern, window)
        if isinstance(spans, str):
            raise AssertionError(spans)
        sides = splash_kernel.block_sizes(spans, shape[1])
        tile_pairs = visible_tiles(pattern, window, *sides) * math.prod(sides)
    elif implementation == "triton":
        sides = triton.block_sizes(*shape, head_dim, itemsize)
        tile_pairs = visited_pairs(triton.runs_of(pattern, window, *sides), *sides)
    else:
        return Work(model_flops, 0.0, 0.0, forward_flops)
    products = FORWARD_PRODUCTS + (KERNEL_BACKWARD_PRODUCTS if backward else 0)
    moved_bytes = sum(
        attention_bytes(*shape, heads, head_dim, itemsize, backward=is_backward)
        for is_backward in ((False, True) if backward else (False,))
    )
    kernel_flops = batch * attention_flops(tile_pairs, heads, head_dim, products)
    return Work(model_flops, kernel_flops, batch * moved_bytes, forward_flops)


def step_work(
    model: ModelSpec, mesh: Mesh, shapes: Batch
) -> tuple[Work, list[dict[str, Any]]]:
    """Compute the work of a train step on a full batch, over all devices.

    Model FLOPs are three times the matrix products of a forward pass over live
    positions (twice, if the weight is frozen), attention over visible pairs only.

    Args:
      model: static half of the run.
      mesh: mesh of the step, which may be described only.
      shapes: the batch as `jax.ShapeDtypeStruct`.

    Returns:
      The work, and per layer `{"window", "queries", "keys", "implementation",
      "refused"}`: the attention that serves it on this mesh, and the reasons against
      those that the platform prefers.
    """
    config = model.config
    batch, events = shapes.valid.shape
    dtype = jnp.dtype(config.model.dtype)
    heads, head_dim = config.model.heads, head_width(config.model)
    forced = None if config.model.attention == "auto" else config.model.attention
    with jax.set_mesh(mesh):
        state = abstract_state(model)
        backbone = bind_params(model, state.params).backbone
        # 1. Every product of the forward pass but those of attention. Traced anew: JAX
        #    would answer with the trace of the step, which has dead positions.
        with live_positions_alone():
            given = state, with_batch_sharding(shapes, mesh)
            traced = jax.make_jaxpr(lambda *given: step_loss(model, *given))(*given)
            forward = product_flops(traced.jaxpr)
            step = STEP_OVER_FORWARD * forward
            if split_frozen(config, state.params)[1]:
                step = trained_product_flops(model, *given)
            live_layers = backbone.attention_layers(model.layout(events))
        layers, works = [], [Work(step, 0.0, 0.0, forward)]
        # 2. Attention, layer by layer.
        for layer, live in zip(
            backbone.attention_layers(model.layout(events)), live_layers, strict=True
        ):
            pattern, window, named = layer
            queries, keys = len(pattern.query_positions), len(pattern.key_positions)
            q, k = ((batch, rows, heads, head_dim) for rows in (queries, keys))
            name, refused = (
                (named, {})
                if named
                else implementation_of(q, k, window, pattern, dtype, forced)
            )
            layers.append(
                {
                    "window": window,
                    "queries": queries,
                    "keys": keys,
                    "implementation": name,
                    "refused": refused,
                }
            )
            sizes = {
                "batch": batch,
                "heads": heads,
                "head_dim": head_dim,
                "itemsize": dtype.itemsize,
            }
            work = attention_work(name, pattern, window, **sizes, backward=True)
            # The dense form has no tiles: it counts the mathematics alone.
            needed = attention_work(
                "dense", live.pattern, window, **sizes, backward=True
            )
            works.append(
                work._replace(
                    model_flops=needed.model_flops, forward_flops=needed.forward_flops
                )
            )
    return Work(*(sum(part) for part in zip(*works, strict=True))), layers


def trained_product_flops(model: ModelSpec, state: TrainState, batch: Batch) -> float:
    """Count the FLOPs of a step's matrix products that something reads.

    Gradients of frozen weights are none of them. The gradient is traced without
    recomputation; attention is left out.
    """
    kept = dataclasses.replace(model.config.model, remat="none")
    config = dataclasses.replace(model.config, model=kept)
    model = dataclasses.replace(model, config=config)
    trained, frozen = split_frozen(config, state.params)

    def loss(trained: Any, tables: Any, frozen: Any, batch: Batch) -> jax.Array:
        given = dataclasses.replace(state, params=frozen | trained, tables=tables)
        return step_loss(model, given, batch)

    gradient = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(
        trained, state.tables, frozen, batch
    )
    return product_flops(_without_dead(gradient.jaxpr))


def _without_dead(jaxpr: Jaxpr) -> Jaxpr:
    """Drop the equations of a traced program whose results nothing reads."""
    return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0]


def implementation_of(
    q: tuple[int, ...],
    k: tuple[int, ...],
    window: int | None,
    pattern: Pattern,
    dtype: Any,
    name: str | None = None,
) -> Choice:
    """Choose the attention for arrays of these shapes, as `attention` does.

    Args:
      q: shape of the queries, `[B, Q, H, h]`.
      k: shape of the keys, `[B, K, H, h]`.
      window: keys that a query of a sliding layer sees; None for full attention.
      pattern: which queries see which keys.
      dtype: of queries and keys.
      name: an implementation that is demanded; None chooses for the mesh in use.
    """
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k)]
    return choose(*arrays, window=window, pattern=pattern, implementation=name)


def product_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of the matrix products of a traced program, attention left out.

    Shapes are global: the count is over all devices. The body of a scan counts as often
    as it runs, that of a `while` once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if is_exchange(equation.primitive, equation.params):
            continue
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = _shape_of(equation.invars[0])
            output = _shape_of(equation.outvars[0])
            sizes = math.prod(left[axis] for axis in contracted), math.prod(output)
            total += 2.0 * sizes[0] * sizes[1]
        # Attention is the only `shard_map` of a forward pass with products in it.
        elif equation.primitive.name != "shard_map":
            total += _inner_flops(equation, product_flops)
    return total


def step_flops(model: ModelSpec, mesh: Mesh, shapes: Batch, work: Work) -> float:
    """Compute the FLOPs of one device in a train step.

    Matrix products as traced, those that `model.remat` computes again too, and those of
    kernels; not the gradients of frozen weights, which nothing reads. XLA's own count
    has the body of a loop once, and nothing inside a kernel.

    Args:
      model: static half of the run.
      mesh: mesh of the step, which may be described only.
      shapes: the batch as `jax.ShapeDtypeStruct`.
      work: `step_work` of the same step.
    """
    with jax.set_mesh(mesh):
        step = jax.make_jaxpr(train_step, static_argnums=0)(
            model, abstract_state(model), with_batch_sharding(shapes, mesh)
        )
    return device_flops(_without_dead(step.jaxpr)) + work.kernel_flops / mesh.size


def device_flops(jaxpr: Jaxpr) -> float:
    """Count the FLOPs of one device in the matrix products of a traced program.

    The program has explicit shardings, which give the shape of a product on one device.
    Kernels (`pallas_call`) are left out.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, output = equation.invars[0].aval, equation.outvars[0].aval
            # A sum over mesh axes is first made whole on every device, and scattered
            # over them after that: those axes do not make the output smaller.
            summed = {axis for dim in contracted for axis in _mesh_axes(left, dim)}
            sizes = [_local_size(left, dim) for dim in contracted]
            dims = range(len(_shape_of(equation.outvars[0])))
            sizes += [_local_size(output, dim, summed) for dim in dims]
            total += 2.0 * math.prod(sizes)
        elif equation.primitive.name != "pallas_call":
            total += _inner_flops(equation, device_flops)
    return total


def _inner_flops(equation: Any, count: Callable[[Jaxpr], float]) -> float:
    """FLOPs of the programs inside an equation; those of a scan times its length.

    Of a `cond`, one branch runs: the largest counts.
    """
    inner = [count(each) for each in inner_jaxprs(equation.params.values())]
    if equation.primitive.name == "cond":
        return max(inner)
    return sum(inner) * (
        equation.params["length"] if equation.primitive.name == "scan" else 1
    )


def _mesh_axes(aval: Any, dimension: int) -> tuple[str, ...]:
    """Mesh axes that split a dimension of a traced array.

    None inside a `shard_map`, whose shapes are those of one device already.
    """
    if aval.sharding.mesh.empty or aval.sharding.mesh.are_all_axes_manual:
        return ()
    axes = aval.sharding.spec[dimension]
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def _local_size(aval: Any, dimension: int, besides: Collection[str] = ()) -> int:
    """Length of a dimension on one device; mesh axes in `besides` do not split it."""
    split = (
        aval.sharding.mesh.shape[axis]
        for axis in _mesh_axes(aval, dimension)
        if axis not in besides
    )
    return -(-aval.shape[dimension] // math.prod(split))


def _shape_of(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape

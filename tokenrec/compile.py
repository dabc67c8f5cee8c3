"""Compiles for a pod that is not there: libtpu compiles for a described topology on any machine.

What comes out is the program that the pod would run, so its memory, FLOPs and collectives are facts; times are the
lower bounds of `roofline.py`.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, Mesh
from jax.stages import Compiled

from tokenrec.config import MeshConfig
from tokenrec.data.batch import Batch
from tokenrec.describe import _laid_out as laid_out
from tokenrec.errors import InputError, suggest
from tokenrec.models.backbone import layer_rows, layer_windows
from tokenrec.models.recommender import stream_layout
from tokenrec.ops import splash
from tokenrec.ops.attention import Choice, choose
from tokenrec.ops.pattern import Pattern
from tokenrec.roofline import (
    FORWARD_PRODUCTS,
    MODEL_BACKWARD_PRODUCTS,
    Roofline,
    attention_bytes,
    attention_flops,
    chip,
    network_seconds,
    read_program,
    visible_pairs,
    visible_tiles,
)
from tokenrec.sharding import AXES, make_mesh
from tokenrec.state import Model, abstract_state
from tokenrec.step import eval_step, train_step

# Dimensions of each kind of pod, and sizes that can be rented. libtpu knows more; a name that it refuses is compared
# with these.
DIMENSIONS = {"v5e": 2, "v6e": 2, "v5p": 3, "tpu7x": 3}
_SIZES = {
    2: ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16"),
    3: ("1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16"),
}
TOPOLOGIES = tuple(f"{kind}:{size}" for kind, dimensions in DIMENSIONS.items() for size in _SIZES[dimensions])

# libtpu 0.0.50 aborts the process ("Color count is less than local dma pipe shard count") when it writes the small
# all-reduces of a data-parallel step over 16 chips or more with this emitter, on v5e, v6e and v5p alike.
TPU_OPTIONS = {"xla_tpu_enable_pincer_short_emitter": False}

# Splash makes the gradients of q, and of k and v, in two kernels, each of which makes the logits and their gradient.
SPLASH_BACKWARD_PRODUCTS = 7


def described_mesh(topology: str, mesh: MeshConfig, slices: int = 1) -> Mesh:
    """Mesh `(data, fsdp, tensor)` over the devices of a pod that is described, not there; for compiling only.

    Args:
      topology: of each slice, "v5p:4x4x4".
      mesh: as in a config; `data` goes across the slices first, then on inside each.
      slices: so many, joined by the data-centre network.

    Raises:
      InputError: an unknown topology, sizes that do not fit it, or no libtpu.
    """
    if importlib.util.find_spec("libtpu") is None and "TPU_LIBRARY_PATH" not in os.environ:
        raise InputError(f"topology='{topology}': compiling for a TPU needs libtpu; pip install 'tokenrec[tpu]'")
    kind, _, size = topology.partition(":")
    if kind not in DIMENSIONS or not re.fullmatch(r"[1-9]\d*" + r"x[1-9]\d*" * (DIMENSIONS[kind] - 1), size):
        raise InputError(f"topology='{topology}' is not known{suggest(topology, TOPOLOGIES)}")
    # libtpu reads both when it is first used. It would else ask a cloud for this machine's metadata, and lock out every
    # other process, as on a machine with a TPU it should.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    try:
        options = {"num_slices": slices} if slices > 1 else {}
        devices = list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except jax.errors.JaxRuntimeError as error:
        raise InputError(f"topology='{topology}', refused by libtpu: {error}{suggest(topology, TOPOLOGIES)}") from error
    if slices > 1:
        return _hybrid_mesh(mesh, devices, slices)
    try:
        return make_mesh(mesh, devices)
    except NotImplementedError:  # an axis that no whole axes of the torus make up
        return Mesh(_split_devices(_shape(mesh, len(devices)), devices), AXES, axis_types=(AxisType.Explicit,) * 3)


def _shape(mesh: MeshConfig, devices: int) -> tuple[int, int, int]:
    fixed = mesh.fsdp * mesh.tensor
    return (devices // fixed if mesh.data == -1 else mesh.data, mesh.fsdp, mesh.tensor)


def _split_devices(shape: tuple[int, int, int], devices: list[jax.Device]) -> np.ndarray:
    try:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    except NotImplementedError:  # two devices a chip, which JAX takes for an axis of its own
        return np.array(devices).reshape(shape)


def _hybrid_mesh(mesh: MeshConfig, devices: list[jax.Device], slices: int) -> Mesh:
    data, fsdp, tensor = _shape(mesh, len(devices))
    if data % slices or data * fsdp * tensor != len(devices):
        raise InputError(
            f"mesh.data={mesh.data} mesh.fsdp={fsdp} mesh.tensor={tensor} do not lie over {slices} slices of "
            f"{len(devices) // slices} devices: data must be a multiple of {slices}, and fsdp x tensor divide "
            f"{len(devices) // slices}; mesh.data=-1 takes what is left"
        )
    inside = (data // slices, fsdp, tensor)
    parts = [_split_devices(inside, [d for d in devices if d.slice_index == n]) for n in range(slices)]
    return Mesh(np.concatenate(parts), AXES, axis_types=(AxisType.Explicit,) * 3)


def compile_train_step(model: Model, mesh: Mesh, shapes: Batch) -> Compiled:
    """The train step as `train` compiles it, but for `TPU_OPTIONS`; `shapes` are of `data.pipeline.batch_shapes`.

    Raises:
      jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED, with XLA's account of it, where the step does not fit.
    """
    with jax.set_mesh(mesh):
        step = jax.jit(train_step, static_argnums=0, donate_argnums=1)
        lowered = step.lower(model, abstract_state(model), laid_out(shapes, mesh))
        return lowered.compile(TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None)


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
    shape = len(pattern.query_rows), len(pattern.key_rows)
    products = FORWARD_PRODUCTS + (MODEL_BACKWARD_PRODUCTS if backward else 0)
    model = batch * attention_flops(visible_pairs(pattern, window), heads, head_dim, products)
    if implementation != "splash":
        return Work(model, 0.0, 0.0)
    spans = splash.visible_spans(pattern, window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    sides = splash.block_sizes(spans, shape[1])
    tiled = visible_tiles(pattern, window, *sides) * math.prod(sides)
    products = FORWARD_PRODUCTS + (SPLASH_BACKWARD_PRODUCTS if backward else 0)
    bytes_ = sum(attention_bytes(*shape, heads, head_dim, itemsize, backward=b) for b in (False, True)[: 1 + backward])
    return Work(model, batch * attention_flops(tiled, heads, head_dim, products), batch * bytes_)


def step_work(model: Model, mesh: Mesh, shapes: Batch) -> tuple[Work, list[dict[str, Any]]]:
    """Work of a train step on a full batch, and per layer `{"window", "queries", "keys", "implementation", "refused"}`.

    Model FLOPs are three times the matrix products of a forward pass, attention over visible pairs only.
    """
    config = model.config
    batch, events = shapes.valid.shape
    layout = stream_layout(config, model.schema, events)
    rows, dtype = layer_rows(config.model, layout), jnp.dtype(config.model.dtype)
    heads, head_dim = config.model.heads, config.model.width // config.model.heads
    with jax.set_mesh(mesh):
        forward = jax.make_jaxpr(eval_step, static_argnums=0)(model, abstract_state(model), laid_out(shapes, mesh))
        layers, works = [], [Work(3 * product_flops(forward.jaxpr), 0.0, 0.0)]
        for keys, queries, window in zip(rows, rows[1:], layer_windows(config.model), strict=False):
            q, k = ((batch, len(some), heads, head_dim) for some in (queries, keys))
            pattern = layout.pattern(queries, keys)
            name, refused = implementation_of(q, k, window, pattern, dtype)
            sizes = {"window": window, "queries": len(queries), "keys": len(keys)}
            layers.append(sizes | {"implementation": name, "refused": refused})
            each = {"batch": batch, "heads": heads, "head_dim": head_dim, "itemsize": dtype.itemsize}
            works.append(attention_work(name, pattern, window, **each, backward=True))
    return Work(*(sum(part) for part in zip(*works, strict=True))), layers


def implementation_of(
    q: tuple[int, ...], k: tuple[int, ...], window: int | None, pattern: Pattern, dtype: Any, name: str | None = None
) -> Choice:
    """What `attention` chooses for arrays of these shapes under the mesh in use; `name` as its `implementation`."""
    arrays: list[Any] = [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k)]
    return choose(*arrays, window=window, pattern=pattern, implementation=name)


def product_flops(jaxpr: Jaxpr) -> float:
    """FLOPs of the matrix products of a traced program, global shapes, attention left out.

    Attention is the only `shard_map` there. Bodies of scans count as often as they run, of `while` once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left, made = (_shape_of(one[0]) for one in (equation.invars, equation.outvars))
            total += 2.0 * math.prod(left[axis] for axis in contracted) * math.prod(made)
        elif equation.primitive.name != "shard_map":
            trips = equation.params["length"] if equation.primitive.name == "scan" else 1
            total += trips * sum(product_flops(inner) for inner in _inner_jaxprs(equation.params.values()))
    return total


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


def report(compiled: Compiled, mesh: Mesh, work: Work) -> dict[str, Any]:
    """Memory, FLOPs, collectives and roofline of a compiled program, per device.

    Returns:
      `{"devices", "device_kind", "bytes": {"arguments", "outputs", "aliased", "temporaries", "code", "total"},
      "headroom": share of the memory left over, "flops", "bytes_accessed", "model_flops", "collective_bytes": {kind:
      bytes into a device; "... across slices"}, "collectives": {kind: times}, "custom_calls", "loops", "roofline":
      Roofline, "mfu_bound"}`.

      `flops` and `bytes_accessed` are XLA's, which counts a loop body once and nothing inside a custom call, plus
      `work`'s for the latter. `bytes_accessed` counts what stays on the chip between operations too, so that the
      memory time of a small program is too long.
    """
    devices = list(mesh.devices.flat)
    slices = len({getattr(device, "slice_index", None) or 0 for device in devices})
    of = chip(devices[0].device_kind)
    memory: Any = compiled.memory_analysis()
    cost = compiled.cost_analysis() or {}
    program = read_program(compiled.as_text() or "", len(devices), slices)
    moved: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for one in program.collectives:
        name = one.kind + (" across slices" if one.slices > 1 else "")
        moved[name] += int(one.moved)
        times[name] += one.trips
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]  # outputs that lie in donated arguments are not there twice
    flops = cost.get("flops", 0.0) + work.kernel_flops / len(devices)
    accessed = cost.get("bytes accessed", 0.0) + work.kernel_bytes / len(devices)
    network = network_seconds(program.collectives, devices, of)
    roofline = Roofline(flops / of.flops, accessed / of.hbm_bandwidth, network)
    return {
        "devices": len(devices),
        "device_kind": devices[0].device_kind,
        "bytes": parts | {"total": total},
        "headroom": 1 - total / of.hbm_bytes,
        "flops": flops,
        "bytes_accessed": accessed,
        "model_flops": work.model_flops / len(devices),
        "collective_bytes": dict(sorted(moved.items())),
        "collectives": dict(sorted(times.items())),
        "custom_calls": program.custom_calls,
        "loops": list(program.loops),
        "roofline": roofline,
        "mfu_bound": roofline.mfu_bound(work.model_flops / len(devices), of),
    }

"""Options of XLA's compiler for a train step, by generation of chip.

libtpu reads most of its switches as options of a single compilation, so that they are
part of the run's config and not of an environment. Defaults have evidence, by the
compiler's own schedule (`tokenrec compile`; docs/guides/performance.md, "For a pod"):
nothing has been measured on a TPU. `train.compiler_options` adds to them or changes
them. What speeds one libtpu up may be refused by the next, or be wrong in it: an option
that a compiler refuses is an error that names it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh

from tokenrec.device_kinds import canonical_kind
from tokenrec.errors import InputError

Options = dict[str, bool | int | str]

# With this emitter libtpu 0.0.50 aborts the process ("Color count is less than local dma
# pipe shard count") when it writes the small all-reduces of a data-parallel step over 16
# chips or more, on v5e, v6e and v5p alike.
_EVERY_TPU: Options = {"xla_tpu_enable_pincer_short_emitter": False}

# Memory on the chip that a fusion may use, KiB. With the default of libtpu the operands
# of a product come in smaller pieces, and more often. On v6e more memory shortens the step
# of two layers of `lrm_1b` by 4 %, and nearly doubles the time of compilation.
_FUSION_MEMORY = "xla_tpu_scoped_vmem_limit_kib"
# All-gathers run on the sparse cores, beside the work of the core, over one, two or three
# axes of the torus. They move numbers and compute nothing, so that no result changes. The
# collective fusion that does the same on chips without sparse cores excludes it.
_GATHERS_ON_SPARSE_CORES: Options = {
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_2d_all_gather": True,
    "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    "xla_tpu_enable_all_gather_offload_tracing": True,
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": False,
    "xla_tpu_use_tc_device_shape_on_sc": True,
    "xla_sc_enable_instruction_fusion": False,
    "xla_sc_disable_megacore_partitioning": True,
}
# By `jax.Device.device_kind`.
_BY_KIND: dict[str, Options] = {
    "TPU v5": {_FUSION_MEMORY: 65536, **_GATHERS_ON_SPARSE_CORES},
    "TPU v6 lite": {_FUSION_MEMORY: 98304, **_GATHERS_ON_SPARSE_CORES},
}


def compiler_options(
    mesh: Mesh, chosen: Mapping[str, str] | None = None
) -> Options | None:
    """Options of `jax.jit` for the chips of a mesh; None for none.

    Args:
      mesh: the mesh, which may be described only.
      chosen: `train.compiler_options`, which go before the defaults. An empty value
        leaves the option to the compiler.
    """
    device = mesh.devices.flat[0]
    options: Options = {}
    if device.platform == "tpu":
        options |= _EVERY_TPU | _BY_KIND.get(canonical_kind(device.device_kind), {})
    options.update(chosen or {})
    return {name: value for name, value in options.items() if value != ""} or None


@contextlib.contextmanager
def refusals_of(chosen: Mapping[str, str]) -> Iterator[None]:
    """Name the option and the field when the compiler refuses an option.

    Args:
      chosen: `train.compiler_options`.

    Raises:
      InputError: the compiler does not know an option, or not its value.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        refused = re.search(r"'(xla_\w+)'", str(error))
        if "INVALID_ARGUMENT" not in str(error) or refused is None:
            raise
        name = refused[1]
        whose = "the config" if name in chosen else "tokenrec/compiler_options.py"
        raise InputError(
            f"train.compiler_options={dict(chosen)}: this compiler refuses {name}, "
            f"which {whose} sets ({error}); use the jaxlib or libtpu that knows it, or "
            f"leave it out: --config.train.compiler_options={name}:"
        ) from error

"""Count the instruction bundles of the splash kernels, by chip, head width and tile.

    python -m benchmarks.kernel_bundles [--chips v5e v5p v6e tpu7x] [--head-dims 128]

Writes tokenrec/planner/kernel_bundles.json, from which `tokenrec compile` prices the
kernels (`tokenrec/planner/kernel_cost.py`). libtpu compiles the three kernels of a
train step for a described chip, dumps their final bundles, and nothing is run. Each
compilation is a process of its own, since libtpu reads its flags once; it takes some 13
seconds of processor time. Rows that the file has are left as they are: delete it after
a change of the kernels or of libtpu.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import run_script, versions
from tokenrec.errors import InputError
from tokenrec.ops.attention.splash_kernel import SIDES
from tokenrec.planner.kernel_bundles import read_tile_bundles
from tokenrec.planner.kernel_cost import KERNELS, call_name
from tokenrec.runtime.files import write_text_atomically

TABLE = Path(__file__).parents[1] / "tokenrec/planner/kernel_bundles.json"
# The smallest topology of each kind that libtpu describes, and `jax.Device.device_kind`.
CHIPS = {
    "v5e": ("v5e:2x2", "TPU v5 lite"),
    "v5p": ("v5p:2x2x1", "TPU v5"),
    "v6e": ("v6e:2x2", "TPU v6 lite"),
    "tpu7x": ("tpu7x:2x2x1", "TPU7x"),
}
# Tokens of a stream: some lines of tiles, the last one not whole.
TOKENS = 2000


def compile_kernels(topology: str, head_dim: int, sides: tuple[int, int]) -> None:
    """Compile the kernels of a train step for a described chip."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from tokenrec.config import MeshConfig
    from tokenrec.ops.attention.pattern import causal_pattern
    from tokenrec.ops.attention.splash import splash_attention
    from tokenrec.planner.topology import topology_mesh

    mesh = topology_mesh(topology, MeshConfig())
    pattern = causal_pattern(TOKENS, TOKENS)

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        out = splash_attention(q, k, v, pattern, None, valid, blocks=sides)
        return out.astype(jnp.float32).sum()

    spec = PartitionSpec("data")
    with jax.set_mesh(mesh):
        local = jax.shard_map(
            jax.grad(loss, (0, 1, 2)),
            in_specs=(spec,) * 4,
            out_specs=(spec,) * 3,
            check_vma=False,
        )
        on_mesh = NamedSharding(mesh, spec)
        vectors = jax.ShapeDtypeStruct(
            (mesh.size, TOKENS, 1, head_dim), jnp.bfloat16, sharding=on_mesh
        )
        valid = jax.ShapeDtypeStruct((mesh.size, TOKENS), jnp.bool, sharding=on_mesh)
        jax.jit(local).lower(vectors, vectors, vectors, valid).compile()


def read_dump(folder: Path) -> dict[str, list[int]]:
    """Read the bundles of the three kernels from a folder of libtpu's dumps.

    Raises:
      InputError: the folder has not exactly one dump of a kernel.
    """
    rows = {}
    for kernel in KERNELS:
        files = [
            file
            for file in folder.glob(f"*{call_name(kernel)}*-final_bundles.txt")
            if "schedule-analysis" not in file.name
        ]
        if len(files) != 1:
            raise InputError(
                f"{folder} has {len(files)} final dumps of {call_name(kernel)}, and "
                "should have one; see whether this libtpu names them otherwise"
            )
        rows[kernel] = list(read_tile_bundles(files[0].read_text()))
    return rows


def measure(chip: str, head_dim: int, sides: tuple[int, int]) -> dict[str, list[int]]:
    """Compile the kernels in a process of its own, and read its dump."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        command = [sys.executable, "-m", "benchmarks.kernel_bundles", "--one"]
        subprocess.run(
            [*command, CHIPS[chip][0], str(head_dim), *map(str, sides)],
            env=os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"},
            check=True,
        )
        return read_dump(Path(folder))


def to_text(table: dict[str, Any]) -> str:
    """Write the table as JSON with the four numbers of a kernel on one line."""
    text = json.dumps(table, indent=1, sort_keys=True)
    numbers = re.compile(r"\[\s+(\d+),\s+(\d+),\s+(\d+),\s+(\d+)\s+\]")
    return numbers.sub(r"[\1, \2, \3, \4]", text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
    parser.add_argument("--head-dims", nargs="+", type=int, default=[128])
    parser.add_argument("--sides", nargs="+", type=int, default=list(SIDES))
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.one:
        topology, head_dim, *sides = flags.one
        compile_kernels(topology, int(head_dim), (int(sides[0]), int(sides[1])))
        return
    table: dict[str, Any] = {"bundles": {}}
    if TABLE.is_file():
        table = json.loads(TABLE.read_text())
    tiles = list(itertools.product(flags.sides, flags.sides))
    for chip, head_dim, sides in itertools.product(flags.chips, flags.head_dims, tiles):
        of_chip = table["bundles"].setdefault(CHIPS[chip][1], {})
        row = of_chip.setdefault(str(head_dim), {})
        name = f"{sides[0]}x{sides[1]}"
        if name in row:
            continue
        row[name] = measure(chip, head_dim, sides)
        print(chip, head_dim, name, row[name], file=sys.stderr)
        table["command"] = "python -m benchmarks.kernel_bundles"
        table["versions"] = versions(("jax", "jaxlib", "libtpu"))
        write_text_atomically(TABLE, to_text(table))


if __name__ == "__main__":
    run_script(main)

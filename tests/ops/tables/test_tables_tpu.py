"""Look-up and update of a packed table, compiled for a described TPU."""

import re

import jax
import jax.numpy as jnp

from tests.planner.test_compile import tpu_compiler
from tokenrec.compiler_options import compiler_options
from tokenrec.config import MeshConfig
from tokenrec.ops.tables.api import (
    collect_gradients,
    expand_rows,
    find_unique_rows,
    gather_rows,
    storage_spec,
    update_rows,
)
from tokenrec.ops.tables.lookup import RowsState, build_stacks
from tokenrec.planner.topology import topology_mesh
from tokenrec.sharding import RULES

WIDTH, IDS = 16, 256


@tpu_compiler
def test_a_tpu_neither_copies_nor_converts_a_table():
    """Rows are cast to bfloat16, as in a model; the table is not, nor is it laid out anew.

    Without the barrier on bits (`packed._keep_table_precision`) the program converts
    the whole table; with plain rows it copies it to 128 lanes a row.
    """
    stack = build_stacks({"video": 4_915_200}, {"video": WIDTH}, 100)["width_16_spread"]

    def step(table, sums, ids, target):
        unique = find_unique_rows(stack, {"state": ids})
        rows = gather_rows(stack, table, unique)

        def loss(rows):
            vectors = expand_rows(stack, rows, unique.inverses["state"])
            product = jnp.einsum(
                "bw,bv->wv", vectors.astype(jnp.bfloat16), target, out_sharding=RULES()
            )
            return jnp.sum(product.astype(jnp.float32) ** 2)

        gradients = jax.grad(loss)(rows)
        collected = collect_gradients(stack, unique, gradients)
        return update_rows(
            stack,
            table,
            RowsState(sums),
            unique,
            gradients,
            collected,
            rate=jnp.float32(0.1),
            decay=0.01,
            apply=jnp.bool_(True),
        )

    mesh = topology_mesh("v5e:2x2", MeshConfig())

    def array(shape, dtype, spec):
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    with jax.set_mesh(mesh):
        shape, spec = storage_spec(stack)
        compiled = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(
                array(shape, jnp.float32, spec),
                array((stack.stored_rows,), jnp.float32, RULES("rows")),
                array((IDS,), jnp.int32, RULES("batch")),
                array((IDS, WIDTH), jnp.bfloat16, RULES("batch", None)),
            )
            .compile(compiler_options(mesh))
        )
    owned = shape[0] // mesh.size
    text = compiled.as_text()
    assert f"f32[{owned},128]" in text
    assert f"bf16[{owned}," not in text
    assert not re.search(rf"\[{stack.stored_rows // mesh.size},{WIDTH}\]", text)
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * memory.argument_size_in_bytes

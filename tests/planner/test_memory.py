"""Memory of a program: padding, XLA's own account, and the largest traced arrays."""

import jax
import jax.numpy as jnp
import pytest

from tests.worlds import mesh_of
from tokenrec.planner.memory import (
    Buffer,
    listed_buffers,
    refused_bytes,
    state_bytes,
    tiled_elements,
    traced_buffers,
)
from tokenrec.sharding import RULES
from tokenrec.state import TrainState

# The form in which the TPU compiler lists allocations; sizes and names are made up.
LISTED = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded by 5.75G.

Total hbm usage >= 22.01G:
    program          21.50G

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(train_step)/dot_general" source_file="/a/block.py" source_line=81
     Shape: bf16[1024,1024,1024]{2,1,0:T(8,128)(2,1)}
     Unpadded size: 2.00G
     XLA label: fusion.7 = fusion(param.1), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 512.0K
     Shape: f32[131072]{0:T(1024)}
     Unpadded size: 512.0K
     XLA label: copy.3 = copy(param.2)
     Allocation type: HLO temp
"""


def test_allocations_that_xla_lists_are_read():
    assert listed_buffers(LISTED) == [
        Buffer(
            2 << 30,
            "bf16[1024,1024,1024]{2,1,0:T(8,128)(2,1)}",
            "jit(train_step)/dot_general",
            "/a/block.py:81",
        ),
        Buffer(512 << 10, "f32[131072]{0:T(1024)}", "", ""),
    ]
    assert refused_bytes(LISTED) == int(21.5 * 2**30)


def test_a_refusal_without_a_list_still_says_how_much():
    words = "the total memory required for HLO temporaries (31.25G) exceeds available HBM (15.75G). HLO module: jit_f."
    assert refused_bytes(words) == int(31.25 * 2**30)
    assert listed_buffers(words) == []
    assert refused_bytes("out of something else") is None


@pytest.mark.parametrize(
    ("shape", "order", "tiling", "elements"),
    [
        ((), (), (), 1),
        ((5,), (0,), ((1024,),), 1024),
        ((3, 9, 130), (0, 1, 2), ((8, 128), (2, 1)), 3 * 16 * 256),
        ((3, 9, 130), (2, 1, 0), ((8, 128),), 130 * 16 * 128),
        ((4, 6), (0, 1), (), 24),
    ],
)
def test_padding_of_tiles(shape, order, tiling, elements):
    assert tiled_elements(shape, order, tiling) == elements


def test_bytes_of_a_state_are_those_of_one_device():
    mesh = mesh_of(2, 2, 2)

    def leaf(shape, *axes):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(mesh, RULES(*axes))
        )

    state = TrainState(
        leaf(()),
        {"w": leaf((8, 6), "embed", "ffn")},
        {"t": leaf((10, 4), None, None)},
        {"m": leaf((3,))},
    )
    assert state_bytes(state) == {"weights": 4 * 3 * 4, "tables": 160, "optimizer": 12}


def test_the_largest_traced_arrays_are_those_of_one_device():
    mesh = mesh_of(2, 2, 1)

    def f(x):
        wide = jnp.broadcast_to(
            x[:, :, None], (*x.shape, 50), out_sharding=RULES("batch", None, None)
        )

        def body(carry, _):
            return carry + wide.sum(axis=2), carry

        return jax.lax.scan(body, x, None, length=3)

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct(
            (8, 6), jnp.float32, sharding=jax.NamedSharding(mesh, RULES("batch", None))
        )
        table = jax.ShapeDtypeStruct(
            (9000, 4), jnp.float32, sharding=jax.NamedSharding(mesh, RULES(None, None))
        )
        state = TrainState(x, {}, {"t": table}, {})
        held, first, *others = traced_buffers(jax.make_jaxpr(f)(x).jaxpr, state)
    assert held == Buffer(9000 * 4 * 4, "float32[9000,4]", "state.tables['t']", "")
    assert (first.bytes, first.shape, first.operation) == (
        2 * 6 * 50 * 4,
        "float32[2,6,50]",
        "broadcast_in_dim",
    )
    assert first.source.startswith("tests/planner/test_memory.py:")
    assert all(buffer.bytes < first.bytes for buffer in others)

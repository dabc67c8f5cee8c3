"""Meshes of a pod, ranked by formula; nothing here compiles.

`pytest.approx` allows a relative 1e-6 for products of float64 in another order, which
round by 1e-16 on every processor.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.planner.test_compile import tpu_compiler
from tests.worlds import SCHEMA, TABLES, mesh_of, tiny
from tokenrec.config import MeshConfig
from tokenrec.errors import InputError
from tokenrec.planner.mesh_cost import expected_collectives, predict
from tokenrec.planner.roofline import CHIPS
from tokenrec.planner.sweep import mesh_shapes, rank
from tokenrec.sharding import RULES
from tokenrec.state import TrainState

ITEMS = dataclasses.replace(SCHEMA, items=TABLES["video"])


def state_of(mesh, rows=8):
    def leaf(shape, *axes):
        return jax.ShapeDtypeStruct(
            shape, jnp.float32, sharding=jax.NamedSharding(mesh, RULES(*axes))
        )

    weights = {
        "both": leaf((16, 16), "embed", "ffn"),
        "one": leaf((6, 16), None, "embed"),
        "whole": leaf((10,), None),
    }
    return TrainState(leaf(()), weights, {"t": leaf((rows, 4), None, None)}, {})


@pytest.fixture
def v5e(monkeypatch):
    """Give the devices of this machine the figures of a chip."""
    monkeypatch.setitem(CHIPS, jax.devices()[0].device_kind, CHIPS["TPU v5 lite"])


def test_meshes_split_batches_heads_and_width():
    config = tiny(batch_size=8)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, eval_batch_size=8)
    )
    shapes = {(m.data, m.fsdp, m.tensor) for m in mesh_shapes(config, 8)}
    assert shapes == {
        (8, 1, 1),
        (4, 2, 1),
        (2, 4, 1),
        (1, 8, 1),
        (4, 1, 2),
        (2, 2, 2),
        (1, 4, 2),
    }  # two heads
    assert {m.data for m in mesh_shapes(config, 8, slices=4)} == {4, 8}
    assert {
        m.data * m.fsdp
        for m in mesh_shapes(dataclasses.replace(config, optim=optim(4)), 8)
    } == set()
    assert {
        m.data * m.fsdp
        for m in mesh_shapes(dataclasses.replace(config, optim=optim(2)), 8)
    } == {4}


def test_context_splits_streams_that_leave_a_device_many_tokens():
    config = tiny(batch_size=2)
    data = dataclasses.replace(config.data, eval_batch_size=2)
    config = dataclasses.replace(config, data=data)
    assert not list(mesh_shapes(config, 8, length=4095))
    shapes = {dataclasses.astuple(m) for m in mesh_shapes(config, 8, length=8192)}
    # Data, fsdp, tensor, context; two heads and two streams.
    assert shapes == {
        (2, 1, 2, 2),
        (1, 2, 2, 2),
        (2, 1, 1, 4),
        (1, 2, 1, 4),
        (1, 1, 2, 4),
    }
    model = dataclasses.replace(config.model, kind="hstu")
    hstu = dataclasses.replace(config, model=model)
    assert not list(mesh_shapes(hstu, 8, length=8192))


def test_traffic_of_context_by_hand():
    """A full layer gathers keys and values; one of a short window has a halo."""
    config, mesh = tiny(model={"layers": 2, "windows": (3,)}), mesh_of(1, 1, 1, 8)
    found = [
        (one.kind, one.size, one.trips)
        for one in expected_collectives(config, state_of(mesh), 8 * 64, mesh)
    ]
    gradients = (16 * 16 + 6 * 16 + 10) * 4
    full, halo = 8 * 64 * 2 * 16 * 4, 8 * 3 * 2 * 16 * 4
    assert found == [
        ("all-reduce", gradients, 1),
        ("all-gather", full, 2),
        ("reduce-scatter", full, 1),
        ("collective-permute", halo, 3),
    ]


def optim(accumulate):
    return dataclasses.replace(tiny().optim, accumulate=accumulate)


def test_traffic_by_hand():
    config, mesh = tiny(model={"layers": 3}), mesh_of(2, 2, 2)
    found = {
        (one.kind, one.groups[0]): (one.size, one.trips)
        for one in expected_collectives(config, state_of(mesh), 64, mesh)
    }
    both, one, whole = 16 * 16 * 4, 6 * 16 * 4, 10 * 4
    assert found == {
        ("all-gather", (0, 2)): (both // 2 + one, 2),
        ("reduce-scatter", (0, 2)): (both // 2 + one, 1),
        ("all-reduce", (0, 4)): (both // 4 + one // 2 + whole, 1),
        ("all-reduce", (0, 1)): (64 // 4 * 16 * 4, 4 * 3),
    }
    again = expected_collectives(
        tiny(model={"remat": "full"}), state_of(mesh), 64, mesh
    )
    assert [one.trips for one in again] == [3, 1, 1, 6 * 4]
    assert (
        expected_collectives(config, state_of(mesh_of(1, 1, 1)), 64, mesh_of(1, 1, 1))
        == []
    )


def test_what_computing_again_costs_and_what_does_not_fit(v5e):
    mesh = mesh_of(2, 2, 2)
    config = tiny()
    kept = predict(config, state_of(mesh), 8 * 197e12, 64, mesh)
    again = predict(tiny(model={"remat": "full"}), state_of(mesh), 8 * 197e12, 64, mesh)
    assert kept.compute_seconds == pytest.approx(1.0)
    assert again.compute_seconds == pytest.approx(4 / 3)
    assert again.bytes < kept.bytes
    assert kept.fits
    assert not predict(config, state_of(mesh, rows=2**31), 8 * 197e12, 64, mesh).fits


@tpu_compiler
def test_settings_are_ranked_by_what_fits_then_by_time():
    config = tiny(batch_size=512, events=40, model={"width": 256, "heads": 4})
    found = rank(config, "v5e:2x2", schema=ITEMS)
    # Six meshes, three kinds of recomputation, three batches.
    assert len(found) == 54
    each = [one.cost.seconds / one.batch for one in found]
    assert each == sorted(each)
    assert all(one.cost.fits for one in found)
    # For a small model and a large batch, gradients are the least to send, and the
    # largest batch sends them least often.
    best = found[0]
    assert (best.mesh, best.remat, best.batch) == (MeshConfig(4, 1, 1), "none", 2048)


@tpu_compiler
def test_no_mesh_at_all_is_an_error():
    with pytest.raises(
        InputError, match=r"no mesh of 4 devices splits .*data\.batch_size=3"
    ):
        rank(tiny(batch_size=3), "v5e:2x2", schema=ITEMS)

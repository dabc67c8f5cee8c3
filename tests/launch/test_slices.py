"""Slices as Google Cloud documents them, and slices that it does not offer."""

from __future__ import annotations

import pytest

from tokenrec.errors import InputError
from tokenrec.launch.slices import TOPOLOGIES, parse_slice
from tokenrec.planner.topology import TOPOLOGIES as COMPILED


@pytest.mark.parametrize(
    ("topology", "chips", "hosts", "a_host", "devices", "vm"),
    [
        ("v5e:1x1", 1, 1, 1, 1, "v5litepod-1"),
        ("v5e:2x2", 4, 1, 4, 4, "v5litepod-4"),
        ("v5e:2x4", 8, 1, 8, 8, "v5litepod-8"),
        ("v5e:4x4", 16, 4, 4, 16, "v5litepod-16"),
        ("v5e:16x16", 256, 64, 4, 256, "v5litepod-256"),
        ("v6e:2x4", 8, 1, 8, 8, "v6e-8"),
        ("v6e:8x16", 128, 32, 4, 128, "v6e-128"),
        ("v5p:2x2x1", 4, 1, 4, 4, "v5p-8"),
        ("v5p:2x2x2", 8, 2, 4, 8, "v5p-16"),
        ("v5p:8x8x8", 512, 128, 4, 512, "v5p-1024"),
    ],
)
def test_slices_have_the_hosts_that_are_documented(
    topology: str, chips: int, hosts: int, a_host: int, devices: int, vm: str
) -> None:
    of = parse_slice(topology)
    assert (of.chips, of.hosts, of.chips_per_host, of.devices, of.accelerator_type) == (
        *(chips, hosts, a_host, devices),
        vm,
    )


def test_tpu7x_shows_two_devices_a_chip_and_is_for_gke_alone() -> None:
    of = parse_slice("tpu7x:4x4x4")
    assert (of.chips, of.hosts, of.devices) == (64, 16, 128)
    with pytest.raises(InputError, match="use --target gke"):
        _ = of.accelerator_type


def test_larger_slices_are_ascending_multiples_of_four() -> None:
    of = parse_slice("v5p:4x4x12")
    assert (of.chips, of.hosts) == (192, 48)
    with pytest.raises(InputError, match=r"4x4x12.*one shape"):
        _ = of.accelerator_type
    assert parse_slice("v5p:16x16x24").chips == 6144


@pytest.mark.parametrize(
    "topology",
    [
        "v5p:8x8",
        "v5e:8x8x8",
        "v5p:12x4x4",
        "v5p:4x4x6",
        "v5p:16x24x24",
        "v5p:0x4x4",
        "v5p:4x4xx",
        "v9:4x4",
        "",
        "v5p",
    ],
)
def test_what_is_not_rented_is_refused_and_a_near_name_offered(topology: str) -> None:
    with pytest.raises(
        InputError, match=r"not a slice that Google Cloud offers; (did you mean|known)"
    ):
        parse_slice(topology)


def test_every_named_slice_that_is_compiled_for_can_be_launched() -> None:
    assert set(COMPILED) - set(TOPOLOGIES) == {
        "v5p:1x1x1"
    }  # half of a board, which nobody rents

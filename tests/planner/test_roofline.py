"""Times of the roofline against hand-computed values.

`pytest.approx` allows a relative 1e-6 for products of float64 in another order, which
round by 1e-16 on every processor.
"""

import dataclasses
from types import SimpleNamespace

import pytest

from tokenrec.errors import InputError
from tokenrec.planner.collectives import Collective
from tokenrec.planner.roofline import CHIPS, Chip, Roofline, chip, network_seconds

# One byte a second on each link and one tenth between slices; axes of four close to
# rings.
SLOW = Chip(1.0, 1.0, 1.0, ici_link=1.0, axes=2, ring=4, dcn_bandwidth=0.1, clock=1.0)


def square(slices=1):
    places = [(s, x, y) for s in range(slices) for x in range(4) for y in range(4)]
    return [
        SimpleNamespace(coords=[x, y, 0], slice_index=s if slices > 1 else None)
        for s, x, y in places
    ]


@pytest.mark.parametrize(
    ("group", "links"),
    [
        ((0, 1, 2, 3), 2),  # a whole axis, a ring
        ((0, 1), 1),  # part of one, a line
        ((0, 1, 4, 5), 2),  # parts of two
        (tuple(range(16)), 4),  # two rings
    ],
)
def test_ici_time_is_by_the_links_that_a_group_has(group, links):
    one = Collective("all-gather", 160.0, (group,))
    assert network_seconds([one], square(), SLOW) == pytest.approx(
        160 * (len(group) - 1) / len(group) / links
    )


def test_between_slices_a_device_moves_its_part_over_the_slow_network():
    every = Collective("all-reduce", 320.0, (tuple(range(32)),), trips=2)
    inside, between = 2 * 320 * 15 / 16 / 4, 2 * (320 / 16) / 2 / 0.1
    assert network_seconds([every], square(slices=2), SLOW) == pytest.approx(
        2 * (inside + between)
    )
    sent = Collective("all-reduce", 20.0, ((0,),), slices=2)
    assert network_seconds([sent], square(slices=2), SLOW) == pytest.approx(between)


def test_the_roofline_names_what_limits():
    roofline = Roofline(compute_seconds=2.0, memory_seconds=3.0, network_seconds=1.0)
    assert (roofline.bound, roofline.total, roofline.limit) == (3.0, 6.0, "memory")
    assert roofline.mfu_bound(150.0, dataclasses.replace(SLOW, flops=100.0)) == 0.5


def test_chips_are_found_by_either_name():
    assert chip("TPU v5e") is chip("TPU v5 lite") is CHIPS["TPU v5 lite"]
    assert chip("TPU v5p").flops == 459e12


def test_a_chip_without_figures_is_an_error_that_names_the_near_one():
    with pytest.raises(
        InputError, match=r"device_kind='TPU v6 light'.*did you mean 'TPU v6 lite'"
    ):
        chip("TPU v6 light")

"""Time of the splash kernels, counted by hand, and the table that it comes from."""

import dataclasses

import numpy as np
import pytest

from tokenrec.errors import InputError
from tokenrec.ops.attention.pattern import causal_pattern
from tokenrec.planner.kernel_bundles import TileBundles, read_tile_bundles
from tokenrec.planner.kernel_cost import (
    KERNELS,
    kernel_seconds,
    peak_bundles,
    splash_tiles,
    tile_bundles,
)
from tokenrec.planner.roofline import CHIPS

BUNDLES = """\
     0   :  { %s1 = sld [smem:[#allocation0]] }
   0x1   :  { %4 = sbr.rel (%p1) target = $region9 }
  0x10 LB: > { %s2 = sadd.s32 1, %s3 }
  0x12   : > { %5 = sbr.rel (%p2) target = $region40 }
  0x20   : > { %6 = sbr.rel (%p3) target = $region52  ;;  %v1 = vld [vmem:[#a]] }
  0x40 PF: > { %s4 = sld } /* Start/End empty region 52 :: Start region 53 */
  0x44   : > { %7 = sbr.rel (%p4) target = $region56 }
 0x144 PF: > { %s5 = sld } /* Start/End empty region 56 */
 0x146   : > { %8 = dma.hbm_to_vmem
second_minor_factor: 1 */ }
 0x148   : > { %9 = sbr.rel (%p5) target = $region60 }
 0x168 PF: > { %s6 = sld } /* Start/End empty region 60 */
 0x170 PF: > { %s7 = sld } /* Start/End empty region 40 */
 0x17f   : > { %10 = sbr.rel (!%p6) target = $region46 }
 0x180   :  { %11 = vsyncpa [#allocation11], 1 }
"""


def test_bundles_of_a_step_and_of_what_it_may_jump_over():
    # From 0x10 to 0x17f, without three regions.
    whole = 0x180 - 0x10
    assert read_tile_bundles(BUNDLES) == TileBundles(whole - 32 - 256 - 32, 32, 256, 32)


def test_a_dump_of_another_form_is_an_error():
    with pytest.raises(InputError, match=r"has 2 regions .* \*-final_bundles\.txt"):
        read_tile_bundles(BUNDLES.replace("$region60", "$region61"))


def test_seconds_of_a_causal_kernel_by_hand():
    tiles = np.tril(np.ones((4, 4), bool))
    tiles[3, 0] = False
    spec = dataclasses.replace(CHIPS["TPU v5"], clock=1000.0, cores=2)
    cost = TileBundles(step=10, first=3, tile=100, last=7)
    found = kernel_seconds(dict.fromkeys(KERNELS, cost), tiles, 6, spec)
    # Four lines of queries of at most three tiles; four lines of keys, of at most three.
    cycles = 4 * 3 * 10 + 9 * 100 + 4 * (3 + 7)
    assert found == dict.fromkeys(KERNELS, pytest.approx(6 * cycles / 2000))
    wide = kernel_seconds({"dkv": cost}, tiles[:2], 1, spec)
    # The keys of two lines of queries: four lines of at most two tiles.
    assert wide["dkv"] == pytest.approx((4 * 2 * 10 + 3 * 100 + 4 * 10) / 2000)


@pytest.mark.parametrize("kind", ["TPU v5", "TPU v5 lite", "TPU v6 lite"])
def test_the_table_has_the_tiles_of_heads_of_128(kind):
    for length in (2048, 4096):
        for window in (None, 64, 512):
            sides, _ = splash_tiles(causal_pattern(length, length), window)
            costs = tile_bundles(kind, 128, sides)
            assert costs is not None, (kind, sides)
            # A tile has two products forward and three and four backward, of at least
            # 128 x 128 cells at a time on two units.
            least = sides[0] * sides[1] * 128 / (4 * 256 * 256)
            assert all(cost.tile > least for cost in costs.values())
    assert tile_bundles(kind, 96, (512, 512)) is None


def test_a_tile_that_the_table_lacks_costs_its_products_at_the_peak():
    spec = CHIPS["TPU v5"]
    found = peak_bundles((512, 256), 96, spec)
    # 2 x 131,072 FLOPs a cycle and core.
    one = 2 * 512 * 256 * 96 / 131_072
    assert [cost.tile for cost in found.values()] == [2 * one, 3 * one, 4 * one]
    seconds = kernel_seconds(found, np.ones((1, 1), bool), 1, spec)
    assert sum(seconds.values()) == pytest.approx(
        9 * 2 * 512 * 256 * 96 / spec.flops, rel=1e-3
    )

"""Model FLOPs utilisation."""

from __future__ import annotations

import pytest

from tokenrec.planner.mfu import mfu


@pytest.mark.parametrize(
    ("device_kind", "peak"),
    [
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
    ],
)
def test_mfu_is_the_share_of_the_peak(device_kind, peak):
    assert mfu(peak, 4.0, device_kind) == 0.25


def test_mfu_of_an_unknown_device_is_none():
    assert mfu(1e12, 1.0, "cpu") is None

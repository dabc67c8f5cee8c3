"""Read the instruction bundles of a Pallas kernel from libtpu's dump.

A TPU core issues one bundle of instructions a cycle, so that bundles are cycles where
nothing waits for memory. libtpu writes the final bundles of a program as text:

    0x2c LB: > { ... }                       first bundle of the loop over grid steps
    0xb2   : > { ... sbr.rel (%p8) target = $region52 }      jump over a region
    0x178 PF: > { ... } /* Start/End empty region 52 */       where it lands
    0x795   : > { ... sbr.rel (!%p49_p5) target = $region46 }      back to the loop

The splash kernels have three regions that some grid steps jump over, in this order:
the start of a line of tiles, the tile, and the end of a line.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from tokenrec.errors import InputError

_BUNDLE = re.compile(r"^\s*(0x[0-9a-f]+)\s+(?:[A-Z]{2})?\s*:")
_JUMP = re.compile(r"sbr\.rel \(!?%\w+\) target = \$region(\d+)")
_LANDING = re.compile(r"Start(?:/End empty)? region (\d+)")
# A jump over fewer bundles than this guards a transfer and not work.
_LEAST_REGION = 16


class TileBundles(NamedTuple):
    """Bundles of a splash kernel.

    Attributes:
      step: of every grid step, whether or not its tile is computed.
      first: of the first tile of a line, besides: what is summed up is set to zero.
      tile: of every tile that is computed, besides.
      last: of the last tile of a line, besides: the result is written.
    """

    step: int
    first: int
    tile: int
    last: int


def read_tile_bundles(text: str) -> TileBundles:
    """Read the bundles of a splash kernel.

    Args:
      text: of the file `*-final_bundles.txt` of the kernel.

    Raises:
      InputError: the text has no loop with three regions that a step may jump over.
    """
    start: int | None = None
    landings: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    at = end = 0
    for line in text.splitlines():
        if bundle := _BUNDLE.match(line):
            at = int(bundle[1], 16)
            if start is None and " LB:" in line[:16]:
                start = at
        # A comment may go over several lines, all of the bundle above.
        landings |= dict.fromkeys(_LANDING.findall(line), at)
        for region in _JUMP.findall(line):
            if start is not None:
                jumps.append((at, region))
                end = at
    spans = [
        (place, landings[region])
        for place, region in jumps
        if landings.get(region, 0) - place >= _LEAST_REGION
    ]
    inner = [
        span
        for span in spans
        if not any(span[0] < other[0] and other[1] <= span[1] for other in spans)
    ]
    if start is None or len(inner) != 3:
        raise InputError(
            f"the dump of a kernel has {len(inner)} regions that a grid step may jump "
            "over, and a splash kernel 3; pass its file *-final_bundles.txt, and see "
            "whether this libtpu writes it in another form"
        )
    first, tile, last = (landing - place for place, landing in inner)
    return TileBundles(end - start + 1 - first - tile - last, first, tile, last)

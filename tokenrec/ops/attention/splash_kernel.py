"""The splash kernel of a layer: its mask, the sizes of its tiles, and its build.

The builder of JAX's splash attention takes a mask object and lists the tiles of logits
that hold something visible. Where the queries of a layer are split over devices
(`mesh.context`), it lists them part by part, in arrays that are split as the queries
are: one program then serves all parts.

`block_sizes` picks the tile from an estimate of time, as wide tiles waste logits and
narrow ones waste steps of the grid.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import numpy as np

from tokenrec.ops.attention.pattern import ATTENTION_RESULT
from tokenrec.ops.attention.span_mask import QuerySpans, SpanMask, pack_spans

# Lanes of a vector register, the least side of a tile.
LANES = 128
# Sides of tiles to choose from. The backward pass of 512 x 512 is the largest that fits
# well into the kernel's 16 MiB of VMEM.
SIDES = (128, 256, 384, 512)
# Fixed cost of a grid step, in logits. An estimate, as no TPU was at hand: some 0.35 us
# against 2e11 logits a second.
STEP_COST = 1 << 16


def round_up(count: int, multiple: int) -> int:
    """Round a count of tokens up to whole tiles."""
    return -(-count // multiple) * multiple


def visited_tiles(
    spans: QuerySpans, keys: int, block_q: int, block_kv: int
) -> np.ndarray:
    """Find the tiles with something visible, the only ones that the kernels compute.

    Args:
      spans: the runs of keys that each query sees.
      keys: K.
      block_q: queries of a tile.
      block_kv: keys of a tile.

    Returns:
      `[query blocks, key blocks] bool`.
    """
    queries = len(spans.start)
    block_of_query = np.arange(queries) // block_q
    shape = (
        round_up(queries, block_q) // block_q,
        round_up(keys, block_kv) // block_kv,
    )
    # A run of keys adds 1 at its first block and takes it away behind its last: the
    # running sum counts the runs that touch a block.
    change = np.zeros((shape[0], shape[1] + 1), np.int64)
    for start, stop in ((spans.start, spans.stop), (spans.own_start, spans.own_stop)):
        real = stop > start
        np.add.at(change, (block_of_query[real], start[real] // block_kv), 1)
        np.add.at(change, (block_of_query[real], (stop[real] - 1) // block_kv + 1), -1)
    return np.cumsum(change, axis=1)[:, :-1] > 0


def fill_parts(queries: int, parts: int, block_q: int) -> np.ndarray:
    """Fill the queries of every part up to whole tiles, by repeats of its last query.

    Fill that saw nothing would be NaN.

    Args:
      queries: Q of all parts.
      parts: parts of equal size that the queries are split into.
      block_q: queries of a tile.

    Returns:
      Places among the Q queries.
    """
    own = queries // parts
    places = np.minimum(np.arange(round_up(own, block_q)), own - 1)
    return (np.arange(parts)[:, None] * own + places).reshape(-1)


def block_sizes(spans: QuerySpans, keys: int, parts: int = 1) -> tuple[int, int]:
    """Choose the queries and keys of a tile by the least estimated time.

    Args:
      spans: the runs of keys that each query sees.
      keys: K.
      parts: devices that the queries are split over.

    >>> from tokenrec.ops.attention.pattern import causal_pattern
    >>> from tokenrec.ops.attention.span_mask import visible_spans
    >>> spans = [visible_spans(causal_pattern(2048, 2048), w) for w in (None, 64)]
    >>> [block_sizes(each, 2048) for each in spans]
    [(512, 512), (256, 256)]
    """

    def cost(sides: tuple[int, int]) -> int:
        filled = fill_parts(len(spans.start), parts, sides[0])
        tiles = visited_tiles(spans.take(filled), keys, *sides)
        # The grid is as wide as the query block that visits most key blocks.
        steps = len(tiles) * int(tiles.sum(axis=1).max())
        return steps * STEP_COST + int(tiles.sum()) * sides[0] * sides[1]

    return min(((q, kv) for q in SIDES for kv in SIDES), key=cost)


@functools.cache
def _mask_class() -> type[Any]:
    """Make the class of masks that the kernels are built from.

    In a function, because importing Pallas takes 0.2 s, which only users of a TPU
    should pay.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import Mask

    class PatternMask(Mask):
        """A `SpanMask` over queries and keys with fill.

        The kernels' builder asks every tile whether any and whether all of it is
        visible. The spans alone tell for most tiles, without evaluating the mask.
        """

        def __init__(
            self, mask: SpanMask, packed: np.ndarray, spans: QuerySpans, keys: int
        ):
            # The kernels look for these two under these names.
            self.mask_function = mask
            self.q_sequence = packed
            runs = (spans.start, spans.stop), (spans.own_start, spans.own_stop)
            self.runs = [(start, stop) for start, stop in runs if (stop > start).any()]
            self.keys = keys

        @property
        def shape(self) -> tuple[int, ...]:
            return (len(self.q_sequence), self.keys)

        def __getitem__(self, tile: Any) -> np.ndarray:
            queries, keys = tile
            visible_keys = np.zeros(queries.stop - queries.start, np.int64)
            for start, stop in self.runs:
                visible_keys += np.maximum(
                    np.minimum(stop[queries], keys.stop)
                    - np.maximum(start[queries], keys.start),
                    0,
                )
            # One element stands for the whole tile, of which the builder takes `any`
            # and `all`: there are S^2 / side^2 tiles.
            if not visible_keys.any():
                return np.zeros((1, 1), bool)
            if (visible_keys == keys.stop - keys.start).all():
                return np.ones((1, 1), bool)
            places = np.arange(keys.start, keys.stop, dtype=np.int32)
            return self.mask_function(self.q_sequence[queries, None], places[None])

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, PatternMask):
                return NotImplemented
            same = self.mask_function == other.mask_function and self.keys == other.keys
            return same and np.array_equal(self.q_sequence, other.q_sequence)

        def __hash__(self) -> int:
            return hash((self.mask_function, self.keys, self.q_sequence.tobytes()))

    return PatternMask


class SplashKernel(NamedTuple):
    """The kernel of a layer, and what its arguments are filled up to.

    Attributes:
      call: `(q, k, v, segment ids) -> out: [H, S, h]` of one stream, a pytree of arrays
        that are split by query.
      itself: places of the filled queries' own tokens among the keys.
      queries: queries of one part, with fill.
      keys: keys, with fill.
    """

    call: Any
    itself: np.ndarray | jax.Array
    queries: int
    keys: int


def make_kernel(
    spans: QuerySpans,
    keys: int,
    heads: int,
    parts: int = 1,
    *,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> SplashKernel:
    """Build the kernel of a layer whose queries are split into parts.

    Args:
      spans: the runs of keys that each query sees, `[Q]`, part after part.
      keys: K.
      heads: H.
      parts: devices that the queries are split over.
      blocks: queries and keys of a tile, multiples of 128; None: `block_sizes`.
      interpret: run the kernel step by step on any platform, slowly, for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    # 1. The mask, over whole tiles; nothing sees the fill keys.
    block_q, block_kv = block_sizes(spans, keys, parts) if blocks is None else blocks
    span_mask, packed = pack_spans(spans, keys)
    filled = fill_parts(len(spans.start), parts, block_q)
    spans, packed = spans.take(filled), packed[filled].astype(np.int32)
    filled_keys = round_up(keys, block_kv)
    mask = _mask_class()(span_mask, packed, spans, filled_keys)
    # 2. The kernels. Not the fused backward one: it holds a gradient of all queries for
    #    every block of keys, which is quadratic in length, and visits empty tiles too.
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    call = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=parts,
        residual_checkpoint_name=ATTENTION_RESULT,
        interpret=interpret,
    )
    return SplashKernel(call, spans.itself, len(filled) // parts, filled_keys)

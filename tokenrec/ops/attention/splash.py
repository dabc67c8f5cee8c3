"""Splash attention: the block-sparse Pallas kernels that come with JAX, for TPU.

The kernels visit only tiles of logits that hold something visible, and load no mask: they compute it from one int32 a
query and from the position of a key. What a query sees is one run of the keys that all rows share, and one run of its
own candidate's keys, so its number packs where the last run ends and how far back the two reach.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tokenrec.ops.attention.pattern import ATTENTION_RESULT, Pattern

LANES = 128  # of a vector register: the least side of a tile
SIDES = (
    128,
    256,
    384,
    512,
)  # the backward of 512 x 512 is the largest that sits well in the kernel's 16 MiB
# Fixed cost of a grid step, in logits. An estimate, for no TPU was at hand: some 0.35 us against 2e11 logits a second.
STEP_COST = 1 << 16
BITS = 31  # of a query's number, which must not be negative
DTYPES = (jnp.float32, jnp.bfloat16)


class Spans(NamedTuple):
    """Positions among the keys that each query sees: `[start, stop)`, and `[own_start, own_stop)` of its candidate.

    Attributes:
      self_at: `[Q]`, position of the query's own row.
      start, stop, own_start, own_stop: `[Q]`.
      border: position of the first candidate's key; K if there is none.
    """

    self_at: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    own_start: np.ndarray
    own_stop: np.ndarray
    border: int

    def of(self, queries: np.ndarray) -> Spans:
        """Those of some queries."""
        own = self.own_start[queries], self.own_stop[queries]
        return Spans(
            self.self_at[queries],
            self.start[queries],
            self.stop[queries],
            *own,
            self.border,
        )


def visible_spans(pattern: Pattern, window: int | None) -> Spans | str:
    """What each query sees less padding, found without a Q x K matrix; or why it is not two runs of keys."""
    query, key = (
        pattern.rows(pattern.query_rows, window),
        pattern.rows(pattern.key_rows, window),
    )
    self_at = np.searchsorted(key.row, query.row)
    if (self_at == len(key.row)).any() or (key.row[self_at] != query.row).any():
        return "some query rows are not among the key rows, and would see nothing where they are padding"
    of_candidate = key.candidate >= 0
    border = int(np.argmax(of_candidate)) if of_candidate.any() else len(key.row)
    shared, own_run = key.index[:border], _numbered_runs(key.candidate[border:])
    if not of_candidate[border:].all() or own_run is None:
        return "the keys are not in the order shared rows, then one candidate after another"
    lowest = (
        np.zeros_like(query.index)
        if window is None
        else np.maximum(query.index - window + 1, 0)
    )
    width = int(pattern.index.max()) + 1
    own = own_run * width + key.index[border:]  # ascends, as each candidate's keys do
    if (np.diff(shared) < 0).any() or (np.diff(own) <= 0).any():
        return "the index of the keys does not ascend within the shared rows or within a candidate"
    start, stop = (
        np.searchsorted(shared, lowest),
        np.searchsorted(shared, query.reach, side="right"),
    )
    if window is not None and key.static.any():
        static = int(np.argmin(np.append(key.static, False)))
        if key.static[static:].any() or static > border:
            return "static rows are not the first keys, so that a window would see two runs of shared rows"
        start = np.where(query.static, start, np.maximum(start, static))
    run = np.zeros_like(query.index)
    if len(own):
        run_of = np.zeros(int(key.candidate.max()) + 1, own_run.dtype)
        run_of[key.candidate[border:]] = own_run
        run = run_of[np.maximum(query.candidate, 0)]
    own_start = border + np.searchsorted(own, run * width + lowest)
    own_stop = border + np.searchsorted(own, run * width + query.index, side="right")
    none = (query.candidate < 0) | (own_stop <= own_start)
    own_start, own_stop = (
        np.where(none, border, own_start),
        np.where(none, border, own_stop),
    )
    unseen = stop <= start
    start, stop = np.where(unseen, border, start), np.where(unseen, border, stop)
    if (~none & (stop < border)).any():
        return "a candidate's row does not see the last shared rows"
    return Spans(self_at, start, stop, own_start, own_stop, border)


def _numbered_runs(values: np.ndarray) -> np.ndarray | None:
    """Number of the run of equal values that each one is in; None if a value has two runs."""
    change = np.flatnonzero(np.diff(values)) + 1
    if len(change) + bool(len(values)) != len(np.unique(values)):
        return None
    return np.searchsorted(change, np.arange(len(values)), side="right")


@dataclasses.dataclass(frozen=True)
class Sight:
    """The mask as the kernels compute it; equal ones compare equal, so that layers share compiled kernels.

    A query's number holds, from its low bits: `near` and `depth` where they have bits, and the last key that it sees.

    Attributes:
      depth: how many keys before the last one the shared ones reach back; None: to the first.
      near: how many keys before the last one the candidate's own reach back.
      border: position of the first candidate's key; None if the keys have no candidates.
    """

    depth: int | None
    depth_bits: int
    near: int
    near_bits: int
    border: int | None

    def __call__(self, query: Any, key: Any) -> Any:
        """Which keys, by position, the queries see, by number; NumPy or JAX integers that broadcast."""
        depth, near = self.depth, self.near
        if self.near_bits:
            near, query = query & ((1 << self.near_bits) - 1), query >> self.near_bits
        if self.depth_bits:
            depth, query = (
                query & ((1 << self.depth_bits) - 1),
                query >> self.depth_bits,
            )
        back = query - key
        seen = back >= 0
        if depth is not None:
            seen &= back <= depth
        if self.border is not None:
            seen &= (key < self.border) | (back <= near)
        return seen


def encode(spans: Spans, keys: int) -> tuple[Sight, np.ndarray]:
    """The mask function, and the number of each query `[Q] int64`; more than `BITS` bits cannot be served.

    What all queries have in common stays out of the numbers, which spares the kernel's vector unit: plain causal order
    is one comparison a logit, and a window two.
    """
    has_own = spans.own_stop > spans.own_start
    last = np.where(has_own, spans.own_stop, spans.stop) - 1
    from_first = spans.start == 0
    deep = last - spans.start
    depth, depth_bits = None, 0
    if not from_first.all():
        # A query that sees the first key may reach back beyond it, where nothing is.
        depth = int(deep[~from_first].max())
        if deep[~from_first].min() < depth or deep[from_first].max(initial=0) > depth:
            depth, depth_bits = None, int(deep.max()).bit_length()
    spread = np.where(has_own, last - spans.own_start, 0)
    near, near_bits = int(spread.max()), 0
    if has_own.any() and spread[has_own].min() < near:
        near_bits = near.bit_length()
    numbers = last.astype(np.int64)
    if depth_bits:
        numbers = numbers << depth_bits | deep
    if near_bits:
        numbers = numbers << near_bits | spread
    return Sight(
        depth,
        depth_bits,
        near,
        near_bits,
        spans.border if spans.border < keys else None,
    ), numbers


def padded(rows: int, side: int) -> int:
    """The next multiple of `side`."""
    return -(-rows // side) * side


def visited_tiles(spans: Spans, keys: int, block_q: int, block_kv: int) -> np.ndarray:
    """`[query blocks, key blocks] bool`: tiles with something visible, the only ones that are computed."""
    block = np.arange(len(spans.start)) // block_q
    count = np.zeros(
        (
            padded(len(spans.start), block_q) // block_q,
            padded(keys, block_kv) // block_kv + 1,
        ),
        np.int64,
    )
    for start, stop in ((spans.start, spans.stop), (spans.own_start, spans.own_stop)):
        some = stop > start
        np.add.at(count, (block[some], start[some] // block_kv), 1)
        np.add.at(count, (block[some], (stop[some] - 1) // block_kv + 1), -1)
    return np.cumsum(count, axis=1)[:, :-1] > 0


def block_sizes(spans: Spans, keys: int) -> tuple[int, int]:
    """Queries and keys of a tile: the least estimated time, as wide tiles waste logits and narrow ones grid steps.

    >>> from tokenrec.ops.attention.pattern import causal_pattern
    >>> [block_sizes(visible_spans(causal_pattern(2048, 2048), window), 2048) for window in (None, 64)]
    [(512, 512), (256, 256)]
    """

    def cost(sides: tuple[int, int]) -> int:
        tiles = visited_tiles(spans, keys, *sides)
        steps = len(tiles) * int(
            tiles.sum(axis=1).max()
        )  # the grid is as wide as its fullest row
        return steps * STEP_COST + int(tiles.sum()) * sides[0] * sides[1]

    return min(((q, kv) for q in SIDES for kv in SIDES), key=cost)


def refusal(q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None) -> str:
    """Why splash cannot serve, or ""."""
    if q.dtype not in DTYPES:
        return f"the kernels take float32 and bfloat16, not {q.dtype}"
    spans = visible_spans(pattern, window)
    if isinstance(spans, str):
        return spans
    bits = int(encode(spans, k.shape[1])[1].max()).bit_length()
    if bits > BITS:
        return f"what a query sees takes {bits} bits to say, and the kernels have {BITS}; shorten the stream"
    return ""


def unprofitable(
    q: jax.Array, k: jax.Array, pattern: Pattern, window: int | None
) -> str:
    """Why another way is likely to be faster, or "".

    The grid goes through streams and heads one by one, and XLA computes such small products for all of them at once.
    Few queries over many keys are served: their tiles are 128 queries high, but no logits go to memory.
    """
    queries, keys = q.shape[1], k.shape[1]
    if queries <= LANES and keys <= LANES:
        return f"{queries} x {keys} rows are within one tile of {LANES} x {LANES}: there is nothing to skip"
    return ""


@functools.cache
def _mask_class() -> type[Any]:
    """The mask that the kernels are built from. Importing Pallas takes 0.2 s, which only users of a TPU should pay."""
    from jax.experimental.pallas.ops.tpu.splash_attention import Mask

    class SpansMask(Mask):
        """`Sight` over rows with fill. The spans alone tell of most tiles that all or nothing of them is visible."""

        def __init__(self, sight: Sight, numbers: np.ndarray, spans: Spans, keys: int):
            self.mask_function, self.q_sequence = (
                sight,
                numbers,
            )  # the names under which the kernels look for them
            runs = (spans.start, spans.stop), (spans.own_start, spans.own_stop)
            self.runs, self.keys = (
                [(start, stop) for start, stop in runs if (stop > start).any()],
                keys,
            )

        @property
        def shape(self) -> tuple[int, ...]:
            return (len(self.q_sequence), self.keys)

        def __getitem__(self, tile: Any) -> np.ndarray:
            rows, columns = tile
            seen = np.zeros(rows.stop - rows.start, np.int64)
            for start, stop in self.runs:
                seen += np.maximum(
                    np.minimum(stop[rows], columns.stop)
                    - np.maximum(start[rows], columns.start),
                    0,
                )
            # One element stands for a whole tile, of which `any` and `all` are asked: there are S^2 / side^2 tiles.
            if not seen.any():
                return np.zeros((1, 1), bool)
            if (seen == columns.stop - columns.start).all():
                return np.ones((1, 1), bool)
            positions = np.arange(columns.start, columns.stop, dtype=np.int32)
            return self.mask_function(self.q_sequence[rows, None], positions[None])

        def __eq__(self, other: object) -> bool:
            if not isinstance(other, SpansMask):
                return NotImplemented
            same = self.mask_function == other.mask_function and self.keys == other.keys
            return same and np.array_equal(self.q_sequence, other.q_sequence)

        def __hash__(self) -> int:
            return hash((self.mask_function, self.keys, self.q_sequence.tobytes()))

    return SpansMask


def splash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pattern: Pattern,
    window: int | None,
    valid: jax.Array | None,
    *,
    blocks: tuple[int, int] | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Arguments as in `attention`; `refusal` must have said nothing.

    Padding sees padding only, so its rows come out finite, and unlike those of `dense`.

    Args:
      blocks: queries and keys of a tile, multiples of 128; None: `block_sizes`.
      interpret: run the kernels step by step on any platform, slowly; for tests.
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    keys, spans = k.shape[1], visible_spans(pattern, window)
    if isinstance(spans, str):
        raise AssertionError(spans)
    block_q, block_kv = block_sizes(spans, keys) if blocks is None else blocks
    more_q, more_kv = (
        padded(q.shape[1], block_q) - q.shape[1],
        padded(keys, block_kv) - keys,
    )
    sight, numbers = encode(spans, keys)
    # Rows of fill repeat the last query, as one that saw nothing would be NaN; nothing sees the keys of fill.
    filled = np.minimum(np.arange(q.shape[1] + more_q), q.shape[1] - 1)
    spans, numbers = spans.of(filled), numbers[filled].astype(np.int32)
    mask = splash.MultiHeadMask(
        [_mask_class()(sight, numbers, spans, keys + more_kv)] * q.shape[2]
    )
    # Not the fused backward: it holds a gradient of all queries for every block of keys, which is quadratic in length,
    # and it visits empty tiles too.
    sizes = splash.BlockSizes(
        block_q=block_q,
        block_kv=block_kv,
        block_q_dkv=block_q,
        block_kv_dkv=block_kv,
        block_q_dq=block_q,
        block_kv_dq=block_kv,
    )
    kernel = splash.make_splash_mha_single_device(
        mask,
        block_sizes=sizes,
        residual_checkpoint_name=ATTENTION_RESULT,
        interpret=interpret,
    )

    def heads_first(x: jax.Array, fill: int) -> jax.Array:
        return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, fill), (0, 0)))

    # The kernels do not scale the logits.
    inputs = (
        heads_first(q * q.shape[-1] ** -0.5, more_q),
        heads_first(k, more_kv),
        heads_first(v, more_kv),
    )
    if valid is None:
        out = jax.vmap(kernel)(*inputs)
    else:
        real = valid.astype(jnp.int32)
        segments = splash.SegmentIds(
            q=real[:, spans.self_at], kv=jnp.pad(real, ((0, 0), (0, more_kv)))
        )
        out = jax.vmap(kernel)(*inputs, segments)
    return jnp.swapaxes(out[:, :, : q.shape[1]], 1, 2)

"""Visibility between the tokens of a stream: the definition that all kernels share.

A stream has S *positions*, one per token, numbered from 0. Every token i also has

- `index_i`, its place in the causal order. It is the position, except that every
  candidate of a request repeats the indices of candidate 0. Windows count indices.
- `reach_i`, the highest index that it may see among the shared tokens, those that
  belong to no candidate. It is `index_i` unless a prefix is bidirectional or a
  candidate continues a token in the middle of the history.
- `F_i`, whether it is static (a user field), and `cand_i`, its candidate, -1 for none.

Query i sees key j in a layer of window w (docs/methods.md section 3, "BFTS"):

    see(i, j) = i == j  or  valid_j and order(i, j) and inside(i, j)
    order(i, j)  = index_j <= reach_i             where cand_j == -1
                   index_j <= index_i             where cand_j == cand_i
                   False                          otherwise
    inside(i, j) = True                                             in a full layer
                   index_i - index_j < w  and  (F_i or not F_j)     in a sliding layer

`Pattern` holds everything but `valid`, as static NumPy arrays, so that an
implementation can decide at trace time which tiles of logits to compute. `is_visible`
is `see` without `valid_j` and without the diagonal; it also runs inside compiled
programs, tile by tile.

None of these numbers is the RoPE position of a token (`tokenrec.ops.attention.rotary`).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

# Checkpoint name (`jax.ad_checkpoint.checkpoint_name`) of the arrays that a backward
# pass of attention needs besides q, k and v. Remat policies save arrays by this name.
ATTENTION_RESULT = "attention"


class TokenAttributes(NamedTuple):
    """The attributes of some tokens that `is_visible` reads.

    All fields are NumPy or JAX arrays of one shape.

    Attributes:
      position: position in the stream.
      index: place in the causal order; also the highest index that the token may see
        among the tokens of its own candidate.
      reach: highest index that the token may see among tokens without candidate.
      static: True for tokens that sliding layers hide from all tokens but each other.
      candidate: the candidate that the token belongs to, -1 for none.
    """

    position: Any
    index: Any
    reach: Any
    static: Any
    candidate: Any

    def map(self, function: Any) -> TokenAttributes:
        """Apply a function to every field, such as one that adds an axis."""
        return TokenAttributes(*(function(field) for field in self))


def is_visible(query: TokenAttributes, key: TokenAttributes, window: int | None) -> Any:
    """Evaluate `see` without `valid_j` and without the diagonal.

    Args:
      query: attributes of the queries, in shapes that broadcast with those of `key`.
      key: attributes of the keys.
      window: keys that a query of a sliding layer sees, itself included; None in a full
        layer.

    Returns:
      Booleans in the broadcast shape, NumPy or JAX as the inputs are.
    """
    # Fill drops out by its values: no key has the candidate of FILL_QUERY or an index
    # as low as its reach, and no query reaches the index of FILL_KEY.
    seen_own = (key.candidate == query.candidate) & (key.index <= query.index)
    seen = ((key.candidate == -1) & (key.index <= query.reach)) | seen_own
    if window is not None:
        seen &= (query.index - key.index < window) & (query.static | ~key.static)
    return seen


# Attributes of the tokens that fill up the last tile: a fill query sees no key, and no
# query sees a fill key. Their positions differ, so that they never meet on a diagonal.
FILL_QUERY = TokenAttributes(
    position=-1, index=-1, reach=-1, static=False, candidate=-2
)
FILL_KEY = TokenAttributes(
    position=-2, index=np.iinfo(np.int32).max, reach=-1, static=False, candidate=-1
)


def take_or_fill(
    attributes: TokenAttributes, places: np.ndarray, fill: TokenAttributes
) -> TokenAttributes:
    """Take the attributes of the tokens at `places`; integers become int32.

    Args:
      attributes: `[N]` each.
      places: integers of any shape, indices into `attributes`.
      fill: attributes of the tokens at places outside of [0, N).

    Returns:
      Attributes in the shape of `places`.
    """
    count = len(attributes.position)
    # Places outside are clipped before the read, and their values replaced after it.
    inside = (places >= 0) & (places < count)
    taken = [
        np.where(inside, field[np.clip(places, 0, count - 1)], filler)
        for field, filler in zip(attributes, fill, strict=True)
    ]
    return TokenAttributes(
        *(field if field.dtype == bool else field.astype(np.int32) for field in taken)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """Visibility between the queries and keys of a layer, less padding.

    All arrays are static NumPy arrays.

    Q and K count the queries and keys of one layer, S the positions of the whole
    stream. Q <= K <= S: a layer computes only the tokens that a later layer needs.

    Attributes:
      query_positions: `[Q]`, position of each query in the stream, ascending.
      key_positions: `[K]`, position of each key in the stream, ascending.
      index: `[S]`, place of every token in the causal order.
      static: `[S] bool`, tokens that sliding layers hide from all tokens but each
        other.
      candidate: `[S]`, candidate of every token, -1 for none. Candidates do not see
        each other.
      prefix: tokens with an index below this see each other both ways in full layers
        (docs/methods.md section 2, "Prompt").
      reach: `[S]`, highest index that a token sees among tokens without candidate; None
        where that is the token's own index. A candidate that continues a token in the
        middle of the stream must not see the tokens after it.
      discard: True if sliding layers hide static tokens from other tokens. False if
        they show them at any distance (`model.discard_static`).
    """

    query_positions: np.ndarray
    key_positions: np.ndarray
    index: np.ndarray
    static: np.ndarray
    candidate: np.ndarray
    prefix: int = 0
    reach: np.ndarray | None = None
    discard: bool = True

    def attributes(self, positions: np.ndarray, window: int | None) -> TokenAttributes:
        """Take the attributes of some tokens, in a layer of this window.

        Args:
          positions: `[N]`, positions in the stream.
          window: keys that a query of a sliding layer sees; None in a full layer.

        Returns:
          Attributes, `[N]` each.
        """
        index = self.index[positions]
        reach = index if self.reach is None else self.reach[positions]
        # A prefix is bidirectional in full layers only: there, each of its tokens
        # reaches up to the prefix's last index.
        if window is None:
            reach = np.where(index < self.prefix, self.prefix - 1, reach)
        return TokenAttributes(
            positions, index, reach, self.static[positions], self.candidate[positions]
        )

    def query_attributes(self, window: int | None) -> TokenAttributes:
        """Take the attributes of the queries, `[Q]` each."""
        return self.attributes(self.query_positions, window)

    def key_attributes(self, window: int | None) -> TokenAttributes:
        """Take the attributes of the keys, `[K]` each."""
        return self.attributes(self.key_positions, window)

    def visible(self, window: int | None) -> np.ndarray:
        """Evaluate `see` without `valid_j` and the diagonal, `[Q, K] bool`."""
        query = self.query_attributes(window).map(lambda field: field[:, None])
        key = self.key_attributes(window).map(lambda field: field[None, :])
        seen = is_visible(query, key, window)
        # Static keys are shown as a full layer shows them: causally, at any distance.
        if self.keeps_static(window):
            seen = seen | (key.static & is_visible(query, key, None))
        return seen

    def keeps_static(self, window: int | None) -> bool:
        """Whether a sliding layer shows static tokens from beyond its window."""
        return (
            not self.discard
            and window is not None
            and bool(self.static[self.key_positions].any())
        )

    def diagonal(self) -> np.ndarray:
        """Pairs of a query and a key that are one token, `[Q, K] bool`.

        A token sees itself even when it is padding, so that no softmax is empty.
        """
        return self.query_positions[:, None] == self.key_positions[None, :]


def causal_pattern(queries: int, keys: int) -> Pattern:
    """Plain causal order over `keys` tokens, the last `queries` of them queries."""
    positions = np.arange(keys)
    return Pattern(
        positions[keys - queries :],
        positions,
        positions,
        np.zeros(keys, bool),
        np.full(keys, -1),
    )

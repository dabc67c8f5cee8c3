"""Named arguments of attention, shared by its tests and its benchmarks.

An `AttentionSpec` is one call: shapes and dtype, the pattern of visible tokens, the
window and the padding. Three families have names:

- `CAUSAL_SPECS`: plain causal order, by queries, keys and window;
- `stream_specs(name)` for a name in `STREAMS`: one spec per layer of a model, with
  static tokens, candidates and padding, over the tokens that each layer needs or over
  all;
- `prefix_spec()`: a bidirectional prefix.

Benchmarks time `causal_spec` at the lengths and windows of their command line.
Importing this module computes nothing in JAX: a benchmark may bind its process to some
cores first.

Shape letters: B streams, Q queries, K keys, S positions of a stream, H heads, h width
of a head.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.stream_layouts import build_layout, history_part
from tokenrec.ops.attention.pattern import Pattern, causal_pattern
from tokenrec.sharding import RULES
from tokenrec.tokens.layout import Layout, live_positions
from tokenrec.tokens.stream_segments import StreamSegment, make_layout


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionSpec:
    """The arguments of one call of attention.

    Attributes:
      pattern: which of the K keys each of the Q queries may see.
      window: keys that a query of a sliding layer sees, itself included; None: full.
      valid: `[B, K] bool`, keys that are not padding; None: all.
      batch: B.
      heads: H.
      head_dim: h.
      dtype: of queries, keys and values.
    """

    pattern: Pattern
    window: int | None = None
    valid: np.ndarray | None = None
    batch: int = 2
    heads: int = 2
    head_dim: int = 8
    dtype: str = "float32"

    @property
    def queries(self) -> int:
        """Q."""
        return len(self.pattern.query_positions)

    @property
    def keys(self) -> int:
        """K."""
        return len(self.pattern.key_positions)

    def replace(self, **changes: Any) -> AttentionSpec:
        """Change some attributes; in a larger batch the padding repeats."""
        spec = dataclasses.replace(self, **changes)
        if spec.valid is None or len(spec.valid) == spec.batch:
            return spec
        return dataclasses.replace(
            spec, valid=np.resize(spec.valid, (spec.batch, spec.keys))
        )

    def arrays(
        self, mesh: jax.sharding.Mesh | None = None
    ) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of q, k, v and the gradient of the output, `[B, Q or K, H, h]`.

        On a mesh, they are laid out as the backbones lay out queries, keys and values.
        """
        sharding = None
        if mesh is not None:
            sharding = jax.NamedSharding(mesh, RULES("batch", None, "heads", None))
        return tuple(
            jax.ShapeDtypeStruct(
                (self.batch, tokens, self.heads, self.head_dim),
                jnp.dtype(self.dtype),
                sharding=sharding,
            )
            for tokens in (self.queries, self.keys, self.keys, self.queries)
        )

    def random_inputs(
        self, mesh: jax.sharding.Mesh | None = None
    ) -> tuple[jax.Array, ...]:
        """Draw q, k, v and the gradient of the output from a normal distribution."""
        return tuple(
            jax.device_put(
                jax.random.normal(jax.random.key(seed), array.shape, array.dtype),
                array.sharding,
            )
            for seed, array in enumerate(self.arrays(mesh))
        )


def causal_spec(
    queries: int, keys: int, window: int | None = None, **sizes: Any
) -> AttentionSpec:
    """Plain causal order over `keys` tokens, of which the last `queries` are queries.

    Args:
      queries: Q.
      keys: K.
      window: keys that a query sees, itself included; None: every earlier one.
      **sizes: other attributes of `AttentionSpec`.
    """
    return AttentionSpec(causal_pattern(queries, keys), window, **sizes)


# Lengths that are no multiple of a tile, windows of one key, of a tile and of the whole
# stream, few queries, and a stream shorter than a tile.
CAUSAL_SPECS = {
    f"{queries} of {keys}, {f'window {window}' if window else 'full'}": causal_spec(
        queries, keys, window
    )
    for queries, keys, window in (
        (300, 300, None),
        (300, 300, 1),
        (300, 300, 64),
        (300, 300, 300),
        (333, 333, None),
        (100, 333, 40),
        (47, 500, None),
        (30, 40, None),
        (30, 40, 7),
        (9, 9, 4),
    )
}


class Stream(NamedTuple):
    """A model's stream of tokens.

    Attributes:
      events: T, events of the history.
      candidates: C; 0 in a user-centric stream, which ends with its events.
      target_tokens: tokens of a candidate.
      fused: True for one token per event, False for a state and an action.
      user_tokens: static tokens.
      windows: window of each layer, bottom first; None in a full layer.
    """

    events: int
    candidates: int
    target_tokens: int
    fused: bool
    user_tokens: int = 5
    windows: tuple[int | None, ...] = (None, None, 32, 16)

    def layout(self) -> Layout:
        """The order of the tokens."""
        return build_layout(
            user_tokens=self.user_tokens,
            events=self.events,
            fused=self.fused,
            candidates=self.candidates,
            target_tokens=self.target_tokens,
        )


STREAMS = {
    "nio": Stream(events=150, candidates=1, target_tokens=2, fused=True),
    "requests": Stream(events=200, candidates=4, target_tokens=3, fused=True),
    "many candidates": Stream(events=60, candidates=90, target_tokens=2, fused=True),
    "uc": Stream(events=70, candidates=0, target_tokens=1, fused=False),
}


def codes_layout(events: int) -> Layout:
    """A stream whose every event is continued by three tokens of its own, at the end.

    The tokens are not in the order of their indices.
    """
    shared = [
        StreamSegment.tokens("user", 3),
        StreamSegment.tokens("sep", 1),
        history_part(events=events, fused=True),
    ]
    own = [StreamSegment.tokens("code", 3)]
    return make_layout(shared, own, events=events, candidates=events, readout="events")


def _padding(layout: Layout, *, continued: bool) -> np.ndarray:
    """Valid tokens of two streams, `[2, S] bool`.

    A third of the first one's events is padding, and all but three of the second one's.

    Args:
      layout: the order of the tokens.
      continued: candidates are valid where their events are. Otherwise all candidates
        of the first stream are valid, and one of the second.
    """
    events, candidates = layout.events, layout.candidates
    valid_events = np.arange(events)[None] >= np.array([[events // 3], [events - 3]])
    if continued:
        valid_candidates = valid_events
    else:
        valid_candidates = np.ones((2, candidates), bool)
        valid_candidates[1, 1:] = False
    return np.asarray(
        layout.valid(
            jnp.asarray(valid_events),
            jnp.asarray(valid_candidates) if candidates else None,
        )
    )


def _layer_specs(
    layout: Layout,
    windows: tuple[int | None, ...],
    valid: np.ndarray,
    *,
    every_token: bool,
) -> tuple[AttentionSpec, ...]:
    positions = [np.arange(len(layout.index))] * (len(windows) + 1)
    if not every_token:
        positions = list(live_positions(layout, windows))
    return tuple(
        AttentionSpec(layout.pattern(queries, keys), window, valid[:, keys])
        for keys, queries, window in zip(
            positions, positions[1:], windows, strict=False
        )
    )


def stream_specs(
    name: str | Stream, *, every_token: bool = False
) -> tuple[AttentionSpec, ...]:
    """Specs of the layers of a stream, bottom first.

    Args:
      name: key of `STREAMS`, or a stream.
      every_token: all tokens are queries and keys; otherwise those that a later layer
        or the heads need.
    """
    stream = STREAMS[name] if isinstance(name, str) else name
    layout = stream.layout()
    valid = _padding(layout, continued=False)
    return _layer_specs(layout, stream.windows, valid, every_token=every_token)


def codes_specs(events: int = 70) -> tuple[AttentionSpec, ...]:
    """Specs of a full and a sliding layer over `codes_layout`, needed tokens only."""
    layout = codes_layout(events)
    valid = _padding(layout, continued=True)
    return _layer_specs(layout, (None, 20), valid, every_token=False)


def prefix_spec(tokens: int = 200, prefix: int = 90) -> AttentionSpec:
    """A full layer in which the first `prefix` tokens see each other both ways."""
    pattern = causal_pattern(tokens, tokens)
    return AttentionSpec(dataclasses.replace(pattern, prefix=prefix))

"""The maker of each entity of a config: user, query and candidate.

    tokens.text names the entity       discrete tokens, one per value
    user, with tokens.user_tokens=0    a soft token per static field (TokenFormer)
    otherwise                          N soft tokens of all features (Token Factory)

The history has a maker of its own (`tokenrec.tokens.history.HistoryMaker`).
"""

from __future__ import annotations

from flax import nnx

from tokenrec.config import Config
from tokenrec.config.prompt import Segment
from tokenrec.data.schema import Feature, Schema
from tokenrec.models.stream_layout import candidate_features
from tokenrec.tokens.discrete_tokens import DiscreteTokenMaker
from tokenrec.tokens.history import soft_features, text_features
from tokenrec.tokens.makers import Maker, PerFieldMaker

EntityMaker = Maker | PerFieldMaker | DiscreteTokenMaker


def make_entity_maker(
    config: Config,
    entity: str,
    features: tuple[Feature, ...],
    count: int,
    *,
    rngs: nnx.Rngs,
) -> EntityMaker | None:
    """Create the maker of an entity.

    Args:
      config: the run's config.
      entity: "user", "query" or "candidate".
      features: all features of the entity.
      count: N, its soft tokens; not read for discrete tokens and static fields.
      rngs: source of the initial weights.

    Returns:
      The maker; None for a user or a query without features.

    Raises:
      InputError: `tokens.text` or `tokens.soft` names a feature that the entity lacks,
        or a candidate has no features.
    """
    tokens, width = config.tokens, config.model.width
    if entity in tokens.text:
        features = text_features(config, entity, features)
        return DiscreteTokenMaker(features, width, tokens, rngs=rngs)
    features = soft_features(config, entity, features)
    if not features and entity in ("user", "query"):
        return None
    if entity == "user" and not tokens.user_tokens:
        return PerFieldMaker(features, width, tokens, rngs=rngs)
    return Maker(features, count, width, tokens, rngs=rngs)


def make_target_maker(
    config: Config,
    schema: Schema,
    segments: tuple[Segment, ...],
    *,
    rngs: nnx.Rngs,
) -> EntityMaker | None:
    """Create the maker of candidates.

    Args:
      config: the run's config.
      schema: features, without the excluded ones.
      segments: segments of the prompt.
      rngs: source of the initial weights.

    Returns:
      The maker; None if there are no candidates, or if the state maker of the history
      makes them.

    Raises:
      InputError: `tokens.text` or `tokens.soft` names a feature that a candidate lacks.
    """
    tokens = config.tokens
    features = candidate_features(schema, segments)
    # A candidate is made like a state where both have one token of the same features,
    # so that they differ by their positions alone.
    differs_from_states = (
        tokens.fused
        or tokens.target_tokens > 1
        or "candidate" in tokens.text
        or "candidate" in tokens.soft
        or features != schema.state
    )
    has_candidates = any(segment.kind == "candidate" for segment in segments)
    if not has_candidates or not differs_from_states:
        return None
    return make_entity_maker(
        config, "candidate", features, tokens.target_tokens, rngs=rngs
    )

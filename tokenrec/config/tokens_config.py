"""Config section `tokens`: from features to tokens (docs/methods.md, section 2)."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
from typing import Literal

from tokenrec.config.fields import BOUNDS, Bounds, field

MakerKind = Literal["mlp", "linear", "transformer"]
Compression = Literal["none", "mlp", "attention"]


@dataclasses.dataclass
class TokensConfig:
    """Tokens made from features, and their order in a stream."""

    prompt: tuple[str, ...] = ()
    """Segments of the stream, in order: user, sep, history, query, title, candidate,
    `text:` with literal text, and `||` between what the candidates of a request share
    and what each has of its own. Empty: TokenFormer's layout, `user sep history sep ||
    candidate`, or its counterpart for user-centric streams and retrieval."""

    template: str = ""
    """The prompt as one text in place of `prompt`, with slots in braces for the other
    segments: `Bought so far: {history} Is {title} {candidate} next?`. Line breaks are
    written as they are, braces doubled. Without a `||`, one is put before the words
    that lead to the first slot of a candidate. `{sid}` at the end may show where a
    semantic id is generated."""

    chat: bool = False
    """`template`: make it the words of a user in the chat format of `model.kind`, with
    what begins the model's answer behind them."""

    text: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Features that are written as discrete tokens instead of soft ones, by entity
    (user, history, query, candidate). An entity that is not named stays soft."""

    soft: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Features that the soft tokens of an entity are made of. An entity that is not
    named uses all of its features."""

    history_cap: int = field(0, at_least=1, special={0: "no cap"})
    """Most tokens of the history; the oldest are dropped. For histories in discrete
    text, whose length in tokens grows with the number of features."""

    compression: Compression = "none"
    """Shortens the events that are older than the newest `recent` ones, before the
    backbone. `attention` pools each `group` of events to one token; `mlp` mixes over
    time to `compressed` tokens. Use it for histories of hundreds of events."""

    recent: int = field(0, at_least=0)
    """Newest events that compression leaves as they are."""

    group: int = field(10, at_least=1)
    """Events that `compression='attention'` pools into one token."""

    compressed: int = field(10, at_least=1)
    """Tokens that `compression='mlp'` makes of all older events together."""

    random_tokens: bool = False
    """Keep makers and tables at their random initial values. A control for experiments:
    it measures what learned tokens are worth."""

    embedding_dim: int = field(16, at_least=1)
    """Width of an embedding, for tables that `embedding_dims` does not name."""

    embedding_dims: dict[str, int] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(at_least=1)}
    )
    """Embedding width by table name. Tables of one width share an array, so few
    different widths are faster."""

    id_dropout: float = field(0.0, at_least=0, below=1)
    """Probability that a known id of a categorical or multi-valued feature becomes
    *unknown* in training, occurrence by occurrence. It trains the row of unknown
    values, and keeps a model from memorising single ids, above all in later epochs.
    For tables that `id_dropouts` does not name."""

    id_dropouts: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(at_least=0, below=1)}
    )
    """`id_dropout` by table name."""

    min_count: int = field(0, at_least=1, special={0: "off"})
    """Fewest training rows with an id for it to have a row of its own; rarer ids read
    the row of *unknown*, in training and ever after. Counted over the log rows of the
    training split that are scored or carry a label. 1 leaves out the ids that training
    never sees. For tables that `min_counts` does not name."""

    min_counts: dict[str, int] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(at_least=0)}
    )
    """`min_count` by table name; 0 keeps all ids."""

    rare_buckets: int = field(1, at_least=1)
    """Rows of a table that its ids below `min_count` share, by a hash of the id: that
    of *unknown* and, above 1, those of some of these ids, so that tables do not
    grow."""

    replicate_rows: int = field(100_000, at_least=1, special={0: "spread every table"})
    """Tables with at most this many rows are replicated on every device; the rows of
    longer ones are spread over all devices. Lower it if tables fill the memory. The
    placement of rows does not depend on the mesh, so checkpoints move between
    meshes."""

    user_tokens: int = field(0, at_least=1, special={0: "one token per user feature"})
    """N, tokens that one maker makes of all user features together."""

    target_tokens: int = field(1, at_least=1)
    """K, tokens per candidate; predictions are read from the last one."""

    fused: bool = False
    """Make one token per event instead of a state and an action token, which halves the
    stream. Ranking in `uc` cannot use it: a fused token contains the label that it must
    predict."""

    maker: MakerKind = "mlp"
    """Network that maps the features of an entity to its tokens: `mlp` (linear, GELU,
    linear), `linear`, or `transformer` (features as tokens, read by learned
    queries)."""

    hidden: int = field(0, at_least=1, special={0: "twice model.width"})
    """Inner width of an `mlp` maker."""

    output_scale: bool = False
    """Makers return `s * RMSNorm(z)` with a learned scale s, instead of z."""

    multi_valued: Literal["mean", "sum"] = "mean"
    """Pooling of the embeddings of a multi-valued feature."""

    semantic_id: Literal["concat", "sum", "prefix"] = "concat"
    """Combination of the levels of a semantic id: `concat` or `sum` of an embedding
    per level, or `prefix`, the sum of a hashed embedding of each code prefix."""

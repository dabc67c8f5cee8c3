"""Config sections `model` and `head`: the backbone and what it predicts."""

# ml_collections reads the annotations as types: they must not be postponed.

import dataclasses
from typing import Literal

from tokenrec.config.backbones import BACKBONES
from tokenrec.config.fields import BOUNDS, Bounds, field

Positions = Literal["rope", "additive"]
DType = Literal["float32", "bfloat16"]
AttentionKind = Literal["auto", "dense", "blocked", "splash", "cudnn", "triton"]
Remat = Literal["none", "dots", "full"]
BranchKind = Literal["none", "mean", "din"]
Retrieval = Literal["next_item", "semantic_id"]
RopeScaling = Literal["none", "linear", "llama3"]


@dataclasses.dataclass
class DecoderConfig:
    """Sizes of a language model that `width`, `heads`, `layers`, `ffn_width` and
    `rope_base` of `model` leave open. They are read from the `config.json` of
    `model.pretrained` or `model.architecture`: leave them alone."""

    vocabulary: int = field(0, at_least=1, special={0: "not read yet"})
    """Rows V of the word embedding."""

    tied: bool = True
    """Words are scored with the vectors that they are read with."""

    kv_heads: int = field(0, at_least=1, special={0: "not read yet"})
    """Heads G of keys and values, each of which serves `heads / G` heads of queries."""

    head_width: int = field(0, at_least=1, special={0: "not read yet"})
    """Width h of a head. `heads * head_width` need not be `width`."""

    norm_epsilon: float = field(1e-6, above=0)
    """Added to the mean square in an RMSNorm."""

    query_scale: float = field(0.0, above=0, special={0: "head_width"})
    """Queries are divided by the square root of it."""

    windows: tuple[int, ...] = field((), at_least=1, special={0: "a full layer"})
    """The model's own sliding window of each layer, bottom to top, in tokens; () if all
    are full. `model.windows` narrows them further."""

    local_rope_base: float = field(0.0, above=1, special={0: "model.rope_base"})
    """Base of the rotary positions of the layers that have a window in `windows`."""

    rope_scaling: RopeScaling = "none"
    """How the frequencies of full layers were changed for longer texts."""

    rope_factor: float = field(1.0, above=0)
    """`linear`, `llama3`: divisor of the frequencies, of `llama3` the low ones."""

    rope_low: float = field(1.0, above=0)
    """`llama3`: wavelengths above `rope_context` over this are divided wholly."""

    rope_high: float = field(4.0, above=0)
    """`llama3`: wavelengths below `rope_context` over this are left as they are."""

    rope_context: int = field(0, at_least=1, special={0: "none"})
    """`llama3`: length of the texts before the change, in tokens."""

    logit_cap: float = field(0.0, above=0, special={0: "none"})
    """Limit c of the scores of words, `c tanh(score / c)`."""


@dataclasses.dataclass
class ModelConfig:
    """The backbone (docs/methods.md, section 3).

    Backbones other than `tokenformer` use fewer of these fields. A field that the
    backbone does not use must keep its default.
    """

    kind: str = field("tokenformer", choices=tuple(BACKBONES))
    """Backbone. A plain transformer is `tokenformer` with `gate=False` and
    `windows=()`."""

    width: int = field(64, at_least=1)
    """d, width of a token, a multiple of `heads`. Parameters and FLOPs grow with its
    square. On TPUs use a multiple of 128."""

    heads: int = field(2, at_least=1)
    """H, attention heads of width `width / heads`, which must be even for rotary
    positions. On TPUs a head of 128 suits the kernels best."""

    layers: int = field(4, at_least=1)
    """Number of blocks. FLOPs and parameters grow in proportion."""

    windows: tuple[int, ...] = field(
        (32, 16), at_least=1, special={0: "a full layer among sliding ones"}
    )
    """Sliding windows of the top layers, bottom to top, in tokens, the token itself
    included (BFTS: full attention below, shrinking windows above). Layers below are
    full and causal. Smaller windows cost less; an event takes two tokens unless
    `tokens.fused`. () makes all layers full."""

    discard_static: bool = True
    """Sliding layers hide the user's static tokens from all other tokens, as in the
    paper. False: a static token is visible in every layer."""

    positions: Positions = "rope"
    """`rope` rotates queries and keys by the position of the event. `additive` adds
    learned vectors of position and role to the tokens; for comparison."""

    prefix: Literal["causal", "bidirectional"] = "causal"
    """Attention among the tokens left of `||` in full layers: `causal`, or
    `bidirectional`, where they see each other both ways. `bidirectional` needs
    `data.paradigm='nio'` and a full layer."""

    gate: bool = True
    """NLIR: multiply the attention branch by a sigmoid gate computed from the input of
    the layer."""

    gate_bias: float = 1.0
    """Initial bias of the gate, before the sigmoid; 1 opens it to 0.73."""

    ffn_width: int = field(
        0, at_least=1, special={0: "8/3 of width, rounded up to a multiple of 8"}
    )
    """Inner width of the SwiGLU feed-forward network. For TPU pods give a multiple of
    128: otherwise XLA may sum whole gradients of its weights on every device."""

    qk_norm: bool = False
    """RMSNorm on queries and keys. Steadies the training of deep or wide models."""

    rope_base: float = field(10_000.0, above=1)
    """Base of the rotary positions: the longest wavelength is 2 pi times it, in
    events."""

    dropout: float = field(0.0, at_least=0, below=1)
    """Dropout rate of the tokens, the attention branch and the feed-forward branch.
    Raise it when the validation metrics fall while the training loss still improves."""

    dtype: DType = "float32"
    """Type of the matrix products. `bfloat16` is faster on TPUs and GPUs and saves
    activation memory. Parameters, softmax, norms, logits and losses stay float32."""

    needed_rows: bool = True
    """Skip tokens that no prediction can see. The results are the same; False exists to
    test that."""

    attention: AttentionKind = "auto"
    """Attention kernel (tokenrec/ops/attention). `auto` takes the first of the
    platform's list that supports the layer; a named kernel is an error where it cannot
    run. `triton`, on GPUs, has to be named: it is not in the list."""

    remat: Remat = "none"
    """Activations that the backward pass recomputes to save memory: `none`; `dots`, all
    but matrix products with weights and the attention result; or `full`, each block
    from its input. Try `dots` when activations do not fit."""

    scan: int = field(8, at_least=3, special={0: "no loop"})
    """Fewest consecutive layers with one window that are compiled as a loop over
    stacked weights; the top one of them stays outside the loop. Compile time then does
    not grow with depth. The results are the same, but weights are stored under other
    names, so a run cannot resume with another value."""

    scan_unroll: int = field(1, at_least=1)
    """Layers of one turn of that loop. In a longer turn the compiler can run the
    collectives of one layer beside the work of another, and copies less between turns;
    compile time grows. Weights keep their names, so a run may resume with another
    value."""

    branch: BranchKind = "none"
    """Ranking: a branch beside the backbone, whose output is added to the read-outs.
    It multiplies user, target, read-out and the `mean` of the earlier events in cross
    layers and an MLP. `din` adds DIN's weighted sum of the events. Its weights grow
    with the square of `width`; `din` takes memory for each pair of target and event."""

    branch_layers: int = field(2, at_least=1)
    """Cross layers of the branch, and layers of its MLP, which is `ffn_width` wide."""

    merge: int = field(4, at_least=1)
    """`longer` only: neighbouring events that are merged into one token."""

    time_bias: bool = True
    """`hstu` only: relative attention bias of the time between two events."""

    pretrained: str = ""
    """`gemma3`, `qwen3`, `llama3`: folder of a checkpoint in the format of Hugging Face
    (`config.json`, `*.safetensors`, `tokenizer.json`), from which a new run takes its
    weights. It is never downloaded."""

    architecture: str = ""
    """`gemma3`, `qwen3`, `llama3` without `pretrained`: a `config.json` of that format,
    or the name of one in `configs/architectures/`. The weights start random."""

    decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)


@dataclasses.dataclass
class HeadConfig:
    """The retrieval head, used with `data.objective='retrieval'` (docs/methods.md,
    section 2). Ranking has one linear head per task and no options."""

    retrieval: Retrieval = "next_item"
    """`next_item` scores every item by `h . e / temperature`. `semantic_id` predicts
    the codes of the item one level after the other; it needs `data.semantic_ids`."""

    negatives: int = field(
        0, at_least=1, special={0: "full softmax over the catalogue"}
    )
    """`next_item`: items that each step draws for a sampled softmax, a multiple of
    `data.batch_size`. The full softmax trains the item table as a dense weight, which
    every device gathers; sample when the catalogue is too long for that."""

    item_features: tuple[str, ...] = ()
    """`next_item`, sampled softmax: categorical and multi-valued item features, such as
    brand and category, whose embeddings are added to the output vector of an item.
    Items of few events gain most. Needs tables that every device holds
    (`tokens.replicate_rows`)."""

    tied: bool = True
    """`next_item`: add the output vector of an item to the tokens of its events.
    `semantic_id`: read codes with the vectors that they are scored against."""

    cosine: bool = False
    """`next_item`: normalise both sides of the score to length 1. Use it with a
    temperature near 0.07."""

    temperature: float = field(1.0, above=0)
    """`next_item`: divisor of the scores."""

    copy: bool = False
    """Raise the items of the history, the more the oftener and the more recently they
    were taken: `next_item` adds a bonus to their scores, `semantic_id` mixes copies of
    them with the generated items. Use it where users take an item again."""

    alignment: dict[str, float] = dataclasses.field(
        default_factory=dict, metadata={BOUNDS: Bounds(above=0)}
    )
    """`semantic_id`, language models: templates of alignment tasks, and the weights of
    their losses beside that of the next item, which is 1. A template holds `{title}`, the
    texts of an item of the catalogue, and `{sid}`, its semantic id, and learns the one
    that it ends with: `{"The id of {title} is {sid}": 1.0, "{sid} is {title}": 0.5}`."""

    beams: int = field(20, at_least=1)
    """`semantic_id`: width of the beam search, at least `top_k`. Wider finds better
    items and takes longer; Recall@k and NDCG@k with k above it are null."""

    top_k: int = field(10, at_least=1)
    """Items per request that `tokenrec predict` writes."""

    drop_seen: bool = False
    """Exclude the items in the request's own history from the ranking. Use it where
    users do not take an item twice."""

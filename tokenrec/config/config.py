"""The whole of a run as typed dataclasses, and its JSON. `validation.py` says what may not stand in it."""

# Annotations are not postponed here: ml_collections reads a field's type as it stands.

import dataclasses
import json
import os
import typing
from pathlib import Path
from typing import Any, Literal

from tokenrec.errors import InputError, suggest
from tokenrec.runtime.files import parse_json

Paradigm = Literal["nio", "uc"]
MakerKind = Literal["mlp", "linear", "transformer"]
DType = Literal["float32", "bfloat16"]
Objective = Literal["ranking", "retrieval"]
Retrieval = Literal["next_item", "semantic_id"]
Compression = Literal["none", "mlp", "attention"]
AttentionKind = Literal["auto", "dense", "blocked", "splash", "cudnn"]
Remat = Literal["none", "dots", "full"]
Positions = Literal["rope", "additive"]


@dataclasses.dataclass
class DataConfig:
    """Which prepared data set, and how samples are cut from it.

    Attributes:
      name: folder of the data set under `TOKENREC_DATA` (default `data/`), unless `path` is given.
      path: folder of the prepared data set.
      schema: JSON file of a planned schema (planned.py), or one shipped with tokenrec: what `compile` and `describe`
        read while there is no data set at `name`.
      exclude: features that the model must not see.
      tasks: task name -> weight of its loss. Empty: every task of the data set with its own weight.
      semantic_ids: `semantic_ids.parquet` of `tokenrec semantic-ids`, or its folder, as a path or under
        `TOKENREC_DATA` (default `data/`). Adds the item feature `semantic_id`, which may be excluded, and gives the
        codes that the head "semantic_id" learns.
      objective: "ranking", the labels of an impression, or "retrieval", its item among the whole catalogue.
      positive: retrieval: the task whose positives are to be retrieved; empty: every scored row.
      paradigm: "nio", one stream per request, or "uc", one stream per run of a user's events (methods.md section 3).
      events: T, the newest events that a sample sees.
      overlap: UC: events at the head of a continued stream that are history only. At least the least history that a
        scored row is promised.
      candidates: C, candidates that share one stream; NIO with C = 1 is one impression a stream. Retrieval: the most
        items that one history is to retrieve.
      buckets: stream lengths below `events` that shorter histories are padded to. Each is one more compilation.
      batch_size, eval_batch_size: samples of a step, over all devices.
      window_rows: rows of the log that are held in memory and shuffled together.
    """

    name: str = ""
    path: str = ""
    schema: str = ""
    exclude: tuple[str, ...] = ()
    semantic_ids: str = ""
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)
    objective: Objective = "ranking"
    positive: str = ""
    paradigm: Paradigm = "nio"
    events: int = 50
    overlap: int = 0
    candidates: int = 1
    buckets: tuple[int, ...] = ()
    batch_size: int = 256
    eval_batch_size: int = 512
    window_rows: int = 20_000_000


@dataclasses.dataclass
class TokensConfig:
    """Features to soft tokens (methods.md sections 2 and 3).

    Attributes:
      prompt: segments of the stream in order (tokens/prompt.py). Empty: that of TokenFormer,
        `("user", "sep", "history", "sep", "||", "candidate")`, or its counterpart for retrieval.
      text: entity ("user", "history", "query", "candidate") -> features that are written as discrete tokens instead of
        soft ones; an entity that is not named is soft.
      soft: entity -> features that its soft tokens are made of; an entity that is not named has all of its features.
      history_cap: most tokens of the history, cut from the left; 0 cuts nothing.
      compression: of the events before the newest `recent` ones: "mlp" over time makes `compressed` tokens of them,
        "attention" pooling one token per `group` of events.
      random_tokens: tokens of makers stay as they are made at the start, and nothing before the backbone is trained:
        the control that tells what the signals in them are worth.
      embedding_dim: width of the rows of every table not named in `embedding_dims`.
      embedding_dims: table name -> width.
      replicate_rows: tables of at most so many rows lie whole on every device; the rows of longer ones are spread over
        all devices (ops/exchange.py). Where a row is stored does not depend on the mesh.
      user_tokens: N tokens of one maker over all user features; 0 makes one token per static field.
      target_tokens: K tokens per candidate; the last one is read out.
      fused: one token per event instead of a state and an action token. Not for ranking in UC.
      maker: "mlp" (linear, GELU, linear), "linear", or "transformer".
      hidden: width inside an "mlp" maker; 0 is twice the model's width.
      output_scale: makers return `s * RMSNorm(z)` with a learned s instead of z.
      multi_valued: "mean" or "sum" of the rows of a multi-valued feature.
      semantic_id: "concat", "sum", or "prefix" (hashed n-grams of the code prefix).
    """

    prompt: tuple[str, ...] = ()
    text: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    soft: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    history_cap: int = 0
    compression: Compression = "none"
    recent: int = 0
    group: int = 10
    compressed: int = 10
    random_tokens: bool = False
    embedding_dim: int = 16
    embedding_dims: dict[str, int] = dataclasses.field(default_factory=dict)
    replicate_rows: int = 100_000
    user_tokens: int = 0
    target_tokens: int = 1
    fused: bool = False
    maker: MakerKind = "mlp"
    hidden: int = 0
    output_scale: bool = False
    multi_valued: Literal["mean", "sum"] = "mean"
    semantic_id: Literal["concat", "sum", "prefix"] = "concat"


@dataclasses.dataclass
class ModelConfig:
    """The backbone (methods.md section 3).

    Attributes:
      kind: "tokenformer", which a plain transformer is too (no gate, no windows), or a rival (models/rivals/), which
        reads fewer of the fields below: kinds.py says which.
      width, heads, layers: d, H and the number of blocks.
      windows: w of each sliding layer, the last ones of the stack, 0 for a full one among them; layers before them see
        everything causally.
      discard_static: sliding layers hide static fields from all other rows, as in the paper; False: they see them.
      positions: "rope", or "additive": learned vectors of position and role, added to the tokens; for comparison.
      prefix: "bidirectional": in full layers the rows left of `||` see each other both ways. NIO only.
      gate: NLIR, the one-sided gate on the attention branch.
      gate_bias: b_g at the start.
      ffn_width: inner width of SwiGLU; 0 is 8/3 of the width, rounded up to a multiple of 8. On a TPU give a multiple
        of 128, without which XLA may sum whole gradients of it on every device (CONTRIBUTING.md).
      qk_norm: RMSNorm on queries and keys.
      rope_base: largest wavelength of the rotary positions is 2 pi times this.
      dropout: rate on the attention branch, the FFN branch and the tokens.
      dtype: of the matrix products; softmax, norms, logits and losses are float32 always.
      needed_rows: skip rows that no read-out can see. Exact; turn it off only to test that.
      attention: an implementation of `ops/attention.py`; "auto" takes the first of the platform that can serve.
      remat: what the backward pass computes again: "none", all but products with weights and attention ("dots"), or
        each block from its input ("full").
      scan: from so many layers of one window in a row, all but the top one of the row are a loop over stacked weights,
        so that compiling takes no longer the more they are; 0 never. Values do not depend on it, names of weights do.
      merge: events of a merged token, of "longer" alone.
      time_bias: relative bias of times, of "hstu" alone.
    """

    kind: str = "tokenformer"
    width: int = 64
    heads: int = 2
    layers: int = 4
    windows: tuple[int, ...] = (32, 16)
    discard_static: bool = True
    positions: Positions = "rope"
    prefix: Literal["causal", "bidirectional"] = "causal"
    gate: bool = True
    gate_bias: float = 1.0
    ffn_width: int = 0
    qk_norm: bool = False
    rope_base: float = 10_000.0
    dropout: float = 0.0
    dtype: DType = "float32"
    needed_rows: bool = True
    attention: AttentionKind = "auto"
    remat: Remat = "none"
    scan: int = 8
    merge: int = 4
    time_bias: bool = True


@dataclasses.dataclass
class HeadConfig:
    """What retrieval asks of a read-out (methods.md section 2, "Tasks"). Ranking has one linear head for its tasks.

    Attributes:
      retrieval: "next_item", a score `h . e / temperature` of every item; or "semantic_id", the codes of the item,
        level after level.
      negatives: next_item: items drawn per step for a sampled softmax, the item table lying among the row-wise
        tables; 0 is the full softmax, the item table being a dense weight.
      tied: next_item: an event's token gets the output vector of its item added; semantic_id: codes are read in with
        the vectors that they are scored against.
      cosine: next_item: both sides of the score are brought to length 1 first.
      temperature: of the score.
      beams: width of the beam search over semantic ids; metrics that look at more items are not given.
      top_k: items that `predict` writes per request.
      drop_seen: leave out the items of the request's own history when ranking the catalogue.
    """

    retrieval: Retrieval = "next_item"
    negatives: int = 0
    tied: bool = True
    cosine: bool = False
    temperature: float = 1.0
    beams: int = 20
    top_k: int = 10
    drop_seen: bool = False


@dataclasses.dataclass
class OptimConfig:
    """AdamW for dense weights, row-wise AdaGrad for tables.

    Attributes:
      steps: horizon of the schedule: linear warm-up, then cosine to `final_fraction` of the rate.
      learning_rate, table_learning_rate: peaks.
      warmup_steps: of both.
      weight_decay: on matrices only; biases, norms and the gate's bias are excluded.
      table_weight_decay: L2 pull on the rows that a batch touches.
      clip_norm: of the global gradient, each unique row counted once; 0 turns it off.
      accumulate: micro-batches per step; `data.batch_size` is split among them.
      spike_norm: a gradient norm of more than so many times its running mean is a spike, and its step is skipped: it
        changes nothing but the step number. 0 never. A step whose loss or gradient is not finite is always skipped.
      max_skipped: skipped steps of a run, counted in the log; one more stops it.
    """

    steps: int = 1000
    learning_rate: float = 1e-3
    table_learning_rate: float = 0.05
    warmup_steps: int = 100
    final_fraction: float = 0.0
    weight_decay: float = 0.01
    table_weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    clip_norm: float = 1.0
    accumulate: int = 1
    spike_norm: float = 0.0
    max_skipped: int = 0


@dataclasses.dataclass
class MeshConfig:
    """Devices along each mesh axis; data=-1 takes what the other two leave."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


@dataclasses.dataclass
class TrainConfig:
    """The loop.

    Attributes:
      stop_at: step after which the loop ends; 0 is `optim.steps`. The schedule does not depend on it.
      eval_every: steps between evaluations on `eval_split`; 0 evaluates at the end only.
      eval_samples: samples of the split that the loop evaluates; 0 is all.
      save_every: steps between checkpoints; 0 saves at the end only.
      keep: latest checkpoints kept, besides the best.
      keep_every: checkpoints at multiples of so many steps are kept for good; 0 none.
      log_every: steps between log lines; the only host synchronisation.
      log_states: each evaluation also logs the effective rank of event states and the mean gate, layer by layer
        (analysis/watch.py).
      best_metric: decides the best checkpoint: "macro_auc", "macro_gauc" or "loss" (lower is better) of ranking,
        "recall@10" or "ndcg@10" of retrieval. "auto" is the macro AUC, or NDCG@10.
      patience: evaluations without a better value before the run stops; 0 never stops early.
      hang_seconds: a run of which nothing is heard for so long (a step, a batch of an evaluation, a save, the first
        step with its compilation) says where it stands and ends; 0 never.
      keep_compiled: compiled programs are kept in `WORKDIR/compiled`, so that a restart need not compile them again;
        JAX_COMPILATION_CACHE_DIR names another folder, for several runs.
      trackers: experiment trackers that also get the metrics: "wandb", "mlflow" (extras of the same names).
      profile_steps: steps to profile after the first ones, which compile; the trace is in `WORKDIR/profile`. 0: none.
      warm_start: folder of another run, whose weights this one starts from if it has no checkpoint yet (warm_start.py).
      warm_start_checkpoint: best, latest or a step of that run.
      warm_start_data: folder of the data set of that run, if it is not where that run found it.
    """

    stop_at: int = 0
    eval_every: int = 0
    eval_split: str = "valid"
    eval_samples: int = 0
    save_every: int = 1_000
    keep: int = 2
    keep_every: int = 0
    log_every: int = 20
    log_states: bool = False
    best_metric: Literal[
        "auto", "macro_auc", "macro_gauc", "loss", "recall@10", "ndcg@10"
    ] = "auto"
    patience: int = 0
    hang_seconds: float = 1800.0
    keep_compiled: bool = True
    trackers: tuple[str, ...] = ()
    profile_steps: int = 0
    warm_start: str = ""
    warm_start_checkpoint: str = "best"
    warm_start_data: str = ""


@dataclasses.dataclass
class Config:
    """A run. `tokenrec train --config=FILE` reads one from a Python file's `get_config()`."""

    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokens: TokensConfig = dataclasses.field(default_factory=TokensConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    head: HeadConfig = dataclasses.field(default_factory=HeadConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def data_directory(config: Config) -> Path:
    """Folder of the prepared data set: `data.path`, or `data.name` under `TOKENREC_DATA` or `data/`."""
    if config.data.path:
        return Path(config.data.path)
    if config.data.name:
        return Path(os.environ.get("TOKENREC_DATA", "data")) / config.data.name
    raise InputError(
        "data.path is empty and so is data.name; give --data DIR or --config.data.path=DIR"
    )


def semantic_ids_path(config: Config) -> str:
    """`data.semantic_ids` as it stands, or under `TOKENREC_DATA` or `data/` if nothing stands there; "" for none."""
    given = config.data.semantic_ids
    if not given or Path(given).exists():
        return given
    beside = Path(os.environ.get("TOKENREC_DATA", "data")) / given
    return str(beside if beside.exists() else given)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`; an unknown field is an InputError that names the near one, so is text that is not JSON."""
    value = parse_json(text, "the config", "give one that `tokenrec train` wrote")
    return _build(Config, value, "")


def read_config(path: Path) -> Config:
    """`from_json` of a file, such as the `config.json` of a run.

    Raises:
      InputError: it cannot be read, or `from_json` refuses its text.
    """
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"config file '{path}' cannot be read: {error.strerror}; check the path"
        ) from error
    except (
        ValueError
    ) as error:  # an InputError, which lacks the path, or a UnicodeDecodeError
        raise InputError(f"config file '{path}': {error}") from error


def _build[T](kind: type[T], value: Any, prefix: str) -> T:
    if not isinstance(value, dict):
        raise InputError(
            f"config '{prefix.rstrip('.')}' is {value!r}, not a JSON object of its fields"
        )
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, item in value.items():
        if key not in known:
            raise InputError(
                f"config field '{prefix}{key}' does not exist{suggest(key, known)}"
            )
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            item = _build(typing.cast(type, hint), item, f"{prefix}{key}.")
        elif typing.get_origin(hint) is tuple and isinstance(item, list):
            item = tuple(item)
        elif hint == dict[str, tuple[str, ...]] and isinstance(item, dict):
            item = {
                name: tuple(values) if isinstance(values, list) else values
                for name, values in item.items()
            }
        built[key] = item
    return kind(**built)

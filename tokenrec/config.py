"""The whole of a run as typed dataclasses, and `validate`, which reports all problems in one message."""

# Annotations are not postponed here: ml_collections reads a field's type as it stands.

import dataclasses
import json
import math
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

from tokenrec.errors import InputError, suggest

Paradigm = Literal["nio", "uc"]
MakerKind = Literal["mlp", "linear", "transformer"]
DType = Literal["float32", "bfloat16"]
AttentionKind = Literal["auto", "dense", "blocked", "splash", "cudnn"]
Remat = Literal["none", "dots", "full"]


@dataclasses.dataclass
class DataConfig:
    """Which prepared data set, and how samples are cut from it.

    Attributes:
      name: folder of the data set under `TOKENREC_DATA` (default `data/`), unless `path` is given.
      path: folder of the prepared data set.
      exclude: features that the model must not see.
      tasks: task name -> weight of its loss. Empty: every task of the data set with its own weight.
      paradigm: "nio", one stream per request, or "uc", one stream per run of a user's events (methods.md section 3).
      events: T, the newest events that a sample sees.
      overlap: UC: events at the head of a continued stream that are history only. At least the least history that a
        scored row is promised.
      candidates: C, candidates that share one stream; NIO with C = 1 is one impression a stream.
      buckets: stream lengths below `events` that shorter histories are padded to. Each is one more compilation.
      batch_size, eval_batch_size: samples of a step, over all devices.
      window_rows: rows of the log that are held in memory and shuffled together.
    """

    name: str = ""
    path: str = ""
    exclude: tuple[str, ...] = ()
    tasks: dict[str, float] = dataclasses.field(default_factory=dict)
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
      embedding_dim: width of the rows of every table not named in `embedding_dims`.
      embedding_dims: table name -> width.
      user_tokens: N tokens of one maker over all user features; 0 makes one token per static field.
      target_tokens: K tokens per candidate; the last one is read out.
      fused: one token per event instead of a state and an action token. NIO only.
      maker: "mlp" (linear, GELU, linear), "linear", or "transformer".
      hidden: width inside an "mlp" maker; 0 is twice the model's width.
      output_scale: makers return `s * RMSNorm(z)` with a learned s instead of z.
      multi_valued: "mean" or "sum" of the rows of a multi-valued feature.
      semantic_id: "concat", "sum", or "prefix" (hashed n-grams of the code prefix).
    """

    embedding_dim: int = 16
    embedding_dims: dict[str, int] = dataclasses.field(default_factory=dict)
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
      width, heads, layers: d, H and the number of blocks.
      windows: w of each sliding layer, the last ones of the stack; layers before them see everything causally.
      gate: NLIR, the one-sided gate on the attention branch.
      gate_bias: b_g at the start.
      ffn_width: inner width of SwiGLU; 0 is 8/3 of the width, rounded up to a multiple of 8.
      qk_norm: RMSNorm on queries and keys.
      rope_base: largest wavelength of the rotary positions is 2 pi times this.
      dropout: rate on the attention branch, the FFN branch and the tokens.
      dtype: of the matrix products; softmax, norms, logits and losses are float32 always.
      needed_rows: skip rows that no read-out can see. Exact; turn it off only to test that.
      attention: an implementation of `ops/attention.py`; "auto" takes the first of the platform that can serve.
      remat: what the backward pass computes again: "none", all but products with weights and attention ("dots"), or
        each block from its input ("full").
    """

    width: int = 64
    heads: int = 2
    layers: int = 4
    windows: tuple[int, ...] = (32, 16)
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
      log_every: steps between log lines; the only host synchronisation.
      best_metric: "macro_auc", "macro_gauc", or "loss" (lower is better): decides the best checkpoint.
      patience: evaluations without a better value before the run stops; 0 never stops early.
    """

    stop_at: int = 0
    eval_every: int = 0
    eval_split: str = "valid"
    eval_samples: int = 0
    save_every: int = 0
    keep: int = 2
    log_every: int = 20
    best_metric: Literal["macro_auc", "macro_gauc", "loss"] = "macro_auc"
    patience: int = 0


@dataclasses.dataclass
class Config:
    """A run. `tokenrec train --config=FILE` reads one from a Python file's `get_config()`."""

    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    tokens: TokensConfig = dataclasses.field(default_factory=TokensConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)


def data_directory(config: Config) -> Path:
    """Folder of the prepared data set: `data.path`, or `data.name` under `TOKENREC_DATA` or `data/`."""
    if config.data.path:
        return Path(config.data.path)
    if config.data.name:
        return Path(os.environ.get("TOKENREC_DATA", "data")) / config.data.name
    raise InputError("data.path is empty and so is data.name; give --data DIR or --config.data.path=DIR")


def validate(config: Config) -> Config:
    """Returns `config` if nothing is wrong with it on its own; the data set is checked against it when opened.

    Raises:
      InputError: every problem, a line each, with field, value, reason and remedy.
    """
    problems = list(_type_problems(config, "")) or list(_problems(config))
    if problems:
        raise InputError("the config has problems:\n  " + "\n  ".join(problems))
    return config


def _problems(c: Config) -> Iterator[str]:
    positive = {
        "data.events": c.data.events,
        "data.candidates": c.data.candidates,
        "data.batch_size": c.data.batch_size,
        "data.eval_batch_size": c.data.eval_batch_size,
        "data.window_rows": c.data.window_rows,
        "tokens.embedding_dim": c.tokens.embedding_dim,
        "tokens.target_tokens": c.tokens.target_tokens,
        "model.width": c.model.width,
        "model.heads": c.model.heads,
        "model.layers": c.model.layers,
        "optim.steps": c.optim.steps,
        "optim.accumulate": c.optim.accumulate,
        "train.log_every": c.train.log_every,
        "train.keep": c.train.keep,
    }
    positive |= {f"tokens.embedding_dims['{name}']": width for name, width in c.tokens.embedding_dims.items()}
    for field, value in positive.items():
        if value < 1:
            yield f"{field}={value} must be at least 1"
    for field, value in {
        "seed": c.seed,
        "tokens.user_tokens": c.tokens.user_tokens,
        "tokens.hidden": c.tokens.hidden,
        "model.ffn_width": c.model.ffn_width,
        "train.eval_every": c.train.eval_every,
        "train.eval_samples": c.train.eval_samples,
        "train.save_every": c.train.save_every,
        "train.patience": c.train.patience,
    }.items():
        if value < 0:
            yield f"{field}={value} must not be negative; 0 is the default"
    if any(value < 1 for value in positive.values()):
        return
    if c.model.width % c.model.heads:
        yield f"model.heads={c.model.heads} does not divide model.width={c.model.width}"
    elif (c.model.width // c.model.heads) % 2:
        yield f"model.width / model.heads = {c.model.width // c.model.heads} is odd; rotary positions need an even head"
    if len(c.model.windows) > c.model.layers:
        yield f"model.windows has {len(c.model.windows)} entries for model.layers={c.model.layers}; drop some"
    if any(w < 1 for w in c.model.windows):
        yield f"model.windows={c.model.windows}: a window counts the row itself, so it is at least 1"
    if any(b > a for a, b in zip(c.model.windows, c.model.windows[1:], strict=False)):
        yield f"model.windows={c.model.windows} grow; BFTS windows shrink from bottom to top"
    if not 0 <= c.model.dropout < 1:
        yield f"model.dropout={c.model.dropout} must be in [0, 1)"
    if c.data.paradigm == "nio" and c.model.windows and c.model.windows[-1] <= c.tokens.target_tokens + 1:
        yield (
            f"model.windows[-1]={c.model.windows[-1]} holds no event: it must exceed tokens.target_tokens + 1 = "
            f"{c.tokens.target_tokens + 1}"
        )
    if c.data.paradigm == "uc":
        if c.tokens.fused:
            yield "tokens.fused=True with data.paradigm='uc': a fused token holds the label it must predict; use False"
        if c.data.candidates != 1:
            yield f"data.candidates={c.data.candidates} with data.paradigm='uc': a user stream has no candidates; use 1"
        if c.tokens.target_tokens != 1:
            tokens = c.tokens.target_tokens
            yield f"tokens.target_tokens={tokens} with data.paradigm='uc': the state token is the target; use 1"
        if not 0 <= c.data.overlap < c.data.events:
            yield f"data.overlap={c.data.overlap} must be at least 0 and below data.events={c.data.events}"
    elif c.data.overlap:
        yield f"data.overlap={c.data.overlap} is for data.paradigm='uc'; a sample of 'nio' has its own history, use 0"
    for bucket in c.data.buckets:
        if not 0 < bucket < c.data.events:
            yield f"data.buckets: {bucket} must lie between 1 and data.events - 1 = {c.data.events - 1}"
    if c.data.batch_size % c.optim.accumulate:
        yield f"optim.accumulate={c.optim.accumulate} does not divide data.batch_size={c.data.batch_size}"
    if not 0 <= c.optim.warmup_steps <= c.optim.steps:
        yield f"optim.warmup_steps={c.optim.warmup_steps} must lie between 0 and optim.steps={c.optim.steps}"
    if not 0 <= c.train.stop_at <= c.optim.steps:
        yield f"train.stop_at={c.train.stop_at} must lie between 0 (the end) and optim.steps={c.optim.steps}"
    for name in ("beta1", "beta2"):
        if not 0 <= getattr(c.optim, name) < 1:
            yield f"optim.{name}={getattr(c.optim, name)} must be in [0, 1)"
    if not c.model.rope_base > 1:
        yield f"model.rope_base={c.model.rope_base} must be above 1"
    for name in ("learning_rate", "table_learning_rate", "epsilon"):
        if not getattr(c.optim, name) > 0:
            yield f"optim.{name}={getattr(c.optim, name)} must be above 0"
    for name in ("weight_decay", "table_weight_decay", "clip_norm", "final_fraction"):
        if not getattr(c.optim, name) >= 0:
            yield f"optim.{name}={getattr(c.optim, name)} must not be negative"
    for axis in ("fsdp", "tensor"):
        if getattr(c.mesh, axis) < 1:
            yield f"mesh.{axis}={getattr(c.mesh, axis)} must be at least 1"
    if c.mesh.data < 1 and c.mesh.data != -1:
        yield f"mesh.data={c.mesh.data} must be at least 1, or -1 for all that is left"
    for name, weight in c.data.tasks.items():
        if not weight > 0:
            yield f"data.tasks['{name}']={weight} must be above 0; leave a task out instead"


def _type_problems(value: Any, prefix: str) -> Iterator[str]:
    """Values that an override or a config file set to the wrong type."""
    hints = typing.get_type_hints(type(value))
    for field in dataclasses.fields(value):
        name, got, hint = prefix + field.name, getattr(value, field.name), hints[field.name]
        if dataclasses.is_dataclass(hint):
            if not isinstance(got, hint):  # type: ignore[arg-type]
                yield f"{name}={got!r} must be a {hint.__name__}"  # type: ignore[union-attr]
            else:
                yield from _type_problems(got, name + ".")
        elif not _has_type(got, hint):
            choices = get_args(hint) if typing.get_origin(hint) is Literal else ()
            reason = suggest(str(got), choices) if choices else f", which is not {_hint_name(hint)}"
            yield f"{name}={got!r}{reason}"


def _has_type(value: Any, hint: Any) -> bool:
    origin, args = typing.get_origin(hint), get_args(hint)
    if origin is Literal:
        return value in args
    if origin is tuple:
        return isinstance(value, (tuple, list)) and all(_has_type(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _has_type(k, args[0]) and _has_type(v, args[1]) for k, v in value.items()
        )
    if origin is types.UnionType:
        return any(_has_type(value, a) for a in args)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def _hint_name(hint: Any) -> str:
    if hint is float:
        return "a finite number"
    return getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=1) + "\n"


def from_json(text: str) -> Config:
    """Inverse of `to_json`; an unknown field is an InputError that names the near one, so is text that is not JSON."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"the config is not JSON: {error}") from error
    return _build(Config, value, "")


def _build[T](kind: type[T], value: Any, prefix: str) -> T:
    if not isinstance(value, dict):
        raise InputError(f"config '{prefix.rstrip('.')}' is {value!r}, not a JSON object of its fields")
    hints = typing.get_type_hints(kind)
    known = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    built: dict[str, Any] = {}
    for key, item in value.items():
        if key not in known:
            raise InputError(f"config field '{prefix}{key}' does not exist{suggest(key, known)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            item = _build(typing.cast(type, hint), item, f"{prefix}{key}.")
        elif typing.get_origin(hint) is tuple and isinstance(item, list):
            item = tuple(item)
        built[key] = item
    return kind(**built)

"""The train state, and the one description of it from which everything derives.

`ModelSpec` is the static half of a run: config, schema and lookup plan. `init_state`
makes the arrays. `abstract_state` is the shapes and shardings of what `init_state` would
make; restoring a checkpoint, compiling ahead of time and exporting all start from it.
This is the only module that splits Flax modules into graph and weights and binds them
again; elsewhere weights are a flat dict.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from tokenrec.alignment import Alignment, plan_alignment
from tokenrec.config import Config, data_directory
from tokenrec.config.alignment import alignment_tasks
from tokenrec.config.backbones import is_decoder
from tokenrec.config.model_config import DType
from tokenrec.config.prompt import parse_prompt
from tokenrec.data.interaction_log import Catalogue
from tokenrec.data.schema import Schema
from tokenrec.data.tokenizer import encode_literal, load_tokenizer
from tokenrec.errors import InputError
from tokenrec.language.tokenizer_checks import check_literals
from tokenrec.models.recommender import Recommender
from tokenrec.models.stream_layout import Literals, stream_layout
from tokenrec.ops.layers import draw_uniform
from tokenrec.ops.tables.api import storage_spec
from tokenrec.ops.tables.lookup import RowsState
from tokenrec.optim import dense_optimizer
from tokenrec.sharding import RULES
from tokenrec.task_losses import check_request_loss
from tokenrec.task_plan import (
    TaskPlan,
    check_auxiliary,
    evaluated_tasks,
    plan_tasks,
)
from tokenrec.tokens.embed import Embedder
from tokenrec.tokens.id_dropout import check_table_names
from tokenrec.tokens.layout import Layout
from tokenrec.tuning import is_frozen, split_frozen

# Standard deviation of the numbers that table rows start from.
TABLE_DEVIATION = 0.05


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes.

    Attributes:
      step: `[] int32`, batches consumed, also those of skipped steps: the position in the
        data, and the clock of the learning rates.
      params: dense weights by name, such as "backbone/blocks/0/gate/bias". Those that
        `tuning.method` freezes have no optimizer state.
      tables: stacks of embedding tables, each `[rows, width]` or packed, as they are
        stored (see `tokenrec/ops/tables/api.py`).
      opt_state: `"dense"`, the optax state; `"rows"`, a `RowsState` per stack; and with
        `optim.spike_norm` `"norm"`, `[] float32`, the running mean of gradient norms, 0
        before the first step.
    """

    step: jax.Array
    params: dict[str, jax.Array]
    tables: dict[str, jax.Array]
    opt_state: dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class ModelSpec:
    """The static half of a model. Made by `build_model`.

    It is hashed by identity, so that it can be a static argument of a jitted function.

    Attributes:
      config: config of the run.
      schema: features of the data set, without those that `data.exclude` leaves out.
      tasks: names of the labels that are learned.
      embedder: plan of all table lookups.
      literals: token ids of each literal text of the prompt, in order.
      epoch_steps: training steps of an epoch, which `optim.table_rates` follow; 0 where
        it is not known.
      updates: updates of a training step, each on a share of its batch (elastic.py).
      alignment: tasks of `head.alignment`; None without any, or without a catalogue.
    """

    config: Config
    schema: Schema
    tasks: tuple[str, ...]
    embedder: Embedder
    literals: Literals = ()
    epoch_steps: int = 0
    updates: int = 1
    alignment: Alignment | None = None

    @functools.cached_property
    def task_plans(self) -> tuple[TaskPlan, ...]:
        """How each task of ranking is learned."""
        return plan_tasks(self.schema, self.tasks, self.config.data.losses)

    @property
    def evaluated_plans(self) -> tuple[TaskPlan, ...]:
        """The same of the tasks that are evaluated, in the columns of their scores."""
        return evaluated_tasks(self.task_plans, self.config.data.auxiliary).plans

    def param_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the dense weights, by name."""
        _, leaves = _module_structure(self)
        return {
            _weight_name(path): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in leaves
        }

    def layout(
        self,
        events: int,
        *,
        serving: bool = False,
        candidates: int | None = None,
        codes: int | None = None,
    ) -> Layout:
        """Layout of this model's streams; see `stream_layout` for the arguments."""
        return stream_layout(
            self.config,
            self.schema,
            events,
            self.literals,
            serving=serving,
            candidates=candidates,
            codes=codes,
        )


def build_model(
    config: Config,
    schema: Schema,
    tasks: tuple[str, ...],
    *,
    epoch_steps: int = 0,
    updates: int = 1,
    catalogue: Catalogue | None = None,
) -> ModelSpec:
    """Build the model of a config on a data set.

    Args:
      config: a validated config.
      schema: schema of the data set without the excluded features.
      tasks: names of the labels to learn.
      epoch_steps: as `ModelSpec.epoch_steps`.
      updates: as `ModelSpec.updates`.
      catalogue: that of the data set, for `head.item_features` and `head.alignment`; a
        model that has them and is not trained can do without.

    Raises:
      InputError: the prompt has literal text and the data set no tokenizer, the last
        sliding window holds no event, an option of ids names an unknown table, an
        option of tasks an unknown task or a loss that does not fit it, or
        `head.item_features` does not fit.
    """
    check_table_names(schema, config.tokens)
    if config.data.objective == "ranking":
        plans = plan_tasks(schema, tasks, config.data.losses)
        check_auxiliary(config.data, tasks)
        check_request_loss(plans, config.data.request_loss)
    ids = None if catalogue is None else catalogue.ids
    model = ModelSpec(
        config,
        schema,
        tasks,
        Embedder.build(schema, config, ids),
        prompt_literals(config),
        epoch_steps,
        updates,
        _build_alignment(config, schema, catalogue),
    )
    _check_last_window(model)
    return model


def _check_last_window(model: ModelSpec) -> None:
    """Check that a candidate sees an event in the last sliding layer.

    The number of a candidate's tokens depends on the data set (the words of a title), so
    validation of the config alone cannot check this.
    """
    config = model.config
    windows = [window for window in config.model.windows if window]
    if config.data.objective != "ranking" or config.data.paradigm != "nio":
        return
    if not windows:
        return
    layout = model.layout(config.data.events, candidates=1)
    candidate_tokens = int(np.sum(layout.candidate == 0))
    if windows[-1] <= candidate_tokens + 1:
        raise InputError(
            f"model.windows: {windows[-1]} holds no event: a candidate of this prompt "
            f"has {candidate_tokens} tokens; use at least {candidate_tokens + 2}, or "
            "drop the window"
        )


def _build_alignment(
    config: Config, schema: Schema, catalogue: Catalogue | None
) -> Alignment | None:
    """Plan the alignment tasks of a config, their texts encoded."""
    tasks = alignment_tasks(config)
    texts = [text for task in tasks for text in (task.before, task.between)]
    ids = iter(_encode_literals(config, [text for text in texts if text]))
    encoded = [next(ids) if text else () for text in texts]
    pairs = tuple(zip(encoded[::2], encoded[1::2], strict=True))
    return plan_alignment(tasks, pairs, schema, catalogue)


def prompt_literals(config: Config) -> Literals:
    """Encode the literal texts of the prompt with the data set's tokenizer.

    Raises:
      InputError: the data set has no tokenizer, or not that of the language model: it
        does not know a control token in the texts, or has more words.
    """
    texts = [segment.text for segment in parse_prompt(config) if segment.kind == "text"]
    return _encode_literals(config, texts)


def _encode_literals(config: Config, texts: list[str]) -> Literals:
    if not texts:
        return ()
    directory = data_directory(config)
    tokenizer = load_tokenizer(directory)
    if is_decoder(config.model):
        check_literals(tokenizer, texts, config.model, directory)
    return tuple(tuple(encode_literal(tokenizer, text).tolist()) for text in texts)


def bind_params(
    model: ModelSpec, params: dict[str, jax.Array], *, sums: DType = "float32"
) -> Recommender:
    """Build the module with these weights.

    It is cheap and pure; call it inside a traced function.

    Args:
      model: the model.
      params: its dense weights by name: arrays, or abstract ones for a module of shapes.
      sums: as `optim.gradient_sums`. A product sums the gradient of its weight in the
        type that the weight has.

    Raises:
      InputError: weights are missing, unknown, or of another shape or type than the
        model's. Most such weights would not fail later, but be broadcast or ignored.
    """
    graph, leaves = _module_structure(model)
    _check_weights({_weight_name(path): leaf for path, leaf in leaves}, params)
    if sums != "float32":
        params = {
            name: leaf.astype(sums)
            if in_shards(name, jax.typeof(leaf).sharding.spec)
            else leaf
            for name, leaf in params.items()
        }
    weights = [(path, nnx.Param(params[_weight_name(path)])) for path, _ in leaves]
    return nnx.merge(graph, nnx.from_flat_state(weights))


def in_shards(name: str, spec: PartitionSpec) -> bool:
    """Whether a weight is one of the backbone's that lie in shards over `fsdp`.

    These are its matrices. `optim.gradient_sums` is the type of their gradients.
    """
    return name.startswith("backbone/") and RULES.embed in spec


def _check_weights(
    expected: dict[str, jax.ShapeDtypeStruct], params: dict[str, jax.Array]
) -> None:
    """Raise InputError unless `params` has these names, shapes and types."""
    problems = []
    for name, leaf in expected.items():
        if name not in params:
            problems.append(
                f"weight '{name}' is missing, and the model needs {_shape_text(leaf)}"
            )
        elif _shape_text(params[name]) != _shape_text(leaf):
            problems.append(
                f"weight '{name}' is {_shape_text(params[name])}, and the model needs "
                f"{_shape_text(leaf)}"
            )
    problems.extend(
        f"weight '{name}' {_shape_text(params[name])} is not one of the model's"
        for name in sorted(params.keys() - expected.keys())
    )
    if not problems:
        return
    more = f" (and {len(problems) - 1:,} more)" if len(problems) > 1 else ""
    raise InputError(
        f"{problems[0]}{more}: these weights belong to another config or data set; build "
        "the model with those of the run that they come from, or carry them over with "
        "train.warm_start"
    )


def init_state(model: ModelSpec, seed: int) -> TrainState:
    """Draw a fresh state under the mesh in use.

    Every array is made where it will lie: no device ever holds more than its part.
    """
    weights_key, tables_key = jax.random.split(jax.random.key(seed))
    _, weights = nnx.split(_make_module(model, weights_key))
    params = {
        _weight_name(path): leaf[...] for path, leaf in nnx.to_flat_state(weights)
    }

    tables: dict[str, jax.Array] = {}
    rows: dict[str, RowsState] = {}
    # The order of the names decides the keys, so it must not depend on the schema's.
    for number, (name, stack) in enumerate(sorted(model.embedder.stacks.items())):
        key = jax.random.fold_in(tables_key, number)
        shape, spec = storage_spec(stack)
        tables[name] = draw_uniform(key, shape, TABLE_DEVIATION, spec)
        sums = jnp.zeros(stack.stored_rows, out_sharding=PartitionSpec(spec[0]))
        rows[name] = RowsState(sums)

    optim = model.config.optim
    trained, frozen = split_frozen(model.config, params)
    dtype = jnp.dtype(model.config.model.dtype)
    # One after the other, so that no second copy of all of them is in memory.
    del weights, params
    for name in list(frozen):
        frozen[name] = frozen.pop(name).astype(dtype)
    params = trained | frozen
    opt_state: dict[str, Any] = {
        "dense": dense_optimizer(optim).init(trained),
        "rows": rows,
    }
    if optim.spike_norm:
        opt_state["norm"] = jnp.zeros((), out_sharding=RULES())
    step = jnp.zeros((), jnp.int32, out_sharding=RULES())
    return TrainState(step, params, tables, opt_state)


def abstract_state(model: ModelSpec) -> TrainState:
    """Shapes, dtypes and shardings of the state under the mesh in use; no arrays."""
    mesh = jax.sharding.get_mesh()

    def with_sharding(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # A scalar made by optax carries no sharding; it is replicated.
        spec = RULES() if leaf.sharding is None else leaf.sharding.spec
        sharding = jax.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, jax.eval_shape(lambda: init_state(model, 0)))


def table_statistics(state: TrainState) -> dict[str, float]:
    """Measure the tables of a state, under the mesh in use, on all processes.

    Returns:
      For each stack of tables, `STACK/rms`, the root mean square of its entries, and
      `STACK/trained_rows`, the share of its rows that have had a gradient.
    """
    values = jax.device_get(_measure_tables(state.tables, state.opt_state["rows"]))
    return {name: float(value) for name, value in values.items()}


@jax.jit
def _measure_tables(
    tables: dict[str, jax.Array], rows: dict[str, RowsState]
) -> dict[str, jax.Array]:
    values = {}
    for name, table in tables.items():
        values[f"{name}/rms"] = jnp.sqrt(jnp.mean(jnp.square(table)))
        values[f"{name}/trained_rows"] = jnp.mean(rows[name].sum > 0)
    return values


def _make_module(model: ModelSpec, key: jax.Array) -> Recommender:
    return Recommender(
        model.config,
        model.schema,
        sum(plan.task.width for plan in model.task_plans),
        model.literals,
        rngs=nnx.Rngs(params=key),
    )


@functools.lru_cache(maxsize=16)
def _module_structure(
    model: ModelSpec,
) -> tuple[Any, tuple[tuple[tuple[Any, ...], jax.ShapeDtypeStruct], ...]]:
    """Graph of the model's modules, and the path and shape of each weight in it."""
    module = nnx.eval_shape(lambda: _make_module(model, jax.random.key(0)))
    graph, weights = nnx.split(module)
    return graph, tuple(
        (path, _stored(model, path, leaf.get_value()))
        for path, leaf in nnx.to_flat_state(weights)
    )


def _stored(
    model: ModelSpec, path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct
) -> jax.ShapeDtypeStruct:
    """A weight as the state holds it: frozen ones in the type of the computation."""
    if not is_frozen(model.config, _weight_name(path)):
        return leaf
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(model.config.model.dtype))


def _shape_text(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _weight_name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))
